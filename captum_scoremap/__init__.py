"""Score maps: the prediction of a vision network for one image, as an exact sum.

For one image a network is affine from every layer on, once everything nonlinear in it (ReLU masks, pooling switches,
gates, norms, attention weights) is frozen at that image (Yu et al. 2015, *The linear representation of CNN for single
image*, Eq. (2)-(4)):

    S_c = A_{c,l} · Y_l + B_{c,l}                  for every layer l
    M_{c,l}(x, y) = sum_h A_{c,l}(x, y, h) Y_l(x, y, h)

| symbol | meaning |
| ------ | ------- |
| S      | score of a label: the logit, before softmax |
| Y      | output of a layer (the *activations*); Y_0 is the image |
| A      | *coefficients* of the score in Y; for piecewise-linear networks the gradient |
| B      | *bias*: what the layers above add whatever Y is |
| M      | *score map*: the *sub-scores* A·Y, summed over channels |
| N      | images of a batch |
| V      | views of an image |
| C      | channels |
| H, W   | rows and columns |
| K      | labels |
| mask   | which ReLUs are open at the image |
| switch | which position a pooling window took at the image |
"""

__version__ = "0.1.0"

import importlib
from typing import TYPE_CHECKING, Any

from captum_scoremap import rules, scores
from captum_scoremap.attribution import CompleteScoreMap, FusedScoreMap, LayerScoreMap, NeuronScoreMap, ScoreMap
from captum_scoremap.checks import UnsupportedOperationError
from captum_scoremap.layout import token_grid
from captum_scoremap.linear import BiasMaps, LinearForm, bias_maps, bias_terms, linear_form
from captum_scoremap.tape import Boundary, FrozenModel, freeze

if TYPE_CHECKING:
    from captum_scoremap import metrics, visualization
    from captum_scoremap.compiled import CompiledMap, Exported, compile_map
    from captum_scoremap.crops import score_map_crops
    from captum_scoremap.models import prepare
    from captum_scoremap.multiview import MultiView
    from captum_scoremap.patches import Patch, semantic_patches
    from captum_scoremap.receptive_fields import ReceptiveField, receptive_field

# What needs more packages, or is not for everybody, is loaded on first use: importing this costs what Captum costs.
_HOME = {
    "CompiledMap": "compiled",
    "Exported": "compiled",
    "MultiView": "multiview",
    "Patch": "patches",
    "ReceptiveField": "receptive_fields",
    "compile_map": "compiled",
    "metrics": None,
    "prepare": "models",
    "receptive_field": "receptive_fields",
    "score_map_crops": "crops",
    "semantic_patches": "patches",
    "visualization": None,
}

__all__ = [
    "BiasMaps",
    "Boundary",
    "CompiledMap",
    "CompleteScoreMap",
    "Exported",
    "FrozenModel",
    "FusedScoreMap",
    "LayerScoreMap",
    "LinearForm",
    "MultiView",
    "NeuronScoreMap",
    "Patch",
    "ReceptiveField",
    "ScoreMap",
    "UnsupportedOperationError",
    "bias_maps",
    "bias_terms",
    "compile_map",
    "freeze",
    "linear_form",
    "metrics",
    "prepare",
    "receptive_field",
    "rules",
    "score_map_crops",
    "scores",
    "semantic_patches",
    "token_grid",
    "visualization",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOME[name]
    if home is None:
        return importlib.import_module(f"{__name__}.{name}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
