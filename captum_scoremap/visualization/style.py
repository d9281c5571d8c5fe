"""How score maps are drawn."""

from dataclasses import dataclass
from typing import Literal

from matplotlib.colors import Colormap

__all__ = ["DEFAULT_STYLE", "MapStyle"]


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
        >>> import torch
        >>> from captum_scoremap.visualization import visualize_score_map
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
