"""Steps that move elements, taken of numbers that are the same along some axes, of which each has size 1.

What a step moves is as large as all images and channels together; where elements stand is often the same for these.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from captum_scoremap.rules import display_name, floating, substituted
from captum_scoremap.tape import Step

__all__ = ["moved"]

_RESHAPING = {"view", "unsafe_view", "reshape", "squeeze", "unsqueeze", "flatten", "unflatten"}
_PERMUTING = {"permute", "transpose", "t"}  # whatever the sizes
_ALONG = {"slice", "select", "unbind", "split", "split_with_sizes", "index_select", "flip", "roll"}


def moved(step: Step, numbers: Sequence[Tensor], *, fills: bool = False) -> list[Tensor]:
    """Return what a step makes of numbers in place of its live arguments, without what its constants add.

    Args:
        step: A step that moves elements, or takes means of them.
        numbers: For each of its values, with the value's size along each axis or 1.
        fills: Whether padding is like what it is around.

    Returns:
        For each output, in the same way.
    """
    name, shape, after = display_name(step.operation), step.values[0].shape, step.outputs[0].shape
    (one, *_) = numbers
    if name in _RESHAPING and 0 not in shape:
        return [_reshaped(one, shape, after)]
    if name == "expand":
        return [one.reshape((1,) * (len(after) - len(shape)) + one.shape)]
    if name in _PERMUTING:
        return _made(step, numbers)
    if name in _ALONG:
        dims = step.argument("dim", "dims", default=0)
        dims = dims if isinstance(dims, (list, tuple)) else [dims]
        if dims:
            return _made(step, [_whole(one, shape, dims)])
    if name == "constant_pad_nd":
        pads = list(step.args[1])
        for at in range(len(pads)):
            pads[at] = 0 if fills and one.shape[-1 - at // 2] == 1 else pads[at]
        return [F.pad(_whole(one, shape, [-1 - at // 2 for at, pad in enumerate(pads) if pad]), pads)]
    if name in {"cat", "stack"}:
        return [_joined(step, numbers, stacks=name == "stack")]
    whole = [one.expand(value.shape) for one, value in zip(numbers, step.values, strict=True)]
    found = _made(step, whole)
    if step.rule.homogeneous and not floating((step.args, dict(step.kwargs))):
        return found
    constants = _made(step, [torch.zeros_like(one) for one in whole])
    return [(both - one).nan_to_num(0) for both, one in zip(found, constants, strict=True)]


def _made(step: Step, numbers: Sequence[Tensor]) -> list[Tensor]:
    """Return what a step makes, in the type of the numbers."""
    call = step.filled(numbers)
    call.args, state = substituted(
        (call.args, step.frozen()), lambda one: one.to(numbers[0].dtype) if one.is_floating_point() else one
    )
    return [one.real if one.is_complex() else one for one in floating(step.rule.apply(call, state))]


def _whole(one: Tensor, shape: Sequence[int], dims: Sequence[int]) -> Tensor:
    """Return numbers with the value's size along some axes."""
    sizes = list(one.shape)
    for dim in dims:
        sizes[dim] = shape[dim]
    return one.expand(sizes)


def _reshaped(one: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """Return numbers reshaped, each run of axes by itself that takes the place of another."""
    whole: list[int] = []
    made: list[int] = []
    while len(whole) < len(before) or len(made) < len(after):
        start, end = len(whole), len(made)
        stop, last = start + 1, end + 1
        while (mine := math.prod(before[start:stop])) != (theirs := math.prod(after[end:last])):
            stop, last = (stop + 1, last) if mine < theirs else (stop, last + 1)
        stop, last = min(stop, len(before)), min(last, len(after))
        varies = max(one.shape[start:stop], default=1) > 1
        whole += before[start:stop] if varies else [1] * (stop - start)
        made += after[end:last] if varies else [1] * (last - end)
    return one.expand(whole).reshape(made)


def _joined(step: Step, numbers: Sequence[Tensor], *, stacks: bool) -> Tensor:
    """Return numbers one after another, or stacked, with zeros for constants."""
    remaining, dims = iter(numbers), step.outputs[0].ndim
    dim = step.argument("dim", default=0) % dims
    parts = []
    for part in step.args[0]:
        zeros = numbers[0].new_zeros((1,) * len(part.shape))
        one = next(remaining) if step.is_live(part) else zeros
        if stacks:
            parts.append(one.unsqueeze(dim))
        elif len(part.shape) == dims:  # an empty one may be a row
            parts.append(_whole(one, part.shape, [dim]))
    sizes = [max(sizes) for sizes in zip(*(part.shape for part in parts), strict=True)]
    return torch.cat([part.expand(*sizes[:dim], -1, *sizes[dim + 1 :]) for part in parts], dim)
