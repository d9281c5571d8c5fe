"""Operations that are made of smaller ones, each under its own rule."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table

from .recurrent import RECURRENT
from .rule import Composite, Rule

__all__ = ["COMPOSITE", "gated_half"]


def _clamp(input: Tensor, min: Tensor | None = None, max: Tensor | None = None) -> Tensor:
    bounded = input if min is None else torch.maximum(input, min)
    return bounded if max is None else torch.minimum(bounded, max)


def _scatter_reduce(input: Tensor, dim: int, index: Tensor, src: Tensor | float, *, reduce: str) -> Tensor:
    source = src if isinstance(src, Tensor) else input.new_full(index.shape, src)
    if reduce == "add":
        return input.scatter_add(dim, index, source)
    return input.scatter_reduce(dim, index, source, "prod")


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    """Normalize by the root mean square, in the operations that it is made of where no kernel does it in one."""
    axes = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    scale = (input.pow(2).mean(axes, keepdim=True) + eps).rsqrt()
    found = input * scale
    return (found if weight is None else found * weight), scale


def _dropout(input: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    """Keep, of the input, what the kernel keeps of a constant: what it draws is frozen, as all noise is."""
    _, kept = torch.native_dropout(torch.ones_like(input), p, train)
    scale = 1.0 if train is False else 1 / (1 - p) if p < 1 else 0.0
    return input * kept * scale, kept


def _normal(mean: Tensor | float, std: Tensor | float = 1.0, *, generator: torch.Generator | None = None) -> Tensor:
    """Draw as the kernel does, and scale and shift it: what is drawn is frozen, its mean and its spread are not."""
    live = next(one for one in (mean, std) if isinstance(one, Tensor))
    shape = torch.broadcast_shapes(*(one.shape for one in (mean, std) if isinstance(one, Tensor)))
    return torch.empty(shape, dtype=live.dtype, device=live.device).normal_(generator=generator) * std + mean


def gated_half(input: Tensor, dim: int = -1) -> Tensor:
    """Multiply the first half by the sigmoid of the second, which is a gate."""
    first, second = input.chunk(2, dim)
    return first * second.sigmoid()


def _bincount(input: Tensor, weights: Tensor, minlength: int = 0) -> Tensor:
    """Return the sum of the weights of each number; numbers without weights are never live."""
    length = max([minlength, *(input + 1).tolist()])
    return weights.new_zeros(length).index_add(0, input, weights)


def _embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the sum, mean or maximum of each bag's rows, weighed; and of which bag each row is."""
    starts = offsets[:-1] if include_last_offset else offsets
    places = torch.arange(len(indices), device=indices.device, dtype=starts.dtype)
    bags = torch.bucketize(places, starts, right=True) - 1
    kept = indices != padding_idx
    rows = weight[indices[kept]]
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[kept, None]
    empty, into = rows.new_zeros(len(starts), weight.shape[1]), bags[kept]
    counts = torch.bincount(into, minlength=len(starts))
    if mode == 2:
        found = empty.scatter_reduce(0, into[:, None].expand(rows.shape), rows, "amax", include_self=False)
    else:
        found = empty.index_add(0, into, rows)
    if mode == 1:
        found = found / counts.clamp(min=1)[:, None].to(found.dtype)
    return found, bags, counts, counts


def _linspace(
    start: Tensor | float, end: Tensor | float, steps: int, *, dtype: torch.dtype | None = None, **_: Any
) -> Tensor:
    (one,) = [bound for bound in (start, end) if isinstance(bound, Tensor)][:1]
    shares = torch.linspace(0.0, 1.0, steps, dtype=one.dtype, device=one.device)
    return (start * (1 - shares) + end * shares).to(dtype or torch.get_default_dtype())


def _logspace(
    start: Tensor | float, end: Tensor | float, steps: int, base: float = 10.0, *, dtype: Any = None, **_: Any
) -> Tensor:
    (one,) = [bound for bound in (start, end) if isinstance(bound, Tensor)][:1]
    return torch.pow(base, _linspace(start, end, steps, dtype=one.dtype)).to(dtype or torch.get_default_dtype())


def _sgn(input: Tensor) -> Tensor:
    """Return the sign, which is a mask; of complex numbers the phase, which is none."""
    return input / input.abs().masked_fill(input == 0, 1.0) if input.is_complex() else input.sign()


# Kernels that PyTorch itself writes out in operations that have rules.
_DECOMPOSED = ("nan_to_num", "_chunk_cat", "aminmax", "nll_loss_forward", "nll_loss2d_forward")

COMPOSITE: dict[str, Rule] = {
    **{name: Composite(decomposition_table[getattr(torch.ops.aten, name).default]) for name in _DECOMPOSED},
    "nansum": Composite(lambda input, *rest, **named: input.masked_fill(input.isnan(), 0.0).sum(*rest, **named)),
    "sgn": Composite(_sgn),
    "ldexp": Composite(lambda input, other: input * torch.pow(2.0, other)),
    "linspace": Composite(_linspace),
    "logspace": Composite(_logspace),
    "heaviside": Composite(lambda input, values: torch.where(input == 0, values, (input > 0).to(values.dtype))),
    "bincount": Composite(_bincount),
    **dict.fromkeys(("_embedding_bag", "_embedding_bag_forward_only"), Composite(_embedding_bag)),
    "clamp.Tensor": Composite(_clamp),
    "clamp_min.Tensor": Composite(_clamp),
    "clamp_max.Tensor": Composite(torch.minimum),
    "lerp": Composite(lambda input, end, weight: input + weight * (end - input)),
    "addcmul": Composite(lambda input, tensor1, tensor2, *, value=1: input + value * (tensor1 * tensor2)),
    "addcdiv": Composite(lambda input, tensor1, tensor2, *, value=1: input + value * (tensor1 / tensor2)),
    # of traced models, with how cuDNN is to go about it
    "_convolution": Composite(lambda *args: torch.ops.aten.convolution(*args[:9])),
    "scatter.reduce": Composite(_scatter_reduce),
    "scatter.value_reduce": Composite(_scatter_reduce),
    "_fused_rms_norm": Composite(_rms_norm),
    "native_dropout": Composite(_dropout),
    **dict.fromkeys(("normal.Tensor_float", "normal.float_Tensor", "normal.Tensor_Tensor"), Composite(_normal)),
    **{name: Composite(body) for name, body in RECURRENT.items()},
}
