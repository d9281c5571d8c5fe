"""Products: operations that are linear in each factor alone, and division."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_scoremap.speed import faster

from .call import Call, Value
from .coefficients import conjugate, summed_to
from .rule import Gradients, Rule

__all__ = ["Convolution", "Division", "Product", "matrix_times", "times"]

aten = torch.ops.aten


class Product(Rule):
    """An operation linear in each of its factors: mul, mm, bmm, addmm, convolution, ...

    - One live factor: the operation is linear already.
    - A live factor that is a gate (a sigmoid, attention weights, 1/norm) beside one that is none: the gate is frozen.
    - Several live factors x, y: each in turn, in equal shares, ½(ȳ·x + x̄·y), which at the image is x·y. Freezing only
      one would depend on which is written first; the full derivative would count the product twice.

    Terms that are added (addmm's first argument, a convolution's bias) enter every share alike and so stay as they are.

    Equation:
        z = x · y, where one factor is live: nothing is frozen
        z = ḡ · x, where the other factor is a gate g
        z = ½ (ȳ · x + x̄ · y), where both are live and of equal standing

    Args:
        factors: Positions of the factors.
        adjoint: From the coefficients of the output, the other factor and the position to the coefficients of the
            factor there; None to have autograd derive it.
        term: Position of a term that is added, if there is one.
        keeps_gates: Whether the product of gates is a gate.

    Example:
        >>> from captum_scoremap import freeze
        >>> freeze(lambda x: x * x.flip(1), torch.tensor([[1.0, 2.0]]))(torch.ones(1, 2))
        tensor([[1.5000, 1.5000]])
    """

    kind = "product"

    def __init__(
        self,
        factors: tuple[int, ...] = (0, 1),
        adjoint: Callable[[Tensor, Any, int], Tensor] | None = None,
        *,
        term: int | None = None,
        keeps_gates: bool = False,
    ) -> None:
        self.factors = factors
        self.adjoint = adjoint
        self.term = term
        self.keeps_gates = keeps_gates

    def is_affine(self, call: Call) -> bool:
        """Return whether only one factor is live."""
        return len(call.live) < 2 or len(self._live(call)) < 2

    def freeze(self, call: Call) -> tuple[Tensor | None, ...] | None:
        """Return the live factors, by position; None for those that no other factor's turn asks for."""
        if self.is_affine(call):
            return None
        live, turns = self._live(call), self._turns(call)
        return tuple(
            call.args[position] if position in live and turns != [position] else None for position in self.factors
        )

    def apply(self, call: Call, state: tuple[Tensor | None, ...] | None) -> Any:
        """Return the mean, over the live factors that are no gates, of the product with all others frozen."""
        if state is None:
            return call.operation(*map(_derivable, call.args), **call.kwargs) if torch.is_grad_enabled() else call.run()
        turns = self._turns(call)
        total: Any = None
        for turn in turns:
            args = list(call.args)
            for position, factor in zip(self.factors, state, strict=True):
                if factor is not None and position != turn:
                    args[position] = factor
            share = call.operation(*args, **call.kwargs)
            total = share if total is None else total + share
        return total if len(turns) == 1 else total / len(turns)

    def transpose(
        self, call: Call, state: tuple[Tensor | None, ...] | None, gradients: Gradients
    ) -> Sequence[Tensor | None]:
        """Return for each turn the coefficients times the other factors."""
        if self.adjoint is None:
            return super().transpose(call, state, gradients)
        (gradient,) = gradients
        turns = self._turns(call)
        found: list[Tensor | None] = []
        for position, argument in enumerate(call.args):
            if not isinstance(argument, Value):
                continue
            if position == self.term:
                beta = conjugate(call.kwargs.get("beta", 1))
                found.append(summed_to(gradient if beta == 1 else gradient * beta, argument))
            elif position not in turns:
                found.append(None)
            else:
                other = self.factors[1 - self.factors.index(position)]
                factor = call.args[other]
                if isinstance(factor, Value):
                    factor = (state or ())[self.factors.index(other)]
                share = self.adjoint(gradient, _derivable(factor), self.factors.index(position))
                if self.term is not None and call.kwargs.get("alpha", 1) != 1:
                    share = share * conjugate(call.kwargs["alpha"])
                found.append(summed_to(share if len(turns) == 1 else share / len(turns), argument))
        return found

    def constants(self, call: Call, state: tuple[Tensor | None, ...] | None) -> Sequence[Tensor | None]:
        """Return the term that is added, or the product where nothing but that term is live."""
        if not self._live(call):
            return super().constants(call, state)
        term = None if self.term is None or self.term >= len(call.args) else call.args[self.term]
        beta = call.kwargs.get("beta", 1)
        if term is None or call.is_live(term) or beta == 0:  # whatever the term holds
            return ()
        return (term * beta,)

    def _live(self, call: Call) -> list[int]:
        return [at for at in self.factors if at < len(call.args) and call.is_live(call.args[at])]

    def _turns(self, call: Call) -> list[int]:
        """Return the positions of the live factors that are no gates; of all of them, if all are."""
        live = self._live(call)
        return [position for position in live if not call.is_gate(call.args[position])] or live


