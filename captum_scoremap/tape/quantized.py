"""What quantized tensors stand for: real numbers, which alone are values of the tape."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_scoremap.rules import MaxPool, Rounded, Rule, substituted, tensors_in
from captum_scoremap.rules.quantized import in_range, unpacked

from .changes import Changes
from .live import Live
from .operation import Operation
from .sight import Sight

__all__ = ["RealNumbers", "Rounding"]


class RealNumbers:
    """The real numbers behind the quantized tensors of a run, as tensors that are recorded."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}

    def __bool__(self) -> bool:
        return bool(self._known)

    def of(self, tensor: Tensor) -> Tensor | None:
        """Return what a quantized tensor that depends on the image stands for; None for any other tensor."""
        reference, numbers = self._known.get(id(tensor), (None, None))
        return numbers if reference is not None and reference() is tensor else None

    def stand(self, tensor: Tensor, numbers: Tensor) -> None:
        """Note what a quantized tensor stands for."""
        self._known[id(tensor)] = weakref.ref(tensor), numbers

    def are_in(self, arguments: Any) -> bool:
        """Return whether a quantized tensor that depends on the image is among some arguments."""
        return any(self.of(tensor) is not None for tensor in tensors_in(arguments))

    def are_moved(self, rule: Rule | None, arguments: Any) -> bool:
        """Return whether an operation makes of real numbers what it makes of the integers: it moves or chooses them."""
        encoded = [tensor for tensor in tensors_in(arguments) if self.of(tensor) is not None]
        return all(tensor.is_quantized for tensor in encoded) or isinstance(rule, MaxPool) or bool(rule and rule.moves)

    def instead(self, arguments: Any) -> tuple[Any, list[Tensor]]:
        """Return arguments with real numbers for what is quantized or packed, and the constants that were made here."""
        made: list[Tensor] = []

        def real(tensor: Tensor) -> Tensor:
            numbers = self.of(tensor)
            if numbers is None and tensor.is_quantized:
                numbers = tensor.dequantize()
                made.append(numbers)
            return tensor if numbers is None else numbers

        found = substituted(arguments, real)
        if isinstance(found, tuple):
            packed = [unpacked(one) for one in found]
            made += [
                tensor for one, old in zip(packed, found, strict=True) if one is not old for tensor in tensors_in(one)
            ]
            found = tuple(packed)
        return found, made

    def share_memory(self, changed: Tensor) -> bool:
        """Return whether another tensor lies in memory that was changed in place."""
        address = changed.untyped_storage()._cdata
        others = [one for reference, _ in self._known.values() if (one := reference()) is not None]
        return any(one is not changed and one.untyped_storage()._cdata == address for one in others)


class Rounding:
    """Runs what computes with quantized tensors, or rounds: the plain operation is recorded, and the rounding apart."""

    def __init__(
        self, real: RealNumbers, live: Live, sight: Sight, changes: Changes, recorded: Callable[..., Any]
    ) -> None:
        self._real, self._live, self._sight = real, live, sight
        self._changes, self._recorded = changes, recorded

    def run(self, func: Any, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation on quantized tensors, or one that rounds, and record the plain one and the rounding."""
        rule, where = operation.rule, operation.changes
        body = rule.body if isinstance(rule, Rounded) else operation.functional
        if not operation.rounds and not self._real.are_moved(rule, args):
            if not operation.reads:
                return self._changes.run_constant(func, operation, args, kwargs)
            raise self._sight.refused(f"quantized {operation.display}")
        output = self._changes.run_constant(func, operation, args, kwargs)
        parts = output if isinstance(output, (tuple, list)) else (output,)
        if not any(isinstance(part, Tensor) for part in parts):
            return output  # a scale, a type
        changed = None if where is None or isinstance(rule, Rounded) else args[where]
        real, named = self._real.instead(args), self._real.instead(kwargs)
        for tensor in (*real[1], *named[1]):
            self._sight.made(tensor)
        try:
            plain = self._recorded(body, *real[0], **named[0])
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):  # there is none
            plain = None
        plains = list(plain) if isinstance(plain, (tuple, list)) else [plain]
        if plain is None or (changed is not None and self._real.share_memory(changed)):
            raise self._sight.refused(operation.display)
        mask = parts[1] if len(parts) > len(plains) and parts[1].dtype is torch.bool else None
        for rounded, numbers in zip(parts, plains, strict=False):
            if not rounded.is_quantized and not rounded.is_floating_point():
                self._real.stand(rounded, numbers)
                continue
            kept, constant = _rounding(numbers, rounded, mask)
            for tensor in tensors_in((kept, constant)):
                self._sight.made(tensor)
            exact = self._recorded(_rounded, numbers, kept, constant)
            value = self._live.value_of(exact)
            if rounded.is_quantized:
                self._real.stand(rounded, exact)
            elif value is not None:
                self._live.name(rounded, value)
        return output


def _rounded(numbers: Tensor, kept: Tensor | None, constant: Tensor | None) -> Tensor:
    exact = numbers if kept is None else numbers * kept
    return exact if constant is None else exact + constant


def _rounding(plain: Tensor, rounded: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return what rounding does to real numbers, y = mask · x + constant; None for a mask of ones, for zeros."""
    numbers = rounded.dequantize() if rounded.is_quantized else rounded
    if mask is None and rounded.is_quantized and rounded.qscheme() is torch.per_tensor_affine:
        mask = in_range(plain, rounded.q_scale(), rounded.q_zero_point(), rounded.int_repr().dtype)
    if mask is not None:
        mask = None if bool(mask.all()) else mask.to(plain.dtype)
    constant = numbers - (plain if mask is None else plain * mask)
    return mask, constant if bool(constant.any()) else None
