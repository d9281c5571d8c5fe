"""Figures, pictures and maps on axes; the only file that makes a figure."""

import io
import math
from typing import Any, TypeAlias

import numpy as np
import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.nn import functional as F

from .checked import Box, Picture
from .style import MapStyle

AnyFigure: TypeAlias = Figure | SubFigure

FINEST_LINED = 28
"""Cells a side above which contours would fill the map."""


_ASPECTS = (0.4, 3.0)  # of height to width: there is room for titles beside a strip, and an end to a column


class _Shown(Figure):
    """A figure that a notebook shows as it is: of others it prints the name, until pyplot has drawn something."""

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        self.savefig(png, format="png", bbox_inches="tight")
        return png.getvalue()


def axes_grid(
    plt_fig_axis: tuple[AnyFigure, Any] | None,
    count: int,
    columns: int,
    fig_size: tuple[float, float] | None,
    aspect: float = 1.0,
) -> tuple[AnyFigure, list[Axes]]:
    """Make a figure, unless the caller brings one.

    Returns:
        The figure and ``count`` axes without ticks.

    Raises:
        ValueError: If the caller's axes are not ``count``.
    """
    if plt_fig_axis is not None:
        figure, given = plt_fig_axis
        axes = list(np.ravel(np.asarray(given, dtype=object)))
        if len(axes) != count:
            raise ValueError(f"plt_fig_axis must hold {count} axes, got {len(axes)}.")
    else:
        columns = min(columns, count)
        rows = math.ceil(count / columns)
        if fig_size is None:  # a map of 2.2 inches, its color bar and two lines of title
            low, high = _ASPECTS
            fig_size = (3.2 * columns, (2.2 * min(max(aspect, low), high) + 0.6) * rows)
        figure = _Shown(figsize=fig_size, layout="constrained")
        axes = [figure.add_subplot(rows, columns, 1 + index) for index in range(count)]
    for ax in axes:
        ax.set_xticks([])
        ax.set_yticks([])
    return figure, axes


def draw_picture(ax: Axes, picture: Picture) -> None:
    """Draw a picture, pixel by pixel."""
    ax.imshow(picture, interpolation="nearest")


def draw_map(
    figure: AnyFigure,
    ax: Axes,
    cells: Tensor,
    picture: Picture | None,
    limit: float,
    style: MapStyle,
    box: Box | None = None,
) -> None:
    """Draw a map in color, over the picture, or a part of it, in gray if there is one."""
    if picture is not None:
        gray = picture @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
        ax.imshow(gray, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    height, width = cells.shape if picture is None else picture.shape[:2]
    x0, y0, x1, y1 = (0, 0, width, height) if box is None else box
    within, size = (ax.get_xlim(), ax.get_ylim()), (y1 - y0, x1 - x0)
    extent = (x0 - 0.5, x1 - 0.5, y1 - 0.5, y0 - 0.5)  # pixels are centered at whole numbers
    values = _resized(cells, size, style)
    scale = Normalize(-limit, limit)
    alpha = 1.0 if picture is None else style.alpha_overlay
    ax.imshow(values.numpy(), cmap=style.cmap, norm=scale, alpha=alpha, interpolation="nearest", extent=extent)
    if max(cells.shape) > FINEST_LINED:
        rows, columns = (min(side, FINEST_LINED) for side in cells.shape)
        coarse = F.adaptive_avg_pool2d(cells[None], (rows, columns))[0]
        _draw_contours(ax, _resized(coarse, size, style), (x0, y0), float(coarse.abs().max()), style)
    else:
        _draw_contours(ax, values, (x0, y0), limit, style)
    if picture is not None:
        ax.set_xlim(within[0])
        ax.set_ylim(within[1])
    if style.show_colorbar:
        low, high = bool(cells.min() < -limit), bool(cells.max() > limit)
        extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
        beside = ax.inset_axes((1.03, 0, 0.05, 1))
        bar = figure.colorbar(ScalarMappable(scale, style.cmap), cax=beside, extend=extend[low, high])
        bar.set_ticks([-limit, 0, limit], labels=[f"−{limit:.3g}", "0", f"+{limit:.3g}"])
        bar.set_label(style.unit)


def _draw_contours(ax: Axes, values: Tensor, corner: tuple[int, int], limit: float, style: MapStyle) -> None:
    """Draw the sign as lines: solid around what adds, dashed around what takes away."""
    columns, rows = (start + np.arange(count) for start, count in zip(corner, values.shape[::-1], strict=True))
    for sign, linestyle in ((1, "solid"), (-1, "dashed")):
        levels = sorted(sign * fraction * limit for fraction in style.contours)
        levels = [level for level in levels if float(values.min()) < level < float(values.max())]
        if levels and min(values.shape) > 1:
            ax.contour(
                columns, rows, values.numpy(), levels=levels, colors="black", linewidths=0.5, linestyles=linestyle
            )


def _resized(values: Tensor, size: tuple[int, ...], style: MapStyle) -> Tensor:
    """Interpolate a map.

    Returns:
        The map, of the given size.
    """
    align = False if style.interpolate_mode == "bilinear" else None
    return F.interpolate(values[None, None], tuple(size), mode=style.interpolate_mode, align_corners=align)[0, 0]


def draw_box(ax: Axes, box: tuple[int, int, int, int], text: str) -> None:
    """Draw a numbered frame, white in black, so that it shows on any picture."""
    x0, y0, x1, y1 = box
    outline = [patheffects.withStroke(linewidth=3, foreground="black")]
    corner = (x0 - 0.5, y0 - 0.5)  # pixels are centered at whole numbers
    ax.add_patch(Rectangle(corner, x1 - x0, y1 - y0, fill=False, edgecolor="white", path_effects=outline))
    ax.annotate(text, corner, (3, -3), textcoords="offset points", color="white", va="top", path_effects=outline)


def number_text(value: float | Tensor) -> str:
    """Write a number of logits with two decimals and a minus sign."""
    rounded = round(torch.as_tensor(value).detach().item(), 2) + 0.0  # no minus zero
    return f"{rounded:.2f}".replace("-", "−")


def share_text(part: float, score: float | Tensor) -> str:
    """Write a part of the score as a percentage of it, or, from ten times the score on, as so many times it."""
    whole = torch.as_tensor(score).detach().item()
    if not whole:
        return "all of S"
    share = part / whole
    text = f"{100 * share + 0.0:.0f}% of" if abs(share) < 10 else f"{share:.3g} times"
    return f"{text.replace('-', '−')} S"
