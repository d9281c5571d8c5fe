"""Which tensors of a run are live, that is depend on the image, and which value of the tape each of them is."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from captum_scoremap.checks import unrecorded
from captum_scoremap.rules import Value

from .memory import Memory
from .places import Places
from .sight import Sight

__all__ = ["Live"]


class Live:
    """The live tensors of a run, by their identity."""

    def __init__(self, memory: Memory, sight: Sight, places: Places) -> None:
        self._memory, self._sight, self._places = memory, sight, places
        self._values: dict[int, tuple[weakref.ref[Tensor], Value, int]] = {}

    def name(self, tensor: Tensor, value: Value) -> None:
        """Note which value a tensor is, from now on."""
        self._values[id(tensor)] = weakref.ref(tensor), value, self._memory.clock

    def forget(self, tensor: Tensor) -> None:
        """Note that a tensor is no value any more."""
        self._values.pop(id(tensor), None)

    def value_of(self, tensor: Tensor) -> Value | None:
        """Return the value of a tensor; None if it is not live."""
        known = self._values.get(id(tensor))
        # the entry of a tensor that is gone may stand where another one is now
        if known is not None and known[0]() is not tensor:
            known = None
        if self._memory.changed:
            memory = self._memory.changed.get(tensor.untyped_storage()._cdata)
            if memory is not None and (known is None or not memory.leaves(tensor, known[2])):
                is_constant = known is None and memory.was_constant and memory.leaves(tensor, 0)
                value = None if is_constant else self._memory.read(tensor, memory)
                if value is None:
                    self.forget(tensor)
                else:
                    self.name(tensor, value)
                return value
        if known is not None:
            return known[1]
        if type(tensor) is not Parameter and not self._sight.knows(tensor):
            return self._meet(tensor)
        return None

    def symbol(self, argument: Any, live: list[Tensor], values: list[Value]) -> Any:
        """Return an argument with values for its live tensors, which are noted; a number may stand for a tensor."""
        if isinstance(argument, Tensor):
            value = self.value_of(argument)
            if value is not None:
                live.append(argument)
                values.append(value)
                return value
        elif type(argument) is list or type(argument) is tuple:
            return type(argument)([self.symbol(item, live, values) for item in argument])
        return argument

    def has(self, tensor: Tensor) -> bool:
        """Return whether a tensor is live, asked from the model's own code."""
        with unrecorded():  # to read changed memory takes operations
            return self.value_of(tensor) is not None

    def may_lie_in(self, storage: torch.UntypedStorage) -> bool:
        """Return whether memory may hold a live tensor, which may be gone though its memory is not."""
        changed = self._memory.changed.get(storage._cdata)
        return not self._sight.owns(storage._cdata) if changed is None else changed.value is not None

    def _meet(self, tensor: Tensor) -> Value | None:
        """Meet a tensor under a new identity: autograd hands on what it saved as another tensor of the same memory."""
        module = self._places.module
        if tensor.layout is not torch.strided:  # has no memory of its own to share
            self._sight.meet(tensor)
            return None
        for buffer in () if module is None else module._buffers.values():
            if tensor is buffer:
                return None
        address = tensor.untyped_storage()._cdata
        for reference, value, _ in list(self._values.values()):
            known = reference()
            if known is not None and known.untyped_storage()._cdata == address:
                value = self._memory.view(known, value, tensor)
                self.name(tensor, value)
                return value
        self._sight.meet(tensor)
        return None
