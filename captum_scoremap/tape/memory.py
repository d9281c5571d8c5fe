"""Changes in place: what a tensor's memory holds, as values of the tape.

Steps never change anything. Where the model changes memory, the memory gets a new value: that of the whole tensor, or,
where a view is changed, the values of the memory before with the view's new ones scattered into them. A tensor that is
read after its memory changed is read from the memory's last value, by its strides.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from captum_scoremap.rules import Value

from .steps import Kept

__all__ = ["Memory"]

Geometry = tuple[torch.Size, tuple[int, ...], int]

aten = torch.ops.aten


class _Changed:
    """Memory that was changed in place.

    Attributes:
        storage: Keeps its address from being given away, not its memory.
        clock: When it was changed last.
        value: What it holds; None for constants.
        geometry: Shape, strides and offset of that value in the memory.
        length: Elements of the memory.
    """

    __slots__ = ("clock", "geometry", "length", "storage", "value")

    def __init__(self, tensor: Tensor) -> None:
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.length = tensor.untyped_storage().nbytes() // tensor.element_size()
        self.clock = 0
        self.value: Value | None = None
        self.geometry = _geometry(tensor)


class Memory:
    """Which memory changed, and who holds on to it.

    Args:
        record: Records one more step: an operation, its arguments (with values where they are live) and a tensor like
            its output; returns the value of that.
    """

    def __init__(self, record: Callable[[Any, tuple[Any, ...], Tensor], Value]) -> None:
        self.clock = 0
        self.changed: dict[int, _Changed] = {}
        self._record = record
        self._held: dict[int, list[Kept]] = {}

    def keep(self, tensor: Tensor) -> Kept:
        """Hold on to a tensor as it is now."""
        kept = Kept(tensor)
        self._held.setdefault(tensor.untyped_storage()._cdata, []).append(kept)
        return kept

    def about_to_change(self, target: Tensor) -> None:
        """Copy what is held of a tensor's memory, before it changes."""
        if self._held:
            for kept in self._held.pop(target.untyped_storage()._cdata, ()):
                kept.tensor = kept.tensor.clone()

    def whole_before(self, target: Tensor, value: Value | None) -> Any:
        """Return what the memory of a view holds before the view is changed: a flat value, or a flat constant tensor.

        Args:
            target: The view.
            value: What its base holds, if that is live.

        Returns:
            It, or None where the target is all of its memory.
        """
        storage = target.untyped_storage()
        length = storage.nbytes() // target.element_size()
        if _fills(_geometry(target), length):
            return None
        memory = self.changed.get(storage._cdata)
        if memory is not None and memory.value is not None:
            return self._flat(memory, target)
        flat = target.detach().as_strided((length,), (1,), 0)
        if value is None:
            return flat.clone()
        base = target if target._base is None else target._base
        return self._scattered(flat.clone(), value, _geometry(base), flat)

    def now_holds(self, target: Tensor, value: Value | None, before: Any) -> None:
        """Note that a tensor was changed in place.

        Args:
            target: The tensor.
            value: What it holds now; None for constants.
            before: What :meth:`whole_before` returned.
        """
        self.clock += 1
        storage = target.untyped_storage()
        address = storage._cdata
        memory = self.changed.get(address)
        if memory is None:
            # the tensor and the storage's own handle: nobody else reads this memory
            if before is None and torch._C._storage_Use_Count(address) <= 2:
                return
            memory = self.changed[address] = _Changed(target)
        memory.clock = self.clock
        if before is None:
            memory.value, memory.geometry = value, _geometry(target)
            return
        if value is None and not isinstance(before, Value):
            memory.value = None
            return
        flat = target.detach().as_strided((memory.length,), (1,), 0)
        source: Any = target.detach().clone() if value is None else value
        memory.value = self._scattered(before, source, _geometry(target), flat)
        memory.geometry = (flat.shape, (1,), 0)

    def read(self, tensor: Tensor, memory: _Changed) -> Value | None:
        """Return what a tensor holds whose memory changed since it was made."""
        if memory.value is None or memory.geometry == _geometry(tensor):
            return memory.value
        size, stride, offset = _geometry(tensor)
        return self._record(aten.as_strided.default, (self._flat(memory, tensor), size, stride, offset), tensor)

    def view(self, known: Tensor, value: Value, tensor: Tensor) -> Value:
        """Return the value of another tensor of the memory of a known one."""
        if _geometry(known) == _geometry(tensor):
            return value
        memory = _Changed(known)
        memory.value = value
        found = self.read(tensor, memory)
        return value if found is None else found

    def _flat(self, memory: _Changed, like: Tensor) -> Value:
        """The memory's value as one row of all its elements."""
        value = memory.value
        if value is None:
            raise AssertionError("only live memory is read")
        if memory.geometry == ((memory.length,), (1,), 0):
            return value
        flat = like.detach().as_strided((memory.length,), (1,), 0)
        memory.value = self._scattered(torch.zeros_like(flat), value, memory.geometry, flat)
        memory.geometry = (flat.shape, (1,), 0)
        return memory.value

    def _scattered(self, before: Any, source: Any, geometry: Geometry, like: Tensor) -> Value:
        return self._record(aten.as_strided_scatter.default, (before, source, *geometry), like)


def _geometry(tensor: Tensor) -> Geometry:
    return tensor.shape, tensor.stride(), tensor.storage_offset()


def _fills(geometry: Geometry, length: int) -> bool:
    """Whether a tensor is all of its memory, each element once."""
    size, stride, offset = geometry
    if offset or size.numel() != length:
        return False
    expected = 1
    for step, count in sorted((step, count) for step, count in zip(stride, size, strict=True) if count != 1):
        if step != expected:
            return False
        expected *= count
    return True
