"""What one batch of images yields: scores, and score maps of each chosen layer for the labels of interest."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from captum_scoremap.layout import map_channel_dim, token_grid
from captum_scoremap.linear import Reduction, ledgers, main_layers
from captum_scoremap.rules import Value, with_rules
from captum_scoremap.scores import logits_in, shape_or_type
from captum_scoremap.settings import module_by_module
from captum_scoremap.tape import Recording, Site, Tape, Tapped, nonfinite_allowed

__all__ = ["MAPS", "ROLES", "Explained", "MapLayer", "explain", "layers_to_pool", "map_layers", "pooled"]

MAPS = ("score", "complete")
"""Kinds of maps: the score map A·Y of a layer, or its complete map, with all of B that has a place."""

ROLES = ("predicted", "runner_up", "true")
"""Whose score a map explains. Any contrast is the difference of two of them."""

_ACTIVATIONS = nn.ReLU.__module__  # where PyTorch keeps its activation functions as modules
_CHANNELS = 8  # a layer of fewer is the image, or near it
_POOLED = 8  # layers


@dataclass(frozen=True)
class MapLayer:
    """A layer whose output is laid out over the image.

    Attributes:
        name: Name of its module.
        channel_dim: Dimension of the channels: 1 for (N, C, H, W), -1 for (N, H, W, C) and (N, tokens, C).
    """

    name: str
    channel_dim: int = 1

    def as_images(self, output: Tensor) -> Tensor:
        """Return what is shaped like the output, or like it summed over channels to size 1, as (N, C or 1, H, W)."""
        return output if self.channel_dim == 1 else token_grid(output)


@dataclass(frozen=True)
class Explained:
    """Maps of one batch, for each role in the order of `ROLES`.

    Attributes:
        scores: Scores of all labels, (N, K), in logits.
        labels: Label of each role, (N, 3); -1 where there is none: a true label that is not known, the runner-up of a
            single score.
        maps: For each layer the map of each role, (N, 3, H, W), in logits; zero where there is no label, or where
            a role before has the same.
        sums: For each layer the sum A·Y of each role, (N, 3), in logits: that of its map, and of tokens that have no
            place in the image. Of complete maps the sum of the map.
        biases: For each layer B of each role, (N, 3), in logits; of complete maps what has no place.
        channels: For each layer A·Y of the predicted label for each channel, summed over positions, (N, C), in logits.
        pooled: For each layer of those to pool the mean and the maximum of Y over positions, (N, 2, C).
    """

    scores: Tensor
    labels: Tensor
    maps: Mapping[str, Tensor]
    sums: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    channels: Mapping[str, Tensor]
    pooled: Mapping[str, Tensor]

    @property
    def role_scores(self) -> Tensor:
        """Return S of each role, (N, 3), in logits; zero where there is no label."""
        return _of_labels(self.scores, self.labels)

    @property
    def residuals(self) -> Mapping[str, Tensor]:
        """Return for each layer |S − (A·Y + B)| of each role, (N, 3), in logits, added in double precision."""
        return {
            name: (self.role_scores.double() - total.double() - self.biases[name].double()).abs()
            for name, total in self.sums.items()
        }

    @property
    def finite(self) -> Tensor:
        """Return whether all that an image yields is a finite number, (N,)."""
        books = (self.maps, self.sums, self.biases, self.channels, self.pooled)
        parts = [self.role_scores, *(part for book in books for part in book.values())]
        return torch.stack([torch.isfinite(part).flatten(1).all(1) for part in parts]).all(0)

    def take(self, images: Tensor) -> "Explained":
        """Return the same of some images.

        Args:
            images: Which, as a mask (N,).

        Returns:
            Their maps.
        """
        all_books = (self.maps, self.sums, self.biases, self.channels, self.pooled)
        books = ({name: one[images] for name, one in book.items()} for book in all_books)
        return Explained(self.scores[images], self.labels[images], *books)


@torch.no_grad()
@nonfinite_allowed()  # one image must not end the audit
def explain(
    model: nn.Module,
    layers: Sequence[MapLayer],
    inputs: Tensor,
    true: Tensor,
    pool: Sequence[MapLayer] = (),
    kind: str = "score",
    passes: int | None = None,
) -> Explained:
    """Explain one batch: one recorded run, one transposed pass for each role, one forward pass for each layer's B.

    Args:
        model: The network, in eval mode.
        layers: Its layers to map. Of one that runs more than once, the last call counts.
        inputs: Images (N, C, H, W).
        true: True labels (N,), -1 where not known.
        pool: Layers whose output is pooled over positions.
        kind: One of `MAPS`.
        passes: How many roles get a transposed pass, whether or not they need one, so that the operations do not depend
            on the labels; None for those that need it.

    Returns:
        The maps.

    Raises:
        ValueError: If the model does not give scores, a true label is none of them, or a layer does not run or does
            not give one floating-point tensor.
        UnsupportedOperationError: If operations of the model have no rule; all are listed.
    """
    sites: dict[MapLayer, Site] = {layer: (model.get_submodule(layer.name), False) for layer in (*layers, *pool)}
    recording = Recording(model, with_rules(None), list(dict.fromkeys(sites.values())), keep_bypass=True)
    scores = recording.record((inputs,), (), logits_in)
    _check_scores(scores, true if passes is None else None)
    found_at = {layer: _tapped(recording, site, layer.name) for layer, site in sites.items()}
    tapped = {layer: found_at[layer] for layer in layers}
    labels = _labels(scores, true)
    roles = []
    channels: dict[str, Tensor] = {}
    for role in range(len(ROLES)):
        # A role that repeats another, or has no label, needs no pass of its own.
        wanted = (labels[:, role] >= 0) & (labels[:, :role] != labels[:, role, None]).all(1)
        one_hot = torch.zeros_like(scores).scatter(1, labels[:, role, None].clamp(min=0), wanted[:, None].to(scores))
        if kind == "score" or role == 0:
            is_needed = bool(wanted.any()) if passes is None else role < passes
            parts = _sub_scores(recording.tape, one_hot if is_needed else None, tapped, every_channel=role == 0)
        if role == 0:
            channels = {one.name: part.movedim(one.channel_dim, 1).flatten(2).sum(2) for one, part in parts.items()}
        if kind == "score":
            roles.append(_score_maps(parts, every_channel=role == 0))
        else:
            places = {layer: sites[layer] for layer in layers}
            roles.append(_complete_maps(recording, one_hot, (scores * one_hot).sum(1), places, inputs))
    found = Explained(
        scores,
        labels,
        maps={layer.name: torch.cat([one[layer].map for one in roles], 1) for layer in layers},
        sums={layer.name: torch.stack([one[layer].total for one in roles], 1) for layer in layers},
        biases={layer.name: torch.stack([one[layer].rest for one in roles], 1) for layer in layers},
        channels=channels,
        pooled={layer.name: pooled(found_at[layer].activations[0], layer.channel_dim) for layer in pool},
    )
    if kind == "score":
        biases = {
            layer.name: _of_labels(_scores_at_zero(recording.tape, scores, tap), labels)
            for layer, tap in tapped.items()
        }
        found = replace(found, biases=biases)
    return _with_repeated_roles(found)


def _labels(scores: Tensor, true: Tensor) -> Tensor:
    """Return the label of each role, (N, 3); a single score has no runner-up and no true label."""
    if scores.shape[1] == 1:
        return torch.cat([torch.zeros_like(true)[:, None], torch.full_like(true, -1)[:, None].expand(-1, 2)], dim=1)
    return torch.cat([scores.topk(2, dim=1).indices, true[:, None]], dim=1)


def _of_labels(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the score of each label, (N, K) and (N, roles) to (N, roles); zero where the label is -1."""
    return scores.gather(1, labels.clamp(min=0)).where(labels >= 0, 0)


