"""What computes with quantized tensors, or rounds: the plain operation is recorded, and the rounding apart."""

from typing import Any

import torch
from torch import Tensor

from captum_scoremap.checks import is_traced
from captum_scoremap.rules import Rounded, tensors_in
from captum_scoremap.rules.quantized import EIGHT_BITS, decoded, in_range, is_encoded

from .changes import run_constant
from .operation import Operation
from .run import Run
from .writing import not_to_change

__all__ = ["casts", "run_rounding"]


def casts(operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether an operation casts plain numbers to 8 bits: what it returns, or as it writes them there."""
    if operation.changes is not None:
        target = args[operation.changes]  # of operations on lists, several
        return isinstance(target, Tensor) and target.dtype in EIGHT_BITS
    return bool(kwargs) and kwargs.get("dtype") in EIGHT_BITS


def run_rounding(run: Run, func: Any, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on quantized tensors, or one that rounds, and record the plain one and the rounding."""
    rule, where = operation.rule, operation.changes
    if where is not None and operation.rounds and operation.functional is not None:
        rounded = run.recorded(operation.functional, *args, **kwargs)  # while what it rounds is still there
        return run.recorded(args[where].copy_, rounded)
    body = rule.body if isinstance(rule, Rounded) else operation.functional
    is_cast = casts(operation, args, kwargs)
    if not operation.rounds and not is_cast and not run.real.are_moved(rule, args):
        if not operation.reads:
            return run_constant(run, func, operation, args, kwargs)
        raise run.sight.refused(f"quantized {operation.display}")
    output = run_constant(run, func, operation, args, kwargs)
    parts = output if isinstance(output, (tuple, list)) else (output,)
    if not any(isinstance(part, Tensor) for part in parts):
        return output  # a scale, a type
    changed = None if where is None or isinstance(rule, Rounded) else args[where]
    given = {name: argument for name, argument in kwargs.items() if not (is_cast and name == "dtype")}
    real, named = run.real.instead(args), run.real.instead(given)
    for tensor in (*real[1], *named[1]):
        run.made(tensor)
    try:
        plain = run.recorded(body, *real[0], **named[0])
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):  # there is none
        plain = None
    plains = list(plain) if isinstance(plain, (tuple, list)) else [plain]
    if plain is None:
        is_named = operation.display.startswith("quantized")
        raise run.sight.refused(operation.display if is_named else f"quantized {operation.display}")
    if changed is not None and not run.memory.is_alone(changed):
        raise not_to_change(run, operation, changed)
    mask = parts[1] if len(parts) > len(plains) and parts[1].dtype is torch.bool else None
    for rounded, numbers in zip(parts, plains, strict=False):
        if (is_encoded(rounded) or not rounded.is_floating_point()) and numbers.stride() != rounded.stride():
            numbers = run.recorded(_laid_out, numbers, rounded.stride())  # views of both must show the same elements
        if not is_encoded(rounded) and not rounded.is_floating_point():
            run.real.stand(rounded, numbers)
            continue
        kept, constant = _rounding(numbers, rounded, mask)
        for tensor in tensors_in((kept, constant)):
            run.made(tensor)
        exact = run.recorded(_rounded, numbers, kept, constant)
        if is_encoded(rounded):
            run.real.stand(rounded, exact)
            continue
        if exact.dtype != rounded.dtype:
            exact = run.recorded(exact.to, rounded.dtype)
        value = run.value_of(exact)
        if value is not None:
            run.name(rounded, value)
    return output


def _laid_out(numbers: Tensor, strides: tuple[int, ...]) -> Tensor:
    return torch.empty_strided(numbers.shape, strides, dtype=numbers.dtype, device=numbers.device).copy_(numbers)


def _rounded(numbers: Tensor, kept: Tensor | None, constant: Tensor | None) -> Tensor:
    exact = numbers if kept is None else numbers * kept
    return exact if constant is None else exact + constant


def _rounding(plain: Tensor, rounded: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return what rounding does to real numbers, y = mask · x + constant; None for a mask of ones, for zeros.

    A graph that is traced, which must hold at other images, has both.
    """
    numbers = decoded(rounded, plain.dtype)
    if mask is None and rounded.is_quantized and rounded.qscheme() is torch.per_tensor_affine:
        mask = in_range(plain, rounded.q_scale(), rounded.q_zero_point(), rounded.int_repr().dtype)
    if mask is not None:
        mask = None if not is_traced() and bool(mask.all()) else mask.to(plain.dtype)
    constant = numbers - (plain if mask is None else plain * mask)
    return mask, constant if is_traced() or bool(constant.any()) else None
