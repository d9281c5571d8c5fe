"""Operations that change memory: in place, be it of live tensors or of constants that steps refer to."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_scoremap.rules import Call, Copy, floating, tensors_in

from .geometry import overlaps
from .live import Live
from .memory import Memory
from .operation import Operation
from .sight import Sight
from .steps import Step, Tape
from .writing import Writer

__all__ = ["Changes"]


class Changes:
    """Runs what changes memory, and keeps the tape right."""

    def __init__(
        self, tape: Tape, live: Live, memory: Memory, sight: Sight, writer: Writer, recorded: Callable[..., Any]
    ) -> None:
        self._tape, self._live, self._memory, self._sight = tape, live, memory, sight
        self._writer, self._recorded = writer, recorded
        self._readers: dict[int, list[Step]] = {}  # steps by the memory of constants among their arguments
        self._indexed = 0  # how many of the steps are in there

    def change(self, func: Any, operation: Operation, call: Call, step: Step) -> Any:
        """Run and record an operation that changes an argument in place."""
        where: Any = operation.changes
        target: Tensor = call.args[where]
        if operation.changes_shape:  # not what its memory holds: it becomes what is a view of it now
            view = self._recorded(operation.functional, *call.args, **call.kwargs)
            func(*call.args, **call.kwargs)
            value = self._live.value_of(view)
            if value is not None:
                self._live.name(target, value)
            return target
        if overlaps(target):
            raise ValueError(
                f"elements that change in place must lie apart in memory, got a tensor of shape {tuple(target.shape)} "
                f"and strides {target.stride()} in {operation.display}_. Change a copy of it: x.clone()."
            )
        self._sight.written(target)
        known = self._live.value_of(target)
        if known is None:
            self._release_constants(target, step)
        elif self._memory.held_constants(target):
            self._release_constants(target)
        before = self._memory.whole_before(target, known)
        count = len(self._tape.steps)
        kinds = {tensor.dtype for tensor in (target, *floating(call.args))}  # of several, the widest is cast afterwards
        fits = len(kinds) == 1 or isinstance(step.rule, Copy)
        if step.rule.in_place and operation.is_trusted and fits:

            def in_place(*args: Any, **kwargs: Any) -> Any:
                self._memory.about_to_change(target)
                return func(*args, **kwargs)

            self._writer.write(operation, call, step, in_place)
        else:
            if step.values:
                if known is None:  # a rule may come back to what the constant was
                    call.args = (*call.args[:where], step.args[where], *call.args[where + 1 :])
                    self._sight.made(step.args[where])
                output = self._writer.write(operation, call, step, step.operation)
            else:
                output = call.run()
            if not fits and output.dtype != target.dtype:
                output = self._recorded(output.to, target.dtype)
            if target.shape != output.shape:  # as few operations do, unasked
                raise ValueError(
                    f"a tensor must keep its shape when it changes in place, got {tuple(target.shape)} that becomes "
                    f"{tuple(output.shape)} in {operation.display}_. Use torch.{operation.display}(...)."
                )
            self._memory.about_to_change(target)
            target.copy_(output)
        made = self._tape.steps[-1].outputs if len(self._tape.steps) > count else ()
        value = made[0] if made else None
        self._memory.now_holds(target, value, before)
        if value is None:
            self._live.forget(target)
            self._sight.made(target)
        else:
            self._live.name(target, value)
        return target

    def run_constant(self, func: Any, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation as it is that makes constants, be it in the memory of live tensors."""
        if operation.hides_scales:  # integers of the image: rounded, so frozen, but the scales beside them are not
            self._sight.lack_rule(f"quantized {operation.name}")
        where = operation.changes
        written = tensors_in([kwargs[name] for name in operation.outs] if where is None else args[where])
        before = []
        for tensor in written:
            value = self._live.value_of(tensor)
            if value is not None or self._memory.holds_live(tensor):
                before.append((tensor, self._memory.whole_before(tensor, value)))
            self._release_constants(tensor)
            self._memory.about_to_change(tensor)
            self._sight.written(tensor)
        self.read_constants(operation, args)
        output = func(*args, **kwargs)
        for tensor, content in before:
            self._memory.now_holds(tensor, None, content)
            self._live.forget(tensor)
            self._sight.made(tensor)
        if operation.name == "set":
            self._sight.placed(args[0])
        if not written or not isinstance(output, Tensor):  # beside what it changes it may return something new
            for tensor in (output,) if isinstance(output, Tensor) else tensors_in(output):
                self._sight.made(tensor, operation.name)
        return output

    def read_constants(self, operation: Operation, args: tuple[Any, ...]) -> None:
        """Look at the constants that an operation reads, where something unseen may have filled one's memory."""
        if self._sight.bare and operation.reads:
            for at in operation.tensors:
                if at < len(args) and at != operation.changes:
                    for tensor in tensors_in(args[at]):
                        if self._live.value_of(tensor) is None:
                            self._sight.read(tensor)

    def _release_constants(self, target: Tensor, changing: Step | None = None) -> None:
        """Copy a constant that steps refer to, and the one that is about to change it."""
        address = target.untyped_storage()._cdata
        for step in self._tape.steps[self._indexed :]:
            for tensor in tensors_in((step.args, step.kwargs)):
                if tensor.layout is torch.strided:
                    self._readers.setdefault(tensor.untyped_storage()._cdata, []).append(step)
        self._indexed = len(self._tape.steps)
        changing_too = [changing] if changing is not None and not isinstance(changing.rule, Copy) else []
        for step in (*self._readers.pop(address, ()), *changing_too):
            step.args = tuple(_copied(argument, address) for argument in step.args)
            step.kwargs = {name: _copied(argument, address) for name, argument in step.kwargs.items()}


def _copied(argument: Any, address: int) -> Any:
    """Return an argument with copies of its tensors that lie in some memory."""
    if isinstance(argument, Tensor) and argument.layout is torch.strided:
        return argument.clone() if argument.untyped_storage()._cdata == address else argument
    if type(argument) is list or type(argument) is tuple:
        return type(argument)(_copied(item, address) for item in argument)
    return argument
