"""What passes a site: there new values begin, so that what bypasses a layer is not taken for its output."""

from typing import Any

import torch
from torch import Tensor

from captum_scoremap.checks import unrecorded
from captum_scoremap.rules import Value, substituted

from .module_tracker import Site
from .run import Run
from .steps import Tapped

__all__ = ["tap", "tap_inputs"]


def tap_inputs(run: Run, inputs: tuple[Tensor, ...]) -> tuple[Value | None, ...]:
    """Tap the input, a run's first site: return its values; None for what cannot be live, such as integers."""
    values = tuple(
        _new_value(run, tensor, Value.IMAGE) if tensor.is_floating_point() or tensor.is_complex() else None
        for tensor in inputs
    )
    run.tapped[None] = Tapped(tuple(filter(None, values)), True, Value.IMAGE)
    return values


def tap(run: Run, site: Site, passing: Any) -> Any:
    """Begin new values at a site, and return what goes on from there."""
    run.bit <<= 1
    values: list[Value] = []
    taps: dict[int, Tensor] = {}

    def tapped(tensor: Tensor) -> Tensor:
        numbers = run.real.of(tensor)
        if numbers is None:
            return begun(tensor)
        with unrecorded():
            again = tensor.clone()
        run.made(again)  # what it stands for is live, not its own few bits
        run.real.stand(again, begun(numbers))
        return again

    # not one function that calls itself: it would hold itself, and the tensors, until the collector comes
    def begun(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        if id(tensor) not in taps:
            passed = torch.ops.aten.alias.default(tensor)
            value = run.value_of(passed)
            if value is None:  # a layer that does not depend on the image
                value = _new_value(run, passed, Value.FROZEN if run.has_frozen(passed) else 0)
                run.has_constant_layers = True
                run.memory.constant_begins(passed)
            elif not run.inspect:
                value.kept = run.memory.keep(passed)
            value.sites |= run.bit
            run.memory.site_begins(value)
            taps[id(tensor)] = passed
            values.append(value)
        return taps[id(tensor)]

    passing = substituted(passing, tapped)
    several = None if site[1] else passing
    is_tuple = len(several) > 1 if isinstance(several, (tuple, list)) else len(values) > 1
    run.tapped[site] = Tapped(tuple(values), is_tuple, run.bit)
    return passing


def _new_value(run: Run, tensor: Tensor, sites: int) -> Value:
    value = Value(tensor, sites=sites)
    value.kept = run.memory.keep(tensor)
    run.name(tensor, value)
    return value
