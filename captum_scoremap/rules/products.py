"""Products: operations that are linear in each factor alone, and division."""

from typing import Any

import torch
from torch import Tensor

from .rule import Call, Rule, tensors_in

__all__ = ["Convolution", "Division", "Power", "Product"]


class Product(Rule):
    """An operation linear in each of its factors: mul, matmul, einsum, convolution, linear, ...

    - One live factor: the operation is linear already.
    - A live factor that is a gate (a sigmoid, attention weights, 1/norm) beside one that is none: the gate is frozen.
    - Several live factors x, y: each in turn, in equal shares, ½(ȳ·x + x̄·y), which at the image is x·y. Freezing only
      one would depend on which is written first; the full derivative would count the product twice.

    Terms that are added (a convolution's bias) enter every share alike and so stay as they are.

    Args:
        factors: Positions of the factors; None for all positional arguments.
        names: Their keywords.
        keeps_gates: Whether the product of gates is a gate.

    Example:
        >>> from captum_scoremap import freeze
        >>> freeze(lambda x: x * x.flip(1), torch.tensor([[1.0, 2.0]]))(torch.ones(1, 2))
        tensor([[1.5000, 1.5000]])
    """

    kind = "product"

    def __init__(
        self,
        factors: tuple[int, ...] | None = (0, 1),
        names: tuple[str, ...] = ("input", "other"),
        *,
        keeps_gates: bool = False,
    ) -> None:
        self.factors = factors
        self.names = names
        self.keeps_gates = keeps_gates

    def is_affine(self, call: Call) -> bool:
        """Where only one factor is live."""
        return len(call.live) < 2 or len(self._live(call)) < 2

    def freeze(self, call: Call) -> dict[int | str, Tensor]:
        """Values of the live factors."""
        return {place: call.frozen(tensor) for place, tensor in self._live(call).items()}

    def apply(self, call: Call, state: dict[int | str, Tensor]) -> Any:
        """The mean, over the live factors that are no gates, of the product with all others frozen."""
        live = self._live(call)
        gates = {place for place, tensor in live.items() if call.is_gate(tensor)}
        turns = [place for place in live if place not in gates] or list(live)
        total: Any = None
        for turn in turns:
            args = [state[i] if i in state and i != turn else value for i, value in enumerate(call.args)]
            kwargs = {k: state[k] if k in state and k != turn else value for k, value in call.kwargs.items()}
            share = call.function(*args, **kwargs)
            total = share if total is None else total + share
        return total if len(turns) == 1 else total / len(turns)

    def makes_gate(self, call: Call) -> bool:
        """Where all live factors are gates."""
        return self.keeps_gates and call.only_gates()

    def _live(self, call: Call) -> dict[int | str, Tensor]:
        positions = range(len(call.args)) if self.factors is None else self.factors
        places: list[tuple[int | str, Any]] = [(i, call.args[i]) for i in positions if i < len(call.args)]
        places += [(name, call.kwargs[name]) for name in self.names if name in call.kwargs]
        return {place: value for place, value in places if isinstance(value, Tensor) and call.is_live(value)}


class Convolution(Product):
    """A convolution, of a batch.

    PyTorch also convolves a single image without a batch dimension; what comes out would then be taken for a batch.

    Args:
        dimensions: Of the kernel.
    """

    def __init__(self, dimensions: int) -> None:
        super().__init__((0, 1), ("input", "weight"))
        self.dimensions = dimensions

    def is_affine(self, call: Call) -> bool:
        """Where only one factor is live.

        Returns:
            Whether it is so.

        Raises:
            ValueError: If there is no batch dimension.
        """
        if call.input.dim() == self.dimensions + 1:
            raise ValueError(
                f"inputs must have a batch dimension, (N, C, ...); got {tuple(call.input.shape)} at a convolution. "
                "Use inputs[None]."
            )
        return super().is_affine(call)


