"""From samples to the tables of one shard: what every process of an audit does, alone or on a cluster."""

import io
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby, islice
from typing import Any

import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from captum_scoremap import metrics
from captum_scoremap.audit.compiling import Explainer
from captum_scoremap.audit.concentration import border_share, peak, region_share, top_share
from captum_scoremap.audit.explaining import ROLES, Explained, MapLayer
from captum_scoremap.audit.plan import Plan
from captum_scoremap.audit.proof import Example
from captum_scoremap.audit.schema import TABLES
from captum_scoremap.crops import ROUNDING, score_map_crops
from captum_scoremap.data.ahead import map_ahead
from captum_scoremap.data.pictures import UnreadableError, strict_decoding
from captum_scoremap.data.sources import Source
from captum_scoremap.models import LoadedModel

__all__ = ["METRICS", "Worker"]

METRICS = {"insertion": metrics.insertion, "deletion": metrics.deletion}

_NOT_FINITE = "the model gives scores or maps that are not finite numbers"
_AHEAD = 2  # batches that are read ahead
_SMALL = 96  # pixels: smaller views are kept without loss


@dataclass(frozen=True)
class _Prepared:
    """One image ready for the model, or the reason why not."""

    index: int
    inputs: Tensor | None = None
    label: int = -1
    region: Tensor | None = None
    view: tuple[str, bytes] | None = None
    error: str | None = None


