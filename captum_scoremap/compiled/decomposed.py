"""Graphs without changes in place, and of other operations: those that ONNX has, or that Inductor does better with.

ONNX has no backward operations, but the transposed steps are plain operations themselves: that of a convolution is a
transposed convolution, that of a maximum over windows a scatter, and average-pooling, enlarging and padding go axis by
axis, so that theirs are products with one matrix for each axis.
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._decomp import decomposition_table

from captum_scoremap.speed import convolved_otherwise, transposed_otherwise

__all__ = ["ANY_NUMBER", "INDUCTOR", "ONNX", "functional"]

aten = torch.ops.aten

Decompositions = Mapping[Any, Callable[..., Any]]


def functional(
    module: fx.GraphModule, arguments: Sequence[Tensor], decompositions: Decompositions | None = None
) -> fx.GraphModule:
    """Return a graph without changes in place.

    Args:
        module: The graph.
        arguments: What it takes.
        decompositions: Operation to what it is made of.

    Returns:
        The graph.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad():
        traced = make_fx(
            torch.func.functionalize(module, remove="mutations"), dict(decompositions or {}), tracing_mode="fake"
        )(*arguments)
    if decompositions:
        _take_from_whole(traced.graph)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced


def _take_from_whole(graph: fx.Graph) -> None:
    """Take what is read by strides from the tensor that the memory is of; in ONNX there is nothing around a view."""
    for node in graph.find_nodes(op="call_function", target=aten.as_strided.default):
        view, size, stride, *offset = node.args
        whole = view
        while _is_view(whole):
            whole = whole.args[0]
        value = whole.meta.get("val")
        if isinstance(value, Tensor) and value.is_contiguous():
            start = offset[0] if offset else view.meta["val"].storage_offset()
            node.args = (whole, size, stride, start)


