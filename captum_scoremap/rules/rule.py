"""What a rule is: the exact linear form of one operation at the image.

A rule says what of an operation is *frozen* at the image (a mask, a switch, a gate, a scale) and how the operation acts
on its live arguments, those that depend on the image, once that is frozen. At the image itself the frozen operation
returns what the operation returns; anywhere else it is affine.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = [
    "Call",
    "Comparison",
    "Composite",
    "EvaluationOnly",
    "FirstOnly",
    "Frozen",
    "Identity",
    "Linear",
    "Rule",
    "Tangent",
    "substituted",
    "tensors_in",
]


# Elements of a large argument, for which an operation's own adjoint saves more than the calls of Python that it takes.
_LARGE = 2**18

_NUMBERS = frozenset({int, float, bool, type(None)})


def tensors_in(value: object) -> list[Tensor]:
    """Every tensor in nested tuples, lists and dicts, in order.

    Args:
        value: Anything.

    Returns:
        The tensors.

    Example:
        >>> [tensor.item() for tensor in tensors_in((torch.tensor(1), {"key": [torch.tensor(2), None]}))]
        [1, 2]
    """
    found: list[Tensor] = []
    _collect((value,), found)
    return found


def _collect(items: Iterable[object], found: list[Tensor]) -> None:
    # no generator, and numbers first: this runs for every operation of a model
    for item in items:
        if type(item) in _NUMBERS:
            continue
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (tuple, list)):
            _collect(item, found)
        elif isinstance(item, dict):
            _collect(item.values(), found)


@dataclass(frozen=True)
class Call:
    """One call of an operation by the model.

    Attributes:
        function: What the model called, in its out-of-place form.
        args: Positional arguments.
        kwargs: Keyword arguments.
        live: The arguments that depend on the image, in order; one that is given twice stands here twice.
        is_gate: Whether a live tensor acts as a constant factor in a product (a sigmoid, attention weights, 1/norm).
        in_place: Whether the model has the first argument changed in place.
        keep: Whether what is frozen outlives the call.

    Example:
        >>> x = torch.tensor([-1.0, 2.0])
        >>> call = Call(torch.relu, (x,), {}, live=(x,), is_gate=lambda tensor: False)
        >>> call.run(), call.is_live(x)
        (tensor([0., 2.]), True)
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    live: tuple[Tensor, ...]
    is_gate: Callable[[Tensor], bool]
    in_place: bool = False
    keep: bool = False

    @property
    def input(self) -> Tensor:
        """The first argument."""
        if self.args:
            first = self.args[0]
        else:
            first = self.kwargs["input"] if "input" in self.kwargs else next(iter(self.kwargs.values()))
        return first  # type: ignore[no-any-return]  # every operation with a rule takes a tensor first

    @property
    def is_large(self) -> bool:
        """Whether the first argument has so many elements that memory counts more than the time of a few calls."""
        return self.input.numel() >= _LARGE

    def run(self) -> Any:
        """What the operation itself returns."""
        return self.function(*self.args, **self.kwargs)

    def is_live(self, tensor: Tensor) -> bool:
        """Whether an argument depends on the image."""
        return any(tensor is one for one in self.live)

    def only_gates(self) -> bool:
        """Whether every live argument is a gate."""
        return all(map(self.is_gate, self.live))

    def frozen(self, tensor: Tensor) -> Tensor:
        """The value of a live tensor at the image, as a constant that shares no memory with what may change."""
        return tensor.detach().clone() if self.keep or self.in_place else tensor.detach()


