"""Figures of score maps, crops and semantic patches; the only file that knows matplotlib.

Every function takes finished tensors and returns ``(figure, axes)``. Figures are made without pyplot, so none
stays open behind the caller's back; pass ``plt_fig_axis``, as to Captum's ``visualize_image_attr``, to draw
into axes of your own.

Color is signed and centred at zero: red adds to the score, blue takes from it. Both are equally dark, so the
sign is drawn a second time as contours, solid around what adds and dashed around what takes away, for print
in grey and for readers who cannot tell the colors apart.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "MapStyle",
    "visualize_crops",
    "visualize_layer_score_maps",
    "visualize_patches",
    "visualize_score_map",
]

AnyFigure: TypeAlias = Figure | SubFigure
Picture: TypeAlias = npt.NDArray[np.float32]
Channels: TypeAlias = float | Sequence[float]


@dataclass(frozen=True)
class MapStyle:
    """How score maps are drawn.

    Attributes:
        cmap: Diverging color map, its middle at zero.
        alpha_overlay: Opacity of a map over the image, 0 to 1.
        interpolate_mode: How a map is brought to the image's size.
        contours: Fractions of the color limit at which lines are drawn, solid around positive and dashed
            around negative values; none for no lines. Of maps too fine for lines, local means are lined.
        outlier_perc: Percentage of a map's cells that may lie beyond the color scale, and are drawn in the
            color of its end, so that a few extreme cells do not leave the others pale. Of no effect where a
            limit is given.
        show_colorbar: Draw a color bar beside every map, pointed where values lie beyond it.
        unit: Unit written at the color bar.

    Example:
        >>> style = MapStyle(cmap="PuOr", contours=(), show_colorbar=False)
        >>> figure, axes = visualize_score_map(torch.randn(7, 7), style=style)
        >>> len(figure.axes)  # no color bar
        1
    """

    cmap: str | Colormap = "RdBu_r"
    alpha_overlay: float = 0.6
    interpolate_mode: Literal["bilinear", "nearest"] = "bilinear"
    contours: tuple[float, ...] = (0.25, 0.75)
    outlier_perc: float = 1.0
    show_colorbar: bool = True
    unit: str = "logits per cell"

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn.

        Raises:
            ValueError: If a setting is out of range.
        """
        if self.interpolate_mode not in {"bilinear", "nearest"}:
            raise ValueError(f"interpolate_mode must be 'bilinear' or 'nearest', got {self.interpolate_mode!r}.")
        if not 0 <= self.alpha_overlay <= 1:
            raise ValueError(f"alpha_overlay must be from 0 to 1, got {self.alpha_overlay}.")
        if not all(0 < fraction < 1 for fraction in self.contours):
            raise ValueError(f"contours must be fractions between 0 and 1, got {self.contours}.")
        if not 0 <= self.outlier_perc < 100:
            raise ValueError(f"outlier_perc must be from 0 to 100, got {self.outlier_perc}.")


DEFAULT_STYLE = MapStyle()

FINEST_LINED = 28
"""Cells a side above which contours would fill the map."""


class PatchLike(Protocol):
    """What :func:`visualize_patches` reads of a patch."""

    @property
    def pixels(self) -> Tensor:
        """The patch, ``(C, H, W)``."""

    @property
    def value(self) -> float:
        """What the patch was chosen by."""


