"""Receptive fields: which rectangle of the image a cell of a layer can depend on.

The model is run as it is, but on other numbers: instead of its value, every element carries the *last row of
the image it can depend on*. So read, an element-wise operation on several tensors is a maximum, a convolution
or pooling is the maximum over its window, a sum along an axis is the maximum along it, and what merely moves
elements stays what it is: the network in max-plus algebra. Negated rows give the first row, columns the first
and last column; these four are the four images of one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from captum_scoremap.receptive_fields import rules  # noqa: F401  # enters the rules
from captum_scoremap.receptive_fields.reach import EndlessReach, NoRuleError, Reach
from captum_scoremap.settings import plain_attention

__all__ = ["ReceptiveField", "receptive_field"]

ROW, MINUS_ROW, COL, MINUS_COL = range(4)  # what the four images of the batch hold


@dataclass(frozen=True, eq=False)
class ReceptiveField:
    """Receptive fields of all cells of a layer, in pixels of the network's input.

    Attributes:
        size: Height and width of the largest one, counted as if the image went on beyond its border.
        stride: Rows and columns from the field of a cell to that of the next; 0 if it does not move (after
            global pooling), a fraction where the layer is finer than the image.
        offset: First row and column of the field of cell (0, 0), negative if it begins in the padding.
        input_size: Height and width of the image.
        boxes: ``x0, y0, x1, y1`` of every cell, (H, W, 4), see `box`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3))
        >>> field = receptive_field(model, model[0], input_size=(8, 8))
        >>> field.box(0, 0), field.center(0, 0)
        ((0, 0, 3, 3), (1.5, 1.5))
    """

    size: tuple[int, int]
    stride: tuple[float, float]
    offset: tuple[int, int]
    input_size: tuple[int, int]
    boxes: Tensor

    def box(self, row: int, col: int) -> tuple[int, int, int, int]:
        """Return the smallest rectangle inside the image with all pixels that any channel of a cell can depend on.

        Returns:
            ``x0, y0, x1, y1`` in pixels, x1 and y1 exclusive; all zero for a cell that sees only padding.

        Raises:
            ValueError: The layer has no such cell.
        """
        self._check(row, col)
        x0, y0, x1, y1 = self.boxes[row, col].tolist()
        return x0, y0, x1, y1

    def center(self, row: int, col: int) -> tuple[float, float]:
        """Return the middle of a cell's receptive field before it is clipped to the image.

        Where all cells have the same field (after global pooling) they are spread evenly over the image.

        Returns:
            ``x, y`` in pixels; the first pixel reaches from 0 to 1.

        Raises:
            ValueError: The layer has no such cell.
        """
        self._check(row, col)
        rows, cols, _ = self.boxes.shape
        y, x = (
            self.offset[axis] + self.stride[axis] * cell + self.size[axis] / 2
            if self.stride[axis] > 0
            else (cell + 0.5) / cells * self.input_size[axis]
            for axis, cell, cells in ((0, row, rows), (1, col, cols))
        )
        return x, y

    def _check(self, row: int, col: int) -> None:
        rows, cols, _ = self.boxes.shape
        for name, cell, cells in (("row", row, rows), ("col", col, cols)):
            if not 0 <= cell < cells:
                raise ValueError(
                    f"{name} must be from 0 to {cells - 1}, got {cell}. The layer has {rows} x {cols} cells."
                )


def receptive_field(
    model: Callable[[Tensor], Any], layer: nn.Module, input_size: Sequence[int], channel_dim: int = 1
) -> ReceptiveField:
    """Find the rectangle of the image that each cell of a layer can depend on.

    "Can": by the structure of the network (kernels, strides, padding, branches), whatever its weights and the
    image. The network is read as in evaluation; it is unchanged afterwards.

    Args:
        model: The network, or any function that calls it on images (N, C, H, W).
        layer: The module whose output (N, C, H, W), (N, C, H) or (N, C) is meant; that of its last run, as in
            Captum, if it runs more than once.
        input_size: ``(H, W)`` of images with three channels, or ``(C, H, W)``.
        channel_dim: Axis of the channels in the output of ``layer``; -1 in channels-last networks.

    Returns:
        The receptive fields, exact for every single cell.

    Raises:
        TypeError: ``layer`` is no module.
        ValueError: ``input_size`` is not two or three positive numbers; ``layer`` does not run, or its output
            is another.
        NotImplementedError: The reach of an operation is not known; the message names it and its module.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=1))
        >>> field = receptive_field(model, model[1], input_size=(32, 32))
        >>> field.size, field.stride, field.offset
        ((7, 7), (2.0, 2.0), (-3, -3))
        >>> field.box(row=0, col=4)
        (5, 0, 12, 4)
    """
    if not isinstance(layer, nn.Module):
        raise TypeError(f"layer must be a module, got {layer!r}. Of a name: model.get_submodule(name).")
    if not isinstance(input_size, Sequence) or len(input_size) not in {2, 3} or min(input_size) < 1:
        raise ValueError(
            f"input_size must be (H, W) or (C, H, W) in pixels, got {input_size}. Give, for instance, (224, 224)."
        )
    channels, height, width = (3, *input_size) if len(input_size) == 2 else input_size
    parameter = next((model if isinstance(model, nn.Module) else layer).parameters(), torch.empty(0))
    image = _coordinates(channels, height, width).to(parameter.device)
    inside = _cells(_run(model, layer, Reach(image, parameter.dtype)), channel_dim)
    endless = _cells(_run(model, layer, EndlessReach(image, parameter.dtype)), channel_dim)
    (size_y, stride_y, offset_y), (size_x, stride_x, offset_x) = (
        _progression(endless[ROW], -endless[MINUS_ROW]),
        _progression(endless[COL].T, -endless[MINUS_COL].T),
    )
    boxes = torch.stack([-inside[MINUS_COL], -inside[MINUS_ROW], inside[COL] + 1, inside[ROW] + 1], dim=-1)
    return ReceptiveField(
        size=(size_y, size_x),
        stride=(stride_y, stride_x),
        offset=(offset_y, offset_x),
        input_size=(height, width),
        boxes=boxes.where(boxes.isfinite(), 0).long(),
    )


def _coordinates(channels: int, height: int, width: int) -> Tensor:
    """Return the batch of four images whose pixels hold their own row, -row, col and -col, (4, C, H, W)."""
    row, col = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    return torch.stack([row, -row, col, -col])[:, None].repeat(1, channels, 1, 1)


def _cells(reach: Tensor, channel_dim: int) -> Tensor:
    """Return the reach of a layer's cells over all their channels, (4, H, W); a missing H or W counts as one."""
    cells = reach.amax(channel_dim).cpu()
    return cells.reshape(*cells.shape, *[1] * (3 - cells.ndim))


