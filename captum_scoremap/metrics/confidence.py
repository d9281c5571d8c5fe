"""Is what the map shows enough for the label? Average drop and increase of confidence."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from captum_scoremap.metrics.maps import Attribution, Score, checked_target, label_probabilities, unit_maps


@dataclass(frozen=True)
class MaskedConfidence:
    """The label's probability on the image, and on the image times its map.

    Attributes:
        before: ``(N,)``, on the image.
        after: ``(N,)``, on the image times the map.

    Example:
        >>> import torch
        >>> found = MaskedConfidence(torch.tensor([0.8, 0.5]), torch.tensor([0.6, 0.7]))
        >>> found.drop, found.increase
        (tensor([0.2500, 0.0000]), tensor([0., 1.]))
    """

    before: Tensor
    after: Tensor

    @property
    def drop(self) -> Tensor:
        """Lost share of the confidence, ``(N,)``, max(0, before - after) / before; its mean is the average drop."""
        return (self.before - self.after).clamp(min=0) / self.before

    @property
    def increase(self) -> Tensor:
        """Whether the confidence rises, 0 or 1, ``(N,)``; its mean is the average increase."""
        return (self.after > self.before).to(self.before)


def masked_confidence(
    forward_func: Callable[..., Any], attribute: Attribution, inputs: Tensor, target: Score
) -> MaskedConfidence:
    """Multiply the image by its map, and see what is left of the label's probability.

    Chattopadhay et al. 2018, *Grad-CAM++: Generalized Gradient-Based Visual Explanations for Deep Convolutional
    Networks*, Section 4.1. The map's positive part, divided by its largest value, is the mask. A map of ones loses
    nothing: read drop and increase beside a metric that punishes maps of everything, as :func:`arcc` does.

    Args:
        forward_func: The model; returns scores ``(N, K)``.
        attribute: ``attribute(inputs, target) -> (N, C or 1, h, w)``.
        inputs: Images ``(N, C, H, W)``; zero is where the mask is zero.
        target: Labels ``(N,)`` in any of Captum's forms, or a function from the model's output to ``(N,)``.

    Returns:
        The probabilities of each image.

    Raises:
        ValueError: If inputs or target have the wrong shape.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> image, label = torch.zeros(1, 2, 4, 4), torch.tensor([1])
        >>> image[:, 0, :2], image[:, 1, 2:] = 4.0, 4.0  # what speaks for label 0 above, for label 1 below
        >>> found = masked_confidence(model, lambda inputs, target: inputs[:, 1:], image, label)
        >>> found.drop, found.increase
        (tensor([0.]), tensor([1.]))
    """
    target = checked_target(inputs, target)
    masked = inputs * unit_maps(attribute, inputs, target).to(inputs)
    before, after = (label_probabilities(forward_func, images, target) for images in (inputs, masked))
    return MaskedConfidence(before, after)
