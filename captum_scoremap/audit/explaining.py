"""What one batch of images yields: scores, and score maps of each chosen layer for the labels of interest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["ROLES", "Explained", "explain"]

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

    Raises:
        ValueError: If a true label is none of the model's.
    """
    kept: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: kept.__setitem__(name, out))
        for name in layers
    ]
    with torch.enable_grad():
        scores = model(inputs.requires_grad_())
    for hook in hooks:
        hook.remove()
    if int(true.max()) >= scores.shape[1]:
        raise ValueError(f"labels must be less than {scores.shape[1]}, the model's, got {int(true.max())}.")
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
