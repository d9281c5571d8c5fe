"""The table of rules: which rule each ATen operation has."""

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_scoremap.checks import nearest

from .activations import Breakpoints, Choice, Clamp, Gate, PiecewiseLinear, Power, PReLU
from .affine import AFFINE
from .attention import Attention
from .composite import COMPOSITE, gated_half
from .normalization import BatchNorm, GroupNorm, LayerNorm
from .pooling import Extremum, MaxPool, Ordered, Position, Scattered
from .products import Convolution, Division, Product, matrix_times, times
from .quantized import QUANTIZED, Rounded
from .rule import Comparison, Composite, Frozen, Rule
from .tangent import Backward, FirstLinear, Sample, Tangent
from .written_out import WRITTEN_OUT

__all__ = ["DEFAULT", "TANGENT", "display_name", "in_table", "with_rules"]

_COMPARISONS = "eq ne lt le gt ge"

_FROZEN = """
    equal allclose isclose isreal logical_and logical_or logical_not
    logical_xor all any bitwise_and bitwise_or bitwise_xor bitwise_not __and__ __or__ __xor__ argsort
    nonzero nonzero_static count_nonzero searchsorted bucketize _unique2 unique_dim unique_consecutive round
    floor ceil trunc floor_divide _local_scalar_dense is_nonzero one_hot histc empty_strided_like bernoulli isin
    multinomial poisson binomial _assert_async is_same_size is_pinned _has_same_storage_numel nms _use_cudnn_ctc_loss
    _use_miopen_ctc_loss
"""

# These read nothing of a tensor but its shape and type.
_UNREAD = """
    zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones new_empty new_full
    new_empty_strided _new_zeros_with_same_feature_meta zero bernoulli.p bernoulli.float uniform normal_functional
    normal.default random exponential geometric cauchy log_normal
"""


def _fixed(*breaks: tuple[Callable[..., Any], float], slopes: tuple[float, ...], offsets: tuple[float, ...]) -> Any:
    breakpoints = Breakpoints(breaks, slopes, offsets)
    return lambda *_, **__: breakpoints


def _leaky_relu(input: Any, negative_slope: float = 0.01) -> Breakpoints:
    return Breakpoints(((operator.gt, 0.0),), (negative_slope, 1.0), (0.0, 0.0))


def _rrelu(
    input: Any, noise: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, _: Any = None
) -> Breakpoints:
    if training:
        raise ValueError("rrelu must run with training=False, got training=True. Pass model.training in its place.")
    return _leaky_relu(input, (lower + upper) / 2)


def _hardtanh(input: Any, min_val: float = -1.0, max_val: float = 1.0) -> Breakpoints:
    return Breakpoints(((operator.gt, min_val), (operator.ge, max_val)), (0.0, 1.0, 0.0), (min_val, 0.0, max_val))


_SIXTH_IN_SINGLE_PRECISION = torch.tensor(1 / 6, dtype=torch.float32).item()


def _hardsigmoid(input: Any) -> Breakpoints:
    sixth = _SIXTH_IN_SINGLE_PRECISION if input.device.type == "cuda" else 1 / 6  # as the kernels multiply, in any type
    return Breakpoints(((operator.gt, -3.0), (operator.ge, 3.0)), (0.0, sixth, 0.0), (0.0, 3 * sixth, 6 * sixth))


def _threshold(input: Any, threshold: float, value: float) -> Breakpoints:
    return Breakpoints(((operator.gt, threshold),), (0.0, 1.0), (value, 0.0))


def _hardshrink(input: Any, lambd: float = 0.5) -> Breakpoints:
    if lambd < 0:  # nothing lies between
        return Breakpoints(((operator.gt, lambd),), (1.0, 1.0), (0.0, 0.0))
    return Breakpoints(((operator.ge, -lambd), (operator.gt, lambd)), (1.0, 0.0, 1.0), (0.0, 0.0, 0.0))