def _is_view(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return _is_view(node.args[0])  # type: ignore[arg-type]  # what made several
    return node.target in _UNSAFE or bool(getattr(node.target, "is_view", False))


# Views whose schemas do not say so.
_UNSAFE = {aten.unsafe_split.Tensor, aten.unsafe_split_with_sizes.default, aten.unsafe_chunk.default}


def _convolution_backward(
    gradient: Tensor,
    input: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> Any:
    """Return the transposed convolution: what it leaves over at the end of an axis is its output padding."""
    if list(output_mask) != [True, False, False]:
        return NotImplemented
    axes = input.dim() - 2
    stride, padding, dilation = (list(one) * (axes if len(one) == 1 else 1) for one in (stride, padding, dilation))
    if transposed:
        found = aten.convolution(gradient, weight, None, stride, padding, dilation, False, [0] * axes, groups)
        return found, None, None
    over = [
        input.shape[axis + 2]
        - (gradient.shape[axis + 2] - 1) * stride[axis]
        + 2 * padding[axis]
        - dilation[axis] * (weight.shape[axis + 2] - 1)
        - 1
        for axis in range(axes)
    ]
    found = aten.convolution(gradient, weight, None, stride, padding, dilation, True, over, groups)
    return found, None, None


def _max_pool_backward(axes: int) -> Callable[..., Tensor]:
    def backward(gradient: Tensor, input: Tensor, *arguments: Any) -> Tensor:
        """Return the coefficients, added to the positions that the maxima were taken from."""
        flat = torch.zeros(input.shape, dtype=gradient.dtype, device=gradient.device).flatten(-axes)
        found = flat.scatter_add(-1, arguments[-1].flatten(-axes), gradient.flatten(-axes))
        return found.reshape(input.shape)

    return backward


def _adaptive_max_pool(axes: int) -> Callable[..., Any]:
    """Return maxima and their positions among all cells; the last cell of a shorter window counts more than once."""

    def pool(input: Tensor, output_size: Sequence[int]) -> Any:
        sizes = input.shape[-axes:]
        cells = torch.arange(math.prod(sizes), device=input.device).reshape(sizes)
        for axis, (size, count) in enumerate(zip(sizes, output_size, strict=True), start=-axes):
            at = torch.arange(count, device=input.device)
            starts, ends = at * size // count, ((at + 1) * size + count - 1) // count
            widest = max(-(-size * (one + 1) // count) - size * one // count for one in range(count))
            within = starts[:, None] + torch.arange(widest, device=input.device)
            index = torch.minimum(within, ends[:, None] - 1).flatten()
            input, cells = input.index_select(axis, index), cells.index_select(axis, index)
        windows, cells = _in_windows(input, output_size), _in_windows(cells, output_size)
        values, positions = windows.max(-1, keepdim=True)
        return values[..., 0], cells.expand_as(windows).gather(-1, positions)[..., 0]

    return pool


def _in_windows(cells: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the cells of each window in a row, (..., counts, cells of one); there are as many in all."""
    leading = cells.dim() - len(counts)
    sizes = [part for count, size in zip(counts, cells.shape[leading:], strict=True) for part in (count, size // count)]
    order = [*range(leading), *range(leading, cells.dim() + len(counts), 2)]
    order += range(leading + 1, cells.dim() + len(counts), 2)
    return cells.reshape(*cells.shape[:leading], *sizes).permute(order).flatten(-len(counts))


def _along_axes(gradient: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Return the product with the transpose of one matrix, (after, before), for each of the last axes."""
    for axis, matrix in enumerate(reversed(matrices), start=1):
        gradient = (gradient.movedim(-axis, -1) @ matrix.to(gradient)).movedim(-1, -axis)
    return gradient.contiguous()


def _matrix(operation: Any, size: int, like: Tensor, *arguments: Any) -> Tensor:
    """Return what an operation on one axis, the last but one, does to so many cells, (after, before)."""
    found: Tensor = operation(torch.eye(size, dtype=like.dtype, device=like.device)[None, None], *arguments)
    return found[0, 0]


def _average_pool_backward(
    gradient: Tensor,
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Tensor:
    axes = len(kernel)
    stride = list(stride) or list(kernel)
    stride, padding = (list(one) * (axes if len(one) == 1 else 1) for one in (stride, padding))
    counted = None if divisor is None else 1  # the mean, or the sum
    matrices = []
    for axis, geometry in enumerate(zip(kernel, stride, padding, strict=True)):
        sides = [(here, one) for here, one in zip(geometry, (1, 1, 0), strict=True)]
        size = input.shape[axis - axes]
        matrices.append(_matrix(F.avg_pool2d, size, gradient, *sides, ceil_mode, count_include_pad, counted))
    found = _along_axes(gradient, matrices)
    return found if divisor is None else found / divisor


def _adaptive_pool_backward(axes: int) -> Callable[..., Tensor]:
    def backward(gradient: Tensor, input: Tensor) -> Tensor:
        pairs = zip(input.shape[-axes:], gradient.shape[-axes:], strict=True)
        return _along_axes(
            gradient, [_matrix(F.adaptive_avg_pool2d, before, gradient, (after, before)) for before, after in pairs]
        )

    return backward


def _enlarging(operation: Any, *, aligns: bool) -> Callable[..., Tensor]:
    """Return the transpose of an enlargement, by the operation on two axes."""

    def backward(
        gradient: Tensor, output_size: Sequence[int], input_size: Sequence[int], *rest: Any, **kwargs: Any
    ) -> Tensor:
        own, scales = (rest[:1], rest[1:]) if aligns else ((), rest)
        named = [kwargs[name] for name in ("scales", "scales_d", "scales_h", "scales_w") if name in kwargs]
        scales = (*scales, *named, *[None] * len(output_size))[: len(output_size)]
        axes = zip(input_size[2:], output_size, scales, strict=True)
        matrices = [
            _matrix(operation, before, gradient, [after, before], *own, scale, None) for before, after, scale in axes
        ]
        return _along_axes(gradient, matrices)

    return backward


def _padding_backward(mode: str) -> Callable[..., Tensor]:
    def backward(gradient: Tensor, input: Tensor, padding: Sequence[int]) -> Tensor:
        pairs = list(zip(padding[::2], padding[1::2], strict=True))[::-1]  # the last axis' come first
        sides = zip(input.shape[-len(pairs) :], pairs, strict=True)
        return _along_axes(gradient, [_matrix(F.pad, size, gradient, (0, 0, *own), mode) for size, own in sides])

    return backward


def _diagonal_backward(gradient: Tensor, input_sizes: Sequence[int], offset: int, dim1: int, dim2: int) -> Tensor:
    rows, columns = (torch.arange(input_sizes[dim], device=gradient.device) for dim in (dim1, dim2))
    on = columns == rows[:, None] + offset
    size = input_sizes[dim1 if offset >= 0 else dim2]  # an element's row, or its column, is its place on the diagonal
    gradient = F.pad(gradient, (0, size - gradient.shape[-1])).unsqueeze(-1 if offset >= 0 else -2)
    ends = dim1 % len(input_sizes), dim2 % len(input_sizes)
    return torch.where(on, gradient, torch.zeros_like(gradient)).movedim((-2, -1), ends)


def _unfold_backward(gradient: Tensor, input_sizes: Sequence[int], dim: int, size: int, step: int) -> Tensor:
    """Return the coefficients, added to the positions that windows along an axis cover."""
    dim %= len(input_sizes)
    windows = torch.arange(gradient.shape[dim], device=gradient.device) * step
    positions = (windows[:, None] + torch.arange(size, device=gradient.device)).flatten()
    rows = gradient.movedim(dim, -2).flatten(-2)
    shape = [length for axis, length in enumerate(input_sizes) if axis != dim]
    flat = torch.zeros([*shape, input_sizes[dim]], dtype=gradient.dtype, device=gradient.device)
    return flat.scatter_add(-1, positions.expand_as(rows), rows).movedim(-1, dim)


def _select_backward(gradient: Tensor, input_sizes: Sequence[int], dim: int, index: int) -> Tensor:
    dim, size = dim % len(input_sizes), input_sizes[dim]
    index %= size
    sides = [0, 0] * (len(input_sizes) - dim - 1) + [index, size - 1 - index]
    return F.pad(gradient.unsqueeze(dim), sides)


def _slice_backward(gradient: Tensor, input_sizes: Sequence[int], dim: int, start: int, end: int, step: int) -> Any:
    dim, size = dim % len(input_sizes), input_sizes[dim]
    positions = range(size)[start:end:step]
    if not len(positions):
        return torch.zeros(list(input_sizes), dtype=gradient.dtype, device=gradient.device)
    if step > 1:  # zeros after each, the last one's cut off
        spread = F.pad(gradient.unsqueeze(dim + 1), [0, 0] * (len(input_sizes) - dim - 1) + [0, step - 1])
        gradient = spread.flatten(dim, dim + 1).narrow(dim, 0, positions[-1] - positions[0] + 1)
    sides = [0, 0] * (len(input_sizes) - dim - 1) + [positions[0], size - 1 - positions[-1]]
    return F.pad(gradient, sides)


def _batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """Normalize by running statistics; with those of the image PyTorch's own decomposition serves."""
    if training or mean is None or variance is None:
        return NotImplemented
    shape = (-1, *[1] * (input.dim() - 2))
    scale = (variance + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    found = (input - mean.reshape(shape)) * scale.reshape(shape)
    found = found if bias is None else found + bias.reshape(shape)
    return found.to(input.dtype), input.new_zeros(0), input.new_zeros(0)


def _view(input: Tensor, size: Sequence[int]) -> Any:
    """Copy first, for what took its place may lie in memory otherwise, of which ONNX knows nothing."""
    return NotImplemented if input.is_contiguous() else aten.view(input.contiguous(), size)


# Runtimes compute with whole numbers of four and eight bytes alone; what is frozen is counted in fewer.
_NARROW = {torch.uint8, torch.int8, torch.int16}


def _view_as(input: Tensor, dtype: torch.dtype) -> Any:
    return input.to(torch.int32) if {input.dtype, dtype} == {torch.bool, torch.uint8} else NotImplemented


def _to_copy(input: Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> Any:
    return input.to(torch.int32) if dtype in _NARROW else NotImplemented


def _sum(input: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    return aten.sum.dim_IntList(input, dim, keepdim, dtype=torch.int32) if dtype in _NARROW else NotImplemented


def _empty_strided(size: Sequence[int], stride: Sequence[int], **options: Any) -> Tensor:
    return torch.zeros(size, dtype=options.get("dtype"), device=options.get("device"))


def _new_empty(input: Tensor, size: Sequence[int], **options: Any) -> Tensor:
    return torch.zeros(size, dtype=options.get("dtype") or input.dtype, device=input.device)


def _otherwise(input: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Any:
    found = convolved_otherwise(input, weight, bias, *geometry)
    return NotImplemented if found is None else found


def _back_otherwise(
    gradient: Tensor, input: Tensor, weight: Tensor, bias_sizes: Sequence[int] | None, *geometry: Any
) -> Any:
    """Return a transposed convolution, which takes no memory for what was convolved, or what is faster."""
    if geometry[-1] != [True, False, False]:
        return NotImplemented
    found = transposed_otherwise(gradient, input.shape, weight, *geometry[:-1])
    if found is None:
        return _convolution_backward(gradient, input, weight, bias_sizes, *geometry)
    return found, None, None


def _ceiled_backward(gradient: Tensor, input: Tensor, *geometry: Any) -> Any:
    """Return the coefficients; Inductor divides by a whole window where one reaches beyond the padding."""
    *_, ceil_mode, count_include_pad, _ = geometry
    return _average_pool_backward(gradient, input, *geometry) if ceil_mode and count_include_pad else NotImplemented


ONNX: Decompositions = {
    aten.convolution_backward.default: _convolution_backward,
    aten.max_pool2d_with_indices_backward.default: _max_pool_backward(2),
    aten.avg_pool2d_backward.default: _average_pool_backward,
    aten.avg_pool3d_backward.default: _average_pool_backward,
    aten._adaptive_avg_pool2d_backward.default: _adaptive_pool_backward(2),
    aten._adaptive_avg_pool3d_backward.default: _adaptive_pool_backward(3),
    aten._upsample_nearest_exact1d.default: decomposition_table[aten._upsample_nearest_exact1d.default],
    aten._upsample_nearest_exact2d.default: decomposition_table[aten._upsample_nearest_exact2d.default],
    aten._upsample_nearest_exact3d.default: decomposition_table[aten._upsample_nearest_exact3d.default],
    aten.upsample_nearest2d_backward.default: _enlarging(aten.upsample_nearest2d.default, aligns=False),
    aten._upsample_nearest_exact2d_backward.default: _enlarging(aten._upsample_nearest_exact2d.default, aligns=False),
    aten.upsample_bilinear2d_backward.default: _enlarging(aten.upsample_bilinear2d.default, aligns=True),
    aten.upsample_bicubic2d_backward.default: _enlarging(aten.upsample_bicubic2d.default, aligns=True),
    aten.upsample_nearest1d_backward.default: _enlarging(aten.upsample_nearest2d.default, aligns=False),
    aten.upsample_nearest3d_backward.default: _enlarging(aten.upsample_nearest2d.default, aligns=False),
    aten._upsample_nearest_exact1d_backward.default: _enlarging(aten._upsample_nearest_exact2d.default, aligns=False),
    aten._upsample_nearest_exact3d_backward.default: _enlarging(aten._upsample_nearest_exact2d.default, aligns=False),
    aten.upsample_linear1d_backward.default: _enlarging(aten.upsample_bilinear2d.default, aligns=True),
    aten.upsample_trilinear3d_backward.default: _enlarging(aten.upsample_bilinear2d.default, aligns=True),
    aten._upsample_bilinear2d_aa_backward.default: _enlarging(aten._upsample_bilinear2d_aa.default, aligns=True),
    aten._upsample_bicubic2d_aa_backward.default: _enlarging(aten._upsample_bicubic2d_aa.default, aligns=True),
    aten.adaptive_max_pool2d.default: _adaptive_max_pool(2),
    aten.adaptive_max_pool3d.default: _adaptive_max_pool(3),
    aten.adaptive_max_pool2d_backward.default: _max_pool_backward(2),
    aten.adaptive_max_pool3d_backward.default: _max_pool_backward(3),
    aten.reflection_pad1d_backward.default: _padding_backward("reflect"),
    aten.reflection_pad2d_backward.default: _padding_backward("reflect"),
    aten.replication_pad1d_backward.default: _padding_backward("replicate"),
    aten.replication_pad2d_backward.default: _padding_backward("replicate"),
    aten.replication_pad3d_backward.default: _padding_backward("replicate"),
    aten.diagonal_backward.default: _diagonal_backward,
    aten.unfold_backward.default: _unfold_backward,
    aten.select_backward.default: _select_backward,
    aten.slice_backward.default: _slice_backward,
    aten.native_batch_norm.default: _batch_norm,
    aten.view.default: _view,
    aten.view.dtype: _view_as,
    aten._to_copy.default: _to_copy,
    aten.sum.dim_IntList: _sum,
    aten.empty_strided.default: _empty_strided,
    aten.new_empty.default: _new_empty,
}

ANY_NUMBER: Decompositions = {operation: how for operation, how in ONNX.items() if "upsample" in str(operation)}
"""What PyTorch finds the shapes of for numbers alone, not for a size that is a symbol."""

INDUCTOR: Decompositions = {
    aten.convolution.default: _otherwise,
    aten.convolution_backward.default: _back_otherwise,
    aten.avg_pool2d_backward.default: _ceiled_backward,
    aten.avg_pool3d_backward.default: _ceiled_backward,
}
"""Convolutions as what is faster on a CPU, or takes less memory; and averages that Inductor has wrong."""
