"""Which module of a model is running, under which name, and where layers begin and end."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

from captum_scoremap.checks import warn

from .listeners import Listeners

__all__ = ["ModuleTracker", "Refused", "Route", "Site", "StopRun", "root_module"]

# In training mode these change the model, or what they do is not one thing for each image.
_NOT_IN_TRAINING = (nn.modules.batchnorm._BatchNorm, nn.RReLU)

# A place in the model: a module and whether its input is meant, or its output.
Site = tuple[nn.Module, bool]

# Which of the modules of a model ran, each by its number, and how often.
Route = frozenset[tuple[int, int]]


class StopRun(BaseException):
    """Ends a run early, once everything asked for has been seen. No ``Exception``, so that no model swallows it."""


class Refused(BaseException):
    """Ends a run with an error. No ``TypeError`` itself, of which ``x * y`` makes "unsupported operand type(s)"."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.args = (str(error),)  # not the error itself, whose frames hold the run


def root_module(function: object) -> nn.Module | None:
    """Return the module whose names a run uses, if ``function`` is one, a method of one, or a partial of either."""
    while isinstance(function, partial):
        function = function.func
    if isinstance(function, nn.Module):
        return function
    owner = getattr(function, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


class ModuleTracker:
    """Follows a run through the modules, by what is in place only while the model runs.

    Attributes:
        roots: The outermost modules.
        current: The module that is running; None for the outermost function.
        calls: How often each module ran.
        refused: What the run ends with, though the model may go on after it, in a bare ``except:``.
    """

    def __init__(self, forward_func: Callable[..., Any]) -> None:
        self.calls: Counter[nn.Module] = Counter()
        self._names: dict[nn.Module, str] = {}
        self.current: nn.Module | None = None
        self.refused: Refused | None = None
        self._thread = 0
        self._dropped = False
        root = root_module(forward_func)
        self.roots = [] if root is None else [root]

    @contextmanager
    def watched(
        self, sites: Sequence[Site] = (), at_site: Callable[[Site, Any], Any] = lambda _, passed: passed
    ) -> Iterator[None]:
        """Follow what runs inside; what passes a site, an input as ``(args, kwargs)``, goes on as ``at_site`` says."""
        self._thread = threading.get_ident()
        with ExitStack() as stack:
            stack.enter_context(_followers.joined_by(self))
            for site in sites:
                stack.callback(self._watch(site, at_site).remove)
            yield

    def named_modules(self) -> dict[str, nn.Module]:
        """Return the outermost modules with all that is in them, and what else ran, by name."""
        names: dict[nn.Module, str] = {}
        for top in (*self.roots, *self.calls):
            if top not in names:
                # what stands beside the model, as where a function calls several, goes by its class
                outer = f"{type(top).__name__}_{len(names)}" if names else ""
                for name, module in top.named_modules(prefix=outer):
                    names.setdefault(module, name)
        return {name: module for module, name in names.items()}

    def route(self) -> Route:
        """Return which modules ran, and how often; without those that are made anew in each run."""
        members = (module for root in self.roots for module in root.modules())
        return frozenset((id(module), self.calls[module]) for module in members if module in self.calls)

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a module and know that it runs."""
        self._enter(module)
        outer, self.current = self.current, module
        try:
            return _plain_call(module, *args, **kwargs)
        finally:
            self.current = outer

    def refuse(self, error: Exception) -> Refused:
        """Return what is to be raised for an error that the model must not handle, as if it were an operation's."""
        self.refused = self.refused or Refused(error)
        return self.refused

    def _watch(self, site: Site, at_site: Callable[[Site, Any], Any]) -> Any:
        module, at_input = site

        def before(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return at_site(site, (args, kwargs)) if is_here(called) else None

        def after(called: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return at_site(site, output) if is_here(called) else None

        def is_here(called: nn.Module) -> bool:  # a copy that the forward makes of a module has its hooks, too
            return called is module and threading.get_ident() == self._thread

        if at_input:
            return module.register_forward_pre_hook(before, with_kwargs=True)
        return module.register_forward_hook(after)

    @property
    def current_name(self) -> str:
        """Name of the module that is running, "" for the outermost."""
        return self.name_of(self.current)

    def name_of(self, module: nn.Module | None) -> str:
        """Return the name of a module that ran, "" for the outermost."""
        if module is None:
            return ""
        if module not in self._names:
            for root in self.roots:
                for name, inner in root.named_modules():
                    self._names.setdefault(inner, name)
        return self._names.get(module, "")

    def call_name(self, module: nn.Module | None, operation: str) -> str:
        """Return the name of a call: its module, and its operation where the module does more than that one."""
        name = self.name_of(module)
        if not name:
            return operation
        if module is None or next(module.children(), None) or not type(module).__module__.startswith("torch.nn."):
            return f"{name}:{operation}"
        return name

    def _enter(self, module: nn.Module) -> None:
        if self.current is None and module not in self.roots:
            self.roots.append(module)
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p and not self._dropped:
            self._dropped = True  # once in a run is enough
            warn(
                f"dropout is in training mode at {self.name_of(module) or type(module).__name__!r}: the map is that of "
                "the units that this run kept, and another run gives another. Call model.eval(), unless this is meant."
            )
        if isinstance(module, _NOT_IN_TRAINING) and module.training:  # scripted ones may not know
            raise self.refuse(
                ValueError(
                    f"the model must be in evaluation mode, got {self.name_of(module) or type(module).__name__!r} "
                    f"({type(module).__name__}) in training mode. Call model.eval()."
                )
            )
        if module._backward_pre_hooks or (module._backward_hooks and module._is_full_backward_hook):
            raise self.refuse(
                ValueError(
                    "the model must have no full backward hooks, which pass tensors on unseen; got one at "
                    f"{self.name_of(module) or type(module).__name__!r}. Remove it first (the handle's remove())."
                )
            )
        self.calls[module] += 1


def _plain_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    compiled = module.__dict__.get("_compiled_call_impl")
    return (compiled or module._call_impl)(*args, **kwargs)


def _followed_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    followers = _followers.here()
    return followers[-1].run(module, args, kwargs) if followers else _plain_call(module, *args, **kwargs)


def _compiled_in_place(module: nn.Module, call: Any) -> None:
    module.__dict__["_compiled_call_impl"] = call


def _lead_calls(through: Any) -> None:
    """Lead the calls of modules through a function: where each looks first for what ``module.compile()`` put there.

    A pair of global hooks takes three times as long for every module, and a new ``nn.Module.__call__``, once, a
    millisecond or more: Python goes through all classes of modules there are.
    """
    nn.Module._compiled_call_impl = through


_FOLLOWING: Any = property(partial(MethodType, _followed_call), _compiled_in_place)
_followers: Listeners[ModuleTracker] = Listeners(partial(_lead_calls, _FOLLOWING), partial(_lead_calls, None))
