"""What quantized tensors stand for: real numbers, which alone are values of the tape."""

import weakref
from typing import Any

import torch
from torch import Tensor

from captum_scoremap.rules import MaxPool, Rule, substituted, tensors_in
from captum_scoremap.rules.quantized import decoded, is_encoded, unpacked

__all__ = ["RealNumbers"]


class RealNumbers:
    """The real numbers behind the quantized tensors of a run, as tensors that are recorded.

    Attributes:
        known: Of each such tensor, by its identity, itself and the numbers.
    """

    def __init__(self) -> None:
        self.known: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}

    def of(self, tensor: Tensor) -> Tensor | None:
        """Return what a quantized tensor that depends on the image stands for; None for any other tensor."""
        reference, numbers = self.known.get(id(tensor), (None, None))
        return numbers if reference is not None and reference() is tensor else None

    def stand(self, tensor: Tensor, numbers: Tensor) -> None:
        """Note what a quantized tensor stands for."""
        self.known[id(tensor)] = weakref.ref(tensor), numbers

    def are_in(self, arguments: Any) -> bool:
        """Return whether a quantized tensor that depends on the image is among some arguments."""
        return any(self.of(tensor) is not None for tensor in tensors_in(arguments))

    def are_moved(self, rule: Rule | None, arguments: Any) -> bool:
        """Return whether an operation makes of real numbers what it makes of the integers: it moves or chooses them."""
        encoded = [tensor for tensor in tensors_in(arguments) if self.of(tensor) is not None]
        return all(map(is_encoded, encoded)) or isinstance(rule, MaxPool) or bool(rule and rule.moves)

    def instead(self, arguments: Any) -> tuple[Any, list[Tensor]]:
        """Return arguments with real numbers for what is quantized or packed, and the constants that were made here."""
        made: list[Tensor] = []
        plain = [one if (numbers := self.of(one)) is None else numbers for one in tensors_in(arguments)]
        kinds = [one.dtype for one in plain if one.is_floating_point() and not is_encoded(one)]

        def real(tensor: Tensor) -> Tensor:
            numbers = self.of(tensor)
            if numbers is None and is_encoded(tensor):
                numbers = decoded(tensor, kinds[0] if kinds else torch.float32)
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

    def besides(self, args: tuple[Any, ...], where: int) -> tuple[Any, ...]:
        """Return arguments with real numbers for what stands for some, but for the one at a position."""

        def real(tensor: Tensor) -> Tensor:
            numbers = self.of(tensor)
            return tensor if numbers is None else numbers

        return tuple(one if at == where else substituted(one, real) for at, one in enumerate(args))
