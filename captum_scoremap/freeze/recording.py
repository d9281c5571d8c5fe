"""Recording: the model at the image, its layers tapped and what is nonlinear in it frozen."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from captum_scoremap.rules import Call, Rule, substituted, tensors_in

from .lean import Adjoint, Placeholders, Snapshot, Snapshots
from .run import Run, Site, StopRun, Tag
from .taps import Reduction, tap

__all__ = ["Entry", "Recording", "Tapped"]


@dataclass(frozen=True)
class Entry:
    """What one call froze."""

    rule: Rule
    operation: str
    module: str
    state: Any


@dataclass(frozen=True)
class Tapped:
    """The tensors of a site: where their results come out, and their values."""

    anchors: tuple[Tensor, ...]
    snapshots: tuple[Snapshot, ...]
    is_tuple: bool

    @property
    def activations(self) -> tuple[Tensor, ...]:
        """Y."""
        return tuple(snapshot.tensor for snapshot in self.snapshots)


class Recording(Run):
    """A run at the image.

    Args:
        forward_func: The model, or a function that calls it.
        rules: Operation name to rule.
        taps: What to make of A and Y at each site; if a module runs more than once, its last call counts.
        keep: Whether to keep what is frozen, for replay.
        trusted: Rules that are known to return what their operation does; others are verified at each call.
        stop_at: A site after which the run ends, where nothing above is of interest.
        once: Whether one backward pass is all that follows: what it has used is let go as it goes by, the activations
            of :class:`Tapped` included.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        rules: Mapping[str, Rule],
        taps: Mapping[Site, Reduction] | None = None,
        *,
        keep: bool = False,
        trusted: Mapping[str, Rule] | None = None,
        stop_at: Site | None = None,
        once: bool = False,
    ) -> None:
        super().__init__(forward_func, rules)
        self.keep = keep
        self.once = once
        self.entries: dict[str, Entry] = {}
        self.tapped: dict[Site, Tapped] = {}
        self._taps = dict(taps or {})
        self._trusted = rules if trusted is None else trusted
        self._stop_at = stop_at
        self._snapshots = Snapshots()
        self._placeholders = Placeholders()
        self._stopped_value: Any = None

    def record(
        self, inputs: tuple[Tensor, ...], additional: tuple[Any, ...], at_inputs: Reduction | None = None
    ) -> Any:
        """Run the model at the image.

        Args:
            inputs: The image, (N, ...) each.
            additional: Further arguments, constant.
            at_inputs: What to make of A and Y at the inputs themselves; None where that is not asked for.

        Returns:
            The model's output, or the value at ``stop_at``.
        """
        # copies, for the model may change its input in place
        copies = [tensor.detach().clone() for tensor in inputs]
        self.input_taps = Tapped((), (), is_tuple=True)
        if at_inputs is not None:
            snapshots = tuple(Snapshot(tensor) for tensor in inputs)
            taps = [tap(copy, snapshot, at_inputs) for copy, snapshot in zip(copies, snapshots, strict=True)]
            self.input_taps = Tapped(tuple(anchor for _, anchor in taps), snapshots, is_tuple=True)
            copies = [passed for passed, _ in taps]
        try:
            return self.execute(tuple(copies), additional)
        except StopRun:
            self.raise_unsupported()
            return self._stopped_value

    def operate(self, key: str, name: str, rule: Rule, call: Call, run: Callable[[], Any]) -> Any:
        """The value at the image, by an operation whose derivative is the linear form."""
        live, differentiable = call.live, torch.is_grad_enabled()
        affine = rule.is_affine(call)
        if not differentiable and (affine or not self.keep):
            return run()
        if not affine and self._trusted.get(name) is not rule:
            self._verify(name, rule, call)
        if self.keep:
            call = replace(call, keep=True)

        has_adjoint = differentiable and len(live) == 1 and rule.has_adjoint(call)

        def frozen() -> tuple[Any, Any]:
            # where autograd's own derivative is all that is wanted, nothing needs to be frozen beside
            if affine or (rule.native and not has_adjoint and not self.keep):
                return run(), None
            output, state = rule.record(call, run)
            if self.keep:
                self.entries[key] = Entry(rule, name, self.module_name(), state)
            return output, state

        if not differentiable:
            return frozen()[0]
        if has_adjoint:

            def run_for_adjoint() -> tuple[Tensor, Callable[[Tensor], Tensor]]:
                output, state = frozen()
                return output, rule.adjoint(call, state)

            return Adjoint.apply(live[0], run_for_adjoint, call.in_place)
        with self._placeholders.instead_of(live) if affine or rule.lean else self._snapshots.guard():
            return frozen()[0]

    def about_to_run(self, rule: Rule, live: tuple[Tensor, ...], target: Tensor | None) -> None:
        """Save the snapshots that share memory with what changes."""
        if target is not None:
            alone = len(live) == 1 and live[0] is target
            self._snapshots.about_to_change(target, but_where_closed=alone and rule.passes_or_closes)
        for tensor in live:
            if tensor is not target:
                self._snapshots.about_to_read(tensor)

    def at_site(self, site: Site, value: Any) -> Any:
        """Tap the site, if it is wanted, and stop there, if it is the last."""
        reduction = self._taps.get(site)
        if reduction is not None:
            value = self._tap(site, value, reduction)
        if self._stop_at == site and self.calls[site[0]]:
            self._stopped_value = value
            raise StopRun
        return value

    def _tap(self, site: Site, value: Any, reduction: Reduction) -> Any:
        anchors: list[Tensor] = []
        snapshots: list[Snapshot] = []
        passed: dict[int, Tensor] = {}
        for tensor in tensors_in(value):
            if not tensor.is_floating_point() or id(tensor) in passed:
                continue
            known = self.tag_of(tensor) | Tag.LIVE
            snapshot = self._snapshots.take(tensor, for_products=self.once and reduction.multiply)
            passed[id(tensor)], anchor = tap(tensor, snapshot, reduction, once=self.once)
            self.tag(passed[id(tensor)], known)
            anchors.append(anchor)
            snapshots.append(snapshot)
        is_tuple = isinstance(value, (tuple, list)) and len(value) > 1
        self.tapped[site] = Tapped(tuple(anchors), tuple(snapshots), is_tuple)
        return substituted(value, passed)

    def _verify(self, name: str, rule: Rule, call: Call) -> None:
        """Raise unless a user's rule returns at the image what the operation returns."""
        with torch.no_grad():
            expected, frozen = call.run(), rule.apply(call, rule.freeze(call))
        pairs = list(zip(tensors_in(expected), tensors_in(frozen), strict=False))
        where = f"rule for {name!r} ({type(rule).__name__}), in module {self.module_name()!r},"
        if not pairs and isinstance(expected, Tensor):
            raise TypeError(f"{where} must return a tensor, got {type(frozen).__name__}.")
        for one, other in pairs:
            if one.shape != other.shape:
                raise ValueError(
                    f"{where} must return shape {tuple(one.shape)}, as the operation does, got {tuple(other.shape)}."
                )
            if one.dtype != other.dtype:
                raise ValueError(f"{where} must return {one.dtype}, as the operation does, got {other.dtype}.")
            if one.is_floating_point():
                tolerance = 1e3 * torch.finfo(one.dtype).eps
                error = (one - other).abs().max() / one.abs().max().clamp_min(torch.finfo(one.dtype).tiny)
                if not error <= tolerance:
                    raise ValueError(
                        f"{where} must return the operation's value at the image, got a relative difference of "
                        f"{float(error):.1e}. Check that apply(call, freeze(call)) equals call.run()."
                    )
