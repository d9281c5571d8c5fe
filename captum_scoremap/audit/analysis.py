"""From single images to the whole set: how good, how exact, what each label is recognized by, what is odd.

Two passes over the shards, one shard in memory at a time. Labels are compared by *where* on the image their
score comes from: the positive part of the predicted label's score map at the last chosen layer.
"""

import heapq
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from captum_scoremap.audit.concentration import resized
from captum_scoremap.audit.shards import Shards, write_json, write_table

__all__ = ["INEXACT", "Analysis", "analyze"]

Array: TypeAlias = NDArray[np.float64]

EXAMPLES = 8
"""How many images are named where examples are asked for."""

INEXACT = 1e-3
"""A residual above this share of |S| is no rounding: the map at that layer does not add up to the score."""

_GRID = 16  # cells: finer maps are averaged before they are compared
_SHARES = ("bias_share", "top10_share", "border_share", "region_share")
_RANKED = 3  # images: labels with fewer are not compared with others


@dataclass(frozen=True)
class Analysis:
    """What an audit says of the whole set.

    Attributes:
        summary: Numbers of the whole set, as in ``summary.json``.
        labels: One mapping a label, the most suspicious first.
        pairs: One mapping for each pair of true and predicted label that was confused, the most frequent
            first.
        unusualness: Position of an image to 1 − cosine of its map with the mean of the label's other maps.
        findings: What the model may wrongly rely on, the most suspicious first; see
            `captum_scoremap.audit.findings.find`.
        changes: What changed against another run, label by label, the largest gain first; see
            `captum_scoremap.audit.compare.compare`.
    """

    summary: Mapping[str, Any]
    labels: Sequence[Mapping[str, Any]]
    pairs: Sequence[Mapping[str, Any]]
    unusualness: Mapping[int, float]
    findings: Sequence[Mapping[str, Any]] = ()
    changes: Sequence[Mapping[str, Any]] = ()


@dataclass
class _Mean:
    """A running mean and maximum."""

    total: float = 0.0
    count: int = 0
    maximum: float | None = None

    def add(self, *values: float | None) -> None:
        for value in values:
            if value is not None:
                self.total += value
                self.count += 1
                self.maximum = value if self.maximum is None else max(self.maximum, value)

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None


@dataclass
class _Label:
    """Running sums of the images of one label."""

    name: str = ""
    images: int = 0  # truly of the label
    correct: int = 0
    predicted: int = 0  # by the model
    maps: int = 0  # with anything positive
    unit_sum: Array = field(default_factory=lambda: np.zeros(()))  # of maps of length one
    share_sum: Array = field(default_factory=lambda: np.zeros(()))  # of maps that add up to one
    numbers: dict[str, _Mean] = field(default_factory=lambda: defaultdict(_Mean))
    typical: list[tuple[float, int]] = field(default_factory=list)
    unusual: list[tuple[float, int]] = field(default_factory=list)
    patches: list[tuple[float, int, float, float]] = field(default_factory=list)


@dataclass
class _Pair:
    """Running sums of the images of one confusion."""

    count: int = 0
    contrast: Array = field(default_factory=lambda: np.zeros(()))
    examples: list[tuple[float, int]] = field(default_factory=list)


def analyze(shards: Shards, layers: Sequence[str]) -> Analysis:
    """Summarize what the finished shards hold, and write it to the folder ``analysis`` beside them.

    The *shortcut score* of a label tells how much of its score comes from one and the same place in all its
    images, a place that no other label uses as much. It is the product of two numbers from 0 to 1:

    - *consistency*, the mean cosine of the maps of two different images of the label;
    - *private share*, the share of the label's mean map that lies above the mean map of every other label.

    A mark in a corner, a watermark or a frame stands out; an object that may be anywhere has a low
    consistency, and one in the middle shares its place with others. Labels with fewer than three images have
    none. The score ranks labels and proves nothing: labels of networks without a shortcut were seen to reach 0.2, those
    of networks with random weights, which look at places of their own for every label, 0.6.

    Args:
        shards: The results.
        layers: The audit's layers; maps of the last one are compared.

    Returns:
        The analysis.
    """
    labels: dict[int, _Label] = defaultdict(_Label)
    pairs: dict[tuple[int, int], _Pair] = defaultdict(_Pair)
    totals = _Totals()
    grid: tuple[int, int] | None = None
    for number in shards.finished():
        images = shards.read("images", number).to_pylist()
        measured = _by_index(shards, number, layers[-1])
        totals.add(images, shards.read("layers", number))
        maps = dict(_maps(shards, number, layers[-1]))
        if maps and grid is None:
            grid = _grid(next(iter(maps.values())))
        for image in images:
            if image["error"] is None and grid is not None:
                _add_image(image, measured[image["index"]], maps, grid, labels, pairs)
    unusualness: dict[int, float] = {}
    for number in shards.finished():
        images = shards.read("images", number).to_pylist()
        maps = dict(_maps(shards, number, layers[-1]))
        for image in images:
            if image["error"] is None and grid is not None:
                _compare_image(image, maps, grid, labels, unusualness)
    private = _private_maps(labels)
    analysis = Analysis(
        totals.summary(layers),
        _ranked([_label_row(index, label, private.get(index), grid) for index, label in labels.items()]),
        sorted((_pair_row(pair, pairs[pair], labels, grid) for pair in pairs), key=lambda row: -row["images"]),
        unusualness,
    )
    _write(shards.folder / "analysis", analysis)
    return analysis