def visualize_score_map(
    score_map: Tensor,
    image: Tensor | None = None,
    *,
    mean: Channels | None = None,
    std: Channels | None = None,
    limit: float | None = None,
    title: str | None = None,
    style: MapStyle = DEFAULT_STYLE,
    plt_fig_axis: tuple[AnyFigure, Axes] | None = None,
    fig_size: tuple[float, float] | None = None,
) -> tuple[AnyFigure, Axes]:
    """Draw one score map, over the image in grey if that is given.

    Args:
        score_map: Sub-scores in logits, one map: ``(H, W)``, ``(1, H, W)`` or ``(1, 1, H, W)``.
        image: ``(C, H, W)`` or ``(1, C, H, W)`` with 1 or 3 channels; uint8, or in [0, 1] once ``mean`` and
            ``std`` are undone. The map is interpolated to its size; without an image it is drawn cell by
            cell.
        mean: What was subtracted from the image, one number or one per channel.
        std: What the image was divided by.
        limit: Logits at the ends of the color scale, which runs from ``-limit`` to ``limit``; by default the
            largest magnitude of the map, outliers aside. Give figures the same limit to compare them.
        title: Title of the axes.
        style: How the map is drawn.
        plt_fig_axis: Figure and axes to draw into.
        fig_size: Size of a new figure in inches.

    Returns:
        The figure and its axes.

    Example:
        >>> figure, axes = visualize_score_map(torch.randn(1, 1, 7, 7), torch.rand(3, 224, 224), title="cat")
        >>> axes.get_title()
        'cat'
    """
    values = _checked_map(score_map)
    picture = None if image is None else _checked_picture(image, mean, std)
    limit = _checked_limit(limit, [values], style)
    shape = values if picture is None else picture
    figure, (ax,) = _axes_grid(plt_fig_axis, 1, 1, fig_size, shape.shape[0] / shape.shape[1])
    _draw_map(figure, ax, values, picture, limit, style)
    if title is not None:
        ax.set_title(title)
    return figure, ax


def visualize_layer_score_maps(
    score_maps: Mapping[str, Tensor],
    image: Tensor,
    *,
    label: str | None = None,
    score: float | Tensor | None = None,
    biases: Mapping[str, float | Tensor] | None = None,
    mean: Channels | None = None,
    std: Channels | None = None,
    limit: float | Literal["shared"] | None = None,
    style: MapStyle = DEFAULT_STYLE,
    columns: int = 5,
    plt_fig_axis: tuple[AnyFigure, Sequence[Axes]] | None = None,
    fig_size: tuple[float, float] | None = None,
) -> tuple[AnyFigure, list[Axes]]:
    """Draw the image beside the score maps of several layers (Fig. 2 of Yu et al. 2015).

    Above every map stands what its layer contributes to the score, S = Σ A·Y + B (Eq. (3)): the sum of the
    score map and, where given, the bias.

    Args:
        score_maps: Score map in logits by name of the layer, each as for :func:`visualize_score_map`.
        image: As for :func:`visualize_score_map`.
        label: Name of the label.
        score: S, the score of the label, in logits.
        biases: B in logits by name of the layer.
        mean: What was subtracted from the image.
        std: What the image was divided by.
        limit: Logits at the ends of the color scales; by default each map has its own, ``"shared"`` takes the
            largest of them for all.
        style: How the maps are drawn.
        columns: Axes in a row of a new figure.
        plt_fig_axis: Figure and axes to draw into, one for the image and one a layer.
        fig_size: Size of a new figure in inches.

    Returns:
        The figure and its axes, the image's first.

    Raises:
        ValueError: If there is no map, or ``biases`` names a layer without one.

    Example:
        >>> maps = {"features": torch.randn(1, 1, 14, 14), "pool": torch.randn(1, 1, 7, 7)}
        >>> figure, axes = visualize_layer_score_maps(maps, torch.rand(3, 64, 64), label="cat", score=9.8)
        >>> [ax.get_title().splitlines()[0] for ax in axes]
        ['cat', 'features', 'pool']
    """
    if not score_maps:
        raise ValueError("score_maps must have at least one layer, got none. Pass {layer name: score map}.")
    biases = biases or {}
    if not set(biases) <= set(score_maps):
        raise ValueError(
            f"biases must name layers of score_maps ({', '.join(score_maps)}), "
            f"got {', '.join(sorted(set(biases) - set(score_maps)))}."
        )
    picture = _checked_picture(image, mean, std)
    values = {layer: _checked_map(score_map, f"score_maps[{layer!r}]") for layer, score_map in score_maps.items()}
    shared = None
    if limit is not None:
        shared = _checked_limit(None if limit == "shared" else limit, [*values.values()], style)
    figure, axes = _axes_grid(plt_fig_axis, 1 + len(values), columns, fig_size, picture.shape[0] / picture.shape[1])
    _draw_picture(axes[0], picture)
    heading = [] if label is None else [label]
    if score is not None:
        heading.append(f"S = {_number(score)} logits")
    axes[0].set_title("\n".join(heading))
    for ax, (layer, layer_values) in zip(axes[1:], values.items(), strict=True):
        _draw_map(figure, ax, layer_values, picture, _checked_limit(shared, [layer_values], style), style)
        bias = f", B = {_number(biases[layer])}" if layer in biases else ""
        ax.set_title(f"{layer}\nΣ A·Y = {_number(layer_values.sum())}{bias}")
    return figure, axes


