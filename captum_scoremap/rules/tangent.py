"""Tangents, and operations that are linear in their first argument: what goes by derivatives at the image."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .call import Call, floating, substituted
from .derivative import named, pulled_back, pushed
from .rule import Frozen, Gradients, Rule

__all__ = ["Backward", "FirstLinear", "Sample", "Tangent"]


class Tangent(Rule):
    """The local linearization: f(x) + f'(x) (· - x), with everything else in the offset.

    This is the rule for any differentiable operation that is no gate; then A is the ordinary gradient.

    Equation:
        y = f(x̄) + f'(x̄) · (x − x̄)

    Args:
        gate: Whether the output is a gate.

    Example:
        >>> from captum_scoremap import freeze
        >>> frozen = freeze(torch.cos, torch.zeros(1, 2), rules={"cos": Tangent()})
        >>> frozen(torch.ones(1, 2))  # the slope at zero is zero
        tensor([[1., 1.]])
    """

    kind = "tangent"

    def __init__(self, *, gate: bool = False) -> None:
        self.gate = gate

    def freeze(self, call: Call) -> tuple[Tensor, ...]:
        """Return the live arguments at the image."""
        return call.live

    def apply(self, call: Call, state: tuple[Tensor, ...]) -> Any:
        """Return the value at the image plus the derivative along the change."""
        moves = tuple(_move(now, then) for now, then in zip(call.live, state, strict=True))
        with named(call):
            values, changes = pushed(lambda *live: call.filled(live).written_out(), state, moves)
        remaining = iter([value + change for value, change in zip(values, changes, strict=True)])
        whole = call.filled(state).written_out()
        return substituted(whole, lambda tensor: next(remaining) if floating(tensor) else tensor)

    def transpose(self, call: Call, state: tuple[Tensor, ...], gradients: Gradients) -> list[Tensor | None]:
        """Return f'(x)ᵀ times the coefficients."""
        with named(call):
            shares = pulled_back(lambda *live: call.filled(live).written_out(), state, gradients)
        if torch.Tag.pointwise not in getattr(call.operation, "tags", ()) or gradients[0] is None:
            return shares
        # what the score does not depend on has no share, though its slope may be infinite
        unread = gradients[0] == 0
        return [one if one is None or one.shape != unread.shape else one.masked_fill(unread, 0.0) for one in shares]


def _move(now: Tensor, then: Tensor) -> Tensor:
    """Return the change of an argument; none where it is infinite, as a mask makes it."""
    return torch.where(then.isinf(), 0, now.broadcast_to(then.shape) - then)


class FirstLinear(Rule):
    """An operation linear in its first argument, with whatever else is live frozen: where to sample.

    Equation:
        y = F̄ x, with F̄ the linear map that the other live arguments make at the image

    Args:
        follows: Whether the tangent is taken where anything else is live, so that nothing is frozen.

    Example:
        >>> from captum_scoremap import freeze
        >>> weigh = lambda x: torch.lerp(x, 2 * x, x.sigmoid())
        >>> frozen = freeze(weigh, torch.zeros(1, 1), rules={"lerp": FirstLinear()})
        >>> frozen(torch.zeros(1, 1))
        tensor([[0.]])
    """

    kind = "places"

    def __init__(self, *, follows: bool = False) -> None:
        self._follows = follows

    def variant(self, call: Call) -> Rule:
        """Return the tangent where that is wanted of what else is live."""
        return Tangent() if self._follows and not self.is_affine(call) else self

    def is_affine(self, call: Call) -> bool:
        """Return whether nothing else is live."""
        return len(call.live) == 1 and call.live[0] is call.input

    def freeze(self, call: Call) -> tuple[Tensor, ...] | None:
        """Return the other live arguments."""
        if self.is_affine(call):
            return None
        return call.live[1:] if call.is_live(call.input) else call.live

    def apply(self, call: Call, state: tuple[Tensor, ...] | None) -> Any:
        """Run the operation with the others as they were."""
        if state is not None:
            call = call.filled((call.input, *state) if call.is_live(call.input) else state)
        return call.written_out() if torch.is_grad_enabled() else call.run()  # the kernel, for the same rounding

    def transpose(self, call: Call, state: tuple[Tensor, ...] | None, gradients: Gradients) -> Sequence[Tensor | None]:
        """Return the coefficients of the first argument."""
        if not call.is_live(call.input):
            return [None] * len(call.values)
        with named(call):
            return super().transpose(call, state, gradients)


class Backward(FirstLinear):
    """A backward operation of PyTorch's, as a model that takes a gradient runs it: linear in the gradient it is given.

    What was saved for it is frozen; where only that is live, its tangent is taken.

    Equation:
        y = F̄ g, with g the gradient it is given and F̄ from what was saved, at the image

    Args:
        masks: Whether F̄ is a mask or a switch, as that of ReLU is, which what was saved does not move.
        follows: Whether the tangent is taken where what was saved is live, too.
    """

    def __init__(self, *, masks: bool = False, follows: bool = False) -> None:
        super().__init__(follows=follows)
        self._masks = masks

    def variant(self, call: Call) -> Rule:
        """Return the tangent where the gradient that it is given is a constant; its value, if that is a mask's."""
        if call.is_live(call.input):
            return super().variant(call)
        return Frozen() if self._masks else Tangent()


class Sample(Rule):
    """Random numbers of a distribution that depends on the image: the run's, and how they follow the distribution.

    Drawing again would give others. The derivative of those that were drawn is that of implicit reparametrization
    (Figurnov et al. 2018), which is what PyTorch's ``rsample`` has.

    Equation:
        y = ȳ + J (x − x̄), with J = diag(g) for a gamma distribution and (I − ȳ 1ᵀ) diag(g) for Dirichlet's

    Args:
        slopes: From the numbers drawn and the parameters to g.
        sums_to_one: Whether the numbers of the last axis add up to 1, as Dirichlet's do.

    Example:
        >>> from captum_scoremap import freeze
        >>> _ = torch.manual_seed(0)
        >>> draw = lambda x: torch.distributions.Gamma(x, 1.0).rsample()
        >>> frozen = freeze(draw, torch.ones(1, 2))
        >>> bool((frozen(torch.ones(1, 2)) == frozen(torch.ones(1, 2))).all())
        True
    """

    kind = "sample"

    def __init__(self, slopes: Callable[[Tensor, Tensor], Tensor], *, sums_to_one: bool = False) -> None:
        self._slopes, self._sums_to_one = slopes, sums_to_one

    def freeze(self, call: Call) -> tuple[Tensor, ...]:
        """Return the numbers drawn, the parameters, and the slopes."""
        drawn, parameters = call.output, call.input
        return drawn, parameters, self._slopes(drawn, parameters)

    def apply(self, call: Call, state: tuple[Tensor, ...]) -> Tensor:
        """Return the numbers drawn, moved along with the parameters."""
        drawn, parameters, slopes = state
        moved: Tensor = slopes * (call.input - parameters)
        return drawn + moved - drawn * moved.sum(-1, keepdim=True) if self._sums_to_one else drawn + moved
