"""What a run cannot see: tensors that something else than PyTorch's dispatcher made or filled, on this thread.

NumPy, other threads, and kernels that write to raw memory leave no operation behind. What they make would be taken for
a constant, and its map for zero. They are found by what they leave: a tensor that appears during the run without an
operation that made it, or one that holds something though nothing was written to it.
"""

import functools
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef

from captum_scoremap.checks import unrecorded

from .places import Places

__all__ = ["Sight", "exits_refused"]

# Ways for numbers to leave a tensor for Python or for raw memory.
_EXITS = ("numpy", "tolist", "__array__", "__dlpack__", "data_ptr", *(_COPIES := ("__deepcopy__", "__reduce_ex__")))
# The same of the memory of tensors, and ways for numbers to get there.
_STORAGE_EXITS = ("clone", "tolist", "data_ptr", "__getitem__", "__iter__")
_STORAGE_ENTRIES = ("copy_", "fill_", "__setitem__", "byteswap")
_UNFILLED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_ZEROS = {"zeros", "zeros_like", "new_zeros"}


class Sight:
    """Which tensors of a run are accounted for.

    Args:
        is_live: Whether a tensor depends on the image.
        holds_live: Whether a tensor that does lies in some memory.
        places: Where the run is.
    """

    def __init__(
        self, is_live: Callable[[Tensor], bool], holds_live: Callable[[UntypedStorage], bool], places: Places
    ) -> None:
        self._is_live, self._holds_live, self._places = is_live, holds_live, places
        self._known: dict[int, weakref.ref[Tensor]] = {}
        self._bare: dict[int, tuple[StorageWeakRef, bool]] = {}
        self._exits: list[str] = []
        self._single_exits = 0
        self.hidden: dict[tuple[str, str], None] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Notice what numbers leave tensors inside the context, and tell what was there before from what was not."""
        with _exits_watched(self), _collector_at_rest():
            yield

    def leave(self, tensor: Tensor, way: str) -> None:
        """Note that the numbers of a tensor leave it."""
        if _refused.get()(tensor):
            module = self._places.module_name
            raise ValueError(
                f"the map must not read numbers of the image to be compiled, got Tensor.{way}()"
                f"{f' in {module!r}' if module else ''}. Use method.attribute, or compute this with PyTorch operations."
            )
        if self._is_live(tensor):
            self._exits.append(way)

    def replace(self, tensor: Tensor, data: Tensor) -> None:
        """Note that a tensor gets other memory, by its attribute ``data``, of which no operation tells."""
        if self._is_live(tensor) or self._is_live(data):
            self._hide("what was assigned to Tensor.data")

    def pass_storage(self, name: str, *storages: object) -> None:
        """Note that numbers leave some memory, or get there, past all tensors."""
        is_live = any(isinstance(one, UntypedStorage) and self._holds_live(one) for one in storages)
        # memory that no tensor has yet, as in a deep copy: a tensor that gets it is met as one made of what left
        is_new = isinstance(storages[0], UntypedStorage) and torch._C._storage_Use_Count(storages[0]._cdata) <= 1
        if name in _STORAGE_ENTRIES and (is_live or self._exits) and not is_new:
            self._hide(f"what UntypedStorage.{name}() wrote to a tensor's memory")
        elif is_live:
            self._exits.append(f"untyped_storage().{name}")

    def leave_one(self) -> None:
        """Note that a single number of a live tensor leaves it, as ``item()`` and ``float()`` have it."""
        self._single_exits += 1

    def made(self, tensor: Tensor, operation: str) -> None:
        """Account for a constant that an operation made."""
        self._known[id(tensor)] = weakref.ref(tensor)
        if (operation in _UNFILLED or operation in _ZEROS) and tensor.numel() and tensor.is_floating_point():
            storage = tensor.untyped_storage()
            self._bare[storage._cdata] = StorageWeakRef(storage), operation in _ZEROS

    def placed(self, tensor: Tensor) -> None:
        """Note that a tensor was given other memory, as copies and pickles of tensors are."""
        self._known.pop(id(tensor), None)  # what it holds now may be live
        if tensor.is_floating_point() and any(way in _COPIES or "storage" in way for way in self._exits):
            storage = tensor.untyped_storage()
            self._bare[storage._cdata] = StorageWeakRef(storage), False

    def written(self, tensor: Tensor) -> None:
        """Note that an operation wrote to a tensor's memory."""
        if self._bare:
            self._bare.pop(tensor.untyped_storage()._cdata, None)

    def knows(self, tensor: Tensor) -> bool:
        """Return whether a constant is accounted for."""
        known = self._known.get(id(tensor))
        return known is not None and known() is tensor

    def lift(self, tensor: Tensor) -> None:
        """Meet a tensor made of Python's or NumPy's numbers: a constant, unless numbers of live tensors went there.

        Single numbers are always constants, as ``item()`` makes them; a list may be of as many as left one by one.
        """
        if self._single_exits >= tensor.numel() > 1 and tensor.is_floating_point():
            self._hide("what became of the numbers that left through Tensor.item()")
        if self._exits and tensor.numel() > 1 and tensor.is_floating_point():
            exits = " and ".join(f"Tensor.{name}()" for name in dict.fromkeys(self._exits))
            self._hide(f"what became of the numbers that left through {exits}")
        self._known[id(tensor)] = weakref.ref(tensor)

    def meet(self, tensor: Tensor) -> None:
        """Meet a constant that no operation made: it was there before, or something unseen made it."""
        self._known[id(tensor)] = weakref.ref(tensor)
        if not tensor.is_floating_point() or not tensor.numel() or tensor._is_zerotensor():  # which has no memory
            return
        if not any(one is tensor for one in gc.get_objects(generation=0)):
            return
        if tensor.layout is not torch.strided:
            self._hide("what made a tensor during the run (another thread, or a compiled kernel)")
            return
        if not self._is_state(tensor.untyped_storage()._cdata):
            exits = "".join(f", Tensor.{name}()" for name in dict.fromkeys(self._exits))
            self._hide(f"what made a tensor during the run (another thread, or a compiled kernel{exits})")

    def owns(self, address: int) -> bool:
        """Whether memory belongs to a constant that is accounted for."""
        known = [one for reference in list(self._known.values()) if (one := reference()) is not None]
        memory = [one.untyped_storage()._cdata for one in known if one.layout is torch.strided]
        return address in memory or self._is_state(address)

    def _is_state(self, address: int) -> bool:
        """Whether memory belongs to the modules that run."""
        state = [one for root in self._places.roots() for one in (*root.parameters(), *root.buffers())]
        state += [one.grad for one in state if one.grad is not None]
        return any(one.untyped_storage()._cdata == address for one in state)

    def read(self, tensor: Tensor) -> None:
        """Read a constant whose memory may have been filled by something unseen."""
        if tensor.layout is not torch.strided:
            return
        bare = self._bare.pop(tensor.untyped_storage()._cdata, None)
        with unrecorded():
            is_filled = bare is not None and (not bare[1] or bool(tensor.any()))
        if is_filled:
            self._hide("what filled a new tensor's memory (a compiled kernel, NumPy, or a copy by Python)")

    @property
    def is_suspicious(self) -> bool:
        """Whether a constant's memory may have been filled by something unseen."""
        return bool(self._bare)

    def _hide(self, what: str) -> None:
        self.hidden[what, self._places.module_name] = None


