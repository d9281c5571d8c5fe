"""Convolutions and their transposes as other sums of the same products, where PyTorch's kernels on a CPU are slow.

What comes out differs by rounding. A pointwise convolution of few cells is a product of matrices, which takes less to
set up. And the transpose of a convolution with a stride s that leads to few channels, such as the first of a network,
is a convolution without one: the cells of the image that are s apart read the same coefficients,

    x(s q + r) = sum_m w(s m + r) a(q + t - m)   with w from the front padded by zeros, s t with the padding in all
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["convolved_back", "convolved_otherwise", "transposed_otherwise"]

aten = torch.ops.aten

# Cells, images together, up to which a product is faster than a convolution.
_FEW_CELLS = 2**12
_FEW_CHANNELS = 4


def convolved_back(coefficients: Tensor, value: Any, weight: Tensor, *geometry: Any) -> Tensor:
    """Return the coefficients of what was convolved: as :func:`transposed_otherwise`, or as PyTorch has it."""
    found = transposed_otherwise(coefficients, value.shape, weight, *geometry)
    if found is None:
        mask = [True, False, False]
        found, _, _ = aten.convolution_backward(coefficients, value.empty(), weight, None, *geometry, mask)
    return found


def transposed_otherwise(coefficients: Tensor, shape: Sequence[int], weight: Tensor, *geometry: Any) -> Tensor | None:
    """Return the coefficients of what was convolved by other steps than PyTorch's transpose; None where it is faster.

    Args:
        coefficients: Of what came out, (N, channels, ...).
        shape: Of what was convolved, (N, C, ...).
        weight: (channels, C / groups, ...).
        geometry: Stride, padding, dilation, whether the convolution is a transposed one, output padding and groups.

    Returns:
        Of that shape.
    """
    stride, padding, dilation, transposed, _, groups = geometry
    if transposed or not _is_fit(coefficients, weight, dilation, groups):
        return None
    if set(stride) == {1}:
        return _as_product(coefficients, weight.transpose(0, 1), padding)
    return _by_phases(coefficients, shape, weight, stride, padding)


def convolved_otherwise(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor | None:
    """Return a convolution, (N, channels, ...), by other steps than PyTorch's, of the same arguments; None likewise."""
    stride, padding, dilation, transposed, _, groups = geometry
    if transposed or set(stride) != {1} or not _is_fit(x, weight, dilation, groups):
        return None
    return _as_product(x, weight, padding, bias)


def _is_fit(x: Tensor, weight: Tensor, dilation: Sequence[int], groups: int) -> bool:
    return x.device.type == "cpu" and weight.is_floating_point() and set(dilation) == {1} and groups == 1


def _as_product(x: Tensor, weight: Tensor, padding: Sequence[int], bias: Tensor | None = None) -> Tensor | None:
    """Return a pointwise convolution of few cells, in memory laid out as what is convolved; None of another."""
    if set(weight.shape[2:]) != {1} or set(padding) != {0} or x[:, :1].numel() > _FEW_CELLS:
        return None
    matrix, cells = weight.flatten(1), x.movedim(1, -1)
    if cells.is_contiguous():
        return F.linear(cells, matrix, bias).movedim(-1, 1)
    if not x.is_contiguous():
        return None
    found: Tensor = (matrix @ x.flatten(2)).unflatten(2, x.shape[2:])
    return found if bias is None else found + bias.reshape(-1, *[1] * (x.dim() - 2))


def _by_phases(
    coefficients: Tensor, shape: Sequence[int], weight: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> Tensor | None:
    """Return the transpose of a convolution with a stride, by one without for all phases r; None where it is slower."""
    channels, kernel, axes = weight.shape[1], weight.shape[2:], weight.dim() - 2
    stride, padding = (list(one) * (axes // len(one)) for one in (stride, padding))
    is_wide = all(size == step or size > 2 * step for size, step in zip(kernel, stride, strict=True))
    if channels > _FEW_CHANNELS or not is_wide:
        return None
    around: list[int] = []  # the kernel, the last axis first
    beside: list[int] = []  # the coefficients
    cells = [math.ceil(size / step) for size, step in zip(shape[2:], stride, strict=True)]  # of each phase
    for axis in reversed(range(axes)):
        front = -padding[axis] % stride[axis]
        taps = math.ceil((front + kernel[axis]) / stride[axis])
        around += [front, taps * stride[axis] - front - kernel[axis]]
        first = (front + padding[axis]) // stride[axis]
        beside += [taps - 1 - first, cells[axis] - coefficients.shape[axis + 2] + first]
    kernels = F.pad(weight, around)
    for axis in reversed(range(axes)):
        kernels = kernels.unflatten(axis + 2, (-1, stride[axis]))
    every_tap, every_phase = range(2, 2 * axes + 2, 2), range(3, 2 * axes + 2, 2)
    kernels = kernels.flip(list(every_tap)).permute(1, *every_phase, 0, *every_tap).flatten(0, axes)
    ones, zeros = [1] * axes, [0] * axes
    found: Tensor = aten.convolution(F.pad(coefficients, beside), kernels, None, ones, zeros, ones, False, zeros, 1)
    cells_and_phases = [dim for axis in range(axes) for dim in (axes + 2 + axis, 2 + axis)]
    found = found.unflatten(1, (channels, *stride)).permute(0, 1, *cells_and_phases)
    found = found.reshape(len(found), channels, *(count * step for count, step in zip(cells, stride, strict=True)))
    for axis in range(axes):
        found = found.narrow(axis + 2, 0, shape[axis + 2])
    return found
