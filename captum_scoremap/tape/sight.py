"""What a run cannot explain: operations without a rule, and tensors that something else than PyTorch made or filled.

NumPy, other threads, and kernels that write to raw memory leave no operation behind. What they make would be taken for
a constant, and its map for zero. They are found by what they leave: a tensor that appears during the run without an
operation that made it, or one that holds something though nothing was written to it.
"""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter

from captum_scoremap.checks import UnsupportedOperationError, unrecorded

from .listeners import Listeners
from .module_tracker import ModuleTracker

__all__ = ["Sight", "collector_paused"]

# Ways for tensors to leave for Python and come back.
_COPIES = ("__deepcopy__", "__reduce_ex__")
_FILLED = "what filled a new tensor's memory (a compiled kernel, NumPy, or a copy by Python)"
_UNFILLED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_ZEROS = {"zeros", "zeros_like", "new_zeros"}


class Sight:
    """Whether the constants of a run are what its operations made, and which of its operations have no rule."""

    def __init__(self, modules: ModuleTracker) -> None:
        self.modules = modules
        self.exits: list[str] = []  # ways in which numbers of live tensors left
        self.single_exits = 0  # how many left one by one, as ``item()`` and ``float()`` have it
        self.bare: dict[int, _Bare] = {}  # new memory, which something unseen may fill
        self.open: dict[int, _Open] = {}  # memory whose address left PyTorch, and what it held after each operation
        self._hidden: dict[tuple[str, str], None] = {}
        self.unsupported: dict[tuple[str, str], None] = {}
        self.underivable: set[str] = set()  # of these, those that have no derivative either
        self.state_read: list[Tensor] = []  # parameters, and buffers of modules, that were read
        # tensors of the run that a collection took for older ones
        self._once_young: dict[int, weakref.ref[Tensor]] = {}
        self.suspects: list[_Suspect] = []  # tensors, what they show if none settles it, and where

    # -- what is refused

    def hide(self, what: str) -> None:
        """Note something that could not be seen."""
        self._hidden[what, self.modules.current_name] = None

    def lack_rule(self, operation: str) -> None:
        """Note an operation without a rule."""
        self.unsupported[operation, self.modules.current_name] = None

    def refused(self, operation: str) -> UnsupportedOperationError:
        """Return the error that names an operation after which a run cannot go on, and those before it."""
        self.lack_rule(operation)
        return self._error()

    def ended(self, what: str) -> UnsupportedOperationError:
        """Return the error that names what no rule could say, after which a run cannot go on, and what was before."""
        self.hide(what)
        return self._error()

    def raise_refused(self) -> None:
        """Raise for all operations without a rule that were seen, and for what was not seen."""
        self.settle()
        self._hidden.update({(what, module): None for _, what, module in self.suspects})
        if self.unsupported or self._hidden:
            raise self._error()

    def _error(self) -> UnsupportedOperationError:
        return UnsupportedOperationError(list(self.unsupported), list(self._hidden), self.underivable)

    # -- whether memory that others know of is what operations left in it

    def open_memory(self, tensor: Tensor, way: str) -> None:
        """Note that others may write to a tensor's memory from now on."""
        storage = _memory(tensor)
        if storage is not None and storage._cdata not in self.open:
            may_be_filled = way == "numpy" and not self.is_state(storage._cdata, Parameter)
            self.open[storage._cdata] = _Open(StorageWeakRef(storage), _bytes(storage), way, may_be_filled)

    def compare(self, tensor: Tensor, is_live: Callable[[Tensor], bool]) -> None:
        """Look whether others wrote to a tensor's memory, numbers of the image where any left."""
        storage = _memory(tensor)
        found = None if storage is None else self.open.get(storage._cdata)
        if storage is None or found is None:
            return
        now = _bytes(storage)
        is_changed = not torch.equal(now, found.content)
        found.content = now
        is_constant = not is_live(tensor)
        # the same numbers as the last run's may have been written to a constant's
        if (is_changed and (self.exits or not is_constant)) or (found.may_be_filled and self.exits and is_constant):
            self.hide(f"what was written to a tensor's memory after Tensor.{found.way}()")

    def keep(self, tensor: Tensor) -> None:
        """Note what an operation left in memory that others may write to."""
        storage = _memory(tensor)
        if storage is not None and storage._cdata in self.open:
            self.open[storage._cdata].content = _bytes(storage)

    # -- whether constants are what they seem

    def made(self, tensor: Tensor, operation: str) -> None:
        """Note that an operation made a constant, and may have left its memory for something unseen to fill."""
        if (operation in _UNFILLED or operation in _ZEROS) and tensor.numel() and tensor.is_floating_point():
            storage = tensor.untyped_storage()
            self.bare[storage._cdata] = _Bare(StorageWeakRef(storage), operation in _ZEROS)

    def copied(self, copy: Tensor, tensor: Tensor) -> None:
        """Note that a constant is a copy of another, whose memory may have been filled, or not yet.

        What was filled is suspect from now on, unless an operation writes to the copy before one reads it.
        """
        bare = self.bare.get(tensor.untyped_storage()._cdata)
        if bare is not None:
            suspect, bare.suspect = bare.suspect, None
            if suspect is None and self._is_filled(bare, tensor):
                suspect = self._suspect(tensor, _FILLED)
            storage = copy.untyped_storage()
            self.bare[storage._cdata] = _Bare(StorageWeakRef(storage), bare.holds_zeros, suspect)

    def placed(self, tensor: Tensor) -> None:
        """Note that a tensor was given other memory, as copies and pickles of tensors are."""
        if tensor.is_floating_point() and any(way in _COPIES or "storage" in way for way in self.exits):
            storage = tensor.untyped_storage()
            self.bare[storage._cdata] = _Bare(StorageWeakRef(storage), False)

    def written(self, tensor: Tensor) -> None:
        """Note that an operation wrote to a tensor's memory."""
        if self.bare:
            bare = self.bare.pop(tensor.untyped_storage()._cdata, None)
            if bare is not None and bare.suspect is not None:
                self.suspects = [one for one in self.suspects if one is not bare.suspect]

    def lift(self, tensor: Tensor) -> None:
        """Meet a tensor made of Python's or NumPy's numbers: a constant, unless numbers of live tensors went there.

        Single numbers are always constants, as ``item()`` makes them; a list may be of as many as left one by one.
        """
        if self.single_exits >= tensor.numel() > 1 and tensor.is_floating_point():
            self.hide("what became of the numbers that left through Tensor.item()")
        if self.exits and tensor.numel() > 1 and tensor.is_floating_point():
            exits = " and ".join(f"Tensor.{name}()" for name in dict.fromkeys(self.exits))
            self.hide(f"what became of the numbers that left through {exits}")

    def meet(self, tensor: Tensor) -> None:
        """Meet a constant that no operation made: it was there before, or something unseen made it."""
        if not tensor.is_floating_point() or not tensor.numel() or tensor._is_zerotensor():  # which has no memory
            return
        is_young = any(map(is_, gc.get_objects(generation=0), repeat(tensor)))  # a loop takes three times as long
        if not is_young and not self._was_young(tensor):
            return
        if tensor.layout is not torch.strided:
            self.hide("what made a tensor during the run (another thread, or a compiled kernel)")
            return
        if self._is_buffer(tensor) or not self.is_state(tensor.untyped_storage()._cdata):
            exits = "".join(f", Tensor.{name}()" for name in dict.fromkeys(self.exits))
            self._suspect(tensor, f"what made a tensor during the run (another thread, or a compiled kernel{exits})")

    def _was_young(self, tensor: Tensor) -> bool:
        reference = self._once_young.get(id(tensor))
        return reference is not None and reference() is tensor

    @contextmanager
    def collections_watched(self) -> Iterator[None]:
        """Remember which tensors are of the run where the model has the collector look for garbage."""

        def collects(phase: str, _: object) -> None:
            if phase == "start":
                young = [one for one in gc.get_objects(generation=0) if issubclass(type(one), Tensor)]
                self._once_young.update({id(one): weakref.ref(one) for one in young})

        gc.callbacks.append(collects)
        try:
            yield
        finally:
            gc.callbacks.remove(collects)

    def meet_state(self) -> None:
        """Look whether parameters and buffers that were read are of the run, though no operation made them."""
        ids = set(map(id, self.state_read))
        are_young = bool(ids) and any(map(ids.__contains__, map(id, gc.get_objects(generation=0))))
        if are_young or any(map(self._was_young, self.state_read)):
            self.hide("what made a parameter or a buffer during the run (another thread, or a compiled kernel)")

    def _is_buffer(self, tensor: Tensor) -> bool:
        """Return whether a tensor itself, which was made during the run, belongs to a module."""
        plain = (
            one for root in self.modules.roots for one in root.modules() if not isinstance(one, torch.jit.ScriptModule)
        )
        return any(buffer is tensor for module in plain for buffer in module._buffers.values())

    def is_state(self, address: int, kind: type[Tensor] = Tensor) -> bool:
        """Return whether memory is that of a tensor of this kind that belongs to the modules that run."""
        return any(isinstance(one, kind) and one.untyped_storage()._cdata == address for one in self._state())

    def _state(self) -> Iterator[Tensor]:
        for root in self.modules.roots:
            for one in (*root.parameters(), *root.buffers()):
                yield one
                if one.grad is not None:
                    yield one.grad
            for module in root.modules():
                if isinstance(module, torch.jit.ScriptModule):
                    yield from _constants_in(getattr(module, "inlined_graph", None))  # none, without a forward
        yield from _constants_in(torch._C._last_executed_optimized_graph())  # the one that runs now, on this thread

    def read(self, tensor: Tensor) -> None:
        """Read a constant whose memory may have been filled by something unseen."""
        if tensor.layout is not torch.strided:
            return
        bare = self.bare.pop(tensor.untyped_storage()._cdata, None)
        if bare is not None and bare.suspect is None and self._is_filled(bare, tensor):
            self._suspect(tensor, _FILLED)

    @staticmethod
    def _is_filled(bare: "_Bare", tensor: Tensor) -> bool:
        with unrecorded():
            return not bare.holds_zeros or bool(tensor.any())

    def _suspect(self, tensor: Tensor, what: str) -> "_Suspect":
        """Note that a tensor is not what operations left in it, unless it is a literal in scripted code."""
        with unrecorded():
            suspect = tensor.detach().clone(), what, self.modules.current_name
        self.suspects.append(suspect)
        return suspect

    def settle(self) -> None:
        """Take suspects for the constants that they are which stand, number by number, in the code that ran last.

        TorchScript makes a tensor of a list by no operation, and its code can be read after it ran for the first time.
        """
        if self.suspects:
            with unrecorded():
                graph = torch._C._last_executed_optimized_graph()
                known = [*_literals_in(graph), *_constants_in(graph)]
                self.suspects = [one for one in self.suspects if not any(_is_alike(one[0], other) for other in known)]


