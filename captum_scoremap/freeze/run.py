"""One run of a model under the rules.

A ``torch.overrides.TorchFunctionMode`` sees every operation, whether a module or a plain function calls it, in place or
not; global module hooks, in place only while the model runs, say in which module it happens. A tensor is *live* if it
depends on the image. Operations on tensors that are not live (on parameters, position tables, ...) run as they are.
"""

import functools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_scoremap.checks import UnsupportedOperationError, check_visible
from captum_scoremap.rules import METADATA, Call, Composite, Frozen, Rule, operation_name, tensors_in

__all__ = ["Run", "Site", "StopRun", "Tag", "root_module"]

_TRAINED_BY_CHANCE = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, nn.RReLU)
_OUT_OF_PLACE = (torch.Tensor, torch, F, torch._C._nn)

# A place in the model: a module and whether its input is meant, or its output.
Site = tuple[nn.Module, bool]


class Tag:
    """What is known of a live tensor, as bits of a number: flags of the library take their time."""

    LIVE = 1
    GATE = 2
    PROBABILITY = 4


_AS_IT_IS: AbstractContextManager[None] = nullcontext()
_NOTHING = 0


class StopRun(BaseException):
    """Ends a run early, once everything asked for has been seen. No ``Exception``, so that no model swallows it."""


