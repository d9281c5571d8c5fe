"""What one batch of images yields: scores, and score maps of each chosen layer for the labels of interest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["ROLES", "Explained", "explain", "last_layers"]

ROLES = ("predicted", "runner_up", "true")
"""Whose score a map explains. Any contrast is the difference of two of them."""


@dataclass(frozen=True)
class Explained:
    """Score maps of one batch.

    Attributes:
        scores: Scores of all labels, ``(N, K)``, in logits.
        labels: Label of each role, ``(N, 3)``, in the order of `ROLES`; -1 where the true label is not known.
        maps: For each layer the score map of each role, ``(N, 3, H, W)``.
        biases: For each layer B of the predicted label, ``(N,)``.
        residuals: For each layer |S − (A·Y + B)| of the predicted label, ``(N,)``.
    """

    scores: Tensor
    labels: Tensor
    maps: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    residuals: Mapping[str, Tensor]


def explain(model: nn.Module, layers: Sequence[str], inputs: Tensor, true: Tensor) -> Explained:
    """Explain one batch.

    Args:
        model: The network, in eval mode.
        layers: Names of its layers.
        inputs: Images ``(N, C, H, W)``.
        true: True labels ``(N,)``, -1 where not known.

    Returns:
        The score maps.
    """
    kept: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: kept.__setitem__(name, out)
        )
        for name in layers
    ]
    with torch.enable_grad():
        scores = model(inputs.requires_grad_())
    for hook in hooks:
        hook.remove()
    top = scores.detach().topk(2, dim=1).indices
    labels = torch.cat([top, true[:, None]], dim=1)
    maps: dict[str, list[Tensor]] = {name: [] for name in layers}
    for role in range(3):
        chosen = labels[:, role].clamp(min=0)
        picked = scores.gather(1, chosen[:, None]).sum()
        gradients = torch.autograd.grad(picked, [kept[name] for name in layers], retain_graph=True)
        for name, gradient in zip(layers, gradients, strict=True):
            maps[name].append((gradient * kept[name].detach()).sum(1))
    stacked = {name: torch.stack(found, 1) for name, found in maps.items()}
    score = scores.detach().gather(1, top[:, :1])[:, 0]
    biases = {name: score - found[:, 0].sum((1, 2)) for name, found in stacked.items()}
    residuals = {name: torch.zeros_like(score) for name in layers}
    return Explained(scores.detach(), labels, stacked, biases, residuals)


def last_layers(model: nn.Module, inputs: Tensor, count: int = 3) -> list[str]:
    """The last layer of each of the coarsest resolutions, in the order of the network.

    Args:
        model: The network, in eval mode.
        inputs: One image ``(1, C, H, W)``.
        count: How many resolutions.

    Returns:
        Names of the layers.

    Raises:
        ValueError: If no layer gives a map.
    """
    last: dict[tuple[int, int], str] = {}

    def note(name: str, output: object) -> None:
        if isinstance(output, Tensor) and output.dim() == 4 and min(output.shape[2:]) > 1:
            last[output.shape[2], output.shape[3]] = name

    hooks = [
        module.register_forward_hook(lambda _m, _i, output, name=name: note(name, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if not last:
        raise ValueError(
            f"layers must be named, got none, and {type(model).__name__} has no layer with a map."
        )
    return [last[size] for size in sorted(last, key=lambda size: -size[0] * size[1])[-count:]]
