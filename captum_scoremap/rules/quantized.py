"""Quantized operations: what they stand for in real numbers, and a rounding.

A quantized tensor stands for the real numbers that its integers encode, and one of 8-bit floats for those that it
holds. What an operation makes of such tensors is the plain operation on those numbers, by its own rule, and a rounding.
Rounding has no slope of its own, or a useless one; as in quantization-aware training it is passed straight through, and
what it adds is a constant.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .rule import Composite

__all__ = ["EIGHT_BITS", "QUANTIZED", "Rounded", "decoded", "in_range", "is_encoded", "unpacked"]

# Types of numbers that are stored, not computed with: what is cast to one is rounded to a few bits.
EIGHT_BITS = {
    one for one in vars(torch).values() if isinstance(one, torch.dtype) and one.is_floating_point and one.itemsize == 1
}


def is_encoded(tensor: Tensor) -> bool:
    """Return whether a tensor stands for real numbers in a few bits."""
    return tensor.is_quantized or tensor.dtype in EIGHT_BITS


def decoded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the real numbers that a tensor stands for, of a type where its own kind has none."""
    return tensor.dequantize() if tensor.is_quantized else tensor.to(dtype)


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
    """Return where real numbers are in the range of integers of a type: ``scale`` is a step, ``zero_point`` 0."""
    bounds = torch.iinfo(dtype)
    integers = torch.round(numbers / scale) + zero_point
    return (integers >= bounds.min) & (integers <= bounds.max)


@dataclass(frozen=True)
class Unpacked:
    """Packed parameters of a layer, in real numbers."""

    weight: Tensor
    bias: Tensor | None
    geometry: tuple[Any, ...] = ()  # of a convolution: stride, padding, dilation, transposed, output padding, groups


def unpacked(argument: Any) -> Any:
    """Return packed parameters, as a quantized layer's kernel is given, in real numbers, and anything else as it is."""
    if not hasattr(argument, "unpack"):
        return argument
    packed: Any = argument  # a class of TorchScript's
    weight, bias = packed.unpack()
    weight = weight.dequantize() if weight.is_quantized else weight.float()
    if not hasattr(packed, "stride"):
        return Unpacked(weight, bias)
    sizes = packed.stride(), packed.padding(), packed.dilation()
    return Unpacked(weight, bias, (*sizes, bool(packed.transpose()), packed.output_padding(), packed.groups()))


def _linear(x: Tensor, packed: Unpacked, *_: Any) -> Tensor:
    return F.linear(x, packed.weight, packed.bias)


def _scaled_product(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    product = (a * scale_a.to(a.dtype)) @ (b * scale_b.to(a.dtype))
    return product if bias is None else product + bias.to(a.dtype)


def _convolution(x: Tensor, packed: Unpacked, *_: Any) -> Tensor:
    weight = packed.weight
    flat = x.dim() == 3  # of which packed parameters make two dimensions, the first of one row
    if flat:
        x, weight = x.unsqueeze(2), weight if weight.dim() == 4 else weight.unsqueeze(2)
    found = torch.convolution(x, weight, packed.bias, *packed.geometry)
    return found.squeeze(2) if flat else found


def _clipped(x: Tensor, scale: Any, zero_point: Any, lowest: int, highest: int, *_: Any, **__: Any) -> Tensor:
    """Return the numbers that integers of one scale reach; what they round is the constant of reading them."""
    return x.clamp((lowest - zero_point) * scale, (highest - zero_point) * scale)


def _clipped_by_channel(
    x: Tensor, scales: Tensor, zero_points: Tensor, axis: int, lowest: int, highest: int, *_: Any, **__: Any
) -> Tensor:
    shape = [-1 if dim == axis % x.dim() else 1 for dim in range(x.dim())]
    return _clipped(x, scales.reshape(shape), zero_points.reshape(shape), lowest, highest)


def _batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float, *_: Any
) -> Tensor:
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)


def _then(after: Callable[[Tensor], Tensor], body: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: after(body(*args))


_DYNAMIC, _DIMENSIONS = ("", "_dynamic"), ("1d", "2d", "3d")

# Of these there are kernels that apply a ReLU, too.
_BEFORE_RELU: dict[str, Callable[..., Tensor]] = {
    "linear": _linear,
    **{f"conv{d}": _convolution for d in _DIMENSIONS},
    "conv2d_add": lambda x, other, packed, *_: _convolution(x, packed) + other,
    **{f"batch_norm{d}": _batch_norm for d in ("", *_DIMENSIONS)},
    **dict.fromkeys(("add", "add_scalar"), lambda a, b, *_: a + b),
    **dict.fromkeys(("mul", "mul_scalar"), lambda a, b, *_: a * b),
    "cat": lambda tensors, dim, *_: torch.cat(tensors, dim),
}

_BODIES: dict[str, Callable[..., Tensor]] = {
    **_BEFORE_RELU,
    **{f"{name}_relu": _then(torch.relu, body) for name, body in _BEFORE_RELU.items()},
    **dict.fromkeys(("linear_dynamic", "linear_dynamic_fp16"), _linear),
    **dict.fromkeys(("linear_relu_dynamic", "linear_relu_dynamic_fp16"), _then(torch.relu, _linear)),
    "linear_leaky_relu": lambda x, packed, scale, zero_point, slope: F.leaky_relu(_linear(x, packed), slope),
    "linear_tanh": _then(torch.tanh, _linear),
    **{f"conv{d}_dynamic": _convolution for d in _DIMENSIONS},
    **{f"conv_transpose{d}{how}": _convolution for d in _DIMENSIONS for how in _DYNAMIC},
    "matmul": lambda a, b, *_: a @ b,
    "relu6": lambda x, *_: F.relu6(x),
    "leaky_relu": lambda x, slope, *_: F.leaky_relu(x, slope),
    "prelu": lambda x, weight, *_: F.prelu(x, weight),
    "hardswish": lambda x, *_: F.hardswish(x),
    "elu": lambda x, scale, zero_point, *shape: torch.ops.aten.elu(x, *shape),
    "celu": lambda x, scale, zero_point, *shape: torch.ops.aten.celu(x, *shape),
    "sigmoid": lambda x, *_: x.sigmoid(),
    "softmax": lambda x, dim, *_: x.softmax(dim),
    "layer_norm": lambda x, shape, weight, bias, eps, *_: F.layer_norm(x, shape, weight, bias, eps),
    "group_norm": lambda x, groups, weight, bias, eps, *_: F.group_norm(x, groups, weight, bias, eps),
    "instance_norm": lambda x, weight, bias, eps, *_: F.instance_norm(x, weight=weight, bias=bias, eps=eps),
    "dropout": _same,
}

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
    "_scaled_mm": Rounded(_scaled_product),
    # of exported models: integers that are plain tensors
    "quantized_decomposed::quantize_per_tensor": Rounded(_clipped),
    "quantized_decomposed::quantize_per_channel": Rounded(_clipped_by_channel),
    **{f"quantized_decomposed::{name}": Rounded() for name in ("dequantize_per_tensor", "dequantize_per_channel")},
    **{f"quantized::{name}": Rounded(body) for name, body in _BODIES.items()},
}
