"""What a graph holds of a model besides its tensors: numbers, choices, hooks, modules. A change of it is noticed."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import itemgetter
from typing import Any

from torch import Tensor, nn

from captum_scoremap.tape import ModuleTracker

__all__ = ["Settings"]

# Attributes that PyTorch gives modules and that are no settings.
_OF_PYTORCH = {*vars(nn.Module()), "_compiled_call_impl"} - {"training"}
_PLAIN = (bool, int, float, str, type(None))
_NOTHING: Any = object()


class Settings:
    """The attributes of modules and other objects as they were, with what their lists and dictionaries hold.

    Parameters and buffers are none, for a graph reads them at each call; but one that was None is, and so is a module's
    class, which parametrizations change.

    Args:
        owners: Name to object.

    Example:
        >>> act = nn.LeakyReLU(0.1)
        >>> settings = Settings({"act": act})
        >>> settings.change()
        ''
        >>> act.negative_slope = 0.2
        >>> settings.change()
        "'act.negative_slope', 0.2 for 0.1"
    """

    def __init__(self, owners: Mapping[str, object]) -> None:
        found: dict[int, _Values] = {}
        for name, owner in owners.items():
            for one in _values_of(name, owner):
                found.setdefault(id(one.container), one)
        self._all = list(found.values())
        self._owners = owners
        self._prepare()

    def _prepare(self) -> None:
        """Lay out what is compared at each call, for hundreds of modules in a tenth of a millisecond."""
        self._classes = list(map(type, self._owners.values()))
        self._containers = [one.container for one in self._all]
        self._counts = list(map(len, self._containers))
        self._reads = [(read, one.container, read(one.container)) for one in self._all if (read := one.reader())]

    def leave_what_runs_set(self) -> None:
        """Compare no longer what has changed by now, while the model did nothing but run; nor lists that it fills."""
        for one in list(self._all):
            keys = one.changed()
            if keys and one.owner is None:
                self._all.remove(one)
            one.leave(keys)
        self._prepare()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Settings":
        """Return the same of copies of the objects."""
        twin = copy.copy(self)
        twin._owners, twin._all = copy.deepcopy((self._owners, self._all), memo)
        twin._prepare()
        return twin

    def change(self) -> str:
        """Return the name of something that has changed, with what it is and was; nothing where all is as it was."""
        if self._is_same():
            return ""
        for (name, owner), kind in zip(self._owners.items(), self._classes, strict=True):
            if type(owner) is not kind:
                return f"{name or 'model'!r}, a {type(owner).__name__} for a {kind.__name__}"
        return next((one.described(key) for one in self._all for key in one.changed()), "")

    def _is_same(self) -> bool:
        """Return whether nothing has changed; if not, something may have."""
        try:
            return (
                self._counts == list(map(len, self._containers))
                and self._classes == list(map(type, self._owners.values()))
                and all(read(container) == values for read, container, values in self._reads)
            )
        except Exception:  # of what is gone, or of arrays, which do not compare as one
            return False


class _Values:
    """Values in a dictionary, list, tuple or set, as they were.

    Args:
        name: What they belong to.
        container: What holds them.
        is_free: Which of them may change.
        owner: The object whose attributes they are; None for others.

    Attributes:
        owner: The same.
    """

    def __init__(
        self, name: str, container: Any, is_free: Callable[[Any], bool] = lambda _: False, owner: object = None
    ) -> None:
        self._container, self.owner = container, owner
        self._name, self._is_free = name, is_free
        self._free: set[Any] = set()
        self._before = self._now()

    @property
    def container(self) -> Any:
        """What holds them; the attributes of an object are looked up, for a deep copy has its own."""
        return self._container if self.owner is None else vars(self.owner)

    def leave(self, keys: Iterable[Any]) -> None:
        """Go by what the values are now, and no longer by those of some keys."""
        self._free.update(keys)
        self._before = self._now()

    def reader(self) -> Any:
        """Return what reads the values, all at once; None if there are none."""
        if isinstance(self.container, set):
            return frozenset if self._before else None
        return itemgetter(*self._before) if self._before else None

    def changed(self) -> list[Any]:
        """Return the keys of what has changed."""
        now, before = self._now(), self._before
        return [key for key in {**before, **now} if not _same(now.get(key, _NOTHING), before.get(key, _NOTHING))]

    def described(self, key: Any) -> str:
        """Return the name of a value, with what it is and was if both are short."""
        now, before = (values.get(key, _NOTHING) for values in (self._now(), self._before))
        name = f"{self._name}.{key}" if self._name else str(key)
        is_short = isinstance(now, _PLAIN) and isinstance(before, _PLAIN)
        return f"{name!r}, {now!r} for {before!r}" if is_short else repr(name)

    def _now(self) -> dict[Any, Any]:
        if isinstance(self.container, set):
            return dict.fromkeys(self.container)
        pairs = self.container.items() if isinstance(self.container, dict) else enumerate(self.container)
        return {
            key: value
            for key, value in list(pairs)  # which another thread may change
            if key not in self._free and key not in _OF_PYTORCH and not self._is_free(value)
        }


def _values_of(name: str, owner: object) -> Iterator[_Values]:
    """Return what an object has: its attributes, and what is in lists and dictionaries among them."""
    yield _Values(name, None, owner=owner)
    if isinstance(owner, nn.Module):
        yield _Values(name, owner._modules)
        for tensors in (owner._parameters, owner._buffers):
            yield _Values(name, tensors, lambda tensor: tensor is not None)
        for hooks in (owner._forward_hooks, owner._forward_pre_hooks):
            yield _Values(f"{name}.hooks" if name else "hooks", hooks, _is_ours)
    seen: set[int] = set()
    within = [(f"{name}.{key}" if name else key, value) for key, value in vars(owner).items() if key not in _OF_PYTORCH]
    while within:
        name, value = within.pop()
        if isinstance(value, (dict, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))
            yield _Values(name, value)
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            within += [(f"{name}.{key}", item) for key, item in pairs]


def _is_ours(hook: object) -> bool:
    """Return whether a hook is there while a map is computed, in another thread."""
    return getattr(hook, "__module__", "") == ModuleTracker.__module__


def _same(now: Any, before: Any) -> bool:
    if isinstance(now, Tensor) or isinstance(before, Tensor):
        return now is before
    try:
        return now is before or bool(now == before)
    except Exception:  # of arrays, which do not compare as one
        return False
