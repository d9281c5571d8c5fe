"""Of which image the elements of a value are, and at which row and column of it they stand."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from captum_scoremap.layout import Grid, map_channel_dim, patch_grid
from captum_scoremap.rules import Value

__all__ = ["SEAM", "Positions", "begins", "cell_centers", "image_of_all", "shared", "upright"]

# Rows and columns are compared in such parts of the image's sides, about as many as single precision tells.
_PARTS = 2.0**22

# What follows one another that many cells apart, or more, lies on both sides of a seam, or in parts of their own.
SEAM = 1.5

# What lies no further from the center of a cell, in cells, lies at it.
_CENTERED = 1e-2

# Cells of one side are not so many times as large as others.
_UNEVEN = 4


@dataclass(frozen=True, eq=False)
class Positions:
    """Image, row and column of each element of a value, each of size 1 along axes along which it is the same.

    Attributes:
        image: Number of the image, from 1; 0 where it is not known.
        row: Row, from 0 to 1, the height of the image; 0 where an element stands nowhere, as a class token does.
        column: Column, from 0 to 1, the width; 0 where the row is.
        grid: Rows and columns of the image, in cells; 1 where all along a side is summed up.
    """

    image: Tensor
    row: Tensor
    column: Tensor
    grid: Grid

    @cached_property
    def axes(self) -> tuple[int, ...]:
        """The axes along which elements stand at different rows or columns."""
        sizes = zip(self.row.shape, self.column.shape, strict=True)
        return tuple(axis for axis, pair in enumerate(sizes) if max(pair) > 1)

    @cached_property
    def are_known(self) -> bool:
        """Whether elements stand at positions; those of which each image has but one do not."""
        if max(self.grid) == 1 or not self.axes:
            return False
        if all(self.image.shape[axis] == 1 for axis in self.axes):
            return True
        count = math.prod(max(self.row.shape[axis], self.column.shape[axis]) for axis in self.axes)
        return count > len(self.image[self.image > 0].unique())

    @cached_property
    def are_in_order(self) -> bool:
        """Whether the rows of maps, (N, C, h, w), follow one another along h, and the columns along w, all of them."""
        sides = (self.row, 2), (self.column, 3)
        return all(
            part.numel() == part.shape[axis] and bool((part > 0).all() and (part.flatten().diff() > 0).all())
            for part, axis in sides
        )

    def spread(self, axis: int) -> float:
        """Return how far from one another elements stand along an axis: the variance of rows and that of columns."""
        sides = (one for one in (self.row, self.column) if one.shape[axis] > 1)
        return sum(float(one.var(axis, correction=0).mean()) for one in sides)

    def changed(self, change: Callable[[Tensor], Tensor]) -> "Positions":
        """Return the same after a change of image, row and column."""
        return Positions(change(self.image), change(self.row), change(self.column), self.grid)

    def of(self, image: Tensor) -> "Positions":
        """Return the same of other images."""
        return Positions(image, self.row, self.column, self.grid)

    def nowhere(self) -> "Positions":
        """Return what stands at no position, of the same images."""
        zero = self.row.new_zeros((1,) * self.row.dim())
        return Positions(self.image, zero, zero, (1, 1))

    def summed(self, axes: Collection[int]) -> "Positions":
        """Return where sums over axes, which are kept with size 1, stand: at the mean of what stands somewhere."""
        axes = {axis % self.row.dim() for axis in axes}
        if all(one.shape[axis] == 1 for one in (self.image, self.row, self.column) for axis in axes):
            return self
        image = image_of_all(self.image, axes)
        row, rows = _mean(self.row, self.grid[0], axes)
        column, columns = _mean(self.column, self.grid[1], axes)
        found = Positions(image, row, column, (rows, columns))
        return found.nowhere() if max(found.grid) == 1 else found

    def lack(self, others: "Positions") -> bool:
        """Return whether a side is summed up that is not in the others."""
        return self.grid.count(1) > others.grid.count(1)

    def are_joined(self, axis: int) -> bool:
        """Return whether what differs along an axis alone stands side by side, as the pixels of a window do."""

        def widest_gap(one: Tensor) -> float:
            known = torch.where(one > 0, one, one.amax(axis, keepdim=True))
            return float(known.sort(axis).values.diff(dim=axis).amax())

        sides = zip((self.row, self.column), self.grid, strict=True)
        return all(one.shape[axis] == 1 or widest_gap(one) * side < SEAM for one, side in sides)

    def settled(self) -> "Positions":
        """Return the same on the coarsest grid that tells them apart."""
        rows, columns = _side(self.row, self.grid[0]), _side(self.column, self.grid[1])
        return Positions(self.image, self.row, self.column, (rows, columns))

    def refined(self, grids: Sequence[Grid]) -> "Positions":
        """Return the same, made of several, on the finer grid that these are parts of, as every other column is."""
        rows, columns = (
            _whole_side(part, side, sum(sides))
            for part, side, sides in zip((self.row, self.column), self.grid, zip(*grids, strict=True), strict=True)
        )
        return Positions(self.image, self.row, self.column, (rows, columns))


def upright(shape: Sequence[int], device: torch.device) -> Positions:
    """Return the positions of maps (N, C, h, w) that lie as the images do."""
    image = torch.arange(1.0, shape[0] + 1, device=device).view(-1, 1, 1, 1)
    row, column = (cell_centers(size, device) for size in shape[2:])
    return Positions(image, row.view(1, 1, -1, 1), column.view(1, 1, 1, -1), (shape[2], shape[3]))


def begins(value: Value, seen: Sequence[int]) -> Positions | None:
    """Return where a layer above frozen values stands, which no step leads to, as its shape says; None of other values.

    Args:
        value: A map, (N, C, h, w) or (N, h, w, C), or tokens, (N, tokens, C).
        seen: Shape of the images, (N, C, H, W).

    Returns:
        The positions; class tokens, which come first, stand nowhere.
    """
    shape, device = tuple(value.shape), value.device
    channel_dim = map_channel_dim(shape, tuple(seen)) if value.step < 0 and value.is_of_image else None
    if channel_dim is None:
        return None
    if len(shape) == 4:
        one = upright((shape[0], 1, *(shape[2:] if channel_dim == 1 else shape[1:3])), device)
        return one if channel_dim == 1 else one.changed(lambda part: part.permute(0, 2, 3, 1))
    grid = patch_grid(shape[1], seen)
    if grid is None:
        return None
    extra = shape[1] - math.prod(grid)
    sides = torch.meshgrid(*(cell_centers(size, device) for size in grid), indexing="ij")
    row, column = (F.pad(side.flatten(), (extra, 0)).view(1, -1, 1) for side in sides)
    return Positions(torch.arange(1.0, shape[0] + 1, device=device).view(-1, 1, 1), row, column, grid)


def cell_centers(count: int, device: torch.device) -> Tensor:
    """Return the centers of so many cells along a side."""
    return (torch.arange(count, device=device) + 0.5) / max(count, 1)


def image_of_all(image: Tensor, axes: Collection[int]) -> Tensor:
    """Return of which image sums over axes are; 0 for several. What is not known is taken for what is beside it."""
    for axis in axes:
        if image.shape[axis] > 1:
            highest = image.amax(axis, keepdim=True)
            image = highest * ((image == highest) | (image == 0)).all(axis, keepdim=True)
    return image


def shared(one: Tensor, *, fills: bool = False, within: float = 0.0) -> Tensor:
    """Return images, rows or columns with size 1 along axes along which they are the same.

    Args:
        one: Of elements.
        fills: Whether zeros, those of constants, are taken for what is beside them.
        within: How far what is the same may be apart.

    Returns:
        The same, smaller.
    """
    for axis in range(one.dim()):
        if one.shape[axis] > 1:
            first = one.amax(axis, keepdim=True) if fills else one.narrow(axis, 0, 1)
            same = (one - first).abs() <= within if within else one == first
            if one.stride(axis) == 0 or bool((same | (one == 0) if fills else same).all()):
                one = first
    return one


def _mean(one: Tensor, side: int, axes: Collection[int]) -> tuple[Tensor, int]:
    """Return means of rows, or columns, over axes, and how many cells the side then has."""
    varied = [axis for axis in axes if one.shape[axis] > 1]
    if not varied:
        return one, side
    mean = shared(one.sum(varied, keepdim=True) / (one > 0).sum(varied, keepdim=True).clamp_min(1), within=0.5 / _PARTS)
    if mean.numel() <= 1:
        return mean, 1
    known, where = (mean * _PARTS).round().unique(return_inverse=True)
    nowhere = int(known[0] == 0)
    covered = (one[one > 0] * side).floor().unique()
    if len(known) - nowhere <= side == len(covered):  # the whole side in fewer cells, which may overlap
        steps = known[nowhere:].diff()
        # next to padding means are a little off, and at corners a little more
        cell = F.pad(steps * _UNEVEN > max(steps.tolist(), default=0), (1 + nowhere, 0)).cumsum(0)
        count = int(cell[-1]) + 1
        return torch.where(where < nowhere, 0, (cell[where] + 0.5) / count), count
    return mean, _side(mean, side)


def _side(one: Tensor, side: int, most: int | None = None) -> int:
    """Return how many cells a side has, at most as many as before or so many, as the least distance tells."""
    steps = (one[one > 0] * _PARTS).round().unique().diff()
    steps = steps[steps > 2]
    return max(2, min(most or side, round(_PARTS / float(steps.min())))) if side > 1 and len(steps) else side


def _whole_side(one: Tensor, side: int, most: int) -> int:
    """Return how many cells, up to a number, a side has at whose centers all rows, or columns, stand; or as before."""
    count = _side(one, side, most)
    known = one[one > 0] * count - 0.5
    is_finer = count > side and bool(((known - known.round()).abs() < _CENTERED).all())
    return count if is_finer else side