def _softshrink(input: Any, lambd: float = 0.5) -> Breakpoints:
    return Breakpoints(((operator.ge, -lambd), (operator.gt, lambd)), (1.0, 0.0, 1.0), (lambd, 0.0, -lambd))


def _clamp(input: Any, min: Any = None, max: Any = None) -> Breakpoints:
    if max is None:
        return Breakpoints(((operator.ge, min),), (0.0, 1.0), (min, 0.0))
    if min is None:
        return Breakpoints(((operator.gt, max),), (1.0, 0.0), (0.0, max))
    if min > max:  # all of it is at the upper one
        return Breakpoints(((operator.gt, max),), (0.0, 0.0), (max, max))
    return Breakpoints(((operator.ge, min), (operator.gt, max)), (0.0, 1.0, 0.0), (min, 0.0, max))


def _dirichlet_slopes(drawn: Tensor, concentration: Tensor) -> Tensor:
    total = concentration.sum(-1, keepdim=True).expand_as(concentration)
    return torch._dirichlet_grad(drawn, concentration, total)


def _elu_slope(input: Any, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> float:
    return alpha * scale * input_scale


_ATTENTION = dict.fromkeys(
    """
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention _scaled_dot_product_cudnn_attention
    _scaled_dot_product_efficient_attention _scaled_dot_product_fused_attention_overrideable
    """.split(),
    Attention(),
)
for _name, _rule in _ATTENTION.items():
    if hasattr(torch.ops.aten, _name):
        _kernel = getattr(torch.ops.aten, _name).default
        WRITTEN_OUT[_kernel] = _rule.written_out(_kernel)

_BATCH_NORMS = (
    "native_batch_norm",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "_native_batch_norm_legit_no_training",
)

_NONLINEAR: dict[str, Rule] = {
    # piecewise linear: the mask
    "relu": Clamp(_fixed((operator.gt, 0.0), slopes=(0.0, 1.0), offsets=(0.0, 0.0))),
    "relu6": Clamp(lambda input: _hardtanh(input, 0.0, 6.0)),
    "hardtanh": Clamp(_hardtanh),
    "leaky_relu": PiecewiseLinear(_leaky_relu),
    "_prelu_kernel": PReLU(),
    "rrelu_with_noise": PiecewiseLinear(_rrelu),
    "threshold": PiecewiseLinear(_threshold),
    "hardshrink": PiecewiseLinear(_hardshrink),
    "softshrink": PiecewiseLinear(_softshrink),
    "clamp": PiecewiseLinear(_clamp),
    "clip": PiecewiseLinear(_clamp),
    "clamp_min": PiecewiseLinear(lambda input, min: _clamp(input, min)),
    "clamp_max": PiecewiseLinear(lambda input, max: _clamp(input, None, max)),
    "abs": PiecewiseLinear(
        _fixed((operator.ge, 0.0), (operator.gt, 0.0), slopes=(-1.0, 0.0, 1.0), offsets=(0.0, 0.0, 0.0))
    ),
    # maxima: the switch
    "max_pool2d_with_indices": MaxPool(2),
    "max_pool3d_with_indices": MaxPool(3),
    "adaptive_max_pool2d": MaxPool(2, adaptive=True),
    "adaptive_max_pool3d": MaxPool(3, adaptive=True),
    **dict.fromkeys(("max", "amax"), Extremum(torch.argmax)),
    **dict.fromkeys(("min", "amin"), Extremum(torch.argmin)),
    **dict.fromkeys(("maximum", "fmax"), Choice(operator.ge)),
    **dict.fromkeys(("minimum", "fmin"), Choice(operator.le)),
    **dict.fromkeys("sort topk median.dim nanmedian.dim kthvalue mode cummax cummin".split(), Ordered()),
    # f(0) = 0: the gate f(x)/x
    **dict.fromkeys("gelu silu hardswish".split(), Gate(0.5)),
    **dict.fromkeys("tanh celu sin atan asinh sinh expm1 log1p".split(), Gate(1.0)),
    "mish": Gate(0.6),
    "elu": Gate(_elu_slope),
    "erf": Gate(1.1283791670955126),
    "glu": Composite(gated_half),
    "pow": Power(),
    "pow.Scalar": Tangent(gate=True),
    # gates and weights: a constant factor in a product, the tangent anywhere else
    **dict.fromkeys(
        """
        sigmoid _softmax _safe_softmax exp exp2 rsqrt sqrt reciprocal norm linalg_vector_norm var std
        """.split(),
        Tangent(gate=True),
    ),
    "hardsigmoid": PiecewiseLinear(_hardsigmoid, gate=True),
    # scales
    "native_layer_norm": LayerNorm(),
    "native_group_norm": GroupNorm(),
    **dict.fromkeys(_BATCH_NORMS, BatchNorm()),
    # no gates and f(0) != 0: the tangent with its offset
    **dict.fromkeys(
        """
        softplus log_sigmoid_forward _log_softmax logsumexp log log2 log10 cos cosh erfc erfinv tan asin acos acosh
        atanh prod cumprod _cdist_forward _pdist_forward median var_mean std_mean logit sinc logaddexp logaddexp2
        atan2 hypot xlogy special_xlog1py lgamma digamma linalg_inv_ex linalg_det _linalg_det _linalg_slogdet
        linalg_solve_triangular _linalg_solve_ex linalg_qr linalg_cholesky_ex _linalg_eigh _linalg_svd
        angle logcumsumexp renorm i0 special_i0e _euclidean_dist roi_pool ps_roi_pool
        _weight_norm_interface mse_loss smooth_l1_loss huber_loss binary_cross_entropy
        binary_cross_entropy_with_logits _ctc_loss polar linalg_pinv linalg_lstsq
        linalg_householder_product cholesky_solve cholesky_inverse linalg_lu_factor_ex linalg_lu linalg_lu_solve
        fractional_max_pool2d fractional_max_pool3d frac fmod remainder copysign dist nanmedian polygamma mvlgamma
        special_entr special_erfcx special_i1 special_i1e special_log_ndtr special_ndtri
        soft_margin_loss multi_margin_loss multilabel_margin_loss_forward lu_unpack ormqr
        triangular_solve
        """.split(),
        Tangent(),
    ),
    # several values into one place
    **dict.fromkeys(("scatter_reduce", "index_reduce", "segment_reduce"), Scattered()),
    # products
    "mul": Product((0, 1), times, keeps_gates=True),
    **dict.fromkeys(("mm", "bmm"), Product((0, 1), matrix_times)),
    **dict.fromkeys(("addmm", "_sparse_addmm", "baddbmm"), Product((1, 2), matrix_times, term=0)),
    **dict.fromkeys(("mv", "dot", "vdot", "linalg_cross"), Product()),
    **dict.fromkeys(("addmv", "addbmm", "addr"), Product((1, 2), term=0)),
    **dict.fromkeys(("linear", "mkldnn_linear"), Product(term=2)),
    "_trilinear": Product((0, 1, 2)),
    **dict.fromkeys(("convolution", "convolution_overrideable"), Convolution()),
    "div": Division(),
    # attention
    **_ATTENTION,
    **COMPOSITE,
}


_MASKED_BACKWARD = """
    threshold_backward hardtanh_backward hardsigmoid_backward leaky_relu_backward hardshrink_backward
    softshrink_backward max_pool2d_with_indices_backward max_pool3d_with_indices_backward adaptive_max_pool2d_backward
    adaptive_max_pool3d_backward
"""

_BACKWARD = """
    sigmoid_backward tanh_backward gelu_backward silu_backward mish_backward
    hardswish_backward elu_backward softplus_backward _softmax_backward_data
    _log_softmax_backward_data log_sigmoid_backward native_layer_norm_backward native_batch_norm_backward
    native_group_norm_backward convolution_backward glu_backward
    _adaptive_avg_pool2d_backward avg_pool2d_backward upsample_bilinear2d_backward upsample_nearest2d_backward
    upsample_bicubic2d_backward reflection_pad2d_backward replication_pad2d_backward
    _prelu_kernel_backward nll_loss_backward nll_loss2d_backward
    mse_loss_backward smooth_l1_loss_backward huber_loss_backward binary_cross_entropy_backward
    soft_margin_loss_backward avg_pool3d_backward _adaptive_avg_pool3d_backward
    reflection_pad1d_backward reflection_pad3d_backward replication_pad1d_backward
    replication_pad3d_backward upsample_linear1d_backward upsample_trilinear3d_backward upsample_nearest1d_backward
    upsample_nearest3d_backward _upsample_bilinear2d_aa_backward _upsample_bicubic2d_aa_backward
    _upsample_nearest_exact1d_backward _upsample_nearest_exact2d_backward _upsample_nearest_exact3d_backward
"""

_GRID_SAMPLERS = ("grid_sampler_2d", "grid_sampler_3d", "cudnn_grid_sampler", "_grid_sampler_2d_cpu_fallback")

_LINEAR: dict[str, Rule] = {
    **AFFINE,
    **dict.fromkeys((*_GRID_SAMPLERS, "roi_align", "ps_roi_align", "deform_conv2d"), FirstLinear()),
    **dict.fromkeys(_BACKWARD.split(), Backward()),
    **dict.fromkeys(_MASKED_BACKWARD.split(), Backward(masks=True)),
    "_standard_gamma": Sample(lambda drawn, shape: torch._standard_gamma_grad(shape, drawn)),
    "_sample_dirichlet": Sample(_dirichlet_slopes, sums_to_one=True),
    "nextafter": Rounded(),  # its first argument, but for one rounding
}

_CONSTANT: dict[str, Rule] = {
    **{name: Frozen() for name in _FROZEN.split()},
    **{name: Frozen(reads=False) for name in _UNREAD.split()},
    **{name: Comparison() for name in _COMPARISONS.split()},
    **{name: Comparison(0.0) for name in ("sign", "signbit")},
    **{name: Comparison(math.inf) for name in "isfinite isinf isnan isneginf isposinf".split()},  # at no finite step
    **{name: Position() for name in ("argmax", "argmin")},
}

DEFAULT: Mapping[str, Rule] = {**_NONLINEAR, **_LINEAR, **_CONSTANT, **QUANTIZED}

TANGENT: Mapping[str, Rule] = {
    name: rule
    if name in COMPOSITE or isinstance(rule, (PiecewiseLinear, MaxPool, Extremum, Choice, Ordered))
    else Tangent()
    for name, rule in _NONLINEAR.items()
} | {
    **dict.fromkeys((*_GRID_SAMPLERS, "deform_conv2d"), FirstLinear(follows=True)),
    **dict.fromkeys(_BACKWARD.split(), Backward(follows=True)),
}

# Kernels by the name under which users know them, which errors and reports use.
_KERNELS: Mapping[str, tuple[str, ...]] = {
    "softmax": ("_softmax", "_safe_softmax"),
    "prelu": ("_prelu_kernel",),
    "logsigmoid": ("log_sigmoid_forward",),
    "rrelu": ("rrelu_with_noise",),
    "cdist": ("_cdist_forward", "_euclidean_dist"),
    "bilinear": ("_trilinear",),
    "item": ("_local_scalar_dense",),
    "scaled_dot_product_attention": tuple(_ATTENTION),
    "lstm": ("mkldnn_rnn_layer", "_cudnn_rnn"),
    "lstm_cell": ("_thnn_fused_lstm_cell",),
    "gru_cell": ("_thnn_fused_gru_cell",),
    "rms_norm": ("_fused_rms_norm",),
    "conv": ("convolution",),
    "grid_sample": _GRID_SAMPLERS,
}

# What else PyTorch's Python functions become, where the name changes.
_ATEN_NAMES: Mapping[str, tuple[str, ...]] = {
    **_KERNELS,
    "softmin": ("_softmax",),
    "batch_norm": _BATCH_NORMS,
    "instance_norm": _BATCH_NORMS,
    **{f"conv{d}d": ("convolution",) for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": ("convolution",) for d in (1, 2, 3)},
    "linear": ("addmm", "mm", "linear"),
    "matmul": ("mm", "bmm", "mv", "dot", "addmm", "baddbmm"),
    "einsum": ("bmm", "mul"),
    "max_pool1d": ("max_pool2d_with_indices",),
    "adaptive_max_pool1d": ("adaptive_max_pool2d",),
    "relu6": ("hardtanh",),
    "selu": ("elu",),
    "square": ("pow",),
    "absolute": ("abs",),
    "expit": ("sigmoid",),
    "arctan": ("atan",),
    "arctan2": ("atan2",),
    **dict.fromkeys(("divide", "true_divide", "truediv", "cosine_similarity", "normalize"), ("div",)),
    "multiply": ("mul",),
    "subtract": ("sub",),
    "negative": ("neg",),
    "getitem": ("index", "select", "slice"),
    "setitem": ("copy", "index_put", "fill"),
    "linalg_norm": ("linalg_vector_norm",),
    "interpolate": ("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"),
    **dict.fromkeys(("gru", "rnn_relu", "rnn_tanh"), ("_cudnn_rnn",)),
    **dict.fromkeys(("concat", "concatenate"), ("cat",)),
}

_DISPLAY = {kernel: name for name, kernels in _KERNELS.items() for kernel in kernels} | {"_cudnn_rnn": "rnn"}


@functools.cache
def display_name(operation: Any) -> str:
    """Return the name of an ATen operation as users know it.

    Args:
        operation: A ``torch.ops`` overload, or its name.

    Returns:
        Its name, without what tells kernels apart.

    Example:
        >>> display_name(torch.ops.aten.max_pool2d_with_indices.default), display_name(torch.ops.aten.relu.default)
        ('max_pool2d', 'relu')
    """
    name: str = operation if isinstance(operation, str) else operation.overloadpacket.__name__
    if name.startswith("_scaled_dot_product") and not name.endswith("_backward"):
        return "scaled_dot_product_attention"
    return _DISPLAY.get(name, name.removeprefix("native_").removesuffix("_with_indices").removeprefix("_"))


def with_rules(rules: Mapping[Any, Rule] | None) -> Mapping[str, Rule]:
    """Return the default table with some rules replaced or added.

    Args:
        rules: Operation to its rule; None for no change. An operation is an ATen overload or packet
            (``torch.ops.aten.gelu``), its name, a Python function of PyTorch's, or that function's name; a function
            that PyTorch makes of several operations stands for those.

    Returns:
        The whole table, by name of the ATen operation.

    Raises:
        TypeError: If ``rules`` is no mapping of operations to rules; modules and their classes are none.
        ValueError: If there is no operation of a name.

    Example:
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
        for name in _aten_names(operation):
            table[name] = rule
    return table


def _aten_names(operation: Any) -> tuple[str, ...]:
    """Return the names in the table that a key of ``rules`` stands for."""
    operation = getattr(operation, "_opoverload", operation)  # of ``torch.library.custom_op``
    if isinstance(operation, torch._ops.OpOverload):
        name = in_table(operation.namespace, operation.overloadpacket.__name__)
        return (_plain(f"{name}.{operation._overloadname}"),)
    if isinstance(operation, (type, nn.Module)) or not (isinstance(operation, str) or callable(operation)):
        raise _no_operation(operation, TypeError)
    name = operation if isinstance(operation, str) else getattr(operation, "__name__", type(operation).__name__)
    namespace, _, name = name.rpartition("::")
    if isinstance(operation, torch._ops.OpOverloadPacket):
        namespace = operation._qualified_op_name.partition("::")[0]
    if namespace:
        full = in_table(namespace, name)
        # be its library there or not
        is_own = full in DEFAULT and (full != name or (namespace in _KNOWN and not hasattr(torch.ops.aten, name)))
        if not is_own and _first_known((f"{namespace}::{name}",)) is None:
            raise _no_operation(operation, ValueError if isinstance(operation, str) else TypeError)
        if full != name:
            return (_plain(full),)
    if name.startswith("__i") and name.endswith("__"):
        name = "__" + name[3:]
    if name in DEFAULT:  # and may arrive as other operations, too
        return tuple({name: None, **dict.fromkeys(_ATEN_NAMES.get(name, ()))})
    if "." in name and _first_known((name,)):
        return (_plain(name),)
    plain = name.strip("_").removeprefix("fft_")
    forms = (plain, f"_{plain}", f"native_{plain}", f"{plain}_with_indices", f"linalg_{plain}")
    found = _ATEN_NAMES.get(plain) or next(((form,) for form in forms if form in DEFAULT), None)
    if found is None:
        known = _first_known((_plain(name), *forms))  # of which there is no rule yet
        if known is None:
            raise _no_operation(operation, ValueError if isinstance(operation, str) else TypeError)
        found = (known,)
    return found


def _plain(name: str) -> str:
    """Return the name of the form that neither works in place nor is given ``out=``; the default overload has none."""
    name, _, overload = name.partition(".")
    overload = overload.removesuffix("out").removesuffix("_").removesuffix("default")
    plain = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    return f"{plain}.{overload}" if overload else plain


# Libraries whose operations the table is about.
_KNOWN = {"aten", "torchvision"}


def in_table(namespace: str, name: str) -> str:
    """Return the name of an operation in the table of rules.

    It is without the namespace, but for quantized operations, and those of other libraries that go by a name of the
    table's: what they do is another thing.

    Example:
        >>> in_table("aten", "add"), in_table("mine", "add"), in_table("mine", "merge")
        ('add', 'mine::add', 'merge')
    """
    is_taken = display_name(_plain(name).partition(".")[0]) in _TAKEN
    is_other = namespace.startswith("quantized") or (namespace not in _KNOWN and is_taken)
    return f"{namespace}::{name}" if is_other else name


_TAKEN = {name.partition(".")[0] for name in DEFAULT if "::" not in name} | {*map(display_name, DEFAULT), *_ATEN_NAMES}
_TAKEN -= {"convert_element_type"}  # of torch.ops.prims alone


_OPERATIONS: set[str] = set()  # names of all operations there are, as far as they were asked for


def _first_known(names: Sequence[str]) -> str | None:
    """Return the first of some names that is one of an operation, in any namespace."""
    if _OPERATIONS.isdisjoint(names):  # libraries may have added some since
        for one in torch._C._dispatch_get_all_op_names():
            name, _, overload = one.rpartition("::")[2].partition(".")
            full, exact = one.partition(".")[0], f"{name}.{overload or 'default'}"
            namespace = full.removesuffix(name)
            _OPERATIONS.update((name, _plain(name), display_name(name), exact, full, f"{namespace}{exact}"))
    return next((name for name in names if name in _OPERATIONS), None)


def _no_operation(operation: Any, kind: type[Exception]) -> Exception:
    """Return the error that says that a key of ``rules`` stands for no operation."""
    got, name = repr(operation), operation if isinstance(operation, str) else None
    if isinstance(operation, type):
        got, name = f"the class {operation.__name__}", operation.__name__
    elif isinstance(operation, nn.Module):
        got, name = f"a module ({type(operation).__name__})", type(operation).__name__
    elif callable(operation):
        name = getattr(operation, "__name__", type(operation).__name__)
        got = f"the function {name}"
    known = {*map(display_name, DEFAULT), *_ATEN_NAMES}
    hint = "" if name is None else nearest(name.lower().rpartition("::")[2], sorted(known))
    return kind(
        f"rules must name operations, such as 'relu', torch.relu or torch.ops.aten.relu, got {got}, which is none."
        + hint
    )
