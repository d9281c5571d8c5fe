"""Are planted shortcuts found, of every kind, and is nothing named where nothing is?

Every network is small, learns digits or textures in seconds, and is audited on pictures that it has not seen. What was
planted is known; whether the network relies on it is read off pictures that differ in the plant alone, before any
audit: where the planted label keeps most of its accuracy without it, and other labels' pictures with it are not taken
for that label, there is nothing to find, and the network is left out. Printed is, for each kind, beside two baselines:

- AUROC of the strength: planted labels against all other labels of these networks and of clean ones;
- how often the first finding is a planted label, and how often it is confident, too;
- false alarms: how often an audit names a label confidently that has nothing.

The baselines are the audit's own shortcut score of *places*, and SpRAy (Lapuschkin et al. 2019) on the same score
maps: spectral clustering by cosine similarity, the number of clusters from the eigengap, a label's suspicion the
largest product of purity and focus among its clusters. Neither says when to be confident.

The rule was chosen on networks of even seeds; by default ``--seeds`` and ``--clean`` are odd.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import SpectralClustering
from sklearn.metrics import roc_auc_score
from sklearn.metrics.pairwise import cosine_similarity
from tqdm import tqdm

from captum_scoremap.audit import Audit, audit
from captum_scoremap.audit.shards import Shards
from captum_scoremap.models import LoadedModel
from tests.planted import KINDS, LABELS, Case, cases, pictures, trained

IMAGES = 500
METHODS = ("findings", "place score", "SpRAy")
RELIED = 0.2  # of other labels' pictures with the plant are taken for its label, or half of its own are lost without
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """What an audit says of one network: a score for each label and method, and the labels named confidently."""

    case: Case
    scores: dict[str, Scores]
    confident: frozenset[int]
    kind: str | None

    @property
    def planted(self) -> NDArray[np.bool_]:
        """Which labels carry something, (K,)."""
        return np.isin(np.arange(LABELS), self.case.planted)


@torch.no_grad()
def relies(case: Case, module: torch.nn.Module) -> bool:
    """Whether the network goes by the plant."""
    label = case.planted[0]
    with_it, without = (pictures(case, 200, test=True, plant=plant) for plant in (True, False))
    mine = with_it.labels == label
    taken, plain = ((module(one.images).argmax(1) == label).double() for one in (with_it, without))
    gained = float(taken[~mine].mean() - plain[~mine].mean())
    return gained >= RELIED or float(plain[mine].mean()) <= 0.5 * float(taken[mine].mean())


def audited(case: Case, module: torch.nn.Module, folder: Path) -> Outcome:
    """Audit a network, and score its labels by each method."""
    done = audit(
        pictures(case, IMAGES, test=True), LoadedModel(case.kind, module), out=folder, progress=False, batch_size=64
    )
    scores = {method: np.zeros(LABELS) for method in METHODS}
    for finding in done.analysis.findings:
        scores["findings"][finding["label"]] = finding["strength"]
    for row in done.analysis.labels:
        scores["place score"][row["label"]] = row["shortcut"] or 0
    scores["SpRAy"] = spray(done)
    named = [one for one in done.analysis.findings if one["confident"] and one["kind"] != "confused pair"]
    return Outcome(case, scores, frozenset(one["label"] for one in named), named[0]["kind"] if named else None)


def spray(done: Audit) -> Scores:
    """Suspicion of each label by spectral clustering of score maps."""
    layer = done.settings["layers"][-1]
    table = Shards(done.folder).table("maps").to_pylist()
    rows = [row for row in table if row["layer"] == layer and row["role"] == "predicted"]
    maps = np.stack([row["values"] for row in rows]).astype(float)
    labels = np.array([row["label"] for row in rows])
    maps -= maps.min(1, keepdims=True)
    maps /= maps.max(1, keepdims=True) + 1e-8
    affinity = np.clip(cosine_similarity(maps), 0, None)
    degree = 1 / np.sqrt(affinity.sum(1))
    eigenvalues = np.linalg.eigvalsh(np.eye(len(maps)) - degree[:, None] * affinity * degree)[:12]
    clusters = max(2, int(np.argmax(np.diff(eigenvalues)[1:])) + 2)
    found = SpectralClustering(clusters, affinity="precomputed", random_state=0).fit_predict(affinity)
    share = maps / (maps.sum(1, keepdims=True) + 1e-8)
    focus = 1 + (share * np.log(share + 1e-8)).sum(1) / np.log(maps.shape[1])
    scores = np.zeros(LABELS)
    for cluster in range(clusters):
        inside = found == cluster
        for label in np.unique(labels[inside]):
            purity = float((labels[inside] == label).mean())
            scores[label] = max(scores[label], purity * float(focus[inside & (labels == label)].mean()))
    return scores


def rows(outcomes: Sequence[Outcome]) -> list[dict[str, str]]:
    """A row of the table for each kind and method."""
    clean = [one for one in outcomes if one.case.kind == "clean"]
    found = []
    for kind in KINDS:
        mine = [one for one in outcomes if one.case.kind == kind]
        if not mine:
            continue
        for method in METHODS:
            ours = method == "findings"
            row = {"kind": kind, "networks": str(len(mine)), "method": method}
            if kind != "clean":
                pool = [*mine, *clean]
                planted = np.concatenate([one.planted for one in pool])
                values = np.concatenate([one.scores[method] for one in pool])
                row["AUROC"] = f"{roc_auc_score(planted, values):.3f}"
                first = [int(one.scores[method].argmax()) in one.case.planted for one in mine]
                both = [hit and bool(one.confident & {*one.case.planted}) for hit, one in zip(first, mine, strict=True)]
                row |= {
                    "first": f"{np.mean(first):.2f}",
                    "first and confident": f"{np.mean(both):.2f}" if ours else "-",
                }
            else:
                row |= {"AUROC": "-", "first": "-", "first and confident": "-"}
            wrong = [bool(one.confident - {*one.case.planted}) for one in mine]
            row["false alarms"] = f"{np.mean(wrong):.2f}" if ours else "-"
            named = [one.kind for one in mine if one.kind is not None]
            row["named as"] = ", ".join(f"{name} {named.count(name)}" for name in dict.fromkeys(named)) if ours else ""
            found.append(row)
    return found


def markdown(table: Sequence[dict[str, str]]) -> str:
    """Rows as a table."""
    head = list(table[0])
    lines = [head, ["---"] * len(head), *[list(row.values()) for row in table]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=range(31, 41, 2), help="of networks with a plant")
    parser.add_argument("--clean", nargs="+", type=int, default=range(141, 181, 2), help="of more clean networks")
    parser.add_argument("--out", type=Path, help="file that keeps the table")
    parser.add_argument("--cache", type=Path, help="folder that keeps trained networks")
    options = parser.parse_args(arguments)
    outcomes, left_out = [], []
    for case in tqdm([*cases(options.seeds), *cases(options.clean, ["clean"])], unit="network"):
        module = trained(case, options.cache)
        if case.planted and not relies(case, module):
            left_out.append(case)
            continue
        with tempfile.TemporaryDirectory() as folder:
            outcomes.append(audited(case, module, Path(folder) / "audit"))
    text = report(outcomes, left_out, options.seeds, options.clean)
    print(text)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")


def report(outcomes: Sequence[Outcome], left_out: Sequence[Case], seeds: Sequence[int], clean: Sequence[int]) -> str:
    """The table, and how it was made."""
    named = ", ".join(f"{case.kind} ({case.scene}, {case.network}, seed {case.seed})" for case in left_out) or "none"
    command = f"--seeds {' '.join(map(str, seeds))} --clean {' '.join(map(str, clean))}"
    return (
        "# Planted shortcuts\n\n"
        f"`python -m tests.benchmarks shortcuts {command}`\n"
        f"(torch {torch.__version__}, {IMAGES} pictures an audit)\n\n"
        f"{len(outcomes)} networks. Left out, as they do not rely on what was planted: {named}.\n\n"
        f"{markdown(rows(outcomes))}\n\n"
        f"{(__doc__ or '').strip()}\n"
    )


if __name__ == "__main__":
    main()
