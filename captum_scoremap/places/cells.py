"""The cells of the images' grids in which the numbers at a value's elements add up."""

from typing import NamedTuple

import torch
from torch import Tensor

from captum_scoremap.layout import Grid

from .positions import Positions, shared

__all__ = ["Cells", "cells_of"]


class Cells(NamedTuple):
    """Where to add numbers up, after sums over axes along which elements stand at one position.

    Attributes:
        summed: The axes to sum over.
        axis: An axis along which images come one after another, each with its elements in the same cells; None if
            there is none.
        where: Number of the cell of each element, those of an image from 1, 0 for what stands nowhere; of one image
            where there is such an axis or but one image, else of all, -1 where the image is not known.
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
        counts = torch.bincount(self.where[self.where > 0], minlength=self.grid[0] * self.grid[1] + 1)[1:]
        return bool(counts[0] > 0) and bool((counts == counts[0]).all())


def cells_of(positions: Positions, images: int) -> Cells:
    """Return the cells of elements at positions in N images; N is 1 where all are of one."""
    sizes = torch.broadcast_shapes(positions.image.shape, positions.row.shape, positions.column.shape)
    summed = tuple(axis for axis, size in enumerate(sizes) if size == 1)
    rows, columns = grid = positions.grid if positions.are_known else (1, 1)
    row, column = (
        (one * side).floor().clamp(0, side - 1).long()
        for one, side in zip((positions.row, positions.column), grid, strict=True)
    )
    is_somewhere = (positions.row > 0) & (positions.column > 0) & positions.are_known
    cell = torch.where(is_somewhere, row * columns + column + 1, 0)
    axis, where = None, cell.expand(sizes).flatten()
    if images > 1:
        image = shared(positions.image, fills=True)
        along = [axis for axis, size in enumerate(image.shape) if size > 1]
        numbers = torch.arange(1.0, images + 1, device=image.device)[:, None]
        if len(along) == 1 and image.numel() % images == 0 and bool((image.view(images, -1) == numbers).all()):
            each = cell.expand(sizes).movedim(along[0], 0).reshape(images, -1)
            axis, where = (along[0], each[0]) if bool((each == each[:1]).all()) else (None, where)
        if axis is None:
            of_all = torch.where(image > 0, (image.long() - 1) * (rows * columns + 1) + cell, -1)
            where = of_all.expand(sizes).flatten()
    order = torch.arange(1, rows * columns + 1, device=where.device)
    is_order = max(grid) > 1 and torch.equal(where, order)
    return Cells(summed, axis, where, grid, is_order, bool((cell == 0).any()))
