"""Changes in place: what a tensor's memory holds, as values of the tape.

Steps never change anything. Where the model changes memory, the memory gets a new value: that of the whole tensor, or,
where a view is changed, the values of the memory before with the view's new ones scattered into them. A tensor that is
read after its memory changed is read from the memory's last value, by its strides.
"""

import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from captum_scoremap.rules import Value

from .steps import Kept

__all__ = ["Before", "Memory", "are_apart", "geometry", "overlaps"]

Geometry = tuple[torch.Size, tuple[int, ...], int]

aten = torch.ops.aten


class _Changed:
    """Memory that was changed in place.

    Attributes:
        storage: Keeps its address from being reused, but not its memory.
        clock: When it was changed last.
        value: What it holds; None for constants.
        geometry: Shape, strides and offset of that value in the memory.
        length: Elements of the memory.
        was_constant: Whether it held constants alone before it was changed.
        has_site: Whether a value begins in it at a site, where a constant was.
    """

    __slots__ = ("_changes", "_element", "clock", "geometry", "has_site", "length", "storage", "value", "was_constant")

    def __init__(self, tensor: Tensor) -> None:
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.length = tensor.untyped_storage().nbytes() // tensor.element_size()
        self.clock = 0
        self.value: Value | None = None
        self.geometry = geometry(tensor)
        self.was_constant = self.has_site = False
        self._changes: list[tuple[int, Geometry]] = []
        self._element = tensor.element_size()

    def changed_at(self, tensor: Tensor, clock: int) -> None:
        """Note a change, where a tensor lies."""
        self.clock = clock
        self._changes.append((clock, geometry(tensor)))
        if tensor.element_size() != self._element:
            self._element = 0  # places of elements of several sizes are not compared

    def leaves(self, tensor: Tensor, clock: int) -> bool:
        """Return whether nothing changed, since then, where a tensor lies."""
        if clock >= self.clock:
            return True
        place = geometry(tensor)
        return tensor.element_size() == self._element and all(
            are_apart(place, other) for when, other in self._changes if when > clock
        )


class Before:
    """What the memory of a view held before the view was changed: a flat value, or a flat constant."""

    __slots__ = ("content", "tensor")

    def __init__(self, content: Any, tensor: Tensor) -> None:
        self.content = content
        self.tensor = tensor


class Beneath:
    """What lies beneath a value that begins at a site in the midst of other memory.

    Attributes:
        value: The value that the site's tensor is a view of; None if it is none.
        geometry: Where that lies in memory.
        clock: When the value began.
    """

    __slots__ = ("clock", "geometry", "value")

    def __init__(self, value: Value | None, geometry: Geometry | None, clock: int) -> None:
        self.value, self.geometry, self.clock = value, geometry, clock


