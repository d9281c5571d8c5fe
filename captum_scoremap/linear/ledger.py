"""Nothing of S without a place: every constant part of every operation, at the position where it arises.

S = A·Y + B, and B is a sum: every step k above the layer adds A_k·o_k, its coefficients times its constant part o_k (a
bias, a norm's shift, the offset of a saturated unit). Where the step's output has positions, so has its share::

    beta_k(p) = sum over channels c of A_k(c, p) o_k(c, p)
    C_l       = M_l + sum over the steps k above l of beta_k
    sum of C_l + placeless = S

What bypasses the layer (a parallel branch) enters as its sub-scores, at its positions. Head biases and class tokens
have no place in the image; their sum is the *placeless* rest.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from captum_scoremap.checks import is_traced
from captum_scoremap.places import Entry, Frame, MixedImagesError, Placement
from captum_scoremap.rules import Value
from captum_scoremap.scores import Target
from captum_scoremap.tape import Recording, Site, Step, sites_of

from .bias_terms import constant_times, names_of_steps
from .explanation import warn_of_empty_maps
from .subject import Subject, scores_of

__all__ = ["Ledger", "explain_completely", "ledgers"]


@dataclass
class Ledger:
    """The score at a layer, entry by entry, in logits: its score map, ``""``, and every constant above it, by name."""

    frame: Frame
    maps: dict[str, Tensor] = field(default_factory=dict)  # (N, 1, rows, columns), each on its own grid
    placeless: dict[str, Tensor] = field(default_factory=dict)  # (N,): head biases, class tokens

    def enter(self, name: str, entry: Entry) -> None:
        """Enter a map, and what stands beside it without a place."""
        for book, one in zip((self.maps, self.placeless), entry, strict=True):
            if one is None:
                continue
            unique, number = name, 1
            while unique in book and book[unique].shape != one.shape:  # a module with operations on several grids
                number += 1
                unique = f"{name}#{number}"
            book[unique] = book[unique] + one if unique in book else one

    def placeless_sum(self, score: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Return what has no place in the complete map of a size, (N,), in logits, typed like the score."""
        total = sum(self.placeless.values(), torch.zeros_like(score))
        if self.frame.is_padded and "" in self.maps:
            placed = sum(one.flatten(1).sum(1) for one in self.maps.values())
            total = total + (placed - self.complete_map(size).flatten(1).sum(1))
        return total

    def complete_map(self, size: tuple[int, int] | None = None) -> Tensor:
        """Return the complete map C, (N, 1, *size), in logits; by default on its own grid. Sums stay, on the image."""
        grids: dict[tuple[int, int], Tensor] = {}
        for one in self.maps.values():
            grid = (one.shape[2], one.shape[3])
            grids[grid] = grids[grid] + one if grid in grids else one
        if "" not in self.maps:
            raise ValueError("the layer must have a place in the image, (N, C, h, w) or (N, tokens, C); it has none.")
        own = self.maps[""]
        on = self.frame.on_grid if size is None and not self.frame.is_of_image(own) else self.frame.on_image
        size = (own.shape[2], own.shape[3]) if size is None else size
        return torch.stack([on(one, size) for one in grids.values()]).sum(0)


def explain_completely(subject: Subject, target: Target, sites: Sequence[Site | None]) -> tuple[list[Ledger], Tensor]:
    """Return the ledger of each site, and the score S, (N,), of images (N, C, H, W)."""
    (image,) = subject.inputs
    recording, score = subject.record(scores_of(target, len(image)), sites, keep_bypass=True)
    for site in sites:
        if any(len(y.shape) < 3 for y in recording.tapped[site].activations):
            shape = tuple(recording.tapped[site].activations[0].shape)
            raise ValueError(f"layer must return a map (N, C, h, w) or tokens (N, tokens, C), got {shape}.")
    with torch.no_grad():
        found = ledgers(recording, recording.tape.seeds(torch.ones_like(score)), score, sites, image.shape)
    warn_of_empty_maps(recording, score, [book.maps.values() for book in found if "" in book.maps])
    return found, score


