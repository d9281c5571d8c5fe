"""Where the cells of a feature map lie in the image, learned from nothing but the sizes a network returns."""

import copy
from functools import cached_property

import torch
from torch import Tensor, nn

Pair = tuple[int, int]

_FAR = 1 << 14  # pixels; no data is computed, so a large image costs no more than a small one


class Geometry:
    """Sizes of feature maps, from a copy of the network that has no data.

    A map grows by one cell whenever the image grows by the stride. So all is found on large images, where no
    layer runs out of pixels.

    Args:
        features: The convolutional part of a network.
    """

    def __init__(self, features: nn.Module) -> None:
        first = (layer.in_channels for layer in features.modules() if isinstance(layer, nn.Conv2d))
        self.channels = next(first, 3)
        self._sizes: dict[Pair, Pair] = {}
        data = {id(tensor): tensor for tensor in [*features.parameters(), *features.buffers()]}
        empty = {key: tensor.detach().to("meta") for key, tensor in data.items()}
        self._features = copy.deepcopy(features, empty)
        self._dtype = next((tensor.dtype for tensor in data.values() if tensor.is_floating_point()), None)

    def map_size(self, size: Pair) -> Pair:
        """Return rows and columns of the feature map of an image.

        Args:
            size: Height and width of the image, in pixels.

        Returns:
            Rows and columns, in cells.

        Raises:
            ValueError: If the network cannot take an image of this size, or returns no map.
        """
        if size in self._sizes:
            return self._sizes[size]
        image = torch.empty((1, self.channels, *size), device="meta", dtype=self._dtype)
        try:
            with torch.no_grad():
                maps = self._features(image)
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ValueError(
                f"features must take images of any size, got an error at {size[0]} x {size[1]} pixels: {error}"
            ) from error
        return self._sizes.setdefault(size, rows_and_columns(maps))

    @cached_property
    def stride(self) -> Pair:
        """How many pixels neighboring cells lie apart, down and right.

        Raises:
            ValueError: If the map does not grow by one cell every so many pixels.
        """
        near, far = self.map_size((_FAR, _FAR)), self.map_size((2 * _FAR, 2 * _FAR))
        if near[0] == far[0] or near[1] == far[1]:
            raise ValueError(
                f"features must return larger maps for larger images, got {near} cells at {_FAR} and {far} "
                f"at {2 * _FAR} pixels. Leave pooling to a fixed size to the head."
            )
        down, right = (round(_FAR / (b - a)) for a, b in zip(near, far, strict=True))
        if self.map_size((_FAR + down, _FAR + right)) != (near[0] + 1, near[1] + 1):
            raise ValueError(
                f"features must return one more cell every so many pixels, got {near} cells at {_FAR} and "
                f"{far} at {2 * _FAR} pixels."
            )
        return down, right

    def smallest_view(self, window: Pair) -> Pair:
        """Return the smallest image whose map is as large as `window`.

        Args:
            window: Rows and columns, in cells.

        Returns:
            Height and width, in pixels.
        """
        cells = self.map_size((_FAR, _FAR))
        height, width = (
            max(1, _FAR - self._spare(axis) - (cells[axis] - window[axis]) * self.stride[axis]) for axis in (0, 1)
        )
        return height, width

    def _spare(self, axis: int) -> int:
        """Return how many pixels a large image can lose along an axis before its map loses a cell."""
        cells = self.map_size((_FAR, _FAR))[axis]
        none, lost = 0, self.stride[axis]
        while lost - none > 1:
            middle = (none + lost) // 2
            if self.map_size((_FAR - middle, _FAR - middle))[axis] == cells:
                none = middle
            else:
                lost = middle
        return none


def rows_and_columns(maps: Tensor) -> Pair:
    """Return rows and columns of feature maps.

    Raises:
        ValueError: If they are no batch of maps.
    """
    if not isinstance(maps, Tensor) or maps.ndim != 4:
        got = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise ValueError(f"features must return maps (N, C, H, W), got {got}. Cut the network before its pooling.")
    return maps.shape[2], maps.shape[3]
