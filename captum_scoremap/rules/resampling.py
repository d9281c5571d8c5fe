"""Resampling, as ``F.interpolate`` does it: affine, but of some calls PyTorch's backward kernel transposes another one.

Seen on a CPU (PyTorch 2.14), where the forward and the backward kernel differ:

- antialiased: an output of width 1 whose height is neither 1 nor the input's; there the forward kernel is the wrong
  one, and another one for channels-last memory, but it is what the model computes;
- antialiased: a scale factor that leaves a size as it is, as 1.1 does: taken for 1 along that axis;
- bicubic: the same, where all sizes are left as they are;
- ``nearest`` in 1-D and 3-D: a scale factor that leaves a size as it is, or doubles it, as 2.1 does: taken for 1 or 2;
- ``nearest`` and ``nearest-exact`` in 1-D and 3-D: an element halfway between two others, which rounding decides.

There the operation is applied as a product with one matrix for each axis, whose transpose autograd does know. They are
read off the forward kernel: it is separable, and the weights of each element of its output sum to one.
"""

from ctypes import c_float
from functools import cache
from math import floor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import Call

__all__ = ["resampled"]

_FACTORS = {1: ("scales",), 2: ("scales_h", "scales_w"), 3: ("scales_d", "scales_h", "scales_w")}


def resampled(call: Call) -> Any:
    """Run a resampling: by matrices where PyTorch would transpose another one."""
    return _by_matrices(call) if _is_transposed_wrongly(call) else call.run()


def _is_transposed_wrongly(call: Call) -> bool:
    shape, name = call.values[0].shape, call.operation.overloadpacket.__name__  # type: ignore[attr-defined]
    old = shape[2:]
    factors = call.argument("scale_factors") or [call.argument(factor) for factor in _FACTORS[len(old)]]
    new = call.argument("output_size") or [int(size * factor) for size, factor in zip(old, factors, strict=True)]
    if not shape[0]:
        return False  # no images have no coefficients
    is_smooth, is_exact = name.endswith("_aa"), "exact" in name
    if is_smooth and new[1] == 1 and new[0] not in {1, old[0]}:
        return True
    if call.argument("align_corners"):
        return False  # goes by the sizes
    axes = list(zip(old, new, factors, strict=True))
    # along each axis, the ratio of sizes if the factor, which the forward kernel goes by, is another
    ratios = [after / size if factor and factor != after / size else None for size, after, factor in axes]
    if "nearest" not in name:
        return 1 in ratios and (is_smooth or list(old) == list(new))
    if not is_exact and (1 in ratios or 2 in ratios):
        return True
    if not is_exact and call.values[0].dtype is not torch.float64:
        return False  # both kernels count in float32
    steps = [(1 / factor if factor else size / after, after) for size, after, factor in axes]
    return any(_is_up_to_rounding(*step, 0.5 if is_exact else 0.0) for step in steps)


@cache
def _is_up_to_rounding(step: float, count: int, start: float) -> bool:
    """Return whether the kernels take one of so many elements, a step apart, from different places."""
    narrow = _narrow(step)  # the forward kernel counts in its argument's type, the backward one in float32
    for place in (start + number for number in range(count)):
        found = {floor(_narrow(step * place)), floor(_narrow(narrow * place))}
        if start:  # which is taken off, in one operation with the product or not, and added again
            offs = (narrow * place, _narrow(narrow * place))
            found |= {floor(_narrow(max(_narrow(off - start), 0.0) + start)) for off in offs}
        if len(found) > 1:
            return True
    return False


def _narrow(number: float) -> float:
    return c_float(number).value


def _by_matrices(call: Call) -> Tensor:
    found: Tensor = call.input
    for axis in range(2, found.ndim):
        found = (found.movedim(axis, -1) @ _matrix(call, axis)).movedim(-1, axis)
    return found


def _matrix(call: Call, axis: int) -> Tensor:
    """Return the weights along one axis, (size before, size after).

    The kernel is shown the rows of the identity along that axis, constant along the others, one in each channel of an
    image: of the same sizes and layout as what it saw, since which kernel it is depends on them.
    """
    value = call.values[0]
    channels, size = value.shape[1], value.shape[axis]
    place = [size if at == axis else 1 for at in range(2, value.ndim)]
    weights = []
    for rows in torch.eye(size, dtype=value.dtype, device=value.device).split(channels):
        padded = F.pad(rows, (0, 0, 0, channels - len(rows)))
        shown = torch.empty_like(value.empty()[:1]).copy_(padded.view(1, channels, *place))
        seen = call.filled([shown]).run()[0].movedim(axis - 1, 1)[: len(rows)]
        weights.append(seen.reshape(*seen.shape[:2], -1)[..., 0])
    return torch.cat(weights)
