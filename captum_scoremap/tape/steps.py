"""The tape: the network at one image as a list of affine steps, Eq. (2), and the two ways to walk it.

Every step reads values and makes values. Forward, from values on, the steps are the frozen network; transposed, from
the score down, they give its coefficients in any value. Nothing else is needed for S = A·Y + B.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from captum_scoremap.checks import has_memory, is_traced
from captum_scoremap.rules import Call, Rule, Value, floating, substituted, tensors_in
from captum_scoremap.speed import Packed

__all__ = ["Kept", "Step", "Tape", "Tapped", "check_finite", "given_or_kept", "nonfinite_allowed", "sites_of"]


class Kept:
    """A tensor that the tape holds on to; if the model changes its memory in place, this becomes a copy of before."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@dataclass(slots=True, eq=False)
class Step(Call):
    """A call as recorded: its live arguments are values, and what it froze is known."""

    rule: Rule = field(kw_only=True)
    module: nn.Module | None = field(kw_only=True)  # that ran it
    state: Any = None  # what it froze
    outputs: tuple[Value, ...] = ()  # one for each floating-point tensor it returns; none for a constant

    def frozen(self) -> Any:
        """Return what it froze, as tensors."""
        state = self.state
        if isinstance(state, (Kept, Packed)):
            return state.tensor
        if type(state) is tuple:
            return tuple(one.tensor if isinstance(one, Kept) else one for one in state)
        return state

    def constants(self) -> Sequence[Tensor | None]:
        """Return the constant part of each output; None, or nothing at all, stands for zero."""
        return self.rule.constants(self, self.frozen())

    def forward(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Return the outputs of the affine step for given live arguments."""
        return floating(self.rule.apply(self.filled(tensors), self.frozen()))

    def linear(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Return the outputs of the affine step for given live arguments, without its constants."""
        constants = self.forward([value.zeros() for value in self.values])
        return [whole - one for whole, one in zip(self.forward(tensors), constants, strict=True)]


@dataclass
class Tapped:
    """What passed a site: its floating-point tensors, Y, as values."""

    values: tuple[Value, ...]
    is_tuple: bool  # whether the site has several
    bit: int  # set in ``Value.sites`` of all that depends on it

    @property
    def activations(self) -> tuple[Tensor, ...]:
        """Y, as it was when it passed."""
        return tuple(value.kept.tensor for value in self.values)


Visit = Callable[[Step, Sequence[Tensor | None], Sequence[Tensor | None]], None]


@dataclass
class Tape:
    """The steps of one run, in the order in which they ran."""

    steps: list[Step] = field(default_factory=list)
    inputs: tuple[Value | None, ...] = ()  # None for those that cannot be live, such as integers
    output: Any = None  # what the model returned
    output_values: dict[int, Value] = field(default_factory=dict)  # of the live tensors in it, by their identity

    def write(self, step: Step, tensors: Sequence[Tensor], *, gate: bool) -> tuple[Value, ...]:
        """Append a step, and return the values of the tensors that it made."""
        sites, number = sites_of(step.values), len(self.steps)
        step.outputs = tuple([Value(tensor, gate, sites, number) for tensor in tensors])
        self.steps.append(step)
        return step.outputs

    def check_of_constants(self, what: str, advice: str) -> Callable[[], None]:
        """Return a check that raises if a tensor that the steps read besides values, a weight, changed in place since.

        What is computed of the tape after that, as after a step of training, would be neither of the model as it was
        nor of the one that is.
        """
        read = {
            id(tensor): tensor
            for step in self.steps
            # what is packed nobody else has
            for tensor in tensors_in((
                step.args,
                step.kwargs,
                None if isinstance(step.state, Packed) else step.frozen(),
            ))
            if not tensor.is_inference()  # these count no changes
        }
        versions = [(tensor, _version(tensor)) for tensor in read.values()]

        def check() -> None:
            changed = [tuple(tensor.shape) for tensor, version in versions if _version(tensor) != version]
            if changed:
                raise RuntimeError(
                    f"the model's weights must be as they were when {what} was made, got {len(changed)} tensors "
                    f"changed since, the first of shape {changed[0]}. {advice}"
                )

        return check

    def copy_inference_tensors(self) -> None:
        """Put copies in place of tensors made under ``torch.inference_mode``, of which autograd can save none."""
        copies: dict[int, Tensor] = {}

        def copied(tensor: Tensor) -> Tensor:
            return copies.setdefault(id(tensor), tensor.clone()) if tensor.is_inference() else tensor

        for step in self.steps:
            step.args, step.kwargs = substituted(step.args, copied), substituted(step.kwargs, copied)
            for kept in step.state if type(step.state) is tuple else (step.state,):
                if isinstance(kept, Kept):
                    kept.tensor = copied(kept.tensor)

    def value_of_output(self) -> Value | None:
        """Return the value of an output that is one tensor; None if it does not depend on the image."""
        return self.output_values.get(id(self.output))

    def seeds(self, coefficients: Tensor) -> dict[Value, Tensor]:
        """Return where the transposed steps start, given coefficients of an output that is one tensor."""
        value = self.value_of_output()
        return {} if value is None else {value: coefficients}

    def output_at(self, known: Mapping[Value, Tensor]) -> Any:
        """Return what the frozen model returns for given inputs."""
        found = self.forward(known, self.output_values.values())

        def at(tensor: Tensor) -> Tensor:
            value = self.output_values.get(id(tensor))
            return tensor if value is None else found[value]

        return substituted(self.output, at)

    def forward(
        self, known: Mapping[Value, Tensor], wanted: Iterable[Value], sites: int = 0, *, bypass: bool = True
    ) -> dict[Value, Tensor]:
        """Run the affine steps from known values on: Eq. (2) with R fixed.

        Args:
            known: Values to start from.
            wanted: Values to return.
            sites: Run only steps that depend on one of these sites; what else they read was kept while recording. 0 for
                all steps.
            bypass: Whether what else they read counts; else it is zero, which leaves differences as they are.

        Returns:
            The wanted values; those that depend on none of the known ones as they were kept.
        """
        targets = list(wanted)
        values = dict(known)

        def tensor_of(value: Value) -> Tensor:
            found = values.get(value)
            if found is None:
                found = value.kept.tensor if bypass and value.kept is not None else value.zeros()
            return found

        for step in self._leading_to(targets, known):
            if sites and not step.outputs[0].sites & sites:
                continue
            outputs = step.forward([tensor_of(value) for value in step.values])
            values.update(zip(step.outputs, outputs, strict=True))
        return {value: tensor_of(value) for value in targets}

    def behind(self, wanted: Iterable[Value]) -> set[Value]:
        """Return all that some values are made of, those among it."""
        targets = list(wanted)
        return {*targets, *(value for step in self._leading_to(targets, {}) for value in step.values)}

    def _leading_to(self, wanted: Iterable[Value], known: Mapping[Value, Tensor]) -> list[Step]:
        """The steps from known values that some wanted ones are made of, in order."""
        needed = set(wanted)
        chosen = []
        for step in reversed(self.steps):
            if not needed.isdisjoint(step.outputs) and step.outputs[0] not in known:
                needed.update(step.values)
                chosen.append(step)
        return chosen[::-1]

    def retraced(self, known: Mapping[Value, Tensor]) -> dict[Value, Tensor]:
        """Return all values' tensors, every step taken again as the operation itself, with gradients on, freezing anew.

        What is read off the tape afterwards can be differentiated, in the inputs and in the model's parameters.
        """
        values = dict(known)
        with torch.enable_grad():
            for step in self.steps:
                live = [given_or_kept(value, values) for value in step.values]
                call = step.filled(live)
                is_affine = step.rule.is_affine(step)
                call.output = step.rule.apply(call, None) if is_affine else call.written_out()
                if not is_affine:
                    step.state = step.rule.freeze(call)
                values.update(zip(step.outputs, floating(call.output), strict=False))
        return values

    def transposed(
        self,
        seeds: Mapping[Value, Tensor],
        wanted: dict[Value, Callable[[Tensor], Tensor]],
        *,
        consume: bool = False,
        visit: Visit | None = None,
    ) -> dict[Value, Tensor]:
        """Run the transposed steps from the score down: the coefficients A of Eq. (3).

        Args:
            seeds: Coefficients of the score in the values it is read from.
            wanted: Values whose coefficients are asked for, each with what to make of them.
            consume: Whether to empty the list of steps and ``wanted`` on the way, so that what is used is freed.
            visit: Called for each step on the way with the coefficients of its outputs and of its live arguments.

        Returns:
            For each wanted value that the score depends on, what was made of its coefficients.
        """
        coefficients = dict(seeds)
        found: dict[Value, Tensor] = {}
        steps = self.steps
        reach = sites_of(wanted)
        lowest = max(0, min((value.step for value in wanted), default=0))
        for index in range(len(steps) - 1, lowest - 1, -1):
            step = steps.pop() if consume else steps[index]
            gradients = tuple(coefficients.pop(value, None) for value in step.outputs)
            for value, gradient in zip(step.outputs, gradients, strict=True):
                if gradient is not None and value in wanted:
                    found[value] = (wanted.pop(value) if consume else wanted[value])(gradient)
            if all(gradient is None for gradient in gradients):
                continue
            shares = step.rule.transpose(step, step.frozen(), gradients)
            if visit is not None:
                visit(step, gradients, shares)
            for value, share in zip(step.values, shares, strict=True):
                if share is not None and value.sites & reach:
                    coefficients[value] = coefficients[value] + share if value in coefficients else share
        for value, reduce in wanted.items():
            if value not in found and value in coefficients:
                found[value] = reduce(coefficients[value])
        check_finite(found.values())
        return found


_is_nonfinite_allowed: ContextVar[bool] = ContextVar("is_nonfinite_allowed", default=False)


@contextmanager
def nonfinite_allowed() -> Iterator[None]:
    """Let infinite and NaN results pass, for a caller that looks for them image by image."""
    token = _is_nonfinite_allowed.set(True)
    try:
        yield
    finally:
        _is_nonfinite_allowed.reset(token)


def check_finite(results: Iterable[Tensor], what: str = "the coefficients of the score") -> None:
    """Raise if some numbers are infinite or NaN; unless they are of a graph or a batch."""
    if _is_nonfinite_allowed.get() or is_traced() or torch._C._functorch.peek_interpreter_stack() is not None:
        return
    for one in results:
        # the sum, which is quick, is finite only if all of them are
        if not bool(one.sum().isfinite()) and not bool(one.isfinite().all()):
            raise ValueError(
                f"{what} must be finite, got infinite or NaN ones in {one.dtype}. Keep what "
                "roots, logarithms, powers and quotients are taken of away from zero, x.clamp_min(1e-6); if numbers "
                "outgrow their type, explain model.double()."
            )


def _version(tensor: Tensor) -> tuple[int, int]:
    """Return what shows that a tensor changed: how often it did in place, and where its memory lies (``data``)."""
    return tensor._version, tensor.data_ptr() if has_memory(tensor) else 0


def sites_of(values: Iterable[Value]) -> int:
    """Return the sites that some values depend on together, a bit for each."""
    sites = 0
    for value in values:
        sites |= value.sites
    return sites


def given_or_kept(value: Value, given: Mapping[Value, Tensor]) -> Tensor:
    """Return a value's tensor as it is given; else as it was kept while recording."""
    found = given.get(value)
    if found is None:
        kept: Kept = value.kept
        found = kept.tensor
    return found
