"""Where channels, positions and tokens are in a layer's output, as its shape tells."""

import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Literal, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Grid",
    "as_images",
    "channel_dim_of",
    "channels_at",
    "map_channel_dim",
    "patch_grid",
    "resized",
    "token_grid",
]

# The most tokens that may stand before the patches: a class token, a distillation token, registers.
_MOST_EXTRA_TOKENS = 8

Grid = tuple[int, int]
"""Rows and columns."""


def channel_dim_of(shape: Sequence[int], input_shape: Sequence[int]) -> int:
    """Return the axis of the channels of a layer's output.

    Args:
        shape: Shape of the output.
        input_shape: Shape of the model's input, (N, C, H, W) for images.

    Returns:
        -1 for (N, h, w, C), and with time before the rows for videos, for tokens (N, tokens, C) and (tokens, N, C);
        1 for everything else. For images and videos, rows and columns are told by being like those of the input; for
        an input of three axes, (N, C, length) is told from (N, length, C) by the axis whose size stays.

    Example:
        >>> images = (2, 3, 224, 224)
        >>> channel_dim_of((2, 96, 56, 56), images), channel_dim_of((2, 56, 56, 96), images)
        (1, -1)
        >>> channel_dim_of((2, 197, 768), images), channel_dim_of((197, 2, 768), images)
        (-1, -1)
        >>> channel_dim_of((2, 512, 49), images), channel_dim_of((2, 1000), images)
        (1, 1)
    """
    dims = len(shape)
    if dims == len(input_shape) and dims > 3:
        first, last = shape[-2:], shape[-3:-1]  # sides, if channels come first, and if they come last
        # rounding, and windows without padding, take less than a cell; PyTorch's own layout is believed where it may be
        fits = [abs(rows - columns * input_shape[-2] / input_shape[-1]) < 1 for rows, columns in (first, last)]
        squares = [rows == columns for rows, columns in (first, last)]
        if not any(fits) and squares.count(True) == 1:  # the model makes a square of any image
            return 1 if squares[0] else -1
        return 1 if fits[0] or _unlikeness(first, input_shape) <= _unlikeness(last, input_shape) else -1
    if dims != 3:
        return 1
    if len(input_shape) == 3:
        return -1 if shape[1] == input_shape[1] and shape[2] != input_shape[2] else 1
    if len(input_shape) < 4 or shape[0] != input_shape[0]:
        return -1
    tokens, channels = (patch_grid(size, input_shape) for size in shape[1:])
    flat = channels is not None and tokens is None and math.prod(channels) == shape[2]
    return 1 if flat else -1


def channels_at(channel_dim: int | None, input_shape: Sequence[int]) -> int | Callable[[Sequence[int]], int]:
    """Return the axis of the channels as a caller names it, or what finds it by the shape of a layer's output.

    Args:
        channel_dim: The axis; None to find it.
        input_shape: Shape of the model's input.

    Returns:
        The axis, or :func:`channel_dim_of` for this input.

    Raises:
        TypeError: If it is no integer.

    Example:
        >>> channels_at(1, (2, 3, 224, 224)), channels_at(None, (2, 3, 224, 224))((2, 56, 56, 96))
        (1, -1)
    """
    if channel_dim is None:
        return functools.partial(channel_dim_of, input_shape=input_shape)
    given: object = channel_dim
    if isinstance(given, bool) or not isinstance(given, (int, np.integer)):
        raise TypeError(f"channel_dim must be an integer, got {given!r}. Leave it out to find it by the shapes.")
    return int(given)


def _unlikeness(grid: Sequence[int], input_shape: Sequence[int]) -> float:
    """Return how far the sides of a grid are from being like those of the image."""
    return abs(math.log(max(grid[0], 1) / max(grid[1], 1) / (input_shape[-2] / input_shape[-1])))


def map_channel_dim(shape: tuple[int, ...], image_shape: tuple[int, ...]) -> int | None:
    """Return the axis of the channels of a layer's output where it is a map of the image.

    Args:
        shape: Shape of the output.
        image_shape: Shape of the input images, (N, C, H, W).

    Returns:
        1 for (N, C, h, w), -1 for (N, h, w, C) and for tokens, (N, tokens, C). None for an output that is no map:
        another number of axes, a single cell, or sides quite unlike the image's.

    Example:
        >>> images = (1, 3, 224, 224)
        >>> map_channel_dim((1, 96, 56, 56), images), map_channel_dim((1, 56, 56, 96), images)
        (1, -1)
        >>> map_channel_dim((1, 197, 768), images), map_channel_dim((1, 1000), images)
        (-1, None)
    """
    if len(shape) not in {3, 4} or shape[0] != image_shape[0]:
        return None
    channel_dim = channel_dim_of(shape, image_shape)
    if len(shape) == 3:
        return -1 if channel_dim == -1 and shape[1] >= 4 and shape[2] > 1 else None
    grid = shape[2:] if channel_dim == 1 else shape[1:3]
    return channel_dim if math.prod(grid) > 1 and _unlikeness(grid, image_shape) < math.log(1.5) else None


