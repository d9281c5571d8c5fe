"""Maxima over windows and over dimensions: the position each one took, its switch, is frozen."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_scoremap.speed import faster

from .affine import reduced
from .call import Call
from .rule import Frozen, Gradients, Linear, Rule, until_they_meet
from .tangent import Tangent

__all__ = ["Extremum", "MaxPool", "Ordered", "Position", "Scattered"]


class MaxPool(Rule):
    """Max-pooling over windows, fixed or adaptive: gather from the frozen positions, which the operation returns too.

    Equation:
        y[p] = x[j̄(p)], with j̄(p) the position of the maximum of window p

    Args:
        dimensions: How many trailing dimensions a window spans.
        adaptive: Whether the windows follow from the output size.

    Example:
        >>> from captum_scoremap import freeze
        >>> frozen = freeze(torch.nn.MaxPool1d(2), torch.tensor([[[1.0, 3.0, 2.0, 0.0]]]))
        >>> frozen(torch.tensor([[[9.0, 5.0, 6.0, 9.0]]]))
        tensor([[[5., 6.]]])
    """

    kind = "switch"
    homogeneous = True
    live_outputs = 1

    def __init__(self, dimensions: int, *, adaptive: bool = False) -> None:
        self.dimensions = dimensions
        self.adaptive = adaptive

    def freeze(self, call: Call) -> Tensor:
        """Return the flat position of each window's maximum."""
        positions: Tensor = call.output[1]
        return positions

    def packed(self, call: Call, state: Tensor) -> Any:
        """Return the positions, or where each is within its window."""
        return pack_positions(state, lambda: self._windows_begin(call, state))

    def _windows_begin(self, call: Call, state: Tensor) -> tuple[Tensor, int]:
        """Return the flat position at which each window begins, and the largest that one holds beyond that."""
        members, _ = self._members(call, state)
        return members[0].reshape(state.shape[-self.dimensions :]), int((members[-1] - members[0]).max())

    def apply(self, call: Call, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values at the frozen positions, and the positions."""
        spatial = -self.dimensions
        values = call.input.flatten(spatial).gather(-1, state.flatten(spatial))
        return values.unflatten(-1, state.shape[spatial:]), state

    def transpose(self, call: Call, state: Tensor, gradients: Gradients) -> Sequence[Tensor | None]:
        """Add the coefficients to the positions they were taken from."""
        if self.dimensions != 2 or self.adaptive:
            return super().transpose(call, state, gradients)
        backward = torch.ops.aten.max_pool2d_with_indices_backward
        return [backward(gradients[0], call.values[0].empty(), *map(call.argument, _WINDOWS), state)]

    def steps_to_boundary(self, call: Call, changes: Sequence[Tensor], state: Tensor) -> Tensor:
        """Return the step at which some other position of a window overtakes the frozen one.

        Returns:
            (members of a window, ..., windows).
        """
        spatial = -self.dimensions
        x, change = call.input.flatten(spatial), changes[0].flatten(spatial)
        winner, speed = x.gather(-1, state.flatten(spatial)), change.gather(-1, state.flatten(spatial))
        members, valid = self._members(call, state)
        steps = []
        for index, inside in zip(members, valid, strict=True):
            where = index.expand_as(winner)
            step = until_they_meet(winner, speed, x.gather(-1, where), change.gather(-1, where))
            steps.append(torch.where(inside & (where != state.flatten(spatial)), step, torch.inf))
        return torch.stack(steps)

    def _members(self, call: Call, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return for each window its member positions, (members, windows), and which of them exist."""
        shape = call.input.shape[-self.dimensions :]
        out = tuple(state.shape[-self.dimensions :])
        axes = _adaptive_windows(tuple(shape), out) if self.adaptive else self._windows(call, tuple(shape), out)
        index = torch.zeros((1, 1), dtype=torch.long)
        valid = torch.ones((1, 1), dtype=torch.bool)
        for (positions, inside), size in zip(axes, shape, strict=True):
            # (members, windows) of the axes so far, combined with those of this axis
            index = (index[:, None, :, None] * size + positions[None, :, None, :]).flatten(2).flatten(0, 1)
            valid = (valid[:, None, :, None] & inside[None, :, None, :]).flatten(2).flatten(0, 1)
        return index.to(call.input.device), valid.to(call.input.device)

    def _windows(self, call: Call, shape: tuple[int, ...], out: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
        """Return per axis the positions (members, windows) and whether they lie inside."""
        kernel, stride, padding, dilation, _ = map(call.argument, _WINDOWS)
        rows = []
        for axis in range(self.dimensions):
            # one number for each axis, or one for all
            k, s, p, d = (sizes[axis % len(sizes)] for sizes in (kernel, stride or kernel, padding, dilation))
            position = torch.arange(out[axis]) * s - p + (torch.arange(k) * d)[:, None]
            inside = (position >= 0) & (position < shape[axis])
            rows.append((position.clamp(0, shape[axis] - 1), inside))
        return rows


@faster
def pack_positions(positions: Tensor, windows: Callable[[], tuple[Tensor, int]]) -> Any:
    """Return positions of maxima as they are to be held, given where their windows begin and how far they reach."""
    return positions


_WINDOWS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")


def _adaptive_windows(shape: tuple[int, ...], out: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    rows = []
    for axis, size in enumerate(shape):
        first = torch.arange(out[axis]) * size // out[axis]
        last = -(-(torch.arange(out[axis]) + 1) * size // out[axis])
        position = first + torch.arange(int((last - first).max()))[:, None]
        rows.append((position.clamp(max=size - 1), position < last))
    return rows


class Extremum(Rule):
    """The maximum or minimum over a dimension, or over all, with its position frozen.

    Equation:
        y = x[j̄], with j̄ = argmax x̄, or argmin x̄

    Args:
        position: ``torch.argmax`` or ``torch.argmin``.

    Example:
        >>> from captum_scoremap import freeze
        >>> frozen = freeze(lambda x: x.amax(1), torch.tensor([[1.0, 3.0, 2.0]]))
        >>> frozen(torch.tensor([[7.0, 5.0, 6.0]]))
        tensor([5.])
    """

    kind = "switch"
    homogeneous = True

    def __init__(self, position: Callable[..., Tensor]) -> None:
        self.position = position

    def freeze(self, call: Call) -> Tensor:
        """Return the position in the dimensions that are reduced, flattened into one; one entry for each output."""
        return self.position(self._flat(call, call.input), dim=-1, keepdim=True)

    def apply(self, call: Call, state: Tensor) -> Any:
        """Return the values at the frozen positions, and those positions where the operation returns them."""
        value = self._shaped(call, self._flat(call, call.input).gather(-1, state))
        if len(call.operation._schema.returns) > 1:  # type: ignore[attr-defined]
            return value, self._shaped(call, state)
        return value

    def steps_to_boundary(self, call: Call, changes: Sequence[Tensor], state: Tensor) -> Tensor:
        """Return the step at which another position reaches the frozen one."""
        x, change = self._flat(call, call.input), self._flat(call, changes[0])
        steps = until_they_meet(x.gather(-1, state), change.gather(-1, state), x, change)
        return steps.scatter(-1, state, torch.inf)

    @staticmethod
    def _reduced(call: Call) -> list[int]:
        dims, rank = reduced(call), call.input.ndim
        return list(range(rank)) if dims is None or not rank else sorted(d % rank for d in dims)

    def _flat(self, call: Call, x: Tensor) -> Tensor:
        """Return the reduced dimensions flattened and moved last."""
        reduced = self._reduced(call)
        kept = [d for d in range(x.dim()) if d not in reduced]
        return x.permute([*kept, *reduced]).flatten(len(kept))

    def _shaped(self, call: Call, value: Tensor) -> Tensor:
        value = value.squeeze(-1)
        if call.argument("keepdim"):
            for d in self._reduced(call):
                value = value.unsqueeze(d)
        return value


class Ordered(Rule):
    """``sort``, ``topk``, ``median``, ``kthvalue``: values gathered along a dimension from frozen positions.

    Equation:
        y[i] = x[j̄(i)], with j̄ the positions that the operation returns at the image
    """

    kind = "switch"
    homogeneous = True
    live_outputs = 1

    def freeze(self, call: Call) -> Tensor:
        """Return the positions that the operation returns."""
        return call.output[1]  # type: ignore[no-any-return]

    def apply(self, call: Call, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values at the frozen positions, and the positions."""
        dim = call.argument("dim")
        if call.input.dim() and state.dim() < call.input.dim():
            return call.input.gather(dim, state.unsqueeze(dim)).squeeze(dim), state
        return call.input.gather(dim, state), state

    def steps_to_boundary(self, call: Call, changes: Sequence[Tensor], state: Tensor) -> Tensor | None:
        """Return the steps at which elements meet whose order decides which positions are taken.

        Of sorted values neighbors meet, of a running extremum what comes next, of all others what was not taken and the
        last one that was. What ``mode`` takes, and in which order ``topk`` without ``sorted``, no order decides: None.
        """
        name, x, change = call.operation.overloadpacket.__name__, call.input, changes[0]  # type: ignore[attr-defined]
        is_in_order = name != "topk" or call.argument("sorted") or call.argument("k") < 2
        if name == "mode" or not is_in_order:
            return None
        if not state.numel() or not x.dim():
            return torch.full((1,), torch.inf, device=x.device)
        dim = call.argument("dim")
        if state.dim() < x.dim():
            state = state.unsqueeze(dim)
        taken, speed = x.gather(dim, state), change.gather(dim, state)
        count, length = state.shape[dim], x.shape[dim]
        if name in {"cummax", "cummin"}:
            before = taken.narrow(dim, 0, length - 1), speed.narrow(dim, 0, length - 1)
            return until_they_meet(*before, x.narrow(dim, 1, length - 1), change.narrow(dim, 1, length - 1))
        left, right = ((taken.narrow(dim, at, count - 1), speed.narrow(dim, at, count - 1)) for at in (0, 1))
        neighbors = until_they_meet(*left, *right)
        if name == "sort":
            return neighbors
        others = until_they_meet(taken.narrow(dim, count - 1, 1), speed.narrow(dim, count - 1, 1), x, change)
        return torch.cat([neighbors, others.scatter(dim, state, torch.inf)], dim)


class Position(Frozen):
    """``argmax`` and ``argmin``: the position of an extremum, which another element takes where it reaches that.

    Equation:
        y = j̄, with j̄ = argmax x̄, or argmin x̄
    """

    def steps_to_boundary(self, call: Call, changes: Sequence[Tensor], state: Tensor) -> Tensor:
        """Return the step at which another element reaches the one at the frozen position."""
        x, change, dim = call.input, changes[0], call.argument("dim")
        if dim is None or not x.dim():
            x, change, state, dim = x.flatten(), change.flatten(), state.flatten(), 0
        elif not call.argument("keepdim"):
            state = state.unsqueeze(dim)
        steps = until_they_meet(x.gather(dim, state), change.gather(dim, state), x, change)
        return steps.scatter(dim, state, torch.inf)


class Scattered(Tangent):
    """Several values into one place: sums and means are linear; extrema and products go by their tangent.

    Equation:
        y = f(x̄) + f′(x̄) (x - x̄), which for a sum or a mean is f(x).

    Example:
        >>> from captum_scoremap import freeze
        >>> largest = lambda x: torch.zeros(1, 1).scatter_reduce(1, torch.tensor([[0, 0]]), x, "amax")
        >>> freeze(largest, torch.tensor([[1.0, 2.0]]))(torch.tensor([[9.0, 3.0]]))
        tensor([[3.]])
    """

    def variant(self, call: Call) -> Rule:
        """Return a linear rule for sums and means."""
        names = {argument for argument in call.args if isinstance(argument, str)}
        return self if names.isdisjoint({"sum", "mean"}) else Linear()
