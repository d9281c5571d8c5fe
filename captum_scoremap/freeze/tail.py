"""The tail: the frozen model from a layer on, without the cost of what lies below.

Below the layer nothing is computed in a replay: every operation returns zeros, shaped like what it returned at the
image. So what bypasses the layer is not right, but it is the same whatever the layer's output, and drops out of a
difference.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from captum_scoremap.rules import Call, Rule, substituted, tensors_in

from .recording import Recording
from .replaying import Replaying
from .run import Site
from .taps import Reduction

__all__ = ["Tail"]


class Tail:
    """The linear part of the frozen model above a site: from a change of its tensor to the change of the output.

    Args:
        forward_func: The model, or a function that calls it.
        rules: Operation name to rule.
        site: Where the tail begins.
        reduction: What a tap at the site makes of A and Y.
        trusted: Rules that need no verification.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        rules: Mapping[str, Rule],
        site: Site,
        reduction: Reduction,
        trusted: Mapping[str, Rule] | None = None,
    ) -> None:
        self.recording = _RecordingFrom(forward_func, rules, {site: reduction}, keep=True, trusted=trusted)
        self.site = site

    def record(self, inputs: tuple[Tensor, ...], additional: tuple[Any, ...]) -> Any:
        """Run the model at the image; returns its output."""
        self._inputs, self._additional = inputs, additional
        return self.recording.record(inputs, additional)

    def __call__(self, value: Tensor) -> Any:
        """The tail's output, but for a constant."""
        recording = self.recording
        run = _ReplayingFrom(
            recording.forward_func,
            recording.rules,
            recording.entries,
            recording.calls,
            {self.site: (value,)},
            skipped=recording.skipped,
        )
        return run.replay(self._inputs, self._additional)


class _RecordingFrom(Recording):
    """Keeps what is frozen from a site on, and below it the shapes of what operations return.

    A site that is passed more than once counts at its last call, so every call of it starts afresh.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.skipped: dict[str, Any] = {}
        self._shapes: dict[str, Any] = {}

    def operate(self, key: str, name: str, rule: Rule, call: Call, run: Callable[[], Any]) -> Any:
        output = super().operate(key, name, rule, call, run)
        shapes = {id(t): torch.empty_like(t, device="meta") for t in tensors_in(output) if t.is_floating_point()}
        self._shapes[key] = substituted(output, shapes)
        return output

    def at_site(self, site: Site, value: Any) -> Any:
        if site in self._taps:
            self.skipped = dict(self._shapes)
            self.entries.clear()
        return super().at_site(site, value)


class _ReplayingFrom(Replaying):
    """Returns zeros for every operation that ran before the site did."""

    def __init__(self, *args: Any, skipped: Mapping[str, Any]) -> None:
        super().__init__(*args)
        self._skipped = skipped

    def operate(self, key: str, name: str, rule: Rule, call: Call, run: Callable[[], Any]) -> Any:
        if key not in self._skipped:
            return super().operate(key, name, rule, call, run)
        if call.in_place:  # what it changes is a placeholder already
            return call.input
        shapes = self._skipped[key]
        device = tensors_in(call.args)[0].device
        zeros = {id(t): torch.zeros(t.shape, dtype=t.dtype, device=device) for t in tensors_in(shapes) if t.is_meta}
        return substituted(shapes, zeros)
