"""Score maps of many labels at once: forward mode by position, or reverse mode by label, whichever is fewer."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_scoremap.freeze import Recording, Reduction, Site, Tail
from captum_scoremap.linear_form import (
    batched_gradients,
    check_sites,
    quiet_batching,
    select_scores,
    warn_of_probabilities,
)
from captum_scoremap.rules import Rule, with_rules

__all__ = ["explain_targets"]

Label = int | tuple[int, ...]

# Images in work at once where the caller names no bound: enough to keep the cores busy, little beside a large model.
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
    """The score maps of many labels at every site.

    The score of a label is pushed back through the frozen layers above, one pass for each label; or, at a layer of
    fewer positions than there are labels, the activation of each position alone is pushed forward through them, one
    pass for each position: M(x, y) is the change of the scores it makes (Eq. (4) of Yu et al. 2015, read from the
    other end).

    Args:
        forward_func: The model, or a function that calls it.
        inputs: The image.
        targets: Labels, the same for all images; None for every label of an output (N, K).
        sites: Places in the model.
        reduction: What to make of A and Y there; it sums over channels, whose place the labels take.
        additional: Further arguments.
        rules: Rules to replace or add.
        internal_batch_size: Bound on the images in work at once.

    Returns:
        For each site the maps, (N, K, h, w) for a layer of (N, C, h, w).

    Raises:
        ValueError: If targets are missing where needed, or out of range, or a layer has several tensors.
    """
    taps, table, trusted = dict.fromkeys(sites, reduction), with_rules(rules), with_rules(None)
    # one site: its tail is recorded in the same run
    tails = {site: Tail(forward_func, table, site, reduction, trusted) for site in sites} if len(sites) == 1 else {}
    recording = tails[sites[0]].recording if tails else Recording(forward_func, table, taps, trusted=trusted)
    with torch.enable_grad():
        output = tails[sites[0]].record(inputs, additional) if tails else recording.record(inputs, additional)
        check_sites(recording, taps)
        warn_of_probabilities(recording, output)
        labels = _labels(output, targets)
        for label in labels[:1] if targets is None else labels:
            select_scores(output, label)  # names what is wrong before any work is done
    for site in sites:
        tensors = len(recording.tapped[site].anchors)
        if tensors != 1:
            raise ValueError(f"attribute_targets needs layers with one output tensor, got {tensors}. Use attribute.")
    channels = 1 if reduction.channel_dim is None else reduction.channel_dim
    images = max(1, (internal_batch_size or _IMAGES_AT_ONCE) // inputs[0].shape[0])
    forward = {
        site
        for site in sites
        if reduction.multiply and _positions(recording.tapped[site].activations[0], channels) < len(labels)
    }
    backward = [site for site in sites if site not in forward]
    anchors = [recording.tapped[site].anchors[0] for site in backward]
    found: dict[Site, list[Tensor]] = {site: [] for site in backward}
    for start in range(0, len(labels) if backward else 0, images):
        with torch.enable_grad():
            chunk = torch.stack([select_scores(output, label) for label in labels[start : start + images]])
        for site, one in zip(backward, _pushed_back(chunk, anchors), strict=True):
            found[site].append(torch.cat(one.unbind(0), channels))
    del output, recording, anchors

    def select(value: Any) -> Tensor:
        every = isinstance(value, Tensor) and targets is None
        return value if every else torch.stack([select_scores(value, label) for label in labels], 1)

    maps = {site: torch.cat(parts, channels) for site, parts in found.items()}
    for site in sorted(forward, key=sites.index):
        tail = tails.get(site)
        if tail is None:
            tail = Tail(forward_func, table, site, reduction, trusted)
            with torch.no_grad():
                tail.record(inputs, additional)
        maps[site] = _pushed_forward(tail, select, channels, images)
    return [maps[site] for site in sites]


def _pushed_back(scores: Tensor, anchors: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of every row of scores (labels, N) in the anchors, (labels, ...) each."""
    if not scores.requires_grad:
        return [anchor.new_zeros((len(scores), *anchor.shape)) for anchor in anchors]
    one_hot = torch.eye(len(scores), dtype=scores.dtype, device=scores.device)
    one_hot = one_hot[:, :, None].expand(-1, -1, scores.shape[1])
    found = batched_gradients(scores, anchors, one_hot, retain_graph=True)
    return [
        anchor.new_zeros((len(scores), *anchor.shape)) if gradient is None else gradient.detach()
        for anchor, gradient in zip(anchors, found, strict=True)
    ]


def _pushed_forward(tail: Tail, select: Callable[[Any], Tensor], channels: int, positions_at_once: int) -> Tensor:
    """The scores that each position's activation makes alone, the labels where the channels were."""
    activations = tail.recording.tapped[tail.site].activations[0]
    channels %= activations.dim()
    shape = [size for axis, size in enumerate(activations.shape) if axis not in {0, channels}]
    count = math.prod(shape)
    batched = torch.func.vmap(lambda value: select(tail(value)))
    with torch.no_grad(), quiet_batching():
        parts = []
        # one more than there are positions: there, nothing is left of the activations
        for start in range(0, count + 1, positions_at_once):
            chosen = torch.arange(start, min(start + positions_at_once, count + 1), device=activations.device)
            alone = (torch.arange(count, device=activations.device) == chosen[:, None]).reshape(-1, 1, *shape)
            parts.append(batched(activations * alone.unsqueeze(channels + 1)))
        scores = torch.cat(parts)
    # (positions, N, K) -> (N, ..., K) -> the labels where the channels were
    maps = (scores[:-1] - scores[-1]).permute(1, 0, 2).reshape(activations.shape[0], *shape, -1)
    return maps.movedim(-1, channels)


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
    """How many positions a layer has: its elements per image and channel."""
    return math.prod(activations.shape[1:]) // activations.shape[channel_dim]
