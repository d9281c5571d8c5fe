"""What a rule is: the exact linear form of one operation at the image.

A rule says what of an operation is *frozen* at the image (a mask, a switch, a gate, a scale), how the operation acts on
its live arguments, those that depend on the image, once that is frozen, and the transpose of that. At the image itself
the frozen operation returns what the operation returns; anywhere else it is affine.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from captum_scoremap.checks import NoDerivativeError
from captum_scoremap.speed import faster

from .call import Call, substituted, tensors_in

__all__ = [
    "Backward",
    "Comparison",
    "FirstLinear",
    "Frozen",
    "Linear",
    "Rule",
    "Tangent",
    "floating",
    "steps_until_equal",
    "transposed_by_autograd",
]

Gradients = tuple[Tensor | None, ...]

_NO_FORMULA = "no autograd formula is registered for the operation"
_UNDERIVABLE = (_NO_FORMULA, "is not differentiable with respect to", "derivative for aten::", "has no derivative")


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

    Example:
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

    def variant(self, call: Call) -> "Rule":
        """Return the rule of this call: itself, the default, or another where its arguments want one."""
        return self

    def expansion(self, call: Call) -> Callable[..., Any] | None:
        """Return what computes the same by smaller operations, with the operation's signature.

        Those are recorded in its place. None, the default, to record the operation as one.
        """
        return None

    @abstractmethod
    def freeze(self, call: Call) -> Any:
        """Return what the operation freezes at the image: tensors, or a tuple of tensors and None."""

    def held(self, call: Call, state: Any) -> Any:
        """Return what is frozen as the tape shall hold it: itself, or the same in fewer bytes."""
        return held(state) if isinstance(state, Tensor) else state

    @abstractmethod
    def apply(self, call: Call, state: Any) -> Any:
        """Return the output of the frozen operation: affine in the live arguments, ``call.output`` at the image."""

    def transpose(self, call: Call, state: Any, gradients: Gradients) -> Sequence[Tensor | None]:
        """Return the coefficients of the live arguments, one for each of ``call.values``.

        Args:
            call: The call, with a :class:`Value` for each live argument.
            state: What is frozen.
            gradients: Coefficients of each output; None where the score does not depend on it.

        Returns:
            The transpose of the linear part of :meth:`apply`, applied to them; None stands for zero.
        """
        return transposed_by_autograd(self, call, state, gradients)

    def constants(self, call: Call, state: Any) -> Sequence[Tensor | None]:
        """Return the constant part of each live output: what the frozen operation makes of zeros.

        Args:
            call: The call, with a :class:`Value` for each live argument.
            state: What is frozen.

        Returns:
            Tensors that broadcast to the outputs; None stands for zero.
        """
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
        return None

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
def held(state: Tensor) -> Any:
    """Return a frozen tensor to hold."""
    return state


def steps_until_equal(call: Call, first: Any, second: Any, changes: Sequence[Tensor]) -> Tensor:
    """Return the steps along a direction at which two arguments of a call are equal, infinite where they never are."""
    remaining = iter(changes)
    speeds = [next(remaining) if call.is_live(argument) else 0.0 for argument in (first, second)]
    return (second - first) / (speeds[0] - speeds[1])  # type: ignore[no-any-return]  # one of the two is a tensor


def floating(value: Any) -> list[Tensor]:
    """Return the floating-point (or complex) tensors in a nested value, which alone can be live.

    Args:
        value: Anything.

    Returns:
        The tensors, in order.

    Example:
        >>> floating((torch.ones(1), [torch.arange(3)]))
        [tensor([1.])]
    """
    return [tensor for tensor in tensors_in(value) if tensor.is_floating_point() or tensor.is_complex()]


def transposed_by_autograd(rule: Rule, call: Call, state: Any, gradients: Gradients) -> list[Tensor | None]:
    """Return the transpose of a rule's affine step as autograd derives it, at zero."""
    return _pulled_back(lambda *live: rule.apply(call.filled(live), state), [v.zeros() for v in call.values], gradients)