class Rule(ABC):
    """The linear form of one operation.

    To write one, say what is frozen and how it is applied.

    Attributes:
        kind: What it freezes, in one word, for reports.
        native: Whether autograd's own derivative of the operation, at the image, already is the linear form, so that
            the operation itself can run there, and in place.
        lean: Whether autograd, where the operation itself runs, needs no more of its live arguments than their shapes.
        gate: Whether its output is a gate: a constant factor where it meets a live factor in a product.
        passes_or_closes: Whether each element comes out either unchanged or with a coefficient of zero.

    Example:
        >>> from captum_scoremap import freeze
        >>> class Square(Rule):  # x * x, one factor frozen
        ...     def freeze(self, call):
        ...         return call.frozen(call.input)
        ...
        ...     def apply(self, call, state):
        ...         return state * call.input
        >>> frozen = freeze(torch.square, torch.tensor([[3.0]]), rules={"square": Square()})
        >>> frozen(torch.tensor([[3.0]])), frozen(torch.tensor([[1.0]]))
        (tensor([[9.]]), tensor([[3.]]))
    """

    kind: str = "custom"
    native: bool = False
    lean: bool = False
    gate: bool = False
    passes_or_closes: bool = False

    @abstractmethod
    def freeze(self, call: Call) -> Any:
        """What the operation freezes at the image; called there, without gradients."""

    @abstractmethod
    def apply(self, call: Call, state: Any) -> Any:
        """The output of the frozen operation: affine in the live arguments, equal to ``call.run()`` at the image."""

    def is_affine(self, call: Call) -> bool:
        """Whether the operation, as called, is affine in its live arguments already: then it just runs, anywhere."""
        return False

    def record(self, call: Call, run: Callable[[], Any]) -> tuple[Any, Any]:
        """The output at the image and what is frozen there, together, as one may come cheaper with the other.

        Args:
            call: The call, at the image.
            run: Runs the operation as the model called it, in place where it did.

        Returns:
            The output and the state.
        """
        with torch.no_grad():
            state = self.freeze(call)
        return (run() if self.native else self.apply(call, state)), state

    def has_adjoint(self, call: Call) -> bool:
        """Whether :meth:`adjoint` knows the backward pass of this call; else it is left to autograd."""
        return False

    def adjoint(self, call: Call, state: Any) -> Callable[[Tensor], Tensor]:
        """The backward pass of a call whose first argument alone is live: from the gradient of the output to its own.

        Args:
            call: The call, at the image.
            state: What is frozen.

        Returns:
            The function, which must hold on to nothing but what is frozen, and leave its argument as it is.

        Raises:
            NotImplementedError: By a rule that has none.
        """
        raise NotImplementedError(f"{type(self).__name__} has no adjoint of its own.")

    def makes_gate(self, call: Call) -> bool:
        """Whether the output of this call is a gate."""
        return self.gate

    def switch(self, state: Any) -> Tensor | None:
        """The discrete part of what is frozen: a mask or indices; None where nothing is."""
        return None

    def steps_to_boundary(self, call: Call, tangent: Callable[[Tensor], Tensor], state: Any) -> Tensor | None:
        """Steps along a direction at which each switch flips, infinite where it never does; None without switches.

        Args:
            call: The call, at the image.
            tangent: From an argument to its change per unit step.
            state: What is frozen.

        Returns:
            The steps, in any shape.
        """
        return None


class Linear(Rule):
    """An operation that is affine in its live arguments: nothing is frozen.

    Args:
        keeps_gates: Whether the output is a gate where all live arguments are.

    Example:
        >>> from captum_scoremap import linear_form
        >>> form = linear_form(lambda x: torch.cumsum(x, 1)[:, -1], torch.ones(1, 3), rules={"cumsum": Linear()})
        >>> form.coefficients, form.bias
        (tensor([[1., 1., 1.]]), tensor([0.]))
    """

    kind = "linear"

    def __init__(self, *, keeps_gates: bool = False) -> None:
        self.keeps_gates = keeps_gates

    def is_affine(self, call: Call) -> bool:
        """Always."""
        return True

    def freeze(self, call: Call) -> None:
        """Nothing."""

    def apply(self, call: Call, state: None) -> Any:
        """The operation itself."""
        return call.run()

    def makes_gate(self, call: Call) -> bool:
        """Where all live arguments are gates."""
        return self.keeps_gates and call.only_gates()


