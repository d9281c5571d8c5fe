"""Changes in place: what a tensor's memory holds, as values of the tape.

Steps never change anything. Where the model changes memory, the memory gets a new value: that of the whole tensor, or,
where a view is changed, the values of the memory before with the view's new ones scattered into them. A tensor that is
read after its memory changed is read from the memory's last value, by its strides.
"""

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from captum_scoremap.checks import unrecorded
from captum_scoremap.rules import Copy, Rule, Value, tensors_in

from .geometry import Geometry, are_apart, fills, geometry
from .module_tracker import ModuleTracker
from .steps import Kept, Step, Tape, sites_of

__all__ = ["Before", "Memory"]

aten = torch.ops.aten


class _Changed:
    """Memory that was changed in place."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage = StorageWeakRef(tensor.untyped_storage())  # keeps its address from being reused, not its memory
        self.length = tensor.untyped_storage().nbytes() // tensor.element_size()  # in elements
        self.clock = 0  # when it was changed last
        self.value: Value | None = None  # what it holds; None for constants
        self.live: Tensor | None = None  # which elements are live, where constants may lie among them
        self.geometry = geometry(tensor)  # where that value lies in it
        self.was_constant = False  # whether it held constants alone before it was changed
        self.has_site = False  # whether a value begins in it at a site, where a constant was
        self._changes: list[tuple[int, Geometry]] = []
        self._element = tensor.element_size()

    def changed_at(self, tensor: Tensor, clock: int) -> None:
        """Note a change, where a tensor lies."""
        self.clock = clock
        self._changes.append((clock, geometry(tensor)))
        if tensor.element_size() != self._element:
            self._element = 0  # places of elements of several sizes are not compared

    def is_constant(self, tensor: Tensor) -> bool:
        """Return whether it is known that constants alone lie where a tensor does, in memory that holds live ones."""
        if self.live is None or tensor.element_size() != self._element:
            return False
        with unrecorded():  # of a graph that is traced it is no part
            return not bool(self.live.as_strided(*geometry(tensor)).any())

    def leaves(self, tensor: Tensor, clock: int) -> bool:
        """Return whether nothing changed, since then, where a tensor lies."""
        if clock >= self.clock:
            return True
        place = geometry(tensor)
        return tensor.element_size() == self._element and all(
            are_apart(place, other) for when, other in self._changes if when > clock
        )

    def left(self, tensor: Tensor, clock: int) -> Tensor:
        """Return which elements of a tensor nothing changed since then; none where that cannot be told."""
        is_told = tensor.element_size() == self._element
        row = torch.full((self.length,), is_told, device=tensor.device)
        for when, place in self._changes if is_told else ():
            if when > clock:
                row.as_strided(*place).zero_()
        return row.as_strided(*geometry(tensor))


class Before(NamedTuple):
    """What the memory of a view held before the view was changed, in one row: a value or a constant, and its tensor."""

    content: Any
    tensor: Tensor


class Beneath(NamedTuple):
    """What lies beneath a value that begins at a site in the midst of other memory."""

    value: Value | None  # that the site's tensor is a view of; None if it is none
    geometry: Geometry | None  # where that lies in memory
    clock: int  # when the value began


class Memory:
    """Which memory changed, and what refers to it; writes reads of it, and its new values, as steps."""

    def __init__(self, tape: Tape, rules: Mapping[str, Rule], modules: ModuleTracker, *, keep_bypass: bool) -> None:
        self.clock = 0
        self.changed: dict[int, _Changed] = {}
        self._tape, self._rules, self._modules, self._keeps_bypass = tape, rules, modules, keep_bypass
        self._held: dict[int, list[weakref.ref[Kept]]] = {}
        self._readers: dict[int, list[Step]] = {}  # steps by the memory of constants among their arguments
        self._indexed = 0  # how many of the steps are in there

    def keep(self, tensor: Tensor) -> Kept:
        """Hold on to a tensor as it is now, for as long as somebody holds on to what is returned."""
        kept = Kept(tensor)
        self._held.setdefault(tensor.untyped_storage()._cdata, []).append(weakref.ref(kept))
        return kept

    def keep_bypass(self, values: Sequence[Value], tensors: Sequence[Tensor]) -> None:
        """Keep what a step reads and that depends on fewer sites than others that it reads."""
        if self._keeps_bypass:
            sites = sites_of(values)
            for value, tensor in zip(values, tensors, strict=True):
                if value.sites != sites and value.kept is None:
                    value.kept = self.keep(tensor)

    def about_to_change(self, target: Tensor) -> None:
        """Copy what is held of a tensor's memory, before it changes."""
        if self._held:
            for reference in self._held.pop(target.untyped_storage()._cdata, ()):
                kept = reference()
                if kept is not None:
                    kept.tensor = kept.tensor.clone()

    def release_constants(self, target: Tensor, changing: Step | None = None) -> None:
        """Copy a constant that steps refer to, and the one that is about to change it."""
        address = target.untyped_storage()._cdata
        for step in self._tape.steps[self._indexed :]:
            for tensor in tensors_in((step.args, step.kwargs)):
                if tensor.layout is torch.strided:
                    self._readers.setdefault(tensor.untyped_storage()._cdata, []).append(step)
        self._indexed = len(self._tape.steps)
        changing_too = [changing] if changing is not None and not isinstance(changing.rule, Copy) else []
        for step in (*self._readers.pop(address, ()), *changing_too):
            step.args = tuple(_copied(argument, address) for argument in step.args)
            step.kwargs = {name: _copied(argument, address) for name, argument in step.kwargs.items()}

    def whole_before(self, target: Tensor, value: Value | None) -> Before | None:
        """Return what the memory of a view holds before the view is changed; None where that is all of its memory."""
        storage = target.untyped_storage()
        memory = self.changed.get(storage._cdata)
        held = (value and (value.root or (value,))[0], None if memory is None else memory.value)
        for live in filter(None, held):
            self._check_read_alike(target, live.dtype)
        length = storage.nbytes() // target.element_size()
        if fills(target, length):
            return None
        flat = target.detach().as_strided((length,), (1,), 0).clone()  # its numbers are constants where nothing is live
        if memory is not None:
            return Before(flat if memory.value is None else self._flat(memory, target), flat)
        if value is None:
            return Before(flat, flat)
        root, place, _ = _standing(value, geometry(target))[0]
        return Before(self._scattered(flat, root, place, flat), flat)

    def holds_live(self, tensor: Tensor) -> bool:
        """Return whether something live lies in the memory of a tensor, there or elsewhere in it."""
        memory = self.changed.get(tensor.untyped_storage()._cdata)
        return memory is not None and (memory.value is not None or memory.has_site)

    def site_begins(self, value: Value) -> None:
        """Note that a value begins at a site: other tensors of its memory go on holding what they held."""
        root, place = value.root or (None, None)
        value.beneath = Beneath(root, place, self.clock)
        value.root = None

    def is_alone(self, tensor: Tensor) -> bool:
        """Return whether nothing else refers to a tensor's memory."""
        return _uses(tensor) <= _ALONE

    def is_constant(self, view: Tensor) -> bool:
        """Return whether it is known that constants alone lie where a view of a live tensor does."""
        memory = self.changed.get(view.untyped_storage()._cdata) if self.changed else None
        return memory is not None and memory.is_constant(view)

    def held_constants(self, tensor: Tensor) -> bool:
        """Return whether the memory of a live tensor may hold constants, or held some that steps refer to."""
        memory = self.changed.get(tensor.untyped_storage()._cdata)
        return memory is not None and (memory.was_constant or memory.has_site or memory.live is not None)

    def constant_begins(self, constant: Tensor) -> None:
        """Note that a value begins at a site where a constant was: its memory may change as that of constants."""
        memory = self.changed.get(constant.untyped_storage()._cdata)
        if memory is None:
            memory = self.changed[constant.untyped_storage()._cdata] = _Changed(constant)
            memory.was_constant = True
        memory.has_site = True

    def now_holds(self, target: Tensor, value: Value | None, before: Before | None) -> None:
        """Note that a tensor was changed in place: what it holds now, None for constants, and what lay around it."""
        self._check_read_alike(target, target.dtype)
        self.clock += 1
        address = target.untyped_storage()._cdata
        memory = self.changed.get(address)
        if memory is None:
            if before is None and self.is_alone(target):  # nobody else reads this memory
                return
            memory = self.changed[address] = _Changed(target)
            memory.was_constant = before is not None and not isinstance(before.content, Value)
        memory.changed_at(target, self.clock)
        if before is None:
            memory.value, memory.geometry, memory.live = value, geometry(target), None
            return
        was_live = isinstance(before.content, Value)
        if value is None and not was_live:
            memory.value = None
            return
        with unrecorded():
            if memory.live is None:
                memory.live = torch.full((memory.length,), was_live, device=target.device)
            memory.live.as_strided(*geometry(target)).fill_(value is not None)
        source: Any = target.detach().clone() if value is None else value
        flat = target.detach().as_strided((memory.length,), (1,), 0)
        args = before.content, source, *geometry(target)
        memory.value = self._record(aten.as_strided_scatter.default, args, (before.tensor, target), flat)
        memory.geometry = (flat.shape, (1,), 0)

    def read(self, tensor: Tensor, memory: _Changed, known: Value | None = None, since: int = 0) -> Value | None:
        """Return what a tensor holds whose memory changed since it was known as a value."""
        held = self._held_at(tensor, memory)
        if known is None or (known.root or (known,))[0].beneath is None:
            return held
        with unrecorded():  # what others changed is as they left it, the rest is as it passed the site
            left = memory.left(tensor, since)
            if not bool(left.any()):
                return held
            if left.dim() and bool((left == left[:1]).all()):  # in each image the same, whatever their number
                left = left[:1]
        args = left, known, tensor.detach().clone() if held is None else held
        value = self._record(aten.where.self, args, (left, tensor, tensor), tensor)
        self.site_begins(value)
        return value

    def _held_at(self, tensor: Tensor, memory: _Changed) -> Value | None:
        """Return what the memory holds where a tensor lies; None for constants alone."""
        if memory.value is None:
            return None
        self._check_read_alike(tensor, memory.value.dtype)
        if memory.is_constant(tensor):
            return None
        if memory.geometry == geometry(tensor):
            return memory.value
        flat = tensor.detach().as_strided((memory.length,), (1,), 0)
        args = self._flat(memory, tensor), *geometry(tensor)
        return self._record(aten.as_strided.default, args, (flat,), tensor)

    def strided(self, known: Tensor, value: Value, tensor: Tensor) -> Value | None:
        """Return the value of a view by strides, which may reach around its tensor; None where that is all memory."""
        before = self.whole_before(known, value)
        if before is None:
            return None
        content, memory = before.content, self.changed.get(known.untyped_storage()._cdata)
        for one, place, clock in _standing(value, geometry(known)):
            if clock >= (0 if memory is None else memory.clock):  # else the memory knows
                content = self._scattered(content, one, place, before.tensor)
        return self._record(aten.as_strided.default, (content, *geometry(tensor)), (before.tensor,), tensor)

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
        value: Value = memory.value  # type: ignore[assignment]  # only live memory is read
        row = torch.Size((memory.length,)), (1,), 0
        if memory.geometry != row:
            flat = like.detach().as_strided(*row)
            memory.value = value = self._scattered(torch.zeros_like(flat), value, memory.geometry, flat)
            memory.geometry = row
        return value

    def _scattered(self, before: Any, source: Value, place: Geometry, flat: Tensor) -> Value:
        args = before, source, *place
        tensors = (flat, flat.as_strided(*place))
        return self._record(aten.as_strided_scatter.default, args, tensors, flat)

    def _record(self, operation: Any, args: tuple[Any, ...], tensors: Sequence[Tensor], like: Tensor) -> Value:
        """Write a step with values among its arguments, of which the first have these tensors."""
        pairs = [pair for pair in zip(args, tensors, strict=False) if isinstance(pair[0], Value)]
        values = tuple(value for value, _ in pairs)
        if self._keeps_bypass:
            self.keep_bypass(values, [tensor.clone() for _, tensor in pairs])
        rule = self._rules[operation.overloadpacket.__name__]
        step = Step(operation, args, {}, values, values, rule=rule, module=self._modules.current)
        (made,) = self._tape.write(step, [like], gate=all(value.gate for value in values))
        return made

    def _check_read_alike(self, tensor: Tensor, written: torch.dtype) -> None:
        """Raise where a tensor reads numbers in memory otherwise than they were written."""
        if tensor.dtype == written and not tensor.is_conj() and not tensor.is_neg():
            return
        if tensor.is_complex() or written.is_complex:
            error = TypeError(
                "complex numbers that change in place must be read and changed by complex views that are no "
                f"conjugates, got {'a conjugate' if tensor.is_conj() else 'a'} view of {tensor.dtype}. Change a copy: "
                "torch.view_as_real(x).clone(), or x.conj().resolve_conj()."
            )
        else:
            error = TypeError(
                f"memory that changes in place must be read and changed as numbers of one type, got a view of "
                f"{tensor.dtype} where {written} was written. Compute this without tensor.view(dtype)."
            )
        raise self._modules.refuse(error)


def _uses(tensor: Tensor) -> int:
    """Return how often a tensor's memory is referred to."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


_ALONE = _uses(torch.empty(1))  # by the tensor alone and, as some versions of PyTorch count, the storage's own handle


def _copied(argument: Any, address: int) -> Any:
    """Return an argument with copies of its tensors that lie in some memory."""
    if isinstance(argument, Tensor) and argument.layout is torch.strided:
        return argument.clone() if argument.untyped_storage()._cdata == address else argument
    if type(argument) is list or type(argument) is tuple:
        return type(argument)(_copied(item, address) for item in argument)
    return argument


def _standing(value: Value, place: Geometry) -> list[tuple[Value, Geometry, float]]:
    """Return what stands where a value lies in memory, sites within sites, from the lowest up; and when each began."""
    root, where = value.root or (value, place)
    found = [] if root is value or root.beneath is None else [(value, place, math.inf)]
    while root is not None:
        beneath = root.beneath or Beneath(None, None, -1)
        found.append((root, where, beneath.clock))
        root, where = beneath.value, beneath.geometry
    return found[::-1]