class Memory:
    """Which memory changed, and what refers to it.

    Args:
        record: Records one more step: an operation, its arguments (with values where they are live), the tensors of
            those values, and a tensor like its output; returns the value of that.
    """

    def __init__(self, record: Callable[[Any, tuple[Any, ...], Sequence[Tensor], Tensor], Value]) -> None:
        self.clock = 0
        self.changed: dict[int, _Changed] = {}
        self._record = record
        self._held: dict[int, list[weakref.ref[Kept]]] = {}

    def keep(self, tensor: Tensor) -> Kept:
        """Hold on to a tensor as it is now, for as long as somebody holds on to what is returned."""
        kept = Kept(tensor)
        self._held.setdefault(tensor.untyped_storage()._cdata, []).append(weakref.ref(kept))
        return kept

    def about_to_change(self, target: Tensor) -> None:
        """Copy what is held of a tensor's memory, before it changes."""
        if self._held:
            for reference in self._held.pop(target.untyped_storage()._cdata, ()):
                kept = reference()
                if kept is not None:
                    kept.tensor = kept.tensor.clone()

    def whole_before(self, target: Tensor, value: Value | None) -> Before | None:
        """Return what the memory of a view holds before the view is changed.

        Args:
            target: The view.
            value: What it holds, if that is live.

        Returns:
            It, or None where the target is all of its memory.
        """
        if value is not None:
            _check_read_alike(target, (value.root or (value,))[0].dtype)
        storage = target.untyped_storage()
        length = storage.nbytes() // target.element_size()
        if _fills(geometry(target), length):
            return None
        flat = target.detach().as_strided((length,), (1,), 0)
        memory = self.changed.get(storage._cdata)
        root: Value | None = None
        place = geometry(target)
        if value is not None:
            root, place = value.root or (value, place)
            if memory is not None and memory.value is None and root.beneath and root.beneath.clock < memory.clock:
                root, place = value, geometry(target)  # around it, constants changed since the root began at a site
        content: Any = flat.clone()  # the numbers outside of the root are constants
        if memory is not None and memory.value is not None:
            content = self._flat(memory, target)
            if root is None or root.beneath is None or root.beneath.clock < memory.clock:
                root = None  # the memory knows
        elif root is None:
            return Before(content, flat)
        else:
            for one, where in reversed(_beneath(root)):
                content = self._scattered(content, one, where, flat)
        if root is not None:
            content = self._scattered(content, root, place, flat)
        return Before(content, flat.clone())

    def holds_live(self, tensor: Tensor) -> bool:
        """Return whether something live lies in the memory of a tensor, there or elsewhere in it."""
        memory = self.changed.get(tensor.untyped_storage()._cdata)
        return memory is not None and (memory.value is not None or memory.has_site)

    def begins(self, value: Value) -> None:
        """Note that a value begins at a site: other tensors of its memory go on holding what they held."""
        root, place = value.root or (None, None)
        value.beneath = Beneath(root, place, self.clock)
        value.root = None

    def held_constants(self, tensor: Tensor) -> bool:
        """Return whether the memory of a live tensor may hold constants, or held some that steps refer to."""
        memory = self.changed.get(tensor.untyped_storage()._cdata)
        return memory is not None and (memory.was_constant or memory.has_site)

    def born(self, constant: Tensor) -> None:
        """Note that a value begins at a site where a constant was: its memory may change as that of constants."""
        memory = self.changed.get(constant.untyped_storage()._cdata)
        if memory is None:
            memory = self.changed[constant.untyped_storage()._cdata] = _Changed(constant)
            memory.was_constant = True
        memory.has_site = True

    def now_holds(self, target: Tensor, value: Value | None, before: Before | None) -> None:
        """Note that a tensor was changed in place.

        Args:
            target: The tensor.
            value: What it holds now; None for constants.
            before: What :meth:`whole_before` returned.
        """
        _check_read_alike(target, target.dtype)
        self.clock += 1
        address = target.untyped_storage()._cdata
        memory = self.changed.get(address)
        if memory is None:
            # the tensor and the storage's own handle: nobody else reads this memory
            if before is None and torch._C._storage_Use_Count(address) <= 2:
                return
            memory = self.changed[address] = _Changed(target)
            memory.was_constant = before is not None and not isinstance(before.content, Value)
        memory.changed_at(target, self.clock)
        if before is None:
            memory.value, memory.geometry = value, geometry(target)
            return
        if value is None and not isinstance(before.content, Value):
            memory.value = None
            return
        source: Any = target.detach().clone() if value is None else value
        flat = target.detach().as_strided((memory.length,), (1,), 0)
        args = before.content, source, *geometry(target)
        memory.value = self._record(aten.as_strided_scatter.default, args, (before.tensor, target), flat)
        memory.geometry = (flat.shape, (1,), 0)

    def read(self, tensor: Tensor, memory: _Changed) -> Value | None:
        """Return what a tensor holds whose memory changed since it was made."""
        if memory.value is not None:
            _check_read_alike(tensor, memory.value.dtype)
        if memory.value is None or memory.geometry == geometry(tensor):
            return memory.value
        flat = tensor.detach().as_strided((memory.length,), (1,), 0)
        args = self._flat(memory, tensor), *geometry(tensor)
        return self._record(aten.as_strided.default, args, (flat,), tensor)

    def strided(self, known: Tensor, value: Value, tensor: Tensor) -> Value | None:
        """Return the value of a view by strides, which may lie outside of the tensor that it is taken of.

        Returns:
            It, or None where that tensor is all of its memory.
        """
        before = self.whole_before(known, value)
        if before is None:
            return None
        return self._record(aten.as_strided.default, (before.content, *geometry(tensor)), (before.tensor,), tensor)

    def view(self, known: Tensor, value: Value, tensor: Tensor) -> Value:
        """Return the value of another tensor of the memory of a known one."""
        if geometry(known) == geometry(tensor):
            return value
        memory = _Changed(known)
        memory.value, memory.geometry = value.root or (value, geometry(known))
        found = self.read(tensor, memory)
        return value if found is None else found

    def _flat(self, memory: _Changed, like: Tensor) -> Value:
        """Return the memory's value as one row of all its elements."""
        value, row = memory.value, (torch.Size((memory.length,)), (1,), 0)
        if value is None:
            raise AssertionError("only live memory is read")
        if memory.geometry != row:
            flat = like.detach().as_strided(*row)
            memory.value = value = self._scattered(torch.zeros_like(flat), value, memory.geometry, flat)
            memory.geometry = row
        return value

    def _scattered(self, before: Any, source: Value, place: Geometry, flat: Tensor) -> Value:
        args = before, source, *place
        tensors = (flat, flat.as_strided(*place))
        return self._record(aten.as_strided_scatter.default, args, tensors, flat)


