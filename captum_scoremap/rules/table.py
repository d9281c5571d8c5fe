"""The table: which operation has which rule."""

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .activations import Breaks, Clamp, Gate, Pieces, Select, SignPieces
from .attention import MultiHeadAttention, ScaledDotProductAttention
from .normalization import (
    BatchNorm,
    InstanceNorm,
    ScaleOnly,
    Standardize,
    group_norm_grouping,
    layer_norm_grouping,
    local_response_norm,
    normalize,
    rms_norm,
)
from .pooling import Extremum, MaxPool
from .products import Convolution, Division, Power, Product
from .rule import Comparison, Composite, EvaluationOnly, FirstOnly, Frozen, Identity, Linear, Rule, Tangent

__all__ = ["DEFAULT", "METADATA", "TANGENT", "operation_name", "with_rules"]

# What asks about a tensor, or makes a new one that does not depend on its values.
METADATA = frozenset(
    """
    backward_hooks base is_view version data_ptr device dense_dim dim dim_order dtype element_size empty_like full_like
    get_device grad grad_fn has_names is_complex is_contiguous is_conj is_cpu is_cuda is_floating_point is_inference
    is_leaf is_meta is_mkldnn is_mps is_neg is_nested is_pinned is_quantized is_signed is_sparse is_tensor is_xla is_xpu
    is_same_size itemsize layout len name names nbytes ndim ndimension nelement new_empty new_full new_ones new_tensor
    new_zeros numel ones_like output_nr rand_like randn_like repr requires_grad result_type retain_grad retains_grad
    shape size storage_offset stride str untyped_storage volatile zeros_like can_cast cdata dir format hash is_set_to
    post_accumulate_grad_hooks register_hook reversed
    """.split()
)

# Views, copies and casts, which also keep gates; all affine.
_STRUCTURAL = """
    add sub rsub radd neg negative positive view reshape view_as reshape_as flatten unflatten permute transpose
    swapaxes swapdims movedim moveaxis t T mT H mH adjoint squeeze unsqueeze expand expand_as broadcast_to
    broadcast_tensors repeat tile repeat_interleave contiguous clone to float double half bfloat16 type type_as cpu
    cuda chunk split tensor_split unsafe_chunk unsafe_split split_with_sizes hsplit vsplit dsplit unbind select
    narrow getitem index index_select gather take take_along_dim masked_select roll flip fliplr flipud rot90
    diagonal diag as_strided unfold pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle stack cat
    concat concatenate hstack vstack dstack pad constant_pad_nd interpolate upsample where masked_fill atleast_1d
    atleast_2d atleast_3d ravel squeeze_copy view_copy real imag view_as_real view_as_complex conj resolve_conj
    resolve_neg block_diag meshgrid
"""

_DROPOUT = "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout"

_AFFINE = """
    mean sum nansum avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    cumsum diff trapezoid fold max_unpool1d max_unpool2d max_unpool3d affine_grid setitem index_add index_copy
    index_fill index_put scatter scatter_add slice_scatter select_scatter diagonal_scatter masked_scatter copy fill
    zero tril triu trace embedding fft ifft rfft irfft hfft fft2 ifft2 rfft2 irfft2 fftn ifftn rfftn irfftn fftshift
    ifftshift
"""

_COMPARISONS = "eq ne lt le gt ge not_equal less less_equal greater greater_equal"

_FROZEN = """
    equal allclose isclose isfinite isinf isnan isneginf isposinf isreal logical_and logical_or logical_not
    logical_xor all any and or xor invert bitwise_and bitwise_or bitwise_xor bitwise_not argmax argmin argsort
    nonzero count_nonzero searchsorted bucketize bincount unique round floor ceil trunc fix floor_divide floordiv
    bool int long short byte item is_nonzero one_hot histc
"""


def _fixed(*breaks: tuple[Callable[..., Any], float], slopes: tuple[float, ...], offsets: tuple[float, ...]) -> Any:
    return lambda *_, **__: Breaks(breaks, slopes, offsets)


def _leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Breaks:
    return Breaks(((operator.gt, 0.0),), (negative_slope, 1.0), (0.0, 0.0))


