"""Which layers of a model are worth a look, and which axis of their outputs holds the channels."""

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn


def map_channel_dim(shape: tuple[int, ...], image_shape: tuple[int, ...]) -> int | None:
    """Axis of the channels of a layer's output, found by its rows and columns being like those of the image.

    Args:
        shape: Shape of the output.
        image_shape: Shape of the input images, (N, C, H, W).

    Returns:
        1 for (N, C, h, w), -1 for (N, h, w, C), None for an output that is no map: another number of axes, a
        single cell, or sides quite unlike the image's.

    Example:
        >>> images = (1, 3, 224, 224)
        >>> map_channel_dim((1, 96, 56, 56), images), map_channel_dim((1, 56, 56, 96), images)
        (1, -1)
        >>> map_channel_dim((1, 197, 768), images) is None
        True
    """
    if len(shape) != 4 or shape[0] != image_shape[0]:
        return None
    aspect = image_shape[2] / image_shape[3]
    layouts = ((1, shape[2], shape[3]), (-1, shape[1], shape[2]))
    unlikeness, channel_dim, cells = min(
        (abs(math.log(rows / columns / aspect)), -axis, rows * columns) for axis, rows, columns in layouts
    )
    return -channel_dim if cells > 1 and unlikeness < math.log(1.5) else None


def main_layers(model: nn.Module, inputs: Tensor) -> list[str]:
    """The last layer of each resolution, in the order in which they run.

    Whole stages are preferred to the layers inside them: of all that give maps of one size, the last of those
    whose names have the fewest parts.

    Args:
        model: The model; it runs once.
        inputs: Images, (N, C, H, W).

    Returns:
        Names of layers that run once and give maps of more than one cell.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        >>> main_layers(network, torch.randn(1, 3, 10, 10))
        ['1', '2']
    """
    sizes: dict[str, tuple[int, int]] = {}
    calls: Counter[str] = Counter()

    def record(name: str, output: Any) -> None:
        calls[name] += 1
        shape = tuple(output.shape) if isinstance(output, Tensor) and output.is_floating_point() else ()
        axis = map_channel_dim(shape, tuple(inputs.shape))
        if axis is not None:
            sizes.pop(name, None)
            sizes[name] = (shape[2], shape[3]) if axis == 1 else (shape[1], shape[2])

    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: record(name, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    last: dict[tuple[int, int], str] = {}
    for name, size in sizes.items():
        if calls[name] == 1 and (size not in last or name.count(".") <= last[size].count(".")):
            last[size] = name
    return [name for name in sizes if name in last.values()]
