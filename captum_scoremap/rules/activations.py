"""Elementwise nonlinear operations: piecewise linear ones, and gates."""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .bits import Bits, in_stretches, is_batched
from .rule import Call, Rule, tensors_in

__all__ = ["Breaks", "Clamp", "Gate", "Pieces", "Select", "SignPieces"]

Number = float | Tensor


@dataclass(frozen=True)
class Breaks:
    """A piecewise linear function of one variable.

    Piece i holds where exactly i of the ``comparisons`` with a break point are true; there f(x) = slope_i x + offset_i.

    Attributes:
        comparisons: Functions such as ``operator.gt`` and their break points, in ascending order.
        slopes: One a piece, a number or a tensor.
        offsets: One a piece.

    Example:
        >>> relu = Breaks(comparisons=((operator.gt, 0.0),), slopes=(0.0, 1.0), offsets=(0.0, 0.0))
        >>> len(relu.slopes)
        2
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
        native: Whether autograd's derivative of the operation takes the same pieces.
        gate: Whether the output is a gate.

    Example:
        >>> from captum_scoremap import freeze
        >>> rule = Pieces(lambda input: Breaks(((operator.gt, 0.0),), (0.0, 1.0), (0.0, 0.0)))
        >>> freeze(torch.relu, torch.tensor([[-1.0, 2.0]]), rules={"relu": rule})(torch.ones(1, 2))
        tensor([[0., 1.]])
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
        output = x * _chosen(breaks.slopes, state, x)
        if any(not _is_zero(offset) for offset in breaks.offsets):
            output = output + _chosen(breaks.offsets, state, x)
        return output

    def has_adjoint(self, call: Call) -> bool:
        """Where no break or slope is a tensor larger than the argument."""
        if len(tensors_in((call.args, call.kwargs))) == 1:
            return True
        breaks, shape = self._breaks(call), call.input.shape
        points = [point for _, point in breaks.comparisons]
        others = [tensor.shape for tensor in tensors_in((points, breaks.slopes))]
        return bool(torch.broadcast_shapes(shape, *others) == shape)

    def adjoint(self, call: Call, state: Tensor) -> Callable[[Tensor], Tensor]:
        """Slope * gradient; what is kept is the mask, of one byte."""
        slopes = self._breaks(call).slopes
        return lambda gradient: _times(gradient, _chosen(slopes, state, gradient))

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


class Clamp(Pieces):
    """ReLU, ReLU6, hardtanh: the identity between a lower and an upper bound, which are numbers.

    Its mask shows in its output, which is at a bound exactly where the argument is at it or beyond; reading it there
    takes a fraction of the time of a comparison.
    """

    passes_or_closes = True

    def record(self, call: Call, run: Callable[[], Any]) -> tuple[Tensor, Tensor | Bits]:
        """The output, and the piece that each element of it is on; the mask alone where that is all that is asked."""
        (_, lower), *upper = self._breaks(call).comparisons
        output: Tensor = run()
        with torch.no_grad():
            if upper and (call.keep or lower != 0):
                inside, below = _differs(output, lower), _differs(output, upper[0][1])
                return output, inside.view(torch.uint8) + below.logical_not_().view(torch.uint8)

            def mask(values: Tensor) -> Tensor:
                if not upper:
                    return _differs(values, lower)
                # its own values as gradients: zero at the bounds, and inside the values, which are not
                slopes: Tensor = torch.ops.aten.hardtanh_backward(values, values, lower, upper[0][1])
                return slopes.bool()

            is_packed = not call.keep and Bits.fit(output)
            return output, Bits(output, mask) if is_packed else in_stretches(output, mask)

    def has_adjoint(self, call: Call) -> bool:
        """Where the mask is kept anyway, or saves memory that is worth the calls: autograd keeps the values."""
        return call.keep or call.is_large

    def adjoint(self, call: Call, state: Tensor | Bits) -> Callable[[Tensor], Tensor]:
        """The gradient where the mask is set."""
        return state.times if isinstance(state, Bits) else super().adjoint(call, state)


class SignPieces(Pieces):
    """The absolute value: slope -1, 0 (at zero exactly) or 1."""

    def __init__(self) -> None:
        super().__init__(
            lambda x: Breaks(((operator.ge, 0.0), (operator.gt, 0.0)), (-1.0, 0.0, 1.0), (0.0, 0.0, 0.0)),
        )


class Select(Rule):
    """The larger or smaller of two tensors, elementwise, with the choice frozen: a mask gathers from both.

    Args:
        compare: Where the first is taken: ``operator.ge`` for the larger, ``operator.le`` for the smaller.

    Example:
        >>> from captum_scoremap import freeze
        >>> rule = Select(operator.ge)
        >>> frozen = freeze(lambda x: torch.maximum(x, 1 - x), torch.tensor([[0.0, 2.0]]), rules={"maximum": rule})
        >>> frozen(torch.zeros(1, 2))
        tensor([[1., 0.]])
    """

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

    Example:
        >>> from captum_scoremap import freeze
        >>> frozen = freeze(torch.tanh, torch.tensor([[1.0, -2.0]]), rules={"tanh": Gate(slope=1.0)})
        >>> frozen(torch.zeros(1, 2))
        tensor([[0., 0.]])
    """

    kind = "gate"

    def __init__(self, slope: float) -> None:
        self.slope = slope

    def freeze(self, call: Call) -> Tensor:
        """The gate f(x)/x."""
        return self._gate(call.input, call.run())

    def record(self, call: Call, run: Callable[[], Any]) -> tuple[Tensor, Tensor]:
        """The output, and its gate."""
        value: Tensor = call.run() if call.in_place else run()
        with torch.no_grad():
            gate = self._gate(call.input, value)
            return value, gate

    def _gate(self, x: Tensor, value: Tensor) -> Tensor:
        # 0/0 is where the limit goes
        return (value / x).nan_to_num_(self.slope, torch.inf, -torch.inf)

    def apply(self, call: Call, state: Tensor) -> Any:
        """Gate * x."""
        return call.input * state

    def has_adjoint(self, call: Call) -> bool:
        """Always."""
        return True

    def adjoint(self, call: Call, state: Tensor) -> Callable[[Tensor], Tensor]:
        """Gate * gradient."""
        return lambda gradient: gradient * state


