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
from .coefficients import conjugate, summed_to
from .moving import Copy, Placing, Split, cast_back, cloned, joined, parted, reshaped, scattered, strided, viewed
from .resampling import resampled
from .rule import Linear

__all__ = ["AFFINE", "reduced"]

aten = torch.ops.aten


def _permuted(call: Call, gradient: Tensor) -> list[Tensor]:
    order = [dim % len(call.args[1]) for dim in call.args[1]]
    return [gradient.permute([order.index(dim) for dim in range(len(order))])]


def _sliced(call: Call, gradient: Tensor) -> list[Tensor]:
    shape, (dim, start, end, step) = call.values[0].shape, map(call.argument, ("dim", "start", "end", "step"))
    first, last = slice(start, end).indices(shape[dim])[:2]
    return [aten.slice_backward(gradient, shape, dim, first, max(first, last), step)]


def _added(*signs: int, scaled: int = 1) -> Callable[[Call, Tensor], list[Tensor]]:
    """Return the transpose of a sum of two arguments with these signs, one of which is scaled by ``alpha``."""

    def transpose(call: Call, gradient: Tensor) -> list[Tensor]:
        alpha = conjugate(call.argument("alpha", default=1))
        factors = [sign * alpha if position == scaled else sign for position, sign in enumerate(signs)]
        return [
            summed_to(gradient if factor == 1 else gradient * factor, argument)
            for factor, argument in zip(factors, call.args[:2], strict=True)
            if isinstance(argument, Value)
        ]

    return transpose


def _concatenated(call: Call, gradient: Tensor) -> list[Tensor]:
    tensors, dim = call.argument("tensors"), call.argument("dim")
    # an empty 1-d tensor may stand among tensors of any shape
    sizes = [0 if tuple(t.shape) == (0,) and gradient.dim() > 1 else t.shape[dim] for t in tensors]
    pairs = zip(gradient.split(sizes, dim), tensors, strict=True)
    return [part.reshape(one.shape).to(one.dtype) for part, one in pairs if isinstance(one, Value)]


def reduced(call: Call) -> Sequence[int] | None:
    """Return over which dimensions an operation goes, None for all."""
    dim = call.argument("dim")
    return [dim] if isinstance(dim, int) else dim or None


def _summed(call: Call, gradient: Tensor) -> list[Tensor]:
    value, dims = call.values[0], reduced(call)
    if not value.shape or dims is None:
        gradient = gradient.reshape([1] * value.ndim)
    elif not call.argument("keepdim"):
        for dim in sorted(dim % value.ndim for dim in dims):
            gradient = gradient.unsqueeze(dim)
    return [gradient.expand(value.shape).to(value.dtype)]


def _averaged(call: Call, gradient: Tensor) -> list[Tensor]:
    count = max(1, call.values[0].shape.numel() // max(1, gradient.shape.numel()))
    return _summed(call, gradient / count)


def _average_pooled(call: Call, gradient: Tensor) -> list[Tensor]:
    kernel, stride, *rest = map(
        call.argument,
        ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    )
    backward = aten.avg_pool3d_backward if call.operation is aten.avg_pool3d.default else aten.avg_pool2d_backward
    return [backward(gradient, call.values[0].empty(), kernel, stride or kernel, *rest)]


def _adaptively_pooled(call: Call, gradient: Tensor) -> list[Tensor]:
    is_3d = call.operation is aten._adaptive_avg_pool3d.default
    backward = aten._adaptive_avg_pool3d_backward if is_3d else aten._adaptive_avg_pool2d_backward
    return [backward(gradient, call.values[0].empty())]


def _moving(
    transpose: Callable[[Call, Tensor], Sequence[Tensor | None]] | None = None,
    apply: Callable[[Call], Any] = Call.run,
    rule: type[Linear] = Linear,
) -> Linear:
    return rule(transpose, apply, keeps_gates=True, homogeneous=True, moves=True)


AFFINE: dict[str, Linear] = {
    **dict.fromkeys("view _unsafe_view reshape _reshape_alias".split(), _moving(reshaped, viewed)),
    **dict.fromkeys("squeeze unsqueeze flatten unflatten".split(), _moving(reshaped)),
    **dict.fromkeys(
        "clone _to_copy convert_element_type detach alias lift lift_fresh contiguous to".split(),
        _moving(cast_back, cloned),
    ),
    "copy": Copy(keeps_gates=True),
    "permute": _moving(_permuted),
    "transpose": _moving(lambda call, gradient: [gradient.transpose(*call.args[1:3])]),
    "t": _moving(lambda call, gradient: [gradient.t()]),
    "expand": _moving(lambda call, gradient: [gradient.sum_to_size(call.values[0].shape)]),
    "select": _moving(lambda call, gradient: [aten.select_backward(gradient, call.values[0].shape, *call.args[1:3])]),
    "slice": _moving(_sliced),
    "add": Linear(_added(1, 1), keeps_gates=True),
    "sub": Linear(_added(1, -1), keeps_gates=True),
    "rsub": Linear(_added(-1, 1, scaled=0), keeps_gates=True),
    **dict.fromkeys(
        ("neg", "_neg_view"), Linear(lambda call, gradient: [-gradient], keeps_gates=True, homogeneous=True)
    ),
    "cat": _moving(_concatenated),
    "constant_pad_nd": Linear(
        lambda call, gradient: [F.pad(gradient, [-size for size in call.args[1]])], keeps_gates=True, moves=True
    ),
    **dict.fromkeys("split split_with_sizes unsafe_split unsafe_split_with_sizes unbind".split(), _moving(rule=Split)),
    "as_strided": _moving(apply=strided),
    "view_as_complex": Linear(apply=joined, keeps_gates=True),
    "view_as_real": Linear(apply=parted, keeps_gates=True),
    **dict.fromkeys(
        """
        stack repeat repeat_interleave index _unsafe_index index_select gather take masked_select narrow_copy roll flip
        rot90 diagonal diag_embed unfold pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle
        """.split(),
        _moving(),
    ),
    **dict.fromkeys(
        """
        positive where masked_fill reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d
        replication_pad2d replication_pad3d upsample_nearest2d upsample_linear1d upsample_bilinear2d
        upsample_trilinear3d _upsample_nearest_exact2d _conj conj conj_physical _conj_physical resolve_conj resolve_neg
        real imag deg2rad rad2deg
        """.split(),
        Linear(keeps_gates=True),
    ),
    **dict.fromkeys(
        """
        upsample_nearest1d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact3d upsample_bicubic2d
        _upsample_bilinear2d_aa _upsample_bicubic2d_aa
        """.split(),
        Linear(apply=resampled, keeps_gates=True),
    ),
    # of gates these make no gate
    "as_strided_scatter": Linear(apply=scattered),
    "fill": Copy(),
    "sum": Linear(_summed, homogeneous=True),
    "mean": Linear(_averaged, homogeneous=True),
    **dict.fromkeys(("avg_pool2d", "avg_pool3d"), Linear(_average_pooled, homogeneous=True)),
    **dict.fromkeys(("_adaptive_avg_pool2d", "_adaptive_avg_pool3d"), Linear(_adaptively_pooled, homogeneous=True)),
    # whose own transpose leaves out the row of ``padding_idx``
    "embedding": Linear(apply=lambda call: call.args[0][call.args[1]]),
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
