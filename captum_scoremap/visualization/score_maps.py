"""Score maps over their image: one, a batch, or those of several layers (Fig. 2 of the paper)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from .checked import (
    Box,
    Channels,
    Map,
    Photograph,
    Picture,
    as_tensor,
    check_box,
    checked_limit,
    checked_map,
    checked_picture,
)
from .drawing import AnyFigure, axes_grid, draw_box, draw_map, draw_picture, number_text, share_text
from .style import DEFAULT_STYLE, MapStyle

__all__ = ["visualize_layer_score_maps", "visualize_score_map"]

_TITLE_WIDTH = 24
"""Characters in a line of a title."""

_TITLE_LINES = 3
"""Lines of a title that a name may take."""


def visualize_score_map(
    score_map: Map,
    image: Photograph | None = None,
    *,
    mean: Channels | None = None,
    std: Channels | None = None,
    box: Box | None = None,
    limit: float | None = None,
    title: str | None = None,
    style: MapStyle = DEFAULT_STYLE,
    columns: int = 5,
    plt_fig_axis: tuple[AnyFigure, Any] | None = None,
    fig_size: tuple[float, float] | None = None,
) -> tuple[AnyFigure, Any]:
    """Draw a score map, over the image in gray if that is given; of a batch, one map an image.

    Args:
        score_map: Sub-scores in logits: ``(H, W)``, ``(1, H, W)`` or ``(N, 1, H, W)``.
        image: ``(C, H, W)`` or ``(N, C, H, W)`` with 1 or 3 channels (4 with what is opaque), an array ``(H, W, C)``
            or ``(H, W)``, or a PIL image; whole numbers from 0 to 255, or in [0, 1] once ``mean`` and ``std`` are
            undone. The map is interpolated to its size; without an image it is drawn cell by cell.
        mean: What was subtracted from the image, one number or one per channel.
        std: What the image was divided by.
        box: Pixels ``x0, y0, x1, y1`` of the image that the map is of, where it is of a part of it: the
            original photograph around the crop that the network saw (``Preprocessing.box``).
        limit: Logits at the ends of the color scale, which runs from ``-limit`` to ``limit``; by default the
            largest magnitude of each map, outliers aside. Give figures the same limit to compare them.
        title: Title of the axes; of a batch, of the first.
        style: How the map is drawn.
        columns: Axes in a row, of a batch.
        plt_fig_axis: Figure and axes to draw into, one an image.
        fig_size: Size of a new figure in inches.

    Returns:
        The figure and its axes; of a batch of several, a list of them.

    Raises:
        ValueError: If maps and images are not as many, or a box is outside its image.

    Example:
        >>> import torch
        >>> figure, axes = visualize_score_map(torch.randn(1, 1, 7, 7), torch.rand(3, 224, 224), title="cat")
        >>> axes.get_title()
        'cat'
        >>> figure, axes = visualize_score_map(torch.randn(3, 1, 7, 7), torch.rand(3, 3, 224, 224))
        >>> len(axes)
        3
    """
    batch = as_tensor(score_map, "score_map")
    if batch.ndim != 4 or len(batch) < 2:
        batch = batch[None]
    maps = [checked_map(one) for one in batch]
    pictures: list[Picture | None] = [None] * len(maps)
    if image is not None:
        several = isinstance(image, (Tensor, np.ndarray)) and image.ndim == 4
        images: Sequence[Photograph] = image if several and len(maps) > 1 else [image]  # type: ignore[assignment]
        if len(images) not in {1, len(maps)}:
            raise ValueError(f"image must be one for all maps, or one for each of the {len(maps)}, got {len(images)}.")
        pictures = [*(checked_picture(one, mean, std) for one in images)] * (len(maps) // len(images))
    for picture in pictures:
        check_box(box, picture)
    limits = [checked_limit(limit, [values], style) for values in maps]
    shape = maps[0].shape if pictures[0] is None else pictures[0].shape
    figure, axes = axes_grid(plt_fig_axis, len(maps), columns, fig_size, shape[0] / shape[1])
    for ax, values, picture, end in zip(axes, maps, pictures, limits, strict=True):
        draw_map(figure, ax, values, picture, end, style, box)
    if title is not None:
        axes[0].set_title(title)
    return figure, axes[0] if len(axes) == 1 else axes


def visualize_layer_score_maps(
    score_maps: Mapping[str, Map],
    image: Photograph,
    *,
    label: str | None = None,
    score: float | Tensor | None = None,
    biases: Mapping[str, float | Tensor] | None = None,
    placeless: Mapping[str, float | Tensor] | None = None,
    mean: Channels | None = None,
    std: Channels | None = None,
    box: Box | None = None,
    limit: float | Literal["shared"] | None = None,
    style: MapStyle = DEFAULT_STYLE,
    columns: int = 5,
    plt_fig_axis: tuple[AnyFigure, Sequence[Axes]] | None = None,
    fig_size: tuple[float, float] | None = None,
) -> tuple[AnyFigure, list[Axes]]:
    """Draw the image beside the maps of several layers (Fig. 2 of Yu et al. 2015).

    Above every map stands how much of the score it holds. A score map holds the sum of its sub-scores, and B of
    S = Σ A·Y + B (Eq. (3)) has no place in it; where B is larger than S, the title says so. A complete map holds
    all of S but what is ``placeless``.

    Args:
        score_maps: Maps in logits by name of the layer, each as for :func:`visualize_score_map`: score maps,
            or complete maps.
        image: As for :func:`visualize_score_map`.
        label: Name of the label.
        score: S, the score of the label, in logits.
        biases: Of score maps, B in logits by name of the layer.
        placeless: Of complete maps, what has no place in logits by name; its presence says that they are complete.
        mean: What was subtracted from the image.
        std: What the image was divided by.
        box: As for :func:`visualize_score_map`; it is framed on the image, and the maps show it close up.
        limit: Logits at the ends of the color scales; by default each map has its own, ``"shared"`` takes the
            largest of them for all.
        style: How the maps are drawn.
        columns: Axes in a row of a new figure.
        plt_fig_axis: Figure and axes to draw into, one for the image and one a layer.
        fig_size: Size of a new figure in inches.

    Returns:
        The figure and its axes, the image's first.

    Raises:
        ValueError: If there is no map, ``biases`` or ``placeless`` name a layer without one, both are given, or
            the box is outside the image.

    Example:
        >>> import torch
        >>> maps = {"features": torch.randn(1, 1, 14, 14), "pool": torch.randn(1, 1, 7, 7)}
        >>> figure, axes = visualize_layer_score_maps(maps, torch.rand(3, 64, 64), label="cat", score=9.8)
        >>> [ax.get_title().splitlines()[0] for ax in axes]
        ['cat', 'features', 'pool']
    """
    if not score_maps:
        raise ValueError("score_maps must have at least one layer, got none. Pass {layer name: score map}.")
    if biases is not None and placeless is not None:
        raise ValueError("placeless must be left out where biases are given: it is what complete maps leave over.")
    for name, named in (("biases", biases or {}), ("placeless", placeless or {})):
        if not set(named) <= set(score_maps):
            raise ValueError(
                f"{name} must name layers of score_maps ({', '.join(score_maps)}), "
                f"got {', '.join(sorted(set(named) - set(score_maps)))}."
            )
    picture = checked_picture(image, mean, std)
    check_box(box, picture)
    values = {layer: checked_map(score_map, f"score_maps[{layer!r}]") for layer, score_map in score_maps.items()}
    shared = None
    if limit is not None:
        shared = checked_limit(None if limit == "shared" else limit, [*values.values()], style)
    x0, y0, x1, y1 = (0, 0, picture.shape[1], picture.shape[0]) if box is None else box
    figure, axes = axes_grid(plt_fig_axis, 1 + len(values), columns, fig_size, (y1 - y0) / (x1 - x0))
    draw_picture(axes[0], picture)
    if box is not None:
        draw_box(axes[0], box, "")
    heading = [] if label is None else [_broken(label)]
    if score is not None:
        heading.append(f"S = {number_text(score)} logits")
    axes[0].set_title("\n".join(heading), fontsize="medium")
    if placeless is not None:
        axes[0].set_xlabel("Read sums over regions:\nred and blue cancel.")
    for ax, (layer, layer_values) in zip(axes[1:], values.items(), strict=True):
        draw_map(figure, ax, layer_values, picture, checked_limit(shared, [layer_values], style), style, box)
        ax.set(xlim=(x0 - 0.5, x1 - 0.5), ylim=(y1 - 0.5, y0 - 0.5))  # close up, where the image is more than the map
        total = float(layer_values.double().sum())
        if placeless is None:
            lines = _what_a_score_map_holds(total, score, (biases or {}).get(layer))
        else:
            lines = _what_a_complete_map_holds(total, score, placeless.get(layer))
        ax.set_title("\n".join([_broken(layer), *lines]), fontsize="medium")
    return figure, axes


def _broken(name: str) -> str:
    """Break the long name of a layer or label, after dots and spaces where it has some, to stay above its own map."""
    parts = [
        part[start : start + _TITLE_WIDTH]
        for part in re.findall(r"[^.\s:/]*[.\s:/]?", name)
        for start in range(0, len(part), _TITLE_WIDTH)
    ]
    lines = [""]
    for part in parts:
        if lines[-1] and len(lines[-1] + part.rstrip()) > _TITLE_WIDTH:
            lines.append("")
        lines[-1] += part
    if len(lines) > _TITLE_LINES:
        lines = [*lines[: _TITLE_LINES - 1], f"{lines[_TITLE_LINES - 1][: _TITLE_WIDTH - 1].rstrip()}…"]
    return "\n".join(line.strip() for line in lines)


def _what_a_score_map_holds(total: float, score: float | Tensor | None, bias: float | Tensor | None) -> list[str]:
    """S = Σ A·Y + B, and in words how much of it the map shows."""
    if bias is None:
        return [f"Σ A·Y = {number_text(total)}"]
    lines = [f"Σ A·Y = {number_text(total)}, B = {number_text(bias)}"]
    if score is None:
        return lines
    if torch.as_tensor(bias).abs() > torch.as_tensor(score).abs():
        return [*lines, "|B| > |S|: most of S is in B"]
    return [*lines, f"{share_text(total, score)} is here"]


def _what_a_complete_map_holds(
    total: float, score: float | Tensor | None, placeless: float | Tensor | None
) -> list[str]:
    """Return how much of S a complete map shows: sum of C + placeless = S, and how much of it the map shows."""
    share = "" if score is None else f" ({share_text(total, score)})"
    rest = "0.00" if placeless is None else number_text(placeless)
    lines = [f"Σ C = {number_text(total)}{share}"]
    return lines if rest == "0.00" else [*lines, f"placeless: {rest}"]