def _beneath(value: Value) -> list[tuple[Value, Geometry]]:
    """Return what lies beneath a value in memory, and where: sites within sites, from the next one down."""
    found = []
    while value.beneath is not None and value.beneath.value is not None:
        found.append((value.beneath.value, value.beneath.geometry))
        value = value.beneath.value
    return found


def _check_read_alike(tensor: Tensor, written: torch.dtype) -> None:
    """Raise where a tensor reads complex numbers in memory otherwise than they were written.

    Raises:
        TypeError: If so.
    """
    if tensor.is_conj() or tensor.is_neg() or tensor.is_complex() != written.is_complex:
        raise TypeError(
            "complex numbers that change in place must be read and changed by complex views that are no conjugates, "
            f"got {'a conjugate' if tensor.is_conj() else 'a'} view of {tensor.dtype}. Change a copy: "
            "torch.view_as_real(x).clone(), or x.conj().resolve_conj()."
        )


def geometry(tensor: Tensor) -> Geometry:
    """Return where a tensor lies in its memory: shape, strides and offset."""
    return tensor.shape, tensor.stride(), int(tensor.storage_offset())


def are_apart(place: Geometry, other: Geometry) -> bool:
    """Return whether two places in memory share no element; False where that takes more than a look at each axis.

    Where every stride divides the next larger one, the position of an element is a number whose digits are its indices
    along the axes, and a place is a box of digits. Two boxes are apart if they are along one axis.
    """
    strides = sorted({
        step for sizes, steps, _ in (place, other) for n, step in zip(sizes, steps, strict=True) if n > 1
    })
    strides = [1, *(step for step in strides if step > 1)]
    if any(larger % smaller for smaller, larger in pairwise(strides)):
        return False
    digits = [_digits(one, strides) for one in (place, other)]
    if None in digits:
        return False
    return any(end <= start or last <= first for (start, last), (first, end) in zip(*digits, strict=True))


def _digits(place: Geometry, strides: Sequence[int]) -> list[tuple[int, int]] | None:
    """Return from which to below which digit a place reaches, of each stride; None where it is no box."""
    sizes, steps, offset = place
    counts = dict.fromkeys(strides, 1)
    for count, step in zip(sizes, steps, strict=True):
        if count > 1:
            if step not in counts or counts[step] > 1:
                return None  # the same elements again
            counts[step] = count
    found = []
    for step, larger in zip(strides, (*strides[1:], None), strict=True):
        first = offset // step if larger is None else offset % larger // step
        if larger is not None and first + counts[step] > larger // step:
            return None  # it goes on in the next row
        found.append((first, first + counts[step]))
    return found


def overlaps(place: Geometry) -> bool:
    """Return whether a tensor has elements that lie at one place in memory, as windows do."""
    size, stride, _ = place
    if not size.numel():
        return False
    reach = 0
    for step, count in sorted((step, count) for step, count in zip(stride, size, strict=True) if count != 1):
        if step <= reach:  # it may still fit into gaps
            places = torch.zeros((), dtype=torch.long)
            for length, each in zip(size, stride, strict=True):
                places = places[..., None] + torch.arange(length) * each
            return bool(places.unique().numel() < size.numel())
        reach += (count - 1) * step
    return False


def _fills(place: Geometry, length: int) -> bool:
    """Return whether a tensor is all of its memory, each element once."""
    size, stride, offset = place
    if offset or size.numel() != length:
        return False
    expected = 1
    for step, count in sorted((step, count) for step, count in zip(stride, size, strict=True) if count != 1):
        if step != expected:
            return False
        expected *= count
    return True
