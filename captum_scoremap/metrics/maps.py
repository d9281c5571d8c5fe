"""What all metrics share: an attribution as one input-sized map, and the model's value for a label."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from captum_scoremap.scores import is_function, logits_in, select_scores, shape_or_type

Score: TypeAlias = int | Sequence[int] | np.ndarray[Any, Any] | Tensor | Callable[[Any], Tensor]
"""Which score is meant: a label, labels ``(N,)``, or a function from the model's output to ``(N,)``."""

CheckedScore: TypeAlias = Tensor | Callable[[Any], Tensor]
"""The same, of the inputs at hand: integer labels ``(N,)``, or the function."""

Attribution: TypeAlias = Callable[[Tensor, Any], Tensor]
"""``attribute(inputs, target)``: inputs ``(N, C, H, W)`` and labels ``(N,)`` to ``(N, C or 1, h, w)``."""


def input_sized(attributions: Tensor, height: int, width: int) -> Tensor:
    """Return attributions of any layer as one map of the size of the image.

    Args:
        attributions: ``(N, C, h, w)``; channels are summed.
        height: Rows of the image.
        width: Columns of the image.

    Returns:
        Maps ``(N, H, W)``, bilinearly enlarged (or reduced) where the sizes differ.

    Raises:
        ValueError: If the attributions have not four dimensions, or are not finite.

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


def attribution_maps(attribute: Attribution, inputs: Tensor, target: CheckedScore) -> Tensor:
    """Return ``attribute(inputs, target)`` as input-sized maps ``(N, H, W)``."""
    return input_sized(attributed(attribute, inputs, target), inputs.shape[-2], inputs.shape[-1])


def attributed(attribute: Attribution, inputs: Tensor, target: CheckedScore) -> Tensor:
    """Return ``attribute(inputs, target)``.

    Raises:
        TypeError: If attribute is no function, or returns no tensor.
        ValueError: If it does not return one attribution for each image.
    """
    if not callable(attribute) or isinstance(attribute, Tensor):
        raise TypeError(
            "attribute must be a function of inputs and labels, such as ScoreMap(model).attribute, got "
            f"{type(attribute).__name__}. Of finished maps: lambda inputs, target: maps."
        )
    found = attribute(inputs, target)
    if not isinstance(found, Tensor):
        raise TypeError(f"attribute must return a tensor, got {type(found).__name__}. Use torch.as_tensor.")
    if found.dim() == 0 or len(found) != len(inputs):
        raise ValueError(
            f"attribute must return maps of each of the {len(inputs)} images, (N, C, h, w), got {tuple(found.shape)}."
        )
    return found


def ranks(maps: Tensor) -> Tensor:
    """Return the rank of each pixel in its map ``(N, H, W)``: 0 for the highest; of equal ones the first leads."""
    order = maps.flatten(start_dim=1).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places).view_as(maps)


def unit_maps(attribute: Attribution, inputs: Tensor, target: CheckedScore) -> Tensor:
    """Return the positive parts of ``attribute(inputs, target)`` as input-sized maps ``(N, 1, H, W)`` between 0 and 1.

    Each is divided by its largest value; a map without anything positive is zero.
    """
    positive = attribution_maps(attribute, inputs, target)[:, None].clamp(min=0)
    largest = positive.amax(dim=(2, 3), keepdim=True)
    return positive / torch.where(largest > 0, largest, 1.0)


def checked_target(inputs: Tensor, target: Score) -> CheckedScore:
    """Return the label of each image of a batch, ``(N,)``, or the function.

    Args:
        inputs: Images ``(N, C, H, W)``.
        target: An int, or a tensor of one, for all images; a list, tensor or array of N ints; or a function.

    Returns:
        The labels or the function.

    Raises:
        TypeError: If target is something else, or inputs are no tensor.
        ValueError: If inputs are no ``(N, C, H, W)``, or target is not one label for each.

    Example:
        >>> checked_target(torch.zeros(3, 1, 2, 2), 7)
        tensor([7, 7, 7])
    """
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs must be one tensor (N, C, H, W), got {type(inputs).__name__}. Use torch.stack.")
    if inputs.dim() != 4:
        advice = " Use inputs[None]." if inputs.dim() == 3 else ""
        raise ValueError(f"inputs must have the shape (N, C, H, W), got {tuple(inputs.shape)}.{advice}")
    if is_function(target):
        return target
    try:
        labels = torch.as_tensor(target)
        whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool)
    except (TypeError, ValueError, RuntimeError):
        whole = False
    if not whole or isinstance(target, tuple):
        raise TypeError(
            "target must be a label, labels (N,) or a function from the model's output to (N,), got "
            f"{target.dtype if isinstance(target, Tensor) else repr(target)}. Of scores (N, K, ...) pass a function."
        )
    if labels.dim() == 0:
        labels = labels.expand(len(inputs))
    if tuple(labels.shape) != (len(inputs),):
        raise ValueError(f"target must hold one label per image, ({len(inputs)},), got {tuple(labels.shape)}.")
    return labels.long().to(inputs.device)


def check_batch_size(batch_size: int) -> None:
    """Check that the model sees at least one image at once.

    Raises:
        ValueError: If it is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")


def in_batches(
    value: Callable[[Callable[..., Any], Tensor, Any], Tensor],
    forward_func: Callable[..., Any],
    images: Callable[[Tensor], Tensor],
    inputs: Tensor,
    target: CheckedScore,
    copies: int,
    batch_size: int,
) -> Tensor:
    """Return the values of many changed images, which are made when the model is about to see them.

    Args:
        value: :func:`label_scores` or :func:`label_probabilities`.
        forward_func: The model; returns scores ``(N, K)``.
        images: From indices ``(n,)`` of the changed images to these images ``(n, C, H, W)``.
        inputs: The images as they were, ``(N, C, H, W)``.
        target: Labels ``(N,)``, or a function.
        copies: How many changed images there are of each.
        batch_size: Images that the model sees at once.

    Returns:
        ``(N * copies,)``.
    """
    indices = torch.arange(len(inputs) * copies, device=inputs.device).split(batch_size)
    labels = target.repeat_interleave(copies).to(inputs.device) if isinstance(target, Tensor) else None
    return torch.cat([value(forward_func, images(i), target if labels is None else labels[i]) for i in indices])


def label_scores(forward_func: Callable[..., Any], inputs: Tensor, target: CheckedScore) -> Tensor:
    """Return the score (logit) of each image's label, ``(N,)``."""
    with torch.no_grad():
        return select_scores(forward_func(inputs), target, len(inputs))


def label_probabilities(forward_func: Callable[..., Any], inputs: Tensor, target: CheckedScore) -> Tensor:
    """Return the probability (softmax of the scores) of each image's label, ``(N,)``; of a function its value.

    Raises:
        ValueError: If the model returns fewer than two scores for each image, of which a softmax is always 1.
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
