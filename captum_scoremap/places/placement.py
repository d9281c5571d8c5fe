"""Where the elements of a tensor stand in the image.

Where the layout of a tensor is known, it says so. Of the others a tensor (N, C, h, w) says it by its shape; those like
(N, h, w, C) or (N, tokens, C) may be padded, or have their positions in another order: windows of attention, rows of a
matrix product, tokens before images. They were made of a tensor with places by steps that only move elements, or that
keep the position of each row, so numbers at their elements are carried back along those steps, which is what their
transposes do, up to where the branch begins.
"""

import copy
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from captum_scoremap.checks import is_traced, unrecorded, warn
from captum_scoremap.layout import map_channel_dim, patch_grid, placed_map
from captum_scoremap.rules import Value, display_name
from captum_scoremap.tape import Recording, Site, Tape

from .frame import frame_of
from .layouts import Layout, Layouts
from .positions import makes_maps, may_be_elsewhere, row_sources, values_elsewhere, values_folded
from .turns import UPRIGHT

__all__ = ["Entry", "MixedImagesError", "Placement", "warn_of_no_maps"]

# What carries numbers back to where they came from as moves do: each region's cells are means of the map's, and a
# maximum is one of the numbers.
_MOVING = {"roi_align", "im2col", "index_put", "as_strided_scatter", "amax", "amin", "max", "min"}

# What may put constants where elements of as large a tensor stood, so that not all numbers find a way back.
_OVERWRITING = {"index_put", "constant_pad_nd", "as_strided_scatter"}

