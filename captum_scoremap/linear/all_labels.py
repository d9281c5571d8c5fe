"""The score maps of many labels from one run, at layers anywhere in the model."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_scoremap.rules import Rule, Value, with_rules
from captum_scoremap.scores import Label, is_function, logits_in, select_scores
from captum_scoremap.tape import Recording, Site, Tapped

from .batching import over_rows, quiet_batching
from .explanation import check_sites, image_axis, warn_of_probabilities
from .reduction import Reduction

__all__ = ["explain_targets"]

# Images processed at once where the caller names no bound: enough to keep the cores busy, little beside a large model.
_IMAGES_AT_ONCE = 64


def explain_targets(
    forward_func: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    targets: Sequence[Label] | None,
    sites: Sequence[Site],
    reduction: Reduction,
    additional: tuple[Any, ...] = (),
    *,
    rules: Mapping[Any, Rule] | None = None,
    internal_batch_size: int | None = None,
) -> list[Tensor]:
    """Return the score maps of many labels at every site.

    The score of a label is pushed back through the frozen layers above, one pass for each label; or, at a layer of
    fewer positions than there are labels, the activation of each position alone is pushed forward through them, one
    pass for each position: M(x, y) is the change of the scores it makes (Eq. (4) of Yu et al. 2015, read from the
    other end).

    Args:
        forward_func: The model, or a function that calls it.
        inputs: The image.
        targets: Labels, the same for all images, or functions of the output; None for every label of an output (N, K).
        sites: Places in the model.
        reduction: What to make of A and Y there; it sums over channels, whose place the labels take.
        additional: Additional arguments.
        rules: Rules to replace or add.
        internal_batch_size: Bound on the images processed at once.

    Returns:
        For each site the maps, (N, K, h, w) for a layer of (N, C, h, w).

    Raises:
        ValueError: If targets are missing where needed, or out of range, or a layer has several tensors.
    """
    recording = Recording(forward_func, with_rules(rules), sites)
    count, functions = len(inputs[0]), _have_functions(targets)

    def select(output: Any) -> Any:
        warn_of_probabilities(recording, output)
        if targets is None or not functions:
            return logits_in(output)
        return torch.stack([select_scores(output, label, count) for label in targets], 1)

    output = recording.record(inputs, additional, select)
    check_sites(recording, sites)
    labels = _labels(output, None if functions else targets)
    for label in labels[:1] if targets is None else labels:
        select_scores(output, label, count)  # names what is wrong before any work is done
    for site in sites:
        tensors = len(recording.tapped[site].values)
        if tensors != 1:
            raise ValueError(f"attribute_targets needs layers with one output tensor, got {tensors}. Use attribute.")
    channels = {site: reduction.channels(recording.tapped[site].activations[0]) or 1 for site in sites}
    images = max(1, (internal_batch_size or _IMAGES_AT_ONCE) // inputs[0].shape[0])
    with torch.no_grad():
        seeds = _Seeds(recording, output, labels)
        forward = {site for site in sites if _is_forward(seeds, recording.tapped[site], reduction, channels[site])}
        backward = [site for site in sites if site not in forward]
        maps = _pushed_back(seeds, {site: recording.tapped[site] for site in backward}, reduction, channels, images)
        for site in forward:
            maps[site] = _pushed_forward(seeds, recording.tapped[site], channels[site], images)
    return [maps[site] for site in sites]


class _Seeds:
    """Where passes start that push the scores of labels back, and where those end that push positions forward."""

    def __init__(self, recording: Recording, output: Any, labels: Sequence[Label]) -> None:
        self.tape = recording.tape
        self.output = output
        self.labels = labels
        self.values = self.tape.output_values

    def scores(self, output: Any) -> Tensor:
        """Return the scores of all labels, (N, K)."""
        if isinstance(output, Tensor) and output.dim() == 2 and list(self.labels) == list(range(output.shape[1])):
            return output
        return torch.stack([select_scores(output, label) for label in self.labels], 1)

    def rows(self, labels: Sequence[Label]) -> Tensor:
        """Return the derivative of the score of each label in the output, (labels, *output)."""
        with torch.enable_grad():
            leaf = self.output.detach().requires_grad_()
            return torch.stack([torch.autograd.grad(select_scores(leaf, label).sum(), leaf)[0] for label in labels])

    def back(self, row: Tensor) -> dict[Value, Tensor]:
        """Return the seeds for a derivative in the output."""
        value = self.values.get(id(self.output))
        return {} if value is None else {value: row}

    def weighed(self, weights: Tensor) -> dict[Value, Tensor]:
        """Return the seeds for the first label's scores, each image by a weight."""
        row = self.rows(self.labels[:1])[0]
        return self.back(row * weights.reshape(-1, *[1] * (row.dim() - 1)))


