"""What all metrics share: an attribution as one input-sized map, and the model's value for a label."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_scoremap.scores import logits_in, select_scores, shape_or_type

Score: TypeAlias = Tensor | Callable[[Any], Tensor]
"""Which score is meant: labels ``(N,)``, or a function from the model's output to ``(N,)``."""

Attribution: TypeAlias = Callable[[Tensor, Any], Tensor]
"""``attribute(inputs, target)``: inputs ``(N, C, H, W)`` and labels ``(N,)`` to ``(N, C or 1, h, w)``."""


def input_sized(attributions: Tensor, height: int, width: int) -> Tensor:
    """Return attributions of any layer as one map of the size of the image.

    Args:
        attributions: ``(N, C, h, w)``; channels are summed.
        height: rows of the image.
        width: columns of the image.

    Returns:
        Maps ``(N, H, W)``, bilinearly enlarged (or reduced) where the sizes differ.

    Raises:
        ValueError: if the attributions have not four dimensions, or are not finite.

    Example:
        >>> input_sized(torch.ones(1, 3, 2, 2), 4, 4).shape
        torch.Size([1, 4, 4])
    """
    if attributions.dim() != 4:
        raise ValueError(
            f"attributions must have the shape (N, C, h, w), got {tuple(attributions.shape)}. "
            "Reshape them in the callable that is passed as attribute."
        )
    if not attributions.isfinite().all():
        raise ValueError("attributions must be finite, got NaN or infinite values. Check the model on these images.")
    maps = attributions.detach().sum(dim=1, keepdim=True)
    if maps.shape[-2:] != (height, width):
        maps = F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=False)
    return maps[:, 0]


def attribution_maps(attribute: Attribution, inputs: Tensor, target: Score) -> Tensor:
    """Return ``attribute(inputs, target)`` as input-sized maps ``(N, H, W)``."""
    return input_sized(attribute(inputs, target), inputs.shape[-2], inputs.shape[-1])


def ranks(maps: Tensor) -> Tensor:
    """Return the rank of each pixel in its map ``(N, H, W)``: 0 for the highest; of equal ones the first leads."""
    order = maps.flatten(start_dim=1).argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1).view_as(maps)


def unit_maps(attribute: Attribution, inputs: Tensor, target: Score) -> Tensor:
    """Return the positive parts of ``attribute(inputs, target)`` as input-sized maps ``(N, 1, H, W)`` between 0 and 1.

    Each is divided by its largest value; a map without anything positive is zero.
    """
    positive = attribution_maps(attribute, inputs, target)[:, None].clamp(min=0)
    largest = positive.amax(dim=(2, 3), keepdim=True)
    return positive / torch.where(largest > 0, largest, 1.0)


def check_images(inputs: Tensor, target: Score) -> None:
    """Check that there is a batch of images with one label for each, or a function.

    Raises:
        ValueError: if inputs are no ``(N, C, H, W)`` or target is no ``(N,)``.
    """
    if inputs.dim() != 4:
        advice = " Use inputs[None]." if inputs.dim() == 3 else ""
        raise ValueError(f"inputs must have the shape (N, C, H, W), got {tuple(inputs.shape)}.{advice}")
    if isinstance(target, Tensor) and tuple(target.shape) != (inputs.shape[0],):
        raise ValueError(
            f"target must hold one label per image, ({inputs.shape[0]},), got {tuple(target.shape)}. "
            "Use torch.full((len(inputs),), label) for one label."
        )


def check_batch_size(batch_size: int) -> None:
    """Check that the model sees at least one image at once.

    Raises:
        ValueError: if it is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")


def in_batches(
    value: Callable[[Callable[..., Any], Tensor, Any], Tensor],
    forward_func: Callable[..., Any],
    images: Callable[[Tensor], Tensor],
    inputs: Tensor,
    target: Score,
    copies: int,
    batch_size: int,
) -> Tensor:
    """Return the values of many changed images, which are made when the model is about to see them.

    Args:
        value: :func:`label_scores` or :func:`label_probabilities`.
        forward_func: the model; returns scores ``(N, K)``.
        images: from indices ``(n,)`` of the changed images to these images ``(n, C, H, W)``.
        inputs: the images as they were, ``(N, C, H, W)``.
        target: labels ``(N,)``, or a function.
        copies: how many changed images there are of each.
        batch_size: images that the model sees at once.

    Returns:
        ``(N * copies,)``.
    """
    indices = torch.arange(len(inputs) * copies, device=inputs.device).split(batch_size)
    labels = target.repeat_interleave(copies).to(inputs.device) if isinstance(target, Tensor) else None
    return torch.cat([value(forward_func, images(i), target if labels is None else labels[i]) for i in indices])


def label_scores(forward_func: Callable[..., Any], inputs: Tensor, target: Score) -> Tensor:
    """Return the score (logit) of each image's label, ``(N,)``."""
    with torch.no_grad():
        return select_scores(forward_func(inputs), target, len(inputs))


def label_probabilities(forward_func: Callable[..., Any], inputs: Tensor, target: Score) -> Tensor:
    """Return the probability (softmax of the scores) of each image's label, ``(N,)``; of a function its value.

    Raises:
        ValueError: if the model returns fewer than two scores for each image, of which a softmax is always 1.
    """
    with torch.no_grad():
        scores = forward_func(inputs)
        if not isinstance(target, Tensor):
            return select_scores(scores, target, len(inputs))
        scores = logits_in(scores)
        if not isinstance(scores, Tensor) or scores.dim() < 2 or scores.shape[1] < 2:
            raise ValueError(
                "the model must return scores of at least two labels, (N, K), for a probability, got "
                f"{shape_or_type(scores)}. Pass as target a function from its output to (N,), such as lambda output: "
                "output.reshape(-1).sigmoid()."
            )
        return select_scores(scores.softmax(dim=1), target, len(inputs))
