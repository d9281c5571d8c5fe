"""One recorded run and what is read off its tape: S, A·Y and B at any number of sites."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from captum_scoremap.checks import unrecorded, warn
from captum_scoremap.places import MixedImagesError, warn_of_no_maps
from captum_scoremap.rules import Value
from captum_scoremap.scores import Target
from captum_scoremap.tape import Recording, Site, Tape, Tapped, check_finite, collector_paused

from .reduction import Reduction
from .subject import Subject, scores_of

__all__ = ["Explanation", "explain", "image_axis", "warn_of_empty_maps"]

# What a straight-through estimator is taken of.
_ROUNDING = {"round", "floor", "ceil", "trunc", "sign"}

# Where a value is frozen that much may depend on, so that a map below it can be empty though the score is live.
_BREAKS = {*_ROUNDING, "argmax", "argmin", "bucketize", "searchsorted", "nonzero", "to_copy"}  # to whole numbers

# How many frozen operations a warning names, the last ones.
_NAMED = 5


class Explanation:
    """A recorded run, its score S, (N,), and what is wanted of A and Y at every site; the site of the input is None."""

    def __init__(self, recording: Recording, score: Tensor, sites: Sequence[Site | None], reduction: Reduction) -> None:
        self.recording = recording
        self.score = score
        self._reduction = reduction
        self.results: dict[Site | None, tuple[Tensor, ...]] = {}
        self.reached: set[Site | None] = set()
        self._sites = tuple(sites)
        self._activations: dict[Value, Tensor] = {}

    @property
    def tape(self) -> Tape:
        """The tape of the run."""
        return self.recording.tape

    def tapped(self, site: Site | None) -> Tapped:
        """Return the tensors of a site."""
        return self.recording.tapped[site]

    def retrace(self, inputs: tuple[Tensor, ...]) -> None:
        """Make the results differentiable, in the inputs and in the model's parameters."""
        known = {value: tensor for value, tensor in zip(self.tape.inputs, inputs, strict=True) if value is not None}
        seed = self.tape.value_of_output()
        self._activations = self.tape.retraced(known)
        if seed is not None:
            self.score = self._activations[seed]
            self.tape.output, self.tape.output_values = self.score, {id(self.score): seed}

    def push_back(self, *, consume: bool) -> None:
        """Take the coefficients at all sites in one pass over the transposed steps."""
        wanted: dict[Value, Callable[[Tensor], Tensor]] = {}
        for site in self._sites:
            tapped = self.tapped(site)
            wanted |= {
                value: self._reduction.at(self._activations.get(value, y))
                for value, y in zip(tapped.values, tapped.activations, strict=True)
            }
        if consume:  # each Y is held by what is made of it alone, so that it is freed once its map is made
            for value in wanted:
                value.kept = None
        found = self.tape.transposed(self.tape.seeds(torch.ones_like(self.score)), wanted, consume=consume)
        for site in self._sites:
            values = self.tapped(site).values
            self.results[site] = tuple(
                found[value]
                if value in found
                else torch.zeros(self._reduction.shape(value), dtype=value.dtype, device=value.device)
                for value in values
            )
            if any(value in found for value in values):
                self.reached.add(site)

    @torch.no_grad()
    def bias(self, site: Site | None) -> Tensor:
        """Return B, (N,): the steps above a site run forward with its tensors at zero.

        This does not use A: together with S, as the model gave it, it checks A·Y.
        """
        value, tapped = self.tape.value_of_output(), self.tapped(site)
        if value is None or not value.sites & tapped.bit:
            return self.score
        found = self.tape.forward({one: one.zeros() for one in tapped.values}, [value], sites=tapped.bit)[value]
        check_finite([found], "the constant part of the score")
        return found

    @torch.no_grad()
    def sums(self, site: Site | None) -> Tensor:
        """Return the sum of A·Y for each image, (N,)."""
        products: Sequence[Tensor] = self.results[site]
        if not self._reduction.multiply:
            products = [a * y for a, y in zip(products, self.tapped(site).activations, strict=True)]
        try:
            return self.sums_of(products, site)
        except MixedImagesError:  # a layer of regions, or in whose tensor images mix: one pass for each image's score
            return torch.stack([self._sum_of_image(row, site) for row in torch.eye(len(self.score)).to(self.score)])

    def _sum_of_image(self, row: Tensor, site: Site | None) -> Tensor:
        """Return the sum of A·Y of one image's score, which has a 1 in the row."""
        tapped = self.tapped(site)
        pairs = zip(tapped.values, tapped.activations, strict=True)
        found = self.tape.transposed(self.tape.seeds(row), {value: y.mul for value, y in pairs})
        return sum((product.sum() for product in found.values()), torch.zeros_like(self.score[0]))

    def residual(self, site: Site | None) -> Tensor:
        """Return S - (A·Y + B), (N,): the delta."""
        return self.score - self.sums(site) - self.bias(site)

    @torch.no_grad()
    def sums_of(self, products: Sequence[Tensor], site: Site | None) -> Tensor:
        """Return the sum for each image, (N,), of what is shaped like a site, or like it without its channels."""
        tapped, total = self.tapped(site), torch.zeros_like(self.score)
        for value, y, product in zip(tapped.values, tapped.activations, products, strict=True):
            axis = self._axis(value, y, product)
            if axis is not None:
                total = total + product.movedim(axis, 0).reshape(len(total), -1).sum(1)
        return total

    def _axis(self, value: Value, activations: Tensor, product: Tensor) -> int | None:
        """Return the dimension of a layer's tensor that holds the images; None where it holds none."""
        count = len(self.score)
        # what does not depend on the images may have as many rows by chance
        if count == 1 or (
            value.is_of_image and [axis for axis, size in enumerate(product.shape) if size == count] == [0]
        ):
            return 0
        with unrecorded():
            return image_axis(self.tape, self.tape.seeds, value, count, activations)


