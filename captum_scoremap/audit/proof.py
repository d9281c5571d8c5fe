"""From what sets a label apart to a finding: where it is, what it is worth in logits, and what falls when it is gone.

A discriminant of pooled channels is itself a sum over positions: the mean of a channel comes from everywhere, its
maximum from one cell. That sum is the map of the concept. What holds most of it is taken away on images that the
discriminant was not fitted to: a small region by the mean color of the rest of the image, something spread over the
image by shifting the layer's channels to what they are in other labels' images. A control of equal size is taken away
as well, and S and the prediction are read again. What fills the image may be found in a small part of it and be there
still when that is gone: where a region has no effect, the shift is tried.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn.functional import interpolate

from captum_scoremap.attribution import LayerScoreMap
from captum_scoremap.audit.concentration import border_share, peak, resized
from captum_scoremap.audit.explaining import MapLayer
from captum_scoremap.audit.screening import FALSE_ALARMS, Candidate
from captum_scoremap.scores import logits_in
from captum_scoremap.settings import module_by_module

__all__ = ["Example", "prove"]

_PROVEN = 12  # candidates that are looked at with the network
_IMAGES = 24  # of each
_MASS = 0.6  # of the concept's map lies in its region
_LOCAL = 0.3  # of the image: a region of more is the background
_GRID = 8  # cells on which places are compared
_SAME_PLACE = 0.5  # mean cosine of two maps, from which on they lie in the same place
_BORDER = 0.6  # share of the map in the border, a tenth of each side
_PAIR = 0.1  # share of a label's images: more are no accident
_CHANNELS = 5  # are named
_CONTROLS = 3
_EFFECT = 0.01  # chance of the effect
_ELSEWHERE = 0.5  # of the effect: a control that has as much takes away the same
_GRAY = 0.05  # of S: less is no effect worth a finding


@dataclass(frozen=True)
class Example:
    """An image as the network takes it, (C, H, W), and its true label, None where it is not known."""

    inputs: Tensor
    true: int | None


def prove(
    candidates: Sequence[Sequence[Candidate]],
    model: nn.Module,
    layers: Mapping[str, MapLayer],
    read: Callable[[int], Example | None],
    predicted: Mapping[int, int],
    truth: Mapping[int, int],
    label_name: Callable[[int], str],
) -> list[dict[str, Any]]:
    """Turn candidates into findings.

    Args:
        candidates: What sets each label apart, at one layer or more, the least likely by chance first.
        model: The network, in eval mode.
        layers: Its pooled layers by name.
        read: From the position of an image to the image; None where it cannot be read.
        predicted: Predicted labels of images.
        truth: True labels of images, where known.
        label_name: The name of a label.

    Returns:
        A finding for each candidate, and for each label that it is confused with, most suspicious first. The first few
        are looked at with the network; the others have no kind and no effect.
    """
    counts = Counter(truth.values())
    findings = []
    for place, (first, *others) in enumerate(candidates):
        finding = _unproven(first, label_name)
        if place < _PROVEN or first.chance <= FALSE_ALARMS:
            finding |= _looked_at(first, model, layers, read)
            # Not every layer takes the shift that makes the difference: any at which the label stands out will do.
            for other in others:
                if finding["confident"]:
                    break
                found = _unproven(other, label_name) | _looked_at(other, model, layers, read)
                finding = found if found["confident"] else finding
        findings.append(finding)
        findings += _pairs(finding, predicted, truth, counts, label_name)
    return sorted(findings, key=lambda one: (not one["confident"], one["chance"], -one["strength"]))


def _unproven(candidate: Candidate, label_name: Callable[[int], str]) -> dict[str, Any]:
    """The finding that a candidate is before it is looked at."""
    return {
        "label": candidate.label,
        "name": label_name(candidate.label),
        "kind": None,
        "strength": candidate.strength,
        "chance": candidate.chance,
        "confident": False,
        "share": None,
        "images": list(candidate.carriers),
        "layer": candidate.layer,
    }


def _looked_at(
    candidate: Candidate, model: nn.Module, layers: Mapping[str, MapLayer], read: Callable[[int], Example | None]
) -> dict[str, Any]:
    """What the network adds to a finding; nothing where too few images can be read."""
    read_ones = [
        (index, half, one.inputs)
        for index, half in list(zip(candidate.carriers, candidate.halves, strict=True))[:_IMAGES]
        if (one := read(index)) is not None
    ]
    sample = [one.inputs for index in candidate.sample if (one := read(index)) is not None]
    known = [one for one in read_ones if one[2].shape == read_ones[0][2].shape]
    sample = [one for one in sample if one.shape == known[0][2].shape] if known else []
    if len(known) <= 2 or not sample:
        return {}
    indices, halves, inputs = zip(*known, strict=True)
    found = _Look(model, layers[candidate.layer], candidate, halves)(torch.stack(inputs), torch.stack(sample), indices)
    sure = candidate.chance <= FALSE_ALARMS and found["effect"]["chance"] <= _EFFECT
    return {**found, "confident": sure}


def _pairs(
    finding: Mapping[str, Any],
    predicted: Mapping[int, int],
    truth: Mapping[int, int],
    counts: Mapping[int, int],
    label_name: Callable[[int], str],
) -> Iterator[dict[str, Any]]:
    """Labels whose images are taken for the finding's label by what sets that apart."""
    wrong = Counter(
        truth[index] for index in finding["images"] if truth.get(index, finding["label"]) != finding["label"]
    )
    for label, count in wrong.items():
        if finding["confident"] and count >= max(3, _PAIR * counts[label]):
            yield {
                **finding,
                "kind": "confused pair",
                "images": [index for index in finding["images"] if truth.get(index) == label],
                "true": label,
                "true_name": label_name(label),
            }


