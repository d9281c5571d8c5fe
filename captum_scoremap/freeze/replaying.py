"""Replaying: the frozen model at any input, an affine function of it."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from captum_scoremap.rules import Call, Rule, substituted, tensors_in

from .recording import Entry
from .run import Run, Site, StopRun, Tag

__all__ = ["Replaying"]


class Replaying(Run):
    """A run with everything nonlinear as it was at the image.

    Args:
        forward_func: The model, or a function that calls it, as recorded.
        rules: The rules it was recorded under.
        entries: What was frozen.
        last_calls: How often each module ran; a replacement takes place at its last call.
        replacements: Tensors to go on with at a site, in place of those that arrive there.
        stop_at: A site after which the run ends.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        rules: Mapping[str, Rule],
        entries: Mapping[str, Entry],
        last_calls: Counter[nn.Module],
        replacements: Mapping[Site, Sequence[Tensor]] | None = None,
        stop_at: Site | None = None,
    ) -> None:
        super().__init__(forward_func, rules)
        self._entries = entries
        self._last_calls = last_calls
        self._replacements = dict(replacements or {})
        self._stop_at = stop_at
        self._stopped_value: Any = None
        self._constant: str | None = None

    def replay(self, inputs: tuple[Tensor, ...], additional: tuple[Any, ...]) -> Any:
        """The output of the frozen model, or the value at ``stop_at``."""
        try:
            return self.execute(tuple(tensor.clone() for tensor in inputs), additional)
        except StopRun:
            self.raise_unsupported()
            return self._stopped_value

    def operate(self, key: str, name: str, rule: Rule, call: Call, run: Callable[[], Any]) -> Any:
        """The linear form of the call.

        Returns:
            Its output.

        Raises:
            RuntimeError: If the call was not recorded.
            ValueError: If that is because a layer was replaced that does not depend on the image.
        """
        if rule.is_affine(call):
            return run()
        entry = self._entries.get(key)
        if entry is None and self._constant is not None:
            raise ValueError(
                f"outputs must name layers whose output depends on the image, got a {self._constant} whose output does "
                "not: at this image it is a constant. Use linear_form, which sees it as a variable."
            )
        if entry is None or entry.operation != name:
            raise RuntimeError(
                f"the model must run as it did when it was frozen, got a call of {name!r} at {key!r} that was not "
                "recorded. Freeze it again at this input."
            )
        return self.apply(key, rule, call, entry.state)

    def apply(self, key: str, rule: Rule, call: Call, state: Any) -> Any:
        """The frozen operation."""
        return rule.apply(call, state)

    def at_site(self, site: Site, value: Any) -> Any:
        """Replace what arrives, if so asked."""
        module = site[0]
        if self.calls[module] == self._last_calls[module]:
            if site in self._replacements:
                if not any(map(self.is_live, tensors_in(value))):
                    self._constant = type(module).__name__
                value = self._replace(value, self._replacements[site])
            if site == self._stop_at:
                self._stopped_value = value
                raise StopRun
        return value

    def _replace(self, value: Any, replacements: Sequence[Tensor]) -> Any:
        arriving = {id(tensor): tensor for tensor in tensors_in(value) if tensor.is_floating_point()}
        if len(arriving) != len(replacements):
            raise ValueError(
                f"a layer of {len(arriving)} tensors must be replaced by as many, got {len(replacements)}."
            )
        substitute: dict[int, Tensor] = {}
        for tensor, new in zip(arriving.values(), replacements, strict=True):
            if tensor.shape != new.shape:
                raise ValueError(f"replacement must have shape {tuple(tensor.shape)}, got {tuple(new.shape)}.")
            # a copy, for the model may change it in place
            substitute[id(tensor)] = new.clone()
            self.tag(substitute[id(tensor)], self.tag_of(tensor) | Tag.LIVE)
        return substituted(value, substitute)