def _pulled_back(function: Callable[..., Any], points: Sequence[Tensor], gradients: Gradients) -> list[Tensor | None]:
    """Return the coefficients of a function's outputs as those of its arguments, by its derivative at some points."""

    def outputs(*live: Tensor) -> tuple[Tensor, ...]:
        found = floating(function(*live))
        return tuple(out for out, gradient in zip(found, gradients, strict=False) if gradient is not None)

    chosen = tuple(gradient for gradient in gradients if gradient is not None)
    with sdpa_kernel(SDPBackend.MATH):
        if torch._C._functorch.peek_interpreter_stack() is not None:  # coefficients of several labels at once
            return list(torch.func.vjp(outputs, *points)[1](chosen))
        keeps_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # a model that takes gradients has graphs of its own; arguments may depend on one another, or be one tensor
            leaves = [p.view_as(p) if keeps_graph and p.requires_grad else p.detach().requires_grad_() for p in points]
            outs = outputs(*leaves)
            if any(out.requires_grad for out in outs):
                _check_derivable(outs)
            pairs = [pair for pair in zip(outs, chosen, strict=True) if pair[0].requires_grad]
        if not pairs:
            return [None] * len(leaves)
        outs, seeds = zip(*pairs, strict=True)
        found = torch.autograd.grad(outs, leaves, seeds, allow_unused=True, create_graph=torch.is_grad_enabled())
        return list(found)


