"""How a model is called: which of its arguments are tensors, and which are settings that choose what it does."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

__all__ = ["AsPrepared", "Example", "Inputs"]

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any] | None


@dataclass(frozen=True)
class Example:
    """How the model is called.

    Attributes:
        args: Arguments by position; none where they are not known.
        kwargs: Arguments by name.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: Inputs) -> "Example":
        """Return the call that the user shows."""
        if isinstance(inputs, Mapping):
            return cls((), inputs)
        return cls(() if inputs is None else inputs if isinstance(inputs, tuple) else (inputs,))

    @property
    def is_known(self) -> bool:
        """Whether the user shows one."""
        return bool(self.args or self.kwargs)

    def settings(self, forward: Callable[..., Any]) -> dict[str, Any]:
        """Return the arguments that are settings: what is not given, at its default, and what is no tensor."""
        try:
            bound = inspect.signature(forward).bind_partial(*self.args, **self.kwargs)
        except TypeError as error:
            given = [*map(_shown, self.args), *(f"{name}={_shown(value)}" for name, value in self.kwargs.items())]
            raise TypeError(f"inputs must be arguments of the model, got {', '.join(given)}: {error}.") from error
        bound.apply_defaults()
        kinds = {name: parameter.kind for name, parameter in bound.signature.parameters.items()}
        return {
            name: value
            for name, value in bound.arguments.items()
            if kinds[name] is not inspect.Parameter.VAR_POSITIONAL and not _has_tensors(value)
        }


def _has_tensors(value: object) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def _shown(value: object) -> str:
    """Return what errors say of an argument."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    return f"{type(value).__name__} of tensors" if _has_tensors(value) else repr(value)


@dataclass(frozen=True)
class AsPrepared:
    """A forward pre-hook: refuses other settings than those under which norms were folded.

    Attributes:
        settings: Name of each argument that is a setting, and its value.
    """

    settings: Mapping[str, Any]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compare.

        Raises:
            ValueError: One is another.
        """
        try:
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
        except TypeError:  # the model itself says so
            return
        bound.apply_defaults()
        for name, value in self.settings.items():
            got = bound.arguments[name]
            if got is not value and (_has_tensors(got) or type(got) is not type(value) or got != value):
                raise ValueError(
                    f"{name} must be {value!r} for a prepared model, as it was when its norms were folded; got "
                    f"{_shown(got)}. Prepare the model with arguments like these: "
                    f"prepare(model, {{{name!r}: ..., ...}})."
                )
