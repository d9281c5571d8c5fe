"""What a run must know of an ATen operation: its rule, and what its schema says of memory."""

from collections.abc import Mapping
from typing import Any

import torch

from captum_scoremap.rules import DEFAULT, Copy, Linear, Rounded, Rule, display_name
from captum_scoremap.rules.table import in_table

__all__ = ["OPERATIONS", "Operation"]

# An argument that a kernel fills for its backward pass.
_SCRATCH = "noise"

# Views that their schema does not tell of.
_VIEWS = {"unsafe_split", "unsafe_split_with_sizes", "_unsafe_view"}


class Operation:
    """An ATen overload, and what its schema and the table of rules say of it."""

    def __init__(self, operation: Any, rules: Mapping[str, Rule]) -> None:
        name, overload = operation.overloadpacket.__name__, operation._overloadname
        self.overload = operation  # held, so that its identity stays its own
        arguments = operation._schema.arguments
        # positions of arguments that may be tensors
        self.tensors = [at for at, one in enumerate(arguments) if "Tensor" in str(one.type) and one.name != _SCRATCH]
        # names of the arguments that it is given for what it returns, ``out=``
        self.outs = [one.name for one in arguments if one.kwarg_only and _is_written(one)]
        changed = [position for position, one in enumerate(arguments) if not one.kwarg_only and _is_written(one)]
        # positions of all arguments that it changes in place
        self.writes = changed
        # position of the argument that it changes in place; its shape alone, not what its memory holds
        self.changes: int | None = changed[0] if changed else None
        self.changes_shape = torch.Tag.inplace_view in operation.tags
        # its out-of-place form; itself where it changes nothing, None where there is none
        self.functional = operation
        if changed or self.outs:
            name, self.functional = _out_of_place(operation, name, overload)
        name = in_table(operation.namespace, name)
        # its name in the table of rules, without the overload, and what errors call it
        self.name = name
        self.display: str = name if "::" in name else display_name(self.functional or operation)
        # whether it returns memory of its argument
        self.is_view = name in _VIEWS or any(
            one.alias_info is not None and not one.alias_info.is_write for one in operation._schema.returns
        )
        # whether it makes a tensor of Python's or NumPy's numbers
        self.lifts = name in {"lift", "lift_fresh"}
        # whether it multiplies integers that stand for real numbers by scales that it does not know
        self.hides_scales = name == "_int_mm"
        # its rule; None where it has none, or changes what no rule can say
        overload = self.functional._overloadname if self.functional is not None else overload
        self.rule: Rule | None = rules.get(f"{name}.{overload}", rules.get(name))
        if self.rule is None:
            # as errors call it; a copy of a view is that view, and shares no memory
            aliases: tuple[str, ...] = (self.display,) if self.display not in DEFAULT else ()
            is_copy = name.endswith("_copy") and operation.namespace == "aten"
            aliases += (name.removesuffix("_copy"),) if is_copy else ()
            self.rule = next((rules[alias] for alias in aliases if alias in rules), None)
        # whether it reads the numbers of its arguments, or what lies around its argument in memory
        self.reads = not self.is_view and (self.rule is None or self.rule.reads)
        self.reads_memory = name == "as_strided"
        # whether it rounds, so that the plain operation and the rounding are recorded apart
        self.rounds = isinstance(self.rule, Rounded)
        if ((self.functional is None or len(changed) > 1) and not self.rounds) or (name, overload) == ("view", "dtype"):
            self.rule = None
        # whether its rule is ours; whether it is affine whatever its arguments, so that nothing needs to be asked
        self.is_trusted = self.rule is DEFAULT.get(f"{name}.{overload}", DEFAULT.get(name))
        self.is_plain = self.is_trusted and isinstance(self.rule, Linear) and not isinstance(self.rule, Copy)


def _out_of_place(operation: Any, name: str, overload: str) -> tuple[str, Any]:
    """Return the operation that returns what this one leaves in its argument; None where there is none."""
    packet = operation.overloadpacket
    if name.endswith("_"):
        name = name[:-1]
        packet = getattr(getattr(torch.ops, operation.namespace), name, None)
    elif overload.endswith("out"):
        overload = overload.removesuffix("out").removesuffix("_") or "default"
    if packet is None:
        return name, None
    types, names = _arguments(operation)
    # an overload of TorchScript's numbers may go by the name
    for candidate in (overload, *packet.overloads()):
        functional = getattr(packet, candidate, None)
        if functional is None or any(map(_is_written, functional._schema.arguments)):
            continue
        own_types, own_names = _arguments(functional)
        if own_types == types and names <= own_names:
            return name, functional
    return name, None


def _arguments(operation: Any) -> tuple[list[str], set[str]]:
    """Return the types of an operation's arguments, and the names of those that have no position but ``out=``."""
    arguments = operation._schema.arguments
    types = [str(argument.type) for argument in arguments if not argument.kwarg_only]
    return types, {argument.name for argument in arguments if argument.kwarg_only and not _is_written(argument)}


def _is_written(argument: Any) -> bool:
    return bool(argument.alias_info is not None and argument.alias_info.is_write and argument.name != _SCRATCH)


# By the identity of the overload, under the default rules, for all runs.
OPERATIONS: dict[int, Operation] = {}
