"""The score maps of many labels from one run, at layers anywhere in the model."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_scoremap.places import warn_of_no_maps
from captum_scoremap.rules import Value
from captum_scoremap.scores import Label, is_function, logits_in, select_scores
from captum_scoremap.tape import Site, Tape, Tapped

from .batching import over_rows, quiet_batching
from .explanation import image_axis
from .reduction import Reduction
from .subject import Subject

__all__ = ["explain_targets"]

# Images processed at once where the caller names no bound: enough to keep the cores busy, little beside a large model.
_IMAGES_AT_ONCE = 64


def explain_targets(
    subject: Subject,
    targets: Sequence[Label] | None,
    sites: Sequence[Site],
    reduction: Reduction,
    internal_batch_size: int | None = None,
) -> list[Tensor]:
    """Return the score maps of many labels at every site, (N, K, h, w) for a layer of (N, C, h, w).

    The score of a label is pushed back through the frozen layers above, one pass for each label; or, at a layer of
    fewer positions than there are labels, the activation of each position alone is pushed forward through them, one
    pass for each position: M(x, y) is the change of the scores it makes (Eq. (4), read from the other end).

    Raises:
        ValueError: If targets are missing where needed, or out of range, or a layer has several tensors.
    """
    count, functions = len(subject.inputs[0]), _have_functions(targets)

    def select(output: Any) -> Any:
        if targets is None or not functions:
            return logits_in(output)
        return torch.stack([select_scores(output, label, count) for label in targets], 1)

    recording, output = subject.record(select, sites)
    labels = _labels(output, None if functions else targets)
    for label in labels[:1] if targets is None else labels:
        select_scores(output, label, count)  # names what is wrong before any work is done
    for site in sites:
        tensors = len(recording.tapped[site].values)
        if tensors != 1:
            raise ValueError(f"attribute_targets needs layers with one output tensor, got {tensors}. Use attribute.")
    warn_of_no_maps(recording, sites, subject.inputs[0].shape)
    images = max(1, (internal_batch_size or _IMAGES_AT_ONCE) // count)
    layers = {site: _Layer(recording.tapped[site], reduction) for site in sites}
    with torch.no_grad():
        scores = _Scores(recording.tape, output, labels)
        forward = {site for site, layer in layers.items() if _is_forward(scores, layer)}
        maps = _pushed_back(scores, {site: one for site, one in layers.items() if site not in forward}, images)
        maps |= {site: _pushed_forward(scores, layers[site], images) for site in forward}
    return [maps[site] for site in sites]


class _Layer:
    """A layer's one tensor, and along which of its dimensions channels are summed over."""

    def __init__(self, tapped: Tapped, reduction: Reduction) -> None:
        (self.value,), (self.y,) = tapped.values, tapped.activations
        self.bit, self.reduction = tapped.bit, reduction
        self.channels = reduction.channels(self.y) or 1


class _Scores:
    """The scores of the labels, where passes start that are pushed back, and where those end that go forward."""

    def __init__(self, tape: Tape, output: Any, labels: Sequence[Label]) -> None:
        self.tape, self.output, self.labels = tape, output, labels

    def of(self, output: Any) -> Tensor:
        """Return the scores of all labels, (N, K)."""
        if isinstance(output, Tensor) and output.dim() == 2 and list(self.labels) == list(range(output.shape[1])):
            return output
        return torch.stack([select_scores(output, label) for label in self.labels], 1)

    def rows(self, labels: Sequence[Label]) -> Tensor:
        """Return the derivative of the score of each label in the output, (labels, *output)."""
        with torch.enable_grad():
            leaf = self.output.detach().requires_grad_()
            return torch.stack([torch.autograd.grad(select_scores(leaf, label).sum(), leaf)[0] for label in labels])

    def weighed(self, weights: Tensor) -> dict[Value, Tensor]:
        """Return the seeds for the first label's scores, each image by a weight."""
        row = self.rows(self.labels[:1])[0]
        return self.tape.seeds(row * weights.reshape(-1, *[1] * (row.dim() - 1)))


