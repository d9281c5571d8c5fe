"""Ways for numbers to leave tensors for Python or for raw memory, watched while a model runs.

What NumPy or Python makes of them leaves no operation behind, and would be taken for a constant.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, UntypedStorage

from captum_scoremap.checks import unrecorded
from captum_scoremap.rules import tensors_in

from .listeners import Listeners
from .run import Run

__all__ = ["exits_refused", "exits_watched", "would_be_baked_in"]

_EXITS = ("numpy", "tolist", "__array__", "__dlpack__", "data_ptr", "__reduce_ex__")
# Those after which others know a tensor's memory, and may write to it.
_ADDRESSES = {"numpy", "__array__", "__dlpack__", "to_dlpack", "data_ptr"}
# Python's functions, element by element, of a tensor and others.
_PYTHON = ("apply_", "map_", "map2_")
# What makes a tensor of a list, in which tensors are read by no operation.
_OF_LISTS = ("tensor", "as_tensor", "asarray")
# The same of the memory of tensors, and ways for numbers to get there.
_STORAGE_EXITS = ("clone", "tolist", "data_ptr", "__getitem__", "__iter__")
_STORAGE_ENTRIES = ("copy_", "fill_", "__setitem__", "byteswap")


def _leave(run: Run, way: str, tensor: Tensor, *_: object) -> None:
    """Note that the numbers of a tensor leave it."""
    if would_be_baked_in(tensor):
        module = run.modules.current_name
        raise run.modules.refuse(
            ValueError(
                f"the map must not read numbers of the image to be compiled, got Tensor.{way}()"
                f"{f' in {module!r}' if module else ''}. Use method.attribute, or compute this with PyTorch operations."
            )
        )
    if run.is_live(tensor):
        run.sight.exits.append(way)
    if way in _ADDRESSES:
        run.sight.open_memory(tensor, way)
        run.keep_constants(tensor)  # as others may write there from now on


def _map(run: Run, way: str, *tensors: object) -> None:
    """Note that a function of Python's maps the elements of live tensors."""
    for tensor in tensors:
        if isinstance(tensor, Tensor) and run.is_live(tensor):
            run.sight.hide(f"what Tensor.{way}() made of each element")


def _list(run: Run, way: str, *arguments: object) -> None:
    """Note that a tensor is made of a list with live tensors in it."""
    in_lists = tensors_in([one for one in arguments if isinstance(one, list | tuple)])
    if any(run.is_live(tensor) for tensor in in_lists):
        run.sight.hide(f"what {way}() made of a list of tensors, for which there is torch.stack()")


def _pass_storage(run: Run, name: str, *storages: object) -> bool:
    """Note that numbers leave some memory, or get there, past all tensors; return whether they are of the image."""
    is_live = any(isinstance(one, UntypedStorage) and run.may_lie_in(one) for one in storages)
    # memory that no tensor has yet, as in a deep copy: a tensor that gets it is met as one made of what left
    is_new = isinstance(storages[0], UntypedStorage) and torch._C._storage_Use_Count(storages[0]._cdata) <= 1
    if name in _STORAGE_ENTRIES and (is_live or run.sight.exits) and not is_new:
        run.sight.hide(f"what UntypedStorage.{name}() wrote to a tensor's memory")
    elif is_live:
        run.sight.exits.append(f"untyped_storage().{name}")
    return is_live


def _mark(run: Run, _: str, *tensors: object) -> None:
    """Count it as a change that an autograd function says that it changes tensors."""
    run.expect_change([one for one in tensors if isinstance(one, Tensor)])


def _copied(run: Run, copy: Tensor, original: Tensor, *_: object) -> None:
    run.made_copy(copy, original)  # made by no operation, but of what is known


def _wrapped(run: Run, made: Tensor, *arguments: object) -> None:
    """Note that a parameter is made of a tensor, which no operation tells of."""
    if isinstance(made, torch.nn.Parameter):
        run.name_alias(made, tensors_in(arguments)[0])


def _swap(run: Run, _: str, *tensors: object) -> None:
    """Hold on to the constants that steps read, of tensors that become one another; of live ones it is refused."""
    for one in tensors:
        if isinstance(one, Tensor):
            if run.is_live(one):
                run.sight.hide("what torch.utils.swap_tensors() made of two tensors")
            run.keep_constants(one)
            run.forget(one)  # no reference of ours may be left


