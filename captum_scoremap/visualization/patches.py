"""Semantic patches, grid by grid (Fig. 4 of the paper)."""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from torch import Tensor
from torch.nn import functional as F

from .checked import Channels, Picture, checked_picture
from .drawing import AnyFigure, axes_grid, number_text

__all__ = ["visualize_patches"]


class PatchLike(Protocol):
    """What :func:`visualize_patches` reads of a patch."""

    @property
    def pixels(self) -> Tensor:
        """The patch, ``(C, H, W)``."""

    @property
    def value(self) -> float:
        """What the patch was chosen by."""


def visualize_patches(
    patches: Mapping[str, Mapping[str, Sequence[PatchLike]]],
    *,
    mean: Channels | None = None,
    std: Channels | None = None,
    columns: int = 3,
    tile_size: int = 96,
    show_values: bool = True,
    plt_fig_axis: tuple[AnyFigure, Sequence[Axes]] | None = None,
    fig_size: tuple[float, float] | None = None,
) -> tuple[AnyFigure, list[Axes]]:
    """Draw semantic patches, a row of grids a layer, one grid a method (Fig. 4 of Yu et al. 2015).

    Args:
        patches: ``{layer: {method: patches, best first}}`` with the same methods for every layer, such as the
            lists of ``semantic_patches`` by score map (SMSM) and by gradient (GSM).
        mean: What was subtracted from the patches' pixels.
        std: What the patches' pixels were divided by.
        columns: Patches in a row of a grid.
        tile_size: Pixels to which the longer side of a patch is brought.
        show_values: Write the value of a patch into its corner.
        plt_fig_axis: Figure and axes to draw into, one a grid, row by row.
        fig_size: Size of a new figure in inches.

    Returns:
        The figure and its axes, row by row.

    Raises:
        ValueError: If there are no patches, or layers differ in their methods.

    Example:
        >>> from types import SimpleNamespace
        >>> some = [SimpleNamespace(pixels=torch.rand(3, 20, 30), value=1.5)] * 9
        >>> figure, axes = visualize_patches({"features": {"SMSM": some, "GSM": some}})
        >>> [ax.get_title() for ax in axes]
        ['SMSM', 'GSM']
    """
    methods = list(next(iter(patches.values()), {}))
    for layer, by_method in patches.items():
        if list(by_method) != methods:
            raise ValueError(
                f"patches must have the methods {', '.join(methods)} for every layer, "
                f"got {', '.join(by_method) or 'none'} for {layer!r}."
            )
    most = max((len(some) for by_method in patches.values() for some in by_method.values()), default=0)
    if not most:
        raise ValueError("patches must hold at least one patch, got none. Pass {layer: {method: patches}}.")
    columns = min(columns, most)
    rows = math.ceil(most / columns)
    if fig_size is None:
        fig_size = (1.1 * columns * len(methods) + 0.4, (1.1 * rows + 0.2) * len(patches) + 0.2)
    figure, axes = axes_grid(plt_fig_axis, len(patches) * len(methods), len(methods), fig_size)
    cells = [(layer, method) for layer in patches for method in methods]
    for index, (ax, (layer, method)) in enumerate(zip(axes, cells, strict=True)):
        tiles = [
            (
                checked_picture(patch.pixels, mean, std, "patch.pixels"),
                number_text(patch.value) if show_values else "",
            )
            for patch in patches[layer][method]
        ]
        _draw_tiles(ax, tiles, (rows, columns), tile_size)
        if index < len(methods):
            ax.set_title(method)
        if index % len(methods) == 0:
            ax.set_ylabel(layer)
    return figure, axes


def _draw_tiles(ax: Axes, tiles: Sequence[tuple[Picture, str]], grid: tuple[int, int], tile_size: int) -> None:
    """Draw pictures with their captions as one sheet of equal tiles, each brought to size and centered."""
    rows, columns = grid
    pitch = tile_size + max(1, tile_size // 24)
    sheet = np.ones((rows * pitch, columns * pitch, 3), dtype=np.float32)
    outline = [patheffects.withStroke(linewidth=2, foreground="black")]
    for index, (picture, caption) in enumerate(tiles):
        scale = tile_size / max(picture.shape[:2])
        height, width = (max(1, round(side * scale)) for side in picture.shape[:2])
        pixels = torch.tensor(picture).permute(2, 0, 1)[None]
        tile = F.interpolate(pixels, (height, width), mode="bilinear", align_corners=False, antialias=True)[0]
        top = index // columns * pitch + (tile_size - height) // 2
        left = index % columns * pitch + (tile_size - width) // 2
        sheet[top : top + height, left : left + width] = tile.clamp(0, 1).permute(1, 2, 0).numpy()  # rounding exceeds 1
        ax.text(left, top + height - 1, caption, color="white", fontsize=6, va="bottom", path_effects=outline)
    ax.imshow(sheet, interpolation="nearest")
    for spine in ax.spines.values():
        spine.set_visible(False)