_Suspect = tuple[Tensor, str, str]


@dataclass
class _Bare:
    """New memory, which something unseen may fill."""

    storage: StorageWeakRef  # keeps the address from being reused
    holds_zeros: bool  # until it is filled
    suspect: _Suspect | None = None  # what it is a copy of


@dataclass
class _Open:
    """Memory that others may write to, what it holds, byte by byte, and how its address left."""

    storage: StorageWeakRef  # keeps the address from being reused
    content: Tensor
    way: str
    may_be_filled: bool


def _memory(tensor: Tensor) -> torch.UntypedStorage | None:
    has_memory = tensor.layout is torch.strided and not tensor.is_meta and tensor.numel() > 0
    return tensor.untyped_storage() if has_memory and not tensor._is_zerotensor() else None


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    with unrecorded():
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).clone()


def _constants_in(graph: Any) -> Iterator[Tensor]:
    """Yield the tensors in scripted code, if there is any: what were weights, or was computed once for all runs."""
    for node in _nodes_in(graph, "prim::Constant"):
        if node.hasAttribute("value") and node.kindOf("value") == "t":
            value: Tensor = node.t("value")
            if value.layout is torch.strided:
                yield value


def _nodes_in(graph: Any, *kinds: str) -> Iterator[Any]:
    """Yield the nodes of some kinds in scripted code, if there is any, and in parts of it that are set apart."""
    if graph is None:
        return
    for kind in kinds:
        yield from graph.findAllNodes(kind)
    for node in graph.findAllNodes("prim::DifferentiableGraph"):  # of what ran with gradients on
        yield from _nodes_in(node.g("Subgraph"), *kinds)


