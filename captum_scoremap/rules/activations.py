"""Elementwise nonlinear operations: piecewise linear ones, and gates."""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_scoremap.checks import unrecorded
from captum_scoremap.speed import faster

from .call import Call
from .coefficients import conjugate, summed_to
from .rule import Composite, Frozen, Gradients, Rule, steps_until_equal
from .tangent import Tangent

__all__ = ["Breakpoints", "Choice", "Clamp", "Gate", "PReLU", "PiecewiseLinear", "Power"]

Number = float | Tensor


@dataclass(frozen=True)
class Breakpoints:
    """A piecewise linear function of one variable.

    Piece i holds where exactly i of the ``comparisons`` with a breakpoint are true; there f(x) = slope_i x + offset_i.

    Attributes:
        comparisons: Functions such as ``operator.gt`` and their breakpoints, in ascending order.
        slopes: One for each piece, a number or a tensor.
        offsets: One for each piece.

    Example:
        >>> relu = Breakpoints(comparisons=((operator.gt, 0.0),), slopes=(0.0, 1.0), offsets=(0.0, 0.0))
        >>> len(relu.slopes)
        2
    """

    comparisons: tuple[tuple[Callable[[Tensor, Number], Tensor], Number], ...]
    slopes: tuple[Number, ...]
    offsets: tuple[Number, ...]


class PiecewiseLinear(Rule):
    """A piecewise linear function, with the piece each element is on (the mask) frozen: slope * x + offset.

    Which piece a breakpoint itself belongs to follows autograd's convention, so that masks and gradients agree even
    there; clamp's before PyTorch 2.14, under which its bounds are inside.

    Equation:
        y = s̄ · x + ō, with s̄, ō the slope and offset of the piece that x̄ is on

    Args:
        breakpoints: The function's breakpoints, slopes and offsets, from the operation's own arguments.
        gate: Whether the output is a gate.

    Example:
        >>> from captum_scoremap import freeze
        >>> rule = PiecewiseLinear(lambda input: Breakpoints(((operator.gt, 0.0),), (0.0, 1.0), (0.0, 0.0)))
        >>> freeze(torch.relu, torch.tensor([[-1.0, 2.0]]), rules={"relu": rule})(torch.ones(1, 2))
        tensor([[0., 1.]])
    """

    kind = "mask"
    keeps_gates = True

    def __init__(self, breakpoints: Callable[..., Breakpoints], *, gate: bool = False) -> None:
        self.breakpoints = breakpoints
        self.gate = gate

    def variant(self, call: Call) -> Rule:
        """Return the tangent for complex numbers, which are of no piece."""
        return Tangent() if call.values[0].dtype.is_complex else self

    def freeze(self, call: Call) -> Tensor:
        """Return the index of each element's piece: bool where there are two pieces, else uint8."""
        comparisons = self._breakpoints(call).comparisons
        masks = [compare(call.input, point) for compare, point in comparisons]
        if len(masks) == 1:
            return masks[0]
        return which_piece(list(torch.broadcast_tensors(*masks)), call.input.dtype)

    def apply(self, call: Call, state: Tensor) -> Tensor:
        """Return slope * x + offset of the frozen piece."""
        x, breakpoints = call.input, self._breakpoints(call)
        slope = _chosen(breakpoints.slopes, state, x.dtype)
        if any(map(_is_zero, breakpoints.slopes)):  # a mask's infinities, too, are off
            x = x.masked_fill(slope == 0, 0.0)
        output: Tensor = x * slope
        if any(not _is_zero(offset) for offset in breakpoints.offsets):
            output = output + _chosen(breakpoints.offsets, state, x.dtype)
        return output

    def transpose(self, call: Call, state: Tensor, gradients: Gradients) -> list[Tensor | None]:
        """Return slope * coefficients."""
        return [times(gradients[0], _chosen(self._breakpoints(call).slopes, state, gradients[0].dtype))]

    def constants(self, call: Call, state: Tensor) -> Sequence[Tensor | None]:
        """Return the offset of each element's piece."""
        offsets = self._breakpoints(call).offsets
        return () if all(map(_is_zero, offsets)) else (_chosen(offsets, state, call.values[0].dtype),)

    def steps_to_boundary(self, call: Call, changes: Sequence[Tensor], state: Tensor) -> Tensor:
        """Return the step at which the argument reaches a breakpoint."""
        x, change = call.input, changes[0]
        steps = [(point - x) / change for _, point in self._breakpoints(call).comparisons]
        return torch.stack(torch.broadcast_tensors(*steps))

    def _breakpoints(self, call: Call) -> Breakpoints:
        return self.breakpoints(*call.args, **call.kwargs)


