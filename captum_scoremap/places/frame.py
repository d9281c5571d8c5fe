"""Where the image lies in what a network's layers see, which may be the image resized, or padded, or both.

Detectors bring images to sides that are multiples of 32 by zeros at the right and below, and their layers' cells cover
these, too. The first convolution sees the frame; those of its positions that depend on the image tell where it lies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_scoremap.checks import unrecorded
from captum_scoremap.layout import resized
from captum_scoremap.rules import Value, display_name
from captum_scoremap.tape import Step, Tape

__all__ = ["Frame", "frame_of"]

Size = tuple[int, int]
# Of each side of the image, so much is seen where all of it is: resizing may pass over pixels at the border.
_WHOLE = 0.9


@dataclass(frozen=True)
class Frame:
    """What the layers see, and where in it the image lies."""

    image: Size  # rows and columns of the image
    shape: tuple[int, ...]  # of what the first convolution sees, (N, C, H, W), which may be the image
    rows: Size  # first row of the image in it, and the one after the last
    columns: Size  # first column, and the one after the last

    @property
    def box(self) -> Size:
        """Rows and columns that the image takes of it."""
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]

    @property
    def is_padded(self) -> bool:
        """Whether there is more in it than the image."""
        return self.box != self.size

    @property
    def size(self) -> Size:
        """Its rows and columns."""
        return self.shape[2], self.shape[3]

    def shape_for(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return what a tensor's rows and columns are to be compared with: the frame's shape, or the image's."""
        own = tuple(shape[-2:]) == self.image or tuple(shape[1:3]) == self.image
        return (*self.shape[:2], *self.image) if own else self.shape

    def on_image(self, one: Tensor, size: Size) -> Tensor:
        """Return a map, (N, 1, h, w), on the image alone, (N, 1, *size), sums kept but for what stands on padding."""
        if not self.is_padded or self.is_of_image(one):
            return resized(one, size)
        return resized(self._cut(resized(one, self.size)), size)

    def on_grid(self, one: Tensor, grid: Size) -> Tensor:
        """Return a map on a layer's grid, (N, 1, *grid), which is of the frame's extent, sums kept."""
        if not self.is_padded or not self.is_of_image(one) or tuple(one.shape[2:]) == grid:
            return resized(one, grid)
        (top, bottom), (left, right) = self.rows, self.columns
        sides = (left, self.size[1] - right, top, self.size[0] - bottom)
        return resized(F.pad(resized(one, self.box), sides), grid)

    def cut(self, one: Tensor) -> Tensor:
        """Return the part of a map that is of the image, in cells about as large as the map's; all of it, or less."""
        if not self.is_padded or self.is_of_image(one):
            return one
        sides = zip(one.shape[2:], self.box, self.size, strict=True)
        rows, columns = (max(1, round(cells * own / whole)) for cells, own, whole in sides)
        return self.on_image(one, (rows, columns))

    def enlarged(self, one: Tensor, mode: str = "bilinear") -> Tensor:
        """Return a map interpolated to the image's size, (N, 1, H, W), values kept rather than sums."""
        corners = False if mode == "bilinear" else None
        if self.is_padded and not self.is_of_image(one):
            one = self._cut(F.interpolate(one, size=self.size, mode=mode, align_corners=corners))
        return F.interpolate(one, size=self.image, mode=mode, align_corners=corners)

    def is_of_image(self, one: Tensor) -> bool:
        """Return whether a map, (N, 1, h, w), is of the image alone, as what the model does before it pads it."""
        return tuple(one.shape[2:]) in {self.image, self.box}

    def _cut(self, one: Tensor) -> Tensor:
        return one[:, :, self.rows[0] : self.rows[1], self.columns[0] : self.columns[1]]


def frame_of(tape: Tape, image_shape: Sequence[int]) -> Frame:
    """Return the frame of a run; the image itself where no convolution of as many channels sees another size."""
    shape = tuple(image_shape)
    whole = Frame((shape[2], shape[3]), shape, (0, shape[2]), (0, shape[3]))
    place = tape.inputs[0] if tape.inputs else None
    steps = [step for step in tape.steps if step.values and display_name(step.operation) == "conv"]
    # the network's own rather than a filter before it
    step = next((step for step in steps if isinstance(step.module, nn.Conv2d)), next(iter(steps), None))
    if place is None or step is None:
        return whole
    first, seen = step.values[0], tuple(step.values[0].shape)
    is_on_its_side = seen[2:] == shape[:1:-1]
    if len(seen) != 4 or seen[:2] != shape[:2] or is_on_its_side or _is_own_padding(step, seen, shape):
        return whole
    with torch.no_grad(), unrecorded():
        zero = place.zeros()
        one, none = (tape.forward({place: given}, [first], bypass=False)[first] for given in (zero + 1, zero))
        rows, columns = _extent(one != none)
        read = tape.transposed({first: one.new_ones(seen)}, {place: lambda share: share})
        spans = [end - start for start, end in _extent(read[place] != 0)] if place in read else [0, 0]
    if min(span / side for span, side in zip(spans, whole.image, strict=True)) < _WHOLE:
        return whole  # a part of the image, such as a crop
    return Frame(whole.image, seen, rows, columns)


def _is_own_padding(step: Step, seen: Sequence[int], shape: Sequence[int]) -> bool:
    """Return whether a convolution sees the image, or that with less than its kernel around it, as its own padding."""
    weight = step.args[1]
    kernel = weight.shape[2:] if isinstance(weight, (Tensor, Value)) else (1, 1)
    return all(0 <= own - side < max(size, 1) for own, side, size in zip(seen[2:], shape[2:], kernel, strict=True))


def _extent(marked: Tensor) -> tuple[Size, Size]:
    """Return the first row and column with a mark in (N, C, H, W), each with the one after the last."""
    plane = marked.any(0).any(0)
    found = [plane.any(axis).nonzero()[:, 0] for axis in (1, 0)]
    rows, columns = ((int(each[0]), int(each[-1]) + 1) if len(each) else (0, 0) for each in found)
    return rows, columns
