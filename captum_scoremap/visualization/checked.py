"""Maps, images, boxes and scales as they are given, brought to one form, or refused."""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from captum_scoremap.data.pictures import to_rgb

from .style import MapStyle

Picture: TypeAlias = npt.NDArray[np.float32]
Channels: TypeAlias = float | Sequence[float]
Box: TypeAlias = tuple[int, int, int, int]
Map: TypeAlias = Tensor | npt.NDArray[Any]
Photograph: TypeAlias = Tensor | npt.NDArray[Any] | Image.Image


def as_tensor(array: Map, name: str) -> Tensor:
    """Take a NumPy array for a tensor.

    Returns:
        The tensor.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(array, np.ndarray):
        return torch.from_numpy(np.array(array))  # a copy: arrays may be read-only
    if not isinstance(array, Tensor):
        raise TypeError(f"{name} must be a tensor or an array, got {type(array).__name__}. Use torch.as_tensor.")
    return array


def checked_map(score_map: Map, name: str = "score_map") -> Tensor:
    """Bring a map to one form.

    Returns:
        The map, ``(H, W)``, float32, on the CPU.

    Raises:
        TypeError: If it is neither tensor nor array.
        ValueError: If it has several channels or images, or is not finite.
    """
    score_map = as_tensor(score_map, name)
    if score_map.ndim < 2 or score_map.numel() == 0 or any(size != 1 for size in score_map.shape[:-2]):
        raise ValueError(
            f"{name} must be one map, (H, W) or (1, 1, H, W); got {tuple(score_map.shape)}. "
            "Choose the image (score_map[0]) and sum the channels."
        )
    values = score_map.detach().reshape(score_map.shape[-2:]).to("cpu", torch.float32)
    if not values.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinite values. Check the model on this image.")
    return values


def checked_limit(limit: float | None, maps: Sequence[Tensor], style: MapStyle) -> float:
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


def checked_picture(image: Photograph, mean: Channels | None, std: Channels | None, name: str = "image") -> Picture:
    """Bring an image to one form.

    Returns:
        The image, ``(H, W, 3)``, in [0, 1].

    Raises:
        TypeError: If it is neither tensor, array nor PIL image.
        ValueError: If it is no single image, not finite, or outside [0, 1] once ``mean`` and ``std`` are
            undone.
    """
    if isinstance(image, Image.Image):
        image = np.asarray(to_rgb(image))
    is_array, image = isinstance(image, np.ndarray), as_tensor(image, name)
    if (
        is_array and image.ndim in {2, 3} and image.shape[-1] != 0
    ):  # rows and columns first, as PIL and Captum have them
        image = image[None] if image.ndim == 2 else image.movedim(-1, 0) if image.shape[-1] in {1, 3, 4} else image
    if image.ndim == 4 and image.shape[0] == 1:
        image = image[0]
    if image.ndim != 3 or image.shape[0] not in {1, 3, 4} or image.numel() == 0:
        raise ValueError(f"{name} must be (C, H, W) with 1, 3 or 4 (RGBA) channels, got {tuple(image.shape)}.")
    pixels = image.detach().to("cpu", torch.float32)
    if not image.is_floating_point() and image.dtype != torch.bool:
        white = 65535 if image.dtype == torch.uint16 else 255
        if not 0 <= float(pixels.min()) <= float(pixels.max()) <= white:
            raise ValueError(
                f"{name} of whole numbers must lie in 0 to {white}, got values from {int(pixels.min())} to "
                f"{int(pixels.max())}."
            )
        pixels = pixels / white
    if len(pixels) == 4 and mean is None:
        pixels = pixels[:3] * pixels[3:] + (1 - pixels[3:])  # what is transparent on white
    if mean is not None and std is not None:
        pixels = pixels * _by_channel(std, pixels, "std") + _by_channel(mean, pixels, "mean")
    elif mean is not None or std is not None:
        raise ValueError("mean and std must be given together, got only one of them.")
    if not pixels.isfinite().all():
        raise ValueError(f"{name} must be finite, got NaN or infinite values.")
    low, high = float(pixels.min()), float(pixels.max())
    if low < -0.25 or high > 1.25:  # less is what bicubic resizing overshoots
        advice = (
            "Divide it by 255."
            if low >= 0 and 10 < high <= 256 and mean is None
            else ("Pass the mean and std with which it was normalized.")
        )
        raise ValueError(f"{name} must lie in [0, 1], got values from {low:.2f} to {high:.2f}. {advice}")
    picture: Picture = pixels.clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()
    return picture


def checked_boxes(boxes: Tensor, picture: Picture) -> list[tuple[int, int, int, int]]:
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


def check_box(box: Box | None, picture: Picture | None) -> None:
    """Refuse a box that is not a part of the image.

    Raises:
        ValueError: If there is no image, or the box is outside it.
    """
    if box is None:
        return
    if picture is None:
        raise ValueError(f"box must come with the image that it is a part of, got {tuple(box)} alone.")
    checked_boxes(torch.tensor([box]), picture)


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
