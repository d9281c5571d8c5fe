"""Operations that are affine already: views, copies, sums, averages, padding. Nothing is frozen.

Each function here is the transpose of one operation: from its call and the coefficients of its output to those of its
live arguments. Whatever has none here is derived by autograd.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import Call, Value
from .rule import Gradients, Linear

__all__ = ["AFFINE", "STRUCTURAL", "Copy", "summed_to"]

aten = torch.ops.aten


def summed_to(gradient: Tensor, value: Value) -> Tensor:
    """Return the transpose of broadcasting and casting: the sum over what was repeated, in the type of the value."""
    if gradient.shape != value.shape:
        gradient = gradient.sum_to_size(value.shape)
    return _cast(gradient, value)


def _cast(gradient: Tensor, value: Value) -> Tensor:
    if gradient.dtype == value.dtype:
        return gradient
    return (gradient.real if gradient.is_complex() and not value.dtype.is_complex else gradient).to(value.dtype)


def _conjugate(number: Any) -> Any:
    return number.conjugate() if isinstance(number, complex) else number


def _reshaped(call: Call, gradient: Tensor) -> list[Tensor]:
    return [gradient.reshape(call.values[0].shape)]


def _same(call: Call, gradient: Tensor) -> list[Tensor]:
    return [_cast(gradient, call.values[0])]


def _permuted(call: Call, gradient: Tensor) -> list[Tensor]:
    order = [dim % len(call.args[1]) for dim in call.args[1]]
    return [gradient.permute([order.index(dim) for dim in range(len(order))])]


def _transposed(call: Call, gradient: Tensor) -> list[Tensor]:
    return [gradient.transpose(call.args[1], call.args[2])]


def _t(call: Call, gradient: Tensor) -> list[Tensor]:
    return [gradient.t()]


def _expanded(call: Call, gradient: Tensor) -> list[Tensor]:
    return [gradient.sum_to_size(call.values[0].shape)]


def _selected(call: Call, gradient: Tensor) -> list[Tensor]:
    return [aten.select_backward(gradient, call.values[0].shape, call.args[1], call.args[2])]


def _sliced(call: Call, gradient: Tensor) -> list[Tensor]:
    def bounds(
        _: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
    ) -> tuple[int, int, int, int]:
        size = call.values[0].shape[dim]
        first, last = slice(start, end).indices(size)[:2]
        return dim, first, max(first, last), step

    dim, start, end, step = bounds(*call.args, **call.kwargs)
    return [aten.slice_backward(gradient, call.values[0].shape, dim, start, end, step)]


def _added(call: Call, gradient: Tensor) -> list[Tensor]:
    found = []
    alpha = _conjugate(call.kwargs.get("alpha", 1))
    for position, argument in enumerate(call.args[:2]):
        if isinstance(argument, Value):
            share = gradient if position == 0 or alpha == 1 else gradient * alpha
            found.append(summed_to(share, argument))
    return found


def _subtracted(call: Call, gradient: Tensor) -> list[Tensor]:
    found = []
    alpha = _conjugate(call.kwargs.get("alpha", 1))
    for position, argument in enumerate(call.args[:2]):
        if isinstance(argument, Value):
            found.append(summed_to(gradient if position == 0 else gradient * -alpha, argument))
    return found


def _subtracted_from(call: Call, gradient: Tensor) -> list[Tensor]:
    found = []
    alpha = _conjugate(call.args[2] if len(call.args) > 2 else call.kwargs.get("alpha", 1))
    for position, argument in enumerate(call.args[:2]):
        if isinstance(argument, Value):
            found.append(summed_to(gradient * -alpha if position == 0 else gradient, argument))
    return found


def _negated(call: Call, gradient: Tensor) -> list[Tensor]:
    return [-gradient]


def _concatenated(call: Call, gradient: Tensor) -> list[Tensor]:
    def arguments(tensors: Sequence[Any], dim: int = 0) -> tuple[Sequence[Any], int]:
        return tensors, dim

    tensors, dim = arguments(*call.args, **call.kwargs)
    # an empty 1-d tensor may stand among tensors of any shape
    sizes = [0 if tuple(t.shape) == (0,) and gradient.dim() > 1 else t.shape[dim] for t in tensors]
    parts = gradient.split(sizes, dim)
    return [
        part.reshape(tensor.shape).to(tensor.dtype)
        for part, tensor in zip(parts, tensors, strict=True)
        if isinstance(tensor, Value)
    ]


def _stacked(call: Call, gradient: Tensor) -> list[Tensor]:
    def arguments(tensors: Sequence[Any], dim: int = 0) -> tuple[Sequence[Any], int]:
        return tensors, dim

    tensors, dim = arguments(*call.args, **call.kwargs)
    parts = gradient.unbind(dim)
    return [part for part, tensor in zip(parts, tensors, strict=True) if isinstance(tensor, Value)]


def _spread(call: Call, gradient: Tensor, dims: Any, keepdim: bool) -> Tensor:
    """A sum's coefficients, back at what was summed."""
    shape = call.values[0].shape
    if not shape or dims is None or (isinstance(dims, (tuple, list)) and not dims):
        return gradient.reshape([1] * len(shape)).expand(shape)
    dims = [dims] if isinstance(dims, int) else dims
    if not keepdim:
        for dim in sorted(dim % len(shape) for dim in dims):
            gradient = gradient.unsqueeze(dim)
    return gradient.expand(shape)


