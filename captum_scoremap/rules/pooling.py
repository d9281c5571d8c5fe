"""Maxima over windows and over dimensions: the position each one took, its switch, is frozen."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .rule import Call, Rule

__all__ = ["Extremum", "MaxPool"]


class MaxPool(Rule):
    """Max-pooling over windows, fixed or adaptive: gather from the frozen positions.

    Args:
        dimensions: How many trailing dimensions a window spans.
        adaptive: Whether the windows follow from the output size.
        returns_switches: Whether the operation returns the positions too.

    Example:
        >>> from captum_scoremap import freeze
        >>> frozen = freeze(torch.nn.MaxPool1d(2), torch.tensor([[[1.0, 3.0, 2.0, 0.0]]]))
        >>> frozen(torch.tensor([[[9.0, 5.0, 6.0, 9.0]]]))
        tensor([[[5., 6.]]])
    """

    kind = "switch"
    native = True
    lean = True

    def __init__(self, dimensions: int, *, adaptive: bool = False, returns_switches: bool = False) -> None:
        self.dimensions = dimensions
        self.adaptive = adaptive
        self.returns_switches = returns_switches

    def freeze(self, call: Call) -> Tensor:
        """Flat position of each window's maximum in the input's trailing dimensions."""
        return self._pool(call)[1]

    def record(self, call: Call, run: Callable[[], Any]) -> tuple[Any, Tensor]:
        """Pool once for both."""
        output, switches = self._pool(call)
        return ((output, switches) if self._wants_switches(call) else output), switches

    def apply(self, call: Call, state: Tensor) -> Any:
        """The values at the frozen positions."""
        spatial = -self.dimensions
        output = call.input.flatten(spatial).gather(-1, state.flatten(spatial)).unflatten(-1, state.shape[spatial:])
        return (output, state) if self._wants_switches(call) else output

    def switch(self, state: Tensor) -> Tensor:
        """The positions."""
        return state

    def steps_to_boundary(self, call: Call, tangent: Callable[[Tensor], Tensor], state: Tensor) -> Tensor:
        """Step at which some other position of a window overtakes the frozen one.

        Returns:
            (members of a window, ..., windows).
        """
        spatial = -self.dimensions
        x, change = call.input.flatten(spatial), tangent(call.input).flatten(spatial)
        winner, speed = x.gather(-1, state.flatten(spatial)), change.gather(-1, state.flatten(spatial))
        members, valid = self._members(call, state)
        steps = []
        for index, inside in zip(members, valid, strict=True):
            where = index.expand_as(winner)
            step = (winner - x.gather(-1, where)) / (change.gather(-1, where) - speed)
            steps.append(torch.where(inside & (where != state.flatten(spatial)), step, torch.inf))
        return torch.stack(steps)

    def _pool(self, call: Call) -> tuple[Tensor, Tensor]:
        kind = "adaptive_max_pool" if self.adaptive else "max_pool"
        pool: Callable[..., tuple[Tensor, Tensor]] = getattr(F, f"{kind}{self.dimensions}d_with_indices")
        return pool(*call.args, **{k: v for k, v in call.kwargs.items() if k != "return_indices"})

    def _wants_switches(self, call: Call) -> bool:
        return self.returns_switches or bool(call.kwargs.get("return_indices", False))

    def _members(self, call: Call, state: Tensor) -> tuple[Tensor, Tensor]:
        """For each window its member positions, (members, windows), and which of them exist."""
        shape = call.input.shape[-self.dimensions :]
        axes = self._windows(call, tuple(shape), tuple(state.shape[-self.dimensions :]))
        index = torch.zeros((1, 1), dtype=torch.long)
        valid = torch.ones((1, 1), dtype=torch.bool)
        for (positions, inside), size in zip(axes, shape, strict=True):
            # (members, windows) of the axes so far, combined with those of this axis
            index = (index[:, None, :, None] * size + positions[None, :, None, :]).flatten(2).flatten(0, 1)
            valid = (valid[:, None, :, None] & inside[None, :, None, :]).flatten(2).flatten(0, 1)
        return index.to(call.input.device), valid.to(call.input.device)

    def _windows(self, call: Call, shape: tuple[int, ...], out: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
        """Per axis the positions (members, windows) and whether they lie inside."""

        def fixed(
            input: Tensor,
            kernel_size: Any,
            stride: Any = None,
            padding: Any = 0,
            dilation: Any = 1,
            ceil_mode: bool = False,
            return_indices: bool = False,
        ) -> list[tuple[Tensor, Tensor]]:
            rows = []
            for axis in range(self.dimensions):
                k, s = (
                    _axis(kernel_size, axis),
                    _axis(stride if stride not in (None, ()) else kernel_size, axis),
                )
                p, d = _axis(padding, axis), _axis(dilation, axis)
                position = torch.arange(out[axis]) * s - p + (torch.arange(k) * d)[:, None]
                inside = (position >= 0) & (position < shape[axis])
                rows.append((position.clamp(0, shape[axis] - 1), inside))
            return rows

        def adaptive(input: Tensor, output_size: Any, return_indices: bool = False) -> list[tuple[Tensor, Tensor]]:
            rows = []
            for axis, size in enumerate(shape):
                first = torch.arange(out[axis]) * size // out[axis]
                last = -(-(torch.arange(out[axis]) + 1) * size // out[axis])
                position = first + torch.arange(int((last - first).max()))[:, None]
                rows.append((position.clamp(max=size - 1), position < last))
            return rows

        return (adaptive if self.adaptive else fixed)(*call.args, **call.kwargs)


class Extremum(Rule):
    """The maximum or minimum over a dimension, or over all, with its position frozen.

    Args:
        position: ``torch.argmax`` or ``torch.argmin``.
        with_position: Whether the operation returns the position too when given a dimension (max), or not (amax).

    Example:
        >>> from captum_scoremap import freeze
        >>> frozen = freeze(lambda x: x.amax(1), torch.tensor([[1.0, 3.0, 2.0]]))
        >>> frozen(torch.tensor([[7.0, 5.0, 6.0]]))
        tensor([5.])
    """

    kind = "switch"

    def __init__(self, position: Callable[..., Tensor], *, with_position: bool) -> None:
        self.position = position
        self.with_position = with_position

    def freeze(self, call: Call) -> Tensor:
        """The position in the dimensions that are reduced, flattened into one; one entry per output element."""
        return self.position(self._flat(call), dim=-1, keepdim=True)

    def apply(self, call: Call, state: Tensor) -> Any:
        """The values at the frozen positions."""
        value = self._shaped(call, self._flat(call).gather(-1, state))
        if self.with_position and self._dims(call) is not None:
            return_type = getattr(torch.return_types, "max" if self.position is torch.argmax else "min")
            return return_type((value, self._shaped(call, state)))
        return value

    def switch(self, state: Tensor) -> Tensor:
        """The positions."""
        return state

    def steps_to_boundary(self, call: Call, tangent: Callable[[Tensor], Tensor], state: Tensor) -> Tensor:
        """Step at which another position reaches the frozen one."""
        x = self._flat(call)
        change = self._flat(call, tangent(call.input))
        steps = (x.gather(-1, state) - x) / (change - change.gather(-1, state))
        return steps.scatter(-1, state, torch.inf)

    def _dims(self, call: Call) -> Any:
        return self._arguments(call)[0]

    @staticmethod
    def _arguments(call: Call) -> tuple[Any, bool]:
        def arguments(input: Tensor, dim: Any = None, keepdim: bool = False, axis: Any = None) -> tuple[Any, bool]:
            return (dim if dim is not None else axis), keepdim

        return arguments(*call.args, **call.kwargs)

    def _reduced(self, call: Call) -> list[int]:
        dims, rank = self._dims(call), call.input.dim()
        chosen = range(rank) if dims is None or dims == () else (dims if isinstance(dims, (tuple, list)) else (dims,))
        return sorted(d % rank for d in chosen)

    def _flat(self, call: Call, tensor: Tensor | None = None) -> Tensor:
        """The reduced dimensions flattened and moved last."""
        x = call.input if tensor is None else tensor
        reduced = self._reduced(call)
        kept = [d for d in range(x.dim()) if d not in reduced]
        return x.permute(*kept, *reduced).flatten(len(kept))

    def _shaped(self, call: Call, value: Tensor) -> Tensor:
        _, keepdim = self._arguments(call)
        value = value.squeeze(-1)
        if keepdim and self._dims(call) is not None:
            for d in self._reduced(call):
                value = value.unsqueeze(d)
        return value


def _axis(value: Any, axis: int) -> int:
    if isinstance(value, (tuple, list)):
        return int(value[axis] if len(value) > 1 else value[0])
    return int(value)