@dataclass(frozen=True)
class _RoleMap:
    """One role's map of one layer, (N, 1, H, W); the sum of its sub-scores and what a complete map leaves, (N,)."""

    map: Tensor
    total: Tensor
    rest: Tensor


def _with_repeated_roles(found: Explained) -> Explained:
    """Give a role that has the label of one before it that one's numbers."""
    first = (found.labels[:, :, None] == found.labels[:, None, :]).int().argmax(2)
    sums, biases = ({name: one.gather(1, first) for name, one in book.items()} for book in (found.sums, found.biases))
    return replace(found, sums=sums, biases=biases)


def pooled(activations: Tensor, channel_dim: int) -> Tensor:
    """Return the mean and the maximum of a layer's output over positions.

    Args:
        activations: Y, (N, C, H, W), (N, H, W, C) or (N, tokens, C).
        channel_dim: Dimension of the channels.

    Returns:
        (N, 2, C).

    Example:
        >>> pooled(torch.tensor([[[[0.0, 2.0]]]]), 1).tolist()
        [[[1.0], [2.0]]]
    """
    positions = activations.movedim(channel_dim, 1).flatten(2)
    return torch.stack([positions.mean(2), positions.amax(2)], 1)


def _tapped(recording: Recording, site: Site, name: str) -> Tapped:
    """Return what a layer returned.

    Args:
        recording: The run.
        site: The layer's output.
        name: The layer's name.

    Returns:
        Its one tensor.

    Raises:
        ValueError: If it did not run, or did not return one floating-point tensor.
    """
    tapped = recording.tapped.get(site)
    if tapped is None:
        raise ValueError(f"layers must run when the model does, got {name!r}, which does not.")
    if len(tapped.values) != 1:
        raise ValueError(f"layers must give one floating-point tensor, got {len(tapped.values)} from {name!r}.")
    return tapped


