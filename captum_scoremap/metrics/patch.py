"""How much of the label does a patch carry?"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_scoremap.metrics.maps import Score, checked_target, label_probabilities


def patch_score(
    forward_func: Callable[..., Any],
    inputs: Tensor,
    target: Score,
    boxes: Tensor,
    view: tuple[int, int] | None = None,
) -> Tensor:
    """Return the model's probability for the label on a patch alone, enlarged to one view.

    A patch that shows what the label is about is recognized without the rest of the image; a patch of
    background is not.

    Args:
        forward_func: The model; returns scores ``(N, K)``.
        inputs: Images ``(N, C, H, W)``.
        target: Labels ``(N,)`` in any of Captum's forms, or a function from the model's output to ``(N,)``.
        boxes: Pixel ``x0, y0, x1, y1`` (end exclusive), integers; ``(N, 4)``, or ``(N, k, 4)`` for k patches
            of each image.
        view: Rows and columns to which a patch is enlarged (bicubic, antialiased); the size of the images if
            None.

    Returns:
        Probabilities, ``(N,)`` or ``(N, k)`` as the boxes are given.

    Raises:
        ValueError: If the boxes have another shape, or one is empty or not inside its image.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> image = torch.zeros(1, 2, 8, 8)
        >>> image[0, 1, :4, :4] = 9.0  # label 1 is in the upper left corner
        >>> boxes = torch.tensor([[[0, 0, 4, 4], [4, 4, 8, 8]]])
        >>> patch_score(model, image, torch.tensor([1]), boxes).round(decimals=2)
        tensor([[1.0000, 0.5000]])
    """
    labels = checked_target(inputs, target)
    height, width = inputs.shape[-2:]
    if boxes.dim() not in {2, 3} or boxes.shape[-1] != 4 or boxes.shape[0] != inputs.shape[0]:
        raise ValueError(
            f"boxes must have the shape (N, 4) or (N, k, 4), N = {inputs.shape[0]}, got {tuple(boxes.shape)}. "
            "Give the boxes of every image."
        )
    x0, y0, x1, y1 = boxes.unbind(dim=-1)
    if bool(((x0 < 0) | (y0 < 0) | (x1 > width) | (y1 > height) | (x0 >= x1) | (y0 >= y1)).any()):
        raise ValueError(
            f"boxes must be 0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height} in x0, y0, x1, y1, "
            f"got {boxes.tolist()}. Clip them to the image."
        )
    size = (height, width) if view is None else view
    per_image = boxes if boxes.dim() == 3 else boxes[:, None]
    probabilities = []
    for place, (image, image_boxes) in enumerate(zip(inputs, per_image, strict=True)):
        patches = [
            F.interpolate(image[None, :, top:bottom, left:right], size, mode="bicubic", antialias=True)
            for left, top, right, bottom in image_boxes.tolist()
        ]
        label = labels[place].expand(len(patches)) if isinstance(labels, Tensor) else labels
        probabilities.append(label_probabilities(forward_func, torch.cat(patches), label))
    scores = torch.stack(probabilities)
    return scores if boxes.dim() == 3 else scores[:, 0]


def strongest_window(maps: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Return the window of a given size with the largest sum of a map.

    Args:
        maps: Input-sized maps ``(N, H, W)``.
        size: Rows and columns of the window, pixels.

    Returns:
        Boxes ``(N, 4)``, integer pixel ``x0, y0, x1, y1`` (end exclusive); of equal windows the first in
        row-major order.

    Raises:
        ValueError: If the window is larger than the map.

    Example:
        >>> maps = torch.zeros(1, 6, 6)
        >>> maps[0, 3, 4] = 1.0
        >>> maps[0, 4, 5] = 2.0
        >>> strongest_window(maps, 2)
        tensor([[4, 3, 6, 5]])
    """
    rows, columns = (size, size) if isinstance(size, int) else size
    height, width = maps.shape[-2:]
    if not (0 < rows <= height and 0 < columns <= width):
        raise ValueError(f"size must be between 1 and the map's {(height, width)}, got {(rows, columns)}.")
    integral = F.pad(maps.double(), (1, 0, 1, 0)).cumsum(dim=1).cumsum(dim=2)
    upper, lower = integral[:, :-rows], integral[:, rows:]
    sums = lower[..., columns:] - lower[..., :-columns] - upper[..., columns:] + upper[..., :-columns]
    best = sums.flatten(start_dim=1).argmax(dim=1)
    top, left = best // sums.shape[-1], best % sums.shape[-1]
    return torch.stack([left, top, left + columns, top + rows], dim=1)
