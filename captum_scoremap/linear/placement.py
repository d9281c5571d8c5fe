"""Where the elements of a tensor stand in the image.

A tensor (N, C, h, w) says it by its shape. Others, (N, h, w, C) or (N, tokens, C), may be padded or rolled, or have
their positions in another order: windows of attention, rows of a matrix product, tokens before images. They were made
of a tensor with places by steps that only move elements, or that keep the position of each row, so numbers at their
elements are carried back along those steps, which is what their transposes do, up to where the branch begins.
"""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from captum_scoremap.checks import is_traced, unrecorded
from captum_scoremap.layout import map_channel_dim, placed_map
from captum_scoremap.rules import Value, display_name
from captum_scoremap.tape import Tape

from .frame import frame_of
from .positions import row_sources, values_elsewhere

__all__ = ["Entry", "MixedImagesError", "Placement"]

# What carries numbers back to where they came from as moves do: each region's cells are means of the map's, and a
# maximum is one of the numbers.
_MOVING = {"roi_align", "index_put", "amax", "amin", "max", "min"}

# The most steps that numbers are carried back: from a window's last product to its partition.
_FAR = 256

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
        self._elsewhere = values_elsewhere(tape, image_shape[0])
        self._grids = {
            (value.shape[2], value.shape[3])
            for step in tape.steps
            for value in step.outputs
            if len(value.shape) == 4
            and value not in self._elsewhere
            and map_channel_dim(tuple(value.shape), self.frame.shape_for(value.shape)) == 1
        }
        # windows by cells, (N, rows, side, columns, side, C), and what is made of them, may have tokens in any order
        self._is_folded = any(value.ndim > 5 for step in tape.steps for value in step.outputs)
        # grids of what is a map for certain: of as many tokens as channels nobody knows
        self._sure = {(image_shape[2], image_shape[3])} | {
            (value.shape[2], value.shape[3])
            for step in tape.steps
            for value in step.outputs
            if len(value.shape) == 4 and _makes_maps(display_name(step.operation))
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

    def _entries(self, product: Tensor, value: Value, far: int, *, is_named: bool = False) -> list[Entry]:
        own = product if self._only is None else self._of_only(product, self._only)
        like = self.frame.shape_for(own.shape) if self._only is None else (1, *self.frame.shape_for(own.shape)[1:])
        is_placed = value not in self._elsewhere
        channel_dim = map_channel_dim(tuple(own.shape), like) if is_placed and own.dim() == 4 else None
        by_shape: Entry = (None, None)
        if is_placed and (channel_dim != -1 or self._is_in_proportion(own.shape[1:3])):
            by_shape = placed_map(own, like, self._grids)
        grid = tuple(own.shape[2:])
        if channel_dim == 1 and (grid in self._sure or (is_named and self._is_in_proportion(grid))):
            return [by_shape]
        through_sums = by_shape[0] is None or channel_dim == 1 or (own.dim() == 3 and self._is_folded)
        carried = list(self._carried_back(product, value, through_sums=through_sums)) if far else []
        entries = [entry for share, source in carried for entry in self._entries(share, source, far - 1)]
        if by_shape[0] is not None and all(one is None for one, _ in entries):
            return [by_shape]
        if not carried:
            return [(None, self._of_images(self._total(product), product))]
        if sum(share.numel() for share, _ in carried) < product.numel():  # some stood on padding, or on a constant
            lost = self._total(product) - sum(self._total(share) for share, _ in carried)
            with unrecorded():
                is_rounding = not bool((lost.abs() > 8 * torch.finfo(lost.dtype).eps * product.abs().sum()).any())
            if is_traced() or not is_rounding:  # a graph cannot know of other images
                entries.append((None, self._of_images(lost, product)))
        return entries

    def _of_only(self, product: Tensor, image: int) -> Tensor:
        """Return what a tensor holds of the one image whose score it is of, as that of a single image."""
        for axis in range(min(2, product.dim())):
            if product.shape[axis] == self._images:
                own = product.narrow(axis, image, 1)
                if own.count_nonzero() == product.count_nonzero():
                    return own
        # images that depend on one another: what all of them add to the score of the one
        return product.sum(0, keepdim=True) if product.dim() and product.shape[0] == self._images else product

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
        if value.step < 0 or product.shape[:-1].numel() <= self._images:  # one row an image has no position
            return
        step = self._steps[value.step]
        if step.rule.moves or display_name(step.operation) in _MOVING:
            gradients = tuple(product if one is value else None for one in step.outputs)
            for source, share in zip(step.values, step.rule.transpose(step, step.frozen(), gradients), strict=True):
                if share is not None:
                    yield share, source
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


def _are_cells_alike(source: Value, product: Tensor) -> bool:
    """Return whether two tensors (N, C, h, w) differ in channels alone."""
    return source.shape[0] == product.shape[0] and source.shape[2:] == product.shape[2:]


def _makes_maps(name: str) -> bool:
    """Return whether an operation takes and returns maps, (N, C, h, w)."""
    return name == "conv" or "pool" in name or "upsample" in name
