"""What the operations of PyTorch do to the last row that elements can depend on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from captum_scoremap.receptive_fields.reach import (
    NOTHING,
    POINTWISE,
    RULES,
    VIEW,
    EndlessReach,
    NoRuleError,
    Operation,
    Reach,
    Rule,
)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a function as the rule of operations, whose names are separated by spaces."""

    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(" ".join(names).split(), function))
        return function

    return enter


@rule(
    VIEW,
    "_unsafe_view _upsample_nearest_exact2d channel_shuffle flip gather index index_select",
    "native_channel_shuffle pixel_shuffle pixel_unshuffle repeat roll upsample_nearest1d",
    "upsample_nearest2d",
)
def move(op: Operation) -> Any:
    """Views and copies: the elements are the same, elsewhere."""

    def reach(value: Any) -> Any:
        return value.reach if isinstance(value, Reach) else value

    return op.func(*tree_map(reach, op.args), **tree_map(reach, op.kwargs))


@rule("as_strided")
def restride(op: Operation) -> Any:
    """``as_strided``: in place it serves global pooling to keep channels last in memory, and moves no element."""
    if not op.in_place:
        return move(op)
    if tuple(op["size"]) != tuple(op["self"].shape):
        raise NoRuleError("as_strided_")
    return op["self"]


@rule("cat stack")
def join(op: Operation) -> Tensor:
    """``cat`` and ``stack``: as `move`, with constants among the parts."""
    parts = [
        part.reach if isinstance(part, Reach) else torch.full(part.shape, NOTHING, device=part.device)
        for part in op["tensors"]
    ]
    joined: Tensor = op.func(parts, op.get("dim", 0))
    return joined


@rule(
    "bernoulli empty_like fill full_like new_empty new_full new_ones new_zeros ones_like rand_like",
    "randn_like zero zeros_like",
)
def constant(op: Operation) -> Tensor:
    """Depends on the shape of its argument only, or on chance."""
    return torch.full(op.shape, NOTHING, device=op["self"].device)


@rule("copy")
def copy(op: Operation) -> Tensor:
    """``copy_``: the new elements, whatever the old ones were."""
    source = op.given["src"]
    return source.reach if isinstance(source, Reach) else torch.tensor(NOTHING)


@rule(
    POINTWISE,
    "_prelu_kernel _to_copy hardswish log_sigmoid_forward native_dropout",
    # pointwise too, but not yet tagged so in PyTorch 2.5
    "celu elu hardshrink hardsigmoid hardtanh isfinite ldexp leaky_relu mish rad2deg relu6 selu softplus softshrink",
    "threshold",
)
def maximum(op: Operation) -> Tensor:
    """Element by element, with broadcasting."""
    tensors = [leaf for leaf in tree_leaves((op.args, op.kwargs)) if isinstance(leaf, Tensor)]
    reach = reduce(torch.maximum, [tensor.reach for tensor in tensors if isinstance(tensor, Reach)])
    return reach.expand(torch.broadcast_shapes(*[tensor.shape for tensor in tensors])).clone()


@rule(
    "_log_softmax _safe_softmax _softmax amax amin argmax argmin linalg_vector_norm logsumexp max",
    "mean median min norm prod sort std std_mean sum topk var var_mean",
)
def along(op: Operation) -> Tensor:
    """Every element depends on all elements along ``dim`` (all axes, if left out): sums, softmax, sorting."""
    reach: Tensor = op["self"]
    reach = reach.amax(op.get("dim", tuple(range(reach.ndim))), keepdim=True)
    return reach.expand(op.shape) if len(op.shape) == reach.ndim else reach.reshape(op.shape)


@rule("glu")
def halves(op: Operation) -> Tensor:
    """``glu``: one half of the channels gates the other."""
    return torch.maximum(*op["self"].chunk(2, op.get("dim", -1)))


