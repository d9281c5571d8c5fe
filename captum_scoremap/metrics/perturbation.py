"""Insertion and deletion: does the score follow the pixels that the map ranks first?"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from captum_scoremap.metrics.maps import (
    Attribution,
    Score,
    attribution_maps,
    check_batch_size,
    checked_target,
    in_batches,
    label_probabilities,
    ranks,
)


@dataclass(frozen=True)
class PerturbationCurve:
    """The label's probability while pixels are exchanged, most important first.

    Attributes:
        fractions: ``(T,)``, share of the pixels exchanged so far, from 0 to 1.
        probabilities: ``(N, T)``.

    Example:
        >>> PerturbationCurve(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([[0.0, 1.0, 1.0]])).area
        tensor([0.7500])
    """

    fractions: Tensor
    probabilities: Tensor

    @property
    def area(self) -> Tensor:
        """Area under each image's curve, ``(N,)``, between 0 and 1."""
        return torch.trapezoid(self.probabilities, self.fractions, dim=1)


def insertion(
    forward_func: Callable[..., Any],
    attribute: Attribution,
    inputs: Tensor,
    target: Score,
    baseline: str | Tensor = "blur",
    steps: int = 32,
    batch_size: int = 32,
) -> PerturbationCurve:
    """Insert the pixels of the image into a baseline, most important first; a large area is good.

    Petsiuk et al. 2018, *RISE: Randomized Input Sampling for Explanation of Black-box Models*, Section 4.2.

    Args:
        forward_func: The model; returns scores ``(N, K)``.
        attribute: ``attribute(inputs, target) -> (N, C or 1, h, w)``.
        inputs: Images ``(N, C, H, W)``.
        target: Labels ``(N,)`` in any of Captum's forms, or a function from the model's output to ``(N,)``.
        baseline: ``"blur"`` (Gaussian of 11 pixels, sigma 5, as in RISE), ``"mean"`` (the mean color of each
            image), ``"zero"``, or a tensor that broadcasts to the inputs.
        steps: Number of equal shares in which the pixels are exchanged.
        batch_size: Images that the model sees at once.

    Returns:
        The curve of each image.

    Raises:
        ValueError: If inputs, target, baseline, steps or batch_size are none of the above.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> image, label = torch.rand(1, 2, 8, 8), torch.tensor([1])
        >>> channel = lambda inputs, target: inputs[:, 1:]
        >>> curve = insertion(model, channel, image, label, baseline="zero", steps=4)
        >>> curve.fractions
        tensor([0.0000, 0.2500, 0.5000, 0.7500, 1.0000])
        >>> curve.area.shape
        torch.Size([1])
    """
    return _curve(forward_func, attribute, inputs, target, baseline, steps, batch_size, insert=True)


def deletion(
    forward_func: Callable[..., Any],
    attribute: Attribution,
    inputs: Tensor,
    target: Score,
    baseline: str | Tensor = "zero",
    steps: int = 32,
    batch_size: int = 32,
) -> PerturbationCurve:
    """Replace the pixels of the image by a baseline, most important first; a small area is good.

    Petsiuk et al. 2018, Section 4.2. Zero is the mean color of the training set where inputs are normalized
    by it.

    Args:
        forward_func: The model; returns scores ``(N, K)``.
        attribute: ``attribute(inputs, target) -> (N, C or 1, h, w)``.
        inputs: Images ``(N, C, H, W)``.
        target: Labels ``(N,)`` in any of Captum's forms, or a function from the model's output to ``(N,)``.
        baseline: As in :func:`insertion`.
        steps: Number of equal shares in which the pixels are exchanged.
        batch_size: Images that the model sees at once.

    Returns:
        The curve of each image.

    Raises:
        ValueError: If inputs, target, baseline, steps or batch_size are none of the above.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> image, label = torch.rand(1, 2, 8, 8), torch.tensor([1])
        >>> good = deletion(model, lambda inputs, target: inputs[:, 1:], image, label).area
        >>> bad = deletion(model, lambda inputs, target: -inputs[:, 1:], image, label).area
        >>> bool(good < bad)
        True
    """
    return _curve(forward_func, attribute, inputs, target, baseline, steps, batch_size, insert=False)


def _curve(
    forward_func: Callable[..., Any],
    attribute: Attribution,
    inputs: Tensor,
    target: Score,
    baseline: str | Tensor,
    steps: int,
    batch_size: int,
    *,
    insert: bool,
) -> PerturbationCurve:
    target = checked_target(inputs, target)
    check_batch_size(batch_size)
    pixels = inputs.shape[-2] * inputs.shape[-1]
    if not 1 <= steps <= pixels:
        raise ValueError(f"steps must be between 1 and the number of pixels, {pixels}, got {steps}.")
    rank = ranks(attribution_maps(attribute, inputs, target))[:, None].int()
    exchanged = torch.linspace(0, pixels, steps + 1, device=inputs.device).round().int()
    background = _background(inputs, baseline)
    before, after = (background, inputs) if insert else (inputs, background)

    def images(index: Tensor) -> Tensor:
        which, runs = (index // (steps + 1)).unique_consecutive(return_counts=True)
        counts = exchanged[index % (steps + 1)][:, None, None, None].split(runs.tolist())
        pairs = zip(which.tolist(), counts, strict=True)
        return torch.cat([torch.where(rank[i] < count, after[i], before[i]) for i, count in pairs])

    probabilities = in_batches(label_probabilities, forward_func, images, inputs, target, steps + 1, batch_size)
    return PerturbationCurve((exchanged / pixels).to(inputs), probabilities.view(len(inputs), steps + 1))


def _background(inputs: Tensor, baseline: str | Tensor) -> Tensor:
    if isinstance(baseline, Tensor):
        return baseline.expand_as(inputs)
    if baseline == "blur":
        blurred: Tensor = gaussian_blur(inputs, [11, 11], [5.0, 5.0])
        return blurred
    if baseline == "mean":
        return inputs.mean(dim=(-2, -1), keepdim=True).expand_as(inputs)
    if baseline == "zero":
        return torch.zeros_like(inputs)
    raise ValueError(f'baseline must be "blur", "mean", "zero" or a tensor, got {baseline!r}.')