class Division(Rule):
    """A quotient x / y with the denominator frozen: a normalization's norm is a scale, not a score of its own.

    A live denominator under a constant numerator is a scale with nothing to multiply: its tangent is taken.

    Args:
        reversed: Whether the denominator comes first (``__rtruediv__``).

    Example:
        >>> from captum_scoremap import freeze
        >>> freeze(lambda x: x / x.sum(1, keepdim=True), torch.tensor([[1.0, 3.0]]))(torch.ones(1, 2))
        tensor([[0.2500, 0.2500]])
    """

    kind = "scale"

    def __init__(self, *, reversed: bool = False) -> None:
        self.reversed = reversed

    def is_affine(self, call: Call) -> bool:
        """Where the denominator is not live and nothing is rounded."""
        _, denominator = self._parts(call)
        live = isinstance(denominator, Tensor) and call.is_live(denominator)
        return not live and call.kwargs.get("rounding_mode") is None

    def freeze(self, call: Call) -> Tensor:
        """The denominator; the whole quotient where it is rounded."""
        _, denominator = self._parts(call)
        return call.run() if call.kwargs.get("rounding_mode") is not None else call.frozen(denominator)

    def apply(self, call: Call, state: Tensor) -> Any:
        """The numerator over the frozen denominator."""
        if call.kwargs.get("rounding_mode") is not None:
            return state
        numerator, denominator = self._parts(call)
        if isinstance(numerator, Tensor) and call.is_live(numerator):
            return numerator / state
        # c/y = c/ȳ - c/ȳ² (y - ȳ)
        return numerator / state * (2 - denominator / state)

    def makes_gate(self, call: Call) -> bool:
        """Where the numerator is a gate (exp/sum of exp) or a constant (1/norm)."""
        numerator, _ = self._parts(call)
        return not (isinstance(numerator, Tensor) and call.is_live(numerator)) or call.is_gate(numerator)

    def _parts(self, call: Call) -> tuple[Any, Any]:
        def parts(input: Any, other: Any, **_: Any) -> tuple[Any, Any]:
            return (other, input) if self.reversed else (input, other)

        return parts(*call.args, **call.kwargs)


class Power(Rule):
    """A constant power xⁿ: for n > 0 the gate xⁿ⁻¹ times x, else the tangent (a scale such as 1/√x).

    Example:
        >>> from captum_scoremap import freeze
        >>> freeze(lambda x: x**3, torch.tensor([[2.0]]))(torch.ones(1, 1))
        tensor([[4.]])
    """

    kind = "gate"

    def freeze(self, call: Call) -> tuple[Tensor, Tensor | float]:
        """Slope and offset.

        Returns:
            The two; the offset is 0 for a gate.

        Raises:
            TypeError: If the exponent is live.
        """
        x, exponent = self._parts(call)
        if any(call.is_live(tensor) for tensor in tensors_in(exponent)):
            raise TypeError(
                "pow must have an exponent that does not depend on the image, got one that does. Supply a rule for it: "
                "rules={'pow': Tangent()}."
            )
        value = torch.pow(x, exponent)
        slope = torch.pow(x, exponent - 1)
        positive = torch.as_tensor(exponent) > 0
        if bool(positive.all()):
            return torch.where(x == 0, torch.zeros_like(slope), slope) if not _is_one(exponent) else slope, 0.0
        return slope * exponent, value - slope * exponent * x

    def apply(self, call: Call, state: tuple[Tensor, Tensor | float]) -> Tensor:
        """Slope * x + offset."""
        slope, offset = state
        x, _ = self._parts(call)
        return x * slope if isinstance(offset, float) else x * slope + offset

    def makes_gate(self, call: Call) -> bool:
        """Where the power is negative or a root: a scale."""
        _, exponent = self._parts(call)
        return call.only_gates() or bool((torch.as_tensor(exponent) < 1).all())

    @staticmethod
    def _parts(call: Call) -> tuple[Tensor, Any]:
        def parts(input: Tensor, exponent: Any) -> tuple[Tensor, Any]:
            return input, exponent

        return parts(*call.args, **call.kwargs)


def _is_one(exponent: Any) -> bool:
    return bool((torch.as_tensor(exponent) == 1).all())