def ledgers(
    recording: Recording,
    seeds: Mapping[Value, Tensor],
    score: Tensor,
    sites: Sequence[Site | None],
    image_shape: Sequence[int],
) -> list[Ledger]:
    """Return the ledger of each site, all from one pass over the transposed steps of a run that kept what bypasses it.

    The passes start at the coefficients, (N, ...), of the score, S (N,), in the value that it is read from. Where an
    operation holds the images in an order that is not known, as regions of interest, heads of attention or windows, it
    takes one pass for each image.

    Raises:
        MixedImagesError: If even so it cannot be told of which image something is.
    """
    placed = Placement(recording.tape, image_shape)
    try:
        return _filled(recording, score, sites, [(placed, seeds)])
    except MixedImagesError:
        if is_traced():
            raise
        passes = [(placed.of_image(image), _of_image(seeds, image)) for image in range(len(score))]
        return _filled(recording, score, sites, passes)


def _of_image(seeds: Mapping[Value, Tensor], image: int) -> dict[Value, Tensor]:
    """Return the coefficients of one image's score."""
    each = {value: torch.zeros_like(seed) for value, seed in seeds.items()}
    for value, seed in seeds.items():
        each[value][image] = seed[image]
    return each


def _filled(
    recording: Recording,
    score: Tensor,
    sites: Sequence[Site | None],
    passes: Sequence[tuple[Placement, Mapping[Value, Tensor]]],
) -> list[Ledger]:
    """Return the ledgers, filled by passes over the transposed steps."""
    tape = recording.tape
    names = names_of_steps(recording)
    books = [(Ledger(passes[0][0].frame), recording.tapped[site]) for site in sites]

    def fill(placed: Placement, seeds: Mapping[Value, Tensor]) -> None:
        def visit(step: Step, gradients: Sequence[Tensor | None], shares: Sequence[Tensor | None]) -> None:
            reads = sites_of(step.values)
            for value, gradient, constant in zip(step.outputs, gradients, step.constants(), strict=False):
                if gradient is not None and constant is not None:
                    entry = placed(constant_times(constant.to(gradient.dtype), gradient), value)
                    for book, tapped in books:
                        if reads & tapped.bit:
                            book.enter(names(step), entry)
            for value, share in zip(step.values, shares, strict=True):
                beside = [book for book, tapped in books if reads & ~value.sites & tapped.bit]
                if beside and share is not None:
                    for name, entry in _beside(placed, step, names(step), value, share, gradients):
                        for book in beside:
                            book.enter(name, entry)

        wanted: dict[Value, Callable[[Tensor], Tensor]] = {
            value: y.mul for _, tapped in books for value, y in zip(tapped.values, tapped.activations, strict=True)
        }
        found = tape.transposed(seeds, wanted, visit=visit)
        for book, tapped in books:
            for value, y in zip(tapped.values, tapped.activations, strict=True):
                product = found[value] if value in found else torch.zeros_like(y)
                book.enter("", placed(product, value))

    for placed, seeds in passes:
        fill(placed, seeds)
    for book, tapped in books:
        if not any(value.sites & tapped.bit for value in seeds):  # the score does not depend on the layer
            book.enter("score", (None, score))
        if len(passes) == 1 and not is_traced():
            _check_images(book, score)
    return [book for book, _ in books]


def _beside(
    placed: Placement, step: Step, name: str, value: Value, share: Tensor, gradients: Sequence[Tensor | None]
) -> Iterator[tuple[str, Entry]]:
    """Yield what a value that does not depend on a layer adds beside it, by name."""
    if value.sites & Value.IMAGE:
        yield f"beside {name}", placed(constant_times(value.kept.tensor, share), value)
        return
    # a constant, though a layer's: it stands where the step's own do
    alone = [value.kept.tensor if other is value else other.zeros() for other in step.values]
    for output, gradient, constant in zip(step.outputs, gradients, step.linear(alone), strict=True):
        if gradient is not None:
            yield name, placed(constant_times(constant, gradient), output)


def _check_images(book: Ledger, score: Tensor) -> None:
    """Raise where shapes gave entries to the wrong images: of as many tokens as images either may come first."""
    entries = [one.flatten(1) for one in book.maps.values()] + [one[:, None] for one in book.placeless.values()]
    together = torch.cat(entries, 1).to(score.dtype)
    off = (together.sum(1) - score).abs() / together.abs().sum(1).clamp_min(torch.finfo(score.dtype).tiny)
    if len(score) > 1 and bool((off > torch.finfo(score.dtype).eps ** 0.5).any()):
        raise MixedImagesError(
            f"of every operation it must be known which of the {len(score)} images it is of, got tensors that hold as "
            "many tokens as images. Explain one image at a time."
        )
