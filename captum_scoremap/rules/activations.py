"""Elementwise nonlinear operations: piecewise linear ones, and gates."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .rule import Call, Rule

__all__ = ["Breaks", "Gate", "Pieces", "Select", "SignPieces"]

Number = float | Tensor


@dataclass(frozen=True)
class Breaks:
    """A piecewise linear function of one variable.

    Piece i holds where exactly i of the ``comparisons`` with a break point are true; there f(x) = slope_i x + offset_i.
    """

    comparisons: tuple[tuple[Callable[[Tensor, Number], Tensor], Number], ...]
    slopes: tuple[Number, ...]
    offsets: tuple[Number, ...]


class Pieces(Rule):
    """A piecewise linear function, with the piece each element is on (the mask) frozen: slope * x + offset.

    Which piece a break point itself belongs to follows autograd's convention, so that masks and gradients agree even
    there.

    Args:
        breaks: The function's break points, slopes and offsets, from the operation's own arguments.
    """

    kind = "mask"
    native = True

    def __init__(self, breaks: Callable[..., Breaks], *, native: bool = True, gate: bool = False) -> None:
        self.breaks = breaks
        self.native = native
        self.gate = gate

    def freeze(self, call: Call) -> Tensor:
        """The index of each element's piece: bool where there are two pieces, else uint8."""
        comparisons = self._breaks(call).comparisons
        masks = [compare(call.input, point) for compare, point in comparisons]
        if len(masks) == 1:
            return masks[0]
        return torch.stack([mask.to(torch.uint8) for mask in torch.broadcast_tensors(*masks)]).sum(0, dtype=torch.uint8)

    def apply(self, call: Call, state: Tensor) -> Tensor:
        """Slope * x + offset of the frozen piece."""
        x, breaks = call.input, self._breaks(call)
        if len(breaks.slopes) == 2 and _is_zero(breaks.slopes[0]) and _is_one(breaks.slopes[1]):
            output = x * state
        else:
            output = x * self._choose(breaks.slopes, state, x)
        if any(not _is_zero(offset) for offset in breaks.offsets):
            output = output + self._choose(breaks.offsets, state, x)
        return output

    def adjoint(self, call: Call, state: Tensor) -> Callable[[Tensor], Tensor] | None:
        """Slope * gradient."""
        slopes = self._breaks(call).slopes
        if state.shape != call.input.shape:
            return None
        if set(slopes) == {0.0, 1.0} and not any(isinstance(slope, Tensor) for slope in slopes):
            # a mask of one byte
            mask = state if state.dtype == torch.bool else self._mask(slopes, state)
            mask = mask if slopes[-1] == 1.0 or len(slopes) > 2 else ~mask
            return lambda gradient: gradient * mask.to(gradient.dtype)
        return lambda gradient: gradient * self._choose(slopes, state, gradient)

    @staticmethod
    def _mask(slopes: tuple[Number, ...], state: Tensor) -> Tensor:
        """Where the slope is one."""
        ones = [state == index for index, slope in enumerate(slopes) if slope == 1.0]
        return torch.stack(ones).any(0) if len(ones) > 1 else ones[0]

    def makes_gate(self, call: Call) -> bool:
        """Where it is one of its own, or its argument is (a clamped norm)."""
        return self.gate or call.only_gates()

    def switch(self, state: Tensor) -> Tensor:
        """The mask."""
        return state

    def steps_to_boundary(self, call: Call, tangent: Callable[[Tensor], Tensor], state: Tensor) -> Tensor:
        """Step at which the argument reaches a break point."""
        x, change = call.input, tangent(call.input)
        steps = [(point - x) / change for _, point in self._breaks(call).comparisons]
        return torch.stack(torch.broadcast_tensors(*steps))

    def _breaks(self, call: Call) -> Breaks:
        return self.breaks(*call.args, **call.kwargs)

    @staticmethod
    def _choose(values: tuple[Number, ...], state: Tensor, like: Tensor) -> Tensor:
        chosen = torch.as_tensor(values[0], dtype=like.dtype, device=like.device)
        for index, value in enumerate(values[1:], start=1):
            here = state if state.dtype == torch.bool else state == index
            chosen = torch.where(here, torch.as_tensor(value, dtype=like.dtype, device=like.device), chosen)
        return chosen


class SignPieces(Pieces):
    """The absolute value: slope -1, 0 (at zero exactly) or 1."""

    def __init__(self) -> None:
        super().__init__(
            lambda x: Breaks(((operator.ge, 0.0), (operator.gt, 0.0)), (-1.0, 0.0, 1.0), (0.0, 0.0, 0.0)),
        )


class Select(Rule):
    """The larger or smaller of two tensors, elementwise, with the choice frozen: a mask gathers from both."""

    kind = "mask"

    def __init__(self, compare: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.compare = compare

    def freeze(self, call: Call) -> Tensor:
        """Where the first is taken."""
        first, second = self._pair(call)
        return self.compare(first, second)

    def apply(self, call: Call, state: Tensor) -> Tensor:
        """The frozen choice."""
        return torch.where(state, *self._pair(call))

    def switch(self, state: Tensor) -> Tensor:
        """The mask."""
        return state

    def steps_to_boundary(self, call: Call, tangent: Callable[[Tensor], Tensor], state: Tensor) -> Tensor:
        """Step at which the two are equal."""
        first, second = self._pair(call)
        return (second - first) / (tangent(first) - tangent(second))

    @staticmethod
    def _pair(call: Call) -> tuple[Tensor, Tensor]:
        def pair(input: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
            return input, other

        return pair(*call.args, **call.kwargs)


class Gate(Rule):
    """A smooth function with f(0) = 0, as a gate f(x)/x that multiplies x; at 0 its limit f'(0).

    The alternative, the tangent, moves part of the value into the offset B; the gate leaves the output proportional to
    the input, as a ReLU's mask does, so that nothing is attributed to an activation that is off.

    Args:
        slope: f'(0).
    """

    kind = "gate"

    def __init__(self, slope: float) -> None:
        self.slope = slope

    def freeze(self, call: Call) -> Tensor:
        """The gate f(x)/x."""
        x = call.input
        value = call.run()
        return torch.where(x == 0, self.slope, value / x)

    def apply(self, call: Call, state: Tensor) -> Any:
        """Gate * x."""
        return call.input * state

    def adjoint(self, call: Call, state: Tensor) -> Callable[[Tensor], Tensor]:
        """Gate * gradient."""
        return lambda gradient: gradient * state


def _is_zero(value: Number) -> bool:
    return not isinstance(value, Tensor) and value == 0


def _is_one(value: Number) -> bool:
    return not isinstance(value, Tensor) and value == 1
