"""Operations that change memory: in place, be it of live tensors or of constants that steps refer to."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from captum_scoremap.rules import Call, Copy, Value, floating, tensors_in

from .geometry import are_alike, overlaps, share
from .operation import Operation
from .run import Run
from .steps import Step
from .writing import write

__all__ = ["change", "check_apart", "read_constants", "run_constant"]


# What copies memory, whatever it holds, to memory of its own.
_COPIES = {"_to_copy", "clone"}


def change(run: Run, func: Any, operation: Operation, call: Call, step: Step) -> Any:
    """Run and record an operation that changes an argument in place."""
    where: Any = operation.changes
    target: Tensor = call.args[where]
    if operation.changes_shape:  # not what its memory holds: it becomes what is a view of it now
        view = run.recorded(operation.functional, *call.args, **call.kwargs)
        run.memory.release_constants(target)  # steps that refer to it want it in its old shape
        run.memory.about_to_change(target)
        func(*call.args, **call.kwargs)
        value = run.value_of(view)
        if value is not None:
            run.name(target, value)
        return target
    if overlaps(target):
        raise run.modules.refuse(
            ValueError(
                f"elements that change in place must lie apart in memory, got a tensor of shape {tuple(target.shape)} "
                f"and strides {target.stride()} in {operation.display}_. Change a copy of it: x.clone()."
            )
        )
    run.sight.written(target)
    known = run.value_of(target)
    # a layer's constants, too, may be taken for what they are
    if known is None or not known.sites & Value.IMAGE or run.memory.held_constants(target):
        run.memory.release_constants(target, step)
    before = run.memory.whole_before(target, known)
    count = len(run.tape.steps)
    kinds = {tensor.dtype for tensor in (target, *floating(call.args))}  # of several, the widest is cast afterwards
    fits = len(kinds) == 1 or isinstance(step.rule, Copy)
    if step.rule.in_place and operation.is_trusted and fits:

        def in_place(*args: Any, **kwargs: Any) -> Any:
            run.memory.about_to_change(target)
            return func(*args, **kwargs)

        write(run, operation, call, step, in_place)
    else:
        is_constant = isinstance(step.args[where], Tensor)
        if is_constant:  # a rule may come back to what it was
            call.args = (*call.args[:where], step.args[where], *call.args[where + 1 :])
            run.made(step.args[where])
        output = write(run, operation, call, step, step.operation)
        if not fits and output.dtype != target.dtype:
            output = run.recorded(output.to, target.dtype)
        if target.shape != output.shape:  # as few operations do, unasked
            raise run.modules.refuse(
                ValueError(
                    f"a tensor must keep its shape when it changes in place, got {tuple(target.shape)} that becomes "
                    f"{tuple(output.shape)} in {operation.display}_. Use torch.{operation.display}(...)."
                )
            )
        if is_constant:  # to which the steps of a composite refer
            run.memory.release_constants(target)
        run.memory.about_to_change(target)
        target.copy_(output)
    made = run.tape.steps[-1].outputs if len(run.tape.steps) > count else ()
    value = made[0] if made else None
    run.memory.now_holds(target, value, before)
    if value is None:
        run.made(target)
        run.made_frozen(target, operation)
    else:
        run.name(target, value)
    return target


# What makes elements of others than those in their places.
_MIXES = set(
    """
    mm bmm mv addmm addmv addbmm baddbmm addr masked_scatter scatter scatter_add scatter_reduce index_add index_copy
    index_reduce index_put put
    """.split()
)
# What reads a single number once, before it writes.
_READS_ONCE = {"fill", "masked_fill", "index_fill"}


def check_apart(run: Run, operation: Operation, targets: Sequence[Any], arguments: Sequence[Tensor]) -> None:
    """Refuse to write to memory that is read at other elements, of which the kernel may have written some before."""
    for target in tensors_in(targets):
        given = [one for one in arguments if one is target]
        for other in [*(one for one in arguments if one is not target), *given[1:]]:
            if operation.name in _READS_ONCE and not other.dim():
                continue
            is_in_place = operation.name not in _MIXES and are_alike(target, other)
            if not is_in_place and share(target, other):  # which takes longer to tell
                raise run.modules.refuse(
                    ValueError(
                        f"what changes in place must not be read from the same memory at other elements, got such a "
                        f"tensor of shape {tuple(other.shape)} in {operation.display}: the result depends on the order "
                        "in which PyTorch happens to write them. Read a copy: x.clone()."
                    )
                )


def run_constant(run: Run, func: Any, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation as it is that makes constants, be it in the memory of live tensors."""
    if operation.hides_scales:  # integers of the image: rounded, so frozen, but the scales beside them are not
        run.sight.lack_rule(f"quantized {operation.name}")
    written = tensors_in([
        *(args[at] for at in operation.writes if at < len(args)),
        *(kwargs[name] for name in operation.outs),
    ])
    before = []
    for tensor in written:
        value = run.value_of(tensor)
        if value is not None or run.memory.holds_live(tensor):
            before.append((tensor, run.memory.whole_before(tensor, value)))
        run.memory.release_constants(tensor)
        run.memory.about_to_change(tensor)
        run.sight.written(tensor)
    copies = bool(run.sight.bare) and operation.name in _COPIES
    if not copies:
        read_constants(run, operation, args)
    is_frozen = run.has_frozen((args, kwargs))
    output = func(*args, **kwargs)
    if operation.overload.namespace != "aten":  # of which PyTorch counts what they are made of, too
        run.count_changes(written, more=1)
    for tensor, content in before:
        run.memory.now_holds(tensor, None, content)
        run.made(tensor)
    if operation.name == "set":
        run.forget(args[0])  # what it holds now may be live
        run.sight.placed(args[0])
    for tensor in (output,) if isinstance(output, Tensor) else tensors_in(output):
        if not any(tensor is one for one in written):  # beside what it changes it may return something new
            run.made(tensor, operation.name)
    if copies and isinstance(output, Tensor):
        run.sight.copied(output, args[0])
    if operation.reads_memory and run.memory.holds_live(args[0]):  # it may reach what is live
        run.forget(output)
    if is_frozen:
        run.made_frozen(output, operation)
    return output


def read_constants(run: Run, operation: Operation, args: tuple[Any, ...]) -> None:
    """Look at the constants that an operation reads, where something unseen may have filled one's memory."""
    if run.sight.bare and operation.reads:
        for at in operation.tensors:
            if at < len(args) and at not in operation.writes:
                for tensor in tensors_in(args[at]):
                    if run.value_of(tensor) is None:
                        run.sight.read(tensor)
