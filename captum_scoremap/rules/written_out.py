"""Operations written out so that autograd derives them everywhere, and twice.

Some kernels have no second derivative. And some functions have an infinite slope at an edge of where they are defined,
as √x has at 0, where a tangent is no linear form: there they are taken for constant, with a slope of zero.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table

__all__ = ["WRITTEN_OUT"]

aten = torch.ops.aten


def _level(operation: Any, is_edge: Callable[..., Tensor], inside: float, moved: int = 0) -> Callable[..., Tensor]:
    """Return an operation that is level at its edges, where ``inside`` stands for the argument ``moved``."""

    def level(*args: Any) -> Tensor:
        edge, others = is_edge(*args), list(args)
        others[moved] = torch.where(edge, inside, others[moved])
        return torch.where(edge, operation(*args).detach(), operation(*others))

    return level


def _root(x: Tensor) -> Tensor:
    root: Tensor = WRITTEN_OUT[aten.sqrt.default](x)
    return root


def _norm(x: Tensor, p: float = 2.0, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    found: Tensor = aten.linalg_vector_norm.default(x, p, dim, keepdim, dtype=dtype)
    if p <= 0 or p in {1.0, 2.0, torch.inf}:
        return found
    powers = torch.where(x == 0, 0.0, x.masked_fill(x == 0, 1.0).abs() ** p).sum(dim, keepdim, dtype=dtype)
    return torch.where(found == 0, 0.0, powers.masked_fill(found == 0, 1.0) ** (1 / p))


def _many_distances(x1: Tensor, x2: Tensor) -> Tensor:
    """Return distances of many rows, which the kernel finds by a product; level where that is nothing but rounding."""
    sizes = x1.square().sum(-1, keepdim=True) + x2.square().sum(-1, keepdim=True).mT
    squares = sizes - 2 * x1 @ x2.mT
    found = _root(squares.masked_fill(squares <= x1.shape[-1] * torch.finfo(sizes.dtype).eps * sizes, 0.0))
    rounding: Tensor = aten._euclidean_dist.default(x1, x2) - found
    return found + rounding.detach()


def _eigh(matrix: Tensor, uplo: str = "L", compute_v: bool = True) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, whose derivative takes the eigenvectors, and those if they are wanted."""
    values, vectors = aten._linalg_eigh.default(matrix, uplo)
    return values, vectors if compute_v else vectors.new_empty(0)


def _svd(
    matrix: Tensor, full_matrices: bool = False, compute_uv: bool = True, *, driver: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return singular values, whose derivative takes the singular vectors, between those if they are wanted."""
    left, values, right = aten._linalg_svd.default(matrix, full_matrices, driver=driver)
    return (left, values, right) if compute_uv else (left.new_empty(0), values, right.new_empty(0))


def _hardsigmoid_backward(gradient: Tensor, x: Tensor) -> Tensor:
    sixth = torch.tensor(1 / 6, dtype=torch.float32).item()  # as the kernel has it, in any type
    return torch.where((x > -3) & (x < 3), gradient * sixth, 0.0 * x)


def _through_input(operation: Any, *statistics: int) -> Callable[..., Any]:
    """Return the backward operation of a norm: what it derives by its input counts the mean and the scale of it in."""

    def backward(*args: Any) -> Any:
        return operation(*(detached(arg) if i in statistics else arg for i, arg in enumerate(args)))

    def detached(arg: Tensor | None) -> Tensor | None:
        return None if arg is None else arg.detach()

    return backward


def _group_norm_backward(
    gradient: Tensor, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None, n: int, c: int, hw: int, *rest: Any
) -> tuple[Tensor, ...]:
    """Write the same for the norm of groups, with the mean and the scale made of the input once more."""
    groups = x.reshape(*scale.shape, -1)
    variance = groups.var(-1, correction=0)
    scale = (variance + (scale**-2 - variance).detach()).rsqrt()
    operation = decomposition_table[aten.native_group_norm_backward.default]
    return tuple(operation(gradient, x, groups.mean(-1), scale, weight, n, c, hw, *rest))


# Kernels without a second derivative, which PyTorch itself writes out in operations that have one.
_DERIVED_ONCE = (
    aten.silu_backward.default,
    aten.mish_backward.default,
    aten.log_sigmoid_backward.default,
)

_BATCH_NORMS = (aten.native_batch_norm.default, aten._native_batch_norm_legit_no_training.default)

WRITTEN_OUT: dict[Any, Callable[..., Any]] = {
    aten.linalg_vector_norm.default: _norm,
    aten._cdist_forward.default: lambda x1, x2, p, *_: _norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1),
    aten._euclidean_dist.default: _many_distances,
    aten._linalg_eigh.default: _eigh,
    aten._linalg_svd.default: _svd,
    aten.sqrt.default: _level(aten.sqrt.default, lambda x: x == 0, 1.0),
    aten.asin.default: _level(aten.asin.default, lambda x: x.abs() == 1, 0.0),
    aten.acos.default: _level(aten.acos.default, lambda x: x.abs() == 1, 0.0),
    aten.acosh.default: _level(aten.acosh.default, lambda x: x == 1, 2.0),
    aten.sinc.default: _level(aten.sinc.default, lambda x: x == 0, 1.0),
    aten.special_entr.default: _level(aten.special_entr.default, lambda x: x == 0, 1.0),
    aten.hypot.default: _level(aten.hypot.default, lambda x, y: (x == 0) & (y == 0), 1.0),
    aten.atan2.default: _level(aten.atan2.default, lambda x, y: (x == 0) & (y == 0), 1.0),
    aten.xlogy.Tensor: _level(aten.xlogy.Tensor, lambda x, y: (x == 0) & (y == 0), 1.0, moved=1),
    aten.pow.Tensor_Tensor: _level(aten.pow.Tensor_Tensor, lambda x, n: (x == 0) & (n.real < 1), 1.0),
    **{one: decomposition_table[one] for one in _DERIVED_ONCE},
    # on a CPU its own backward pass is wrong for a contiguous argument and coefficients in channels-last order
    **{one: decomposition_table[one] for one in _BATCH_NORMS},
    aten.native_layer_norm_backward.default: _through_input(aten.native_layer_norm_backward.default, 3, 4),
    aten.native_batch_norm_backward.default: _through_input(aten.native_batch_norm_backward.default, 5, 6),
    aten.native_group_norm_backward.default: _group_norm_backward,
    aten.hardsigmoid_backward.default: _hardsigmoid_backward,
    aten.std.correction: lambda *args, **kwargs: _root(torch.var(*args, **kwargs)),
}