def _is_zero(value: Number) -> bool:
    return not isinstance(value, Tensor) and value == 0


def _differs(x: Tensor, value: Number) -> Tensor:
    """Where x is not exactly the value: ``x != value``, but vectorized on a CPU."""
    return (x if _is_zero(value) else x - value).bool()


def _chosen(values: tuple[Number, ...], state: Tensor, like: Tensor) -> Tensor:
    """The value of each element's piece, as a fresh tensor of the type of ``like``."""
    terms = [(piece, value) for piece, value in enumerate(values) if not _is_zero(value)]
    if not terms:
        return torch.zeros((), dtype=like.dtype, device=like.device)
    total: Any = None
    for piece, value in terms:
        here = _is_piece(state, piece, len(values))
        if isinstance(value, Tensor) or not math.isfinite(value):
            term = torch.where(here.bool(), torch.as_tensor(value).to(like), 0.0)
        else:
            term = here.to(like.dtype) if value == 1 else here.to(like.dtype) * value
        total = term if total is None else total + term
    return total  # type: ignore[no-any-return]


def _is_piece(state: Tensor, piece: int, pieces: int) -> Tensor:
    """1 where an element is on a piece, else 0, as bytes, which convert to other types fast."""
    if state.dtype == torch.bool:
        return (state if piece else ~state).view(torch.uint8)
    if pieces == 3 and piece != 0:
        return state & 1 if piece == 1 else state >> 1
    return (state == piece).view(torch.uint8)


def _times(gradient: Tensor, slope: Tensor) -> Tensor:
    """Their product, in the memory of the slope, which is fresh; several labels at once need memory of their own."""
    if is_batched(gradient) or slope.shape != gradient.shape or slope.dtype != gradient.dtype:
        return gradient * slope
    return slope.mul_(gradient)
