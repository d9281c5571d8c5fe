"""What a rule is: the exact linear form of one operation at the image.

A rule says what of an operation is *frozen* at the image (a mask, a switch, a gate, a scale), how the operation acts on
its live arguments, those that depend on the image, once that is frozen, and the transpose of that. At the image itself
the frozen operation returns what the operation returns; anywhere else it is affine.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_scoremap.speed import faster

from .call import Call, floating
from .derivative import pulled_back

__all__ = ["Comparison", "Composite", "Frozen", "Gradients", "Linear", "Rule", "steps_until_equal", "until_they_meet"]

Gradients = tuple[Any, ...]
"""Coefficients of each output, tensors; None where the score does not depend on it, which it does on one at least."""


class Rule(ABC):
    """The linear form of one operation.

    To write one, say what is frozen and how it is applied; the transpose follows by autograd.

    Attributes:
        kind: What it freezes, in one word, for reports.
        gate: Whether its output is a gate: a constant factor where it meets a live factor in a product.
        keeps_gates: Whether its output is a gate where all its live arguments are.
        live_outputs: How many of the floating-point outputs depend on the image once the rule is frozen; None for all.
        in_place: Whether :meth:`freeze` needs nothing but the output, so that the operation itself may run in place.
        moves: Whether every element of its output is one of its arguments', somewhere else, or zero: then its transpose
            carries numbers back to where the elements came from.
        homogeneous: Whether it makes zeros of zeros, unless there is a constant tensor among its arguments.
        reads: Whether the operation reads numbers of its arguments, rather than their shape and type alone.

    Example:
        >>> import torch
        >>> from captum_scoremap import freeze
        >>> class Square(Rule):  # x * x, one factor frozen
        ...     def freeze(self, call):
        ...         return call.input
        ...
        ...     def apply(self, call, state):
        ...         return state * call.input
        >>> frozen = freeze(torch.sin, torch.tensor([[0.0]]), rules={"sin": Square()})
        >>> frozen(torch.tensor([[0.0]]))
        tensor([[0.]])
    """

    kind: str = "custom"
    gate: bool = False
    keeps_gates: bool = False
    live_outputs: int | None = None
    in_place: bool = False
    moves: bool = False
    homogeneous: bool = False
    reads: bool = True

    def variant(self, call: Call) -> "Rule":
        """Return the rule of this call: itself, the default, or another where its arguments want one."""
        return self

    @abstractmethod
    def freeze(self, call: Call) -> Any:
        """Return what the operation freezes at the image: tensors, or a tuple of tensors and None."""

    def packed(self, call: Call, state: Any) -> Any:
        """Return what is frozen as the tape shall hold it: itself, or the same in fewer bytes."""
        return pack(state) if isinstance(state, Tensor) else state

    @abstractmethod
    def apply(self, call: Call, state: Any) -> Any:
        """Return the output of the frozen operation: affine in the live arguments, ``call.output`` at the image."""

    def transpose(self, call: Call, state: Any, gradients: Gradients) -> Sequence[Tensor | None]:
        """Return the coefficients of the live arguments, one for each of ``call.values``.

        Args:
            call: The call, with a :class:`Value` for each live argument.
            state: What is frozen.
            gradients: Coefficients of each output; None where the score does not depend on it, but on another one.

        Returns:
            The transpose of the linear part of :meth:`apply`, applied to them; None stands for zero. By default,
            as autograd derives it, at zero.
        """
        zeros = [value.zeros() for value in call.values]
        return pulled_back(lambda *live: self.apply(call.filled(live), state), zeros, gradients)

    def constants(self, call: Call, state: Any) -> Sequence[Tensor | None]:
        """Return the constant part of each live output: what the frozen operation makes of zeros.

        Args:
            call: The call, with a :class:`Value` for each live argument.
            state: What is frozen.

        Returns:
            Tensors that broadcast to the outputs; None stands for zero.
        """
        if self.homogeneous and not floating((call.args, dict(call.kwargs))):
            return ()
        return floating(self.apply(call.filled([value.zeros() for value in call.values]), state))

    def is_affine(self, call: Call) -> bool:
        """Return whether nothing is frozen: the operation, as called, is affine in its live arguments already."""
        return False

    def is_constant(self, call: Call) -> bool:
        """Return whether the output, as called, is a constant, so that the call is no step at all."""
        return False

    def makes_gate(self, call: Call) -> bool:
        """Return whether the output of this call is a gate."""
        return self.gate or (self.keeps_gates and call.only_gates())

    def switch(self, state: Any) -> Tensor | None:
        """Return the discrete part of what is frozen: a mask or indices; None where nothing is."""
        is_discrete = isinstance(state, Tensor) and not (state.is_floating_point() or state.is_complex())
        return state if is_discrete else None

    def steps_to_boundary(self, call: Call, changes: Sequence[Tensor], state: Any) -> Tensor | None:
        """Return the steps along a direction at which each switch flips, infinite where it never does.

        Args:
            call: The call, at the image.
            changes: Change of each live argument per unit step.
            state: What is frozen.

        Returns:
            The steps, in any shape; None without switches.
        """
        return None


@faster
def pack(state: Tensor) -> Any:
    """Return a frozen tensor as it is to be held."""
    return state


def steps_until_equal(call: Call, first: Any, second: Any, changes: Sequence[Tensor]) -> Tensor:
    """Return the steps along a direction at which two arguments of a call are equal, infinite where they never are."""
    remaining = iter(changes)
    speeds = [next(remaining) if call.is_live(argument) else 0.0 for argument in (first, second)]
    return until_they_meet(first, speeds[0], second, speeds[1])


def until_they_meet(first: Any, change: Any, second: Any, other_change: Any) -> Tensor:
    """Return the steps at which two values that change are equal; not finite where they never are.

    Those that change alike but for rounding never are: windows of one content, as circular padding makes them.
    """
    apart = other_change - change
    rounding = 8 * torch.finfo(apart.dtype).eps * (abs(change) + abs(other_change))
    return (first - second) / apart.where(apart.abs() > rounding, 0.0)  # type: ignore[no-any-return]


class Linear(Rule):
    """An operation that is affine in its live arguments: nothing is frozen.

    Equation:
        y = F x + b

    Args:
        transpose: From the call and the coefficients of its first output to those of its live arguments; None to have
            autograd derive it.
        apply: From the call to its output; the operation itself by default, which may ask more of its arguments than
            their numbers, such as a place in memory.
        keeps_gates: Whether the output is a gate where all live arguments are.
        homogeneous: Whether it makes zeros of zeros, unless there is a constant tensor among its arguments.
        moves: Whether every element of its output is one of its arguments', somewhere else, or zero.

    Example:
        >>> import torch
        >>> from captum_scoremap import linear_form
        >>> form = linear_form(lambda x: torch.cumsum(x, 1)[:, -1], torch.ones(1, 3), rules={"cumsum": Linear()})
        >>> form.coefficients, form.bias
        (tensor([[1., 1., 1.]]), tensor([0.]))
    """

    kind = "linear"
    in_place = True

    def __init__(
        self,
        transpose: Callable[[Call, Tensor], Sequence[Tensor | None]] | None = None,
        apply: Callable[[Call], Any] = Call.run,
        *,
        keeps_gates: bool = False,
        homogeneous: bool = False,
        moves: bool = False,
    ) -> None:
        self._transpose = transpose
        self._apply = apply
        self.keeps_gates = keeps_gates
        self.homogeneous = homogeneous
        self.moves = moves

    def freeze(self, call: Call) -> None:
        """Freeze nothing."""

    def apply(self, call: Call, state: None) -> Any:
        """Run the operation itself, or what stands for it."""
        return self._apply(call)

    def transpose(self, call: Call, state: None, gradients: Gradients) -> Sequence[Tensor | None]:
        """Apply the transpose."""
        if self._transpose is None or gradients[0] is None:
            return super().transpose(call, state, gradients)
        return self._transpose(call, gradients[0])

    def is_affine(self, call: Call) -> bool:
        """Return True."""
        return True


class Composite(Rule):
    """An operation made of smaller ones, which are recorded in its place.

    Equation:
        y = f_n(… f_2(f_1(x))), each f_i by its own rule

    Args:
        body: The same computation, with the operation's signature.

    Example:
        >>> import torch
        >>> from captum_scoremap import freeze
        >>> rules = {"silu": Composite(lambda input: input * input.sigmoid())}
        >>> freeze(torch.nn.functional.silu, torch.ones(1, 2), rules=rules)(torch.zeros(1, 2))
        tensor([[0., 0.]])
    """

    kind = "composite"

    def __init__(self, body: Callable[..., Any]) -> None:
        self.body = body

    def freeze(self, call: Call) -> None:
        """Freeze nothing: the smaller operations do."""

    def apply(self, call: Call, state: None) -> Any:
        """Run the body."""
        return self.body(*call.args, **call.kwargs)


class Frozen(Rule):
    """An operation that is constant around the image, such as a comparison or rounding: its value is frozen.

    Equation:
        y = ȳ

    Args:
        reads: Whether it reads numbers of its arguments.

    Example:
        >>> import torch
        >>> from captum_scoremap import freeze
        >>> frozen = freeze(lambda x: x * x.round(), torch.tensor([[1.2, 2.6]]), rules={"round": Frozen()})
        >>> frozen(torch.ones(1, 2))
        tensor([[1., 3.]])
    """

    kind = "value"

    def __init__(self, *, reads: bool = True) -> None:
        self.reads = reads

    def freeze(self, call: Call) -> Any:
        """Return the value."""
        return call.output

    def apply(self, call: Call, state: Any) -> Any:
        """Return the value, whatever the arguments."""
        return state

    def is_constant(self, call: Call) -> bool:
        """Return True."""
        return True


class Comparison(Frozen):
    """A comparison of two values: a mask that flips where they are equal.

    Equation:
        y = ȳ, a mask or a sign

    Args:
        other: What the first is compared with where the operation has one argument.

    Example:
        >>> import torch
        >>> from captum_scoremap import freeze
        >>> frozen = freeze(lambda x: x * (x > 0), torch.tensor([[1.0, -1.0]]), rules={"gt": Comparison()})
        >>> frozen(torch.tensor([[-3.0, 3.0]]))
        tensor([[-3., 0.]])
    """

    def __init__(self, other: float | None = None) -> None:
        self.other = other

    def switch(self, state: Tensor) -> Tensor:
        """Return the mask, or the sign, -1, 0 or 1."""
        return state.to(torch.int8) if state.is_floating_point() else state

    def steps_to_boundary(self, call: Call, changes: Sequence[Tensor], state: Any) -> Tensor:
        """Return the step at which the two are equal."""
        first, second = (call.args[0], self.other) if self.other is not None else call.args[:2]
        return steps_until_equal(call, first, second, changes)
