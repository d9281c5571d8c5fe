"""Max-plus algebra in place of a network's numbers: tensors that know their reach, and the operations on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["NOTHING", "POINTWISE", "RULES", "VIEW", "EndlessReach", "NoRuleError", "Operation", "Reach", "Rule"]

NOTHING = -math.inf  # the last row of what depends on no row

# What stands in for an operation, by its name without "aten::".
RULES: dict[str, Rule] = {}
VIEW, POINTWISE = "<view>", "<element-wise>"  # of those that have no rule by name


class NoRuleError(Exception):
    """An operation for which there is no rule."""


class Reach(Tensor):
    """A tensor of the network of which only the reach is known: the last row each element can depend on.

    ``reach`` has the shape of the tensor, with the four images of `_coordinates` along N. It is minus
    infinity where an element depends on no pixel, as in the padding. Tensors of other classes (weights,
    constants) depend on none. The ``dtype`` is the one that the network would compute in.
    """

    reach: Tensor

    @staticmethod
    def __new__(cls, reach: Tensor, dtype: torch.dtype) -> Reach:
        """A tensor without values."""
        made: Reach = torch.Tensor._make_wrapper_subclass(
            cls, reach.shape, strides=reach.stride(), dtype=dtype, device=reach.device
        )
        made.reach = reach
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Apply the rule of an operation instead of the operation."""
        operation = Operation(cls, func, args, kwargs or {})
        result = operation.rule(operation)
        if operation.in_place:
            args[0].reach.copy_(result)
            return args[0]
        if func.is_view:
            return tree_map(partial(cls, dtype=operation.dtype), result)
        made = cls(result.contiguous(), operation.dtype)
        outputs = len(func._schema.returns)
        return made if outputs == 1 else (made,) * outputs

    @staticmethod
    def pad(reach: Tensor, pads: Sequence[tuple[int, int]]) -> Tensor:
        """Add (before, after) elements that depend on no pixel to each of the last axes; crop if negative."""
        return F.pad(reach, [length for pair in reversed(pads) for length in pair], value=NOTHING)


class EndlessReach(Reach):
    """The same in an image that goes on beyond its border: rows and columns are counted on in the padding."""

    @staticmethod
    def pad(reach: Tensor, pads: Sequence[tuple[int, int]]) -> Tensor:
        """Continue rows and columns by the step between the two outermost ones."""
        crops = [(min(before, 0), min(after, 0)) for before, after in pads[-2:]]
        reach = Reach.pad(reach, [*pads[:-2], *crops])
        for axis, (before, after) in zip((-2, -1)[-len(pads) :], pads[-2:], strict=True):
            parts = [reach]
            if before > 0:
                parts.insert(0, _continued(reach.flip(axis), axis, before).flip(axis))
            if after > 0:
                parts.append(_continued(reach, axis, after))
            reach = torch.cat(parts, axis) if len(parts) > 1 else reach
        return reach


def _continued(reach: Tensor, axis: int, count: int) -> Tensor:
    """Return the next rows (columns) of the arithmetic progression that the last two begin."""
    edge, inner = reach.narrow(axis, -1, 1), reach.narrow(axis, -min(2, reach.shape[axis]), 1)
    steps = torch.arange(1.0, count + 1, device=reach.device).view(-1, *[1] * (-1 - axis))
    return (edge + steps * (edge - inner)).nan_to_num(nan=NOTHING, posinf=math.inf, neginf=NOTHING)


class Operation:
    """A call of a PyTorch operation, its arguments by name, with the reach in place of tensors."""

    def __init__(self, kind: type[Reach], func: Any, args: Any, kwargs: Any) -> None:
        self.kind, self.func, self.args, self.kwargs = kind, func, args, kwargs
        parameters = func._schema.arguments
        self.given = {parameter.name: value for parameter, value in zip(parameters, args, strict=False)} | kwargs
        self.in_place = parameters[0].alias_info is not None and parameters[0].alias_info.is_write

    def __getitem__(self, name: str) -> Any:
        value = self.given[name]
        return value.reach if isinstance(value, Reach) else value

    def get(self, name: str, default: Any = None) -> Any:
        """Return an argument, or the default where it is left out, None or empty."""
        return self[name] if self.given.get(name) not in (None, []) else default

    @property
    def dtype(self) -> torch.dtype:
        """Number type of the output: the one asked for, or that of the image."""
        leaves = tree_leaves((self.args, self.kwargs))
        return self.get("dtype") or next(leaf.dtype for leaf in leaves if isinstance(leaf, Reach))

    @property
    def rule(self) -> Rule:
        """What stands in for the operation: by name; else views move, and element by element is a maximum."""
        name = self.func._schema.name.removeprefix("aten::")
        if self.in_place and not isinstance(self.args[0], Reach):
            raise NoRuleError(f"{name} of a constant")
        name = name.removesuffix("_") if self.in_place else name
        if name in RULES:
            return RULES[name]
        if self.func.is_view:
            return RULES[VIEW]
        if torch.Tag.pointwise in self.func.tags:
            return RULES[POINTWISE]
        raise NoRuleError(name)

    @cached_property
    def shape(self) -> torch.Size:
        """Shape of the first output."""

        def blank(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            dtype = torch.float if value.is_floating_point() else value.dtype
            return torch.empty(value.shape, dtype=dtype, device="meta")

        output = self.func(*tree_map(blank, self.args), **tree_map(blank, self.kwargs))
        return torch.Size(output.shape if isinstance(output, Tensor) else output[0].shape)


Rule = Callable[[Operation], Any]