class PReLU(PiecewiseLinear):
    """PReLU: its slope is a tensor that broadcasts against the argument.

    Equation:
        y = s̄ · x, with s̄ = 1 where x̄ > 0, else the weight; a weight that is live is a factor of a product
    """

    def __init__(self) -> None:
        super().__init__(lambda input, weight: Breakpoints(((operator.gt, 0.0),), (weight, 1.0), (0.0, 0.0)))

    def variant(self, call: Call) -> Rule:
        """Return the positive part and the weighted rest, where the weight is live."""
        if call.is_live(call.args[1]):
            return Composite(lambda x, weight: x.clamp_min(0) + weight * x.clamp_max(0))
        return super().variant(call)


class Clamp(PiecewiseLinear):
    """ReLU, ReLU6, hardtanh: the identity between a lower and an upper bound, which are numbers.

    Its mask shows in its output, which is at a bound exactly where the argument is at it or beyond.

    Equation:
        y = m̄ · x + (1 − m̄) · b̄, with m̄ = 1 between the bounds, else 0, and b̄ the bound that was reached

    Args:
        breakpoints: The bounds, and slopes 0 and 1, from the operation's own arguments.
        gate: Whether the output is a gate.

    Example:
        >>> from captum_scoremap import freeze
        >>> rule = Clamp(lambda input: Breakpoints(((operator.gt, 0.0),), (0.0, 1.0), (0.0, 0.0)))
        >>> freeze(torch.relu, torch.tensor([[-1.0, 2.0]]), rules={"relu": rule})(torch.full((1, 2), 3.0))
        tensor([[0., 3.]])
    """

    in_place = True

    def freeze(self, call: Call) -> Tensor:
        """Return the piece that each element of the output is on."""
        (_, lower), *upper = self._breakpoints(call).comparisons
        inside = differs(call.output, lower)
        if not upper:
            return inside
        if upper[0][1] == lower:  # nothing lies between
            return torch.zeros_like(inside, dtype=torch.uint8)
        return which_piece([inside, ~differs(call.output, upper[0][1])], call.output.dtype)

    def transpose(self, call: Call, state: Tensor, gradients: Gradients) -> list[Tensor | None]:
        """Return the coefficients where the mask is set."""
        return [masked(gradients[0], state)]


