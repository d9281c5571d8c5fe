"""Where channels, positions and tokens are in a layer's output, and which layers of a model are worth explaining."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

__all__ = ["layer_shapes", "main_layers", "main_modules", "map_channel_dim", "resized", "token_grid"]


def map_channel_dim(shape: tuple[int, ...], image_shape: tuple[int, ...]) -> int | None:
    """Return the axis of the channels of a layer's output, found by its rows and columns being like those of the image.

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


def token_grid(score_map: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
    """Lay the tokens of a score map out as an image, so that it plots like any other.

    Class and register tokens, which stand before the patches and have no place in the image, are left out; what they
    add to the score is the difference of the sums.

    Args:
        score_map: Map of a token layer, taken with ``channel_dim=-1``: (N, tokens, K) as in ViT, or (N, h, w, K) as in
            Swin.
        grid: Rows and columns of patches; None for the largest square that the tokens fill.

    Returns:
        (N, K, h, w), in the units of the map.

    Raises:
        ValueError: If the map has another number of dimensions, or fewer tokens than the grid.

    Example:
        >>> import torch
        >>> token_grid(torch.rand(1, 197, 1)).shape  # a class token and 14 x 14 patches
        torch.Size([1, 1, 14, 14])
    """
    if score_map.dim() == 4:
        return score_map.movedim(-1, 1)
    if score_map.dim() != 3:
        raise ValueError(f"score_map must be (N, tokens, K) or (N, h, w, K), got {tuple(score_map.shape)}.")
    tokens = score_map.shape[1]
    rows, columns = grid if grid is not None else (math.isqrt(tokens), math.isqrt(tokens))
    if tokens < rows * columns:
        raise ValueError(f"grid must have at most {tokens} patches, one for each token, got {rows} x {columns}.")
    patches: Tensor = score_map[:, tokens - rows * columns :].unflatten(1, (rows, columns))
    return patches.movedim(-1, 1)


def resized(one: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a map in another size with its sum kept: each cell's number is spread by linear interpolation.

    Args:
        one: (N, 1, h, w).
        size: Rows and columns.

    Returns:
        (N, 1, *size).

    Example:
        >>> resized(torch.ones(1, 1, 3, 3), (7, 5)).sum()
        tensor(9.)
    """
    if tuple(one.shape[2:]) == tuple(size):
        return one
    rows, columns = (_spread(old, new, one.dtype, one.device) for old, new in zip(one.shape[2:], size, strict=True))
    return rows @ one @ columns.T


def _spread(old: int, new: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the share of each old cell that each new one gets, (new, old); the shares of an old one add up to 1."""
    cells = torch.eye(old, dtype=dtype, device=device)[None]
    if new < old:  # a new cell takes the old ones that it covers
        weights = F.adaptive_avg_pool1d(cells, new)[0]
    else:
        weights = F.interpolate(cells, size=new, mode="linear", align_corners=False)[0]
    return (weights / weights.sum(1, keepdim=True)).T


def layer_shapes(model: nn.Module, inputs: Tensor) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the outputs of all modules that run once and give one floating-point tensor.

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


def main_modules(
    forward_func: Callable[..., Any], inputs: Tensor, additional: tuple[Any, ...] = (), *, channels_first: bool = False
) -> list[nn.Module]:
    """Return the last module of each resolution on the main path, in the order in which they run.

    Of all modules that run once and return maps of one size, those count that the fewest modules enclose, and of them
    the last: whole stages are preferred to what is inside them, the main path to a branch beside a shortcut.

    Args:
        forward_func: The model, or a function that calls it; it runs once.
        inputs: Images, (N, C, H, W).
        additional: Additional arguments.
        channels_first: Whether only outputs (N, C, h, w) count, not (N, h, w, C).

    Returns:
        Modules whose outputs are maps of more than one cell, at most one for each resolution; empty if there are none.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        >>> main_modules(network, torch.randn(1, 3, 10, 10)) == [network[1], network[2]]
        True
    """
    return _last_of_each_resolution(_run(forward_func, inputs, additional), inputs, channels_first=channels_first)


def main_layers(model: nn.Module, inputs: Tensor) -> list[str]:
    """Return the names of the main modules; a transformer that keeps one resolution throughout is cut at its quarters.

    Args:
        model: The model; it runs once.
        inputs: Images, (N, C, H, W).

    Returns:
        Names of layers that run once and give maps of more than one cell, in the order in which they run.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        >>> main_layers(network, torch.randn(1, 3, 10, 10))
        ['1', '2']
    """
    names = {module: name for name, module in model.named_modules()}
    outputs = _run(model, inputs, ())
    last = [names[module] for module in _last_of_each_resolution(outputs, inputs)]
    if len(last) > 1:
        return last
    tokens = [names[one.module] for one in outputs if map_channel_dim(one.shape, tuple(inputs.shape)) == -1]
    return [*last, *_quarters(tokens)]


@dataclass(frozen=True)
class _Output:
    """What a module returned, and how many modules enclose it."""

    module: nn.Module
    depth: int
    shape: tuple[int, ...]


def _run(forward_func: Callable[..., Any], inputs: Tensor, additional: tuple[Any, ...]) -> list[_Output]:
    """Outputs of the modules that run once and return a tensor, in the order in which they end."""
    calls: Counter[nn.Module] = Counter()
    enclosing: list[nn.Module] = []
    outputs: list[_Output] = []

    def enter(module: nn.Module, arguments: Any) -> None:
        calls[module] += 1
        enclosing.append(module)

    def leave(module: nn.Module, arguments: Any, output: Any) -> None:
        enclosing.pop()
        if module is not forward_func and isinstance(output, Tensor) and output.is_floating_point():
            outputs.append(_Output(module, len(enclosing), tuple(output.shape)))

    with ExitStack() as stack:
        # hooks on all modules: those inside a plain function cannot be named beforehand
        stack.callback(register_module_forward_pre_hook(enter).remove)
        stack.callback(register_module_forward_hook(leave).remove)
        with torch.no_grad():
            forward_func(inputs.clone(), *additional)
    return [output for output in outputs if calls[output.module] == 1]


def _last_of_each_resolution(
    outputs: Sequence[_Output], inputs: Tensor, *, channels_first: bool = False
) -> list[nn.Module]:
    last: dict[tuple[int, ...], _Output] = {}
    for output in outputs:
        channel_dim = map_channel_dim(output.shape, tuple(inputs.shape)) if len(output.shape) == 4 else None
        if channel_dim is None or (channels_first and channel_dim != 1):
            continue
        size = output.shape[2:] if channel_dim == 1 else output.shape[1:3]
        if size not in last or output.depth <= last[size].depth:
            last[size] = output
    return [output.module for output in outputs if output in last.values()]


def _quarters(token_layers: list[str]) -> list[str]:
    """Return the blocks after a quarter, a half and three quarters of the longest row of blocks."""
    rows: dict[str, list[str]] = {}
    for name in token_layers:
        rows.setdefault(name.rpartition(".")[0], []).append(name)
    blocks = max(rows.values(), key=len, default=[])
    return [blocks[len(blocks) * quarter // 4] for quarter in (1, 2, 3)] if len(blocks) >= 4 else []
