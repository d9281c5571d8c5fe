"""Derivatives of functions at a point, as autograd takes them: pulled back as coefficients, or pushed forward."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from captum_scoremap.settings import plain_attention

from .call import Call, floating

__all__ = ["NoDerivativeError", "is_derivable", "named", "pulled_back", "pushed"]

Function = Callable[..., Any]

_NO_FORMULA = "no autograd formula is registered for the operation"
_OF_PHASES = "ill-defined"
_NO_KERNEL = "not implemented for '"  # a type of numbers
_UNDERIVABLE = (
    _NO_FORMULA,
    _NO_KERNEL,
    "is not differentiable with respect to",
    "derivative for ",
    "has no derivative",
    _OF_PHASES,
)


class NoDerivativeError(ValueError):
    """An operation, or a rule, whose derivative autograd does not know.

    Example:
        >>> str(NoDerivativeError("floor", NotImplementedError("no formula"))).partition(",")[0]
        'floor must have a derivative to take'
    """

    def __init__(self, what: str, error: BaseException) -> None:
        said = str(error).splitlines()[0]
        advice = (
            "Explain model.float()."
            if _NO_KERNEL in said
            else "Use Frozen() where the operation is constant around the image, or derive a class from Rule."
        )
        super().__init__(f"{what} must have a derivative to take, got {said!r}. {advice}")


def _is_batched() -> bool:
    """Return whether this runs inside of functorch's transforms, such as ``torch.vmap``."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def pulled_back(
    function: Function, points: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return Jᵀ·u: the coefficients of a function's outputs as those of its arguments; None stands for zero."""

    def outputs(*live: Tensor) -> tuple[Tensor, ...]:
        found = floating(function(*live))
        return tuple(out for out, gradient in zip(found, gradients, strict=False) if gradient is not None)

    chosen = tuple(gradient for gradient in gradients if gradient is not None)
    with plain_attention():
        if _is_batched():  # coefficients of several labels at once
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

    is_batched = _is_batched()
    if not is_batched and torch.is_grad_enabled() and any(move.requires_grad for move in moves):
        found = _Pushed.apply(function, tuple(points), *moves)
        return found[: len(found) // 2], found[len(found) // 2 :]
    with plain_attention():  # of the kernels of attention only the plain one can be derived twice
        try:
            if not is_batched:
                return _pushed_twice_back(outputs, points, moves)
            values, pull = torch.func.vjp(outputs, *points)[:2]
            return values, torch.func.vjp(pull, tuple(map(torch.ones_like, values)))[1](moves)[0]
        except (RuntimeError, NotImplementedError) as error:
            if _OF_PHASES in str(error):  # of vectors that are told up to a phase: forward mode takes one
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that PyTorch scripts functions
                    values, changes = torch.func.jvp(outputs, tuple(points), tuple(moves))[:2]
                return values, changes
            return _pushed_one_by_one(outputs, points, moves)  # a kernel that can be derived once


class _Pushed(torch.autograd.Function):
    """J·v as autograd sees it: a function of v, linear, whose transpose is u -> Jᵀ·u."""

    @staticmethod
    def forward(ctx: Any, function: Function, points: tuple[Tensor, ...], *moves: Tensor) -> tuple[Tensor, ...]:
        """Return the values, which are constants, and J·v."""
        ctx.function, ctx.points = function, points
        values, changes = pushed(function, points, moves)
        ctx.mark_non_differentiable(*values)
        return (*values, *changes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return Jᵀ·u."""
        return None, None, *pulled_back(ctx.function, ctx.points, gradients[len(gradients) // 2 :])


def _pushed_twice_back(
    function: Function, points: Sequence[Tensor], moves: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    with torch.enable_grad():
        leaves, outs = _derived(function, points)
        derived = [out for out in outs if out.requires_grad]
        # of all sizes, so that no sum of them vanishes by chance
        seeds = [torch.linspace(1, 2, out.numel()).to(out).reshape(out.shape).requires_grad_() for out in derived]
        pulled = torch.autograd.grad(derived, leaves, seeds, create_graph=True, allow_unused=True)
    # what is zero whatever the seeds, as the slope of a sign is, has no derivative
    pairs = [
        (one, move)
        for one, move in zip(pulled, moves, strict=True)
        if one is not None and (one.requires_grad or bool(one.any()))
    ]
    if all(one is None for one in pulled) or not all(one.requires_grad for one, _ in pairs):
        raise NotImplementedError("the derivative has no derivative")
    if not pairs:
        return [out.detach() for out in outs], [torch.zeros_like(out) for out in outs]
    ones, directions = zip(*pairs, strict=True)
    changes = iter(torch.autograd.grad(ones, seeds, directions, allow_unused=True, materialize_grads=True))
    return [out.detach() for out in outs], [
        next(changes) if out.requires_grad else torch.zeros_like(out) for out in outs
    ]


def _pushed_one_by_one(
    function: Function, points: Sequence[Tensor], moves: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the same by reverse mode alone, one backward pass for each element of the output."""
    values, is_derived, pull = (_pulls_of_batches if _is_batched() else _pulls)(function, points)
    changes = []
    for number, value in enumerate(values):
        change = [torch.zeros_like(value).sum()] * value.numel()
        for place in range(value.numel()) if is_derived[number] else ():
            seed = torch.zeros_like(value, memory_format=torch.contiguous_format)
            seed.view(-1)[place] = 1.0
            pairs = zip(pull(number, seed), moves, strict=True)
            change[place] = sum(((row * move).sum() for row, move in pairs), change[place])
        changes.append(torch.stack(change).reshape(value.shape) if change else torch.zeros_like(value))
    return values, changes


Pull = Callable[[int, Tensor], Sequence[Tensor]]
"""From the number of an output and its coefficients to those of the arguments."""


def _pulls(function: Function, points: Sequence[Tensor]) -> tuple[list[Tensor], list[bool], Pull]:
    """Return a function's values, whether each depends on the arguments, and what pulls its coefficients back."""
    with torch.enable_grad():
        leaves, outs = _derived(function, points)

    def pull(number: int, seed: Tensor) -> Sequence[Tensor]:
        return torch.autograd.grad(
            outs[number], leaves, seed, retain_graph=True, allow_unused=True, materialize_grads=True
        )

    return [out.detach() for out in outs], [out.requires_grad for out in outs], pull


def _pulls_of_batches(function: Function, points: Sequence[Tensor]) -> tuple[list[Tensor], list[bool], Pull]:
    """Return the same inside of functorch's transforms, which some operations do not bear."""
    is_derived: list[bool] = []

    def noted(*live: Tensor) -> tuple[Tensor, ...]:
        outs: tuple[Tensor, ...] = function(*live)
        is_derived.extend(out.requires_grad for out in outs)
        return outs

    values, pull_all = torch.func.vjp(noted, *points)[:2]

    def pull(number: int, seed: Tensor) -> Sequence[Tensor]:
        seeds = tuple(seed if at == number else torch.zeros_like(value) for at, value in enumerate(values))
        found: Sequence[Tensor] = pull_all(seeds)
        return found

    return [value.detach() for value in values], is_derived, pull


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


def is_derivable(call: Call) -> bool:
    """Return whether autograd can derive an operation, or at least one of its outputs.

    The call has tensors for its live arguments, and an output. Of several outputs some may have no derivative, as
    eigenvectors that are told up to a phase have none, while eigenvalues do.
    """
    outputs = floating(call.output)
    return any(_has_derivative(call, [place == at for place in range(len(outputs))]) for at in range(len(outputs)))


def _has_derivative(call: Call, are_asked: Sequence[bool]) -> bool:
    """Return whether autograd can derive the outputs that are asked for."""
    seeds = [
        torch.ones_like(one) if asked else None for one, asked in zip(floating(call.output), are_asked, strict=True)
    ]
    try:
        shares = pulled_back(lambda *live: call.filled(live).written_out(), call.live, seeds)
    except (RuntimeError, TypeError, ValueError) as error:  # those of a user's own formula, too
        return _NO_KERNEL in str(error)  # for one type of numbers
    return any(share is not None for share in shares)


@contextmanager
def named(call: Call) -> Iterator[None]:
    """Raise NoDerivativeError, which names the operation, where autograd does not know its derivative."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _UNDERIVABLE):
            raise
        raise NoDerivativeError(call.operation.overloadpacket.__name__, error) from error  # type: ignore[attr-defined]