@dataclass(frozen=True)
class Worker:
    """Explains the images of a source, shard by shard.

    Attributes:
        source: Where the images come from.
        plan: Which of them make which shard and batch.
        model: The model, its preprocessing and its labels.
        layers: The layers to map, from image to score; the last one is what rankings use.
        pool: The layers whose channels are kept, pooled over positions, to find what labels are known by.
        metrics: Names of additional metrics, of `METRICS`; each costs many forward passes an image.
        maps: Kind of the maps, of `MAPS`.
        device: Where the model computes.
        threads: Threads that decode images.
        compiled: Whether the maps are computed by a compiled graph.
    """

    source: Source
    plan: Plan
    model: LoadedModel
    layers: tuple[MapLayer, ...]
    pool: tuple[MapLayer, ...] = ()
    metrics: tuple[str, ...] = ()
    maps: str = "score"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    threads: int = 2
    compiled: bool = False

    @cached_property
    def _explainer(self) -> Explainer:
        size = self.plan.batch_size if self.compiled else 0
        return Explainer(self.model.module, self.layers, self.pool, self.maps, size)

    @cached_property
    def _dtype(self) -> torch.dtype:
        """Type of the model's numbers, which pictures are handed over in."""
        numbers = (one.dtype for one in self.model.module.parameters() if one.is_floating_point())
        return next(numbers, torch.float32)

    def results(
        self, shards: Sequence[int], done: Callable[[int], None] | None = None
    ) -> Generator[tuple[int, dict[str, pa.Table]], None, None]:
        """Results of shards, one after another; images are read a few batches ahead, also over the end of a shard.

        Args:
            shards: Their numbers.
            done: Told the number of images of every batch that is done.

        Yields:
            Number of a shard and the tables of `TABLES`, a row or more for each of its images, readable or not.
        """
        indices = (index for shard in shards for batch in self.plan.batches(shard) for index in batch)
        threads = self.threads if self.source.threads_safe else 1
        ahead = _AHEAD * self.plan.batch_size
        with strict_decoding(), closing(map_ahead(self._prepare, indices, ahead, threads)) as images:
            clock = time.perf_counter()
            for shard in shards:
                rows: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
                for batch in self.plan.batches(shard):
                    found = self._batch(list(islice(images, len(batch))))
                    seconds = (time.perf_counter() - clock) / len(batch)
                    for row in found["images"]:
                        row["seconds"] = None if row.get("error") else seconds
                    for name, some in found.items():
                        rows[name] += some
                    if done is not None:
                        done(len(batch))
                    clock = time.perf_counter()
                yield shard, {name: pa.Table.from_pylist(rows[name], schema=schema) for name, schema in TABLES.items()}
                clock = time.perf_counter()

    def first_readable(self, count: int = 1) -> Tensor:
        """Find inputs to try things on.

        Args:
            count: How many to look for.

        Returns:
            The first that can be read and have the size of the first, at least one and at most ``count``, (N, C, H, W).

        Raises:
            ValueError: If there is none.
        """
        reasons: list[str] = []
        found: list[Tensor] = []
        indices = (index for shard in self.plan.shards for batch in self.plan.batches(shard) for index in batch)
        with strict_decoding():
            for tried, index in enumerate(indices):
                if found and (len(found) == count or tried >= 2 * count + len(reasons)):
                    break
                item = self._prepare(index)
                if item.inputs is None:
                    reasons.append(f"{self.source.name(index)}: {item.error}")
                elif not found or item.inputs.shape == found[0].shape:
                    found.append(item.inputs)
        if not found:
            raise ValueError(f"source must hold images that can be read, got {len(reasons)} that cannot: {reasons[0]}.")
        return torch.stack(found)

    def example(self, index: int) -> Example | None:
        """Read one image again, for a proof; None where that is not possible."""
        with strict_decoding():
            item = self._prepare(index)
        return (
            None
            if item.inputs is None
            else Example(item.inputs.to(self.device), item.label if item.label >= 0 else None)
        )

    def _prepare(self, index: int) -> _Prepared:
        try:
            sample = self.source.read(index)
            image, preprocessing = sample.image, self.model.preprocessing
            inputs = image.detach() if isinstance(image, Tensor) else preprocessing(image).to(self._dtype)
            if not inputs.numel() or not torch.isfinite(inputs).all():
                raise UnreadableError("pixel values that are not finite" if inputs.numel() else "no pixels")
            is_input = isinstance(image, Tensor)
            picture = _as_picture(inputs, self.model) if is_input else to_pil_image(preprocessing.picture(inputs))
            region = None
            if sample.region is not None:
                region = preprocessing.picture(preprocessing(sample.region)).mean(0)
        except UnreadableError as error:
            return _Prepared(index, error=str(error))
        return _Prepared(index, inputs, -1 if sample.label is None else sample.label, region, encode(picture))

    def _batch(self, batch: Sequence[_Prepared]) -> dict[str, list[dict[str, Any]]]:
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
        for shape, group in groupby(batch, key=lambda item: None if item.inputs is None else item.inputs.shape):
            items = list(group)
            found = self._readable(items) if shape else {"images": [self._unreadable(item) for item in items]}
            for name, some in found.items():
                rows[name] += some
        return rows

    def _unreadable(self, item: _Prepared) -> dict[str, Any]:
        return {"index": item.index, "name": self.source.name(item.index), "error": item.error}

    def _readable(self, items: Sequence[_Prepared]) -> dict[str, list[dict[str, Any]]]:
        inputs = torch.stack([item.inputs for item in items if item.inputs is not None])
        on_device = inputs.to(self.device)
        true = torch.tensor([item.label for item in items], device=self.device)
        found = self._explainer(on_device, true)
        good = found.finite
        marked = list(zip(items, good.tolist(), strict=True))
        kept = [item for item, finite in marked if finite]
        rows = self._rows(kept, found.take(good), on_device[good]) if kept else {"images": []}
        rows["images"] += [self._unreadable(replace(item, error=_NOT_FINITE)) for item, finite in marked if not finite]
        rows["images"].sort(key=lambda row: row["index"])
        return rows

    def _rows(self, items: Sequence[_Prepared], found: Explained, inputs: Tensor) -> dict[str, list[dict[str, Any]]]:
        return {
            "views": [
                {"index": item.index, "format": item.view[0], "view": item.view[1]} for item in items if item.view
            ],
            "maps": self._maps(items, found),
            "layers": self._layers(items, found),
            "channels": self._channels(items, found),
            "scores": [
                {"index": item.index, "scores": scores}
                for item, scores in zip(items, found.scores.float().cpu().numpy(), strict=True)
            ],
            "images": self._images(items, found, inputs),
        }

    def _maps(self, items: Sequence[_Prepared], found: Explained) -> list[dict[str, Any]]:
        labels, scores = found.labels.tolist(), found.role_scores.double().tolist()
        rows = []
        for layer, maps in found.maps.items():
            height, width = maps.shape[2:]
            values = maps.float().cpu().flatten(2).numpy()
            for role, name in enumerate(ROLES):
                numbers = self._numbers(items, found, layer, role)
                for place, item in enumerate(items):
                    label = labels[place][role]
                    if label < 0 or label in labels[place][:role]:
                        continue
                    rows.append({
                        "index": item.index, "layer": layer, "role": name, "label": label,
                        "rows": height, "columns": width, "values": values[place, role],
                        "score": scores[place][role], **numbers[place],
                    })  # fmt: skip
        return rows

    def _layers(self, items: Sequence[_Prepared], found: Explained) -> list[dict[str, Any]]:
        rows = []
        for layer, maps in found.maps.items():
            spots = (values.tolist() for values in peak(maps[:, 0].double()))
            numbers = self._numbers(items, found, layer, 0)
            for item, record, row, column in zip(items, numbers, *spots, strict=True):
                area = None if item.region is None else item.region.mean().item()
                rows.append({
                    "index": item.index, "layer": layer, **record,
                    "region_area": area, "peak_row": row, "peak_column": column,
                })  # fmt: skip
        return rows

    def _channels(self, items: Sequence[_Prepared], found: Explained) -> list[dict[str, Any]]:
        rows = []
        for layer in dict.fromkeys([*found.channels, *found.pooled]):
            columns: dict[str, Tensor] = {}
            if layer in found.channels:
                columns["sub_scores"] = found.channels[layer]
            if layer in found.pooled:
                columns["mean"], columns["maximum"] = found.pooled[layer].unbind(1)
            values = {name: one.float().cpu().numpy() for name, one in columns.items()}
            for place, item in enumerate(items):
                row: dict[str, Any] = {"index": item.index, "layer": layer}
                rows.append(row | {name: one[place] for name, one in values.items()})
        return rows

    def _numbers(
        self, items: Sequence[_Prepared], found: Explained, layer: str, role: int
    ) -> list[dict[str, float | None]]:
        """Return what is measured of each image's map of one layer and role."""
        maps = found.maps[layer][:, role].double()
        total, bias = found.sums[layer][:, role].double(), found.biases[layer][:, role].double()
        numbers: Mapping[str, Tensor] = {
            "sub_scores": total,
            "bias": bias,
            "bias_share": bias.abs() / (bias.abs() + total.abs()).clamp(min=torch.finfo(torch.double).tiny),
            "residual": found.residuals[layer][:, role],
            "top10_share": top_share(maps),
            "border_share": border_share(maps),
        }
        columns = {name: values.tolist() for name, values in numbers.items()}
        columns["region_share"] = [
            None if item.region is None else region_share(map_[None], item.region[None].to(map_)).item()
            for item, map_ in zip(items, maps, strict=True)
        ]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def _images(self, items: Sequence[_Prepared], found: Explained, inputs: Tensor) -> list[dict[str, Any]]:
        scores = found.scores.double()
        probabilities = scores.softmax(1)
        crops = _crops(found.maps[self.layers[-1].name][:, :1], (inputs.shape[2], inputs.shape[3]))
        measured = {name: self._measure(name, found, inputs) for name in self.metrics}
        rows = []
        for place, item in enumerate(items):
            predicted, runner_up, true = found.labels[place].tolist()
            score = scores[place, predicted].item()
            row: dict[str, Any] = {
                "index": item.index,
                "name": self.source.name(item.index),
                "height": inputs.shape[2],
                "width": inputs.shape[3],
                "predicted": predicted,
                "predicted_label": self.model.label_name(predicted),
                "score": score,
                "crops": crops[place],
            }
            if runner_up >= 0:
                row["probability"] = probabilities[place, predicted].item()
                row["runner_up"] = runner_up
                row["runner_up_label"] = self.model.label_name(runner_up)
                row["runner_up_score"] = scores[place, runner_up].item()
                row["contrast"] = score - row["runner_up_score"]
            if true >= 0:
                row["true"] = true
                row["true_label"] = self.model.label_name(true)
                row["true_score"] = scores[place, true].item()
                row["correct"] = predicted == true
            row |= {name: values[place] for name, values in measured.items()}
            rows.append(row)
        return rows

    def _measure(self, name: str, found: Explained, inputs: Tensor) -> list[float | None]:
        maps = found.maps[self.layers[-1].name][:, :1]
        curve = METRICS[name](self.model.module, lambda *_: maps, inputs, found.labels[:, 0])
        return [value if math.isfinite(value) else None for value in curve.area.tolist()]


