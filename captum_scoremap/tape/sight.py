"""What a run cannot see: tensors that something else than PyTorch's dispatcher made or filled, on this thread.

NumPy, other threads, and kernels that write to raw memory leave no operation behind. What they make would be taken for a
constant, and its map for zero. They are found by what they leave: a tensor that appears during the run without an
operation that made it, or one that holds something though nothing was written to it.
"""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["Sight"]

# Ways for numbers to leave a tensor for Python or for raw memory.
_EXITS = ("numpy", "tolist", "__array__", "__dlpack__", "data_ptr")
_UNFILLED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_ZEROS = {"zeros", "zeros_like", "new_zeros"}


class Sight:
    """Which tensors of a run are accounted for.

    Args:
        is_live: Whether a tensor depends on the image.
        place: Name of the module that is running.
    """

    def __init__(self, is_live: Callable[[Tensor], bool], place: Callable[[], str]) -> None:
        self._is_live, self._place = is_live, place
        self._known: dict[int, weakref.ref[Tensor]] = {}
        self._storages: set[int] = set()
        self._bare: dict[int, tuple[StorageWeakRef, bool]] = {}
        self._exits: list[str] = []
        self.hidden: dict[tuple[str, str], None] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Notice what numbers leave tensors inside the context, and tell what was there before from what was not."""
        with ExitStack() as stack:
            for name in _EXITS:
                stack.enter_context(self._watched_exit(name))
            # what exists now leaves the youngest generation, and nothing else does while the model runs
            gc.collect(0)
            if gc.isenabled():
                stack.callback(gc.enable)
                gc.disable()
            yield

    @contextmanager
    def _watched_exit(self, name: str) -> Iterator[None]:
        own = torch.Tensor.__dict__.get(name)
        plain = getattr(torch.Tensor, name)

        def leave(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._is_live(tensor):
                self._exits.append(name)
            return plain(tensor, *args, **kwargs)

        setattr(torch.Tensor, name, leave)
        try:
            yield
        finally:
            if own is None:
                delattr(torch.Tensor, name)
            else:
                setattr(torch.Tensor, name, own)

    def trust(self, tensors: Any) -> None:
        """Account for tensors that were there before the run: parameters, buffers, additional arguments."""
        for tensor in tensors:
            self._storages.add(tensor.untyped_storage()._cdata)

    def made(self, tensor: Tensor, operation: str) -> None:
        """Account for a constant that an operation made."""
        self._known[id(tensor)] = weakref.ref(tensor)
        if operation in _UNFILLED or operation in _ZEROS:
            if tensor.numel() and tensor.is_floating_point():
                storage = tensor.untyped_storage()
                self._bare[storage._cdata] = StorageWeakRef(storage), operation in _ZEROS

    def written(self, tensor: Tensor) -> None:
        """Note that an operation wrote to a tensor's memory."""
        if self._bare:
            self._bare.pop(tensor.untyped_storage()._cdata, None)

    def knows(self, tensor: Tensor) -> bool:
        """Whether a constant is accounted for."""
        known = self._known.get(id(tensor))
        return known is not None and known() is tensor

    def lift(self, tensor: Tensor) -> None:
        """Meet a tensor made of Python's or NumPy's numbers: a constant, unless numbers of live tensors went there.

        Single numbers are always constants, as ``item()`` makes them.
        """
        if self._exits and tensor.numel() > 1 and tensor.is_floating_point():
            exits = " and ".join(f"Tensor.{name}()" for name in dict.fromkeys(self._exits))
            self._hide(f"what became of the numbers that left through {exits}")
        self._known[id(tensor)] = weakref.ref(tensor)

    def meet(self, tensor: Tensor) -> None:
        """Meet a constant that no operation made: it was there before, or something unseen made it."""
        self._known[id(tensor)] = weakref.ref(tensor)
        if tensor.untyped_storage()._cdata in self._storages or not tensor.is_floating_point():
            return
        if any(one is tensor for one in gc.get_objects(generation=0)):
            self._hide("what made a tensor during the run (another thread, or a compiled kernel)")

    def read(self, tensor: Tensor) -> None:
        """Read a constant whose memory may have been filled by something unseen."""
        bare = self._bare.pop(tensor.untyped_storage()._cdata, None)
        if bare is not None and (not bare[1] or bool(tensor.any())):
            self._hide("what filled a new tensor's memory (a compiled kernel, or NumPy)")

    @property
    def is_suspicious(self) -> bool:
        """Whether a constant's memory may have been filled by something unseen."""
        return bool(self._bare)

    def _hide(self, what: str) -> None:
        self.hidden[what, self._place()] = None
