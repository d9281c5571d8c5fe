"""Where in the model a run is: which module runs, under which name, and where layers begin and end."""

import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

__all__ = ["Places", "Site", "StopRun", "root_module"]

_TRAINED_BY_CHANCE = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, nn.RReLU)

# A place in the model: a module and whether its input is meant, or its output.
Site = tuple[nn.Module, bool]


class StopRun(BaseException):
    """Ends a run early, once everything asked for has been seen. No ``Exception``, so that no model swallows it."""


def root_module(function: object) -> nn.Module | None:
    """Return the module whose names a run goes by, if ``function`` is one, a method of one, or a partial of either."""
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, nn.Module):
        return function
    owner = getattr(function, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


class Places:
    """Follows a run through the modules, by hooks that are in place only while the model runs.

    Args:
        forward_func: The model, or a function that calls it.

    Attributes:
        module: The module that is running; None for the outermost function.
        calls: How often each module ran.
        in_threads: Names of modules that ran in another thread, unseen.
    """

    def __init__(self, forward_func: Callable[..., Any]) -> None:
        self.calls: Counter[nn.Module] = Counter()
        self.in_threads: list[str] = []
        self._stack: list[nn.Module] = []
        self._names: dict[nn.Module, str] = {}
        self.module: nn.Module | None = None
        self._thread = 0
        root = root_module(forward_func)
        if root is not None:
            self._name_modules(root)

    @contextmanager
    def watched(self, sites: Sequence[Site], at_site: Callable[[Site, Any], Any]) -> Iterator[None]:
        """Follow what runs inside the context.

        Args:
            sites: Where ``at_site`` is asked.
            at_site: From a site and what passes it (a pair of positional and keyword arguments for an input) to what
                goes on from there. It comes after the user's own hooks, so that it sees what they made.
        """
        self._thread = threading.get_ident()
        with ExitStack() as stack:
            hooks = nn.modules.module
            stack.callback(hooks.register_module_forward_pre_hook(self._enter).remove)
            stack.callback(hooks.register_module_forward_hook(self._leave, always_call=True).remove)
            for site in sites:
                stack.callback(self._watch(site, at_site).remove)
            yield

    def _watch(self, site: Site, at_site: Callable[[Site, Any], Any]) -> Any:
        module, at_input = site

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return at_site(site, (args, kwargs)) if threading.get_ident() == self._thread else None

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return at_site(site, output) if threading.get_ident() == self._thread else None

        if at_input:
            return module.register_forward_pre_hook(before, with_kwargs=True)
        return module.register_forward_hook(after)

    @property
    def module_name(self) -> str:
        """Name of the module that is running, "" for the outermost."""
        return self.name_of(self.module)

    def name_of(self, module: nn.Module | None) -> str:
        """Return the name of a module that ran, "" for the outermost."""
        return "" if module is None else self._names.get(module, "")

    def call_name(self, module: nn.Module | None, operation: str) -> str:
        """Return the name a call goes by: its module, and its operation where the module does more than that one."""
        name = self.name_of(module)
        if not name:
            return operation
        if module is None or next(module.children(), None) or not type(module).__module__.startswith("torch.nn."):
            return f"{name}:{operation}"
        return name

    def roots(self) -> list[nn.Module]:
        """Return the outermost modules that were named."""
        return [module for module, name in self._names.items() if not name]

    def _name_modules(self, root: nn.Module) -> None:
        for name, module in root.named_modules():
            self._names.setdefault(module, name)

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if threading.get_ident() != self._thread:
            self.in_threads.append(self._names.get(module, type(module).__name__))
            return
        if module not in self._names:
            self._name_modules(module)
        if module.training and isinstance(module, _TRAINED_BY_CHANCE):
            raise ValueError(
                f"the model must be in evaluation mode, got {self._names[module] or type(module).__name__!r} "
                f"({type(module).__name__}) in training mode. Call model.eval()."
            )
        if module._backward_pre_hooks or (module._backward_hooks and module._is_full_backward_hook):
            raise ValueError(
                "the model must have no full backward hooks, which hand tensors on unseen; got one at "
                f"{self._names[module] or type(module).__name__!r}. Remove it first (the handle's remove())."
            )
        self._stack.append(module)
        self.module = module
        self.calls[module] += 1

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if threading.get_ident() == self._thread and module in self._stack:
            while self._stack.pop() is not module:
                pass
            self.module = self._stack[-1] if self._stack else None
