"""Ways for numbers to leave tensors for Python or for raw memory, watched while a model runs.

What NumPy or Python makes of them leaves no operation behind, and would be taken for a constant.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from .listeners import Listeners
from .live import Live
from .sight import COPIES, Sight

__all__ = ["Exits", "exits_refused"]

_EXITS = ("numpy", "tolist", "__array__", "__dlpack__", "data_ptr", *COPIES)
# The same of the memory of tensors, and ways for numbers to get there.
_STORAGE_EXITS = ("clone", "tolist", "data_ptr", "__getitem__", "__iter__")
_STORAGE_ENTRIES = ("copy_", "fill_", "__setitem__", "byteswap")


class Exits:
    """Tells a run's sight of what leaves its live tensors."""

    def __init__(self, live: Live, sight: Sight) -> None:
        self._live, self._sight = live, sight

    def leave(self, way: str, tensor: Tensor, *_: object) -> None:
        """Note that the numbers of a tensor leave it."""
        if _refused.get()(tensor):
            module = self._sight.places.module_name
            raise ValueError(
                f"the map must not read numbers of the image to be compiled, got Tensor.{way}()"
                f"{f' in {module!r}' if module else ''}. Use method.attribute, or compute this with PyTorch operations."
            )
        if self._live.has(tensor):
            self._sight.exits.append(way)

    def replace(self, tensor: Tensor, data: Tensor) -> None:
        """Note that a tensor gets other memory, by its attribute ``data``, of which no operation tells."""
        if self._live.has(tensor) or self._live.has(data):
            self._sight.hide("what was assigned to Tensor.data")

    def pass_storage(self, name: str, *storages: object) -> None:
        """Note that numbers leave some memory, or get there, past all tensors."""
        is_live = any(isinstance(one, UntypedStorage) and self._live.may_lie_in(one) for one in storages)
        # memory that no tensor has yet, as in a deep copy: a tensor that gets it is met as one made of what left
        is_new = isinstance(storages[0], UntypedStorage) and torch._C._storage_Use_Count(storages[0]._cdata) <= 1
        if name in _STORAGE_ENTRIES and (is_live or self._sight.exits) and not is_new:
            self._sight.hide(f"what UntypedStorage.{name}() wrote to a tensor's memory")
        elif is_live:
            self._sight.exits.append(f"untyped_storage().{name}")

    def watched(self) -> AbstractContextManager[None]:
        """Notice what leaves tensors on this thread inside the context."""
        return _watching.joined_by(self)


_refused: ContextVar[Callable[[Tensor], bool]] = ContextVar("refused", default=lambda _: False)


@contextmanager
def exits_refused(depends: Callable[[Tensor], bool]) -> Iterator[None]:
    """Have runs inside raise where numbers that depend on the image leave PyTorch, of which no graph could tell."""
    token = _refused.set(depends)
    try:
        yield
    finally:
        _refused.reset(token)


_DATA: Any = torch.Tensor.data  # the descriptor, read off the class


def _set_data(tensor: Tensor, data: Tensor) -> None:
    for exits in _watching.here():
        exits.replace(tensor, data)
    _DATA.__set__(tensor, data)


# What is watched, and what hears of it; for each name whether the class defines it itself, rather than its base class.
_WATCHED: dict[type, tuple[Callable[..., None], dict[str, bool]]] = {
    kind: (tell, {name: name in kind.__dict__ for name in names})
    for kind, tell, names in (
        (torch.Tensor, Exits.leave, _EXITS),
        (UntypedStorage, Exits.pass_storage, (*_STORAGE_EXITS, *_STORAGE_ENTRIES)),
    )
}


def _watched(name: str, plain: Callable[..., Any], tell: Callable[..., None]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def watched(one: Any, *args: Any, **kwargs: Any) -> Any:
        for exits in _watching.here():
            tell(exits, name, one, *args[:1], *list(kwargs.values())[:1])
        return plain(one, *args, **kwargs)

    watched.plain = plain  # type: ignore[attr-defined]
    return watched


def _watch() -> None:
    for kind, (tell, names) in _WATCHED.items():
        for name in names:
            setattr(kind, name, _watched(name, getattr(kind, name), tell))
    torch.Tensor.data = property(_DATA.__get__, _set_data)  # type: ignore[assignment]  # on the class


def _watch_no_more() -> None:
    del torch.Tensor.data
    for kind, (_, names) in _WATCHED.items():
        for name, is_own in names.items():
            if is_own:
                setattr(kind, name, getattr(kind, name).plain)
            else:
                delattr(kind, name)


_watching: Listeners[Exits] = Listeners(_watch, _watch_no_more)