def _prelu(input: Tensor, weight: Tensor) -> Breaks:
    slope = weight.reshape(-1, *[1] * (input.dim() - 2)) if weight.numel() > 1 else weight.reshape(())
    return Breaks(((operator.gt, 0.0),), (slope, 1.0), (0.0, 0.0))


def _rrelu(
    input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
) -> Breaks:
    return _leaky_relu(input, (lower + upper) / 2)


def _hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Breaks:
    return Breaks(((operator.gt, min_val), (operator.ge, max_val)), (0.0, 1.0, 0.0), (min_val, 0.0, max_val))


def _threshold(input: Tensor, threshold: float, value: float, inplace: bool = False) -> Breaks:
    return Breaks(((operator.gt, threshold),), (0.0, 1.0), (value, 0.0))


def _hardshrink(input: Tensor, lambd: float = 0.5) -> Breaks:
    return Breaks(((operator.ge, -lambd), (operator.gt, lambd)), (1.0, 0.0, 1.0), (0.0, 0.0, 0.0))


def _softshrink(input: Tensor, lambd: float = 0.5) -> Breaks:
    return Breaks(((operator.ge, -lambd), (operator.gt, lambd)), (1.0, 0.0, 1.0), (lambd, 0.0, -lambd))


def _clamp(input: Tensor, min: Any = None, max: Any = None) -> Breaks:
    if max is None:
        return Breaks(((operator.ge, min),), (0.0, 1.0), (min, 0.0))
    if min is None:
        return Breaks(((operator.gt, max),), (1.0, 0.0), (0.0, max))
    return Breaks(((operator.ge, min), (operator.gt, max)), (0.0, 1.0, 0.0), (min, 0.0, max))


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    first, second = input.chunk(2, dim)
    return first * torch.sigmoid(second)


def _softsign(input: Tensor) -> Any:
    return input / (1 + input.abs())


def _tanhshrink(input: Tensor) -> Tensor:
    return input - input.tanh()


def _square(input: Tensor) -> Tensor:
    return input * input


def _lerp(input: Tensor, end: Tensor, weight: Tensor | float) -> Tensor:
    return input + weight * (end - input)