_refused: ContextVar[Callable[[Tensor], bool]] = ContextVar("refused", default=lambda _: False)


@contextmanager
def exits_refused(depends: Callable[[Tensor], bool]) -> Iterator[None]:
    """Have runs inside raise where numbers leave PyTorch: what it does next may go by them, and no graph says how.

    Args:
        depends: Whether a tensor depends on the image, be it frozen or not.
    """
    token = _refused.set(depends)
    try:
        yield
    finally:
        _refused.reset(token)


# One watch for all runs of the process, each on a thread of its own.
_lock = threading.Lock()
_watching: dict[int, list[Sight]] = {}


@contextmanager
def _exits_watched(sight: Sight) -> Iterator[None]:
    """Tell a run of what leaves tensors on its thread."""
    thread = threading.get_ident()
    with _lock:
        if not _watching:
            for name in _EXITS:
                setattr(torch.Tensor, name, _watched(name, getattr(torch.Tensor, name)))
            for name in (*_STORAGE_EXITS, *_STORAGE_ENTRIES):
                setattr(UntypedStorage, name, _watched_storage(name, getattr(UntypedStorage, name)))
            torch.Tensor.data = property(_DATA.__get__, _set_data)  # type: ignore[assignment]  # on the class
        _watching.setdefault(thread, []).append(sight)
    try:
        yield
    finally:
        with _lock:
            _watching[thread].pop()
            if not _watching[thread]:
                del _watching[thread]
            if not _watching:
                del torch.Tensor.data
                for kind, names in _WATCHED.items():
                    for name, is_own in names.items():
                        if is_own:
                            setattr(kind, name, getattr(kind, name).plain)
                        else:
                            delattr(kind, name)


_DATA: Any = torch.Tensor.data  # the descriptor, read off the class


def _set_data(tensor: Tensor, data: Tensor) -> None:
    for sight in _watching.get(threading.get_ident(), ()):
        sight.replace(tensor, data)
    _DATA.__set__(tensor, data)


# Which of them a class defines itself, rather than its base class.
_WATCHED: dict[type, dict[str, bool]] = {
    kind: {name: name in kind.__dict__ for name in names}
    for kind, names in ((torch.Tensor, _EXITS), (UntypedStorage, (*_STORAGE_EXITS, *_STORAGE_ENTRIES)))
}


def _watched(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def leave(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        for sight in _watching.get(threading.get_ident(), ()):
            sight.leave(tensor, name)
        return plain(tensor, *args, **kwargs)

    leave.plain = plain  # type: ignore[attr-defined]
    return leave


def _watched_storage(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def touch(storage: UntypedStorage, *args: Any, **kwargs: Any) -> Any:
        for sight in _watching.get(threading.get_ident(), ()):
            sight.pass_storage(name, storage, *args[:1], *list(kwargs.values())[:1])
        return plain(storage, *args, **kwargs)

    touch.plain = plain  # type: ignore[attr-defined]
    return touch


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Make the youngest generation of objects that of the run: what exists now leaves it, and nothing else does."""
    gc.collect(0)
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
