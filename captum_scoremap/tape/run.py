"""One run of a model, recorded: every ATen operation that a live tensor passes becomes a step of the tape.

A ``TorchDispatchMode`` sits below autograd, where PyTorch has come down to a few hundred operations; scripted
functions, ``vmap``, custom autograd functions and gradients taken in the forward all arrive there as plain ones. A
tensor is *live* if it depends on the image. Operations on tensors that are not live (on parameters, position tables,
...) run as they are. The user's code runs once; everything else is algebra on the tape.
"""

import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from captum_scoremap.checks import module_by_module, unrecorded
from captum_scoremap.rules import DEFAULT, Call, Rule, Value, floating, tensors_in

from .changes import Changes
from .exits import Exits
from .live import Live
from .memory import Memory
from .operation import OPERATIONS, Operation
from .places import Places, Site, StopRun
from .quantized import RealNumbers, Rounding
from .sight import Sight, collector_at_rest
from .steps import Tape
from .taps import Taps
from .verification import verify
from .writing import Writer

__all__ = ["Recording"]


class Recording(TorchDispatchMode):
    """Runs a model at the image and writes the tape.

    Args:
        forward_func: The model, or a function that calls it.
        rules: The table of rules, by name of the ATen operation.
        sites: Places in the model to tap.
        bypass: Whether to keep what bypasses a site, so that the steps above it alone can be run forward.
        inspect: Whether to record constants too, for their switches, and to leave the sites' tensors alone.
        stop_at: A site after which the run ends; what passes it is the output.
        differentiable: Whether constants keep their autograd graphs.
    """

    supports_higher_order_operators = True

    def __init__(
        self,
        forward_func: Callable[..., Any],
        rules: Mapping[str, Rule],
        sites: Sequence[Site] = (),
        *,
        bypass: bool = False,
        inspect: bool = False,
        stop_at: Site | None = None,
        differentiable: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch has no types there
        self.forward_func = forward_func
        self.tape, self.places = Tape(), Places(forward_func)
        self._rules, self._operations = rules, OPERATIONS if rules is DEFAULT else {}
        self._sites, self._stop_at, self._differentiable = tuple(sites), stop_at, differentiable
        # the parts do not hold the run, which would wait, with all its tensors, until the collector comes
        self._recorded = partial(_recorded, weakref.ref(self))
        self._memory = Memory(self.tape, rules, self.places, bypass=bypass)
        self._sight = Sight(self.places)
        self._live = Live(self._memory, self._sight, self.places)
        self._exits = Exits(self._live, self._sight)
        parts = self.tape, self._live, self._memory, self._sight
        self._writer = Writer(*parts, inspect=inspect, recorded=self._recorded)
        self._changes = Changes(*parts, self._writer, self._recorded)
        self._real = RealNumbers()
        self._rounding = Rounding(self._real, self._live, self._sight, self._changes, self._recorded)
        self._taps = Taps(self._live, self._memory, self._real, inspect=inspect)
        self.tapped, self.broken = self._taps.tapped, self._writer.broken

    def record(
        self,
        inputs: tuple[Tensor, ...],
        additional: tuple[Any, ...] = (),
        select: Callable[[Any], Any] | None = None,
    ) -> Any:
        """Run the model once, at the image, with additional arguments, which are constants.

        ``select`` is applied to the model's output as part of the run: its operations become steps, too.

        Returns:
            The model's output, or what passed ``stop_at``, or what ``select`` made of it.

        Raises:
            UnsupportedOperationError: If operations have no rule.
        """
        # copies, because the model may change its input in place
        copies = tuple(tensor.detach().clone() for tensor in inputs)
        self.tape.inputs = self._taps.begin(copies)
        sites = self._sites if self._stop_at in (None, *self._sites) else (*self._sites, self._stop_at)
        for tensor in tensors_in(additional):
            self._sight.made(tensor)
        with (
            _everything_in_sight(),
            self._exits.watched(),
            collector_at_rest(),
            torch.set_grad_enabled(self._differentiable),
            self.places.watched([site for site in sites if site is not None], self._at_site),
        ):
            with self:
                try:
                    output = self.forward_func(*copies, *additional)
                except StopRun as stop:
                    (output,) = stop.args
                if select is not None and not self._sight.unsupported:
                    output = select(output)
            # while what the run made can still be told from what was there before
            values = {id(tensor): self.value_of(tensor) for tensor in tensors_in(output)}
        self._sight.raise_refused()
        with unrecorded():
            for one in self._writer.unverified:
                verify(*one)
        self.tape.output = output
        self.tape.output_values = {key: value for key, value in values.items() if value is not None}
        return output

    def value_of(self, tensor: Tensor) -> Value | None:
        """Return the value of a tensor; None if it is not live."""
        return self._live.value_of(tensor)

    def _at_site(self, site: Site, passing: Any) -> Any:
        if site in self._sites:
            passing = self._taps.tap(site, passing)
        if self._stop_at == site:
            raise StopRun(passing)
        return passing

    # -- the mode

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: nothing is compiled while a run records, so that its calls need no guard against it."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.is_inference_mode_enabled():  # whose tensors no derivative is taken at
            with torch.inference_mode(False), torch.no_grad():
                return self.__torch_dispatch__(func, types, args, kwargs)
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.HigherOrderOperator):
            return self._run_higher_order(func, args, kwargs)
        operation = self._operations.get(func)
        if operation is None:
            operation = self._operations[func] = Operation(func, self._rules)
        if operation.outs:
            return self._into(func, operation, args, kwargs)
        if operation.lifts:
            self._sight.lift(args[0])
        live: list[Tensor] = []
        values: list[Value] = []
        symbols = list(args)
        for position in operation.tensors:
            if position >= len(args):
                break
            symbols[position] = self._live.symbol(args[position], live, values)
        named = {name: self._live.symbol(argument, live, values) for name, argument in kwargs.items()} if kwargs else {}
        if operation.rounds if values else self._real and self._real.are_in((args, kwargs)):
            return self._rounding.run(func, operation, args, kwargs)
        if not values:
            return self._changes.run_constant(func, operation, args, kwargs)
        if self._sight.bare:
            self._changes.read_constants(operation, args)
        if operation.changes is not None and not operation.reads:
            return self._changes.run_constant(func, operation, args, kwargs)
        if operation.rule is None:
            return self._without_rule(func, operation, args, kwargs)
        call = Call(operation.functional, args, kwargs, tuple(live), tuple(values))
        step = self._writer.step(operation, call, tuple(symbols), named)
        if operation.changes is None:
            return self._writer.write(operation, call, step, func)
        return self._changes.change(func, operation, call, step)

    def _run_higher_order(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run control flow and the like as the operations that it is made of; what has none cannot be seen."""
        if func is torch.ops.higher_order.cond:
            predicate, *branches, operands = args
            return self._recorded(branches[0 if predicate else 1], *operands)
        kernel = func.py_kernels.get(torch._C.DispatchKey.CompositeExplicitAutograd)
        if kernel is None:
            raise self._sight.refused(func.name())
        return self._recorded(kernel, *args, **kwargs)

    def _into(self, func: Any, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation that is given tensors for what it returns: what it would return is copied there."""
        arguments = tensors_in((args, kwargs))
        if not self._real.are_in(arguments) and all(self.value_of(tensor) is None for tensor in arguments):
            return self._changes.run_constant(func, operation, args, kwargs)
        if operation.functional is None:
            raise self._sight.refused(operation.display)
        given = tensors_in([kwargs[name] for name in operation.outs])
        rest = {name: argument for name, argument in kwargs.items() if name not in operation.outs}
        with self:
            made = tensors_in(operation.functional(*args, **rest))
            for target, output in zip(given, made, strict=True):
                if target.shape != output.shape:
                    target.resize_(output.shape)
                target.copy_(output)
        return given[0] if len(given) == 1 else tuple(given)

    def _without_rule(self, func: Any, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation that has no rule: as what it is made of, or so that all of them can be named at the end."""
        made = self._recorded(func.decompose, *args, **kwargs)
        if made is not NotImplemented:
            return made
        self._sight.lack_rule(operation.display)
        output = func(*args, **kwargs)
        for tensor in floating(output):
            if tensor.layout is not torch.strided or tensor.is_nested:
                raise self._writer.not_dense(operation, tensor)
            self._live.name(tensor, Value(tensor, sites=1))
        return output


def _recorded(run: Callable[[], Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function so that its operations are recorded, from within one of them."""
    with run():
        return function(*args, **kwargs)


@contextmanager
def _everything_in_sight() -> Any:
    """Whole-module kernels off, and compiled code run as it was written; both as before afterwards."""
    with ExitStack() as stack:
        stack.enter_context(module_by_module())
        torch.clear_autocast_cache()  # of parameters that an earlier call cast, where none of the run's operations did
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
