"""Score maps of many labels at once: forward mode by position, or reverse mode by label, whichever is fewer."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_scoremap.freeze import Recording, Reduction, Site
from captum_scoremap.linear_form import check_sites, select_scores, warn_of_probabilities
from captum_scoremap.rules import Rule, with_rules

__all__ = ["explain_targets"]

Label = int | tuple[int, ...]


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
    """The score maps of many labels at every site.

    Args:
        forward_func: The model, or a function that calls it.
        inputs: The image.
        targets: Labels, the same for all images; None for every label of an output (N, K).
        sites: Places in the model.
        reduction: What to make of A and Y there; it must sum over channels, whose place the labels take.
        additional: Further arguments.
        rules: Rules to replace or add.
        internal_batch_size: Bound on the images in work at once.

    Returns:
        For each site the maps, (N, K, h, w) for a layer of (N, C, h, w).

    Raises:
        ValueError: If targets are missing where needed, or out of range, or a layer has several tensors.
    """
    taps = dict.fromkeys(sites, reduction)
    recording = Recording(forward_func, with_rules(rules), taps, trusted=with_rules(None))
    with torch.enable_grad():
        output = recording.record(inputs, additional)
        check_sites(recording, taps)
        warn_of_probabilities(recording, output)
        labels = _labels(output, targets)
        scores = [select_scores(output, label) for label in labels]
    for site in sites:
        if len(recording.tapped[site].anchors) != 1:
            count = len(recording.tapped[site].anchors)
            raise ValueError(
                f"attribute_targets needs layers with one output tensor, got {count}. Use attribute."
            )
    anchors = [recording.tapped[site].anchors[0] for site in sites]
    count = inputs[0].shape[0]
    size = max(1, (internal_batch_size or 64) // count)
    maps: list[list[Tensor]] = [[] for _ in sites]
    for start in range(0, len(scores), size):
        chunk = torch.stack(scores[start : start + size])
        for place, found in enumerate(_backward(chunk, anchors)):
            # (labels, N, 1, h, w) -> (N, labels, h, w), the labels where the channels were
            axis = reduction.channel_dim if reduction.channel_dim is not None else 1
            maps[place].append(torch.cat(found.unbind(0), axis))
    axis = reduction.channel_dim if reduction.channel_dim is not None else 1
    return [torch.cat(found, axis) for found in maps]


def _backward(scores: Tensor, anchors: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of every row of scores (labels, N) in the anchors, (labels, ...) each."""
    if not scores.requires_grad:
        return [anchor.new_zeros((len(scores), *anchor.shape)) for anchor in anchors]
    one_hot = torch.eye(len(scores), dtype=scores.dtype, device=scores.device)
    one_hot = one_hot[:, :, None].expand(-1, -1, scores.shape[1])
    found = torch.autograd.grad(
        scores, anchors, one_hot, is_grads_batched=True, retain_graph=True, allow_unused=True
    )
    return [
        anchor.new_zeros((len(scores), *anchor.shape)) if gradient is None else gradient.detach()
        for anchor, gradient in zip(anchors, found, strict=True)
    ]


def _labels(output: Any, targets: Sequence[Label] | None) -> list[Label]:
    if targets is not None:
        labels = list(targets)
        if not labels:
            raise ValueError("targets must name at least one label, got none.")
        return labels
    if not isinstance(output, Tensor) or output.dim() != 2:
        raise ValueError("targets must be given for a model that does not return (N, K). Name the labels.")
    return list(range(output.shape[1]))


def positions(activations: Tensor, channel_dim: int) -> int:
    """How many positions a layer has: its elements per image and channel."""
    return math.prod(activations.shape[1:]) // activations.shape[channel_dim]
