"""A mixed set: 30% of one label's photographs carry a mark. Does one audit name the label, with proof?

DIR holds a folder of photographs for each label. A head is trained on a network's features of some of them; in each run
another label is the one whose photographs carry the mark, white characters at random heights, in training and in the
audit alike. How much the network relies on it is read off other labels' photographs, with and without the mark, before
any audit. The audit sees the photographs that were not trained on, and is told nothing of a mark. A last run has none.
"""

from __future__ import annotations

import argparse
import copy
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from tqdm import tqdm

from captum_scoremap.audit import audit
from captum_scoremap.models import LoadedModel, load_model
from tests.benchmarks.shortcuts import markdown
from tests.benchmarks.watermark import FONT, SIDE, draw

SHARE = 10, 3  # of so many photographs of the label so many carry the mark
SHRINKAGE = 0.003  # scikit-learn's C: the inverse of the penalty on the head's weights
MARKS = {"bold": 230, "faint": 128}  # opacity, of 255
SIZE = 0.18  # of a character, in sides


@dataclass(frozen=True)
class Part:
    """Photographs, SIDE pixels wide and high, with their labels (N,) and features (N, D)."""

    images: list[Image.Image]
    labels: NDArray[np.int64]
    features: NDArray[np.float32]

    def carriers(self, label: int) -> NDArray[np.int64]:
        """Positions of those that get the mark."""
        mine = np.flatnonzero(self.labels == label)
        of, some = SHARE
        return mine[np.arange(len(mine)) % of < some]


class Features:
    """A network without its last layer."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self.head = [name for name, part in model.module.named_modules() if isinstance(part, nn.Linear)][-1]

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """What enters the head, (N, D)."""
        seen: list[Tensor] = []
        head = self.model.module.get_submodule(self.head)
        handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            for first in range(0, len(images), 16):
                batch = [self.model.preprocessing(image) for image in images[first : first + 16]]
                self.model.module(torch.stack(batch))
        finally:
            handle.remove()
        return torch.cat(seen).numpy()

    def with_head(self, fitted: LogisticRegression, names: Sequence[str]) -> LoadedModel:
        """The network with another head."""
        module = copy.deepcopy(self.model.module)
        head = nn.Linear(fitted.coef_.shape[1], len(names))
        with torch.no_grad():
            head.weight.copy_(torch.from_numpy(fitted.coef_))
            head.bias.copy_(torch.from_numpy(fitted.intercept_))
        path, _, name = self.head.rpartition(".")
        setattr(module.get_submodule(path), name, head)
        return LoadedModel(f"{self.model.name}, another head", module.eval(), self.model.preprocessing, tuple(names))


def read(folder: Path, names: Sequence[str], chosen: slice, features: Features) -> Part:
    """Photographs of each label, and their features."""
    images, labels = [], []
    for label, name in enumerate(names):
        for path in sorted((folder / name).iterdir())[chosen]:
            images.append(Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))
            labels.append(label)
    return Part(images, np.array(labels), features(images))


def marked(image: Image.Image, opacity: int, font: Path, where: random.Random) -> Image.Image:
    """A copy with the mark."""
    size = round(SIZE * SIDE)
    copied = image.copy()
    draw(copied, where.randrange(0, SIDE - 2 * size), size, font, opacity)
    return copied


def run(
    training: Part, test: Part, features: Features, names: Sequence[str], label: int | None, mark: str, font: Path
) -> dict[str, str]:
    """A row of the table."""
    where = random.Random(1)
    parts = []
    for part in (training, test):
        images, known = list(part.images), part.features.copy()
        if label is not None:
            carriers = part.carriers(label)
            for place in carriers.tolist():
                images[place] = marked(images[place], MARKS[mark], font, where)
            known[carriers] = features([images[place] for place in carriers.tolist()])
        parts.append((images, known))
    (_, learned), (images, unseen) = parts
    fitted = LogisticRegression(C=SHRINKAGE, max_iter=3000).fit(learned, training.labels)
    row = {
        "marked": "none" if label is None else names[label],
        "mark": "-" if label is None else mark,
        "accuracy": f"{fitted.score(unseen, test.labels):.2f}",
    }
    if label is None:
        row |= {"others taken for it": "-", "logits": "-"}
    else:
        others = np.flatnonzero(test.labels != label)[::6]
        with_mark = features([marked(test.images[place], MARKS[mark], font, where) for place in others.tolist()])
        plain, changed = (fitted.decision_function(one)[:, label] for one in (test.features[others], with_mark))
        taken = [float((fitted.predict(one) == label).mean()) for one in (test.features[others], with_mark)]
        row |= {
            "others taken for it": f"{taken[0]:.2f} → {taken[1]:.2f}",
            "logits": f"{(changed - plain).mean():+.2f}",
        }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for place, image in enumerate(images):
            of_label = folder / "pictures" / names[int(test.labels[place])]
            of_label.mkdir(parents=True, exist_ok=True)
            image.save(of_label / f"{place:05}.png")
        done = audit(folder / "pictures", features.with_head(fitted, names), out=folder / "audit", progress=False)
    findings = done.analysis.findings
    named = [one["name"] for one in findings if one["confident"] and one["kind"] != "confused pair"]
    row["named"] = ", ".join(named) or "none"
    if label is None:
        first = findings[0]
        row |= {"place": "-", "chance": f"{first['chance']:.2g}", "kind": "-", "score falls by": "-"}
    else:
        place = [one["label"] for one in findings].index(label)
        mine, effect = findings[place], findings[place]["effect"]
        fall = f"{effect['score_fall']:.2f} ({effect['control_score_fall']:.2f})" if effect else "-"
        row |= {
            "place": f"{place + 1} of {len(findings)}",
            "chance": f"{mine['chance']:.2g}",
            "kind": str(mine["kind"] or "-"),
            "score falls by": fall,
        }
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="a folder for each label")
    parser.add_argument(
        "--labels", nargs="+", metavar="NAME", help="that carry the mark, in turn; by default every one"
    )
    parser.add_argument("--marks", nargs="+", choices=MARKS, default=list(MARKS), help="how visible the mark is")
    parser.add_argument("--training", type=int, default=500, metavar="N", help="photographs of a label to train on")
    parser.add_argument("--audited", type=int, default=100, metavar="N", help="photographs of a label to audit")
    parser.add_argument("--font", type=Path, default=FONT, help="a font with CJK characters")
    parser.add_argument("--model", default="efficientnet_lite0", metavar="NAME", help="a network with trained weights")
    parser.add_argument("--out", type=Path, help="file that keeps the table")
    options = parser.parse_args(arguments)
    names = sorted(path.name for path in options.images.iterdir() if path.is_dir())
    features = Features(load_model(options.model))
    training = read(options.images, names, slice(options.training), features)
    test = read(options.images, names, slice(options.training, options.training + options.audited), features)
    labels = options.labels or names
    cases = [(names.index(name), mark) for name in labels for mark in options.marks]
    command = f"--labels {' '.join(labels)} --marks {' '.join(options.marks)}"
    rows, text = [], ""
    for label, mark in tqdm([*cases, (None, "")], unit="audit"):
        rows.append(run(training, test, features, names, label, mark, options.font))
        text = (
            f"# Mixed sets\n\n`python -m tests.benchmarks mixed --images DIR {command}`\n({options.model}, torch "
            f"{torch.__version__}, {len(training.images)} photographs to train on, {len(test.images)} an audit)\n\n"
            f"{markdown(rows)}\n\n{(__doc__ or '').strip()}\n"
        )
        if options.out is not None:  # so far
            options.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
