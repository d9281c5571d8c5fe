"""Do signed maps place the score where it comes from? Known causes, and cells that are deleted."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from captum_scoremap.layout import resized
from captum_scoremap.metrics.maps import (
    Attribution,
    Score,
    attributed,
    check_batch_size,
    checked_target,
    in_batches,
    label_scores,
)

__all__ = ["CauseGame", "cause_game", "single_deletion"]


@dataclass(frozen=True)
class CauseGame:
    """A known change of some pixels, the exact rise of the score, and what a map's difference makes of it.

    Attributes:
        rise: S(x') - S(x), (N,), in logits.
        placed: Sum of the map's difference over the changed region, (N,), in logits.

    Example:
        >>> game = CauseGame(torch.tensor([2.0, 1.0]), torch.tensor([1.5, 1.0]))
        >>> game.error
        0.1666666716337204
    """

    rise: Tensor
    placed: Tensor

    @property
    def error(self) -> float:
        """Mean of |placed - rise| over the mean of |rise|: 0 is right, 1 is as bad as an empty map."""
        return float((self.placed - self.rise).abs().mean() / self.rise.abs().mean())

    @property
    def correlation(self) -> float:
        """Correlation of what is placed with the rise, over the images."""
        return float(torch.corrcoef(torch.stack([self.placed, self.rise]))[0, 1])


def cause_game(
    forward_func: Callable[..., Any], attribute: Attribution, inputs: Tensor, changed: Tensor, target: Score
) -> CauseGame:
    """Change some pixels, and see whether the map puts the rise of the score there.

    Only the changed pixels can have caused the rise. A map that adds up to the score has a difference that adds up to
    the rise; how much of it stands in the region is what the map knows of the place.

    Args:
        forward_func: The model; returns scores (N, K).
        attribute: ``attribute(inputs, target) -> (N, C or 1, h, w)``, signed, in logits. Maps of another size are
            enlarged with sums kept.
        inputs: Images (N, C, H, W).
        changed: The same images, changed inside a region each, the smallest box around all changed pixels.
        target: Labels (N,), or a function from the model's output to (N,).

    Returns:
        Rise and what is placed, for each image.

    Raises:
        ValueError: If images and labels do not fit, or nothing was changed.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> image, label = torch.zeros(1, 2, 8, 8), torch.tensor([1])
        >>> changed = image.clone()
        >>> changed[:, :, 2:4, 2:4] = 8.0
        >>> exact = lambda inputs, target: inputs[:, 1:] / 64
        >>> cause_game(model, exact, image, changed, label).error
        0.0
    """
    target = checked_target(inputs, target)
    if changed.shape != inputs.shape:
        raise ValueError(f"changed must be shaped like inputs, {tuple(inputs.shape)}, got {tuple(changed.shape)}.")
    differs = (changed != inputs).any(1)
    if not bool(differs.flatten(1).any(1).all()):
        raise ValueError("changed must differ from inputs in every image, got one that does not.")
    with torch.no_grad():
        rise = label_scores(forward_func, changed, target) - label_scores(forward_func, inputs, target)
    before, after = (
        _with_sums(attributed(attribute, images, target), inputs.shape[-2:]) for images in (inputs, changed)
    )
    placed = []
    for difference, region in zip(after - before, differs, strict=True):
        rows, columns = region.any(1).nonzero()[:, 0], region.any(0).nonzero()[:, 0]
        placed.append(difference[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].sum())
    return CauseGame(rise, torch.stack(placed))


def single_deletion(
    forward_func: Callable[..., Any],
    attribute: Attribution,
    inputs: Tensor,
    target: Score,
    cells: int = 4,
    batch_size: int = 32,
) -> Tensor:
    """Delete one cell of the image at a time, and rank the drops of the score against the map's sums.

    Hesse et al. 2024, *Benchmarking the Attribution Quality of Vision Models*: the Spearman correlation, over cells, of
    the signed sum of the map in a cell with the drop of the score where that cell is set to zero.

    Args:
        forward_func: The model; returns scores (N, K).
        attribute: ``attribute(inputs, target) -> (N, C or 1, h, w)``, signed.
        inputs: Images (N, C, H, W).
        target: Labels (N,), or a function from the model's output to (N,).
        cells: Cells along each side.
        batch_size: Images that the model sees at once.

    Returns:
        The correlation for each image, (N,), between -1 and 1; 0 where one of the two does not vary.

    Raises:
        ValueError: If images and labels do not fit, there are fewer than two cells, or ``batch_size`` is not positive.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> image, label = torch.rand(1, 2, 8, 8), torch.tensor([1])
        >>> single_deletion(model, lambda inputs, target: inputs[:, 1:], image, label)
        tensor([1.])
    """
    target = checked_target(inputs, target)
    if cells < 2:
        raise ValueError(f"cells must be at least 2, got {cells}.")
    check_batch_size(batch_size)
    height, width = inputs.shape[-2:]
    row, column = (torch.arange(size, device=inputs.device) * cells // size for size in (height, width))
    cell = row[:, None] * cells + column  # as a cell ends where the next begins, its number grows by steps
    count = cells**2
    maps = _with_sums(attributed(attribute, inputs, target), (height, width))
    sums = torch.zeros(len(inputs), count, dtype=maps.dtype, device=maps.device)
    sums.index_add_(1, cell.flatten(), maps.flatten(1))

    def deleted(index: Tensor) -> Tensor:
        return inputs[index // count] * (cell != (index % count)[:, None, None])[:, None]

    scores = in_batches(label_scores, forward_func, deleted, inputs, target, count, batch_size)
    drops = label_scores(forward_func, inputs, target)[:, None] - scores.view(-1, count)
    pairs = zip(sums, drops, strict=True)
    return torch.tensor([_rank_correlation(one, other) for one, other in pairs], dtype=inputs.dtype)


def _rank_correlation(one: Tensor, other: Tensor) -> float:
    if bool((one == one[0]).all()) or bool((other == other[0]).all()):
        return 0.0
    return float(spearmanr(one.numpy(force=True), other.numpy(force=True)).statistic)


def _with_sums(attributions: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return maps of the size of the image that add up to what the attributions do, (N, H, W)."""
    maps = attributions.detach().sum(1, keepdim=True)
    return resized(maps, (size[0], size[1]))[:, 0]