def _pushed_twice_back(
    function: Callable[..., tuple[Tensor, ...]], points: Sequence[Tensor], moves: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return values and J·v, the transpose of u -> Jᵀ·u, which is linear and so the same at any u.

    Raises:
        NotImplementedError: If the function cannot be derived twice.
    """
    with torch.enable_grad():
        leaves = [point.detach().requires_grad_() for point in points]
        outs = function(*leaves)
        _check_derivable(outs)
        derived = [out for out in outs if out.requires_grad]
        seeds = [torch.ones_like(out, requires_grad=True) for out in derived]
        pulled = torch.autograd.grad(derived, leaves, seeds, create_graph=True, allow_unused=True)
    pairs = [(one, move) for one, move in zip(pulled, moves, strict=True) if one is not None]
    if not pairs or not all(one.requires_grad for one, _ in pairs):
        raise NotImplementedError("the derivative has no derivative")
    ones, directions = zip(*pairs, strict=True)
    pushed = iter(torch.autograd.grad(ones, seeds, directions, allow_unused=True, materialize_grads=True))
    changes = [next(pushed) if out.requires_grad else torch.zeros_like(out) for out in outs]
    return [out.detach() for out in outs], changes


def _check_derivable(outs: Sequence[Tensor]) -> None:
    """Raise if autograd knows no derivative of an operation, rather than take it for zero.

    Raises:
        NotImplementedError: If so.
    """
    nodes = [out.grad_fn for out in outs if out.requires_grad]
    if not nodes or any(node is not None and node.name() == "WarnNotImplemented" for node in nodes):
        raise NotImplementedError(_NO_FORMULA)


def _pushed_one_by_one(
    function: Callable[..., tuple[Tensor, ...]], points: Sequence[Tensor], moves: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return values and J·v by reverse mode alone, one backward pass for each element of the output."""
    with torch.enable_grad():
        leaves = [point.detach().requires_grad_() for point in points]
        outs = function(*leaves)
        _check_derivable(outs)
        elements = [out.reshape(-1).unbind() if out.requires_grad else () for out in outs]
    values, changes = [], []
    for out, flat in zip(outs, elements, strict=True):
        change = torch.zeros_like(out.detach()).reshape(-1)
        for index, element in enumerate(flat):
            rows = torch.autograd.grad(element, leaves, retain_graph=True, allow_unused=True)
            if all(row is None for row in rows):
                raise NotImplementedError(_NO_FORMULA)
            change[index] = sum(
                float((row * move).sum()) for row, move in zip(rows, moves, strict=True) if row is not None
            )
        values.append(out.detach())
        changes.append(change.reshape(out.shape))
    return values, changes


class Linear(Rule):
    """An operation that is affine in its live arguments: nothing is frozen.

    Equation:
        y = F x + b

    Args:
        transpose: From the call and the coefficients of its first output to those of its live arguments; None to have
            autograd derive it.
        keeps_gates: Whether the output is a gate where all live arguments are.
        homogeneous: Whether it makes zeros of zeros, unless there is a constant tensor among its arguments.
        moves: Whether every element of its output is one of its arguments', somewhere else, or zero.

    Example:
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
        *,
        keeps_gates: bool = False,
        homogeneous: bool = False,
        moves: bool = False,
    ) -> None:
        self._transpose = transpose
        self.keeps_gates = keeps_gates
        self.homogeneous = homogeneous
        self.moves = moves

    def freeze(self, call: Call) -> None:
        """Freeze nothing."""

    def apply(self, call: Call, state: None) -> Any:
        """Run the operation itself."""
        return call.run()

    def transpose(self, call: Call, state: None, gradients: Gradients) -> Sequence[Tensor | None]:
        """Apply the transpose."""
        if self._transpose is None or gradients[0] is None:
            return transposed_by_autograd(self, call, state, gradients)
        return self._transpose(call, gradients[0])

    def constants(self, call: Call, state: None) -> Sequence[Tensor | None]:
        """Return what it makes of zeros."""
        if self.homogeneous and not floating((call.args, dict(call.kwargs))):
            return ()
        return super().constants(call, state)

    def is_affine(self, call: Call) -> bool:
        """Return True."""
        return True


class Frozen(Rule):
    """An operation that is constant around the image, such as a comparison or rounding: its value is frozen.

    Equation:
        y = ȳ

    Example:
        >>> from captum_scoremap import freeze
        >>> frozen = freeze(lambda x: x * x.round(), torch.tensor([[1.2, 2.6]]), rules={"round": Frozen()})
        >>> frozen(torch.ones(1, 2))
        tensor([[1., 3.]])
    """

    kind = "value"

    def freeze(self, call: Call) -> Any:
        """Return the value."""
        return call.output

    def apply(self, call: Call, state: Any) -> Any:
        """Return the value, whatever the arguments."""
        return state

    def transpose(self, call: Call, state: Any, gradients: Gradients) -> list[None]:
        """Return nothing: a constant has no coefficients."""
        return [None] * len(call.values)

    def is_constant(self, call: Call) -> bool:
        """Return True."""
        return True

    def switch(self, state: Any) -> Tensor | None:
        """Return the value, where it is a mask or an index."""
        return state if isinstance(state, Tensor) and not state.is_floating_point() else None


class Comparison(Frozen):
    """A comparison of two values: a mask that flips where they are equal.

    Equation:
        y = ȳ, a mask or a sign

    Args:
        other: What the first is compared with where the operation has one argument.

    Example:
        >>> from captum_scoremap import freeze
        >>> frozen = freeze(lambda x: x * (x > 0), torch.tensor([[1.0, -1.0]]), rules={"gt": Comparison()})
        >>> frozen(torch.tensor([[-3.0, 3.0]]))
        tensor([[-3., 0.]])
    """

    def __init__(self, other: float | None = None) -> None:
        self.other = other

    def steps_to_boundary(self, call: Call, changes: Sequence[Tensor], state: Any) -> Tensor:
        """Return the step at which the two are equal."""
        first, second = (call.args[0], self.other) if self.other is not None else call.args[:2]
        return steps_until_equal(call, first, second, changes)


class FirstLinear(Rule):
    """An operation linear in its first argument, with whatever else is live frozen: where to sample.

    Equation:
        y = F̄ x, with F̄ the linear map that the other live arguments make at the image

    Example:
        >>> from captum_scoremap import freeze
        >>> weigh = lambda x: torch.lerp(x, 2 * x, x.sigmoid())
        >>> frozen = freeze(weigh, torch.zeros(1, 1), rules={"lerp": FirstLinear()})
        >>> frozen(torch.zeros(1, 1))
        tensor([[0.]])
    """

    kind = "places"

    def is_affine(self, call: Call) -> bool:
        """Return whether nothing else is live."""
        return len(call.live) == 1 and call.live[0] is call.input

    def freeze(self, call: Call) -> tuple[Tensor, ...] | None:
        """Return the other live arguments."""
        return None if self.is_affine(call) else self._rest(call)

    def apply(self, call: Call, state: tuple[Tensor, ...] | None) -> Any:
        """Run the operation with the others as they were."""
        call = call if state is None else self._with(call, state)
        return call.written_out() if torch.is_grad_enabled() else call.run()  # the kernel, for the same rounding

    def transpose(self, call: Call, state: tuple[Tensor, ...] | None, gradients: Gradients) -> list[Tensor | None]:
        """Return the coefficients of the first argument."""
        if not call.is_live(call.input):
            return [None] * len(call.values)
        with _named(call):
            return transposed_by_autograd(self, call, state, gradients)

    @staticmethod
    def _rest(call: Call) -> tuple[Tensor, ...]:
        return call.live[1:] if call.is_live(call.input) else call.live

    @staticmethod
    def _with(call: Call, rest: tuple[Tensor, ...]) -> Call:
        return call.filled((call.input, *rest) if call.is_live(call.input) else rest)


def _move(now: Tensor, then: Tensor) -> Tensor:
    """Return the change of an argument; none where it is infinite, as a mask makes it."""
    return torch.where(then.isinf(), 0, now.broadcast_to(then.shape) - then)


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
        """Return the value at the image plus the derivative along the change: J·v as the transpose of u -> Jᵀ·u."""

        def outputs(*live: Tensor) -> tuple[Tensor, ...]:
            return tuple(floating(self._run(call, live)))

        moves = tuple(_move(now, then) for now, then in zip(call.live, state, strict=True))
        # of the kernels of attention only the plain one can be derived twice
        with _named(call), sdpa_kernel(SDPBackend.MATH):
            try:
                if torch._C._functorch.peek_interpreter_stack() is None:
                    values, changes = _pushed_twice_back(outputs, state, moves)
                else:
                    values, pull = torch.func.vjp(outputs, *state)[:2]
                    push = torch.func.vjp(pull, tuple(map(torch.ones_like, values)))[1]  # linear, so the same anywhere
                    (changes,) = push(moves)
            except (RuntimeError, NotImplementedError):  # a kernel that can be derived once
                values, changes = _pushed_one_by_one(outputs, state, moves)
        remaining = iter([value + change for value, change in zip(values, changes, strict=True)])
        whole = self._run(call, state)
        return substituted(whole, lambda tensor: next(remaining) if floating(tensor) else tensor)

    def transpose(self, call: Call, state: tuple[Tensor, ...], gradients: Gradients) -> list[Tensor | None]:
        """Return f'(x)ᵀ times the coefficients."""
        with _named(call):
            shares = _pulled_back(lambda *live: self._run(call, live), state, gradients)
        if torch.Tag.pointwise not in getattr(call.operation, "tags", ()) or gradients[0] is None:
            return shares
        # what the score does not depend on has no share, though its slope may be infinite
        unread = gradients[0] == 0
        return [one if one is None or one.shape != unread.shape else one.masked_fill(unread, 0.0) for one in shares]

    @staticmethod
    def _run(call: Call, live: Sequence[Tensor]) -> Any:
        return call.filled(live).written_out()


@contextmanager
def _named(call: Call) -> Iterator[None]:
    """Name the operation whose derivative autograd does not know.

    Raises:
        NoDerivativeError: If so.
        RuntimeError: Any other one.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _UNDERIVABLE):
            raise
        raise NoDerivativeError(call.operation.overloadpacket.__name__, error) from error  # type: ignore[attr-defined]


class Backward(FirstLinear):
    """A backward operation of PyTorch's, as a model that takes a gradient runs it: linear in the gradient it is given.

    What was saved for it is frozen; where only that is live, its tangent is taken.

    Equation:
        y = F̄ g, with g the gradient it is given and F̄ from what was saved, at the image
    """

    def variant(self, call: Call) -> Rule:
        """Return the tangent where the gradient that it is given is a constant."""
        return self if call.is_live(call.input) else Tangent()