def _sum_arguments(_: Any, dim: Any = None, keepdim: bool = False, **__: Any) -> tuple[Any, bool]:
    return dim, keepdim


def _summed(call: Call, gradient: Tensor) -> list[Tensor]:
    spread = _spread(call, gradient, *_sum_arguments(*call.args, **call.kwargs))
    return [spread.to(call.values[0].dtype)]


def _averaged(call: Call, gradient: Tensor) -> list[Tensor]:
    value = call.values[0]
    count = max(1, value.shape.numel() // max(1, gradient.numel()))
    if torch._C._functorch.is_batchedtensor(gradient):  # whose numel counts one of the batch, as it should
        count = max(1, value.shape.numel() // max(1, gradient.shape.numel()))
    spread = _spread(call, gradient / count, *_sum_arguments(*call.args, **call.kwargs))
    return [spread.to(value.dtype)]


def _padded(call: Call, gradient: Tensor) -> list[Tensor]:
    return [F.pad(gradient, [-size for size in call.args[1]])]


def _average_pooled(call: Call, gradient: Tensor) -> list[Tensor]:
    def arguments(
        _: Value,
        kernel: Any,
        stride: Any = (),
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> tuple[Any, ...]:
        padding = [padding] if isinstance(padding, int) else padding
        return kernel, stride or kernel, padding, ceil_mode, count_include_pad, divisor_override

    backward = aten.avg_pool3d_backward if call.operation is aten.avg_pool3d.default else aten.avg_pool2d_backward
    return [backward(gradient, call.values[0].empty(), *arguments(*call.args, **call.kwargs))]


def _adaptively_pooled(call: Call, gradient: Tensor) -> list[Tensor]:
    is_3d = call.operation is aten._adaptive_avg_pool3d.default
    backward = aten._adaptive_avg_pool3d_backward if is_3d else aten._adaptive_avg_pool2d_backward
    return [backward(gradient, call.values[0].empty())]


class Split(Linear):
    """One tensor into several: the coefficients of the parts, side by side, with zeros for parts nobody reads.

    Equation:
        y_i = x[range i]
    """

    def __init__(self) -> None:
        super().__init__(keeps_gates=True, homogeneous=True, moves=True)

    def transpose(self, call: Call, state: None, gradients: Gradients) -> Sequence[Tensor | None]:
        """Put the parts together."""
        given = next(gradient for gradient in gradients if gradient is not None)
        value = call.values[0]
        unbinds = call.operation.overloadpacket.__name__.startswith("unbind")  # type: ignore[attr-defined]
        dim = call.args[-1] if len(call.args) > (1 if unbinds else 2) else call.kwargs.get("dim", 0)
        if unbinds:
            return [torch.stack([torch.zeros_like(given) if g is None else g for g in gradients], dim)]
        sizes = call.args[1]
        if isinstance(sizes, int):
            whole = value.shape[dim]
            sizes = [min(sizes, whole - start) for start in range(0, whole, max(1, sizes))] or [0]
        parts = []
        for size, gradient in zip(sizes, gradients, strict=True):
            shape = list(value.shape)
            shape[dim] = size
            parts.append(given.new_zeros(shape) if gradient is None else gradient)
        return [torch.cat(parts, dim)]


def _places(device: torch.device, size: Sequence[int], stride: Sequence[int], offset: int | None = None) -> Tensor:
    """Return where in memory the elements of a view by strides lie, in their order."""
    found = torch.full((), offset or 0, device=device)
    for length, step in zip(size, stride, strict=True):
        found = found[..., None] + torch.arange(length, device=device) * step
    return found.reshape(-1)


class AsStrided(Linear):
    """A view by strides of a tensor's memory: a gather.

    Equation:
        y[i] = x[j(i)], with j given by the strides
    """

    def __init__(self) -> None:
        super().__init__(keeps_gates=True, homogeneous=True, moves=True)

    def apply(self, call: Call, state: None) -> Tensor:
        """Gather from the elements."""
        output: Tensor = call.input.reshape(-1).index_select(0, self._elements(call)).reshape(call.args[1])
        return output

    def transpose(self, call: Call, state: None, gradients: Gradients) -> list[Tensor | None]:
        """Add the coefficients to where they were gathered from."""
        (gradient,) = gradients
        if gradient is None:
            return [None]
        shape = call.values[0].shape
        row = torch.zeros(shape.numel(), dtype=gradient.dtype, device=gradient.device)
        return [row.index_add(0, self._elements(call), gradient.reshape(-1)).reshape(shape)]

    @staticmethod
    def _elements(call: Call) -> Tensor:
        """Return which elements of the tensor lie where the view's do: it may lie in memory in any order."""
        value = call.values[0]
        places = _places(value.device, value.shape, value.stride)
        length = 1 + sum((size - 1) * step for size, step in zip(value.shape, value.stride, strict=True))
        memory = torch.zeros(max(length, 0), dtype=places.dtype, device=value.device)
        memory = memory.index_copy(0, places, torch.arange(value.shape.numel(), device=value.device))
        return memory.index_select(0, _places(value.device, *call.args[1:]))


class AsStridedScatter(Linear):
    """New values for a view by strides of a row of elements.

    Equation:
        y[j] = source[i] where j = j(i), else x[j]
    """

    def apply(self, call: Call, state: None) -> Tensor:
        """Put the source where the view lies."""
        row, source, *geometry = call.args
        positions = _places(row.device, *geometry)
        output: Tensor = row.reshape(-1).index_copy(0, positions, source.reshape(-1).to(row.dtype)).reshape(row.shape)
        return output

    def transpose(self, call: Call, state: None, gradients: Gradients) -> list[Tensor | None]:
        """Return the coefficients of the row, zero where it is overwritten, and those of the source."""
        (gradient,) = gradients
        if gradient is None:
            return [None] * len(call.values)
        row, source, *geometry = call.args
        positions = _places(gradient.device, *geometry)
        found: list[Tensor | None] = []
        if isinstance(row, Value):
            found.append(gradient.reshape(-1).index_fill(0, positions, 0).reshape(row.shape))
        if isinstance(source, Value):
            found.append(gradient.reshape(-1).index_select(0, positions).reshape(source.shape).to(source.dtype))
        return found


class Placing(Linear):
    """New values for some elements of a tensor. Where several go to one place the last of them counts.

    PyTorch's own backward pass counts all of them, so which one it was is found by placing numbers instead.

    Equation:
        y[j] = source[i], with i the last of those that go to j, else x[j]

    Args:
        source: Position of the new values among the arguments; the first where they are placed among zeros.

    Example:
        >>> from captum_scoremap import linear_form
        >>> place = lambda x: torch.zeros(1, 2).index_copy(1, torch.tensor([1, 1]), x).sum(1)
        >>> linear_form(place, torch.tensor([[3.0, 5.0]])).coefficients
        tensor([[0., 1.]])
    """

    def __init__(self, source: int) -> None:
        super().__init__()
        self.source = source

    def transpose(self, call: Call, state: None, gradients: Gradients) -> Sequence[Tensor | None]:
        """Return the coefficients of what was not overwritten, and of each new value that was not."""
        (gradient,), source = gradients, call.args[self.source]
        if gradient is None or any(argument is True for argument in (*call.args, *call.kwargs.values())):  # it adds
            return super().transpose(call, state, gradients)
        count, args = source.shape.numel() if isinstance(source, (Tensor, Value)) else 1, list(call.args)
        numbers = torch.arange(1.0, count + 1, dtype=torch.float64, device=gradient.device)
        args[self.source] = numbers.reshape(source.shape) if isinstance(source, (Tensor, Value)) else 1.0
        if self.source:
            args[0] = torch.zeros(call.args[0].shape, dtype=numbers.dtype, device=gradient.device)
        placed = call.operation(*args, **call.kwargs).long()
        found: list[Tensor | None] = []
        if self.source and isinstance(call.args[0], Value):
            found.append(_cast(gradient.masked_fill(placed != 0, 0), call.args[0]))
        if isinstance(source, Value):
            row = torch.zeros(count + 1, dtype=gradient.dtype, device=gradient.device)
            share = row.index_add(0, placed.reshape(-1), gradient.reshape(-1))[1:].reshape(source.shape)
            found.append(_cast(share, source))
        return found


class View(Linear):
    """A view of another shape; a copy where the tensor does not lie in memory as at the image.

    Equation:
        y[i] = x[j(i)], with j given by the shapes
    """

    def __init__(self) -> None:
        super().__init__(_reshaped, keeps_gates=True, homogeneous=True, moves=True)

    def apply(self, call: Call, state: None) -> Tensor:
        """Reshape."""
        output: Tensor = call.input.reshape(call.args[1])
        return output


class Copy(Linear):
    """``copy(self, source)``, what ``self.copy_(source)`` leaves: only the source counts.

    Equation:
        y = source

    Args:
        transpose: As for :class:`Linear`; not used.
        keeps_gates: Whether the output is a gate where the source is.
        homogeneous: As for :class:`Linear`.
        moves: As for :class:`Linear`.

    Example:
        >>> from captum_scoremap import freeze
        >>> freeze(lambda x: torch.zeros(1, 2).copy_(x), torch.ones(1, 2))(torch.tensor([[3.0, 4.0]]))
        tensor([[3., 4.]])
    """

    def is_constant(self, call: Call) -> bool:
        """Return whether the source is not live."""
        return not call.is_live(call.args[1])

    def apply(self, call: Call, state: None) -> Tensor:
        """Return the source, in the shape and type of what it is copied to."""
        target, source = call.args[:2]
        output: Tensor = source.to(target.dtype).expand(target.shape)
        return output

    def transpose(self, call: Call, state: None, gradients: Gradients) -> list[Tensor | None]:
        """Return the coefficients of the source, summed over what was repeated; it may be the target itself."""
        (gradient,) = gradients
        source = call.args[1]
        if gradient is None or not isinstance(source, Value):
            return [None] * len(call.values)
        share = summed_to(gradient, source)
        return [None, share] if isinstance(call.args[0], Value) else [share]


def _embedded(call: Call, gradient: Tensor) -> list[Tensor]:
    """The rows' coefficients, those of ``padding_idx`` too, which autograd leaves out."""
    weight, rows = call.values[0], call.args[1].reshape(-1)
    found = torch.zeros(weight.shape, dtype=gradient.dtype, device=gradient.device)
    return [found.index_add(0, rows, gradient.reshape(-1, weight.shape[1]))]


def _moving(transpose: Callable[[Call, Tensor], Sequence[Tensor | None]]) -> Linear:
    return Linear(transpose, keeps_gates=True, homogeneous=True, moves=True)


STRUCTURAL: dict[str, Linear] = {
    **dict.fromkeys("view _unsafe_view reshape _reshape_alias".split(), View()),
    **dict.fromkeys("squeeze unsqueeze flatten unflatten".split(), _moving(_reshaped)),
    **dict.fromkeys(
        "clone _to_copy detach alias lift lift_fresh contiguous copy to".split(),
        _moving(_same),
    ),
    "permute": _moving(_permuted),
    "transpose": _moving(_transposed),
    "t": _moving(_t),
    "expand": _moving(_expanded),
    "select": _moving(_selected),
    "slice": _moving(_sliced),
    "add": Linear(_added, keeps_gates=True),
    "sub": Linear(_subtracted, keeps_gates=True),
    "rsub": Linear(_subtracted_from, keeps_gates=True),
    **dict.fromkeys(("neg", "_neg_view"), Linear(_negated, keeps_gates=True, homogeneous=True)),
    "cat": _moving(_concatenated),
    "stack": _moving(_stacked),
    "constant_pad_nd": Linear(_padded, keeps_gates=True, moves=True),
    **dict.fromkeys("split split_with_sizes unsafe_split unsafe_split_with_sizes unbind".split(), Split()),
    "as_strided": AsStrided(),
    **dict.fromkeys(
        """
        repeat repeat_interleave index _unsafe_index index_select gather take masked_select roll flip rot90 diagonal
        diag_embed unfold pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle
        """.split(),
        Linear(keeps_gates=True, homogeneous=True, moves=True),
    ),
    **dict.fromkeys(
        """
        positive where masked_fill reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d
        replication_pad2d replication_pad3d upsample_nearest1d upsample_nearest2d upsample_nearest3d
        upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa
        _upsample_bicubic2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
        view_as_real view_as_complex _conj conj conj_physical _conj_physical resolve_conj resolve_neg real imag deg2rad
        rad2deg
        """.split(),
        Linear(keeps_gates=True),
    ),
}

AFFINE: dict[str, Linear] = {
    "as_strided_scatter": AsStridedScatter(),
    "sum": Linear(_summed, homogeneous=True),
    "mean": Linear(_averaged, homogeneous=True),
    **dict.fromkeys(("avg_pool2d", "avg_pool3d"), Linear(_average_pooled, homogeneous=True)),
    **dict.fromkeys(("_adaptive_avg_pool2d", "_adaptive_avg_pool3d"), Linear(_adaptively_pooled, homogeneous=True)),
    "embedding": Linear(_embedded),
    **dict.fromkeys(("index_put", "put"), Placing(2)),
    **dict.fromkeys(("scatter", "index_copy"), Placing(3)),
    **dict.fromkeys(("max_unpool2d", "max_unpool3d"), Placing(0)),
    **dict.fromkeys(
        """
        cumsum im2col col2im affine_grid_generator index_add index_fill scatter_add slice_scatter select_scatter
        diagonal_scatter masked_scatter
        tril triu trace _fft_r2c _fft_c2r _fft_c2c avg_pool1d adaptive_avg_pool1d select_backward slice_backward
        diagonal_backward embedding_dense_backward _unsafe_masked_index diff fft_fftshift fft_ifftshift complex
        block_diag _pack_padded_sequence unfold_backward
        """.split(),
        Linear(),
    ),
}