class _Totals:
    """Sums over all images and layers."""

    def __init__(self) -> None:
        self.images = self.known = self.correct = 0
        self.seconds = 0.0
        self.failed: list[dict[str, Any]] = []
        self.layers: dict[str, dict[str, _Mean]] = defaultdict(lambda: defaultdict(_Mean))
        self.inexact: dict[str, int] = defaultdict(int)
        self.inexact_images = 0

    def add(self, images: Sequence[Mapping[str, Any]], layers: pa.Table) -> None:
        scores: dict[int, float] = {}
        for image in images:
            self.images += 1
            if image["error"] is not None:
                self.failed.append({name: image[name] for name in ("index", "name", "error")})
                continue
            self.seconds += image["seconds"]
            scores[image["index"]] = image["score"]
            if image["correct"] is not None:
                self.known += 1
                self.correct += image["correct"]
        inexact: set[int] = set()
        columns = (layers[name].to_pylist() for name in ("index", "layer", "residual"))
        for index, layer, residual in zip(*columns, strict=True):
            if not residual <= INEXACT * abs(scores[index]):  # nor if it is not a number
                self.inexact[layer] += 1
                inexact.add(index)
        self.inexact_images += len(inexact)
        for layer in pc.unique(layers["layer"]).to_pylist():
            part = layers.filter(pc.equal(layers["layer"], layer))
            for name in ("residual", *_SHARES):
                self.layers[layer][name].add(*part[name].to_pylist())

    def summary(self, layers: Sequence[str]) -> dict[str, Any]:
        done = self.images - len(self.failed)
        return {
            "images": self.images,
            "audited": done,
            "failed": self.failed,
            "labeled": self.known,
            "accuracy": self.correct / self.known if self.known else None,
            "inexact": self.inexact_images,
            "seconds_per_image": self.seconds / done if done else None,
            "layers": [self._layer(name) for name in layers],
        }

    def _layer(self, name: str) -> dict[str, Any]:
        numbers = self.layers[name]
        return {
            "layer": name,
            "residual_max": numbers["residual"].maximum,
            "inexact": self.inexact[name],
            **{share: numbers[share].value for share in _SHARES},
        }


def _add_image(
    image: Mapping[str, Any],
    measured: Mapping[str, Any],
    maps: Mapping[tuple[int, int], Array],
    grid: tuple[int, int],
    labels: dict[int, _Label],
    pairs: dict[tuple[int, int], _Pair],
) -> None:
    predicted, true, index = image["predicted"], image["true"], image["index"]
    label = labels[predicted]
    label.name = image["predicted_label"]
    label.predicted += 1
    map_ = maps[index, predicted]
    unit = _unit(map_, grid)
    if unit.any():
        label.maps += 1
        label.unit_sum = label.unit_sum + unit
        label.share_sum = label.share_sum + unit / unit.sum()
    for name in _SHARES:
        label.numbers[name].add(measured[name])
    for name in ("score", "contrast"):
        label.numbers[name].add(image[name])
    spot = (float(map_.max()), -index, measured["peak_row"], measured["peak_column"])
    _keep(label.patches, spot)
    if true is None:
        return
    labels[true].name = image["true_label"]
    labels[true].images += 1
    labels[true].correct += image["correct"]
    if predicted != true:
        pair = pairs[true, predicted]
        pair.contrast = pair.contrast + _pooled(map_ - maps[index, true], grid)
        pair.count += 1
        _keep(pair.examples, (image["score"] - image["true_score"], -index))


def _compare_image(
    image: Mapping[str, Any],
    maps: Mapping[tuple[int, int], Array],
    grid: tuple[int, int],
    labels: Mapping[int, _Label],
    unusualness: dict[int, float],
) -> None:
    """Compare one map with the mean of the others of its label."""
    label, index = labels[image["predicted"]], image["index"]
    unit = _unit(maps[index, image["predicted"]], grid)
    if label.maps < 2 or not unit.any():
        return
    others = label.unit_sum - unit
    unusual = float(np.clip(1 - (unit * others).sum() / np.linalg.norm(others), 0, 1))
    unusualness[index] = unusual
    _keep(label.typical, (-unusual, -index))
    _keep(label.unusual, (unusual, -index))


def _private_maps(labels: Mapping[int, _Label]) -> dict[int, Array]:
    """Return what of each label's mean map lies above the mean map of every other label."""
    found = {index: label.share_sum / label.maps for index, label in labels.items() if label.maps}
    if len(found) < 2:
        return {}
    second, first = np.sort(np.stack(list(found.values())), axis=0)[-2:]
    return {index: np.maximum(mean - np.where(mean < first, first, second), 0) for index, mean in found.items()}


