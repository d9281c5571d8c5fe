"""How far the linear region reaches in a direction: the first step at which a switch flips."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from captum_scoremap.rules import Call, Rule

from .replaying import Replaying

__all__ = ["Boundary", "BoundaryRun"]


@dataclass(frozen=True)
class Boundary:
    """Where a ray from the image leaves its linear region.

    Attributes:
        distance: Step along the direction, (N,), in units of the direction; infinite if no switch ever flips.
        switch: Name of the switch that flips there, for each image; "" if none does.

    Example:
        >>> from captum_scoremap import freeze
        >>> frozen = freeze(torch.nn.ReLU(), torch.tensor([[2.0, 3.0]]))
        >>> frozen.distance_to_boundary(torch.tensor([[-1.0, -1.0]])).distance
        tensor([2.])
    """

    distance: Tensor
    switch: tuple[str, ...]


class BoundaryRun(Replaying):
    """Replays the image and its change per unit step together, as dual numbers, and keeps the nearest crossing."""

    nearest: float = float("inf")
    switch: str = ""

    def apply(self, key: str, rule: Rule, call: Call, state: Any) -> Any:
        """Note the step at which one of the call's switches flips, then go on."""
        steps = rule.steps_to_boundary(call, _tangent, state)
        if steps is not None:
            steps = forward_ad.unpack_dual(steps).primal
            ahead = steps[torch.isfinite(steps) & (steps > 0)]
            if ahead.numel() and float(ahead.min()) < self.nearest:
                self.nearest, self.switch = float(ahead.min()), key
        return super().apply(key, rule, call, state)


def _tangent(tensor: Tensor) -> Tensor:
    tangent = forward_ad.unpack_dual(tensor).tangent
    return torch.zeros_like(tensor) if tangent is None else tangent


def nearest_boundary(
    run: Callable[[], BoundaryRun],
    inputs: tuple[Tensor, ...],
    direction: tuple[Tensor, ...],
    additional: tuple[Any, ...],
) -> Boundary:
    """The nearest boundary for each image of a batch.

    Images are moved one at a time, so that whatever flips is due to that one.

    Args:
        run: Makes a fresh replay.
        inputs: The image.
        direction: Its change per unit step.
        additional: Further arguments.

    Returns:
        Distances and switches.
    """
    distances: list[float] = []
    switches: list[str] = []
    for image in range(inputs[0].shape[0]):
        current = run()
        with forward_ad.dual_level():
            moving = []
            for tensor, change in zip(inputs, direction, strict=True):
                alone = torch.zeros_like(tensor)
                alone[image] = change[image]
                with warnings.catch_warnings():
                    # the first dual number of a process loads a module that scripts, and says so
                    warnings.simplefilter("ignore", FutureWarning)
                    moving.append(forward_ad.make_dual(tensor, alone))
            current.replay(tuple(moving), additional)
        distances.append(current.nearest)
        switches.append(current.switch)
    return Boundary(torch.tensor(distances, dtype=inputs[0].dtype, device=inputs[0].device), tuple(switches))
