"""Where tensors lie in their memory: shape, strides and offset, and what two places have in common."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from captum_scoremap.checks import has_memory, unrecorded

__all__ = ["Geometry", "are_alike", "are_apart", "fills", "geometry", "overlaps", "share"]

Geometry = tuple[torch.Size, tuple[int, ...], int]


def geometry(tensor: Tensor) -> Geometry:
    """Return where a tensor lies in its memory: shape, strides and offset."""
    return tensor.shape, tensor.stride(), int(tensor.storage_offset())


def are_apart(place: Geometry, other: Geometry) -> bool:
    """Return whether two places in memory share no element; False where that takes more than a look at each axis.

    Where every stride divides the next larger one, the position of an element is a number whose digits are its indices
    along the axes, and a place is a box of digits. Two boxes are apart if they are along one axis.
    """
    strides = sorted({
        step for sizes, steps, _ in (place, other) for n, step in zip(sizes, steps, strict=True) if n > 1
    })
    strides = [1, *(step for step in strides if step > 1)]
    if any(larger % smaller for smaller, larger in pairwise(strides)):
        return False
    digits = [_digits(one, strides) for one in (place, other)]
    if None in digits:
        return False
    return any(end <= start or last <= first for (start, last), (first, end) in zip(*digits, strict=True))


def _digits(place: Geometry, strides: Sequence[int]) -> list[tuple[int, int]] | None:
    """Return from which to below which digit a place reaches, of each stride; None where it is no box."""
    sizes, steps, offset = place
    counts = dict.fromkeys(strides, 1)
    for count, step in zip(sizes, steps, strict=True):
        if count > 1:
            if step not in counts or counts[step] > 1:
                return None  # the same elements again
            counts[step] = count
    found = []
    for step, larger in zip(strides, (*strides[1:], None), strict=True):
        first = offset // step if larger is None else offset % larger // step
        if larger is not None and first + counts[step] > larger // step:
            return None  # it goes on in the next row
        found.append((first, first + counts[step]))
    return found


def overlaps(tensor: Tensor) -> bool:
    """Return whether a tensor has elements that lie at one place in memory, as windows do."""
    if tensor.is_contiguous():
        return False
    size, stride, _ = geometry(tensor)
    reach = 0
    for step, count in sorted((step, count) for step, count in zip(stride, size, strict=True) if count != 1):
        if step <= reach:  # it may still fit into gaps
            with unrecorded():
                return bool(_places(tensor).unique().numel() < size.numel())
        reach += (count - 1) * step
    return False


def are_alike(tensor: Tensor, other: Tensor) -> bool:
    """Return whether two tensors of one memory have each element at the same place, but for axes of one element."""
    return _axes(tensor) == _axes(other)


def _axes(tensor: Tensor) -> tuple[int, int, list[tuple[int, int]]]:
    shape, strides, offset = geometry(tensor)
    return tensor.element_size(), offset, [(n, step) for n, step in zip(shape, strides, strict=True) if n > 1]


def share(tensor: Tensor, other: Tensor) -> bool:
    """Return whether two tensors share an element of memory."""
    if not (has_memory(tensor) and has_memory(other)):
        return False
    if tensor.untyped_storage()._cdata != other.untyped_storage()._cdata:
        return False
    if tensor.element_size() == other.element_size() and are_apart(geometry(tensor), geometry(other)):
        return False
    size = max(tensor.element_size(), other.element_size())
    with unrecorded():
        first, second = (_places(one) * one.element_size() // size for one in (tensor, other))
        return bool(torch.isin(first, second.unique()).any())


def _places(tensor: Tensor) -> Tensor:
    """Return the position of each element in memory, counted in elements."""
    places = torch.tensor(int(tensor.storage_offset()))
    for length, each in zip(tensor.shape, tensor.stride(), strict=True):
        places = places[..., None] + torch.arange(length) * each
    return places


def fills(tensor: Tensor, length: int) -> bool:
    """Return whether a tensor is all of its memory, of so many elements, each once."""
    return tensor.numel() == length and not overlaps(tensor)
