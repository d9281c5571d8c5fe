"""Figures of score maps, crops and semantic patches; the only room that knows matplotlib.

Every function takes finished tensors or NumPy arrays and returns ``(figure, axes)``. Figures are made without
pyplot, so none stays open behind the caller's back; pass ``plt_fig_axis``, as to Captum's
``visualize_image_attr``, to draw into axes of your own.

Color is signed and centered at zero: red adds to the score, blue takes from it. Both are equally dark, so the
sign is drawn a second time as contours, solid around what adds and dashed around what takes away, for print
in gray and for readers who cannot tell the colors apart.
"""

from .crops import visualize_crops
from .patches import visualize_patches
from .score_maps import visualize_layer_score_maps, visualize_score_map
from .style import MapStyle

__all__ = [
    "MapStyle",
    "visualize_crops",
    "visualize_layer_score_maps",
    "visualize_patches",
    "visualize_score_map",
]
