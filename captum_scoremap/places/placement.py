"""Sums of the numbers at a value's elements, each at its position in the image."""

import copy
from collections.abc import Collection, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from captum_scoremap.checks import is_traced, unrecorded, warn
from captum_scoremap.layout import map_channel_dim, patch_grid
from captum_scoremap.rules import Value
from captum_scoremap.tape import Recording, Site, Tape, would_be_baked_in

from .cells import Cells, cells_of
from .following import positions_in
from .frame import frame_of
from .positions import Positions, begins

__all__ = ["Entry", "MixedImagesError", "Placement", "warn_of_no_maps"]

# Layers, inside of a model or function, that nothing needs to be said of: of their input or output, at which images.
_Settled = WeakKeyDictionary[nn.Module, set[tuple[bool, tuple[int, ...]]]]
_SETTLED: WeakKeyDictionary[Any, _Settled] = WeakKeyDictionary()

Entry = tuple[Tensor | None, Tensor | None]
"""A map, (N, 1, rows, columns), and what stands beside it without a place, (N,)."""


class MixedImagesError(ValueError):
    """It cannot be told of which image something is."""


class Placement:
    """Sums products A·o over channels, each at its place in the image.

    Attributes:
        frame: Where the image lies in what the layers see.

    Raises:
        ValueError: If a graph is being made that would hold this image's positions.
    """

    def __init__(self, tape: Tape, image_shape: Sequence[int]) -> None:
        self.frame = frame_of(tape, image_shape)
        self._images = image_shape[0]
        self._only: int | None = None
        with torch.no_grad(), unrecorded():
            self._known, choices = positions_in(tape, self.frame.shape)
        for name, numbers in choices:
            if would_be_baked_in(numbers):
                raise ValueError(
                    "the places of constants must not depend on numbers of the image to be compiled, got those of "
                    f"{name}, which chooses by some. Use method.attribute."
                )
        self._cells: dict[object, Cells] = {}

    def of_image(self, image: int) -> "Placement":
        """Return the placement of products of one image's score; its entries are of N images, zero for the others."""
        placement = copy.copy(self)
        placement._only = image
        return placement

    def __call__(self, product: Tensor, value: Value) -> Entry:
        """Sum over channels what stands at a value's elements.

        Args:
            product: Shaped like the value, or broadcast to it.
            value: The value.

        Returns:
            One map, on the value's own grid, None if it has no place in the image; and what has none, None for nothing.

        Raises:
            MixedImagesError: If it cannot be told of which image something is.
        """
        images = 1 if self._only is not None else self._images
        with torch.no_grad(), unrecorded():
            cells = self._cells_of(value, images)
        product = product.expand(value.shape)
        summed = product.sum(cells.summed, keepdim=True) if cells.summed else product
        size = cells.grid[0] * cells.grid[1] + 1
        if images > 1 and cells.axis is None:
            total = _added(summed.flatten()[None], cells.where % (images * size + 1), images * size + 1)[0]
            self._check_images(total[-1], summed)
            placed = total[:-1].view(images, size)
        else:
            rows = summed.flatten()[None] if cells.axis is None else summed.movedim(cells.axis, 0).reshape(images, -1)
            if cells.is_order:
                return self._row(rows.view(images, 1, *cells.grid)), None
            placed = _added(rows, cells.where, size)
        one = placed[:, 1:].reshape(images, 1, *cells.grid) if max(cells.grid) > 1 else None
        has_rest = cells.has_rest and (one is None or not self._is_rounding(placed[:, 0], summed))
        return self._row(one), self._row(placed[:, 0]) if has_rest else None

    def has_place(self, value: Value) -> bool:
        """Return whether a value's elements stand all over the image; its rows and columns each along one axis."""
        with torch.no_grad(), unrecorded():
            positions = self._positions_of(value)
            if not positions.are_known or not self._cells_of(value, self._images).are_even():
                return False
        rows, columns = _sides(positions)
        return value.ndim != 4 or (max(len(rows), len(columns)) == 1 and rows != columns)

    def are_tokens(self, value: Value) -> bool:
        """Return whether a value's rows and columns lie along the same axes, in any order, rather than side by side."""
        rows, columns = _sides(self._positions_of(value))
        return rows == columns or not (rows and columns)

    def is_map(self, value: Value) -> bool:
        """Return whether a value's rows and columns, or tokens, are the image's, one after another."""
        if not self.has_place(value):
            return False
        positions, cells = self._positions_of(value), self._cells_of(value, self._images)
        channel_dim = map_channel_dim(tuple(value.shape), self.frame.shape_for(value.shape))
        if (self._images > 1 and cells.axis is None) or (channel_dim or 0) % value.ndim in positions.axes:
            return cells.axis == 1
        where = cells.where[0][cells.where[0] > 0]
        return torch.equal(where, torch.arange(1, len(where) + 1, device=where.device))

    def _positions_of(self, value: Value) -> Positions:
        """Return where a value's elements stand, all channels together."""
        shape = tuple(value.shape)
        one = self._known[value][0] if value in self._known else begins(value, self.frame.shape_for(shape))
        if one is None:
            zero = torch.zeros((1,) * len(shape), device=value.device)
            is_first = len(shape) > 0 and shape[0] == self._images
            numbers = torch.arange(1.0, self._images + 1, device=value.device).view(-1, *(1,) * (len(shape) - 1))
            return Positions(numbers if is_first else zero, zero, zero, (1, 1))
        channel_dim = map_channel_dim(shape, self.frame.shape_for(shape)) if len(shape) in {3, 4} else None
        if channel_dim is None:
            return one
        rows, columns = _sides(one)
        if rows == columns:  # shapes of tokens do not tell which are the channels: those that stand closer together
            channel_dim = min((1, len(shape) - 1)[::channel_dim], key=one.spread)
        left = one.summed([channel_dim])
        return one if left.lack(one) or not one.are_joined(channel_dim) else left

    def _cells_of(self, value: Value, images: int) -> Cells:
        """Return the cells of a value's elements, of images that are told apart."""
        key = self._known[value][0] if value in self._known else value, value.shape, images
        if key not in self._cells:
            self._cells[key] = cells_of(self._positions_of(value), images)
        return self._cells[key]

    def _row(self, one: Tensor | None) -> Tensor | None:
        """Return what is of the one image, (1, ...), as that of N, where there is but one."""
        if one is None or self._only is None:
            return one
        rows = one.new_zeros(self._images, *one.shape[1:])
        rows[self._only] = one[0]
        return rows

    def _is_rounding(self, rest: Tensor, product: Tensor) -> bool:
        """Return whether nothing stands beside a map but rounding; a graph cannot know of other images."""
        if is_traced():
            return False
        with unrecorded():
            return not bool((rest.abs() > 8 * torch.finfo(rest.dtype).eps * product.abs().sum()).any())

    def _check_images(self, unknown: Tensor, product: Tensor) -> None:
        """Raise if something is of an image that is not known."""
        with unrecorded():
            if float(unknown.abs()) <= 1e-6 * float(product.abs().sum()):
                return
        raise MixedImagesError(
            f"every operation must keep the {self._images} images apart, got {tuple(product.shape)}. Explain one "
            "image at a time."
        )


