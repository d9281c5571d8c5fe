"""Quantized operations: what they stand for in real numbers, and a rounding.

A quantized tensor stands for the real numbers that its integers encode. What an operation makes of such tensors is the
plain operation on those numbers, by its own rule, and a rounding. Rounding has no slope of its own, or a useless one;
as in quantization-aware training it is passed straight through, and what it adds is a constant.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .composite import Composite

__all__ = ["QUANTIZED", "Rounded", "in_range", "unpacked"]


def _same(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


class Rounded(Composite):
    """An operation that rounds what it computes: the plain operation, by its own rule, and the rounding as a constant.

    With the default it is the straight-through estimator, for a quantizer of your own.

    Equation:
        y = m̄ · f(x) + ō, with m̄ = 1 where f(x̄) is in the range of the rounded numbers, else 0, and ō = ȳ − m̄ · f(x̄)

    Args:
        body: The plain operation f, with the operation's signature; the identity of the first argument by default.

    Example:
        >>> from captum_scoremap import freeze
        >>> frozen = freeze(torch.round, torch.tensor([[1.2, 2.6]]), rules={"round": Rounded()})
        >>> frozen(torch.tensor([[2.2, 1.6]])).round(decimals=3)  # slope 1, and what rounding added at the image
        tensor([[2., 2.]])
    """

    kind = "rounding"

    def __init__(self, body: Callable[..., Tensor] = _same) -> None:
        super().__init__(body)


def in_range(numbers: Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> Tensor:
    """Return where real numbers are in the range that integers reach.

    Args:
        numbers: The real numbers.
        scale: What an integer's step stands for.
        zero_point: The integer that stands for 0.
        dtype: Type of the integers.

    Returns:
        A mask.

    Example:
        >>> in_range(torch.tensor([-3.0, 0.3, 400.0]), 0.1, 10, torch.uint8)
        tensor([False,  True, False])
    """
    bounds = torch.iinfo(dtype)
    integers = torch.round(numbers / scale) + zero_point
    return (integers >= bounds.min) & (integers <= bounds.max)


@dataclass(frozen=True)
class Unpacked:
    """Packed parameters of a layer, in real numbers.

    Attributes:
        weight: As the plain layer has it.
        bias: None for none.
        geometry: Of a convolution: stride, padding, dilation, whether it is transposed, output padding, groups.
    """

    weight: Tensor
    bias: Tensor | None
    geometry: tuple[Any, ...] = ()


def unpacked(argument: Any) -> Any:
    """Return packed parameters in real numbers, and anything else as it is.

    Args:
        argument: What a quantized layer's kernel is given.

    Returns:
        Weight, bias and geometry, or the argument.

    Example:
        >>> unpacked(3)
        3
    """
    if not hasattr(argument, "unpack"):
        return argument
    packed: Any = argument  # a class of TorchScript's
    weight, bias = packed.unpack()
    weight = weight.dequantize() if weight.is_quantized else weight.float()
    if not hasattr(packed, "stride"):
        return Unpacked(weight, bias)
    sizes = packed.stride(), packed.padding(), packed.dilation()
    return Unpacked(weight, bias, (*sizes, bool(packed.transpose()), packed.output_padding(), packed.groups()))


def _linear(x: Tensor, packed: Unpacked, *_: Any, after: Callable[[Tensor], Tensor] = _same) -> Tensor:
    return after(F.linear(x, packed.weight, packed.bias))


def _leaky_linear(x: Tensor, packed: Unpacked, scale: float, zero_point: int, slope: float) -> Tensor:
    return F.leaky_relu(F.linear(x, packed.weight, packed.bias), slope)


def _convolution(x: Tensor, packed: Unpacked, *_: Any, after: Callable[[Tensor], Tensor] = _same) -> Tensor:
    weight = packed.weight
    flat = x.dim() == 3  # of which packed parameters make two dimensions, the first of one row
    if flat:
        x, weight = x.unsqueeze(2), weight if weight.dim() == 4 else weight.unsqueeze(2)
    found = torch.convolution(x, weight, packed.bias, *packed.geometry)
    return after(found.squeeze(2) if flat else found)


def _added_convolution(
    x: Tensor, other: Tensor, packed: Unpacked, *_: Any, after: Callable[[Tensor], Tensor] = _same
) -> Tensor:
    return after(_convolution(x, packed) + other)


def _clipped(x: Tensor, scale: Any, zero_point: Any, lowest: int, highest: int, *_: Any, **__: Any) -> Tensor:
    """Return the numbers that integers of one scale reach; what they round is the constant of reading them."""
    return x.clamp((lowest - zero_point) * scale, (highest - zero_point) * scale)


def _clipped_by_channel(
    x: Tensor, scales: Tensor, zero_points: Tensor, axis: int, lowest: int, highest: int, *_: Any, **__: Any
) -> Tensor:
    shape = [-1 if dim == axis % x.dim() else 1 for dim in range(x.dim())]
    return _clipped(x, scales.reshape(shape), zero_points.reshape(shape), lowest, highest)


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    *_: Any,
    after: Callable[[Tensor], Tensor] = _same,
) -> Tensor:
    return after(F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps))


def _binary(function: Callable[[Any, Any], Tensor], after: Callable[[Tensor], Tensor] = _same) -> Callable[..., Tensor]:
    return lambda a, b, *_: after(function(a, b))


def _concatenated(tensors: list[Tensor], dim: int, *_: Any, after: Callable[[Tensor], Tensor] = _same) -> Tensor:
    return after(torch.cat(tensors, dim))


QUANTIZED: dict[str, Rounded] = {
    **dict.fromkeys(
        """
        quantize_per_tensor quantize_per_tensor_dynamic quantize_per_channel dequantize
        fake_quantize_per_tensor_affine_cachemask _fake_quantize_per_tensor_affine_cachemask_tensor_qparams
        fake_quantize_per_channel_affine_cachemask _fake_quantize_learnable_per_tensor_affine
        _fake_quantize_learnable_per_channel_affine _fused_moving_avg_obs_fq_helper
        """.split(),
        Rounded(),
    ),
    "quantized_max_pool2d": Rounded(F.max_pool2d),
    # of exported models: integers that are plain tensors
    "quantized_decomposed::quantize_per_tensor": Rounded(_clipped),
    "quantized_decomposed::quantize_per_channel": Rounded(_clipped_by_channel),
    **{f"quantized_decomposed::{name}": Rounded() for name in ("dequantize_per_tensor", "dequantize_per_channel")},
    **{f"quantized::linear{how}": Rounded(_linear) for how in ("", "_dynamic", "_dynamic_fp16")},
    **{
        f"quantized::linear_relu{how}": Rounded(partial(_linear, after=torch.relu))
        for how in ("", "_dynamic", "_dynamic_fp16")
    },
    "quantized::linear_leaky_relu": Rounded(_leaky_linear),
    "quantized::linear_tanh": Rounded(partial(_linear, after=torch.tanh)),
    **{f"quantized::conv{d}d{how}": Rounded(_convolution) for d in (1, 2, 3) for how in ("", "_dynamic")},
    **{f"quantized::conv{d}d_relu": Rounded(partial(_convolution, after=torch.relu)) for d in (1, 2, 3)},
    **{f"quantized::conv_transpose{d}d{how}": Rounded(_convolution) for d in (1, 2, 3) for how in ("", "_dynamic")},
    "quantized::conv2d_add": Rounded(_added_convolution),
    "quantized::conv2d_add_relu": Rounded(partial(_added_convolution, after=torch.relu)),
    **{f"quantized::batch_norm{d}": Rounded(_batch_norm) for d in ("", "1d", "2d", "3d")},
    **{
        f"quantized::batch_norm{d}_relu": Rounded(partial(_batch_norm, after=torch.relu))
        for d in ("", "1d", "2d", "3d")
    },
    **{f"quantized::{name}": Rounded(_binary(torch.add)) for name in ("add", "add_scalar")},
    **{f"quantized::{name}": Rounded(_binary(torch.add, torch.relu)) for name in ("add_relu", "add_scalar_relu")},
    **{f"quantized::{name}": Rounded(_binary(torch.mul)) for name in ("mul", "mul_scalar")},
    **{f"quantized::{name}": Rounded(_binary(torch.mul, torch.relu)) for name in ("mul_relu", "mul_scalar_relu")},
    "quantized::matmul": Rounded(_binary(torch.matmul)),
    "quantized::cat": Rounded(_concatenated),
    "quantized::cat_relu": Rounded(partial(_concatenated, after=torch.relu)),
    "quantized::relu6": Rounded(lambda x, *_: F.relu6(x)),
    "quantized::leaky_relu": Rounded(lambda x, slope, *_: F.leaky_relu(x, slope)),
    "quantized::prelu": Rounded(lambda x, weight, *_: F.prelu(x, weight)),
    "quantized::hardswish": Rounded(lambda x, *_: F.hardswish(x)),
    "quantized::elu": Rounded(lambda x, scale, zero_point, *shape: torch.ops.aten.elu(x, *shape)),
    "quantized::celu": Rounded(lambda x, scale, zero_point, *shape: torch.ops.aten.celu(x, *shape)),
    "quantized::sigmoid": Rounded(lambda x, *_: x.sigmoid()),
    "quantized::softmax": Rounded(lambda x, dim, *_: x.softmax(dim)),
    "quantized::layer_norm": Rounded(lambda x, shape, weight, bias, eps, *_: F.layer_norm(x, shape, weight, bias, eps)),
    "quantized::group_norm": Rounded(
        lambda x, groups, weight, bias, eps, *_: F.group_norm(x, groups, weight, bias, eps)
    ),
    "quantized::instance_norm": Rounded(
        lambda x, weight, bias, eps, *_: F.instance_norm(x, weight=weight, bias=bias, eps=eps)
    ),
    "quantized::dropout": Rounded(),
}