def _addcmul(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    return input + value * (tensor1 * tensor2)


def _addcdiv(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    return input + value * (tensor1 / tensor2)


def _cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Any:
    first = x1 / torch.linalg.vector_norm(x1, 2, dim, keepdim=True).clamp_min(eps)
    second = x2 / torch.linalg.vector_norm(x2, 2, dim, keepdim=True).clamp_min(eps)
    return (first * second).sum(dim)


_NONLINEAR: dict[str, Rule] = {
    # piecewise linear: the mask
    "relu": Clamp(_fixed((operator.gt, 0.0), slopes=(0.0, 1.0), offsets=(0.0, 0.0))),
    "relu6": Clamp(lambda input, inplace=False: _hardtanh(input, 0.0, 6.0)),
    "leaky_relu": Pieces(_leaky_relu),
    "prelu": Pieces(_prelu),
    "rrelu": Pieces(_rrelu),
    "hardtanh": Clamp(_hardtanh),
    "threshold": Pieces(_threshold),
    "hardshrink": Pieces(_hardshrink),
    "softshrink": Pieces(_softshrink),
    "clamp": Pieces(_clamp, native=False),
    "clip": Pieces(_clamp, native=False),
    "clamp_min": Pieces(lambda input, min: _clamp(input, min), native=False),
    "clamp_max": Pieces(lambda input, max: _clamp(input, None, max), native=False),
    "abs": SignPieces(),
    "absolute": SignPieces(),
    # maxima: the switch
    **{f"max_pool{d}d": MaxPool(d) for d in (1, 2, 3)},
    **{f"max_pool{d}d_with_indices": MaxPool(d, returns_switches=True) for d in (1, 2, 3)},
    **{f"adaptive_max_pool{d}d": MaxPool(d, adaptive=True) for d in (1, 2, 3)},
    **{f"adaptive_max_pool{d}d_with_indices": MaxPool(d, adaptive=True, returns_switches=True) for d in (1, 2, 3)},
    "max": Extremum(torch.argmax, with_position=True),
    "min": Extremum(torch.argmin, with_position=True),
    "amax": Extremum(torch.argmax, with_position=False),
    "amin": Extremum(torch.argmin, with_position=False),
    "maximum": Select(operator.ge),
    "minimum": Select(operator.le),
    "fmax": Select(operator.ge),
    "fmin": Select(operator.le),
    # f(0) = 0: the gate f(x)/x
    "gelu": Gate(0.5),
    "silu": Gate(0.5),
    "mish": Gate(0.6),
    "hardswish": Gate(0.5),
    "tanh": Gate(1.0),
    "elu": Gate(1.0),
    "selu": Gate(1.0507009873554805 * 1.6732632423543772),
    "celu": Gate(1.0),
    "erf": Gate(1.1283791670955126),
    "sin": Gate(1.0),
    "arctan": Gate(1.0),
    "atan": Gate(1.0),
    "asinh": Gate(1.0),
    "sinh": Gate(1.0),
    "expm1": Gate(1.0),
    "log1p": Gate(1.0),
    "pow": Power(),
    "square": Composite(_square),
    "softsign": Composite(_softsign),
    "tanhshrink": Composite(_tanhshrink),
    # gates and weights: a constant factor in a product, the tangent anywhere else
    "sigmoid": Tangent(gate=True),
    "expit": Tangent(gate=True),
    "hardsigmoid": Pieces(
        _fixed((operator.gt, -3.0), (operator.ge, 3.0), slopes=(0.0, 1 / 6, 0.0), offsets=(0.0, 0.5, 1.0)),
        gate=True,
    ),
    "softmax": Tangent(gate=True),
    "softmin": Tangent(gate=True),
    "exp": Tangent(gate=True),
    "exp2": Tangent(gate=True),
    "glu": Composite(_glu),
    # scales
    "layer_norm": Standardize(layer_norm_grouping),
    "group_norm": Standardize(group_norm_grouping),
    "instance_norm": InstanceNorm(),
    "rms_norm": ScaleOnly(rms_norm),
    "normalize": ScaleOnly(normalize),
    "local_response_norm": ScaleOnly(local_response_norm),
    "rsqrt": Tangent(gate=True),
    "sqrt": Tangent(gate=True),
    "reciprocal": Tangent(gate=True),
    "norm": Tangent(gate=True),
    "vector_norm": Tangent(gate=True),
    "linalg_norm": Tangent(gate=True),
    "linalg_vector_norm": Tangent(gate=True),
    "var": Tangent(gate=True),
    "std": Tangent(gate=True),
    "var_mean": Tangent(),
    "std_mean": Tangent(),
    # no gates and f(0) != 0: the tangent with its offset
    "softplus": Tangent(),
    "logsigmoid": Tangent(),
    "log_sigmoid": Tangent(),
    "log_softmax": Tangent(),
    "logsumexp": Tangent(),
    "log": Tangent(),
    "log2": Tangent(),
    "log10": Tangent(),
    "cos": Tangent(),
    "cosh": Tangent(),
    "erfc": Tangent(),
    "prod": Tangent(),
    "cumprod": Tangent(),
    "lp_pool1d": Tangent(),
    "lp_pool2d": Tangent(),
    "lp_pool3d": Tangent(),
    "cdist": Tangent(),
    "median": Tangent(),
    "topk": Tangent(),
    "sort": Tangent(),
    "nan_to_num": Linear(),
    # products
    "mul": Product(keeps_gates=True),
    "multiply": Product(keeps_gates=True),
    "rmul": Product(keeps_gates=True),
    "matmul": Product(),
    "rmatmul": Product(),
    "mm": Product(names=("input", "mat2")),
    "bmm": Product(names=("input", "mat2")),
    "mv": Product(names=("input", "vec")),
    "dot": Product(names=("input", "tensor")),
    "inner": Product(),
    "outer": Product(names=("input", "vec2")),
    "tensordot": Product(names=("a", "b")),
    "einsum": Product(None, ()),
    "addmm": Product((1, 2), ("mat1", "mat2")),
    "addbmm": Product((1, 2), ("batch1", "batch2")),
    "baddbmm": Product((1, 2), ("batch1", "batch2")),
    "linear": Product((0, 1), ("input", "weight")),
    "bilinear": Product((0, 1, 2), ("input1", "input2", "weight")),
    **{f"conv{d}d": Convolution(d) for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": Convolution(d) for d in (1, 2, 3)},
    "kron": Product(),
    "lerp": Composite(_lerp),
    "addcmul": Composite(_addcmul),
    "addcdiv": Composite(_addcdiv),
    "cosine_similarity": Composite(_cosine_similarity),
    "div": Division(),
    "divide": Division(),
    "true_divide": Division(),
    "truediv": Division(),
    "rdiv": Division(reversed=True),
    "rtruediv": Division(reversed=True),
    "scaled_dot_product_attention": ScaledDotProductAttention(),
    "multi_head_attention_forward": MultiHeadAttention(),
}

_LINEAR: dict[str, Rule] = {
    **{name: Linear(keeps_gates=True) for name in _STRUCTURAL.split()},
    **{name: Linear() for name in _AFFINE.split()},
    **{name: Identity() for name in ("detach", "data")},
    "grid_sample": FirstOnly(),
    "batch_norm": BatchNorm(),
    **{name: EvaluationOnly(training=2, keeps_gates=True) for name in _DROPOUT.split()},
}
_CONSTANT: dict[str, Rule] = {
    **{name: Frozen() for name in _FROZEN.split()},
    **{name: Comparison() for name in _COMPARISONS.split()},
    **{name: Comparison(0.0) for name in ("sign", "sgn", "signbit")},
}

DEFAULT: Mapping[str, Rule] = {**_NONLINEAR, **_LINEAR, **_CONSTANT}

TANGENT: Mapping[str, Rule] = {
    name: rule if isinstance(rule, (Pieces, MaxPool, Extremum, Select)) else Tangent()
    for name, rule in _NONLINEAR.items()
}


def operation_name(
    function: Callable[..., Any], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> str:
    """The name under which the table knows an operation.

    Args:
        function: What the model called.
        args: Its arguments: ``max`` of two tensors is another operation than ``max`` of one.
        kwargs: Its keyword arguments.

    Returns:
        The name.

    Example:
        >>> import torch
        >>> operation_name(torch.Tensor.relu_), operation_name(torch.Tensor.__iadd__)
        ('relu', 'add')
    """
    name = _plain_name(function)
    if name in {"max", "min"} and isinstance(args[1] if len(args) > 1 else (kwargs or {}).get("other"), Tensor):
        return f"{name}imum"
    return name


@functools.cache
def _plain_name(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", type(function).__name__)
    if name in {"__get__", "__set__", "__delete__"}:
        name = getattr(function, "__self__").__name__  # noqa: B009 - method wrappers have it, their type does not say so
    if name in {"__bool__", "__int__", "__index__", "__float__", "__complex__"}:
        return "item"
    name = name.removeprefix("aten::").removeprefix("fft_").split(".")[0]
    if name.startswith("__i") and name.endswith("__") and name not in {"__invert__", "__int__", "__index__"}:
        name = "__" + name[3:]
    return name if name in {"T", "H"} else name.strip("_")


def with_rules(rules: Mapping[Any, Rule] | None) -> Mapping[str, Rule]:
    """The default table with some rules replaced or added.

    Args:
        rules: Operation, by name or as the function itself, to its rule; None for no change.

    Returns:
        The whole table.

    Raises:
        TypeError: If ``rules`` is no mapping of operations to rules.

    Example:
        >>> import torch
        >>> with_rules({torch.sin: TANGENT["sin"]})["sin"] is TANGENT["sin"]
        True
    """
    if rules is None:
        return DEFAULT
    if not isinstance(rules, Mapping):
        raise TypeError(f"rules must be a mapping of operations to rules, got {type(rules).__name__}.")
    table = dict(DEFAULT)
    for operation, rule in rules.items():
        if not isinstance(rule, Rule):
            raise TypeError(
                f"rules[{operation!r}] must be a Rule, got {type(rule).__name__}. Derive a class from Rule."
            )
        table[operation if isinstance(operation, str) else operation_name(operation)] = rule
    return table
