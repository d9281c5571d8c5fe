"""Which score is explained: from a model's output to one number for each image."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Label", "Target", "select_scores"]

Label = int | tuple[int, ...]
Target = (
    int
    | np.integer[Any]
    | tuple[int, ...]
    | Tensor
    | list[int]
    | list[tuple[int, ...]]
    | Callable[[Any], Tensor]
    | None
)


def select_scores(output: Any, target: Target, images: int | None = None) -> Tensor:
    """The scores (N,) that a target selects from a model's output.

    Args:
        output: (N,), or (N, ...).
        target: None if there is one score for each image; an int, a one-element tensor or a tuple of indices for all
            images; a list or tensor of N ints, or a list of N tuples, one for each; or a function of the whole output.
        images: How many images the model was given; None where that is not known.

    Returns:
        The scores, (N,).

    Raises:
        TypeError: If the output is no floating-point tensor, or the target has no known form.
        ValueError: If the target is missing, out of range or of the wrong length, or there are neither a score for each
            image nor for several of them.
    """
    if callable(target) and not isinstance(target, Tensor):
        return _checked(target(output))
    if not isinstance(output, Tensor) or not output.is_floating_point():
        got = f"a tensor of {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(
            f"the model must return a floating-point tensor of scores, (N, ...), got {got}. Wrap it in a function that "
            "picks one: lambda x: model(x)['out']."
        )
    if output.dim() == 0:
        raise ValueError("the model must return a score for each image, (N, ...), got a single number.")
    count, sizes = output.shape[0], tuple(output.shape[1:])
    if images is not None and count and images % count and count % images:
        raise ValueError(
            f"inputs must have a batch dimension, (N, ...), and the model must return a score for each image; got "
            f"{count} scores for {images} images. If that is one image, use inputs[None]."
        )
    if target is None:
        if output[0].numel() != 1:
            raise ValueError(
                f"target must be given for a model that returns {tuple(output.shape)}, got None. Name a label."
            )
        return output.reshape(count)
    if isinstance(target, Tensor):
        if target.is_floating_point() or target.is_complex():
            raise TypeError(f"target must hold integers, got {target.dtype}.")
        target = int(target) if target.numel() == 1 else target.tolist()
    if isinstance(target, np.integer):
        target = int(target)
    if isinstance(target, bool) or not isinstance(target, (int, tuple, list)):
        raise TypeError(f"target must be an int, a tuple, a list or a tensor of integers, got {type(target).__name__}.")
    if isinstance(target, list):
        if len(target) != count:
            raise ValueError(f"target must have one entry for each of the {count} images, got {len(target)}.")
        rows = [_index(entry, sizes) for entry in target]
        columns = [torch.tensor([row[axis] for row in rows], device=output.device) for axis in range(len(sizes))]
        place: tuple[Any, ...] = (torch.arange(count, device=output.device), *columns)
        return output[place]
    if len(sizes) == 0:
        raise ValueError(
            f"target must be None for a model that returns one score for each image, ({count},); got {target!r}."
        )
    scores: Tensor = output
    for axis_index in reversed(_index(target, sizes)):
        scores = scores[..., axis_index]
    return scores


def _checked(scores: object) -> Tensor:
    """What a target function returned.

    Returns:
        The scores.

    Raises:
        TypeError: If they are no floating-point tensor.
        ValueError: If they are not one number for each image.
    """
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        raise TypeError(
            f"a target function must return a floating-point tensor, one score for each image, got "
            f"{type(scores).__name__}."
        )
    if scores.dim() != 1:
        raise ValueError(f"a target function must return one score for each image, (N,), got {tuple(scores.shape)}.")
    return scores


def _index(entry: Any, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """One target as an index into an image's scores.

    Returns:
        The index.

    Raises:
        TypeError: If it holds something else than integers.
        ValueError: If it has too many or too few entries or is out of range.
    """
    index = tuple(entry) if isinstance(entry, (tuple, list)) else (entry,)
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in index):
        raise TypeError(f"target must hold integers, got {entry!r}.")
    if len(index) != len(sizes):
        raise ValueError(
            f"target must have {len(sizes)} ind{'ex' if len(sizes) == 1 else 'ices'} for scores of shape (N, "
            f"{', '.join(map(str, sizes))}), got {entry!r}."
        )
    for i, size in zip(index, sizes, strict=True):
        if not -size <= i < size:
            raise ValueError(f"target must be from 0 to {size - 1}, got {i}.")
    return index
