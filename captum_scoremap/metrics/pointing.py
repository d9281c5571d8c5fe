"""Pointing games: is the attribution where the label is?"""

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_scoremap.metrics.maps import Attribution, Score, attribution_maps, checked_target


def mosaics(
    inputs: Tensor, target: Score, n: int = 2, count: int = 1, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Draw mosaics of n x n images with n * n different labels.

    Args:
        inputs: Images ``(N, C, H, W)``, best those that the model classifies with confidence.
        target: Their labels ``(N,)``.
        n: Rows and columns of cells.
        count: Number of mosaics.
        generator: Source of chance; torch's default if None.

    Returns:
        Mosaics ``(count, C, n * H, n * W)`` and the labels of their cells, row-major, ``(count, n * n)``.

    Raises:
        TypeError: If target is a function.
        ValueError: If there are not n * n different labels.

    Example:
        >>> images, labels = mosaics(torch.rand(4, 3, 8, 8), torch.arange(4), n=2, count=5)
        >>> images.shape, labels.shape
        (torch.Size([5, 3, 16, 16]), torch.Size([5, 4]))
    """
    labels = checked_target(inputs, target)
    if not isinstance(labels, Tensor):
        raise TypeError("target must be labels (N,) for mosaics of different ones, got a function.")
    cells = n * n
    available = len(set(labels.tolist()))
    if available < cells:
        raise ValueError(f"inputs must hold at least {cells} different labels for {n} x {n} cells, got {available}.")
    chosen = torch.stack([_different_labels(labels, cells, generator) for _ in range(count)])
    channels, height, width = inputs.shape[1:]
    grid = inputs[chosen].view(count, n, n, channels, height, width)
    images = grid.permute(0, 3, 1, 4, 2, 5).reshape(count, channels, n * height, n * width)
    return images, labels[chosen]


def _different_labels(target: Tensor, cells: int, generator: torch.Generator | None) -> Tensor:
    shuffled = torch.randperm(len(target), generator=generator)
    first: dict[int, int] = {}
    for index in shuffled.tolist():
        first.setdefault(int(target[index]), index)
    return torch.tensor(list(first.values())[:cells])


def grid_pointing_game(attribute: Attribution, images: Tensor, labels: Tensor) -> Tensor:
    """Return the share of the positive attribution that falls into the cell of the label.

    Böhle et al. 2021, *Convolutional Dynamic Alignment Networks for Interpretable Classifications*; Rao et
    al. 2022, *Towards Better Understanding Attribution Methods*. 1 is perfect, 1 / n² is chance. A map
    without anything positive scores 0.

    Args:
        attribute: ``attribute(inputs, target) -> (N, C or 1, h, w)``; called once for each mosaic and label.
        images: Mosaics ``(N, C, n * H, n * W)``, for example from :func:`mosaics`.
        labels: Labels of the cells, row-major, ``(N, n * n)``.

    Returns:
        ``(N, n * n)``, share of the positive attribution.

    Raises:
        ValueError: If the labels are no ``(N, n * n)`` or the image does not divide into the cells.

    Example:
        >>> images = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]]]])
        >>> labels = torch.tensor([[0, 1, 2, 3]])
        >>> grid_pointing_game(lambda inputs, target: inputs, images, labels)
        tensor([[0.3333, 0.0000, 0.0000, 0.6667]])
    """
    cells = labels.shape[-1]
    n = round(cells**0.5)
    if labels.dim() != 2 or len(labels) != len(images) or n * n != cells:
        raise ValueError(
            f"labels must have the shape (N, n * n) with N = {len(images)}, got {tuple(labels.shape)}. "
            "Give one label for each cell."
        )
    height, width = images.shape[-2:]
    if height % n or width % n:
        raise ValueError(f"images must divide into {n} x {n} cells, got {height} x {width} pixels.")
    shares = []
    for image, cell_labels in zip(images, labels, strict=True):
        for cell, label in enumerate(cell_labels):
            positive = attribution_maps(attribute, image[None], label[None]).clamp(min=0)
            energy = F.avg_pool2d(positive, (height // n, width // n)).flatten()
            shares.append(energy[cell] / energy.sum() if energy.sum() > 0 else energy.new_zeros(()))
    return torch.stack(shares).view(len(images), cells)


def pointing_game(attribute: Attribution, inputs: Tensor, target: Score, masks: Tensor, tolerance: int = 0) -> Tensor:
    """Return whether the highest value of the map lies on the object.

    Zhang et al. 2016, *Top-down Neural Attention by Excitation Backprop* (with a tolerance of 15 pixels).

    Args:
        attribute: ``attribute(inputs, target) -> (N, C or 1, h, w)``.
        inputs: Images ``(N, C, H, W)``.
        target: Labels ``(N,)`` in any of Captum's forms, or a function from the model's output to ``(N,)``.
        masks: Where the object is, boolean ``(N, H, W)``.
        tolerance: Pixels by which the highest value may lie beside the object (distance in both axes).

    Returns:
        Hits, boolean ``(N,)``.

    Raises:
        ValueError: If inputs, target or masks have the wrong shape.

    Example:
        >>> inputs = torch.zeros(1, 1, 8, 8)
        >>> inputs[0, 0, 2, 5] = 1.0
        >>> mask = torch.zeros(1, 8, 8, dtype=torch.bool)
        >>> mask[0, 2, 6] = True
        >>> identity = lambda inputs, target: inputs
        >>> pointing_game(identity, inputs, torch.tensor([0]), mask)
        tensor([False])
        >>> pointing_game(identity, inputs, torch.tensor([0]), mask, tolerance=1)
        tensor([True])
    """
    labels = checked_target(inputs, target)
    _check_masks(inputs, masks)
    reach = F.max_pool2d(masks[:, None].to(inputs), 2 * tolerance + 1, stride=1, padding=tolerance)
    highest = attribution_maps(attribute, inputs, labels).flatten(start_dim=1).argmax(dim=1, keepdim=True)
    return reach.flatten(start_dim=1).gather(1, highest)[:, 0] > 0


def energy_pointing_game(attribute: Attribution, inputs: Tensor, target: Score, masks: Tensor) -> Tensor:
    """Return the share of the positive attribution that lies on the object.

    Wang et al. 2020, *Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks*,
    Section 4.3.

    Args:
        attribute: ``attribute(inputs, target) -> (N, C or 1, h, w)``.
        inputs: Images ``(N, C, H, W)``.
        target: Labels ``(N,)`` in any of Captum's forms, or a function from the model's output to ``(N,)``.
        masks: Where the object is, boolean ``(N, H, W)``.

    Returns:
        ``(N,)``, share of the positive attribution; 0 where nothing is positive.

    Raises:
        ValueError: If inputs, target or masks have the wrong shape.

    Example:
        >>> inputs = torch.ones(1, 1, 4, 4)
        >>> mask = torch.zeros(1, 4, 4, dtype=torch.bool)
        >>> mask[0, :2] = True
        >>> energy_pointing_game(lambda inputs, target: inputs, inputs, torch.tensor([0]), mask)
        tensor([0.5000])
    """
    labels = checked_target(inputs, target)
    _check_masks(inputs, masks)
    positive = attribution_maps(attribute, inputs, labels).clamp(min=0)
    inside, total = (positive * masks).sum(dim=(1, 2)), positive.sum(dim=(1, 2))
    return torch.where(total > 0, inside / total, 0.0)


def _check_masks(inputs: Tensor, masks: Tensor) -> None:
    expected = (inputs.shape[0], *inputs.shape[-2:])
    if tuple(masks.shape) != expected or masks.dtype is not torch.bool:
        raise ValueError(
            f"masks must be boolean of the shape {expected}, got {masks.dtype} {tuple(masks.shape)}. "
            "Draw the object as True."
        )