# The most steps that numbers are carried back: from a window's last product to its partition.
_FAR = 256

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
    """

    def __init__(self, tape: Tape, image_shape: Sequence[int]) -> None:
        self._steps = tape.steps
        self.frame = frame_of(tape, image_shape)
        self._images = image_shape[0]
        self._only: int | None = None
        with torch.no_grad(), unrecorded():
            layouts = Layouts(tape, self.frame.shape)
        sums = layouts.sums
        nowhere = sums.gathered | layouts.disordered
        self._elsewhere = values_elsewhere(tape, image_shape[0], layouts.moved, nowhere, sums.transformed)
        self._gathered = sums.gathered | (sums.transformed & self._elsewhere)  # made of all positions
        self._layouts = {value: one for value, one in layouts.known.items() if value not in self._elsewhere}
        self._channels_first = layouts.channels_first
        self._grids = {
            (value.shape[2], value.shape[3])
            for step in tape.steps
            for value in step.outputs
            if len(value.shape) == 4
            and value not in self._elsewhere
            and map_channel_dim(tuple(value.shape), self.frame.shape_for(value.shape)) == 1
        }
        # windows by cells, (N, rows, side, columns, side, C), and what is made of them, may have cells in any order
        self._is_folded = any(value.ndim > 5 for step in tape.steps for value in step.outputs)
        self._folded = values_folded(tape)
        # grids of what is a map for certain: of as many tokens as channels nobody knows
        self._sure = {(image_shape[2], image_shape[3])} | {
            (value.shape[2], value.shape[3])
            for step in tape.steps
            for value in step.outputs
            if len(value.shape) == 4 and makes_maps(display_name(step.operation))
        }

    def of_image(self, image: int) -> "Placement":
        """Return the placement of products of one image's score; its entries are of N images, zero for the others."""
        placement = copy.copy(self)
        placement._only = image
        return placement

    def __call__(self, product: Tensor, value: Value, *, is_named: bool = False) -> list[Entry]:
        """Sum over channels what stands at a value's elements: maps, of a named layer on its grid, and the rest."""
        entries = self._entries(product.expand(value.shape), value, _FAR, is_named=is_named)
        return entries if self._only is None else [(self._row(one), self._row(rest)) for one, rest in entries]

    def map_of(self, product: Tensor, value: Value) -> Entry:
        """Sum over channels what stands at the elements of a named layer: one map, None for no place, and the rest."""
        entries = self(product, value, is_named=True)
        maps = [one for one, _ in entries if one is not None]
        rests = [rest for _, rest in entries if rest is not None]
        grid = max(((one.shape[2], one.shape[3]) for one in maps), key=math.prod, default=(0, 0))
        placed = torch.stack([self.frame.on_grid(one, grid) for one in maps]).sum(0) if maps else None
        return placed, torch.stack(rests).sum(0) if rests else None

    def is_in_order(self, value: Value) -> bool:
        """Return whether the rows and columns of a value, (N, C, h, w), are the image's, one after another.

        Those of an attention are tokens, those of unfolded patches the pixels of each and the patches. Where they came
        from tells: a row lies below the one before it, a column beside.
        """
        with torch.no_grad(), unrecorded():
            for axis, along, beside in ((2, 0, 1), (3, 1, 0)):
                if value.shape[axis] == 1:
                    continue
                first, second = (self.of_image(0)._center(value, axis, index) for index in range(2))
                if first[along] > second[along] - 1e-9 or abs(first[beside] - second[beside]) > 1e-6:
                    return False
        return True

    def has_place(self, value: Value) -> bool:
        """Return whether a value's elements stand at positions of the image that are known."""
        return value in self._layouts or (value not in self._elsewhere and (value.ndim != 4 or self.is_map(value)))

    def is_map(self, value: Value) -> bool:
        """Return whether a value's rows and columns, or tokens, are the image's, one after another."""
        if value in self._elsewhere:
            return False
        layout = self._layouts.get(value)
        if layout is not None and layout.image_axis:  # of as many tokens as images shapes know nothing
            return layout.turn == UPRIGHT
        axis = next((axis for axis, size in enumerate(value.shape[:2]) if size == self._images), None)
        if axis is None:
            return False
        with torch.no_grad(), unrecorded():
            marks = torch.zeros(value.shape, dtype=value.dtype, device=value.device)
            first = marks.select(axis, 0)
            first.copy_(torch.arange(1, first.numel() + 1).view(first.shape))
            by_shape, _ = placed_map(marks, self.frame.shape_for(marks.shape), self._grids)
            placed, _ = self.of_image(0).map_of(marks, value)
        return by_shape is not None and placed is not None and _are_close(placed, by_shape)

    def _center(self, value: Value, axis: int, index: int) -> tuple[float, float]:
        """Return the mean place in the image, as fractions of its sides, of one row or column."""
        marks = torch.zeros(value.shape, dtype=value.dtype, device=value.device)
        marks[0].select(axis - 1, index).fill_(1)
        shares = self._carried_back(marks, value, through_sums=True)
        placed = [one for share, source in shares for one, _ in self._entries(share, source, _FAR) if one is not None]
        total = sum(float(one.sum()) for one in placed)
        if not total:  # of nothing that it was made of is known where it stands
            return (float(index), 0.0) if axis == 2 else (0.0, float(index))
        sums = [0.0, 0.0]
        for one in placed:
            for side in (0, 1):
                cells = one.shape[2 + side]
                at = (torch.arange(cells, dtype=one.dtype, device=one.device) + 0.5) / cells
                sums[side] += float((one.sum((0, 1, 3 - side)) * at).sum())
        return sums[0] / total, sums[1] / total

    def _entries(self, product: Tensor, value: Value, far: int, *, is_named: bool = False) -> list[Entry]:
        """Place products by their shape where that is certain, else where they are carried back to, if it is known."""
        layout = self._layouts.get(value)
        own = product if self._only is None else self._of_only(product, self._only, layout)
        if layout is not None:
            return [layout.placed(own)]
        by_shape, channel_dim = self._placed_by_shape(own, value)
        if channel_dim == 1:
            grid = (own.shape[2], own.shape[3])
            is_sure = grid in self._sure and value not in self._folded
            if is_sure or (is_named and self._is_in_proportion(grid) and self.is_in_order(value)):
                return [by_shape]
        through_sums = by_shape[0] is None or channel_dim == 1 or self._is_folded
        carried = list(self._carried_back(product, value, through_sums=through_sums)) if far else []
        entries = [entry for share, source in carried for entry in self._entries(share, source, far - 1)]
        if by_shape[0] is not None and all(one is None for one, _ in entries):
            return [by_shape]
        if not carried:
            return [(None, self._of_images(self._total(product), product))]
        is_overwritten = display_name(self._steps[value.step].operation) in _OVERWRITING
        if is_overwritten or sum(share.numel() for share, _ in carried) < product.numel():  # some stood on a constant
            lost = self._total(product) - sum(self._total(share) for share, _ in carried)
            with unrecorded():
                is_rounding = not bool((lost.abs() > 8 * torch.finfo(lost.dtype).eps * product.abs().sum()).any())
            if is_traced() or not is_rounding:  # a graph cannot know of other images
                entries.append((None, self._of_images(lost, product)))
        return entries

    def _placed_by_shape(self, own: Tensor, value: Value) -> tuple[Entry, int | None]:
        """Return where a tensor's shape says that its elements stand, and which of four dimensions has the channels."""
        if value in self._elsewhere or value in self._channels_first:
            return (None, None), None
        like = self.frame.shape_for(own.shape)
        like = like if self._only is None else (1, *like[1:])
        channel_dim = map_channel_dim(tuple(own.shape), like) if own.dim() == 4 else None
        if channel_dim == -1:
            # a part of a map may have as many channels as rows; windows by tokens look like rows and columns
            is_part = tuple(own.shape[2:]) in self._sure
            if is_part or not self._is_in_proportion(own.shape[1:3]):
                return (None, None), None
        return placed_map(own, like, self._grids), channel_dim

    def _of_only(self, product: Tensor, image: int, layout: Layout | None) -> Tensor:
        """Return what a tensor holds of the one image whose score it is of, as that of a single image."""
        axes = range(min(2, product.dim())) if layout is None else (layout.image_axis,)
        for axis in axes:
            if product.shape[axis] == self._images:
                own = product.narrow(axis, image, 1)
                if own.count_nonzero() == product.count_nonzero():
                    return own
        # images that depend on one another: what all of them add to the score of the one
        first = 0 if layout is None else layout.image_axis
        is_first = product.dim() > first and product.shape[first] == self._images
        return product.sum(first, keepdim=True) if is_first else product

    def _row(self, one: Tensor | None) -> Tensor | None:
        """Return what is of the one image, (1, ...), as that of N, where there is but one."""
        if one is None or self._only is None:
            return one
        rows = one.new_zeros(self._images, *one.shape[1:])
        rows[self._only] = one[0]
        return rows

    def _is_in_proportion(self, grid: Sequence[int]) -> bool:
        """Return whether rows and columns are in the image's proportions but for a cell: windows by tokens are not."""
        height, width = self.frame.size
        return abs(grid[0] * width - grid[1] * height) <= max(height, width)

    def _carried_back(self, product: Tensor, value: Value, *, through_sums: bool) -> Iterator[tuple[Tensor, Value]]:
        """The same numbers at the elements of the values that the value was made of, if these have its positions."""
        rows = product.shape[:-1]
        if value.step < 0 or value in self._gathered or (value.ndim > 1 and rows.numel() <= self._images):
            return  # one row an image has no position
        step = self._steps[value.step]
        if step.rule.moves or display_name(step.operation) in _MOVING:
            # products are real ones, of complex values too
            gradients = tuple(product.to(one.dtype) if one is value else None for one in step.outputs)
            for source, share in zip(step.values, step.rule.transpose(step, step.frozen(), gradients), strict=True):
                if share is not None:
                    yield share.real if share.is_complex() else share, source
            return
        # of a product whose rows are elsewhere the second factor may be as large by chance, else it has the same places
        sources = row_sources(step, value) if value in self._elsewhere else step.values
        alike = [source for source in sources if source.shape == product.shape]
        if len(alike) > 1 and step.rule.is_affine(step):  # a sum, such as that of a block and its shortcut
            if not through_sums:
                return
            alike = [min(alike, key=lambda one: one.step)]  # the shortcut
        # else a product with a matrix, row by row, or a convolution of what is a map of a region
        for source in alike or sources:
            if source.shape == product.shape:
                yield product, source
            elif source.shape[:-1] == rows and source.ndim:
                yield (product.sum(-1, keepdim=True) / source.shape[-1]).expand(source.shape), source
            elif value in self._elsewhere and source.ndim == 4 == product.dim() and _are_cells_alike(source, product):
                yield (product.sum(1, keepdim=True) / source.shape[1]).expand(source.shape), source
            else:
                continue
            return

    def _total(self, product: Tensor) -> Tensor:
        """The sum of each image, (N,), if the images come first; else of all of them."""
        first = self._only is None and product.dim() and product.shape[0] == self._images
        return product.reshape(self._images, -1).sum(1) if first else product.sum()

    def _of_images(self, total: Tensor, product: Tensor) -> Tensor | None:
        """What has no place, (N,)."""
        if total.dim():
            return total
        if self._images == 1 or self._only is not None:
            return total[None]
        with unrecorded():
            if float(total.abs()) <= 1e-6 * float(product.abs().sum()):
                return None
        raise MixedImagesError(
            f"every operation must keep the {self._images} images first, got {tuple(product.shape)}. Explain one "
            "image at a time."
        )


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
    placement = Placement(recording.tape, size) if may_be_elsewhere(recording.tape) else None
    for site in unknown:
        values = recording.tapped[site].values
        shape = tuple(values[0].shape)
        channel_dim = map_channel_dim(shape, size) if len(values) == 1 else None
        looks_like_map = channel_dim is not None and (len(shape) != 3 or patch_grid(shape[1], size) is not None)
        if placement is None or not looks_like_map or placement.is_map(values[0]):
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


def _are_close(one: Tensor, other: Tensor) -> bool:
    """Return whether two maps are one, but for rounding."""
    return one.shape == other.shape and bool(((one - other).abs() <= 1e-3 * other.abs().amax()).all())


def _are_cells_alike(source: Value, product: Tensor) -> bool:
    """Return whether two tensors (N, C, h, w) differ in channels alone."""
    return source.shape[0] == product.shape[0] and source.shape[2:] == product.shape[2:]