def _progression(last: Tensor, first: Tensor) -> tuple[int, float, int]:
    """Size, stride and offset along the first axis of cells, from the last and first row of their fields."""
    size = (last - first + 1).clamp(min=0).max()
    stride = (first[-1, 0] - first[0, 0]) / max(len(first) - 1, 1)
    return int(size), float(stride), int(first[0, 0])


def _run(model: Callable[[Tensor], Any], layer: nn.Module, image: Reach) -> Tensor:
    """Return the reach of the layer's output, (4, ...), from one run of the model in max-plus algebra."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        shape = tuple(output.shape) if isinstance(output, Reach) else type(output).__name__
        if not isinstance(output, Reach) or output.ndim not in {2, 3, 4} or len(output) != len(image):
            raise ValueError(
                "layer must give one tensor (N, C, H, W), (N, C, H) or (N, C) that depends on the image, "
                f"got {shape} for N = {len(image)}. Take another layer."
            )
        outputs.append(output.reach.clone())  # operations above may change it in place

    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
    handle = layer.register_forward_hook(keep)
    try:
        with (
            _evaluation(modules.values()),
            _module_in_errors(modules),
            torch.no_grad(),
            plain_attention(),
        ):
            model(image)
    finally:
        handle.remove()
    if not outputs:
        raise ValueError("layer must run when model does, got one that does not. Take a module of this model.")
    return outputs[-1]


@contextmanager
def _evaluation(modules: Collection[nn.Module]) -> Iterator[None]:
    """Switch modules to evaluation, and each back to its own mode at the end."""
    modes = [(module, module.training) for module in modules]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _module_in_errors(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Let an error about an operation without a rule name the module in which it happened."""
    running = ["the model itself"]

    def enter(name: str, *_: Any) -> None:
        running.append(name)

    def leave(*_: Any) -> None:
        running.pop()

    named = [(name, module) for name, module in modules.items() if name]
    handles = [module.register_forward_pre_hook(partial(enter, name)) for name, module in named]
    handles += [module.register_forward_hook(leave) for _, module in named]
    try:
        yield
    except NoRuleError as error:
        raise NotImplementedError(
            f"model must consist of operations whose reach is known, got {error} in {running[-1]}. "
            "Pass the part of the model without it as model."
        ) from None
    finally:
        for handle in handles:
            handle.remove()