@dataclass(frozen=True)
class _Removal:
    """The concept taken away: how, what of S it was for each channel, (N, C), in logits, and what followed."""

    how: str
    sub_scores: Tensor
    effect: dict[str, Any]

    @property
    def proven(self) -> bool:
        """Return whether it has an effect beyond its control's."""
        return float(self.effect["chance"]) <= _EFFECT

    @property
    def falls_as_much_elsewhere(self) -> bool:
        """Return whether its control has much of its effect: what is taken away is elsewhere, too."""
        fall, control = self.effect["score_fall"], self.effect["control_score_fall"]
        return bool(control >= max(_ELSEWHERE * fall, _GRAY * abs(self.effect["score"])))


class _Look:
    """One candidate seen through the network."""

    def __init__(self, model: nn.Module, layer: MapLayer, candidate: Candidate, halves: Sequence[int]) -> None:
        self.model, self.layer, self.candidate = model, layer, candidate
        self.weights = candidate.weights[list(halves)]  # (N, 2, C)
        self.module = model.get_submodule(layer.name)

    @torch.no_grad()
    def __call__(self, inputs: Tensor, sample: Tensor, indices: Sequence[int]) -> dict[str, Any]:
        """Kind, share, place, channels, patches and effect."""
        device = next((one.device for one in self.model.parameters()), torch.device("cpu"))
        inputs, sample = inputs.to(device), sample.to(device)
        label = self.candidate.label
        scores, y = self._run(inputs)
        _, other_y = self._run(sample)
        concept = self._concept(y)
        region = _region(concept)
        area = float(region.mean())
        coefficients = self._coefficients(inputs)
        shift = y.mean((2, 3)).mean(0) - other_y.mean((2, 3)).mean(0)
        removals = []
        if area <= _LOCAL:
            removals.append(self._without_region(inputs, scores, coefficients * y, region))
        if not removals or not removals[0].proven:
            removals.append(self._without_direction(inputs, scores, coefficients, shift))
        removal = next((one for one in removals if one.proven), removals[0])
        everywhere = area > _LOCAL or (not removals[0].proven and removals[0].falls_as_much_elsewhere)
        kind, rest = _kind(concept, everywhere=everywhere)
        score = scores[:, label]
        per_channel = removal.sub_scores.sum(0)
        strongest = per_channel.abs().topk(min(_CHANNELS, len(per_channel))).indices.tolist()
        rows, columns = peak(concept)
        value = concept.flatten(1).amax(1)
        return {
            "kind": kind,
            "share": float(per_channel.sum() / score.sum()) if float(score.sum()) > 0 else None,
            "area": area,
            **rest,
            "channels": [
                {"channel": channel, "logits": float(per_channel[channel]) / len(inputs)} for channel in strongest
            ],
            "rows": concept.shape[1],
            "columns": concept.shape[2],
            "map": (concept.clamp(min=0).mean(0) / concept.clamp(min=0).mean(0).sum().clamp(min=1e-12))
            .flatten()
            .tolist(),
            "patches": [
                {"index": index, "row": row, "column": column, "value": strength}
                for index, row, column, strength in zip(
                    indices, rows.tolist(), columns.tolist(), value.tolist(), strict=True
                )
            ][:8],
            "effect": {"how": removal.how, **removal.effect},
        }

    def _without_region(self, inputs: Tensor, scores: Tensor, sub_scores: Tensor, region: Tensor) -> "_Removal":
        """What lies in a region (N, H, W) taken away; the control is the same region at other places."""
        gone = [self._scores(_filled(inputs, region))]
        controls = [self._scores(_filled(inputs, _moved(region, turn))) for turn in range(_CONTROLS)]
        effect = _effect(self.candidate.label, scores, gone, controls)
        return _Removal("region", (sub_scores * region[:, None]).sum((2, 3)), effect)

    def _without_direction(self, inputs: Tensor, scores: Tensor, coefficients: Tensor, shift: Tensor) -> "_Removal":
        """The layer's channels shifted by (C,); the control shifts others by as much."""
        generator = torch.Generator().manual_seed(self.candidate.label)
        order = [torch.randperm(len(shift), generator=generator).to(shift.device) for _ in range(_CONTROLS)]
        gone = [self._shifted(inputs, shift)]
        controls = [self._shifted(inputs, shift[one]) for one in order]
        effect = _effect(self.candidate.label, scores, gone, controls)
        return _Removal("direction", coefficients.sum((2, 3)) * shift, effect)

    def _run(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (N, K), and the layer's output as (N, C, H, W)."""
        outputs: list[Tensor] = []
        handle = self.module.register_forward_hook(lambda _, __, output: outputs.append(output.detach().clone()))
        try:
            with module_by_module():
                scores: Tensor = logits_in(self.model(inputs))
        finally:
            handle.remove()
        y = outputs[-1]
        return scores.double(), self.layer.as_images(y).double()

    def _scores(self, inputs: Tensor) -> Tensor:
        scores: Tensor = logits_in(self.model(inputs))
        return scores.double()

    def _concept(self, y: Tensor) -> Tensor:
        """The discriminant's score, position by position, (N, H, W), above what other labels' images have."""
        mean_weights, maximum_weights = torch.as_tensor(self.weights).to(y).unbind(1)
        typical = torch.as_tensor(self.candidate.typical).to(y)
        cells = y.shape[2] * y.shape[3]
        mean = ((y - typical[0][:, None, None]) * mean_weights[:, :, None, None]).sum(1) / cells
        highest, where = y.flatten(2).max(2)
        beyond = (highest - typical[1]) * maximum_weights
        maximum = torch.zeros_like(mean).flatten(1).scatter_add(1, where, beyond).reshape(mean.shape)
        return mean + maximum

    def _coefficients(self, inputs: Tensor) -> Tensor:
        """A at the layer, (N, C, H, W)."""
        method = LayerScoreMap(self.model, self.module, multiply_by_inputs=False)
        with torch.enable_grad():
            found = method.attribute(inputs, self.candidate.label, attr_dim_summation=False)
        return self.layer.as_images(found.detach()).double()

    def _shifted(self, inputs: Tensor, shift: Tensor) -> Tensor:
        """The scores with the layer's channels shifted by as much."""
        shape = [1] * (4 if self.layer.channel_dim == 1 else 1)
        shape[self.layer.channel_dim] = -1
        with _changed(self.module, lambda output: output - shift.to(output).reshape(shape)):
            return self._scores(inputs)


@contextmanager
def _changed(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _, __, output: change(output))
    try:
        with module_by_module():
            yield
    finally:
        handle.remove()


def _region(concept: Tensor) -> Tensor:
    """The smallest set of cells that holds most of the positive part, (N, H, W), 0 or 1."""
    positive = concept.clamp(min=0).flatten(1)
    values, order = positive.sort(dim=1, descending=True)
    before = values.cumsum(1) - values
    inside = (before < _MASS * values.sum(1, keepdim=True)).to(concept)
    return torch.zeros_like(positive).scatter(1, order, inside).reshape(concept.shape)


def _moved(region: Tensor, turn: int) -> Tensor:
    """The same region at another place of the image: a control."""
    rows, columns = region.shape[1:]
    shifts = ((rows // 2, columns // 2), (rows // 2, 0), (0, columns // 2))
    return region.roll(shifts[turn], (1, 2))


def _filled(inputs: Tensor, region: Tensor) -> Tensor:
    """The images with a region and what is next to it in the mean color of the rest."""
    mask = interpolate(region[:, None].float(), size=inputs.shape[2:], mode="nearest-exact")
    width = max(3, inputs.shape[2] // 14) // 2 * 2 + 1
    mask = torch.nn.functional.max_pool2d(mask, width, 1, width // 2).to(inputs)
    rest = (inputs * (1 - mask)).sum((2, 3), keepdim=True) / (1 - mask).sum((2, 3), keepdim=True).clamp(min=1)
    return inputs * (1 - mask) + rest * mask


def _kind(concept: Tensor, *, everywhere: bool) -> tuple[str, dict[str, Any]]:
    """What kind of thing the concept is, by where its map lies."""
    positive = concept.clamp(min=0)
    border = float(border_share(positive).mean())
    small = resized(positive, (min(_GRID, concept.shape[1]), min(_GRID, concept.shape[2]))).flatten(1)
    unit = small / small.norm(dim=1, keepdim=True).clamp(min=1e-12)
    count = len(unit)
    consistency = float((unit.sum(0).square().sum() - count) / (count * (count - 1)))
    rest = {"border": border, "consistency": consistency, "row": None, "column": None}
    if everywhere:
        return "background", rest
    if consistency >= _SAME_PLACE:
        row, column = peak(positive.mean(0, keepdim=True))
        return "place", rest | {"row": float(row), "column": float(column)}
    return ("border" if border >= _BORDER else "concept"), rest


def _effect(label: int, scores: Tensor, gone: Sequence[Tensor], controls: Sequence[Tensor]) -> dict[str, Any]:
    """How S and accuracy fall without it, beside a control; positive numbers are falls."""
    score = scores[:, label]
    falls = [torch.stack([score - one[:, label] for one in some]).mean(0) for some in (gone, controls)]
    kept = [torch.stack([(one.argmax(1) == label).double() for one in some]).mean(0) for some in (gone, controls)]
    more = (falls[0] - falls[1]).cpu().numpy()
    sure = np.ptp(more) > 0 and float(more.mean()) >= _GRAY * float(score.abs().mean())
    chance = float(stats.ttest_1samp(more, 0, alternative="greater").pvalue) if sure else 1.0
    return {
        "images": len(scores),
        "score": float(score.mean()),
        "score_fall": float(falls[0].mean()),
        "control_score_fall": float(falls[1].mean()),
        "accuracy_fall": 1 - float(kept[0].mean()),
        "control_accuracy_fall": 1 - float(kept[1].mean()),
        "chance": chance,
    }