class Choice(Rule):
    """The larger or smaller of two tensors, elementwise, with the choice frozen: a mask gathers from both.

    Equation:
        z = m̄ · x + (1 − m̄) · y, with m̄ = 1 where x̄ was taken, else 0

    Args:
        compare: Where the first is taken: ``operator.ge`` for the larger, ``operator.le`` for the smaller.

    Example:
        >>> from captum_scoremap import freeze
        >>> rule = Choice(operator.ge)
        >>> frozen = freeze(lambda x: torch.maximum(x, 1 - x), torch.tensor([[0.0, 2.0]]), rules={"maximum": rule})
        >>> frozen(torch.zeros(1, 2))
        tensor([[1., 0.]])
    """

    kind = "mask"

    def __init__(self, compare: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.compare = compare

    def freeze(self, call: Call) -> Tensor:
        """Return where the first is taken."""
        return self.compare(*call.args[:2])

    def apply(self, call: Call, state: Tensor) -> Tensor:
        """Return the frozen choice."""
        first, second = call.args[:2]
        return torch.where(state, first, second)

    def steps_to_boundary(self, call: Call, changes: Sequence[Tensor], state: Tensor) -> Tensor:
        """Return the step at which the two are equal."""
        first, second = call.args[:2]
        return steps_until_equal(call, first, second, changes)


class Gate(Rule):
    """A smooth function with f(0) = 0, as a gate f(x)/x that multiplies x; at 0 its limit f'(0).

    The alternative, the tangent, moves part of the value into the offset B; the gate leaves the output proportional to
    the input, as a ReLU's mask does, so that nothing is attributed to an activation that is off.

    Equation:
        y = ḡ · x, with ḡ = f(x̄) / x̄; f'(0) where x̄ = 0

    Args:
        slope: f'(0), or a function of the operation's arguments that gives it.

    Example:
        >>> from captum_scoremap import freeze
        >>> frozen = freeze(torch.tanh, torch.tensor([[1.0, -2.0]]), rules={"tanh": Gate(slope=1.0)})
        >>> frozen(torch.zeros(1, 2))
        tensor([[0., 0.]])
    """

    kind = "gate"
    homogeneous = True

    def __init__(self, slope: float | Callable[..., float]) -> None:
        self.slope = slope

    def freeze(self, call: Call) -> Tensor:
        """Return the gate f(x)/x."""
        slope = self.slope(*call.args, **call.kwargs) if callable(self.slope) else self.slope
        if torch.is_grad_enabled():  # whose derivative would be NaN at 0/0
            is_zero = call.input == 0
            return torch.where(is_zero, slope, call.output / call.input.masked_fill(is_zero, 1.0))
        # 0/0 is where the limit goes
        gate: Tensor = call.output / call.input
        return gate.nan_to_num_(slope, torch.inf, -torch.inf)

    def apply(self, call: Call, state: Tensor) -> Any:
        """Return gate * x."""
        return call.input * state

    def transpose(self, call: Call, state: Tensor, gradients: Gradients) -> list[Tensor | None]:
        """Return gate * coefficients."""
        return [summed_to(gradients[0] * conjugate(state), call.values[0])]


class Power(Gate):
    """A power xⁿ with a constant exponent: for n > 0 the gate xⁿ⁻¹ times x, else the tangent (a scale such as 1/√x).

    Equation:
        y = ḡ · x, with ḡ = x̄ⁿ⁻¹, for n > 0; else the tangent

    Example:
        >>> from captum_scoremap import freeze
        >>> freeze(lambda x: x**3, torch.tensor([[2.0]]))(torch.ones(1, 1))
        tensor([[4.]])
    """

    def __init__(self) -> None:
        super().__init__(0.0)  # the gate is known without it

    def variant(self, call: Call) -> Rule:
        """Return the tangent where the exponent is not positive, which is a scale, or live; zero makes a constant."""
        exponent = call.args[1]
        if call.is_live(exponent):
            return Tangent()
        if _everywhere(exponent, operator.gt, 0):
            return self
        if isinstance(exponent, Tensor) and not _everywhere(exponent, operator.le, 0):
            return Composite(_power_by_sign)
        return Tangent(gate=True) if isinstance(exponent, Tensor) or exponent else Frozen()

    def freeze(self, call: Call) -> Tensor:
        """Return the gate."""
        x, exponent = call.args
        return torch.where(x == 0, exponent == 1, torch.pow(x.masked_fill(x == 0, 1.0), exponent - 1))

    def makes_gate(self, call: Call) -> bool:
        """Return whether it is a root: a scale."""
        return call.only_gates() or _everywhere(call.args[1], operator.lt, 1)


def _is_zero(value: Number) -> bool:
    return not isinstance(value, Tensor) and value == 0


@faster
def differs(x: Tensor, value: Number) -> Tensor:
    """Return where x is not exactly the value."""
    return x != value


@faster
def masked(coefficients: Tensor, state: Tensor) -> Tensor:
    """Return the coefficients where a mask is set, or where an element is on the middle one of three pieces."""
    mask = state if state.dtype == torch.bool else state.to(coefficients.dtype) == 1
    return torch.where(mask, coefficients, 0.0)


@faster
def times(coefficients: Tensor, slope: Tensor) -> Tensor:
    """Return their product; the slope is nobody else's, so that its memory may be used."""
    return coefficients * slope


@faster
def which_piece(masks: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the index of the piece that each element is on: how many of its masks are set, as bytes."""
    first, *others = (mask.to(dtype) for mask in masks)
    return sum(others, first).to(torch.uint8)


@faster
def piece(state: Tensor, number: int, pieces: int, dtype: torch.dtype) -> Tensor:
    """Return 1 where an element is on a piece, else 0."""
    return (state.to(dtype) == number).to(dtype)


def _chosen(values: tuple[Number, ...], state: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the value of each element's piece."""
    total: Any = None
    for number, value in enumerate(values):
        if _is_zero(value):
            continue
        here = piece(state, number, len(values), dtype)
        if isinstance(value, Tensor) or not math.isfinite(value):
            constant = torch.as_tensor(value, device=state.device).to(dtype)
            term = torch.where(here.bool(), constant, torch.zeros((), dtype=dtype, device=state.device))
        else:
            term = here if value == 1 else here * value
        total = term if total is None else total + term
    return torch.zeros((), dtype=dtype, device=state.device) if total is None else total


def _power_by_sign(x: Tensor, exponent: Tensor) -> Tensor:
    """Return the power where exponents of both signs stand side by side, each under its own rule."""
    is_positive = exponent.real > 0
    others = exponent.masked_fill(is_positive, 0)
    return torch.where(is_positive, x ** exponent.masked_fill(~is_positive, 1), x**others)


def _everywhere(exponent: Any, compare: Callable[[Any, float], Any], bound: float) -> bool:
    """Return whether a constant exponent, or its real part, compares so with a bound."""
    with unrecorded():
        return bool(torch.as_tensor(compare(exponent.real, bound)).all())
