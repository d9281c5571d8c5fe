"""Score maps for Quantus, as the ``explain_func`` that its metrics call."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from captum_scoremap.attribution import LayerScoreMap, ScoreMap
from captum_scoremap.checks import nearest
from captum_scoremap.rules import Rule

__all__ = ["explain_func"]

_INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}


def explain_func(
    model: nn.Module,
    inputs: ArrayLike,
    targets: ArrayLike,
    *,
    layer: str | None = None,
    relu_attributions: bool = False,
    rules: Mapping[Any, Rule] | None = None,
    device: str | torch.device | None = None,
    method: str | None = None,
) -> NDArray[Any]:
    """Return the sub-scores of images, or the score maps of a layer on them.

    Pass it to a metric of Quantus, and options in ``explain_func_kwargs``. Sub-scores of the image add up to S - B, as
    ``quantus.Completeness`` asks of a model without biases; a map interpolated from a layer is for metrics that compare
    by rank.

    Args:
        model: The model in evaluation mode.
        inputs: Images, (N, C, H, W).
        targets: Label of each image, (N,).
        layer: Name of the layer, because Quantus also explains copies of the model; None for the image itself.
        relu_attributions: Whether to return the positive part only.
        rules: Operation to rule, to replace or add some.
        device: Where to compute; None for where the model is.
        method: What ``quantus.evaluate`` calls this function; not used.

    Returns:
        In logits: sub-scores, (N, C, H, W), or with a layer score maps, (N, 1, H, W).

    Raises:
        TypeError: If ``layer`` is no name.
        ValueError: If the model has no such layer, or its map has not as many dimensions as the image.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)).eval()
        >>> images, labels = np.random.rand(2, 3, 6, 6), np.array([7, 1])
        >>> explain_func(model, images, labels).shape
        (2, 3, 6, 6)
        >>> explain_func(model, images, labels, layer="1").shape
        (2, 1, 6, 6)
    """
    like = next(model.parameters(), torch.empty(0))
    images = torch.as_tensor(np.asarray(inputs), dtype=like.dtype, device=device or like.device)
    labels = torch.as_tensor(np.asarray(targets), dtype=torch.int64, device=images.device).reshape(-1)
    if layer is None:
        maps = ScoreMap(model, rules=rules).attribute(images, labels)
    else:
        maps = _on_image(
            LayerScoreMap(model, _module(model, layer), rules=rules).attribute(images, labels), layer, images
        )
    return (maps.clamp(min=0) if relu_attributions else maps).cpu().numpy()  # type: ignore[no-any-return]


def _module(model: nn.Module, layer: object) -> nn.Module:
    if not isinstance(layer, str):
        raise TypeError(f"layer must be the name of a module, got {type(layer).__name__}. Name it: layer='layer4'.")
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if layer not in modules:
        raise ValueError(f"layer must name a module of the model, got {layer!r}.{nearest(layer, modules)}")
    return modules[layer]


def _on_image(maps: Any, layer: str, images: Tensor) -> Any:
    size = tuple(images.shape[2:])
    if not isinstance(maps, Tensor) or maps.dim() != images.dim() or len(size) not in _INTERPOLATION:
        shape = tuple(maps.shape) if isinstance(maps, Tensor) else f"{len(maps)} tensors"
        raise ValueError(
            f"layer must give a map that lies on the image, (N, 1, H, W); got {shape} at {layer!r}. Name another layer."
        )
    return LayerScoreMap.interpolate(maps, size, _INTERPOLATION[len(size)])