def root_module(function: object) -> nn.Module | None:
    """The module whose names a run goes by, if ``function`` is one, a method of one, or a partial of either."""
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, nn.Module):
        return function
    owner = getattr(function, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


class Run(TorchFunctionMode):
    """Base of recording and replaying: who is live, where we are, and which rule a call has.

    Args:
        forward_func: The model, or a function that calls it.
        rules: Operation name to rule.
    """

    def __init__(self, forward_func: Callable[..., Any], rules: Mapping[str, Rule]) -> None:
        super().__init__()
        self.forward_func = forward_func
        self.rules = rules
        self.calls: Counter[nn.Module] = Counter()
        self._tags: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._keys: dict[str, int] = {}
        self._bases: dict[tuple[nn.Module | None, str], str] = {}
        self._stack: list[nn.Module] = []
        self._names: dict[nn.Module, str] = {}
        self._unsupported: dict[tuple[str, str], None] = {}
        self._thread = 0
        root = root_module(forward_func)
        if root is not None:
            self.name_modules(root)

    # -- what a subclass decides

    def operate(self, key: str, name: str, rule: Rule, call: Call, run: Callable[[], Any]) -> Any:
        """The output of a call; ``run`` runs the operation just as the model called it, in place where it did.

        Gradients are enabled where a live argument requires one.
        """
        raise NotImplementedError

    def at_site(self, site: Site, value: Any) -> Any:
        """What goes on from here in place of a module's input (a tuple) or output; the value itself by default."""
        return value

    def about_to_run(self, rule: Rule, live: tuple[Tensor, ...], target: Tensor | None) -> None:
        """Called before an operation, with its live arguments and the tensor that it changes in place, if any."""

    # -- running

    def execute(self, inputs: tuple[Tensor, ...], additional: tuple[Any, ...]) -> Any:
        """Run the model; hooks and mode are gone afterwards, however it ends.

        Args:
            inputs: Tensors that are live.
            additional: Further arguments, constant.

        Returns:
            What the model returns.

        Raises:
            UnsupportedOperationError: If operations have no rule.
        """
        self._thread = threading.get_ident()
        for tensor in inputs:
            self.tag(tensor, Tag.LIVE)
        with ExitStack() as stack:
            pre = nn.modules.module.register_module_forward_pre_hook(self._enter_module)
            stack.callback(pre.remove)
            post = nn.modules.module.register_module_forward_hook(self._leave_module, always_call=False)
            stack.callback(post.remove)
            stack.enter_context(self)
            output = self.forward_func(*inputs, *additional)
        self.raise_unsupported()
        return output

    def raise_unsupported(self) -> None:
        """Raise for all operations without a rule that were seen.

        Raises:
            UnsupportedOperationError: If there were any.
        """
        if self._unsupported:
            raise UnsupportedOperationError(list(self._unsupported))

    # -- live tensors

    def tag(self, tensor: Tensor, tag: int) -> None:
        """Say what is known of a tensor."""
        self._tags[id(tensor)] = weakref.ref(tensor), tag

    def tag_of(self, tensor: Tensor) -> int:
        """What is known of a tensor; a view knows what its base does."""
        known = self._tags.get(id(tensor))
        # the entry of a tensor that is gone may stand where another one is now
        if known is not None and known[0]() is tensor:
            return known[1]
        base = tensor._base
        return _NOTHING if base is None else self.tag_of(base)

    def is_live(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on the image."""
        return self.tag_of(tensor) != _NOTHING

    def is_gate(self, tensor: Tensor) -> bool:
        """Whether a tensor acts as a constant factor in a product."""
        return bool(self.tag_of(tensor) & Tag.GATE)

    # -- the mode

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = operation_name(func, args, kwargs)
        if name in METADATA:
            return func(*args, **kwargs)
        given = tensors_in((args, kwargs))
        live = tuple(filter(self.is_live, given))
        if live:
            return self._dispatch(func, name, args, kwargs, live)
        if not given:
            return func(*args, **kwargs)
        with torch.no_grad():
            return func(*args, **kwargs)

    def _dispatch(
        self,
        function: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        live: tuple[Tensor, ...],
    ) -> Any:
        rule = self.rules.get(name)
        if rule is None or getattr(function, "__name__", "") == "__set__":
            self._unsupported[name, self.module_name()] = None
            output = function(*args, **kwargs)
            for tensor in tensors_in(output):
                self.tag(tensor, Tag.LIVE)
            return output
        target = _changed_in_place(function, args, kwargs)
        self.about_to_run(rule, live, target)
        call = Call(*_out_of_place(function, args, kwargs), live, self.is_gate, in_place=target is not None)
        key = self._key(name)
        # gradients flow where a live tensor asks for them, whatever the parameters and the model say
        differentiable = any(tensor.requires_grad for tensor in live)
        with _AS_IT_IS if torch.is_grad_enabled() == differentiable else torch.set_grad_enabled(differentiable):
            if isinstance(rule, Composite):
                with self:
                    output = rule.apply(call, None)
                self._keep_in(target, output)
                return output if target is None else target
            gate = rule.makes_gate(call)
            output = self.operate(key, name, rule, call, lambda: function(*args, **kwargs))
            if target is not None and output is not None and output is not target:
                output = self._keep_in(target, output)
        if not isinstance(rule, Frozen):
            tag = Tag.LIVE | Tag.GATE if gate else Tag.LIVE
            if name in {"softmax", "log_softmax", "sigmoid", "logsigmoid", "log_sigmoid"}:
                tag |= Tag.PROBABILITY
            for tensor in (output,) if isinstance(output, Tensor) else tensors_in((output, target)):
                if tensor.is_floating_point() or tensor.is_complex():
                    self.tag(tensor, tag)
            if target is not None and target._base is not None:
                self.tag(target._base, Tag.LIVE)
        return output

    @staticmethod
    def _keep_in(target: Tensor | None, output: Any) -> Any:
        return output if target is None else target.copy_(output)

    # -- where we are

    def module_name(self) -> str:
        """Name of the module that is running, "" for the outermost."""
        return self._names.get(self._stack[-1], "") if self._stack else ""

    def _key(self, operation: str) -> str:
        """The name of this call: its module, its operation where the module is not that operation, a running number."""
        module = self._stack[-1] if self._stack else None
        base = self._bases.get((module, operation))
        if base is None:
            base = self.module_name()
            if not base:
                base = operation
            elif module is None or next(module.children(), None) or not type(module).__module__.startswith("torch.nn."):
                base = f"{base}:{operation}"
            self._bases[module, operation] = base
        number = self._keys[base] = self._keys.get(base, 0) + 1
        return base if number == 1 else f"{base}#{number}"

    def name_modules(self, root: nn.Module) -> None:
        """Learn the names of a module and all below it, before any of them runs."""
        for name, module in root.named_modules():
            self._names.setdefault(module, name)

    def _enter_module(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if threading.get_ident() != self._thread:
            return None
        check_visible(module)
        if module not in self._names:
            self.name_modules(module)
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
        self.calls[module] += 1
        with torch._C.DisableTorchFunction():
            return self.at_site((module, True), args)

    def _leave_module(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if threading.get_ident() != self._thread:
            return None
        self._stack.pop()
        with torch._C.DisableTorchFunction():
            return self.at_site((module, False), output)


def _changed_in_place(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tensor that a call changes, if it changes one."""
    if kwargs.get("out") is not None:
        return kwargs["out"]  # type: ignore[no-any-return]
    if (_is_in_place(function) or kwargs.get("inplace")) and args and isinstance(args[0], Tensor):
        return args[0]
    return None


@functools.cache
def _is_in_place(function: Callable[..., Any]) -> bool:
    name = getattr(function, "__name__", "")
    return (name.endswith("_") and not name.startswith("__")) or name == "__setitem__" or _is_in_place_operator(name)


def _is_in_place_operator(name: str) -> bool:
    return name.startswith("__i") and name.endswith("__") and name not in {"__invert__", "__int__", "__index__"}


def _out_of_place(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The same call, leaving its arguments as they are; the function itself where it has no such form."""
    if kwargs:
        kwargs = {key: value for key, value in kwargs.items() if key not in {"out", "inplace"}}
    return _plain_form(function), args, kwargs


@functools.cache
def _plain_form(function: Callable[..., Any]) -> Callable[..., Any]:
    name = getattr(function, "__name__", "")
    if _is_in_place_operator(name):
        return getattr(torch.Tensor, f"__{name[3:]}")  # type: ignore[no-any-return]
    if name.endswith("_") and not name.startswith("_"):
        return next((getattr(owner, name[:-1]) for owner in _OUT_OF_PLACE if hasattr(owner, name[:-1])), function)
    return function
