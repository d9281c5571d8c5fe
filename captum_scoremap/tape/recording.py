"""One run of a model, recorded: every ATen operation that a live tensor passes becomes a step of the tape.

A ``TorchDispatchMode`` sits below autograd, where PyTorch has come down to a few hundred operations; scripted
functions, ``vmap``, custom autograd functions and gradients taken in the forward all arrive there as plain ones. A
tensor is *live* if it depends on the image. Operations on tensors that are not live (on parameters, position tables,
...) run as they are. The user's code runs once; everything else is algebra on the tape.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey

from captum_scoremap.checks import UnsupportedOperationError, unrecorded
from captum_scoremap.rules import DEFAULT, Call, Rule, Value, floating, tensors_in
from captum_scoremap.rules.derivative import is_derivable
from captum_scoremap.rules.quantized import is_encoded
from captum_scoremap.settings import as_written, module_by_module

from .changes import change, check_apart, read_constants, run_constant
from .exits import exits_watched
from .module_tracker import Refused, Site, StopRun
from .operation import OPERATIONS, Operation
from .quantized import casts, run_rounding
from .run import Run
from .sight import collector_paused
from .taps import tap, tap_inputs
from .verification import verify
from .writing import not_dense, step_of, write

__all__ = ["Recording"]


class Recording(Run):
    """Runs a model at the image and writes the tape.

    Args:
        forward_func: The model, or a function that calls it.
        rules: The table of rules, by name of the ATen operation.
        sites: Where in the model to tap.
        keep_bypass: As for :class:`Run`.
        inspect: As for :class:`Run`.
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
        keep_bypass: bool = False,
        inspect: bool = False,
        stop_at: Site | None = None,
        differentiable: bool = False,
    ) -> None:
        super().__init__(forward_func, rules, keep_bypass=keep_bypass, inspect=inspect)
        self.forward_func = forward_func
        self._operations = OPERATIONS if rules is DEFAULT else {}
        self._sites, self._stop_at, self._differentiable = tuple(sites), stop_at, differentiable
        self._last_error: BaseException | None = None
        self._without_rules: dict[str, Call] = {}  # calls of operations that have none
        self._stopped_with: list[Any] = []  # what passed the site at which the run stopped

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
        self.watch_state()
        self.tape.inputs = tap_inputs(self, copies)
        self.has_additional = None in self.tape.inputs
        sites = self._sites if self._stop_at in (None, *self._sites) else (*self._sites, self._stop_at)
        for tensor in tensors_in(additional):
            self.made(tensor)
            self.has_additional = True
        with (
            self._errors_raised(),
            _everything_in_sight(),
            exits_watched(self),
            collector_paused(),
            self.sight.collections_watched(),
            torch.set_grad_enabled(self._differentiable),
            self.modules.watched([site for site in sites if site is not None], self._at_site),
        ):
            with self:
                output = self._run_model(*copies, *additional)
                if select is not None and not self.sight.unsupported:
                    output = select(output)
            # while what the run made can still be told from what was there before
            values = {id(tensor): self.value_of(tensor) for tensor in tensors_in(output)}
            for tensor in tensors_in(output):
                self.sight.compare(tensor, self.is_live)
                if values[id(tensor)] is None:
                    self.sight.read(tensor)
            self.sight.meet_state()
            self.check_state()
        self.sight.underivable |= {name for name, call in self._without_rules.items() if not is_derivable(call)}
        self.sight.raise_refused()
        with unrecorded():
            for one in self.unverified:
                verify(*one)
        self.tape.output = output
        self.tape.output_values = {key: value for key, value in values.items() if value is not None}
        return output

    def _run_model(self, *args: Any) -> Any:
        """Return the model's output, or what passed the site at which the run stopped."""
        try:
            output = self.forward_func(*args)
        except (StopRun, RuntimeError):  # which TorchScript makes of every error of Python's
            if not self._stopped_with:
                raise
        return self._stopped_with.pop() if self._stopped_with else output

    @contextmanager
    def _errors_raised(self) -> Iterator[None]:
        """Raise the errors of operations as what they are, from where they were raised."""
        try:
            yield
            if self.modules.refused is not None:  # which the model swallowed
                raise self.modules.refused
        except (Refused, Exception) as ended:
            # TorchScript's own error says which line of the script it was, and nothing of what Python raised there
            is_lost = "TorchScript" in str(ended) and str(ended).rstrip().endswith("RuntimeError:")
            error = self.modules.refused or (self._last_error if is_lost and self._last_error is not None else ended)
            if isinstance(error, Refused):
                plain = error.error.with_traceback(error.__traceback__)
                try:
                    raise plain from None
                finally:
                    del plain, error.error, error  # a frame of it that holds it would hold all tensors, too
            if error is ended:
                raise
            raise error from ended
        finally:
            self._last_error = self.modules.refused = None  # whose frames hold the run, and all its tensors

    def _at_site(self, site: Site, passing: Any) -> Any:
        # no one tensor: a part of one, by vmap, or one inside of a derivative
        if any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors_in(passing))):
            return passing
        if self._stopped_with:  # and the model, which swallowed that, goes on
            raise StopRun
        if site in self._sites:
            passing = tap(self, site, passing)
        if self._stop_at == site:
            self._stopped_with.append(passing)
            raise StopRun
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
        if _has_complex(args) and torch._C._dispatch_tls_is_dispatch_key_excluded(DispatchKey.Conjugate):
            with _conjugates_in_sight():
                return self.__torch_dispatch__(func, types, args, kwargs)
        if self.sight.suspects:
            self.sight.settle()
        try:
            if not self.sight.open:
                return self._run(func, args, kwargs)
            arguments = tensors_in((args, kwargs))
            for tensor in arguments:
                self.sight.compare(tensor, self.is_live)
            output = self._run(func, args, kwargs)
            for tensor in arguments:
                self.sight.keep(tensor)
        except UnsupportedOperationError as error:
            self._last_error = self.modules.refuse(error)
            raise self._last_error from None
        except BaseException as error:
            self._last_error = error
            raise
        return output

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, and write its step."""
        operation = self._operations.get(id(func))  # its own hash is a function of Python's, and takes longer
        if operation is None:
            if isinstance(func, torch._ops.HigherOrderOperator):
                return self._run_higher_order(func, args, kwargs)
            operation = self._operations[id(func)] = Operation(func, self.rules)
        if operation.outs:
            given = tensors_in([kwargs[name] for name in operation.outs if name in kwargs])
            for tensor in given:
                self.value_of(tensor)  # which checks what changed before
            self.count_changes(given, more=1)
            return self._into(func, operation, args, kwargs)
        if operation.lifts:
            self.lift(args[0])
        if operation.writes and operation.overload.namespace != "aten":  # which PyTorch counts before it runs
            self.count_changes([args[at] for at in operation.writes if at < len(args)])
        live: list[Tensor] = []
        values: list[Value] = []
        symbols = list(args)
        for position in operation.tensors:
            if position >= len(args):
                break
            symbols[position] = self.symbol(args[position], live, values)
        named = {name: self.symbol(argument, live, values) for name, argument in kwargs.items()} if kwargs else {}
        if operation.is_view:
            self.count_changes(args[:1])
        if operation.writes:
            targets = [args[at] for at in operation.writes if at < len(args)]
            self.count_changes(targets, more=1)
            if values:
                check_apart(self, operation, targets, tensors_in((args, kwargs)))
        if self.real.known and self.real.are_in((args, kwargs)):
            where = operation.changes
            if where is not None and isinstance(args[where], Tensor) and not is_encoded(args[where]):
                return self._run(func, self.real.besides(args, where), kwargs)
            return run_rounding(self, func, operation, args, kwargs)
        if values and (operation.rounds or casts(operation, args, kwargs)):
            return run_rounding(self, func, operation, args, kwargs)
        if not values:
            return run_constant(self, func, operation, args, kwargs)
        if self.sight.bare:
            read_constants(self, operation, args)
        if operation.changes is not None and not operation.reads:
            return run_constant(self, func, operation, args, kwargs)
        call = Call(operation.functional, args, kwargs, tuple(live), tuple(values))
        if operation.rule is None:
            return self._without_rule(func, operation, call)
        step = step_of(self, operation, call, tuple(symbols), named)
        if operation.changes is None:
            return write(self, operation, call, step, func)
        return change(self, func, operation, call, step)

    def _run_higher_order(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run control flow and the like as the operations that it is made of; what has none cannot be seen."""
        if func is torch.ops.higher_order.cond:
            predicate, *branches, operands = args
            return self.recorded(branches[0 if predicate else 1], *operands)
        kernel = func.py_kernels.get(DispatchKey.CompositeExplicitAutograd)
        if kernel is None:
            raise self.sight.ended(f"what {func.name()}() does")
        if func.name() == "scan":  # whose kernel wants no mode, and calls this
            from torch._higher_order_ops.scan import generic_scan

            combine, init, xs, additional, *_ = args
            kernel, args, kwargs = generic_scan, (combine, init, xs), {"additional_inputs": additional}
        return self.recorded(kernel, *args, **kwargs)

    def _into(self, func: Any, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation that is given tensors for what it returns: what it would return is copied there."""
        arguments = tensors_in((args, kwargs))
        if not self.real.are_in(arguments) and all(self.value_of(tensor) is None for tensor in arguments):
            return run_constant(self, func, operation, args, kwargs)
        if operation.functional is None:
            raise self.sight.ended(f"what {operation.display}(out=...) wrote to a tensor's memory")
        given = tensors_in([kwargs[name] for name in operation.outs])
        check_apart(self, operation, given, arguments)
        rest = {name: argument for name, argument in kwargs.items() if name not in operation.outs}
        with self:
            made = tensors_in(operation.functional(*args, **rest))
            for target, output in zip(given, made, strict=True):
                if target.shape != output.shape:
                    target.resize_(output.shape)
                target.copy_(output)
        return given[0] if len(given) == 1 else tuple(given)

    def _without_rule(self, func: Any, operation: Operation, call: Call) -> Any:
        """Run an operation that has no rule: as what it is made of, or so that all of them can be named at the end."""
        args, kwargs = call.args, call.kwargs
        if operation.name in _RESIZES and kwargs.get("memory_format") is None:
            size = args[1].shape if isinstance(args[1], Tensor) else torch.Size(args[1])
            if args[0].shape == size:
                return args[0]
        if operation.name.startswith("_foreach"):  # on a CPU, and so to us, one operation for each tensor
            return self.recorded(func._op_dk, DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        body = _MADE_OF.get(func.overloadpacket.__name__, getattr(func, "impl_aten", func.decompose))
        made = self.recorded(body, *args, **kwargs)
        if made is not NotImplemented:
            return made
        if operation.functional is None or operation.name in {"set", *_RESIZES}:  # which no rule could say
            self.sight.hide(f"what {func.overloadpacket.__name__}() did to a tensor's memory")
        else:
            self.sight.lack_rule(operation.display)
            self._without_rules.setdefault(operation.display, call)
        output = call.output = func(*args, **kwargs)
        for tensor in floating(output):
            if tensor.layout is not torch.strided or tensor.is_nested:
                raise not_dense(self, operation, tensor)
            self.name(tensor, Value(tensor, sites=Value.IMAGE))
        return output


_RESIZES = {"resize", "resize_as"}


def _batch_norm(training: bool, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Return the norm, and nothing in place of what a kernel keeps for its backward pass."""
    found = torch.ops.aten.native_batch_norm(x, *args[:4], training, *args[4:])
    return *found, x.new_empty(0, dtype=torch.uint8)


def _batch_norm_legit(x: Tensor, weight: Any, bias: Any, *args: Any) -> tuple[Tensor, ...]:
    """Return the norm, by statistics that are given or, with fewer arguments, of the image."""
    statistics = () if len(args) == 5 else (None, None)
    found: tuple[Tensor, ...] = torch.ops.aten.native_batch_norm(x, weight, bias, *statistics, *args)
    return found


def _batch_norm_with_update(x: Tensor, weight: Any, bias: Any, *args: Any) -> tuple[Tensor, ...]:
    mean, variance = (one.clone() for one in args[:2])
    return *_batch_norm(True, x, weight, bias, mean, variance, *args[2:]), mean, variance


# Operations that are made of others: they have no out-of-place form with the same arguments, or are kernels of norms.
_MADE_OF: dict[str, Callable[..., Any]] = {
    "polygamma_": lambda x, n: x.copy_(torch.polygamma(n, x)),
    "_native_batch_norm_legit": _batch_norm_legit,
    "_batch_norm_no_update": partial(_batch_norm, False),
    "_batch_norm_with_update": partial(_batch_norm, True),
    "_batch_norm_with_update_functional": _batch_norm_with_update,
}


@contextmanager
def _conjugates_in_sight() -> Iterator[None]:
    """Let kernels that conjugate inside, such as that of a complex pseudo-inverse, do so: below a mode none does."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    lazy = torch._C.DispatchKeySet(DispatchKey.Conjugate) | torch._C.DispatchKeySet(DispatchKey.Negative)
    with torch._C._ForceDispatchKeyGuard(included, excluded - lazy):
        yield


def _has_complex(args: Sequence[Any]) -> bool:
    for one in args:  # noqa: SIM110  every operation asks, and a generator takes twice as long
        if isinstance(one, Tensor) and one.is_complex():
            return True
    return False


@contextmanager
def _everything_in_sight() -> Iterator[None]:
    """Whole-module kernels off, and compiled code run as it was written; both as before afterwards."""
    torch.clear_autocast_cache()  # of parameters that an earlier call cast, where none of the run's operations did
    is_compiler_there = "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance")
    with module_by_module(), as_written() if is_compiler_there else nullcontext():
        yield