def patch_grid(tokens: int, image_shape: Sequence[int], known: Collection[Grid] = ()) -> Grid | None:
    """Return the rows and columns of the patches among so many tokens.

    Args:
        tokens: How many there are; up to eight class and register tokens may be among them.
        image_shape: Shape of the images, (N, C, H, W).
        known: Grids of maps in the same network, of which the largest that fits is taken.

    Returns:
        The grid, of sides like the image's unless it is a known one; None if there is none.

    Example:
        >>> patch_grid(197, (1, 3, 224, 224)), patch_grid(99, (1, 3, 224, 112)), patch_grid(77, (1, 3, 224, 224))
        ((14, 14), (14, 7), None)
    """
    fitting = [grid for grid in known if 0 <= tokens - math.prod(grid) <= _MOST_EXTRA_TOKENS]
    if fitting:
        return max(fitting, key=math.prod)
    aspect = image_shape[-2] / image_shape[-1]
    for patches in range(tokens, max(3, tokens - _MOST_EXTRA_TOKENS - 1), -1):
        rows = round(math.sqrt(patches * aspect))
        columns = patches // rows if rows else 0
        if rows * columns == patches and (rows == round(columns * aspect) or columns == round(rows / aspect)):
            return rows, columns
    return None


@overload
def token_grid(score_map: Tensor, grid: Grid | None = None) -> Tensor: ...
@overload
def token_grid(
    score_map: Tensor, grid: Grid | None = None, *, return_placeless: Literal[True]
) -> tuple[Tensor, Tensor]: ...
def token_grid(
    score_map: Tensor, grid: Grid | None = None, *, return_placeless: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Lay the tokens of a score map out as an image, so that it plots like any other.

    Class and register tokens, which stand before the patches, have no place in the image; what they add to the score
    comes with ``return_placeless``.

    Args:
        score_map: Map of a token layer: (N, tokens, K) as in ViT, (N, h, w, K) as in Swin.
        grid: Rows and columns of patches; None for the square that the tokens fill but for up to eight.
        return_placeless: Whether to return what the tokens without a place add, too.

    Returns:
        (N, K, h, w), in the units of the map; with ``return_placeless`` a pair of it and (N, K).

    Raises:
        ValueError: If the map has another number of dimensions, fewer tokens than the grid, or no square of tokens.

    Example:
        >>> import torch
        >>> score_map = torch.rand(1, 197, 1)  # a class token and 14 x 14 patches
        >>> patches, placeless = token_grid(score_map, return_placeless=True)
        >>> patches.shape, bool(torch.allclose(patches.sum() + placeless.sum(), score_map.sum()))
        (torch.Size([1, 1, 14, 14]), True)
    """
    if score_map.dim() not in {3, 4}:
        raise ValueError(f"score_map must be (N, tokens, K) or (N, h, w, K), got {tuple(score_map.shape)}.")
    if score_map.dim() == 4:
        laid, extra = score_map, 0
    else:
        tokens = score_map.shape[1]
        rows, columns = grid or patch_grid(tokens, (1, 1, 1, 1)) or (0, 0)
        if not rows:
            raise ValueError(
                f"score_map must hold a square of tokens and up to {_MOST_EXTRA_TOKENS} class and register tokens, got "
                f"{tokens} tokens. Name the rows and columns of the patches: grid=(rows, columns)."
            )
        if tokens < rows * columns:
            raise ValueError(f"grid must have at most {tokens} patches, one for each token, got {rows} x {columns}.")
        extra = tokens - rows * columns
        laid = score_map[:, extra:].unflatten(1, (rows, columns))
    patches = laid.movedim(-1, 1)
    if not return_placeless:
        return patches
    return patches, score_map[:, :extra].sum(1) if extra else patches.new_zeros(patches.shape[:2])


def as_images(score_map: Tensor) -> Tensor:
    """Return the score map of a layer of any layout as images.

    Args:
        score_map: Summed over channels: (N, 1, h, w), (N, h, w, 1), (N, tokens, 1) or (tokens, N, 1); what is none of
            the last three stays as it is.

    Returns:
        (N, 1, h, w).

    Example:
        >>> as_images(torch.ones(2, 50, 1)).shape, as_images(torch.ones(2, 7, 7, 1)).shape
        (torch.Size([2, 1, 7, 7]), torch.Size([2, 1, 7, 7]))
    """
    if score_map.dim() == 4:
        return score_map.movedim(-1, 1) if score_map.shape[3] == 1 and score_map.shape[1] > 1 else score_map
    if score_map.dim() != 3 or score_map.shape[2] != 1:
        return score_map
    square = (1, 1, 1, 1)
    tokens_first = patch_grid(score_map.shape[1], square) is None and patch_grid(score_map.shape[0], square)
    return token_grid(score_map.transpose(0, 1) if tokens_first else score_map)


def resized(one: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a map in another size with its sum kept: each cell's number is spread by linear interpolation.

    Args:
        one: (N, 1, h, w).
        size: Rows and columns.

    Returns:
        (N, 1, *size).

    Example:
        >>> resized(torch.ones(1, 1, 3, 3), (7, 5)).sum()
        tensor(9.)
    """
    if tuple(one.shape[2:]) == tuple(size):
        return one
    rows, columns = (_spread(old, new, one.dtype, one.device) for old, new in zip(one.shape[2:], size, strict=True))
    return rows @ one @ columns.T


def _spread(old: int, new: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the share of each old cell that each new one gets, (new, old); the shares of an old one add up to 1."""
    cells = torch.eye(old, dtype=dtype, device=device)[None]
    if new < old:  # a new cell takes the old ones that it covers
        weights = F.adaptive_avg_pool1d(cells, new)[0]
    else:
        weights = F.interpolate(cells, size=new, mode="linear", align_corners=False)[0]
    return (weights / weights.sum(1, keepdim=True)).T
