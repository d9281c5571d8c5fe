"""Calls of operations, and the live values they read and make."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .written_out import WRITTEN_OUT

__all__ = ["Call", "Value", "floating", "substituted", "tensors_in"]


class Value:
    """A tensor that depends on the image: not its numbers, but its place in the list of steps.

    Args:
        tensor: The tensor.

    Attributes:
        shape: Its shape.
        stride: Its strides at the image, in elements.
        dtype: Its type.
        device: Its device.
        gate: Whether it acts as a constant factor in a product (a sigmoid, attention weights, 1/norm).
        sites: The sites it depends on, a bit for each: :attr:`IMAGE` of the first, the image, and :attr:`FROZEN` of
            the layers that are constants made of it.
        step: Number of the step that makes it; -1 where the tape begins.
        kept: Its tensor, where a pass over part of the tape will read it.
        root: For a view, the value it is a view of, and where that lies in memory: shape, strides, offset.
        beneath: For a value that begins at a site, what its memory held before.

    Example:
        >>> value = Value(torch.ones(2, 3))
        >>> value.shape, value.zeros().sum()
        (torch.Size([2, 3]), tensor(0.))
    """

    IMAGE, FROZEN = 1, 2
    __slots__ = ("beneath", "device", "dtype", "gate", "kept", "root", "shape", "sites", "step", "stride")

    def __init__(self, tensor: Tensor, gate: bool = False, sites: int = 0, step: int = -1) -> None:
        self.shape = tensor.shape
        self.stride = tensor.stride()
        self.dtype = tensor.dtype
        self.device = tensor.device
        self.gate = gate
        self.sites = sites
        self.step = step
        self.kept: Any = None
        self.root: Any = None
        self.beneath: Any = None

    @property
    def is_of_image(self) -> bool:
        """Whether it was made of the image, be it of values that operations such as rounding froze."""
        return bool(self.sites & (self.IMAGE | self.FROZEN))

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def empty(self) -> Tensor:
        """Return a tensor of its layout, for kernels that ask for one but read nothing of it but its layout."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)

    def zeros(self) -> Tensor:
        """Return zeros of its shape."""
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)


@cache
def _schema(operation: Any) -> dict[str, tuple[int, Any]]:
    """Return positions and defaults of an operation's arguments."""
    return {one.name: (position, one.default_value) for position, one in enumerate(operation._schema.arguments)}


# Types of most arguments: told by the type, they take a tenth of the time.
_NUMBERS = frozenset({bool, int, float, str, type(None), torch.device, torch.dtype, torch.layout, torch.memory_format})


