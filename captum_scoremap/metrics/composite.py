"""Three wishes in one number: a map that is coherent, small, and removes what counts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_scoremap.metrics.maps import Attribution, Score, checked_target, unit_maps
from captum_scoremap.metrics.remove_and_debias import road


@dataclass(frozen=True)
class Arcc:
    """What the score is made of, each between 0 and 1 and for each image.

    Attributes:
        coherency: ``(N,)``: how alike the map of the image times its map is, (1 + Pearson's correlation) / 2.
        complexity: ``(N,)``: mean of the map; small is good.
        road: ``(N,)``: twice :attr:`Road.combined`, not below 0.

    Example:
        >>> Arcc(torch.tensor([1.0]), torch.tensor([0.5]), torch.tensor([0.5])).score
        tensor([0.6000])
    """

    coherency: Tensor
    complexity: Tensor
    road: Tensor

    @property
    def score(self) -> Tensor:
        """Harmonic mean of coherency, 1 - complexity and road, ``(N,)``; 0 where one of them is."""
        parts = torch.stack([self.coherency, 1 - self.complexity, self.road])
        return torch.where((parts > 0).all(dim=0), 3 / (1 / parts).sum(dim=0), 0.0)


def arcc(
    forward_func: Callable[..., Any],
    attribute: Attribution,
    inputs: Tensor,
    target: Score,
    fractions: Sequence[float] = (0.2, 0.4, 0.6, 0.8),
    noise: float = 0.01,
    generator: torch.Generator | None = None,
    batch_size: int = 32,
) -> Arcc:
    """Return coherency, complexity and ROAD of the positive part of the map, and their harmonic mean.

    ARCC, of RefineCAM (2026, arXiv:2605.14641), after ADCC (Poppi et al. 2021, *Revisiting the Evaluation of Class
    Activation Mapping for Explainability*), whose average drop it replaces by ROAD.

    Args:
        forward_func: The model; returns scores ``(N, K)``.
        attribute: ``attribute(inputs, target) -> (N, C or 1, h, w)``; called for the images, and for the images times
            their maps.
        inputs: Images ``(N, C, H, W)``.
        target: Labels ``(N,)`` in any of Captum's forms, or a function from the model's output to ``(N,)``.
        fractions: As in :func:`road`.
        noise: As in :func:`road`.
        generator: As in :func:`road`.
        batch_size: As in :func:`road`.

    Returns:
        The three parts, and their harmonic mean as ``score``.

    Raises:
        ValueError: If inputs, target, fractions or batch_size are none of the above.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> image, label = torch.rand(1, 2, 8, 8), torch.tensor([1])
        >>> arcc(model, lambda inputs, target: inputs[:, 1:], image, label).score.shape
        torch.Size([1])
    """
    target = checked_target(inputs, target)
    maps = unit_maps(attribute, inputs, target)
    again = unit_maps(attribute, inputs * maps.to(inputs), target)
    removed = road(forward_func, lambda *_: maps, inputs, target, fractions, noise, generator, batch_size)
    return Arcc((1 + _correlation(maps, again)) / 2, maps.mean(dim=(1, 2, 3)), (2 * removed.combined).clamp(min=0))


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    """Pearson's correlation of each pair of maps, ``(N,)``; 0 where a map is constant."""
    one, other = (maps.flatten(1) - maps.mean(dim=(1, 2, 3))[:, None] for maps in (one, other))
    lengths = one.norm(dim=1) * other.norm(dim=1)
    return torch.where(lengths > 0, (one * other).sum(dim=1) / torch.where(lengths > 0, lengths, 1.0), 0.0)
