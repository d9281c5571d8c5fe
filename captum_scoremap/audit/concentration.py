"""Where on the image the positive score lies: in how little area, at the border, in a region, at which spot.

Cells at an edge count by the part that lies inside, so that a map of 7 x 7 cells and one of 112 x 112 give
comparable shares. An even map has ``top_share`` 0.1 and ``border_share`` 0.36, the area of the border itself.
"""

import torch
from torch import Tensor

__all__ = ["border_share", "peak", "region_share", "resized", "top_share"]


def top_share(maps: Tensor, area: float = 0.1) -> Tensor:
    """Return the share of the positive score in the part of the area where it is highest.

    Args:
        maps: Score maps ``(N, H, W)``.
        area: That part, from 0 to 1.

    Returns:
        ``(N,)``, from 0 to 1; 0 where nothing is positive.

    Example:
        >>> top_share(torch.ones(1, 10, 10))
        tensor([0.1000])
    """
    cells = maps.clamp(min=0).flatten(1).sort(dim=1, descending=True).values
    count = cells.shape[1] * area
    weights = (count - torch.arange(cells.shape[1], dtype=maps.dtype, device=maps.device)).clamp(0, 1)
    return _share((cells * weights).sum(1), cells.sum(1))


def border_share(maps: Tensor, width: float = 0.1) -> Tensor:
    """Return the share of the positive score in the border of the image.

    Args:
        maps: Score maps ``(N, H, W)``.
        width: Width of the border as a fraction of the side.

    Returns:
        ``(N,)``, from 0 to 1; 0 where nothing is positive.

    Example:
        >>> border_share(torch.ones(1, 10, 10))
        tensor([0.3600])
    """
    rows, columns = (_inside(size, width, maps) for size in maps.shape[1:])
    positive = maps.clamp(min=0)
    outside = 1 - rows[:, None] * columns[None, :]
    return _share((positive * outside).sum((1, 2)), positive.sum((1, 2)))


def region_share(maps: Tensor, regions: Tensor) -> Tensor:
    """Return the share of the positive score in a region.

    Args:
        maps: Score maps ``(N, H, W)``.
        regions: How much of each pixel belongs to the region, from 0 to 1, ``(N, rows, columns)``.

    Returns:
        ``(N,)``, from 0 to 1; 0 where nothing is positive.
    """
    positive = maps.clamp(min=0)
    cover = resized(regions.to(maps), (maps.shape[1], maps.shape[2]))
    return _share((positive * cover).sum((1, 2)), positive.sum((1, 2)))


def peak(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the center of the highest cell, as fractions of height and width.

    Args:
        maps: Score maps ``(N, H, W)``.

    Returns:
        Row and column, ``(N,)`` each, from 0 (top, left) to 1.

    Example:
        >>> peak(torch.eye(2)[None])
        (tensor([0.2500]), tensor([0.2500]))
    """
    height, width = maps.shape[1:]
    cell = maps.flatten(1).argmax(1)
    row, column = cell.div(width, rounding_mode="floor"), cell % width
    return (row + 0.5) / height, (column + 0.5) / width


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps with another number of cells: each new cell holds the mean over just the area that it covers.

    Args:
        maps: Maps ``(N, H, W)``.
        size: Rows and columns of the result.

    Returns:
        ``(N, *size)``; the mean of each map stays as it is.

    Example:
        >>> resized(torch.tensor([[[0.0, 3.0, 6.0]]]), (1, 2)).round().tolist()
        [[[1.0, 5.0]]]
    """
    rows, columns = (_overlap(new, old, maps) for new, old in zip(size, maps.shape[1:], strict=True))
    return rows @ maps @ columns.T


def _overlap(new: int, old: int, like: Tensor) -> Tensor:
    """Return the share of each of ``new`` cells that each of ``old`` cells covers, ``(new, old)``."""
    edges = [torch.arange(size + 1, dtype=like.dtype, device=like.device) / size for size in (new, old)]
    (top, bottom), (start, end) = ((edge[:-1], edge[1:]) for edge in edges)
    return (torch.minimum(bottom[:, None], end) - torch.maximum(top[:, None], start)).clamp(min=0) * new


def _inside(size: int, width: float, like: Tensor) -> Tensor:
    """Return how much of each of ``size`` cells lies further than ``width`` from both ends."""
    starts = torch.arange(size, dtype=like.dtype, device=like.device) / size
    ends = starts + 1 / size
    return (ends.clamp(max=1 - width) - starts.clamp(min=width)).clamp(min=0) * size


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole.where(whole > 0, 1), 0)
