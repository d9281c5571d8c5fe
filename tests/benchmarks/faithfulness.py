"""Do the maps point at what the network uses? Score maps and their peers, measured by the very same code.

    python -m tests.benchmarks faithfulness --images DIR --out RESULTS

DIR holds photographs and a ``labels.csv`` with the columns ``file`` and ``imagenet_index``; those count to which the
network gives their label a probability of more than one half. Every method's values are written to RESULTS as soon as
it is done, and what is there already is not measured again; then the table is printed and drawn, with everything that
RESULTS holds. Means are given with their 95% confidence intervals. Slow methods may be measured on fewer images: they
are the first ones of the same order, and the fused map is compared with each method on those that both have seen.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from captum_scoremap import metrics
from captum_scoremap.models import load_model, prepare, read_image
from tests.benchmarks.peers import METHODS

Values: TypeAlias = dict[str, list[float]]

NETWORKS = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
SURE = 0.5
COLUMNS = {
    "grid 2 x 2": ("Grid 2 × 2 ↑", 3),
    "grid 3 x 3": ("Grid 3 × 3 ↑", 3),
    "insertion": ("Insertion ↑", 3),
    "deletion": ("Deletion ↓", 3),
    "gap": ("Insertion − deletion ↑", 3),
    "patch": ("Patch score ↑", 3),
    "randomized": ("Randomized → 0", 2),
    "cost": ("Forward + backward", 1),
}
DRAWN = ("grid 2 x 2", "grid 3 x 3", "gap", "patch")


def sure_images(folder: Path, network: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The network, ready for explaining, and the photographs that it is sure of, shuffled, with their labels."""
    loaded = load_model(network)
    model = prepare(loaded.module)
    with (folder / "labels.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    inputs = torch.stack([loaded.preprocessing(read_image(folder / row["file"])) for row in rows])
    target = torch.tensor([int(row["imagenet_index"]) for row in rows])
    with torch.no_grad():
        probabilities = torch.cat([model(batch).softmax(1) for batch in inputs.split(8)])
    sure = (probabilities.gather(1, target[:, None])[:, 0] > SURE).nonzero()[:, 0]
    shuffled = sure[torch.randperm(len(sure), generator=torch.Generator().manual_seed(0))]
    return model, inputs[shuffled], target[shuffled]


class Remembered:
    """An attribution, one image at a time, that does not compute the map of the same image and label again."""

    def __init__(self, attribute: metrics.Attribution) -> None:
        self._attribute = attribute
        self._maps: dict[tuple[int, int], Tensor] = {}

    def __call__(self, inputs: Tensor, target: Tensor) -> Tensor:
        maps = []
        for image, label in zip(inputs, target, strict=True):
            key = hash(image.cpu().numpy().tobytes()), int(label)
            if key not in self._maps:
                found = self._attribute(image[None], label[None]).detach()
                self._maps[key] = metrics.input_sized(found, *image.shape[-2:])[:, None]
            maps.append(self._maps[key])
        return torch.cat(maps)


def cost(model: nn.Module, attribute: metrics.Attribution, image: Tensor, label: Tensor, repeats: int = 5) -> float:
    """Processor time of one map, in that of one forward and backward pass; the best of some, taken in turn."""

    def forward_and_backward() -> None:
        inputs = image.clone().requires_grad_()
        torch.autograd.grad(model(inputs).gather(1, label[:, None]).sum(), inputs)

    def seconds(run: Callable[[], object]) -> float:
        start = time.process_time()
        run()
        return time.process_time() - start

    ours, unit = [], []
    attribute(image, label)
    forward_and_backward()
    for _ in range(repeats):
        ours.append(seconds(lambda: attribute(image, label)))
        unit.append(seconds(forward_and_backward))
    return min(ours) / min(unit)


def measure(name: str, model: nn.Module, inputs: Tensor, target: Tensor, options: argparse.Namespace) -> Values:
    """All metrics of one method, a list of values each."""
    method = METHODS[name]
    attribute = method(model)
    remembered = Remembered(attribute)
    values: Values = {"cost": [cost(model, attribute, inputs[:1], target[:1])]}
    few, labels = inputs[: options.count], target[: options.count]
    inserted = metrics.insertion(model, remembered, few, labels, steps=options.steps).area
    deleted = metrics.deletion(model, remembered, few, labels, steps=options.steps).area
    values |= {"insertion": inserted.tolist(), "deletion": deleted.tolist(), "gap": (inserted - deleted).tolist()}
    many, their_labels = inputs[: options.patches], target[: options.patches]
    boxes = metrics.strongest_window(remembered(many, their_labels)[:, 0], inputs.shape[-1] // 2)
    values["patch"] = metrics.patch_score(model, many, their_labels, boxes).tolist()
    for n, count in zip((2, 3), options.mosaics, strict=True):
        if not count:
            values[f"grid {n} x {n}"] = []
            continue
        pictures, cells = metrics.mosaics(inputs, target, n, count, torch.Generator().manual_seed(n))
        values[f"grid {n} x {n}"] = metrics.grid_pointing_game(attribute, pictures, cells).flatten().tolist()
    bottom = next(layer for layer, one in model.named_modules() if hasattr(one, "reset_parameters"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peers that divide by zero on a network of noise say so
        correlations = metrics.parameter_randomization(
            model, lambda randomized, x, y: Remembered(method(randomized))(x, y), few[:4], labels[:4], layers=[bottom]
        )
    values["randomized"] = correlations[bottom].tolist()
    return values


def leads(results: dict[str, Values], first: str = "FusedScoreMap") -> str:
    """By how much the first method is ahead of each other one, image by image, on what both were measured; Markdown."""
    lines = ["| " + first + " is ahead of | " + " | ".join(COLUMNS[column][0].rstrip(" ↑") for column in DRAWN) + " |"]
    lines.append("|---" * (len(DRAWN) + 1) + "|")
    for name, values in results.items():
        if name == first:
            continue
        cells = []
        for column in DRAWN:
            pairs = zip(results[first][column], values[column], strict=False)  # the same images, if not as many
            cells.append(_cell([ours - theirs for ours, theirs in pairs], COLUMNS[column][1]))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% confidence interval."""
    sample = torch.tensor(values, dtype=torch.float64)
    return float(sample.mean()), float(1.96 * sample.std() / math.sqrt(len(sample))) if len(sample) > 1 else 0.0


def _cell(values: Sequence[float], digits: int) -> str:
    mean, half = mean_and_interval(values)
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if half else "") if values else "-"


def table(results: dict[str, Values]) -> str:
    """Methods as rows, metrics as columns, best mean of each column in bold; Markdown."""
    best = {
        column: (min if "↓" in title else max)(
            mean_and_interval(values[column])[0] for values in results.values() if values[column]
        )
        for column, (title, _) in COLUMNS.items()
        if "↑" in title or "↓" in title
    }
    lines = [
        "| Method | " + " | ".join(title for title, _ in COLUMNS.values()) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for name, values in sorted(results.items(), key=lambda item: -mean_and_interval(item[1]["gap"])[0]):
        cells = []
        for column, (_, digits) in COLUMNS.items():
            number, *interval = _cell(values[column], digits).split(" ", maxsplit=1)
            is_best = values[column] and best.get(column) == mean_and_interval(values[column])[0]
            cells.append(" ".join([f"**{number}**" if is_best else number, *interval]))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: dict[str, dict[str, Values]], path: Path) -> None:
    """A panel for each metric, a row for each method, a color for each network."""
    networks = list(results)
    first = results[networks[0]]
    names = sorted(first, key=lambda name: mean_and_interval(first[name]["gap"])[0])
    figure = Figure(figsize=(12, 0.3 * len(names) + 1.3), layout="constrained")
    panels = figure.subplots(1, len(DRAWN), sharey=True)
    for panel, column in zip(panels, DRAWN, strict=True):
        for place, network in enumerate(networks):
            known = [name for name in names if name in results[network] and results[network][name][column]]
            means, halves = zip(*(mean_and_interval(results[network][name][column]) for name in known), strict=True)
            rows = [names.index(name) + 0.25 * (place - (len(networks) - 1) / 2) for name in known]
            style = {"fmt": "os^"[place], "color": ("#0072b2", "#d55e00", "#009e73")[place], "markersize": 4}
            panel.errorbar(means, rows, xerr=halves, elinewidth=1, label=network, **style)
        panel.set_title(COLUMNS[column][0].rstrip(" ↑"), fontsize=10)
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), names)
    for label in panels[0].get_yticklabels():
        label.set_fontweight("bold" if "ScoreMap" in label.get_text() else "normal")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=3, fontsize=8)
    figure.supxlabel("mean and 95% confidence interval; right is better", fontsize=9)
    figure.savefig(path, dpi=150)


def stored(folder: Path, network: str) -> dict[str, Values]:
    """What the folder holds of a network, in the order of the methods."""
    paths = {name: folder / network / f"{_file_name(name)}.json" for name in METHODS}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, print the tables, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="photographs and labels.csv")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results are kept")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=NETWORKS, help="default: all three")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    parser.add_argument("--count", type=int, default=64, help="images for insertion and deletion (default 64)")
    parser.add_argument("--patches", type=int, default=64, help="images for patch scores (default 64)")
    parser.add_argument("--steps", type=int, default=32, help="steps of insertion and deletion (default 32)")
    parser.add_argument(
        "--mosaics",
        type=int,
        nargs=2,
        default=(50, 20),
        metavar="N",
        help="mosaics of 2 x 2 and 3 x 3 (default 50 20; 0: none)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the results here")
    options = parser.parse_args(arguments)

    for network in options.networks:
        (options.out / network).mkdir(parents=True, exist_ok=True)
        missing = [name for name in options.methods if name not in stored(options.out, network)]
        if not missing:
            continue
        model, inputs, target = sure_images(options.images, network)
        for name in tqdm(missing, desc=network, unit="method"):
            values = measure(name, model, inputs, target, options)
            path = options.out / network / f"{_file_name(name)}.json"
            path.write_text(json.dumps(values), encoding="utf-8")
    results = {network: found for network in options.networks if (found := stored(options.out, network))}
    for network, found in results.items():
        print(f"\n{network}: values of each method\n")
        for name, values in found.items():
            print(f"{name}: " + ", ".join(f"{column} {len(values[column])}" for column in DRAWN))
        print(f"\n{table(found)}")
        if "FusedScoreMap" in found:
            print(f"\n{leads(found)}")
    if options.plot is not None:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