def _is_forward(seeds: _Seeds, tapped: Tapped, reduction: Reduction, channels: int) -> bool:
    """Return whether there are fewer positions than labels, in a layer whose images come first."""
    (value,), (y,) = tapped.values, tapped.activations
    if not reduction.multiply or _positions(y, channels) >= len(seeds.labels):
        return False
    count = seeds.output.shape[0]
    if y.shape[0] != count:
        return False
    return (
        y.dim() < 3
        or y.shape[1] % count != 0
        or count == 1
        or not channels % y.dim() > 1
        or (image_axis(seeds.tape, seeds.weighed, value, count, y) in {0, None})
    )


def _pushed_back(
    seeds: _Seeds, sites: Mapping[Site, Tapped], reduction: Reduction, channels: Mapping[Site, int], images: int
) -> dict[Site, Tensor]:
    """One pass over the transposed steps for each label, several at once."""
    if not sites:
        return {}
    wanted: dict[Value, Callable[[Tensor], Tensor]] = {
        tapped.values[0]: reduction.at(tapped.activations[0]) for tapped in sites.values()
    }
    parts: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for start in range(0, len(seeds.labels), images):
        rows = seeds.rows(seeds.labels[start : start + images])
        found = over_rows(lambda row: seeds.tape.transposed(seeds.back(row), wanted), rows)
        for site, tapped in sites.items():
            y = tapped.activations[0]
            one = found.get(tapped.values[0])
            if one is None:
                one = y.new_zeros((len(rows), *reduction.shape(y)))
            parts[site].append(torch.cat(one.unbind(0), channels[site]))
    return {site: torch.cat(some, channels[site]) for site, some in parts.items()}


def _pushed_forward(seeds: _Seeds, tapped: Tapped, channels: int, positions_at_once: int) -> Tensor:
    """Return the scores that each position's activation makes alone, the labels where the channels were."""
    (layer,), (activations,) = tapped.values, tapped.activations
    channels %= activations.dim()
    shape = [size for axis, size in enumerate(activations.shape) if axis not in {0, channels}]
    count = math.prod(shape)
    output = seeds.values.get(id(seeds.output))
    if output is None or not output.sites & tapped.bit:
        sizes = list(activations.shape)
        sizes[channels] = len(seeds.labels)
        return activations.new_zeros(sizes)

    def scores_of(value: Tensor) -> Tensor:
        found = seeds.tape.forward({layer: value}, [output], sites=tapped.bit, bypass=False)
        return seeds.scores(found[output])

    with quiet_batching():
        parts = []
        # one more than there are positions: there, nothing is left of the activations
        for start in range(0, count + 1, positions_at_once):
            chosen = torch.arange(start, min(start + positions_at_once, count + 1), device=activations.device)
            alone = (torch.arange(count, device=activations.device) == chosen[:, None]).reshape(-1, 1, *shape)
            parts.append(torch.func.vmap(scores_of)(activations * alone.unsqueeze(channels + 1)))
        scores = torch.cat(parts)
    # (positions, N, K) -> (N, ..., K) -> the labels where the channels were
    maps = (scores[:-1] - scores[-1]).permute(1, 0, 2).reshape(activations.shape[0], *shape, -1)
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
    return math.prod(activations.shape[1:]) // activations.shape[channel_dim]
