"""What passes a site: there new values begin, so that what bypasses a layer is not taken for its output."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_scoremap.checks import unrecorded
from captum_scoremap.rules import Value, substituted

from .live import Live
from .memory import Memory
from .places import Site
from .quantized import RealNumbers
from .steps import Kept

__all__ = ["Tapped", "Taps"]


@dataclass
class Tapped:
    """What passed a site: its floating-point tensors, Y, as values."""

    values: tuple[Value, ...]
    is_tuple: bool  # whether the site has several
    bit: int  # set in ``Value.sites`` of all that depends on it
    _kept: tuple[Kept, ...]

    @property
    def activations(self) -> tuple[Tensor, ...]:
        """Y, as it was when it passed."""
        return tuple(kept.tensor for kept in self._kept)

    def release(self) -> None:
        """Hold on to Y no longer; what still needs it has it."""
        self._kept = ()


class Taps:
    """Taps the sites of a run, of which the input, None, is the first; ``inspect`` to leave their tensors alone."""

    def __init__(self, live: Live, memory: Memory, real: RealNumbers, *, inspect: bool) -> None:
        self._live, self._memory, self._real, self._inspect = live, memory, real, inspect
        self._bit = 1
        self.tapped: dict[Site | None, Tapped] = {}

    def begin(self, inputs: tuple[Tensor, ...]) -> tuple[Value | None, ...]:
        """Return the values of the inputs; None for those that cannot be live, such as integers."""
        values = tuple(
            self._born(tensor, 1) if tensor.is_floating_point() or tensor.is_complex() else None for tensor in inputs
        )
        kept = tuple(self._memory.keep(tensor) for tensor, value in zip(inputs, values, strict=True) if value)
        self.tapped[None] = Tapped(tuple(filter(None, values)), True, 1, kept)
        return values

    def tap(self, site: Site, passing: Any) -> Any:
        """Begin new values at a site, and return what goes on from there."""
        self._bit <<= 1
        values: list[Value] = []
        kept: list[Kept] = []
        taps: dict[int, Tensor] = {}

        def tapped(tensor: Tensor) -> Tensor:
            numbers = self._real.of(tensor)
            if numbers is None:
                return begun(tensor)
            with unrecorded():
                again = tensor.clone()
            self._real.stand(again, begun(numbers))
            return again

        # not one function that calls itself: it would hold itself, and the tensors, until the collector comes
        def begun(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            if id(tensor) not in taps:
                passed = torch.ops.aten.alias.default(tensor)
                value = self._live.value_of(passed)
                if value is None:  # a layer that does not depend on the image
                    value = self._born(passed, 0)
                    self._memory.born(passed)
                    value.kept = self._memory.keep(passed)
                value.sites |= self._bit
                self._memory.begins(value)
                taps[id(tensor)] = passed
                values.append(value)
                if not self._inspect:
                    kept.append(self._memory.keep(passed))
            return taps[id(tensor)]

        passing = substituted(passing, tapped)
        several = None if site[1] else passing
        is_tuple = len(several) > 1 if isinstance(several, (tuple, list)) else len(values) > 1
        self.tapped[site] = Tapped(tuple(values), is_tuple, self._bit, tuple(kept))
        return passing

    def _born(self, tensor: Tensor, sites: int) -> Value:
        value = Value(tensor, sites=sites)
        self._live.name(tensor, value)
        return value
