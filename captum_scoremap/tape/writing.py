"""One operation becomes one step: it runs, its rule freezes, and what it made is named."""

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from captum_scoremap.rules import Call, Composite, Linear, Rule, Tangent, Value, floating, substituted, tensors_in
from captum_scoremap.rules.quantized import EIGHT_BITS

from .geometry import geometry
from .module_tracker import Refused
from .operation import Operation
from .run import Run
from .steps import Step

__all__ = ["not_dense", "not_to_change", "step_of", "write"]


def step_of(run: Run, operation: Operation, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
    """Return the step of a call, whose arguments have values for tensors, under its rule; not yet written."""
    rule: Any = operation.rule  # there is one
    step = Step(operation.functional, args, kwargs, call.values, call.values, rule=rule, module=run.modules.current)
    if run.has_constant_layers and len(step.values) > 1 and not isinstance(rule, (Linear, Tangent)):
        _leave_constants(run, step, call)
    try:
        step.rule = rule.variant(step)
    except Exception as error:
        raise run.modules.refuse(error) from None
    return step


def write(run: Run, operation: Operation, call: Call, step: Step, function: Callable[..., Any]) -> Any:
    """Run an operation and write its step; return its output."""
    rule, values = step.rule, step.values
    if isinstance(rule, Composite):
        return run.recorded(rule.body, *call.args, **call.kwargs)
    run.memory.keep_bypass(values, call.live)
    output = call.output = function(*call.args, **call.kwargs)
    tensors = _live_part(run, operation, rule, output)
    if not (operation.is_plain and tensors):
        is_constant = not tensors or rule.is_constant(step)  # whole numbers, as a cast makes them, are constants
        if is_constant:
            _note_constant(run, operation, output)
            if not run.inspect:
                return output
        if not operation.is_trusted:  # held to the operation after the run: down here no rule can use autograd
            where = f"rule for {operation.display!r} ({type(rule).__name__}), in module {run.modules.current_name!r},"
            copies = [tensor.clone() for tensor in call.live], substituted(call.output, torch.clone)
            run.unverified.append((where, step, *copies))
        if is_constant or not rule.is_affine(step):
            try:
                step.state = _kept(run, rule.packed(call, rule.freeze(call)), call)
            except Exception as error:
                raise run.modules.refuse(error) from None
        if is_constant:
            run.tape.steps.append(step)
            return output
    if operation.reads_memory:
        read = run.memory.strided(call.live[0], values[0], output)
        if read is not None:
            read.root = values[0].root or (values[0], geometry(call.live[0]))
            run.name(output, read)
            return output
    if not isinstance(output, Tensor):
        for tensor in output[len(tensors) :]:
            if isinstance(tensor, Tensor) and tensor.numel():
                run.made(tensor)
    for tensor, value in zip(tensors, run.tape.write(step, tensors, gate=rule.makes_gate(step)), strict=True):
        if operation.is_view:
            if run.memory.is_constant(tensor):
                continue
            value.root = values[0].root or (values[0], geometry(call.live[0]))
        run.name(tensor, value)
    return output


def not_dense(run: Run, operation: Operation, tensor: Tensor) -> Refused:
    """Return the error for a nested or sparse tensor."""
    kind = "a nested tensor" if tensor.is_nested else f"one of layout {tensor.layout}"
    module = run.modules.current_name
    return run.modules.refuse(
        TypeError(
            f"every tensor on the way from the image to the score must be dense, got {kind} from {operation.display}"
            f"{f' in {module!r}' if module else ''}. Compute this with dense tensors (nested ones padded, and masked)."
        )
    )


def not_to_change(run: Run, operation: Operation, tensor: Tensor) -> Refused:
    """Return the error for numbers in a few bits that an operation writes where others may read them."""
    module = run.modules.current_name
    return run.modules.refuse(
        TypeError(
            f"numbers in a few bits must be made by a cast, in memory of their own, got {tensor.dtype} from "
            f"{operation.display}{f' in {module!r}' if module else ''}. Compute this with plain numbers, and cast the "
            "whole of it: x.to(dtype)."
        )
    )


def _live_part(run: Run, operation: Operation, rule: Rule, output: Any) -> Sequence[Tensor]:
    """Return the tensors of an output that depend on the image."""
    if isinstance(output, Tensor):
        if output.layout is not torch.strided or output.is_nested:
            raise not_dense(run, operation, output)
        if output.dtype in EIGHT_BITS:
            raise not_to_change(run, operation, output)
        holds_numbers = (output.is_floating_point() or output.is_complex()) and not output.is_meta
        return (output,) if holds_numbers else ()
    found: Sequence[Tensor] = floating(output)[: rule.live_outputs] if rule.live_outputs != 1 else output[:1]
    return found


def _note_constant(run: Run, operation: Operation, output: Any) -> None:
    for tensor in tensors_in(output):
        run.made(tensor, operation.name)
    run.made_frozen(output, operation)
    if operation.name == "_local_scalar_dense":
        run.sight.single_exits += 1


def _kept(run: Run, state: Any, call: Call) -> Any:
    """Return the state, with a hold on each tensor in it that shares memory with what the model may change."""

    def kept(one: Any) -> Any:
        if not isinstance(one, Tensor) or one.dtype is torch.bool or one.dtype is torch.uint8:
            return one
        address = one.untyped_storage()._cdata
        shared = any(other.untyped_storage()._cdata == address for other in (*call.live, *tensors_in(call.output)))
        return run.memory.keep(one) if shared else one

    return tuple(map(kept, state)) if type(state) is tuple else kept(state)


def _leave_constants(run: Run, step: Step, call: Call) -> None:
    """Leave to a step and its call, of their live arguments, those that depend on the image, if any do.

    A layer that does not depend on it, such as one that makes another's weight or encodes a text, gives a constant like
    any other: what is found at the other layers must not depend on whether it is asked for, too.
    """
    depends = [bool(value.sites & Value.IMAGE) for value in step.values]
    if all(depends) or not any(depends) or step.rule.is_affine(step):
        return
    run.leaves_layers = True
    each: Any = zip(step.values, call.live, depends, strict=True)
    filled = step.filled([value if is_live else tensor for value, tensor, is_live in each])
    step.args, step.kwargs = filled.args, filled.kwargs
    step.live = step.values = call.values = tuple(compress(step.values, depends))
    call.live = tuple(compress(call.live, depends))