class Identity(Linear):
    """``detach`` and ``data``: the value passes on, and so does its share of the score."""

    def __init__(self) -> None:
        super().__init__(keeps_gates=True)

    def is_affine(self, call: Call) -> bool:
        """Not as PyTorch runs it, which would cut the gradient."""
        return False

    def apply(self, call: Call, state: None) -> Tensor:
        """The input."""
        return call.input.view_as(call.input)


class EvaluationOnly(Linear):
    """Dropout and batch norm: affine in evaluation mode; in training mode no function of one image at all.

    Args:
        training: Position of the argument that says which mode it is.
        keeps_gates: As for :class:`Linear`.
    """

    def __init__(self, training: int, *, keeps_gates: bool = False) -> None:
        super().__init__(keeps_gates=keeps_gates)
        self.training = training

    def is_affine(self, call: Call) -> bool:
        """Always, in evaluation mode.

        Returns:
            True.

        Raises:
            ValueError: In training mode.
        """
        training = call.args[self.training] if len(call.args) > self.training else call.kwargs.get("training", False)
        if training and (call.kwargs.get("p", 1.0) or len(call.args) > 1):
            raise ValueError(
                f"{getattr(call.function, '__name__', 'the model')} must run in evaluation mode, with statistics and "
                "connections that do not depend on the batch or on chance; got training mode. Call model.eval()."
            )
        return True


class Frozen(Rule):
    """An operation that is constant around the image, such as a comparison or rounding: its value is frozen.

    Example:
        >>> from captum_scoremap import freeze
        >>> frozen = freeze(lambda x: x * x.round(), torch.tensor([[1.2, 2.6]]), rules={"round": Frozen()})
        >>> frozen(torch.ones(1, 2))
        tensor([[1., 3.]])
    """

    kind = "value"

    def freeze(self, call: Call) -> Any:
        """The value."""
        # detached, for torch warns of a number taken from a tensor that requires gradients
        constants = {id(tensor): tensor.detach() for tensor in tensors_in((call.args, call.kwargs))}
        return call.function(*substituted(call.args, constants), **substituted(dict(call.kwargs), constants))

    def apply(self, call: Call, state: Any) -> Any:
        """The value, whatever the arguments."""
        return state

    def switch(self, state: Any) -> Tensor | None:
        """The value, where it is a mask or an index."""
        return state if isinstance(state, Tensor) and not state.is_floating_point() else None