def _crops(maps: Tensor, size: tuple[int, int]) -> list[list[list[int]]]:
    """Return the box of the largest sum on each map (N, 1, H, W), in pixels; none on an even or negative map."""
    height, width = maps.shape[2:]
    cells = maps.double().flatten(1)
    positive = cells.amax(1) - cells.mean(1).clamp(min=0) > ROUNDING * cells.abs().sum(1)
    boxes: list[list[list[int]]] = [[] for _ in maps]
    if positive.any():
        found = score_map_crops(maps[positive], (height, width), interpolate_mode="nearest")
        scale = found.new_tensor([size[1] / width, size[0] / height] * 2, dtype=torch.double)
        for place, box in zip(positive.nonzero()[:, 0].tolist(), found * scale, strict=True):
            boxes[place] = box.round().int().tolist()
    return boxes


def encode(picture: Image.Image) -> tuple[str, bytes]:
    """Return a picture as a file's content and its media type: without loss where it is small."""
    buffer = io.BytesIO()
    if min(picture.size) < _SMALL:
        picture.save(buffer, "PNG")
        return "image/png", buffer.getvalue()
    picture.save(buffer, "JPEG", quality=85)
    return "image/jpeg", buffer.getvalue()


def _as_picture(inputs: Tensor, model: LoadedModel) -> Image.Image:
    """Return an input that came as a tensor ``(C, H, W)``, as a picture: fractions of white stay as they are."""
    pixels = inputs.float().cpu()
    if pixels.shape[0] != 3:
        pixels = pixels.mean(0, keepdim=True)
    low, high = pixels.min(), pixels.max()
    if low < 0 or high > 1:
        pixels = model.preprocessing.picture(pixels) if pixels.shape[0] == 3 else (pixels - low) / ((high - low) or 1)
    picture: Image.Image = to_pil_image(pixels)
    return picture
