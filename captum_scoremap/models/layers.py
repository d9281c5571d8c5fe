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
        1 for (N, C, h, w), -1 for (N, h, w, C) and for tokens, (N, tokens, C). None for an output that is no map:
        another number of axes, a single cell, or sides quite unlike the image's.

    Example:
        >>> images = (1, 3, 224, 224)
        >>> map_channel_dim((1, 96, 56, 56), images), map_channel_dim((1, 56, 56, 96), images)
        (1, -1)
        >>> map_channel_dim((1, 197, 768), images), map_channel_dim((1, 1000), images)
        (-1, None)
    """
    if len(shape) not in {3, 4} or shape[0] != image_shape[0]:
        return None
    if len(shape) == 3:
        return -1 if shape[1] >= 4 else None
    aspect = image_shape[2] / image_shape[3]
    layouts = ((1, shape[2], shape[3]), (-1, shape[1], shape[2]))
    unlikeness, channel_dim, cells = min(
        (abs(math.log(rows / columns / aspect)), -axis, rows * columns) for axis, rows, columns in layouts
    )
    return -channel_dim if cells > 1 and unlikeness < math.log(1.5) else None


def layer_shapes(model: nn.Module, inputs: Tensor) -> dict[str, tuple[int, ...]]:
    """Shapes of the outputs of all modules that run once and give one floating-point tensor.

    Args:
        model: The model; it runs once.
        inputs: Images, (N, C, H, W).

    Returns:
        Name to shape, in the order in which they end.

    Example:
        >>> layer_shapes(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), torch.randn(1, 3, 10, 10))
        {'0': (1, 4, 8, 8), '1': (1, 256)}
    """
    shapes: dict[str, tuple[int, ...]] = {}
    calls: Counter[str] = Counter()

    def record(name: str, output: Any) -> None:
        calls[name] += 1
        if isinstance(output, Tensor) and output.is_floating_point():
            shapes[name] = tuple(output.shape)

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
    return {name: shape for name, shape in shapes.items() if calls[name] == 1}


def main_layers(model: nn.Module, inputs: Tensor) -> list[str]:
    """The last layer of each resolution, in the order in which they run.

    Whole stages are preferred to the layers inside them: of all that give maps of one size, the last of those
    whose names have the fewest parts. A transformer that keeps one resolution throughout is cut at its quarters.

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
    shapes = layer_shapes(model, inputs)
    layouts = {name: map_channel_dim(shape, tuple(inputs.shape)) for name, shape in shapes.items()}
    last: dict[tuple[int, ...], str] = {}
    for name, channel_dim in layouts.items():
        if channel_dim is not None and len(shapes[name]) == 4:
            size = shapes[name][2:] if channel_dim == 1 else shapes[name][1:3]
            if size not in last or name.count(".") <= last[size].count("."):
                last[size] = name
    if len(last) > 1:
        return [name for name in layouts if name in last.values()]
    return [*last.values(), *_quarters([name for name in layouts if layouts[name] == -1])]


def _quarters(token_layers: list[str]) -> list[str]:
    """The blocks after a quarter, a half and three quarters of the longest row of blocks."""
    rows: dict[str, list[str]] = {}
    for name in token_layers:
        rows.setdefault(name.rpartition(".")[0], []).append(name)
    blocks = max(rows.values(), key=len, default=[])
    return [blocks[len(blocks) * quarter // 4] for quarter in (1, 2, 3)] if len(blocks) >= 4 else []