@dataclass(slots=True, eq=False)
class Call:
    """One call of an ATen operation.

    Attributes:
        operation: The ``torch.ops`` overload, in its out-of-place form.
        args: Positional arguments.
        kwargs: Keyword arguments.
        live: The arguments that depend on the image, in order: tensors where numbers are known, :class:`Value` where
            the call is a step of the tape.
        values: The same as :class:`Value`.
        output: What the operation returned at the image; known only while it is recorded.

    Example:
        >>> x = torch.tensor([-1.0, 2.0])
        >>> call = Call(torch.ops.aten.relu.default, (x,), {}, live=(x,), values=(Value(x),))
        >>> call.run(), call.is_live(x)
        (tensor([0., 2.]), True)
    """

    operation: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    live: tuple[Any, ...]
    values: tuple[Value, ...]
    output: Any = None

    @property
    def input(self) -> Any:
        """The first argument."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()))

    def argument(self, *names: str, default: Any = None) -> Any:
        """Return an argument by its name in the operation's schema; a default where it has none of that name."""
        known = _schema(self.operation)
        for name in names:
            if name in self.kwargs:
                return self.kwargs[name]
            if name in known:
                position, own = known[name]
                return self.args[position] if position < len(self.args) else own
        return default

    def run(self) -> Any:
        """Return what the operation itself returns."""
        return self.operation(*self.args, **self.kwargs)

    def written_out(self) -> Any:
        """Return the same, by operations that autograd derives wherever the operation has a slope, and twice."""
        return WRITTEN_OUT.get(self.operation, self.operation)(*self.args, **self.kwargs)

    def is_live(self, argument: object) -> bool:
        """Return whether an argument depends on the image."""
        for one in self.live:  # noqa: SIM110  every step asks, and a generator takes three times as long
            if argument is one:
                return True
        return False

    def is_first_alone_live(self) -> bool:
        """Return whether the first argument depends on the image, and no other."""
        return len(self.live) == 1 and len(self.args) > 0 and self.args[0] is self.live[0]

    def is_gate(self, argument: object) -> bool:
        """Return whether a live argument is a gate."""
        return any(argument is one and value.gate for one, value in zip(self.live, self.values, strict=True))

    def only_gates(self) -> bool:
        """Return whether every live argument is a gate."""
        for value in self.values:  # noqa: SIM110  as above
            if not value.gate:
                return False
        return True

    def filled(self, tensors: Iterable[Tensor]) -> "Call":
        """Return the same call with tensors in place of its live arguments, in order."""
        live = tuple(tensors)
        remaining = iter(live)
        args = tuple([self._filled(argument, remaining) for argument in self.args])
        kwargs = {name: self._filled(argument, remaining) for name, argument in self.kwargs.items()}
        return Call(self.operation, args, kwargs, live, self.values)

    def _filled(self, argument: Any, tensors: Iterator[Tensor]) -> Any:
        if type(argument) in _NUMBERS:
            return argument
        if self.is_live(argument):
            return next(tensors)
        if isinstance(argument, (tuple, list)):
            return type(argument)([self._filled(item, tensors) for item in argument])
        return argument


def tensors_in(value: object) -> list[Tensor]:
    """Return every tensor in nested tuples, lists, mappings and dataclasses, in order.

    Args:
        value: Anything.

    Returns:
        The tensors.

    Example:
        >>> [tensor.item() for tensor in tensors_in((torch.tensor(1), {"key": [torch.tensor(2), None]}))]
        [1, 2]
    """
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        found: list[Tensor] = []
        for item in value:  # every step asks; most items are tensors and numbers, which need no call of their own
            if type(item) in _NUMBERS or type(item) is Value:
                continue
            if isinstance(item, Tensor):
                found.append(item)
            else:
                found += tensors_in(item)
        return found
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        return [tensor for name in value.__dataclass_fields__ for tensor in tensors_in(getattr(value, name))]
    return []


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


def substituted(value: Any, substitute: Callable[[Tensor], Any]) -> Any:
    """Return the same nested structure with other things in place of its tensors.

    Tuples, lists, mappings and dataclasses keep their types, and whatever else they know.

    Args:
        value: Anything.
        substitute: From a tensor to what goes in its place.

    Returns:
        The value; itself where nothing in it changes.

    Example:
        >>> substituted((torch.tensor(1), ["same"]), lambda tensor: tensor + 1)
        (tensor(2), ['same'])
    """
    if isinstance(value, Tensor):
        return substitute(value)
    if isinstance(value, (tuple, list)):
        items = [substituted(item, substitute) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping):
        pairs = {key: substituted(item, substitute) for key, item in value.items()}
        changed = {key: item for key, item in pairs.items() if item is not value[key]}
        return _changed(value, changed, lambda copy, key, item: copy.__setitem__(key, item)) if changed else value
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        fields = {name: getattr(value, name) for name in value.__dataclass_fields__}
        changed = {name: new for name, item in fields.items() if (new := substituted(item, substitute)) is not item}
        return _changed(value, changed, object.__setattr__) if changed else value
    return value


def _changed(value: Any, changes: Mapping[Any, Any], assign: Callable[[Any, Any, Any], Any]) -> Any:
    """Return a shallow copy with some entries assigned: a constructor may want other arguments than the entries."""
    shallow = copy.copy(value)
    for key, item in changes.items():
        assign(shallow, key, item)
    return shallow