def _is_forward(scores: _Scores, layer: _Layer) -> bool:
    """Return whether there are fewer positions than labels, in a layer whose images come first."""
    y, count = layer.y, scores.output.shape[0]
    if not layer.reduction.multiply or _positions(y, layer.channels) >= len(scores.labels) or y.shape[0] != count:
        return False
    may_come_later = y.dim() > 2 and y.shape[1] % count == 0 and count > 1 and layer.channels % y.dim() > 1
    return not may_come_later or image_axis(scores.tape, scores.weighed, layer.value, count, y) in {0, None}


def _pushed_back(scores: _Scores, layers: Mapping[Site, _Layer], images: int) -> dict[Site, Tensor]:
    """One pass over the transposed steps for each label, several at once."""
    if not layers:
        return {}
    wanted: dict[Value, Callable[[Tensor], Tensor]] = {
        layer.value: layer.reduction.at(layer.y) for layer in layers.values()
    }
    parts: dict[Site, list[Tensor]] = {site: [] for site in layers}
    for start in range(0, len(scores.labels), images):
        rows = scores.rows(scores.labels[start : start + images])
        found = over_rows(lambda row: scores.tape.transposed(scores.tape.seeds(row), wanted), rows)
        for site, layer in layers.items():
            one = found.get(layer.value)
            if one is None:
                one = layer.y.new_zeros((len(rows), *layer.reduction.shape(layer.y)))
            parts[site].append(torch.cat(one.unbind(0), layer.channels))
    return {site: torch.cat(some, layers[site].channels) for site, some in parts.items()}


def _pushed_forward(scores: _Scores, layer: _Layer, positions_at_once: int) -> Tensor:
    """Return the scores that each position's activation makes alone, the labels where the channels were."""
    activations, channels = layer.y, layer.channels % layer.y.dim()
    shape = [size for axis, size in enumerate(activations.shape) if axis not in {0, channels}]
    count = math.prod(shape)
    output = scores.tape.value_of_output()
    if output is None or not output.sites & layer.bit:
        sizes = list(activations.shape)
        sizes[channels] = len(scores.labels)
        return activations.new_zeros(sizes)

    def scores_at(value: Tensor) -> Tensor:
        return scores.of(scores.tape.forward({layer.value: value}, [output], sites=layer.bit, bypass=False)[output])

    with quiet_batching():
        parts = []
        # one more than there are positions: there, nothing is left of the activations
        for start in range(0, count + 1, positions_at_once):
            chosen = torch.arange(start, min(start + positions_at_once, count + 1), device=activations.device)
            alone = (torch.arange(count, device=activations.device) == chosen[:, None]).reshape(len(chosen), 1, *shape)
            parts.append(torch.func.vmap(scores_at)(activations * alone.unsqueeze(channels + 1)))
        found = torch.cat(parts)
    # (positions, N, K) -> (N, ..., K) -> the labels where the channels were
    maps = (found[:-1] - found[-1]).permute(1, 0, 2).reshape(activations.shape[0], *shape, len(scores.labels))
    return maps.movedim(-1, channels)


def _have_functions(targets: Sequence[Label] | None) -> bool:
    """Return whether some of the targets are functions of the output, which are part of the run."""
    if is_function(targets) or isinstance(targets, (int, np.integer)):
        raise TypeError(f"targets must be a sequence of labels, got {targets!r}. Put it in a list.")
    return targets is not None and any(map(is_function, targets))


def _labels(output: Any, targets: Sequence[Label] | None) -> list[Label]:
    if targets is not None:
        labels = list(targets)
        if not labels:
            raise ValueError("targets must name at least one label, got none.")
        return labels
    if not isinstance(output, Tensor) or output.dim() != 2:
        raise ValueError("targets must be given for a model that does not return (N, K). Name the labels.")
    return list(range(output.shape[1]))


def _positions(activations: Tensor, channel_dim: int) -> int:
    """Return how many positions a layer has: its elements per image and channel."""
    channels = channel_dim % activations.dim()
    return math.prod(size for axis, size in enumerate(activations.shape) if axis not in {0, channels})
