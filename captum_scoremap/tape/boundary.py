"""How far the linear region reaches in a direction: the first step at which a switch flips."""

from collections.abc import Iterator, Sequence
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
        distance: Step along the direction, (N,), in units of the direction; infinite if no switch ever flips, and 0 if
            the image lies on a boundary and one flips at once.
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
        for step, first in _crossings(tape, inputs, tuple(alone)):
            if first < nearest * closer:
                nearest, switch = first, names[step]
        distances.append(nearest)
        switches.append(switch)
    return Boundary(torch.tensor(distances, dtype=inputs[0].dtype, device=inputs[0].device), tuple(switches))


def _crossings(tape: Tape, inputs: tuple[Tensor, ...], direction: tuple[Tensor, ...]) -> Iterator[tuple[Step, float]]:
    """For each step with switches, the first step along the direction at which one flips."""
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
            ahead = found[torch.isfinite(found) & (found > 0)]
            first = float(ahead.min()) if ahead.numel() else float("inf")
            yield step, 0.0 if bool((found == 0).any()) and _flips_before(step, now, speed, first) else first
        if step.outputs:
            values.update(zip(step.outputs, step.forward(now), strict=True))
            changes.update(zip(step.outputs, step.linear(speed), strict=True))


def _flips_before(step: Step, now: Sequence[Tensor], speed: Sequence[Tensor], first: float) -> bool:
    """Return whether a switch on its boundary, where either side may be the one that it is on, flips at once."""
    reach = min(first / 2, 1.0)
    call = step.filled([one + reach * change for one, change in zip(now, speed, strict=True)])
    call.output = call.run()
    before, after = (step.rule.switch(state) for state in (step.frozen(), step.rule.freeze(call)))
    return before is not None and after is not None and bool((before != after).any())
