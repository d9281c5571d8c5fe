"""How far the linear region reaches in a direction: the first step at which a switch flips."""

import math
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_scoremap.checks import warn
from captum_scoremap.rules import Value, display_name

from .steps import Step, Tape, given_or_kept

__all__ = ["Boundary", "nearest_boundary"]


# Norms and distances, with the name of their order: of those between 1 and infinity one is smooth.
_NORMS = {"linalg_vector_norm": "ord", "norm": "p", "_cdist_forward": "p", "_pdist_forward": "p", "dist": "p"}
# Operations with kinks or jumps that no rule names a switch of: they go by their value or tangent at the image.
_UNNAMED = frozenset(
    """
    round floor ceil trunc floor_divide histc _unique2 unique_dim unique_consecutive median nanmedian frac fmod
    remainder copysign scatter_reduce index_reduce segment_reduce fractional_max_pool2d fractional_max_pool3d roi_pool
    ps_roi_pool renorm smooth_l1_loss huber_loss multi_margin_loss multilabel_margin_loss_forward
    """.split()
)


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
    missed: dict[str, None] = {}
    # switches at one distance flip in the order of the steps, whatever rounding made of the distances
    eps = torch.finfo(inputs[0].dtype).eps
    closer = 1 - min(1e3 * eps, eps**0.5)
    largest = _largest_change({value.dtype for step in tape.steps for value in step.values})
    for image in range(inputs[0].shape[0]):
        size = max(float(change[image].abs().max()) for change in direction)
        # a power of two, which rounds nothing, and which single precision can hold
        scale = 2.0 ** min(round(math.log2(largest) - math.log2(size)), 120) if size else 1.0
        alone = []
        for change in direction:
            moved = torch.zeros_like(change)
            moved[image] = scale * change[image]
            alone.append(moved)
        nearest, switch = float("inf"), ""
        for step, first in _crossings(tape, inputs, tuple(alone)):
            if first is None:
                missed[names.get(step, display_name(step.operation))] = None
            elif first < nearest * closer:
                nearest, switch = first, names[step]
        distances.append(scale * nearest)
        switches.append(switch)
    if missed:
        warn(
            f"distance_to_boundary does not follow the switches of {', '.join(missed)}, which may flip before. Where "
            "they do, frozen(x) and model(x) part: compare them at x = inputs + step * direction."
        )
    return Boundary(torch.tensor(distances, dtype=inputs[0].dtype, device=inputs[0].device), tuple(switches))


def _largest_change(dtypes: Set[torch.dtype]) -> float:
    """Return a size of changes that drowns the constants which every step adds to them, and takes off again.

    Nothing of their rounding is left then, so that changes that cancel are zero. It leaves room for what grows on the
    way.
    """
    ranges = [torch.finfo(dtype) for dtype in dtypes if dtype.is_floating_point]
    return min((min(one.eps**-2, one.max**0.25) for one in ranges), default=1.0)


def _crossings(
    tape: Tape, inputs: tuple[Tensor, ...], direction: tuple[Tensor, ...]
) -> Iterator[tuple[Step, float | None]]:
    """For each step with switches, the first step along the direction at which one flips; None where none can tell."""
    values: dict[Value, Tensor] = {}
    changes: dict[Value, Tensor] = {}
    for value, tensor, change in zip(tape.inputs, inputs, direction, strict=True):
        if value is not None:
            values[value], changes[value] = tensor, change
    for step in tape.steps:
        now = [given_or_kept(v, values) for v in step.values]
        speed = [changes[v] if v in changes else v.zeros() for v in step.values]
        found = step.rule.steps_to_boundary(step.filled(now), speed, step.frozen())
        if found is None or found.is_complex():
            if _has_switches(step) and any(bool(change.any()) for change in speed):
                yield step, None
        else:
            ahead = found[torch.isfinite(found) & (found > 0)]
            first = float(ahead.min()) if ahead.numel() else float("inf")
            yield (
                step,
                0.0 if bool((found == 0).any()) and _flips_before(step, now, speed, first) else first,
            )
        if step.outputs:
            values.update(zip(step.outputs, step.forward(now), strict=True))
            changes.update(zip(step.outputs, step.linear(speed), strict=True))


def _has_switches(step: Step) -> bool:
    """Return whether a step is not smooth around the image, be it named or not."""
    if step.rule.is_affine(step) or not step.rule.reads:
        return False
    name = step.operation.overloadpacket.__name__  # type: ignore[attr-defined]
    order = step.argument(_NORMS[name]) if name in _NORMS else None
    is_unnamed = name in _UNNAMED or (order is not None and not 1 < order < math.inf)
    return is_unnamed or step.rule.switch(step.frozen()) is not None


def _flips_before(step: Step, now: Sequence[Tensor], speed: Sequence[Tensor], first: float) -> bool:
    """Return whether a switch on its boundary, where either side may be the one that it is on, flips at once."""
    size, pace = (max(float(one.nan_to_num(0.0, 0.0, 0.0).abs().max()) for one in some) for some in (now, speed))
    reach = min(first / 2, (size or 1.0) / (pace or 1.0))  # no further than that all can be told apart
    call = step.filled([one + reach * change for one, change in zip(now, speed, strict=True)])
    call.output = call.run()
    before, after = (step.rule.switch(state) for state in (step.frozen(), step.rule.freeze(call)))
    return before is not None and after is not None and bool((before != after).any())