def _sub_scores(
    tape: Tape, coefficients: Tensor | None, layers: Mapping[MapLayer, Tapped], *, every_channel: bool
) -> Mapping[MapLayer, Tensor]:
    """Return A·Y of each layer for given coefficients of the scores; zero where nothing depends on it.

    Args:
        tape: The recorded run.
        coefficients: Weights (N, K) of the scores; None if all are zero.
        layers: The layers and what they returned.
        every_channel: Whether to leave the channels apart, or to sum over them.

    Returns:
        The sub-scores of each layer, laid out as the layer is.
    """
    output = tape.value_of_output()
    reductions = {layer: Reduction(channel_dim=None if every_channel else layer.channel_dim) for layer in layers}
    wanted: dict[Value, Callable[[Tensor], Tensor]] = {
        tapped.values[0]: partial(reductions[layer], activations=tapped.activations[0])
        for layer, tapped in layers.items()
    }
    found = {} if output is None or coefficients is None else tape.transposed({output: coefficients}, wanted)
    maps = {}
    for layer, tapped in layers.items():
        (value,), (y,) = tapped.values, tapped.activations
        maps[layer] = found[value] if value in found else y.new_zeros(reductions[layer].shape(y))
    return maps


def _score_maps(parts: Mapping[MapLayer, Tensor], *, every_channel: bool) -> Mapping[MapLayer, _RoleMap]:
    """Return the score map of each layer, given its sub-scores, of every channel or summed over them."""
    maps = {}
    for layer, part in parts.items():
        score_map = part.sum(layer.channel_dim, keepdim=True) if every_channel else part
        total = score_map.flatten(1).sum(1)
        placed = layer.as_images(score_map)
        maps[layer] = _RoleMap(placed, total, torch.zeros_like(total))
    return maps


def _complete_maps(
    recording: Recording, coefficients: Tensor, score: Tensor, sites: Mapping[MapLayer, Site], inputs: Tensor
) -> Mapping[MapLayer, _RoleMap]:
    """Return the complete map of each layer on its own grid, for given coefficients of the scores.

    Args:
        recording: The run.
        coefficients: Weights (N, K) of the scores.
        score: The score (N,) that they give.
        sites: The layers and where they are in the model.
        inputs: Images (N, C, H, W).

    Returns:
        The map of each layer.
    """
    output = recording.tape.value_of_output()
    seeds = {} if output is None else {output: coefficients}
    books = ledgers(recording, seeds, score, list(sites.values()), inputs.shape)
    maps = {}
    for layer, book in zip(sites, books, strict=True):
        complete = book.complete_map()
        maps[layer] = _RoleMap(complete, complete.flatten(1).sum(1), book.placeless_sum(score))
    return maps


