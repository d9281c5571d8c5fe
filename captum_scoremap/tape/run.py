"""One run of a model: its tape, and which of its tensors are live, that is depend on the image.

What happens to a run is told by functions, each kind in its own file: operations that become steps (``writing``), that
change memory (``changes``) or round (``quantized``), layers that begin (``taps``), numbers that leave (``exits``).
"""

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from captum_scoremap.checks import has_memory, unrecorded
from captum_scoremap.rules import Frozen, Rule, Value, floating, tensors_in

from .memory import Memory
from .module_tracker import ModuleTracker, Site
from .operation import Operation
from .real_numbers import RealNumbers
from .sight import Sight
from .steps import Step, Tape, Tapped

__all__ = ["Run"]


class Run(TorchDispatchMode):
    """What is known of a run while it goes on; as a mode, what records it.

    Args:
        forward_func: The model, or a function that calls it.
        rules: The table of rules, by name of the ATen operation.
        keep_bypass: Whether to keep what bypasses a site, so that the steps above it alone can be run forward.
        inspect: Whether to record constants too, for their switches, and to leave the sites' tensors alone.
    """

    def __init__(
        self, forward_func: Callable[..., Any], rules: Mapping[str, Rule], *, keep_bypass: bool, inspect: bool
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch has no types there
        self.tape, self.modules = Tape(), ModuleTracker(forward_func)
        self.rules, self.inspect = rules, inspect
        # none of them holds the run, which would wait, with all its tensors, until the collector comes
        self.memory = Memory(self.tape, rules, self.modules, keep_bypass=keep_bypass)
        self.sight = Sight(self.modules)
        self.real = RealNumbers()
        self.bit = Value.FROZEN  # of the last site
        self.has_constant_layers = False  # sites that do not depend on the image
        self.leaves_layers = False  # for constants, those among them that meet what depends on it
        self.has_additional = False  # arguments beside the image, on which such layers may depend
        self.tapped: dict[Site | None, Tapped] = {}  # of the input, None, and of each site that ran
        self.frozen: dict[tuple[str, str], None] = {}  # operations, and their modules, whose values are frozen
        self.unverified: list[tuple[str, Step, list[Tensor], Any]] = []  # steps under rules of the user's
        # and when it became known, by our clock and by how often the tensor had changed
        self._known: dict[int, tuple[weakref.ref[Tensor], Value | None, int, int]] = {}
        self._written: dict[int, int] = {}  # how often tensors have changed, as far as was seen, by their memory
        self._expected: Counter[int] = Counter()  # and how often beside that, as autograd functions say
        self._state_before: dict[int, tuple[Tensor, int]] = {}  # parameters and buffers, and how often they had changed
        self._made_of_image: dict[int, weakref.ref[Tensor]] = {}  # constants, by what was frozen

    def recorded(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function so that its operations are recorded, from within one of them."""
        with self:
            return function(*args, **kwargs)

    def name(self, tensor: Tensor, value: Value) -> None:
        """Note which value a tensor is, from now on."""
        self._known[id(tensor)] = weakref.ref(tensor), value, self.memory.clock, _changes(tensor)

    def made(self, tensor: Tensor, operation: str = "") -> None:
        """Note that a tensor is a constant, from now on, that an operation made."""
        self._known[id(tensor)] = weakref.ref(tensor), None, self.memory.clock, _changes(tensor)
        if operation:
            self.sight.made(tensor, operation)

    def name_alias(self, alias: Tensor, tensor: Tensor) -> None:
        """Note that a tensor is another one of the same memory, as a parameter is that is made of one."""
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # no one tensor
            return
        with unrecorded():
            value = self.value_of(tensor)
            if value is None:
                self.made(alias)
            else:
                self.name(alias, self.memory.view(tensor, value, alias))

    def made_copy(self, copy: object, tensor: Tensor) -> None:
        """Note that a tensor is a copy of a constant, unless it is one of the image, which is met as what it is."""
        is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        if isinstance(copy, Tensor) and not is_wrapped and not self.is_live(tensor):
            self.made(copy)
            self.sight.written(copy)

    def keep_constants(self, tensor: Tensor) -> None:
        """Hold on to what was read of a tensor's memory, before it changes by something else than operations."""
        if has_memory(tensor):
            with unrecorded():
                self.memory.release_constants(tensor)
                self.memory.about_to_change(tensor)

    def made_frozen(self, output: Any, operation: Operation) -> None:
        """Note that constants were made of the image: by what freezes its value, or of what that made."""
        if not (operation.reads or operation.is_view):  # made of a shape and a type
            return
        self._made_of_image |= {id(tensor): weakref.ref(tensor) for tensor in tensors_in(output)}
        is_cast = operation.name == "_to_copy" and not floating(output)  # to whole numbers
        if is_cast or isinstance(operation.rule, Frozen):
            self.frozen[operation.display, self.modules.current_name] = None

    def has_frozen(self, arguments: object) -> bool:
        """Return whether there is a constant among some arguments that was made of the image."""
        if not self._made_of_image:
            return False
        known = ((tensor, self._made_of_image.get(id(tensor))) for tensor in tensors_in(arguments))
        return any(one is not None and one() is tensor and self.value_of(tensor) is None for tensor, one in known)

    def lift(self, tensor: Tensor) -> None:
        """Note that a tensor is made of Python's or NumPy's numbers, unless it is a live one, which stays so."""
        self.sight.lift(tensor)
        reference, value, *_ = self._known.get(id(tensor), (None, None))
        if value is None or reference is None or reference() is not tensor:
            self.made(tensor)

    def forget(self, tensor: Tensor) -> None:
        """Note that it is not known what a tensor is."""
        self._known.pop(id(tensor), None)

    def value_of(self, tensor: Tensor) -> Value | None:
        """Return the value of a tensor; None if it is not live."""
        known = self._known.get(id(tensor))
        # the entry of a tensor that is gone may stand where another one is now
        if known is not None and known[0]() is not tensor:
            known = None
        changes = _changes(tensor)
        _, value, since, before = known or (None, None, 0, self._state_before.get(id(tensor), (tensor, changes))[1])
        if changes > before:
            self._check_changes(tensor, before)
        memory = self.memory.changed.get(tensor.untyped_storage()._cdata) if self.memory.changed else None
        if memory is None:
            if known is None and type(tensor) is Parameter:
                self.sight.state_read.append(tensor)
                return None
            return value if known is not None else self._met(tensor)
        is_known = known is not None or memory.was_constant
        if not (is_known and memory.leaves(tensor, since)):
            value = self.memory.read(tensor, memory, value, since)
            if value is not None:
                self.name(tensor, value)
        return value

    def count_changes(self, arguments: Sequence[Any], more: int = 0) -> None:
        """Note how often tensors have changed, of which a view is made, or will have when an operation is done.

        A view counts as its tensor does, but only from when the operation that makes it is done.
        """
        for tensor in tensors_in(arguments):
            changes = _changes(tensor) + more
            if changes and tensor.layout is torch.strided:
                address = tensor.untyped_storage()._cdata
                self._written[address] = max(self._written.get(address, 0), changes)

    def watch_state(self) -> None:
        """Note how often parameters and buffers have changed before the run: others may change what it has not read."""
        for root in self.modules.roots:
            for module in root.modules():
                state = (*module._parameters.values(), *module._buffers.values())
                self._state_before |= {id(one): (one, _changes(one)) for one in state if one is not None}

    def check_state(self) -> None:
        """Note it where parameters or buffers changed more often than was seen."""
        for tensor, before in self._state_before.values():
            if _changes(tensor) > before:
                self._check_changes(tensor, before)
        self._state_before.clear()

    def expect_change(self, tensors: Sequence[Tensor]) -> None:
        """Note that tensors will count one change more than operations make."""
        for tensor in tensors:
            if has_memory(tensor):
                self.is_live(tensor)  # which checks what changed before
                self._expected[tensor.untyped_storage()._cdata] += 1
                self.count_changes([tensor])

    def _check_changes(self, tensor: Tensor, known: int) -> None:
        """Note it where a tensor changed more often than was seen."""
        if tensor.layout is not torch.strided:
            return
        address = tensor.untyped_storage()._cdata
        if _changes(tensor) > self._written.get(address, known) + self._expected[address]:
            self.sight.hide("what changed a tensor in place (another thread)")

    def symbol(self, argument: Any, live: list[Tensor], values: list[Value]) -> Any:
        """Return an argument with values for its live tensors, which are noted; a number may stand for a tensor."""
        if isinstance(argument, Tensor):
            value = self.value_of(argument)
            if value is not None:
                live.append(argument)
                values.append(value)
                return value
        elif type(argument) is list or type(argument) is tuple:
            return type(argument)([self.symbol(item, live, values) for item in argument])
        return argument

    def is_live(self, tensor: Tensor) -> bool:
        """Return whether a tensor is live, asked from the model's own code."""
        with unrecorded():  # to read changed memory takes operations
            return self.value_of(tensor) is not None

    def may_lie_in(self, storage: torch.UntypedStorage) -> bool:
        """Return whether memory may hold a live tensor, which may be gone though its memory is not."""
        changed = self.memory.changed.get(storage._cdata)
        if changed is not None:
            return changed.value is not None
        constants = [
            one
            for reference, value, *_ in list(self._known.values())
            if value is None and (one := reference()) is not None
        ]
        memory = [one.untyped_storage()._cdata for one in constants if one.layout is torch.strided]
        return storage._cdata not in memory and not self.sight.is_state(storage._cdata)

    def _met(self, tensor: Tensor) -> Value | None:
        """Meet a tensor under a new identity: autograd hands on what it saved as another tensor of the same memory."""
        module = self.modules.current
        for buffer in () if module is None else module._buffers.values():
            if tensor is buffer:
                self.sight.state_read.append(tensor)
                return None
        if tensor.layout is torch.strided:  # else it has no memory of its own to share
            address = tensor.untyped_storage()._cdata
            for reference, value, *_ in reversed(list(self._known.values())):  # the last, behind a layer
                known = reference()
                if value is not None and known is not None and known.untyped_storage()._cdata == address:
                    value = self.memory.view(known, value, tensor)
                    self.name(tensor, value)
                    return value
        self._known[id(tensor)] = weakref.ref(tensor), None, self.memory.clock, _changes(tensor)
        self.sight.meet(tensor)
        return None


def _changes(tensor: Tensor) -> int:
    """Return how often a tensor, or another of its memory, changed in place, as PyTorch counts."""
    try:
        return tensor._version
    except RuntimeError:  # made under torch.inference_mode, where nothing is counted
        return 0
