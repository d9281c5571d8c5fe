"""One recorded run and what is read off its tape: S, A·Y and B at any number of sites."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_scoremap.checks import InvalidValueError, unrecorded
from captum_scoremap.rules import Rule, Value, with_rules
from captum_scoremap.scores import logits_in
from captum_scoremap.tape import Recording, Site, Tape, Tapped, check_finite

from .reduction import Reduction, image_sums

__all__ = ["Explanation", "check_sites", "explain", "image_axis", "record_score", "warn_of_probabilities"]


class Explanation:
    """A recorded run, its score, and what is wanted of A and Y at every site.

    Attributes:
        recording: The run.
        score: S, (N,).
        results: For each site the reductions of A and Y; key None for the input.
        reached: For each site whether the scores depend on it at all.
    """

    def __init__(self, recording: Recording, score: Tensor, sites: Sequence[Site | None], reduction: Reduction) -> None:
        self.recording = recording
        self.score = score
        self._reduction = reduction
        self.results: dict[Site | None, tuple[Tensor, ...]] = {}
        self.reached: dict[Site | None, bool] = {}
        self._sites = tuple(sites)
        self._activations: dict[Value, Tensor] = {}

    def retrace(self, inputs: tuple[Tensor, ...]) -> None:
        """Make the results differentiable, in the inputs and in the model's parameters."""
        known = {value: tensor for value, tensor in zip(self.tape.inputs, inputs, strict=True) if value is not None}
        seed = self.tape.value_of_output()
        self._activations = self.tape.retraced(known)
        if seed is not None:
            self.score = self._activations[seed]
            self.tape.output, self.tape.output_values = self.score, {id(self.score): seed}

    def activations(self, site: Site | None) -> tuple[Tensor, ...]:
        """Return Y of a site."""
        tapped = self.tapped(site)
        if not self._activations:
            return tapped.activations
        return tuple(
            self._activations.get(value, y) for value, y in zip(tapped.values, tapped.activations, strict=True)
        )

    @property
    def tape(self) -> Tape:
        """The tape of the run."""
        return self.recording.tape

    def tapped(self, site: Site | None) -> Tapped:
        """Return the tensors of a site."""
        return self.recording.tapped[site]

    def push_back(self, *, consume: bool) -> None:
        """Take the coefficients at all sites in one pass over the transposed steps."""
        wanted: dict[Value, Callable[[Tensor], Tensor]] = {}
        for site in self._sites:
            tapped = self.tapped(site)
            wanted |= {v: self._reduction.at(y) for v, y in zip(tapped.values, self.activations(site), strict=True)}
        if consume:  # so that each Y is freed once its map is made
            for site in self._sites:  # the same one may be named twice
                self.tapped(site).release()
        found = self.tape.transposed(self.seeds(torch.ones_like(self.score)), wanted, consume=consume)
        for site in self._sites:
            tapped = self.tapped(site)
            self.reached[site] = any(value in found for value in tapped.values)
            self.results[site] = tuple(
                found[value]
                if value in found
                else torch.zeros(self._reduction.shape(value), dtype=value.dtype, device=value.device)
                for value in tapped.values
            )

    def seeds(self, weights: Tensor) -> dict[Value, Tensor]:
        """Return where the transposed steps start: the score, each image by a weight."""
        value = self.tape.output_values.get(id(self.score))
        return {} if value is None else {value: weights}

    @torch.no_grad()
    def bias(self, site: Site | None) -> Tensor:
        """Return B, (N,): the steps above a site run forward with its tensors at zero.

        This does not use A: together with S, as the model gave it, it checks A·Y.
        """
        value, tapped = self.tape.value_of_output(), self.tapped(site)
        if value is None or not value.sites & tapped.bit:
            return self.score
        zeros = {one: one.zeros() for one in tapped.values}
        found = self.tape.forward(zeros, [value], sites=tapped.bit)[value]
        check_finite([found], "the constant part of the score")
        return found

    @torch.no_grad()
    def sums(self, site: Site | None) -> Tensor:
        """Return the sum of A·Y for each image, (N,)."""
        results, activations = self.results[site], self.tapped(site).activations
        if self._reduction.multiply:
            return self.sums_of(results, site)
        return self.sums_of([a * y for a, y in zip(results, activations, strict=True)], site)

    @torch.no_grad()
    def sums_of(self, products: Sequence[Tensor], site: Site | None) -> Tensor:
        """Return the sum for each image, (N,), of what is shaped like a site, or like it without its channels."""
        tapped = self.tapped(site)
        axes = [
            self._axis(value, y, product)
            for value, y, product in zip(tapped.values, tapped.activations, products, strict=True)
        ]
        return image_sums(products, axes, self.score)

    def _axis(self, value: Value, activations: Tensor, product: Tensor) -> int | None:
        """Return the dimension of a layer's tensor that holds the images."""
        count = len(self.score)
        depends = value.sites & 1  # on the images; what does not may have as many rows by chance
        if count == 1 or (depends and [axis for axis, size in enumerate(product.shape) if size == count] == [0]):
            return 0
        with unrecorded():
            return image_axis(self.tape, self.seeds, value, count, activations)