def image_axis(
    tape: Tape, seeds: Callable[[Tensor], Mapping[Value, Tensor]], value: Value, count: int, activations: Tensor
) -> int | None:
    """Return the dimension of a layer's tensor along which its images lie, None if the scores do not depend on it.

    It is found by weighing the N images' scores: where the images lie, the coefficients of the weighted scores are the
    weighted coefficients. The dimension's size is N, or a multiple, image by image. The seeds are where the transposed
    steps start, given weights (N,).

    Raises:
        MixedImagesError: If there is none.
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
    raise MixedImagesError(
        f"a layer's tensor must hold the {count} images along one dimension, got {tuple(plain.shape)}, where they "
        "mix. Explain one image at a time."
    )


@collector_paused()  # until most of what the run made is gone: to look through it takes a tenth of the time of a map
def explain(
    subject: Subject,
    target: Target,
    sites: Sequence[Site | None],
    reduction: Reduction,
    *,
    keep: bool,
    stop_at: Site | None = None,
    create_graph: bool = False,
) -> Explanation:
    """Record a run and take, in one pass over the transposed steps, what is wanted of A and Y at every site.

    The target is a label of each image, or a function from the model's output to (N,), or, with ``stop_at``, from what
    passes there. With ``keep`` the tape is kept, and what bypasses the sites, for the explanation's bias, sums and
    residual; else what is used of it is freed on the way. ``stop_at`` and ``create_graph`` are those of
    :meth:`Subject.record`.

    Returns:
        The explanation.
    """
    select = scores_of(target, len(subject.inputs[0]), of_layer=stop_at is not None)
    recording, score = subject.record(select, sites, keep_bypass=keep, stop_at=stop_at, create_graph=create_graph)
    if reduction.channel_dim is not None:
        warn_of_no_maps(recording, [site for site in sites if site], subject.inputs[0].shape)
    found = Explanation(recording, score, sites, reduction)
    if create_graph:
        found.retrace(subject.inputs)
    with torch.set_grad_enabled(create_graph):
        found.push_back(consume=not keep)
    warn_of_empty_maps(recording, score, found.results.values())
    return found


def warn_of_empty_maps(recording: Recording, score: Tensor, maps: Iterable[Iterable[Tensor]]) -> None:
    """Warn where maps are zero everywhere: of layers of other arguments, and where values such as argmin's are frozen.

    Of layers that depend on no argument nothing is said: they make weights.
    """
    if recording.leaves_layers and recording.has_additional:
        maps = [list(each) for each in maps]
        with unrecorded():
            is_zero = not any(bool(one.any()) for each in maps for one in each)
        if is_zero:
            warn(
                "a map is zero everywhere: the layer does not depend on the image, and is a constant factor of what "
                "does. All of S is in B. To explain the layer, make what it depends on the input, and the image an "
                "additional argument."
            )
            return
    # whatever the score depends on, and all where it was made of numbers that left
    is_frozen = recording.has_frozen(score) or (recording.sight.single_exits > 0 and not recording.is_live(score))
    frozen = [(name, module) for name, module in recording.frozen if is_frozen or name in _BREAKS]
    with unrecorded():
        is_empty = frozen and any(not any(bool(one.any()) for one in each) for each in maps)
    if not is_empty:
        return
    names = [f"{name} in {module!r}" if module else name for name, module in frozen]
    more = f"{len(names) - _NAMED} before, " if len(names) > _NAMED else ""
    straight = sorted({name for name, _ in frozen} & _ROUNDING)
    rules = ", ".join(f'"{name}": Rounded()' for name in straight)
    passed = f", or pass them straight through: rules={{{rules}}}, with `from captum_scoremap.rules import Rounded`"
    warn(
        "a map is zero everywhere: the values of these operations are frozen, and nothing else reaches the score: "
        f"{more}{', '.join(names[-_NAMED:])}. All of S is in B. Explain a layer above them{passed if straight else ''}."
    )