@rule("addmm baddbmm bmm mm")
def product(op: Operation) -> Tensor:
    """``mm`` and its like: an element depends on a row of the first matrix and a column of the second."""
    *added, first, second = op.args
    reaches = [tensor.reach for tensor in added if isinstance(tensor, Reach)]
    reaches += [first.reach.amax(-1, keepdim=True)] if isinstance(first, Reach) else []
    reaches += [second.reach.amax(-2, keepdim=True)] if isinstance(second, Reach) else []
    return reduce(torch.maximum, reaches).expand(op.shape)


@rule("linear")
def linear(op: Operation) -> Tensor:
    """Every output feature depends on every input feature."""
    reach: Tensor = op["input"].amax(-1, keepdim=True)
    return reach.expand(op.shape)


@rule("_native_multi_head_attention _transformer_encoder_layer_fwd")
def attention(op: Operation) -> Tensor:
    """PyTorch's fused attention: every token depends on all tokens."""
    tokens = [tensor.reach.amax([1, 2], keepdim=True) for tensor in op.args if isinstance(tensor, Reach)]
    return reduce(torch.maximum, tokens).expand(op.args[0].shape)


@rule("convolution")
def convolution(op: Operation) -> Tensor:
    """Convolution, also grouped, dilated or transposed: a window of all channels of its group."""
    if isinstance(op.given["weight"], Reach):
        raise NoRuleError("convolution with weights that depend on the image")
    kernel = op["weight"].shape[2:]
    stride, padding, dilation = (_per_axis(op[name], len(kernel)) for name in ("stride", "padding", "dilation"))
    reach = op["input"].unflatten(1, (op["groups"], -1)).amax(2)
    if torch.equal(reach, reach[:, :1].expand_as(reach)):  # as behind a convolution of all channels: one does for all
        reach = reach[:, :1]
    if op["transposed"]:  # a convolution of stride 1 over cells that lie `stride` apart
        span = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        around = [length // s + 2 for length, s in zip(span, stride, strict=True)]
        reach = op.kind.pad(reach, [(cells, cells) for cells in around])
        for axis, s in enumerate(stride, start=2):
            apart = F.pad(reach.movedim(axis, -1)[..., None], (0, s - 1), value=NOTHING)
            reach = apart.flatten(-2).movedim(-1, axis)
        padding = [length - p - cells * s for length, p, cells, s in zip(span, padding, around, stride, strict=True)]
        stride = [1] * len(kernel)
    reach = _window(op, reach, kernel, stride, padding, dilation)
    return reach.repeat_interleave(op.shape[1] // reach.shape[1], dim=1)


@rule("avg_pool1d avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices")
def pool(op: Operation) -> Tensor:
    """Average and maximum pooling."""
    axes = op["self"].ndim - 2
    kernel = _per_axis(op["kernel_size"], axes)
    stride = _per_axis(op.get("stride", kernel), axes)
    padding, dilation = _per_axis(op.get("padding", 0), axes), _per_axis(op.get("dilation", 1), axes)
    return _window(op, op["self"], kernel, stride, padding, dilation)


def _window(
    op: Operation,
    reach: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Return the maximum over sliding windows, padded behind by what the output's size takes."""
    pads = [
        (p, (outputs - 1) * s + d * (k - 1) + 1 - inputs - p)
        for k, s, p, d, inputs, outputs in zip(
            kernel, stride, padding, dilation, reach.shape[2:], op.shape[2:], strict=True
        )
    ]
    reach = op.kind.pad(reach, pads)
    if max(kernel) == 1:
        places = (slice(None), slice(None), *[slice(None, None, s) for s in stride])
        return reach[places]
    pool: Callable[..., Tensor] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
    return pool(reach, kernel, stride, 0, dilation)


def _per_axis(value: int | Sequence[int], axes: int) -> list[int]:
    """Return one number for every axis, from one for all or one for each."""
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values


@rule("_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d")
def adaptive_pool(op: Operation) -> Tensor:
    """Adaptive pooling, average or maximum."""
    pool: Callable[..., Tensor] = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)[
        len(op["output_size"]) - 1
    ]
    return pool(op["self"], op["output_size"])


@rule("constant_pad_nd")
def pad(op: Operation) -> Tensor:
    """Padding with a constant."""
    pad = op.get("pad") or op["padding"]
    return op.kind.pad(op["self"], list(zip(pad[-2::-2], pad[::-2], strict=True)))


@rule("reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d")
def mirror(op: Operation) -> Any:
    """Padding with pixels of the image: needed at its border only."""
    return pad(op) if op.kind is EndlessReach else move(op)


@rule("im2col")
def patchify(op: Operation) -> Tensor:
    """``unfold``: windows side by side."""
    reach = op.kind.pad(op["self"], [(p, p) for p in op["padding"]])
    return F.unfold(reach, op["kernel_size"], op["dilation"], 0, op["stride"])


@rule("col2im")
def overlay(op: Operation) -> Tensor:
    """``fold``: windows put in their places, where they overlap as a sum."""
    height, width = op["output_size"]
    (above, left), options = op["padding"], (op["kernel_size"], op["dilation"], 0, op["stride"])
    rows, cols = height + 2 * above, width + 2 * left
    places = F.unfold(torch.arange(float(rows * cols)).view(1, 1, rows, cols), *options).long()
    kernel = places.shape[1]
    windows: Tensor = op["self"].unflatten(1, (-1, kernel)).flatten(2)
    reach = windows.new_full((*windows.shape[:2], rows * cols), NOTHING)
    reach = reach.scatter_reduce(2, places.flatten().to(windows.device).expand_as(windows), windows, "amax")
    grid: Tensor = reach.unflatten(2, (rows, cols))
    return grid[..., above : above + height, left : left + width]


@rule("_upsample_bicubic2d_aa _upsample_bilinear2d_aa upsample_bicubic2d upsample_bilinear2d")
def resample(op: Operation) -> Tensor:
    """Linear and cubic interpolation: an element depends on the few of each axis that have a weight."""
    reach: Tensor = op.args[0].reach
    scales = op.get("scale_factors", (op.get("scales_h"), op.get("scales_w")))
    for axis, scale in zip((-2, -1), scales, strict=True):
        size = reach.shape[axis]
        unit = torch.eye(size, dtype=torch.double)[None, None]
        weights = op.func.overloadpacket.default(unit, (size, op.shape[axis]), op["align_corners"], None, scale)[
            0, 0
        ].abs()
        weight, source = weights.topk(int((weights > 1e-9).sum(0).max()), dim=0)  # (sources, outputs)
        index = source.where(weight > 1e-9, source[:1]).to(reach.device)
        reach = torch.stack([reach.index_select(axis, cells) for cells in index]).amax(0)
    return reach


@rule("_native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm native_batch_norm")
def batch_norm(op: Operation) -> Tensor:
    """Affine, unless it measures its statistics itself, as instance norm does: then the whole channel."""
    reach: Tensor = op["input"]
    if not op.get("training", False):
        return reach.clone()
    return reach.amax([0, *range(2, reach.ndim)], keepdim=True).expand_as(reach)


@rule("native_group_norm")
def group_norm(op: Operation) -> Tensor:
    """Every element depends on all elements of its group."""
    groups = op["input"].unflatten(1, (op["group"], -1))
    reach: Tensor = groups.amax(tuple(range(2, groups.ndim)), keepdim=True).expand_as(groups).flatten(1, 2)
    return reach


@rule("_fused_rms_norm native_layer_norm")
def layer_norm(op: Operation) -> Tensor:
    """Every element depends on all elements along the normalized axes."""
    reach: Tensor = op["input"]
    return reach.amax(tuple(range(-len(op["normalized_shape"]), 0)), keepdim=True).expand_as(reach)
