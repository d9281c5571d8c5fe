"""Operations that move elements: parts of a tensor, views by strides, new values for some elements, copies."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .call import Call
from .coefficients import cast
from .rule import Gradients, Linear

__all__ = [
    "Copy",
    "Placing",
    "Split",
    "cast_back",
    "cloned",
    "joined",
    "parted",
    "reshaped",
    "scattered",
    "strided",
    "viewed",
]


class Split(Linear):
    """One tensor into several: the coefficients of the parts, side by side, with zeros for parts nobody reads.

    Equation:
        y_i = x[range i]
    """

    def transpose(self, call: Call, state: None, gradients: Gradients) -> Sequence[Tensor | None]:
        """Put the parts together."""
        parts: Any = gradients
        if any(part is None for part in parts):
            zeros = call.filled([call.values[0].zeros()]).run()
            parts = [zero if part is None else part for part, zero in zip(parts, zeros, strict=True)]
        unbinds = call.operation.overloadpacket.__name__.startswith("unbind")  # type: ignore[attr-defined]
        return [(torch.stack if unbinds else torch.cat)(parts, call.argument("dim"))]


def reshaped(call: Call, gradient: Tensor) -> list[Tensor]:
    """Return the transpose of every change of shape."""
    return [gradient.reshape(call.values[0].shape)]


def viewed(call: Call) -> Tensor:
    """View a tensor in another shape; copy it where it does not lie in memory as at the image."""
    output: Tensor = call.input.reshape(call.args[1])
    return output


def cast_back(call: Call, gradient: Tensor) -> list[Tensor]:
    """Return the transpose of every copy, maybe of another type or in another order in memory."""
    return [cast(gradient, call.values[0])]


def cloned(call: Call) -> Any:
    """Copy; several at once, as ``vmap`` has them, in any order, since a format is one of four dimensions."""
    if call.operation is torch.ops.aten.detach.default:  # which would keep gradients from the frozen model
        return call.input.view_as(call.input)
    if torch._C._functorch.peek_interpreter_stack() is None or "memory_format" not in call.kwargs:
        return call.run()
    kwargs = {name: argument for name, argument in call.kwargs.items() if name != "memory_format"}
    return call.operation(*call.args, **kwargs)


def joined(call: Call) -> Tensor:
    """Make complex numbers of pairs, wherever these lie in memory: PyTorch's view wants them side by side."""
    return torch.complex(*call.input.unbind(-1))


def parted(call: Call) -> Tensor:
    """Make pairs of complex numbers: as a view, a conjugate by mark alone has none."""
    return torch.stack((call.input.real, call.input.imag), -1)


class Copy(Linear):
    """``copy(self, source)``, what ``self.copy_(source)`` leaves: only the source counts.

    Equation:
        y = source

    Args:
        keeps_gates: Whether the output is a gate where the source is.

    Example:
        >>> from captum_scoremap import freeze
        >>> freeze(lambda x: torch.zeros(1, 2).copy_(x), torch.ones(1, 2))(torch.tensor([[3.0, 4.0]]))
        tensor([[3., 4.]])
    """

    def __init__(self, *, keeps_gates: bool = False) -> None:
        super().__init__(keeps_gates=keeps_gates)

    def is_constant(self, call: Call) -> bool:
        """Return whether the source is not live."""
        return not call.is_live(call.args[1])

    def apply(self, call: Call, state: None) -> Tensor:
        """Return the source, in the shape and type of what it is copied to."""
        target, source = call.args[:2]
        output: Tensor = source.to(target.dtype).expand(target.shape)
        return output


class Placing(Linear):
    """New values for some elements of a tensor. Where several go to one place the last of them counts.

    PyTorch's own backward pass counts all of them, so which one it was is found by placing numbers instead.

    Equation:
        y[j] = source[i], with i the last of those that go to j, else x[j]

    Args:
        source: Position of the new values among the arguments; the first where they are placed among zeros.

    Example:
        >>> from captum_scoremap import linear_form
        >>> place = lambda x: torch.zeros(1, 2).index_copy(1, torch.tensor([1, 1]), x).sum(1)
        >>> linear_form(place, torch.tensor([[3.0, 5.0]])).coefficients
        tensor([[0., 1.]])
    """

    def __init__(self, source: int) -> None:
        super().__init__()
        self.source = source

    def apply(self, call: Call, state: None) -> Any:
        """Run the operation; where gradients are taken, as for the transpose, as a gather of what stays."""
        source, args = call.args[self.source], list(call.args)
        if not torch.is_grad_enabled() or _adds(call) or not isinstance(source, Tensor):
            return call.run()
        # the number of the new value that stays at each place, counted from 1; 0 where there is none
        numbers = torch.arange(1.0, source.numel() + 1, dtype=torch.float64, device=call.values[0].device)
        args[self.source] = numbers.reshape(source.shape)
        if self.source:
            args[0] = torch.zeros(call.args[0].shape, dtype=numbers.dtype, device=numbers.device)
        placed = call.operation(*args, **call.kwargs).long()
        stays = torch.cat((source.new_zeros(1), source.reshape(-1)))[placed]
        return torch.where(placed == 0, call.args[0], stays) if self.source else stays


def _adds(call: Call) -> bool:
    """Return whether new values are added to what is there."""
    return any(argument is True for argument in (*call.args, *call.kwargs.values()))


def strided(call: Call) -> Tensor:
    """Gather what a view by strides shows of a tensor, which may lie in memory in any order."""
    value = call.values[0]
    places = _places(value.device, value.shape, value.stride)
    length = 1 + sum((size - 1) * step for size, step in zip(value.shape, value.stride, strict=True))
    memory = torch.zeros(max(length, 0), dtype=places.dtype, device=value.device)
    memory = memory.index_copy(0, places, torch.arange(value.shape.numel(), device=value.device))
    elements = memory.index_select(0, _places(value.device, *call.args[1:]))
    output: Tensor = call.input.reshape(-1).index_select(0, elements).reshape(call.args[1])
    return output


def scattered(call: Call) -> Tensor:
    """Put new values where a view by strides of a row of elements lies."""
    row, source, *geometry = call.args
    positions = _places(row.device, *geometry)
    output: Tensor = row.reshape(-1).index_copy(0, positions, source.reshape(-1).to(row.dtype)).reshape(row.shape)
    return output


def _places(device: torch.device, size: Sequence[int], stride: Sequence[int], offset: int | None = None) -> Tensor:
    """Return where in memory the elements of a view by strides lie, in their order.

    Axes that lie in memory as one are taken as one: what is contiguous is counted, not put together axis by axis.
    """
    axes: list[tuple[int, int]] = []
    for length, step in zip(size, stride, strict=True):
        if axes and axes[-1][1] == length * step:
            axes[-1] = axes[-1][0] * length, step
        elif length != 1:
            axes.append((length, step))
    found, *others = [torch.arange(length, device=device) * step for length, step in axes or [(1, 1)]]
    for row in others:
        found = (found[:, None] + row).reshape(-1)
    return found + offset if offset else found