def image_axis(
    tape: Tape, seeds: Callable[[Tensor], Mapping[Value, Tensor]], value: Value, count: int, activations: Tensor
) -> int | None:
    """Return the dimension of a layer's tensor along which its images lie, found by weighing their scores.

    Where the images lie, the coefficients of the weighted scores are the weighted coefficients.

    Args:
        tape: The tape.
        seeds: From weights (N,) to where the transposed steps start.
        value: The tensor.
        count: N.
        activations: The tensor itself.

    Returns:
        The dimension; its size is N, or a multiple, image by image. None if the scores do not depend on the tensor.

    Raises:
        ValueError: If there is none.
    """
    weights = torch.linspace(1, 2, count, dtype=activations.dtype, device=activations.device)
    same = {value: lambda a: a}
    plain = tape.transposed(seeds(torch.ones_like(weights)), same).get(value)
    weighed = tape.transposed(seeds(weights), same).get(value)
    if plain is None or weighed is None:
        return None
    tolerance = 1e4 * torch.finfo(plain.dtype).eps * float(plain.abs().max())
    for axis, size in enumerate(plain.shape):
        if not size or size % count:
            continue
        along = weights.repeat_interleave(size // count).reshape(-1, *[1] * (plain.dim() - axis - 1))
        if float((plain * along - weighed).abs().max()) <= tolerance:
            return axis
    raise ValueError(
        f"a layer's tensor must hold the {count} images along one dimension, got {tuple(plain.shape)}, where they "
        "mix. Explain one image at a time."
    )


def explain(
    forward_func: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    select: Callable[[Any], Tensor],
    sites: Sequence[Site | None],
    reduction: Reduction,
    additional: tuple[Any, ...] = (),
    *,
    rules: Mapping[Any, Rule] | None = None,
    keep: bool,
    stop_at: Site | None = None,
    create_graph: bool = False,
) -> Explanation:
    """Record a run and take, in one pass over the transposed steps, what is wanted of A and Y at every site.

    Args:
        forward_func: The model, or a function that calls it.
        inputs: The image.
        select: From the model's output to the scores (N,); part of the run.
        sites: Places in the model; None is the input.
        reduction: What to make of A and Y there.
        additional: Additional arguments.
        rules: Rules to replace or add.
        keep: Whether to keep the tape, for :meth:`Explanation.bias` and :meth:`Explanation.sums`.
        stop_at: A site after which the run ends; its value is the output.
        create_graph: Whether the results can be differentiated, in the inputs and in the model's parameters.

    Returns:
        The explanation.

    Raises:
        ValueError: If a layer did not run, or gives no floating-point tensor.
    """
    recording, score = record_score(
        forward_func,
        inputs,
        select,
        sites,
        additional,
        rules=rules,
        keep=keep,
        stop_at=stop_at,
        create_graph=create_graph,
    )
    found = Explanation(recording, score, sites, reduction)
    if create_graph:
        found.retrace(inputs)
    with torch.set_grad_enabled(create_graph):
        found.push_back(consume=not keep)
    _warn_of_empty_maps(found)
    return found


def record_score(
    forward_func: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    select: Callable[[Any], Tensor],
    sites: Sequence[Site | None],
    additional: tuple[Any, ...] = (),
    *,
    rules: Mapping[Any, Rule] | None = None,
    keep: bool,
    stop_at: Site | None = None,
    create_graph: bool = False,
) -> tuple[Recording, Tensor]:
    """Record a run up to its scores, with the arguments of :func:`explain`.

    Returns:
        The run, and S, (N,).

    Raises:
        ValueError: If a layer did not run, or gives no floating-point tensor, or there is not one score for each image.
    """
    taps = [site for site in sites if site is not None]
    recording = Recording(
        forward_func, with_rules(rules), taps, bypass=keep, stop_at=stop_at, differentiable=create_graph
    )

    def checked(output: Any) -> Tensor:
        if stop_at is not None and not recording.places.calls[stop_at[0]]:
            raise InvalidValueError(
                f"layer must run when the model does, got a {type(stop_at[0]).__name__} that never ran."
            )
        check_sites(recording, taps, stop_at)
        if stop_at is None:
            warn_of_probabilities(recording, output)
        scores = select(output)
        if scores.dim() == 0:  # one number for the whole batch
            return scores.reshape(1)
        _check_rows(scores, inputs[0].shape[0])
        return scores

    return recording, recording.record(inputs, additional, checked)


def _warn_of_empty_maps(found: Explanation) -> None:
    """Warn where a map is zero everywhere because the values of operations such as argmin are frozen."""
    broken = found.recording.broken
    with unrecorded():
        is_empty = broken and any(not any(bool(one.any()) for one in each) for each in found.results.values())
    if is_empty:
        names = ", ".join(f"{name} in {module!r}" if module else name for name, module in broken)
        warnings.warn(
            f"a map is zero everywhere: the values of these operations are frozen, and nothing else reaches the score: "
            f"{names}. All of S is in B. Explain a layer above them.",
            stacklevel=5,
        )


def _check_rows(scores: Tensor, images: int) -> None:
    """Raise unless there is one score for each image.

    Raises:
        ValueError: If not.
    """
    if len(scores) != images:
        raise ValueError(
            f"the model must return one row of scores for each image, got {len(scores)} for {images}. Select one with "
            f"a function as target: lambda out: out.reshape({images}, -1, *out.shape[1:])[:, row, label]."
        )


def check_sites(recording: Recording, sites: Sequence[Site], below: Site | None = None) -> None:
    """Raise for layers that did not run or have nothing to explain; warn of those that ran more than once.

    Raises:
        InvalidValueError: If one did not run.
        ValueError: If one has nothing to explain, or does not lie below the neuron.
    """
    for site in sites:
        layer, at_input = site
        name, calls = type(layer).__name__, recording.places.calls[layer]
        if site not in recording.tapped and below is not None:
            raise ValueError(
                f"to_layer must lie below the neuron's layer, got a {name} that runs later or never. Name a layer "
                "between the input and the neuron."
            )
        if site not in recording.tapped:
            raise InvalidValueError(
                f"layer must run when the model does, got a {name} that never ran. Name a layer on the way to "
                "the score."
            )
        if not recording.tapped[site].values:
            side = "input" if at_input else "output"
            raise ValueError(f"layer must have a floating-point {side}, got none at this {name}. Name another layer.")
        if calls > 1:
            warnings.warn(
                f"a {name} runs {calls} times; its map is that of its last call, and what the calls before it add to "
                "the score is part of B.",
                stacklevel=6,
            )


def warn_of_probabilities(recording: Recording, output: Any) -> None:
    """Warn if the model ends in a softmax or sigmoid."""
    scores = logits_in(output)
    value = recording.value_of(scores) if isinstance(scores, Tensor) else None
    if value is not None and value.probability:
        warnings.warn(
            "the model ends in a softmax or sigmoid, so the score that is explained is a probability, by its tangent. "
            "Explain the logits: leave the last operation out.",
            stacklevel=6,
        )
