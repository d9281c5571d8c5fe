"""The image, its score map and the regions chosen from it (Fig. 3 of the paper)."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from torch import Tensor

from .checked import Channels, Map, Photograph, checked_boxes, checked_limit, checked_map, checked_picture
from .drawing import AnyFigure, axes_grid, draw_box, draw_map, draw_picture
from .style import DEFAULT_STYLE, MapStyle

__all__ = ["visualize_crops"]


def visualize_crops(
    image: Photograph,
    score_map: Map,
    boxes: Tensor,
    *,
    captions: Sequence[str] | None = None,
    mean: Channels | None = None,
    std: Channels | None = None,
    limit: float | None = None,
    title: str | None = None,
    style: MapStyle = DEFAULT_STYLE,
    columns: int = 5,
    plt_fig_axis: tuple[AnyFigure, Sequence[Axes]] | None = None,
    fig_size: tuple[float, float] | None = None,
) -> tuple[AnyFigure, list[Axes]]:
    """Draw the image, its score map and the regions chosen from it (Fig. 3 of Yu et al. 2015).

    Args:
        image: As for :func:`visualize_score_map`.
        score_map: As for :func:`visualize_score_map`.
        boxes: Pixel boxes ``x0, y0, x1, y1`` of this image, ``(k, 4)``: ``score_map_crops(...)[0]``.
        captions: Title of every crop; by default its number.
        mean: What was subtracted from the image.
        std: What the image was divided by.
        limit: As for :func:`visualize_score_map`.
        title: Title of the image.
        style: How the map is drawn.
        columns: Axes in a row of a new figure.
        plt_fig_axis: Figure and axes to draw into: the image, the map, one a box.
        fig_size: Size of a new figure in inches.

    Returns:
        The figure and its axes: the image, the map, one a box.

    Raises:
        ValueError: If boxes are not ``(k, 4)``, are outside the image, or captions do not match them.

    Example:
        >>> import torch
        >>> boxes = torch.tensor([[0, 0, 32, 32], [16, 24, 64, 56]])
        >>> figure, axes = visualize_crops(torch.rand(3, 64, 64), torch.randn(7, 7), boxes)
        >>> len(axes)
        4
    """
    picture = checked_picture(image, mean, std)
    values = checked_map(score_map)
    corners = checked_boxes(boxes, picture)
    captions = [str(number) for number in range(1, 1 + len(corners))] if captions is None else captions
    if len(captions) != len(corners):
        raise ValueError(f"captions must be as many as boxes, {len(corners)}, got {len(captions)}.")
    limit = checked_limit(limit, [values], style)
    figure, axes = axes_grid(plt_fig_axis, 2 + len(corners), columns, fig_size, picture.shape[0] / picture.shape[1])
    draw_picture(axes[0], picture)
    if title is not None:
        axes[0].set_title(title)
    draw_map(figure, axes[1], values, picture, limit, style)
    axes[1].set_title("score map")
    for number, (ax, box, caption) in enumerate(zip(axes[2:], corners, captions, strict=True), start=1):
        for whole in axes[:2]:
            draw_box(whole, box, str(number))
        x0, y0, x1, y1 = box
        draw_picture(ax, picture[y0:y1, x0:x1])
        ax.set_title(caption)
    return figure, axes