def _literals_in(graph: Any) -> Iterator[Tensor]:
    """Yield the tensors that scripted code makes of lists of numbers, or of single ones, that stand in it."""
    nodes = _nodes_in(graph, "aten::tensor", "aten::as_tensor")
    for numbers in (_literal(node.inputsAt(0)) for node in nodes):
        if numbers is not None:
            yield torch.tensor(numbers, dtype=torch.complex128 if isinstance(numbers, complex) else None)


def _literal(value: Any) -> Any:
    """Return the numbers of a value in scripted code; None where they do not all stand in it."""
    if value.node().kind() != "prim::ListConstruct":
        return value.toIValue()
    found = [_literal(one) for one in value.node().inputs()]
    return None if any(one is None for one in found) else found


def _is_alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other.to(one.dtype))


@contextmanager
def collector_paused() -> Iterator[None]:
    """Make the youngest generation of objects that of the run: what exists now leaves it, and nothing else does."""
    gc.collect(0)
    with _paused.joined_by(None):
        yield


def _pause() -> None:
    _was_enabled.append(gc.isenabled())
    gc.disable()


def _resume() -> None:
    if _was_enabled.pop():
        gc.enable()


_was_enabled: list[bool] = []
_paused: Listeners[None] = Listeners(_pause, _resume)