class Comparison(Frozen):
    """A comparison of two values: a mask that flips where they are equal.

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

    def steps_to_boundary(self, call: Call, tangent: Callable[[Tensor], Tensor], state: Any) -> Tensor:
        """Step at which the two are equal."""

        def pair(input: Any, other: Any = self.other) -> tuple[Any, Any]:
            return input, other

        values = pair(*call.args, **call.kwargs)
        changes = [tangent(value) if isinstance(value, Tensor) else 0.0 for value in values]
        return (values[1] - values[0]) / (changes[0] - changes[1])  # type: ignore[no-any-return]


class FirstOnly(Rule):
    """An operation linear in its first argument, with whatever else is live frozen: where to sample.

    Example:
        >>> x, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
        >>> call = Call(torch.mul, (x, y), {}, live=(x, y), is_gate=lambda tensor: False)
        >>> FirstOnly().freeze(call)
        [tensor([3., 4.])]
    """

    kind = "places"

    def is_affine(self, call: Call) -> bool:
        """Where nothing else is live."""
        return not self._rest(call)

    def freeze(self, call: Call) -> list[Tensor]:
        """The other live arguments."""
        return [call.frozen(tensor) for tensor in self._rest(call)]

    def apply(self, call: Call, state: list[Tensor]) -> Any:
        """The operation with the others as they were."""
        values = {id(tensor): value for tensor, value in zip(self._rest(call), state, strict=True)}
        return call.function(*substituted(call.args, values), **substituted(dict(call.kwargs), values))

    @staticmethod
    def _rest(call: Call) -> list[Tensor]:
        return [tensor for tensor in call.live if tensor is not call.input]


class Tangent(Rule):
    """The local linearization: f(x) + f'(x) (· - x), with everything else in the offset.

    This is the rule for any differentiable operation that is no gate; then A is the ordinary gradient.

    Args:
        gate: Whether the output is a gate.

    Example:
        >>> from captum_scoremap import freeze
        >>> frozen = freeze(torch.cos, torch.zeros(1, 2), rules={"cos": Tangent()})
        >>> frozen(torch.ones(1, 2))  # the slope at zero is zero
        tensor([[1., 1.]])
    """

    kind = "tangent"
    native = True

    def __init__(self, *, gate: bool = False) -> None:
        self.gate = gate

    def freeze(self, call: Call) -> Any:
        """The live arguments at the image."""
        return [call.frozen(tensor) for tensor in self._live(call)]

    def apply(self, call: Call, state: list[Tensor]) -> Any:
        """The value at the image and its directional derivative."""
        live = self._live(call)

        def function(*values: Tensor) -> Any:
            substitute = {id(tensor): value for tensor, value in zip(live, values, strict=True)}
            return call.function(*substituted(call.args, substitute), **substituted(dict(call.kwargs), substitute))

        def outputs(*values: Tensor) -> tuple[Tensor, ...]:
            return tuple(tensor for tensor in tensors_in(function(*values)) if tensor.is_floating_point())

        # J·v as the adjoint of u -> Jᵀu, which needs nothing but reverse mode; of the kernels of attention only the
        # plain one can be derived twice
        with sdpa_kernel(SDPBackend.MATH):
            values, transposed = torch.func.vjp(outputs, *state)[:2]
            derivative = torch.func.vjp(transposed, tuple(map(torch.zeros_like, values)))[1]
        (changes,) = derivative(tuple(tensor - point for tensor, point in zip(live, state, strict=True)))
        whole = function(*state)
        floating = [tensor for tensor in tensors_in(whole) if tensor.is_floating_point()]
        return substituted(whole, {id(t): v + c for t, v, c in zip(floating, values, changes, strict=True)})

    @staticmethod
    def _live(call: Call) -> list[Tensor]:
        return list({id(tensor): tensor for tensor in call.live}.values())


class Composite(Rule):
    """An operation made of smaller ones, each under its own rule.

    Args:
        body: The same computation, with the operation's signature.

    Example:
        >>> from captum_scoremap import freeze
        >>> rules = {"tanhshrink": Composite(lambda input: input - input.tanh())}
        >>> freeze(torch.nn.functional.tanhshrink, torch.ones(1, 2), rules=rules)(torch.zeros(1, 2))
        tensor([[0., 0.]])
    """

    kind = "composite"

    def __init__(self, body: Callable[..., Any]) -> None:
        self.body = body

    def freeze(self, call: Call) -> None:
        """Nothing: the smaller operations freeze."""

    def apply(self, call: Call, state: None) -> Any:
        """The body; whoever runs the model runs it under the rules."""
        return self.body(*call.args, **call.kwargs)


def substituted(value: Any, substitute: Mapping[int, Any]) -> Any:
    """The same nested tuples, lists and dicts, with tensors exchanged by identity.

    Args:
        value: Anything.
        substitute: Identity (``id``) of a tensor to what goes in its place.

    Returns:
        The value with other tensors.

    Example:
        >>> x, y = torch.tensor(1), torch.tensor(2)
        >>> substituted((x, ["same", x]), {id(x): y})
        (tensor(2), ['same', tensor(2)])
    """
    if isinstance(value, Tensor):
        return substitute.get(id(value), value)
    if isinstance(value, (tuple, list)):
        items = [substituted(item, substitute) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: substituted(item, substitute) for key, item in value.items()}
    return value
