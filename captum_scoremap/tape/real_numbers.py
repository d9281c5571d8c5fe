"""What quantized tensors stand for: real numbers, which alone are values of the tape."""

import weakref
from typing import Any

from torch import Tensor

from captum_scoremap.rules import MaxPool, Rule, substituted, tensors_in
from captum_scoremap.rules.quantized import unpacked

__all__ = ["RealNumbers"]


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