def _swapped(run: Run, _: None, *tensors: object) -> None:
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            run.made(tensor)
            run.count_changes([tensor])


def _resize(run: Run, name: str, storage: UntypedStorage, *_: object) -> None:
    """Hold on to the constants in memory that goes; refuse it of live tensors'."""
    if run.may_lie_in(storage):
        run.sight.hide(f"what UntypedStorage.{name}() did to a tensor's memory")
    else:
        with unrecorded():
            run.keep_constants(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage))


def exits_watched(run: Run) -> AbstractContextManager[None]:
    """Tell a run's sight of what leaves tensors on this thread inside the context."""
    return _watching.joined_by(run)


_refused: ContextVar[Callable[[Tensor], bool]] = ContextVar("refused", default=lambda _: False)


@contextmanager
def exits_refused(depends: Callable[[Tensor], bool]) -> Iterator[None]:
    """Have runs inside raise where numbers that depend on the image leave PyTorch, of which no graph could tell."""
    token = _refused.set(depends)
    try:
        yield
    finally:
        _refused.reset(token)


def would_be_baked_in(tensor: Tensor) -> bool:
    """Return whether a graph is being made that would hold a tensor's numbers, though they depend on the image."""
    return _refused.get()(tensor)


_DATA: Any = torch._C.TensorBase.data  # the descriptor, read off the class


def _set_data(tensor: Tensor, data: Tensor) -> None:
    for run in _watching.here():
        if run.is_live(tensor) or run.is_live(data):
            run.sight.hide("what was assigned to Tensor.data")  # other memory, of which no operation tells
        run.keep_constants(tensor)
    _DATA.__set__(tensor, data)
    for run in _watching.here():
        run.count_changes([tensor])  # in memory where none of its were counted


# What is watched, and what hears of it before and after.
_WATCHED: tuple[tuple[Any, Callable[..., bool | None] | None, Callable[..., None] | None, tuple[str, ...]], ...] = (
    (torch.Tensor, _leave, None, _EXITS),
    *((home, _leave, None, ("to_dlpack",)) for home in (torch, torch.utils.dlpack)),
    (torch.Tensor, _leave, _copied, ("__deepcopy__",)),
    (torch.Tensor, None, _wrapped, ("_make_subclass", "as_subclass")),
    (torch.Tensor, _map, None, _PYTHON),
    (torch.Tensor, _list, None, ("new_tensor",)),
    (torch, _list, None, _OF_LISTS),
    (torch.autograd.function.FunctionCtx, _mark, None, ("mark_dirty",)),
    (torch.utils, _swap, _swapped, ("swap_tensors",)),
    (UntypedStorage, _resize, None, ("resize_",)),
    (UntypedStorage, _pass_storage, None, (*_STORAGE_EXITS, *_STORAGE_ENTRIES)),
)


def _watched(
    name: str,
    plain: Callable[..., Any],
    before: Callable[..., bool | None] | None,
    after: Callable[..., None] | None,
) -> Callable[..., Any]:
    @functools.wraps(plain)
    def watched(*args: Any, **kwargs: Any) -> Any:
        told = [before(run, name, *args, *list(kwargs.values())[:1]) for run in _watching.here()] if before else []
        # bytes of live numbers are copied as numbers of another type
        with unrecorded() if any(told) else nullcontext():
            output = plain(*args, **kwargs)
        if after:
            for run in _watching.here():
                after(run, output, *args, *kwargs.values())
        return output

    return watched


# Where something was replaced, what stood there before, if the class itself defined it, and what stands there now.
_replaced: list[tuple[Any, str, Any, Any]] = []


def _replace(home: Any, name: str, new: Any) -> None:
    _replaced.append((home, name, vars(home).get(name), new))
    setattr(home, name, new)


def _watch() -> None:
    for home, before, after, names in _WATCHED:
        for name in names:
            watched = _watched(name, getattr(home, name), before, after)
            # its first argument is a class
            _replace(home, name, staticmethod(watched) if name == "_make_subclass" else watched)
    _replace(torch.Tensor, "data", property(_DATA.__get__, _set_data))  # on the class


def _watch_no_more() -> None:
    while _replaced:
        home, name, old, new = _replaced.pop()
        if vars(home).get(name) is not new:  # the model itself replaced it, to stay
            continue
        if old is None:
            delattr(home, name)
        else:
            setattr(home, name, old)


_watching: Listeners[Run] = Listeners(_watch, _watch_no_more)
