"""B of many layers from one recorded run: the frozen model with a layer at zero, without the work below the layer.

Below the lowest layer nothing is frozen, and no replay computes what ran before its layer. What bypasses the layer must
be right all the same: at the moment the layer is reached, a tensor that something will still use is alive, and is kept;
one that nothing refers to any more cannot bypass the layer, and stands in as zeros.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from captum_scoremap.freeze import Reduction, Site
from captum_scoremap.freeze.recording import Recording
from captum_scoremap.freeze.replaying import Replaying
from captum_scoremap.rules import Call, Rule, substituted, tensors_in, with_rules

__all__ = ["RecordingFromSites"]


class RecordingFromSites(Recording):
    """A run at the image that freezes what lies above the lowest of some layers.

    Args:
        model: The model, or a function that calls it.
        taps: What to make of A and Y at each site.
    """

    def __init__(self, model: Callable[..., Any], taps: Mapping[Site, Reduction]) -> None:
        super().__init__(model, with_rules(None), taps)
        self._outputs: dict[str | Site, Any] = {}
        self._before: dict[Site, dict[str | Site, Any]] = {}

    def operate(self, key: str, name: str, rule: Rule, call: Call, run: Callable[[], Any]) -> Any:
        """The value at the image; what it was is remembered for as long as something else refers to it."""
        output = super().operate(key, name, rule, call, run)
        self._outputs[key] = _Remembered(output)
        return output

    def at_site(self, site: Site, value: Any) -> Any:
        """Tap the site, if it is wanted, and note what has run so far."""
        if site not in self._taps:
            return super().at_site(site, value)
        self.keep = True
        self._before[site] = {key: remembered.now() for key, remembered in self._outputs.items()}
        passed = super().at_site(site, value)
        self._outputs[site] = _Remembered(passed)
        return passed

    def about_to_run(self, rule: Rule, live: tuple[Tensor, ...], target: Tensor | None) -> None:
        """Save the values that share memory with what changes."""
        super().about_to_run(rule, live, target)
        if target is None:
            return
        address = target.untyped_storage().data_ptr()
        for kept in self._before.values():
            for key, value in kept.items():
                same = {id(t): t.clone() for t in _present(value) if t.untyped_storage().data_ptr() == address}
                if same:
                    kept[key] = substituted(value, same)

    def bias(self, site: Site, inputs: Tensor, select: Callable[[Any], Tensor]) -> Tensor:
        """B, (N,): what the layers above add whatever the layer's output is.

        Args:
            site: The layer.
            inputs: The image as recorded.
            select: From the model's output to the scores (N,).

        Returns:
            In the units of the score.
        """
        zeros = tuple(torch.zeros_like(tensor) for tensor in self.tapped[site].activations)
        with torch.no_grad():
            return select(_ReplayingFrom(self, site, zeros, self._before[site]).replay((inputs,), ()))


class _ReplayingFrom(Replaying):
    """A replay in which nothing is computed that ran before the site did."""

    def __init__(
        self, recording: RecordingFromSites, site: Site, zeros: tuple[Tensor, ...], before: Mapping[str | Site, Any]
    ) -> None:
        super().__init__(recording.forward_func, recording.rules, recording.entries, recording.calls, {site: zeros})
        self._before = before

    def operate(self, key: str, name: str, rule: Rule, call: Call, run: Callable[[], Any]) -> Any:
        if key not in self._before:
            return super().operate(key, name, rule, call, run)
        # In place, what it changes is what it has become.
        return call.input if call.in_place else _stand_in(self._before[key])

    def at_site(self, site: Site, value: Any) -> Any:
        return super().at_site(site, _stand_in(self._before[site]) if site in self._before else value)


class _Remembered:
    """What an operation returned, its tensors referred to weakly."""

    def __init__(self, output: Any) -> None:
        self._references = {id(tensor): weakref.ref(tensor) for tensor in tensors_in(output)}
        shapes = {id(t): torch.empty_like(t, device="meta") for t in tensors_in(output) if t.is_floating_point()}
        self._output = substituted(output, shapes)
        self._ids = {id(shape): identity for identity, shape in shapes.items()}

    def now(self) -> Any:
        """The output, a placeholder without memory for each tensor that is gone."""
        alive: dict[int, Tensor] = {}
        for placeholder in tensors_in(self._output):
            tensor = self._references.get(self._ids.get(id(placeholder), 0), lambda: None)()
            if tensor is not None:
                alive[id(placeholder)] = tensor.detach()
        return substituted(self._output, alive)


def _present(value: Any) -> Iterator[Tensor]:
    return (tensor for tensor in tensors_in(value) if not tensor.is_meta)


def _stand_in(value: Any) -> Any:
    """The value with zeros, all in one cell of memory, for the tensors that are gone."""
    zeros = {
        id(tensor): torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
        for tensor in tensors_in(value)
        if tensor.is_meta
    }
    return substituted(value, zeros)
