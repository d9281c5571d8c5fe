"""The cells of the images' grids in which the numbers at a value's elements add up."""

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from captum_scoremap.layout import Grid

from .positions import Positions, shared

__all__ = ["Cells", "cells_of"]

# What lies no further from the line between two cells, in cells, lies on it.
_NEAR = 1e-3


class Cells(NamedTuple):
    """Where to add numbers up, after sums over axes along which elements stand at one position.

    Attributes:
        summed: The axes to sum over.
        axis: An axis along which images come one after another, each with its elements in the same cells; None if
            there is none.
        where: Number of the cell of each element, (1, elements), those of an image from 1, 0 for what stands nowhere;
            of one image where there is such an axis or but one image, else of all, -1 where the image is not known.
            Where some stand between cells, as coarser cells among finer ones do, two or four rows, one for each.
        grid: Rows and columns; a single cell of what stands at no position.
        is_order: Whether these are the cells of one image, one after another.
        has_rest: Whether something stands nowhere.
    """

    summed: tuple[int, ...]
    axis: int | None
    where: Tensor
    grid: Grid
    is_order: bool
    has_rest: bool

    def are_even(self) -> bool:
        """Return whether as many elements stand in each cell."""
        counts = torch.bincount(self.where[0][self.where[0] > 0], minlength=self.grid[0] * self.grid[1] + 1)[1:]
        return bool(counts[0] > 0) and bool((counts == counts[0]).all())


def cells_of(positions: Positions, images: int) -> Cells:
    """Return the cells of elements at positions in N images; N is 1 where all are of one."""
    sizes = torch.broadcast_shapes(positions.image.shape, positions.row.shape, positions.column.shape)
    summed = tuple(axis for axis, size in enumerate(sizes) if size == 1)
    rows, columns = grid = positions.grid if positions.are_known else (1, 1)
    sides = zip((positions.row, positions.column), grid, strict=True)
    between = product(*(_beside(one, side) for one, side in sides))
    is_somewhere = (positions.row > 0) & (positions.column > 0) & positions.are_known
    cell = torch.stack([torch.where(is_somewhere, row * columns + column + 1, 0) for row, column in between])
    axis, where = None, cell.expand(-1, *sizes).reshape(len(cell), -1)
    if images > 1:
        image = shared(positions.image, fills=True)
        along = [axis for axis, size in enumerate(image.shape) if size > 1]
        numbers = torch.arange(1.0, images + 1, device=image.device)[:, None]
        if len(along) == 1 and image.numel() % images == 0 and bool((image.view(images, -1) == numbers).all()):
            each = cell.expand(-1, *sizes).movedim(along[0] + 1, 1).reshape(len(cell), images, -1)
            axis, where = (along[0], each[:, 0]) if bool((each == each[:, :1]).all()) else (None, where)
        if axis is None:
            of_all = torch.where(image > 0, (image.long() - 1) * (rows * columns + 1) + cell, -1)
            where = of_all.expand(-1, *sizes).reshape(len(cell), -1)
    order = torch.arange(1, rows * columns + 1, device=where.device)
    is_order = max(grid) > 1 and torch.equal(where, order[None])
    return Cells(summed, axis, where, grid, is_order, bool((cell == 0).any()))


def _beside(one: Tensor, side: int) -> list[Tensor]:
    """Return the rows, or columns, of cells in which positions lie: twice, where some lie on the line between two."""
    low, high = ((one * side + shift).floor().clamp(0, side - 1).long() for shift in (-_NEAR, _NEAR))
    return [low] if torch.equal(low, high) else [low, high]