def _derivable(factor: Any) -> Any:
    """Return a factor in a layout whose transpose PyTorch multiplies by, which blocks of a sparse matrix have not."""
    is_blocks = isinstance(factor, Tensor) and factor.layout in {torch.sparse_bsr, torch.sparse_bsc}
    return factor.to_dense() if is_blocks else factor


def times(gradient: Tensor, other: Any, _: int) -> Tensor:
    """Return the coefficients of a factor of an elementwise product."""
    product: Tensor = gradient * conjugate(other)
    return product


def matrix_times(gradient: Tensor, other: Tensor, position: int) -> Tensor:
    """Return the coefficients of a factor of a matrix product, batched or not."""
    transposed: Tensor = conjugate(other).transpose(-2, -1)
    return gradient @ transposed if position == 0 else transposed @ gradient


class Convolution(Product):
    """A convolution, or its transpose, of a batch.

    PyTorch also convolves a single image without a batch dimension; it gives it one of size 1 first.

    Equation:
        y = w * x + b, where the image alone is live: nothing is frozen
        y = ½ (w̄ * x + w * x̄) + b, where the weight is live, too
    """

    def transpose(
        self, call: Call, state: tuple[Tensor | None, ...] | None, gradients: Gradients
    ) -> Sequence[Tensor | None]:
        """Return the transposed convolution of the coefficients."""
        if len(call.values) > 1 or not isinstance(call.args[0], Value):
            return super().transpose(call, state, gradients)
        value, weight, _, *geometry = call.args
        return [convolved_back(gradients[0], value, weight, *geometry)]

    def constants(self, call: Call, state: tuple[Tensor | None, ...] | None) -> Sequence[Tensor | None]:
        """Return the bias."""
        bias = call.args[2]
        if bias is None or call.is_live(bias):
            return () if bias is None else super(Product, self).constants(call, state)
        return (bias.reshape(-1, *[1] * (call.args[0].ndim - 2)),)


@faster
def convolved_back(coefficients: Tensor, value: Value, weight: Tensor, *geometry: Any) -> Tensor:
    """Return the transposed convolution of coefficients."""
    found, _, _ = aten.convolution_backward(coefficients, value.empty(), weight, None, *geometry, [True, False, False])
    return found  # type: ignore[no-any-return]


class Division(Rule):
    """A quotient x / y with the denominator frozen: a normalization's norm is a scale, not a score of its own.

    A live denominator under a constant numerator is a scale with nothing to multiply: its tangent is taken.

    Equation:
        z = x / ȳ

    Example:
        >>> from captum_scoremap import freeze
        >>> freeze(lambda x: x / x.sum(1, keepdim=True), torch.tensor([[1.0, 3.0]]))(torch.ones(1, 2))
        tensor([[0.2500, 0.2500]])
    """

    kind = "scale"

    def is_affine(self, call: Call) -> bool:
        """Return whether the denominator is not live."""
        return not call.is_live(call.args[1])

    def is_constant(self, call: Call) -> bool:
        """Return whether the quotient is rounded."""
        return call.kwargs.get("rounding_mode") is not None

    def freeze(self, call: Call) -> Tensor | None:
        """Return the denominator, if it is live."""
        return None if self.is_affine(call) else call.args[1]

    def apply(self, call: Call, state: Tensor | None) -> Any:
        """Return the numerator over the frozen denominator."""
        numerator, denominator = call.args
        if state is None:
            return call.run()
        if call.is_live(numerator):
            return numerator / state
        # c/y = c/ȳ - c/ȳ² (y - ȳ)
        return numerator / state * (2 - denominator / state)

    def transpose(self, call: Call, state: Tensor | None, gradients: Gradients) -> list[Tensor | None]:
        """Return the coefficients over the denominator."""
        (gradient,), (numerator, denominator) = gradients, call.args
        if state is None:
            return [summed_to(gradient / conjugate(denominator), numerator)]
        if not isinstance(numerator, Value):
            return [summed_to(-gradient * conjugate(numerator / (state * state)), denominator)]
        return [summed_to(gradient / conjugate(state), numerator), None]

    def constants(self, call: Call, state: Tensor | None) -> Sequence[Tensor | None]:
        """Return none where the numerator is live."""
        return () if call.is_live(call.args[0]) else super().constants(call, state)

    def makes_gate(self, call: Call) -> bool:
        """Return whether the numerator is a gate (exp/sum of exp) or a constant (1/norm)."""
        return not call.is_live(call.args[0]) or call.is_gate(call.args[0])