def _added(rows: Tensor, where: Tensor, size: int) -> Tensor:
    """Return the sums of rows in so many cells, (rows, size); what is in several has a part in each."""
    each = [rows.new_zeros(len(rows), size).index_add(1, one, rows) for one in where]
    return each[0] if len(each) == 1 else sum(each[1:], each[0]) / len(each)


def _sides(positions: Positions) -> list[list[int]]:
    """Return the axes along which rows differ, and those along which columns do."""
    return [[axis for axis, size in enumerate(one.shape) if size > 1] for one in (positions.row, positions.column)]


def warn_of_no_maps(recording: Recording, sites: Collection[Site], image_shape: Sequence[int]) -> None:
    """Warn of layers whose score maps look like pictures of the image, but whose rows and columns are none of it.

    It is a question of shapes and of what ran, not of numbers: a layer that gives maps of images of a size gives them
    again, and to ask each time would take a tenth of the time of a transformer's map.
    """
    size = tuple(image_shape)
    settled = _settled_in(recording.forward_func)
    unknown = [site for site in sites if (site[1], size) not in settled.get(site[0], ())]
    if not unknown or len(size) != 4 or is_traced():
        return
    placement = Placement(recording.tape, size)
    for site in unknown:
        values = recording.tapped[site].values
        shape = tuple(values[0].shape)
        channel_dim = map_channel_dim(shape, size) if len(values) == 1 else None
        looks_like_map = channel_dim is not None and (len(shape) != 3 or patch_grid(shape[1], size) is not None)
        if not looks_like_map or placement.is_map(values[0]):
            settled.setdefault(site[0], set()).add((site[1], size))
            continue
        name = recording.modules.name_of(site[0]) or type(site[0]).__name__
        warn(
            f"the score map of {name!r}, whose tensor is {shape}, looks like a picture of the image, but is none: "
            "rows and columns are object queries, weights of attention or the like, or in another order. "
            "Do not lay it over the image; linear_form(...).plot() draws what has a place."
        )


def _settled_in(model: Any) -> _Settled:
    """Return what was settled inside of a model: around a layer another may turn the image."""
    try:  # a method is another object each time, its function is not
        return _SETTLED.setdefault(getattr(model, "__func__", model), WeakKeyDictionary())
    except TypeError:  # a callable of the user's that cannot be told again
        return WeakKeyDictionary()
