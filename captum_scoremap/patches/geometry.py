"""Where a pixel of the network's input lies in the image as it was before preprocessing.

A preprocessing function does not say what it does to an image, so it is probed: pictures of the image's size go
through it, black, white, and some that brighten or darken evenly along an axis. How bright a pixel of such a ramp
comes out, between black and white, is where it comes from.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

__all__ = ["Geometry", "geometry"]

Box = tuple[int, int, int, int]
Axis = tuple[float, float]
_TOLERANCE = 1.5  # steps of an 8-bit ramp: more than rounding and resampling leave


@dataclass(frozen=True)
class Geometry:
    """Scale and shift from the network's input to the original image.

    Attributes:
        x: Pixels of the original per pixel of the input, and where the input's left border lies in the original.
        y: The same for rows and the upper border.
        width: Columns of the original.
        height: Rows of the original.
    """

    x: Axis
    y: Axis
    width: int
    height: int

    def to_original(self, box: Box) -> Box:
        """Return the pixels of the original that a box of the input shows.

        Args:
            box: ``x0, y0, x1, y1`` in pixels of the input, x1 and y1 exclusive.

        Returns:
            The same in whole pixels of the original, at least one pixel large and inside the image.
        """
        x0, x1 = _span(self.x, box[0], box[2], self.width)
        y0, y1 = _span(self.y, box[1], box[3], self.height)
        return x0, y0, x1, y1


def _span(axis: Axis, start: int, stop: int, length: int) -> tuple[int, int]:
    """Return the pixels between two borders of the input; preprocessing may have mirrored them."""
    scale, shift = axis
    low, high = sorted((round(scale * start + shift), round(scale * stop + shift)))
    first = min(max(low, 0), length - 1)
    return first, min(max(high, first + 1), length)


def geometry(preprocess: Callable[[Image.Image], Tensor], image: Image.Image) -> Geometry:
    """Find scale and shift of a preprocessing that resizes, crops, pads or mirrors.

    Args:
        preprocess: From an image to the network's input (C, H, W). Per pixel it may do with the values what it likes,
            as long as that is linear.
        image: The image; only its size and mode matter.

    Returns:
        The geometry, to a fraction of a pixel of the original.

    Raises:
        ValueError: It does something else, such as rotating, or something else each time.

    Example:
        >>> from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor
        >>> preprocess = Compose([Resize(64), CenterCrop(32), ToTensor()])
        >>> geometry(preprocess, Image.new("RGB", (256, 128))).to_original((0, 0, 32, 32))
        (96, 32, 160, 96)
    """
    width, height = image.size

    def shown(pixels: npt.NDArray[np.float64]) -> Tensor:
        gray = Image.fromarray(np.broadcast_to(pixels, (height, width)).astype(np.uint8))
        return preprocess(gray.convert(image.mode)).double().mean(dim=0)

    contrast = shown(np.array(255.0)) - shown(np.array(0.0))
    inside = contrast.abs() > 0.99 * contrast.abs().max()  # the rest was padded
    lines = []
    for axis, length in ((1, width), (0, height)):
        ramp = np.expand_dims(np.rint(np.linspace(0, 255, length)), 1 - axis)
        # With the opposite ramp, what rounding to whole brightnesses does cancels out.
        brightness = (1 + (shown(ramp) - shown(255 - ramp)) / contrast) / 2
        lines.append(_line(brightness[inside], inside.nonzero()[:, axis], length))
    return Geometry(lines[0], lines[1], width, height)


def _line(brightness: Tensor, cells: Tensor, length: int) -> Axis:
    """Return the straight line from rows (or columns) of the input to those of the original.

    Args:
        brightness: Of pixels of the input that show a ramp, 0 to 1.
        cells: Their rows.
        length: Rows of the original.

    Returns:
        Its slope and where it begins.

    Raises:
        ValueError: There are none, or they do not lie on a line.
    """
    place, at = brightness.numpy() * (length - 1) + 0.5, cells.numpy() + 0.5
    if length == 1:
        return 0.0, 0.0
    between = (place > 0.51) & (place < length - 0.51)  # enlarging repeats the outermost pixels
    if len(np.unique(at[between])) > 1:
        place, at = place[between], at[between]
    if len(np.unique(at)) > 1:
        slope, start = np.polyfit(at, place, deg=1)
        if np.abs(slope * at + start - place).max() < _TOLERANCE * length / 255 + abs(slope):
            return float(slope), float(start)
    raise ValueError(
        "preprocess must resize, crop, pad or mirror, the same way for all images of a size; got one that moves "
        "pixels otherwise. Pass tensors that are already preprocessed."
    )
