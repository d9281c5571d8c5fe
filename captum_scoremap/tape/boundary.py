"""How far the linear region reaches in a direction: the first step at which a switch flips."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_scoremap.rules import Value

from .steps import Step, Tape, given_or_kept

__all__ = ["Boundary", "nearest_boundary"]


@dataclass(frozen=True)
class Boundary:
    """Where a ray from the image leaves its linear region.

    Attributes:
        distance: Step along the direction, (N,), in units of the direction; infinite if no switch ever flips.
        switch: Name of the switch that flips there, for each image, the first of several at once; "" if none does.

    Example:
        >>> from captum_scoremap import freeze
        >>> frozen = freeze(torch.nn.ReLU(), torch.tensor([[2.0, 3.0]]))
        >>> frozen.distance_to_boundary(torch.tensor([[-1.0, -1.0]])).distance
        tensor([2.])
    """

    distance: Tensor
    switch: tuple[str, ...]


def nearest_boundary(
    tape: Tape, names: dict[Step, str], inputs: tuple[Tensor, ...], direction: tuple[Tensor, ...]
) -> Boundary:
    """Return the nearest boundary for each image, moved alone, so that whatever flips is due to that one."""
    distances: list[float] = []
    switches: list[str] = []
    # switches at one distance flip in the order of the steps, whatever rounding made of the distances
    closer = 1 - 1e3 * torch.finfo(inputs[0].dtype).eps
    for image in range(inputs[0].shape[0]):
        alone = []
        for change in direction:
            moved = torch.zeros_like(change)
            moved[image] = change[image]
            alone.append(moved)
        nearest, switch = float("inf"), ""
        for step, steps in _crossings(tape, inputs, tuple(alone)):
            ahead = steps[torch.isfinite(steps) & (steps > 0)]
            if ahead.numel() and float(ahead.min()) < nearest * closer:
                nearest, switch = float(ahead.min()), names[step]
        distances.append(nearest)
        switches.append(switch)
    return Boundary(torch.tensor(distances, dtype=inputs[0].dtype, device=inputs[0].device), tuple(switches))


def _crossings(tape: Tape, inputs: tuple[Tensor, ...], direction: tuple[Tensor, ...]) -> Iterator[tuple[Step, Tensor]]:
    """For each step with switches, the steps along the direction at which they flip."""
    values: dict[Value, Tensor] = {}
    changes: dict[Value, Tensor] = {}
    for value, tensor, change in zip(tape.inputs, inputs, direction, strict=True):
        if value is not None:
            values[value], changes[value] = tensor, change
    for step in tape.steps:
        now = [given_or_kept(v, values) for v in step.values]
        speed = [changes[v] if v in changes else v.zeros() for v in step.values]
        found = step.rule.steps_to_boundary(step.filled(now), speed, step.frozen())
        if found is not None:
            yield step, found
        if step.outputs:
            rest = step.forward([v.zeros() for v in step.values])
            values.update(zip(step.outputs, step.forward(now), strict=True))
            moved = step.forward(speed)
            changes.update((v, m - r) for v, m, r in zip(step.outputs, moved, rest, strict=True))
