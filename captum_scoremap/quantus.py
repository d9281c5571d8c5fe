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
        inputs: Images, (N, C, H, W); they are computed in the model's floating-point type.
        targets: Label of each image, (N,) or (N, 1), as whole numbers of any type.
        layer: Name of the layer, because Quantus also explains copies of the model; None for the image itself.
        relu_attributions: Whether to return the positive part only.
        rules: Operation to rule, to replace or add some.
        device: Where to compute; None for where the model is.
        method: What ``quantus.evaluate`` calls this function; not used.

    Returns:
        In logits: sub-scores, (N, C, H, W), or with a layer score maps, (N, 1, H, W). Their type is the model's;
        float32 for bfloat16, which NumPy lacks.

    Raises:
        TypeError: If the model is no module, images or labels are no numbers, or ``layer`` is no name.
        ValueError: If a label is no whole number, or images have several; if the model has no such layer, or its map
            has not as many dimensions as the image; or as ``ScoreMap.attribute``.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)).eval()
        >>> images, labels = np.random.rand(2, 3, 6, 6), np.array([7, 1])
        >>> explain_func(model, images, labels).shape
        (2, 3, 6, 6)
        >>> explain_func(model, images, labels, layer="1").shape
        (2, 1, 6, 6)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}. Put a function into a module.")
    like = next(model.parameters(), torch.empty(0))
    images = torch.as_tensor(_numbers("inputs", inputs), dtype=like.dtype, device=device or like.device)
    labels = torch.as_tensor(_labels(targets), device=images.device)
    if layer is None:
        maps = ScoreMap(model, rules=rules).attribute(images, labels)
    else:
        maps = _on_image(
            LayerScoreMap(model, _module(model, layer), rules=rules).attribute(images, labels), layer, images
        )
    maps = (maps.clamp(min=0) if relu_attributions else maps).cpu()
    return (maps.float() if maps.dtype == torch.bfloat16 else maps).numpy()  # type: ignore[no-any-return]


def _numbers(what: str, values: object) -> NDArray[Any]:
    """Return values as an array that PyTorch reads: of numbers, its strides positive.

    Raises:
        TypeError: If they are something else.
    """
    found = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    if found.dtype == object:  # as pandas has columns of numbers
        found = np.asarray(found.tolist())
    if found.dtype.kind not in "fiu":
        raise TypeError(f"{what} must be an array of numbers, got one of {found.dtype}. Convert it first.")
    return np.ascontiguousarray(found)


def _labels(targets: object) -> NDArray[np.int64]:
    """Return the label of each image, (N,).

    Raises:
        TypeError: If they are no numbers.
        ValueError: If they are no whole numbers, or several for an image.
    """
    found = np.atleast_1d(_numbers("targets", targets))
    if found.size != len(found):
        raise ValueError(
            f"targets must be one label for each image, (N,), got {found.shape}. Take targets.argmax(1) of one-hot "
            "rows, and explain an image of several labels once for each."
        )
    wrong = found[~np.isfinite(found) | (np.trunc(found) != found)]
    if wrong.size:
        raise ValueError(f"targets must be whole numbers, got {wrong[0]}.")
    return found.reshape(-1).astype(np.int64)


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