def _label_row(index: int, label: _Label, private: Array | None, grid: tuple[int, int] | None) -> dict[str, Any]:
    consistency = shortcut = None
    if label.maps >= _RANKED:
        # |Σq|² counts each pair of maps twice and each map, of length one, with itself once.
        square = float((label.unit_sum**2).sum())
        consistency = max(square - label.maps, 0.0) / (label.maps * (label.maps - 1))
        shortcut = None if private is None else consistency * float(private.sum())
    return {
        "label": index,
        "name": label.name,
        "images": label.images,
        "correct": label.correct,
        "accuracy": label.correct / label.images if label.images else None,
        "predicted": label.predicted,
        **{name: label.numbers[name].value for name in ("score", "contrast", *_SHARES)},
        "consistency": consistency,
        "private_share": None if private is None else float(private.sum()),
        "shortcut": shortcut,
        "rows": grid[0] if grid else 0,
        "columns": grid[1] if grid else 0,
        "mean_map": (label.share_sum / label.maps).ravel().tolist() if label.maps else [],
        "private_map": [] if private is None else private.ravel().tolist(),
        "typical": [-place for _, place in sorted(label.typical, reverse=True)],
        "unusual": [-place for _, place in sorted(label.unusual, reverse=True)],
        "patches": [
            {"index": -place, "value": value, "row": row, "column": column}
            for value, place, row, column in sorted(label.patches, reverse=True)
        ],
    }


def _pair_row(
    key: tuple[int, int], pair: _Pair, labels: Mapping[int, _Label], grid: tuple[int, int] | None
) -> dict[str, Any]:
    true, predicted = key
    return {
        "true": true,
        "true_name": labels[true].name,
        "predicted": predicted,
        "predicted_name": labels[predicted].name,
        "images": pair.count,
        "rows": grid[0] if grid else 0,
        "columns": grid[1] if grid else 0,
        "contrast_map": (pair.contrast / pair.count).ravel().tolist(),
        "examples": [-place for _, place in sorted(pair.examples, reverse=True)],
    }


def _ranked(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Most suspicious first; labels that are not compared last, by number of images."""
    return sorted(
        rows,
        key=lambda row: (
            -math.inf if row["shortcut"] is None else row["shortcut"],
            max(row["images"], row["predicted"]),
            -row["label"],
        ),
        reverse=True,
    )


def _write(folder: Path, analysis: Analysis) -> None:
    write_json(folder / "summary.json", analysis.summary)
    unusual = {"index": list(analysis.unusualness), "unusualness": list(analysis.unusualness.values())}
    write_table(folder / "unusualness.parquet", pa.table(unusual))
    for name, rows in (("labels", analysis.labels), ("pairs", analysis.pairs)):
        write_table(folder / f"{name}.parquet", pa.Table.from_pylist(list(rows)))


def _by_index(shards: Shards, number: int, layer: str) -> dict[int, dict[str, Any]]:
    table = shards.read("layers", number)
    return {row["index"]: row for row in table.filter(pc.equal(table["layer"], layer)).to_pylist()}


def _maps(shards: Shards, number: int, layer: str) -> Iterator[tuple[tuple[int, int], Array]]:
    """Index and label of each map of a layer in a shard, and the map."""
    table = shards.read("maps", number)
    table = table.filter(pc.equal(table["layer"], layer))
    shapes = zip(table["rows"].to_pylist(), table["columns"].to_pylist(), strict=True)
    keys = zip(table["index"].to_pylist(), table["label"].to_pylist(), strict=True)
    for key, shape, values in zip(keys, shapes, lists(table["values"]), strict=True):
        yield key, values.astype(np.float64).reshape(shape)


def lists(column: pa.ChunkedArray) -> Iterator[NDArray[np.float32]]:
    """The lists of a column of lists of numbers as arrays, without a Python object for each number."""
    for chunk in column.chunks:
        offsets, values = chunk.offsets.to_numpy(), chunk.values.to_numpy()
        for start, end in pairwise(offsets.tolist()):
            yield values[start:end]


def _grid(map_: Array) -> tuple[int, int]:
    rows, columns = map_.shape
    return min(rows, _GRID), min(columns, _GRID)


def _pooled(map_: Array, grid: tuple[int, int]) -> Array:
    if map_.shape == grid:
        return map_
    pooled: Array = resized(torch.from_numpy(map_)[None], grid)[0].numpy()
    return pooled


def _unit(map_: Array, grid: tuple[int, int]) -> Array:
    """Return the positive part, of length one; zero where nothing is positive."""
    positive = _pooled(np.maximum(map_, 0), grid)
    length = np.linalg.norm(positive)
    return positive / length if length > 0 else positive


def _keep(heap: list[Any], item: tuple[Any, ...]) -> None:
    """Keep the largest few."""
    if len(heap) < EXAMPLES:
        heapq.heappush(heap, item)
    else:
        heapq.heappushpop(heap, item)
