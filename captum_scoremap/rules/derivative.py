"""Derivatives of functions at a point, as autograd takes them: pulled back as coefficients, or pushed forward."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from captum_scoremap.checks import NoDerivativeError

from .call import Call, floating

__all__ = ["named", "pulled_back", "pushed"]

Function = Callable[..., Any]

_NO_FORMULA = "no autograd formula is registered for the operation"
_UNDERIVABLE = (_NO_FORMULA, "is not differentiable with respect to", "derivative for aten::", "has no derivative")


def pulled_back(
    function: Function, points: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return Jᵀ·u: the coefficients of a function's outputs as those of its arguments; None stands for zero."""

    def outputs(*live: Tensor) -> tuple[Tensor, ...]:
        found = floating(function(*live))
        return tuple(out for out, gradient in zip(found, gradients, strict=False) if gradient is not None)

    chosen = tuple(gradient for gradient in gradients if gradient is not None)
    with sdpa_kernel(SDPBackend.MATH):
        if torch._C._functorch.peek_interpreter_stack() is not None:  # coefficients of several labels at once
            return list(torch.func.vjp(outputs, *points)[1](chosen))
        keeps_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # a model that takes gradients has graphs of its own; arguments may depend on one another, or be one tensor
            leaves = [p.view_as(p) if keeps_graph and p.requires_grad else p.detach().requires_grad_() for p in points]
            outs = outputs(*leaves)
            if any(out.requires_grad for out in outs):
                _check_derivable(outs)
            pairs = [pair for pair in zip(outs, chosen, strict=True) if pair[0].requires_grad]
        if not pairs:
            return [None] * len(leaves)
        outs, seeds = zip(*pairs, strict=True)
        found = torch.autograd.grad(outs, leaves, seeds, allow_unused=True, create_graph=torch.is_grad_enabled())
        return list(found)


def pushed(
    function: Function, points: Sequence[Tensor], moves: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Return a function's values and J·v, the transpose of u -> Jᵀ·u, which is linear and so the same at any u."""

    def outputs(*live: Tensor) -> tuple[Tensor, ...]:
        return tuple(floating(function(*live)))

    with sdpa_kernel(SDPBackend.MATH):  # of the kernels of attention only the plain one can be derived twice
        try:
            if torch._C._functorch.peek_interpreter_stack() is None:
                return _pushed_twice_back(outputs, points, moves)
            values, pull = torch.func.vjp(outputs, *points)[:2]
            return values, torch.func.vjp(pull, tuple(map(torch.ones_like, values)))[1](moves)[0]
        except (RuntimeError, NotImplementedError):  # a kernel that can be derived once
            return _pushed_one_by_one(outputs, points, moves)


def _pushed_twice_back(
    function: Function, points: Sequence[Tensor], moves: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    with torch.enable_grad():
        leaves, outs = _derived(function, points)
        derived = [out for out in outs if out.requires_grad]
        seeds = [torch.ones_like(out, requires_grad=True) for out in derived]
        pulled = torch.autograd.grad(derived, leaves, seeds, create_graph=True, allow_unused=True)
    pairs = [(one, move) for one, move in zip(pulled, moves, strict=True) if one is not None]
    if not pairs or not all(one.requires_grad for one, _ in pairs):
        raise NotImplementedError("the derivative has no derivative")
    ones, directions = zip(*pairs, strict=True)
    changes = iter(torch.autograd.grad(ones, seeds, directions, allow_unused=True, materialize_grads=True))
    return [out.detach() for out in outs], [
        next(changes) if out.requires_grad else torch.zeros_like(out) for out in outs
    ]


def _pushed_one_by_one(
    function: Function, points: Sequence[Tensor], moves: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the same by reverse mode alone, one backward pass for each element of the output."""
    with torch.enable_grad():
        leaves, outs = _derived(function, points)
        elements = [out.reshape(-1).unbind() if out.requires_grad else () for out in outs]
    values, changes = [], []
    for out, flat in zip(outs, elements, strict=True):
        change = torch.zeros_like(out.detach()).reshape(-1)
        for index, element in enumerate(flat):
            rows = torch.autograd.grad(element, leaves, retain_graph=True, allow_unused=True)
            if all(row is None for row in rows):
                raise NotImplementedError(_NO_FORMULA)
            pairs = zip(rows, moves, strict=True)
            change[index] = sum(float((row * move).sum()) for row, move in pairs if row is not None)
        values.append(out.detach())
        changes.append(change.reshape(out.shape))
    return values, changes


def _derived(function: Function, points: Sequence[Tensor]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    leaves = [point.detach().requires_grad_() for point in points]
    outs = function(*leaves)
    _check_derivable(outs)
    return leaves, outs


def _check_derivable(outs: Sequence[Tensor]) -> None:
    """Raise NotImplementedError if autograd knows no derivative of an operation, rather than take it for zero."""
    nodes = [out.grad_fn for out in outs if out.requires_grad]
    if not nodes or any(node is not None and node.name() == "WarnNotImplemented" for node in nodes):
        raise NotImplementedError(_NO_FORMULA)


@contextmanager
def named(call: Call) -> Iterator[None]:
    """Raise NoDerivativeError, which names the operation, where autograd does not know its derivative."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _UNDERIVABLE):
            raise
        raise NoDerivativeError(call.operation.overloadpacket.__name__, error) from error  # type: ignore[attr-defined]
