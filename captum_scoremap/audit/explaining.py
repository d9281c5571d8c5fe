"""What one batch of images yields: scores, and score maps of each chosen layer for the labels of interest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from captum_scoremap.layout import map_channel_dim, token_grid
from captum_scoremap.linear import Reduction
from captum_scoremap.rules import with_rules
from captum_scoremap.tape import Recording, Site, Tape, Tapped

__all__ = ["ROLES", "Explained", "MapLayer", "explain", "map_layers"]

ROLES = ("predicted", "runner_up", "true")
"""Whose score a map explains. Any contrast is the difference of two of them."""


@dataclass(frozen=True)
class MapLayer:
    """A layer whose output is laid out over the image.

    Attributes:
        name: Name of its module.
        channel_dim: Dimension of the channels: 1 for (N, C, H, W), -1 for (N, H, W, C) and (N, tokens, C).
    """

    name: str
    channel_dim: int = 1


@dataclass(frozen=True)
class Explained:
    """Score maps of one batch.

    Attributes:
        scores: Scores of all labels, (N, K), in logits.
        labels: Label of each role, (N, 3), in the order of `ROLES`; -1 where the true label is not known.
        maps: For each layer the score map of each role, (N, 3, H, W), in logits; zero where there is no label.
        sums: For each layer the sum A·Y of the predicted label, (N,), in logits; that of its map, and of tokens that
            have no place in the image.
        biases: For each layer B of the predicted label, (N,), in logits.
        residuals: For each layer |S − (A·Y + B)| of the predicted label, (N,), in logits.
    """

    scores: Tensor
    labels: Tensor
    maps: Mapping[str, Tensor]
    sums: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    residuals: Mapping[str, Tensor]


@torch.no_grad()
def explain(model: nn.Module, layers: Sequence[MapLayer], inputs: Tensor, true: Tensor) -> Explained:
    """Explain one batch: one recorded run, one transposed pass for each role, one forward pass for each layer's B.

    Args:
        model: The network, in eval mode.
        layers: Its layers to map. Of one that runs more than once, the last call counts.
        inputs: Images (N, C, H, W).
        true: True labels (N,), -1 where not known.

    Returns:
        The score maps.

    Raises:
        ValueError: If the model does not score labels, a true label is none of them, or a layer does not run or does
            not give one floating-point tensor.
        UnsupportedOperationError: If operations of the model have no rule; all are listed.
    """
    sites: dict[MapLayer, Site] = {layer: (model.get_submodule(layer.name), False) for layer in layers}
    recording = Recording(model, with_rules(None), list(dict.fromkeys(sites.values())), bypass=True)
    scores = recording.record((inputs,))
    _check_scores(scores, true)
    tapped = {layer: _tapped(recording, site, layer.name) for layer, site in sites.items()}
    labels = torch.cat([scores.topk(2, dim=1).indices, true[:, None]], dim=1)
    maps: dict[MapLayer, list[Tensor]] = {layer: [] for layer in tapped}
    sums: dict[str, Tensor] = {}
    for role in range(len(ROLES)):
        # A role that repeats another, or has no label, needs no pass of its own.
        wanted = (labels[:, role] >= 0) & (labels[:, :role] != labels[:, role, None]).all(1)
        one_hot = torch.zeros_like(scores).scatter(1, labels[:, role, None].clamp(min=0), wanted[:, None].to(scores))
        found = _score_maps(recording.tape, one_hot if wanted.any() else None, tapped)
        for layer, score_map in found.items():
            maps[layer].append(score_map if layer.channel_dim == 1 else token_grid(score_map))
            if role == 0:
                sums[layer.name] = score_map.flatten(1).sum(1)
    score = scores.gather(1, labels[:, :1])[:, 0]
    biases = {
        layer.name: _scores_at_zero(recording.tape, scores, tap).gather(1, labels[:, :1])[:, 0]
        for layer, tap in tapped.items()
    }
    return Explained(
        scores,
        labels,
        maps={layer.name: torch.cat(found, 1) for layer, found in maps.items()},
        sums=sums,
        biases=biases,
        residuals={name: (score - (sums[name] + biases[name])).abs() for name in sums},
    )


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


def _score_maps(
    tape: Tape, coefficients: Tensor | None, layers: Mapping[MapLayer, Tapped]
) -> Mapping[MapLayer, Tensor]:
    """Return each layer's A·Y, summed over channels, for given coefficients of the scores; zero where there are none.

    Args:
        tape: The recorded run.
        coefficients: Weights (N, K) of the scores; None if all are zero.
        layers: The layers and what they returned.

    Returns:
        The map of each layer, laid out as the layer is.
    """
    output = tape.value_of_output()
    reductions = {layer: Reduction(channel_dim=layer.channel_dim) for layer in layers}
    wanted = {
        tapped.values[0]: partial(reductions[layer], activations=tapped.activations[0])
        for layer, tapped in layers.items()
    }
    found = {} if output is None or coefficients is None else tape.transposed({output: coefficients}, wanted)
    maps = {}
    for layer, tapped in layers.items():
        (value,), (y,) = tapped.values, tapped.activations
        maps[layer] = found[value] if value in found else y.new_zeros(reductions[layer].shape(y))
    return maps


def _scores_at_zero(tape: Tape, scores: Tensor, tapped: Tapped) -> Tensor:
    """Return the scores (N, K) of the frozen model with a layer at zero: B of every label. This does not use A."""
    output = tape.value_of_output()
    if output is None or not output.sites & tapped.bit:
        return scores
    zeros = {value: value.zeros() for value in tapped.values}
    return tape.forward(zeros, [output], sites=tapped.bit)[output]


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
        with torch.no_grad():
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


def _check_scores(scores: object, true: Tensor) -> None:
    if not isinstance(scores, Tensor) or scores.dim() != 2 or scores.shape[1] < 2:
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"model must give scores (N, K) of at least two labels, got {got}.")
    if int(true.max()) >= scores.shape[1]:
        raise ValueError(f"labels must be less than {scores.shape[1]}, the model's, got {int(true.max())}.")