def visualize_crops(
    image: Tensor,
    score_map: Tensor,
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
        >>> boxes = torch.tensor([[0, 0, 32, 32], [16, 24, 64, 56]])
        >>> figure, axes = visualize_crops(torch.rand(3, 64, 64), torch.randn(7, 7), boxes)
        >>> len(axes)
        4
    """
    picture = _checked_picture(image, mean, std)
    values = _checked_map(score_map)
    corners = _checked_boxes(boxes, picture)
    captions = [str(number) for number in range(1, 1 + len(corners))] if captions is None else captions
    if len(captions) != len(corners):
        raise ValueError(f"captions must be as many as boxes, {len(corners)}, got {len(captions)}.")
    limit = _checked_limit(limit, [values], style)
    figure, axes = _axes_grid(plt_fig_axis, 2 + len(corners), columns, fig_size, picture.shape[0] / picture.shape[1])
    _draw_picture(axes[0], picture)
    if title is not None:
        axes[0].set_title(title)
    _draw_map(figure, axes[1], values, picture, limit, style)
    axes[1].set_title("score map")
    for number, (ax, box, caption) in enumerate(zip(axes[2:], corners, captions, strict=True), start=1):
        for whole in axes[:2]:
            _draw_box(whole, box, str(number))
        x0, y0, x1, y1 = box
        _draw_picture(ax, picture[y0:y1, x0:x1])
        ax.set_title(caption)
    return figure, axes


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
    figure, axes = _axes_grid(plt_fig_axis, len(patches) * len(methods), len(methods), fig_size)
    cells = [(layer, method) for layer in patches for method in methods]
    for index, (ax, (layer, method)) in enumerate(zip(axes, cells, strict=True)):
        tiles = [
            (
                _checked_picture(patch.pixels, mean, std, "patch.pixels"),
                _number(patch.value) if show_values else "",
            )
            for patch in patches[layer][method]
        ]
        _draw_tiles(ax, tiles, (rows, columns), tile_size)
        if index < len(methods):
            ax.set_title(method)
        if index % len(methods) == 0:
            ax.set_ylabel(layer)
    return figure, axes


class _Shown(Figure):
    """A figure that a notebook shows as it is: of others it prints the name, until pyplot has drawn something."""

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        self.savefig(png, format="png", bbox_inches="tight")
        return png.getvalue()


def _checked_map(score_map: Tensor, name: str = "score_map") -> Tensor:
    """Bring a map to one form.

    Returns:
        The map, ``(H, W)``, float32, on the CPU.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If it has several channels or images, or is not finite.
    """
    if not isinstance(score_map, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(score_map).__name__}. Use torch.as_tensor.")
    if score_map.ndim < 2 or score_map.numel() == 0 or any(size != 1 for size in score_map.shape[:-2]):
        raise ValueError(
            f"{name} must be one map, (H, W) or (1, 1, H, W); got {tuple(score_map.shape)}. "
            "Choose the image (score_map[0]) and sum the channels."
        )
    values = score_map.detach().reshape(score_map.shape[-2:]).to("cpu", torch.float32)
    if not values.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinite values. Check the model on this image.")
    return values


def _checked_limit(limit: float | None, maps: Sequence[Tensor], style: MapStyle) -> float:
    """Choose the end of the color scale.

    Returns:
        The limit if given; else the largest magnitude of the maps, outliers aside; 1 where all maps are zero.

    Raises:
        ValueError: If the limit is no positive number.
    """
    if limit is None:
        share = 1 - style.outlier_perc / 100
        within = max(np.quantile(values.abs().numpy(), share, method="higher") for values in maps)
        return float(within or max(values.abs().max() for values in maps) or 1)
    if not 0 < limit < math.inf:
        raise ValueError(f"limit must be a positive number of logits, got {limit}.")
    return float(limit)


def _checked_picture(image: Tensor, mean: Channels | None, std: Channels | None, name: str = "image") -> Picture:
    """Bring an image to one form.

    Returns:
        The image, ``(H, W, 3)``, in [0, 1].

    Raises:
        TypeError: If it is no tensor.
        ValueError: If it is no single image, not finite, or outside [0, 1] once ``mean`` and ``std`` are
            undone.
    """
    if not isinstance(image, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(image).__name__}. Use torchvision's to_tensor.")
    if image.ndim == 4 and image.shape[0] == 1:
        image = image[0]
    if image.ndim != 3 or image.shape[0] not in {1, 3} or image.numel() == 0:
        raise ValueError(f"{name} must be (C, H, W) with 1 or 3 channels, got {tuple(image.shape)}.")
    pixels = image.detach().to("cpu", torch.float32)
    if image.dtype == torch.uint8:
        pixels = pixels / 255
    if mean is not None and std is not None:
        pixels = pixels * _by_channel(std, pixels, "std") + _by_channel(mean, pixels, "mean")
    elif mean is not None or std is not None:
        raise ValueError("mean and std must be given together, got only one of them.")
    if not pixels.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinite values.")
    low, high = float(pixels.min()), float(pixels.max())
    if low < -0.25 or high > 1.25:  # less is what bicubic resizing overshoots
        raise ValueError(
            f"{name} must lie in [0, 1], got values from {low:.2f} to {high:.2f}. "
            "Pass the mean and std with which it was normalized."
        )
    picture: Picture = pixels.clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()
    return picture


def _by_channel(numbers: Channels, pixels: Tensor, name: str) -> Tensor:
    """Shape one number, or one per channel, like the image's channels.

    Returns:
        The numbers, ``(1 or C, 1, 1)``.

    Raises:
        ValueError: If there are neither one nor C.
    """
    values = torch.as_tensor(numbers, dtype=torch.float32, device="cpu").reshape(-1, 1, 1)
    if len(values) not in {1, len(pixels)}:
        raise ValueError(f"{name} must be one number or one per channel ({len(pixels)}), got {numbers}.")
    return values


def _checked_boxes(boxes: Tensor, picture: Picture) -> list[tuple[int, int, int, int]]:
    """Bring boxes to one form.

    Returns:
        One tuple ``x0, y0, x1, y1`` a box.

    Raises:
        ValueError: If they are not ``(k, 4)``, empty, or outside the image.
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not len(boxes):
        raise ValueError(f"boxes must be (k, 4), k > 0, got {tuple(boxes.shape)}. Choose the image: boxes[0].")
    height, width = picture.shape[:2]
    corners = []
    for x0, y0, x1, y1 in boxes.long().tolist():
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise ValueError(
                "boxes must be x0 < x1, y0 < y1 within the image, "
                f"got {(x0, y0, x1, y1)} in {height} rows and {width} columns."
            )
        corners.append((x0, y0, x1, y1))
    return corners


def _axes_grid(
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
            fig_size = (3.2 * columns, (2.2 * aspect + 0.6) * rows)
        figure = _Shown(figsize=fig_size, layout="constrained")
        axes = [figure.add_subplot(rows, columns, 1 + index) for index in range(count)]
    for ax in axes:
        ax.set_xticks([])
        ax.set_yticks([])
    return figure, axes


def _number(value: float | Tensor) -> str:
    rounded = round(torch.as_tensor(value).detach().item(), 2) + 0.0  # no minus zero
    return f"{rounded:.2f}".replace("-", "−")


def _draw_picture(ax: Axes, picture: Picture) -> None:
    ax.imshow(picture, interpolation="nearest")


def _draw_map(
    figure: AnyFigure, ax: Axes, cells: Tensor, picture: Picture | None, limit: float, style: MapStyle
) -> None:
    """Draw a map in color, over the picture in grey if there is one."""
    if picture is not None:
        grey = picture @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
        ax.imshow(grey, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    size = cells.shape if picture is None else picture.shape[:2]
    values = _resized(cells, size, style)
    scale = Normalize(-limit, limit)
    alpha = 1.0 if picture is None else style.alpha_overlay
    ax.imshow(values.numpy(), cmap=style.cmap, norm=scale, alpha=alpha, interpolation="nearest")
    if max(cells.shape) > FINEST_LINED:
        height, width = (min(side, FINEST_LINED) for side in cells.shape)
        coarse = F.adaptive_avg_pool2d(cells[None], (height, width))[0]
        _draw_contours(ax, _resized(coarse, size, style), float(coarse.abs().max()), style)
    else:
        _draw_contours(ax, values, limit, style)
    if style.show_colorbar:
        low, high = bool(cells.min() < -limit), bool(cells.max() > limit)
        extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
        beside = ax.inset_axes((1.03, 0, 0.05, 1))
        bar = figure.colorbar(ScalarMappable(scale, style.cmap), cax=beside, extend=extend[low, high])
        bar.set_ticks([-limit, 0, limit], labels=[f"−{limit:.3g}", "0", f"+{limit:.3g}"])
        bar.set_label(style.unit)


def _draw_contours(ax: Axes, values: Tensor, limit: float, style: MapStyle) -> None:
    """Draw the sign as lines: solid around what adds, dashed around what takes away."""
    for sign, linestyle in ((1, "solid"), (-1, "dashed")):
        levels = sorted(sign * fraction * limit for fraction in style.contours)
        levels = [level for level in levels if float(values.min()) < level < float(values.max())]
        if levels and min(values.shape) > 1:
            ax.contour(values.numpy(), levels=levels, colors="black", linewidths=0.5, linestyles=linestyle)


def _resized(values: Tensor, size: tuple[int, ...], style: MapStyle) -> Tensor:
    """Interpolate a map.

    Returns:
        The map, of the given size.
    """
    align = False if style.interpolate_mode == "bilinear" else None
    return F.interpolate(values[None, None], tuple(size), mode=style.interpolate_mode, align_corners=align)[0, 0]


def _draw_box(ax: Axes, box: tuple[int, int, int, int], text: str) -> None:
    """Draw a numbered frame, white in black, so that it shows on any picture."""
    x0, y0, x1, y1 = box
    outline = [patheffects.withStroke(linewidth=3, foreground="black")]
    corner = (x0 - 0.5, y0 - 0.5)  # pixels are centred at whole numbers
    ax.add_patch(Rectangle(corner, x1 - x0, y1 - y0, fill=False, edgecolor="white", path_effects=outline))
    ax.annotate(text, corner, (3, -3), textcoords="offset points", color="white", va="top", path_effects=outline)


def _draw_tiles(ax: Axes, tiles: Sequence[tuple[Picture, str]], grid: tuple[int, int], tile_size: int) -> None:
    """Draw pictures with their captions as one sheet of equal tiles, each brought to size and centred."""
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