def _scores_at_zero(tape: Tape, scores: Tensor, tapped: Tapped) -> Tensor:
    """Return the scores (N, K) of the frozen model with a layer at zero: B of every label. This does not use A."""
    output = tape.value_of_output()
    if output is None or not output.sites & tapped.bit:
        return scores
    zeros = {value: value.zeros() for value in tapped.values}
    return tape.forward(zeros, [output], sites=tapped.bit)[output]


def layers_to_pool(model: nn.Module, inputs: Tensor) -> tuple[MapLayer, ...]:
    """Choose the layers whose channels may tell labels apart: main ones, and the first activation of each resolution.

    Args:
        model: The network, in eval mode; it runs twice.
        inputs: An image (1, C, H, W).

    Returns:
        At most eight layers of at least eight channels, in the order in which they run; fewer channels are the image.
    """
    shapes: dict[str, list[tuple[int, ...]]] = {}
    parts: dict[str, set[str]] = {}  # of a module that returns what its last part did, these parts
    last: tuple[str, object] = ("", None)

    def note(name: str, output: object) -> None:
        nonlocal last
        shapes.setdefault(name, []).append(tuple(output.shape) if isinstance(output, Tensor) else ())
        parts[name] = {last[0], *parts[last[0]]} if output is last[1] else set()
        last = (name, output)

    with ExitStack() as stack, torch.no_grad(), module_by_module():
        for name, module in model.named_modules():
            handle = module.register_forward_hook(lambda _, __, output, name=name: note(name, output))
            stack.callback(handle.remove)
        model(inputs)
    main = main_layers(model, inputs)
    chosen: dict[str, MapLayer] = {}
    seen: set[tuple[int, ...]] = set()
    for name, (shape, *again) in shapes.items():
        first = type(model.get_submodule(name)).__module__ == _ACTIVATIONS and len(shape) == 4
        if again or not name or not (name in main or first) or parts[name] & chosen.keys():
            continue
        channel_dim = -1 if len(shape) == 3 else map_channel_dim(shape, tuple(inputs.shape))
        if channel_dim is None or shape[channel_dim] < _CHANNELS:
            continue
        size = shape[2:] if channel_dim == 1 else shape[1:-1]
        if name in main or size not in seen:
            chosen[name] = MapLayer(name, channel_dim)
        seen.add(size)
    return tuple(chosen.values())[:_POOLED]


def map_layers(model: nn.Module, names: Sequence[str], inputs: Tensor) -> tuple[MapLayer, ...]:
    """Find out how the outputs of layers are laid out.

    Args:
        model: The network, in eval mode; it runs once.
        names: Names of its layers.
        inputs: An image (1, C, H, W).

    Returns:
        The layers.

    Raises:
        ValueError: If the output of one is not laid out over the image.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str, output: object) -> None:
        shapes[name] = tuple(output.shape) if isinstance(output, Tensor) else ()

    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: note(name, output))
        for name in names
    ]
    try:
        with torch.no_grad(), module_by_module():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(_map_layer(name, shapes.get(name), tuple(inputs.shape)) for name in names)


def _map_layer(name: str, shape: tuple[int, ...] | None, image_shape: tuple[int, ...]) -> MapLayer:
    if shape is None:
        raise ValueError(f"layers must run when the model does, got {name!r}, which does not.")
    if len(shape) == 3:
        return MapLayer(name, -1)
    if len(shape) == 4:
        return MapLayer(name, map_channel_dim(shape, image_shape) or 1)
    raise ValueError(f"layers must give maps (N, C, H, W) or tokens (N, tokens, C), got {shape} from {name!r}.")


def _check_scores(scores: object, true: Tensor | None) -> None:
    if not isinstance(scores, Tensor) or scores.dim() != 2 or scores.shape[1] < 1:
        raise ValueError(
            f"model must give scores (N, K), one for each label, got {shape_or_type(scores)}. Name a score: audit's "
            "score, or --score."
        )
    if true is not None and scores.shape[1] > 1 and int(true.max()) >= scores.shape[1]:
        raise ValueError(f"labels must be less than {scores.shape[1]}, the model's, got {int(true.max())}.")
