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
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from captum_scoremap.checks import UnsupportedOperationError, module_by_module, unrecorded
from captum_scoremap.rules import (
    DEFAULT,
    Call,
    Copy,
    Linear,
    Rounded,
    Rule,
    Value,
    floating,
    substituted,
    tensors_in,
)

from .memory import Memory, geometry, overlaps
from .operation import OPERATIONS, Operation
from .places import Places, Site, StopRun
from .quantized import RealNumbers, rounding
from .sight import Sight
from .steps import Kept, Step, Tape
from .verification import verify

__all__ = ["Recording", "Tapped"]

aten = torch.ops.aten

# Where a value is frozen that a model may depend on, so that a map below it can be empty.
_BREAKS = {
    *("argmax", "argmin", "round", "floor", "ceil", "trunc", "sign", "bucketize", "searchsorted", "nonzero"),
    "_to_copy",  # to whole numbers
}

_PROBABILITIES = {"_softmax", "_log_softmax", "sigmoid", "log_sigmoid_forward"}


class Tapped:
    """What passed a site.

    Attributes:
        values: Its floating-point tensors, as values.
        activations: The tensors, Y.
        is_tuple: Whether the site has several.
        bit: Set in ``Value.sites`` of all that depends on it.
    """

    __slots__ = ("_kept", "bit", "is_tuple", "values")

    def __init__(self, values: tuple[Value, ...], kept: tuple[Kept, ...], *, is_tuple: bool, bit: int) -> None:
        self.values = values
        self.bit = bit
        self.is_tuple = is_tuple
        self._kept = kept

    @property
    def activations(self) -> tuple[Tensor, ...]:
        """Y, as it was when it passed."""
        return tuple(kept.tensor for kept in self._kept)

    def release(self) -> None:
        """Hold on to Y no longer; what still needs it has it."""
        self._kept = ()


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
        self.tape = Tape()
        self.places = Places(forward_func)
        self.tapped: dict[Site | None, Tapped] = {}
        self.broken: dict[tuple[str, str], None] = {}
        self._rules = rules
        self._sites, self._stop_at = tuple(sites), stop_at
        self._bypass, self._inspect, self._differentiable = bypass, inspect, differentiable
        self._operations = OPERATIONS if rules is DEFAULT else {}
        self._values: dict[int, tuple[weakref.ref[Tensor], Value, int]] = {}
        self._memory = Memory(self._record)
        self._real = RealNumbers()
        self._sight = Sight(self._is_live, self._holds_live, self.places)
        self._bits = 1
        self._readers: dict[int, list[Step]] = {}  # steps by the memory of constants among their arguments
        self._indexed = 0  # how many of the steps are in there
        self._unsupported: dict[tuple[str, str], None] = {}
        self._unverified: list[tuple[str, Rule, Call]] = []

    # -- running

    def record(
        self,
        inputs: tuple[Tensor, ...],
        additional: tuple[Any, ...] = (),
        select: Callable[[Any], Tensor] | None = None,
    ) -> Any:
        """Run the model once, at the image.

        Args:
            inputs: The image, (N, ...) each.
            additional: Additional arguments, constant.
            select: Applied to the model's output as part of the run: its operations become steps, too.

        Returns:
            The model's output, or what passed ``stop_at``, or what ``select`` made of it.

        Raises:
            UnsupportedOperationError: If operations have no rule.
        """
        # copies, because the model may change its input in place
        copies = tuple(tensor.detach().clone() for tensor in inputs)
        is_live = [tensor.is_floating_point() or tensor.is_complex() for tensor in copies]
        self.tape.inputs = tuple(
            self._born(tensor, 1) if live else None for tensor, live in zip(copies, is_live, strict=True)
        )
        kept = tuple(self._memory.keep(tensor) for tensor, live in zip(copies, is_live, strict=True) if live)
        self.tapped[None] = Tapped(tuple(v for v in self.tape.inputs if v is not None), kept, is_tuple=True, bit=1)
        sites = self._sites if self._stop_at in (None, *self._sites) else (*self._sites, self._stop_at)
        for tensor in tensors_in(additional):
            self._sight.made(tensor, "")
        with (
            _everything_in_sight(),
            self._sight.watching(),
            torch.set_grad_enabled(self._differentiable),
            self.places.watched([site for site in sites if site is not None], self._at_site),
        ):
            with self:
                try:
                    output = self.forward_func(*copies, *additional)
                except StopRun as stop:
                    (output,) = stop.args
                if select is not None and not self._unsupported:
                    output = select(output)
            # while what the run made can still be told from what was there before
            values = {id(tensor): self.value_of(tensor) for tensor in tensors_in(output)}
        self.raise_unsupported()
        with unrecorded():
            for one in self._unverified:
                verify(*one)
        self.tape.output = output
        self.tape.output_values = {key: value for key, value in values.items() if value is not None}
        return output

    def raise_unsupported(self) -> None:
        """Raise for all operations without a rule that were seen, and for what was not seen.

        Raises:
            UnsupportedOperationError: If there were any.
        """
        if self._unsupported or self._sight.hidden:
            raise UnsupportedOperationError(list(self._unsupported), list(self._sight.hidden))

    def value_of(self, tensor: Tensor) -> Value | None:
        """Return the value of a tensor; None if it is not live."""
        known = self._values.get(id(tensor))
        # the entry of a tensor that is gone may stand where another one is now
        if known is not None and known[0]() is not tensor:
            known = None
        if self._memory.changed:
            memory = self._memory.changed.get(tensor.untyped_storage()._cdata)
            if memory is not None and (known is None or not memory.leaves(tensor, known[2])):
                is_constant = known is None and memory.was_constant and memory.leaves(tensor, 0)
                value = None if is_constant else self._memory.read(tensor, memory)
                if value is None:
                    self._values.pop(id(tensor), None)
                else:
                    self._name(tensor, value)
                return value
        if known is not None:
            return known[1]
        if type(tensor) is not Parameter and not self._sight.knows(tensor):
            return self._meet(tensor)
        return None

    def _is_live(self, tensor: Tensor) -> bool:
        """Return whether a tensor depends on the image, asked from the model's own code."""
        with unrecorded():  # to read changed memory takes operations
            return self.value_of(tensor) is not None

    def _holds_live(self, storage: torch.UntypedStorage) -> bool:
        """Whether memory may hold a live tensor, which may be gone though its memory is not."""
        changed = self._memory.changed.get(storage._cdata)
        return not self._sight.owns(storage._cdata) if changed is None else changed.value is not None

    def _meet(self, tensor: Tensor) -> Value | None:
        """Meet a tensor under a new identity: autograd hands on what it saved as another tensor of the same memory."""
        module = self.places.module
        if tensor.layout is not torch.strided:  # has no memory of its own to share
            self._sight.meet(tensor)
            return None
        if module is not None and any(tensor is buffer for buffer in module._buffers.values()):
            return None
        address = tensor.untyped_storage()._cdata
        for reference, value, _ in list(self._values.values()):
            known = reference()
            if known is not None and known.untyped_storage()._cdata == address:
                value = self._memory.view(known, value, tensor)
                self._name(tensor, value)
                return value
        self._sight.meet(tensor)
        return None

    # -- the mode

    supports_higher_order_operators = True

    def _run_higher_order(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run control flow and the like as the operations that it is made of; what has none cannot be seen."""
        if func is torch.ops.higher_order.cond:
            predicate, *branches, operands = args
            with self:
                return branches[0 if predicate else 1](*operands)
        kernel = func.py_kernels.get(torch._C.DispatchKey.CompositeExplicitAutograd)
        if kernel is None:
            raise self._refused(func.name())
        with self:
            return kernel(*args, **kwargs)

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
        live: list[Tensor] = []
        values: list[Value] = []
        symbols: Any = args
        if operation.lifts:
            self._sight.lift(args[0])
        for position in operation.tensors:
            if position >= len(args):
                break
            found = self._symbol(args[position], live, values)
            if found is not args[position]:
                if symbols is args:
                    symbols = list(args)
                symbols[position] = found
        named = {name: self._symbol(argument, live, values) for name, argument in kwargs.items()} if kwargs else kwargs
        if not values:
            if self._real and self._real.are_in((args, kwargs)):
                return self._round(func, operation, args, kwargs)
            return self._run_constant(func, operation, args, kwargs)
        if operation.rounds:
            return self._round(func, operation, args, kwargs)
        if self._sight.is_suspicious and operation.reads:
            for at in operation.tensors:
                if at < len(args) and at != operation.changes:
                    for tensor in tensors_in(args[at]):
                        if self.value_of(tensor) is None:
                            self._sight.read(tensor)
        if operation.changes is not None and not operation.reads:
            return self._run_constant(func, operation, args, kwargs)
        if operation.rule is None:
            return self._without_rule(func, operation, args, kwargs)
        step = Step(operation.functional, tuple(symbols), named, tuple(values), operation.rule, self.places.module)
        if self._inspect and not isinstance(operation.rule, Linear):
            live = _leave_constants(step, live, operation.changes)
        step.rule = operation.rule.variant(step)
        if operation.changes is None:
            return self._operate(operation, step, args, kwargs, live, func)
        return self._change(func, operation, step, args, kwargs, live)

    def _symbol(self, argument: Any, live: list[Tensor], values: list[Value]) -> Any:
        """Return an argument with values for its live tensors, which are noted; a number may stand for a tensor."""
        if isinstance(argument, Tensor):
            value = self.value_of(argument)
            if value is not None:
                live.append(argument)
                values.append(value)
                return value
        elif type(argument) is list or type(argument) is tuple:
            return type(argument)([self._symbol(item, live, values) for item in argument])
        return argument

    def _operate(
        self,
        operation: Operation,
        step: Step,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        live: list[Tensor],
        run: Callable[..., Any],
    ) -> Any:
        """Run an operation and record it; returns its output."""
        rule = step.rule
        expansion = rule.expansion(step)
        if expansion is not None:
            with self:
                return expansion(*args, **kwargs)
        values = step.values
        sites = values[0].sites
        for value in values[1:]:
            sites |= value.sites
        if self._bypass:
            self._keep_bypass(sites, values, live)
        output = run(*args, **kwargs)
        if isinstance(output, Tensor):
            if output.layout is not torch.strided or output.is_nested:
                raise self._not_dense(operation, output)
            holds_numbers = (output.is_floating_point() or output.is_complex()) and not output.is_meta
            tensors: Sequence[Tensor] = (output,) if holds_numbers else ()
        else:
            tensors = floating(output)[: rule.live_outputs] if rule.live_outputs != 1 else output[:1]
        if operation.is_plain and tensors:
            gate = rule.keeps_gates and step.only_gates()
        else:
            is_constant = not tensors or rule.is_constant(step)  # whole numbers, as a cast makes them, are constants
            if is_constant:
                if operation.name in _BREAKS:
                    self.broken[operation.display, self.places.module_name] = None
                for tensor in tensors_in(output):
                    self._sight.made(tensor, operation.name)
                if operation.name == "_local_scalar_dense":
                    self._sight.leave_one()
                if not self._inspect:
                    return output
            is_frozen = is_constant or not rule.is_affine(step)
            if is_frozen or not operation.is_trusted:
                call = Call(step.operation, args, kwargs, tuple(live), step.values, output)
                if not operation.is_trusted:
                    self._verify_later(operation.display, rule, call)
                if is_frozen:
                    step.state = self._held(rule.held(call, rule.freeze(call)), live, output)
            if is_constant:
                self.tape.steps.append(step)
                return output
            gate = rule.makes_gate(step)
        if operation.reads_memory:
            read = self._memory.strided(live[0], values[0], output)
            if read is not None:
                read.root = values[0].root or (values[0], geometry(live[0]))
                self._name(output, read)
                return output
        clock, number = self._memory.clock, len(self.tape.steps)
        made = []
        if not isinstance(output, Tensor):
            for tensor in output[len(tensors) :]:
                if isinstance(tensor, Tensor) and tensor.numel():
                    self._sight.made(tensor, "")
        for tensor in tensors:
            value = Value(tensor, gate, sites)
            self._values[id(tensor)] = weakref.ref(tensor), value, clock
            value.step = number
            if operation.is_view:
                value.root = values[0].root or (values[0], geometry(live[0]))
            made.append(value)
        if operation.name in _PROBABILITIES:
            made[0].probability = True
        step.outputs = tuple(made)
        self.tape.steps.append(step)
        return output

    def _round(self, func: Any, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation on quantized tensors, or one that rounds, and record the plain one and the rounding."""
        rule, where = operation.rule, operation.changes
        body = rule.body if isinstance(rule, Rounded) else operation.functional
        if not operation.rounds and not self._real.allow(rule, args):
            if not operation.reads:
                return self._run_constant(func, operation, args, kwargs)
            raise self._refused(f"quantized {operation.display}")
        output = self._run_constant(func, operation, args, kwargs)
        parts = output if isinstance(output, (tuple, list)) else (output,)
        if not any(isinstance(part, Tensor) for part in parts):
            return output  # a scale, a type
        changed = None if where is None or isinstance(rule, Rounded) else args[where]
        real, named = self._real.instead(args), self._real.instead(kwargs)
        for tensor in (*real[1], *named[1]):
            self._sight.made(tensor, "")
        try:
            with self:
                plain = body(*real[0], **named[0])
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):  # there is none
            plain = None
        plains = list(plain) if isinstance(plain, (tuple, list)) else [plain]
        if plain is None or (changed is not None and self._real.share_memory(changed)):
            raise self._refused(operation.display)
        mask = parts[1] if len(parts) > len(plains) and parts[1].dtype is torch.bool else None
        for rounded, numbers in zip(parts, plains, strict=False):
            if not rounded.is_quantized and not rounded.is_floating_point():
                self._real.stand(rounded, numbers)
                continue
            kept, constant = rounding(numbers, rounded, mask)
            for tensor in tensors_in((kept, constant)):
                self._sight.made(tensor, "")
            with self:
                exact = numbers if kept is None else numbers * kept
                exact = exact if constant is None else exact + constant
            value = self.value_of(exact)
            if rounded.is_quantized:
                self._real.stand(rounded, exact)
            elif value is not None:
                self._name(rounded, value)
        return output

    def _change(
        self,
        func: Any,
        operation: Operation,
        step: Step,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        live: list[Tensor],
    ) -> Any:
        """Run and record an operation that changes an argument in place."""
        where: Any = operation.changes
        target: Tensor = args[where]
        if operation.changes_shape:  # not what its memory holds: it becomes what is a view of it now
            with self:
                view = operation.functional(*args, **kwargs)
            func(*args, **kwargs)
            value = self.value_of(view)
            if value is not None:
                self._name(target, value)
            return target
        if overlaps(geometry(target)):
            raise ValueError(
                f"elements that change in place must lie apart in memory, got a tensor of shape {tuple(target.shape)} "
                f"and strides {target.stride()} in {operation.display}_. Change a copy of it: x.clone()."
            )
        self._sight.written(target)
        known = self.value_of(target)
        if known is None:
            self._release_constants(target, step)
        elif self._memory.held_constants(target):
            self._release_constants(target)
        before = self._memory.whole_before(target, known)
        count = len(self.tape.steps)
        kinds = {tensor.dtype for tensor in (target, *floating(args))}  # of several, the widest is cast afterwards
        fits = len(kinds) == 1 or isinstance(step.rule, Copy)
        if step.rule.in_place and operation.is_trusted and fits:

            def in_place(*args: Any, **kwargs: Any) -> Any:
                self._memory.about_to_change(target)
                return func(*args, **kwargs)

            self._operate(operation, step, args, kwargs, live, in_place)
        else:
            if step.values:
                if known is None:  # a rule may come back to what the constant was
                    args = (*args[:where], step.args[where], *args[where + 1 :])
                    self._sight.made(step.args[where], "")
                output = self._operate(operation, step, args, kwargs, live, step.operation)
            else:
                output = step.operation(*args, **kwargs)
            if not fits and output.dtype != target.dtype:
                with self:
                    output = output.to(target.dtype)
            if target.shape != output.shape:  # as few operations do, unasked
                raise ValueError(
                    f"a tensor must keep its shape when it changes in place, got {tuple(target.shape)} that becomes "
                    f"{tuple(output.shape)} in {operation.display}_. Use torch.{operation.display}(...)."
                )
            self._memory.about_to_change(target)
            target.copy_(output)
        made = self.tape.steps[-1].outputs if len(self.tape.steps) > count else ()
        value = made[0] if made else None
        self._memory.now_holds(target, value, before)
        if value is None:
            self._values.pop(id(target), None)
            self._sight.made(target, "")
        else:
            self._name(target, value)
        return target

    def _into(self, func: Any, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation that is given tensors for what it returns: what it would return is copied there."""
        arguments = tensors_in((args, kwargs))
        if not self._real.are_in(arguments) and all(self.value_of(tensor) is None for tensor in arguments):
            return self._run_constant(func, operation, args, kwargs)
        if operation.functional is None:
            raise self._refused(operation.display)
        given = tensors_in([kwargs[name] for name in operation.outs])
        rest = {name: argument for name, argument in kwargs.items() if name not in operation.outs}
        with self:
            made = tensors_in(operation.functional(*args, **rest))
            for target, output in zip(given, made, strict=True):
                if target.shape != output.shape:
                    target.resize_(output.shape)
                target.copy_(output)
        return given[0] if len(given) == 1 else tuple(given)

    def _run_constant(self, func: Any, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation as it is that makes constants, be it in the memory of live tensors."""
        if operation.hides_scales:  # integers of the image: rounded, so frozen, but the scales beside them are not
            self._unsupported[f"quantized {operation.name}", self.places.module_name] = None
        where = operation.changes
        written = tensors_in([kwargs[name] for name in operation.outs] if where is None else args[where])
        before = []
        for tensor in written:
            value = self.value_of(tensor)
            if value is not None or self._memory.holds_live(tensor):
                before.append((tensor, self._memory.whole_before(tensor, value)))
            self._release_constants(tensor)
            self._memory.about_to_change(tensor)
            self._sight.written(tensor)
        if self._sight.is_suspicious and operation.reads:
            for tensor in tensors_in([args[at] for at in operation.tensors if at < len(args) and at != where]):
                self._sight.read(tensor)
        output = func(*args, **kwargs)
        for tensor, content in before:
            self._memory.now_holds(tensor, None, content)
            self._values.pop(id(tensor), None)
            self._sight.made(tensor, "")
        if operation.name == "set":
            self._sight.placed(args[0])
        if not written or not isinstance(output, Tensor):  # beside what it changes it may return something new
            for tensor in (output,) if isinstance(output, Tensor) else tensors_in(output):
                self._sight.made(tensor, operation.name)
        return output

    def _release_constants(self, target: Tensor, changing: Step | None = None) -> None:
        """Copy a constant that steps refer to, and the one that is about to change it."""
        address = target.untyped_storage()._cdata
        for step in self.tape.steps[self._indexed :]:
            for tensor in tensors_in((step.args, step.kwargs)):
                if tensor.layout is torch.strided:
                    self._readers.setdefault(tensor.untyped_storage()._cdata, []).append(step)
        self._indexed = len(self.tape.steps)
        changing_too = [changing] if changing is not None and not isinstance(changing.rule, Copy) else []
        for step in (*self._readers.pop(address, ()), *changing_too):
            step.args = tuple(_copied(argument, address) for argument in step.args)
            step.kwargs = {name: _copied(argument, address) for name, argument in step.kwargs.items()}

    def _without_rule(self, func: Any, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation that has no rule: as what it is made of, or so that all of them can be named at the end."""
        with self:
            made = func.decompose(*args, **kwargs)
        if made is not NotImplemented:
            return made
        self._unsupported[operation.display, self.places.module_name] = None
        output = func(*args, **kwargs)
        for tensor in floating(output):
            if tensor.layout is not torch.strided or tensor.is_nested:
                raise self._not_dense(operation, tensor)
            self._name(tensor, Value(tensor, sites=1))
        return output

    def _refused(self, name: str) -> UnsupportedOperationError:
        """Return the error that names an operation after which a run cannot go on, and those before it."""
        self._unsupported[name, self.places.module_name] = None
        return UnsupportedOperationError(list(self._unsupported), list(self._sight.hidden))

    def _not_dense(self, operation: Operation, tensor: Tensor) -> TypeError:
        kind = "a nested tensor" if tensor.is_nested else f"one of layout {tensor.layout}"
        module = self.places.module_name
        return TypeError(
            f"every tensor on the way from the image to the score must be dense, got {kind} from {operation.display}"
            f"{f' in {module!r}' if module else ''}. Compute this with dense tensors (nested ones padded, and masked)."
        )

    # -- values

    def _born(self, tensor: Tensor, sites: int) -> Value:
        value = Value(tensor, False, sites)
        self._name(tensor, value)
        return value

    def _name(self, tensor: Tensor, value: Value) -> None:
        self._values[id(tensor)] = weakref.ref(tensor), value, self._memory.clock

    def _record(self, operation: Any, args: tuple[Any, ...], tensors: Sequence[Tensor], like: Tensor) -> Value:
        """Record a step that the model did not take: a read of changed memory, or its new value."""
        pairs = [pair for pair in zip(args, tensors, strict=False) if isinstance(pair[0], Value)]
        values = tuple(value for value, _ in pairs)
        sites = 0
        for value in values:
            sites |= value.sites
        if self._bypass:
            self._keep_bypass(sites, values, [tensor.clone() for _, tensor in pairs])
        made = Value(like, all(value.gate for value in values), sites)
        made.step = len(self.tape.steps)
        step = Step(operation, args, {}, values, self._rules[operation.overloadpacket.__name__], self.places.module)
        step.outputs = (made,)
        self.tape.steps.append(step)
        return made

    def _held(self, state: Any, live: list[Tensor], output: Any) -> Any:
        """Return the state, with a hold on each tensor in it that shares memory with what the model may change."""
        if isinstance(state, Tensor):
            return self._held_one(state, live, output)
        if type(state) is tuple:
            return tuple(self._held_one(one, live, output) if isinstance(one, Tensor) else one for one in state)
        return state

    def _held_one(self, tensor: Tensor, live: list[Tensor], output: Any) -> Any:
        if tensor.dtype is torch.bool or tensor.dtype is torch.uint8:
            return tensor
        address = tensor.untyped_storage()._cdata
        shared = any(one.untyped_storage()._cdata == address for one in (*live, *tensors_in(output)))
        return self._memory.keep(tensor) if shared else tensor

    def _keep_bypass(self, sites: int, values: Sequence[Value], live: list[Tensor]) -> None:
        for value, tensor in zip(values, live, strict=True):
            if value.sites != sites and value.kept is None:
                value.kept = self._memory.keep(tensor)

    # -- sites

    def _at_site(self, site: Site, passing: Any) -> Any:
        if site in self._sites:
            passing = self._tap(site, passing)
        if self._stop_at == site:
            raise StopRun(passing)
        return passing

    def _tap(self, site: Site, passing: Any) -> Any:
        """Begin new values here, so that what bypasses the layer is not taken for its output."""
        self._bits <<= 1
        values: list[Value] = []
        kept: list[Kept] = []
        taps: dict[int, Tensor] = {}

        def tapped(tensor: Tensor) -> Tensor:
            numbers = self._real.of(tensor)
            if numbers is None:
                return begun(tensor)
            with unrecorded():
                again = tensor.clone()
            self._real.stand(again, begun(numbers))
            return again

        # not one function that calls itself: it would hold itself, and the tensors, until the collector comes
        def begun(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            if id(tensor) not in taps:
                passed = aten.alias.default(tensor)
                value = self.value_of(passed)
                if value is None:  # a layer that does not depend on the image
                    value = self._born(passed, 0)
                    self._memory.born(passed)
                    value.kept = self._memory.keep(passed)
                value.sites |= self._bits
                self._memory.begins(value)
                taps[id(tensor)] = passed
                values.append(value)
                if not self._inspect:
                    kept.append(self._memory.keep(passed))
            return taps[id(tensor)]

        passing = substituted(passing, tapped)
        several = None if site[1] else passing
        is_tuple = len(several) > 1 if isinstance(several, (tuple, list)) else len(values) > 1
        self.tapped[site] = Tapped(tuple(values), tuple(kept), is_tuple=is_tuple, bit=self._bits)
        return passing

    # -- rules of the user's

    def _verify_later(self, name: str, rule: Rule, call: Call) -> None:
        """Note a call of a user's rule: below autograd, where calls arrive, a rule cannot use autograd."""
        copy = call.filled([tensor.clone() for tensor in call.live])
        copy.output = substituted(call.output, torch.clone)
        self._unverified.append((
            f"rule for {name!r} ({type(rule).__name__}), in module {self.places.module_name!r},",
            rule,
            copy,
        ))


def _leave_constants(step: Step, live: list[Tensor], changes: int | None) -> list[Tensor]:
    """Leave to a step, of its live arguments, those that depend on the image, if any do.

    A layer that does not depend on it, such as one that makes another's weight, gives a constant like any other.

    Returns:
        The tensors of those that are left.
    """
    depends = [bool(value.sites & 1) for value in step.values]
    changed = None if changes is None else step.args[changes]
    if all(depends) or not any(depends) or any(changed is one and not one.sites & 1 for one in step.values):
        return live
    each: Any = zip(step.values, live, depends, strict=True)
    filled = step.filled([value if is_live else tensor for value, tensor, is_live in each])
    step.args, step.kwargs = filled.args, filled.kwargs
    step.live = step.values = tuple(compress(step.values, depends))
    return list(compress(live, depends))


def _lies_at(tensor: Tensor, address: int) -> bool:
    return bool(tensor.untyped_storage()._cdata == address)


def _copied(argument: Any, address: int) -> Any:
    """Return an argument with copies of its tensors that lie in some memory."""
    if isinstance(argument, Tensor) and argument.layout is torch.strided and _lies_at(argument, address):
        return argument.clone()
    if type(argument) is list or type(argument) is tuple:
        return type(argument)(_copied(item, address) for item in argument)
    return argument


@contextmanager
def _everything_in_sight() -> Any:
    """Whole-module kernels off, and compiled code run as it was written; both as before afterwards."""
    with ExitStack() as stack:
        stack.enter_context(module_by_module())
        torch.clear_autocast_cache()  # of parameters that an earlier call cast, where none of the run's operations did
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
