"""Receptive fields: which rectangle of the image a cell of a layer can depend on.

The model is run as it is, but on other numbers: instead of its value, every element carries the *last row of
the image it can depend on*. So read, an element-wise operation on several tensors is a maximum, a convolution
or pooling is the maximum over its window, a sum along an axis is the maximum along it, and what merely moves
elements stays what it is: the network in max-plus algebra. Negated rows give the first row, columns the first
and last column; these four are the four images of one batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["ReceptiveField", "receptive_field"]

ROW, MINUS_ROW, COL, MINUS_COL = range(4)  # what the four images of the batch hold
NOTHING = -math.inf  # the last row of what depends on no row


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
    """

    size: tuple[int, int]
    stride: tuple[float, float]
    offset: tuple[int, int]
    input_size: tuple[int, int]
    boxes: Tensor

    def box(self, row: int, col: int) -> tuple[int, int, int, int]:
        """The smallest rectangle inside the image with all pixels that any channel of a cell can depend on.

        Returns:
            ``x0, y0, x1, y1`` in pixels, x1 and y1 exclusive; all zero for a cell that sees only padding.

        Raises:
            ValueError: The layer has no such cell.
        """
        self._check(row, col)
        x0, y0, x1, y1 = self.boxes[row, col].tolist()
        return x0, y0, x1, y1

    def center(self, row: int, col: int) -> tuple[float, float]:
        """The middle of a cell's receptive field before it is clipped to the image.

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
    if len(input_size) not in {2, 3} or min(input_size) < 1:
        raise ValueError(
            f"input_size must be (H, W) or (C, H, W) in pixels, got {tuple(input_size)}. "
            "Give, for instance, (224, 224)."
        )
    channels, height, width = (3, *input_size) if len(input_size) == 2 else input_size
    parameter = next((model if isinstance(model, nn.Module) else layer).parameters(), torch.empty(0))
    image = _coordinates(channels, height, width).to(parameter.device)
    inside = _cells(_run(model, layer, _Reach(image, parameter.dtype)), channel_dim)
    endless = _cells(_run(model, layer, _EndlessReach(image, parameter.dtype)), channel_dim)
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
    """The batch of four images whose pixels hold their own row, -row, col and -col, (4, C, H, W)."""
    row, col = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    return torch.stack([row, -row, col, -col])[:, None].repeat(1, channels, 1, 1)


def _cells(reach: Tensor, channel_dim: int) -> Tensor:
    """The reach of a layer's cells over all their channels, (4, H, W); a missing H or W counts as one."""
    cells = reach.amax(channel_dim).cpu()
    return cells.reshape(*cells.shape, *[1] * (3 - cells.ndim))


def _progression(last: Tensor, first: Tensor) -> tuple[int, float, int]:
    """Size, stride and offset along the first axis of cells, from the last and first row of their fields."""
    size = (last - first + 1).clamp(min=0).max()
    stride = (first[-1, 0] - first[0, 0]) / max(len(first) - 1, 1)
    return int(size), float(stride), int(first[0, 0])


def _run(model: Callable[[Tensor], Any], layer: nn.Module, image: _Reach) -> Tensor:
    """The reach of the layer's output, (4, ...), from one run of the model in max-plus algebra."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        shape = tuple(output.shape) if isinstance(output, _Reach) else type(output).__name__
        if not isinstance(output, _Reach) or output.ndim not in {2, 3, 4} or len(output) != len(image):
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
            sdpa_kernel(SDPBackend.MATH),
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
    except _NoRuleError as error:
        raise NotImplementedError(
            f"model must consist of operations whose reach is known, got {error} in {running[-1]}. "
            "Pass the part of the model without it as model."
        ) from None
    finally:
        for handle in handles:
            handle.remove()


class _NoRuleError(Exception):
    """An operation for which there is no rule."""


class _Reach(Tensor):
    """A tensor of the network of which only the reach is known: the last row each element can depend on.

    ``reach`` has the shape of the tensor, with the four images of `_coordinates` along N. It is minus
    infinity where an element depends on no pixel, as in the padding. Tensors of other classes (weights,
    constants) depend on none. The ``dtype`` is the one that the network would compute in.
    """

    reach: Tensor

    @staticmethod
    def __new__(cls, reach: Tensor, dtype: torch.dtype) -> _Reach:
        made: _Reach = torch.Tensor._make_wrapper_subclass(
            cls, reach.shape, strides=reach.stride(), dtype=dtype, device=reach.device
        )
        made.reach = reach
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Apply the rule of an operation instead of the operation."""
        operation = _Operation(cls, func, args, kwargs or {})
        result = operation.rule(operation)
        if operation.in_place:
            args[0].reach.copy_(result)
            return args[0]
        if func.is_view:
            return tree_map(partial(cls, dtype=operation.dtype), result)
        made = cls(result.contiguous(), operation.dtype)
        outputs = len(func._schema.returns)
        return made if outputs == 1 else (made,) * outputs

    @staticmethod
    def pad(reach: Tensor, pads: Sequence[tuple[int, int]]) -> Tensor:
        """Add (before, after) elements that depend on no pixel to each of the last axes; crop if negative."""
        return F.pad(reach, [length for pair in reversed(pads) for length in pair], value=NOTHING)


class _EndlessReach(_Reach):
    """The same in an image that goes on beyond its border: rows and columns are counted on in the padding."""

    @staticmethod
    def pad(reach: Tensor, pads: Sequence[tuple[int, int]]) -> Tensor:
        """Continue rows and columns by the step between the two outermost ones."""
        crops = [(min(before, 0), min(after, 0)) for before, after in pads[-2:]]
        reach = _Reach.pad(reach, [*pads[:-2], *crops])
        for axis, (before, after) in zip((-2, -1)[-len(pads) :], pads[-2:], strict=True):
            parts = [reach]
            if before > 0:
                parts.insert(0, _continued(reach.flip(axis), axis, before).flip(axis))
            if after > 0:
                parts.append(_continued(reach, axis, after))
            reach = torch.cat(parts, axis) if len(parts) > 1 else reach
        return reach


def _continued(reach: Tensor, axis: int, count: int) -> Tensor:
    """The next rows (columns) of the arithmetic progression that the last two begin."""
    edge, inner = reach.narrow(axis, -1, 1), reach.narrow(axis, -min(2, reach.shape[axis]), 1)
    steps = torch.arange(1.0, count + 1, device=reach.device).view(-1, *[1] * (-1 - axis))
    return (edge + steps * (edge - inner)).nan_to_num(nan=NOTHING, posinf=math.inf, neginf=NOTHING)


class _Operation:
    """A call of a PyTorch operation, its arguments by name, with the reach in place of tensors."""

    def __init__(self, kind: type[_Reach], func: Any, args: Any, kwargs: Any) -> None:
        self.kind, self.func, self.args, self.kwargs = kind, func, args, kwargs
        parameters = func._schema.arguments
        self.given = {parameter.name: value for parameter, value in zip(parameters, args, strict=False)} | kwargs
        self.in_place = parameters[0].alias_info is not None and parameters[0].alias_info.is_write

    def __getitem__(self, name: str) -> Any:
        value = self.given[name]
        return value.reach if isinstance(value, _Reach) else value

    def get(self, name: str, default: Any = None) -> Any:
        """An argument, or the default where it is left out, None or empty."""
        return self[name] if self.given.get(name) not in (None, []) else default

    @property
    def dtype(self) -> torch.dtype:
        """Number type of the output: the one asked for, or that of the image."""
        leaves = tree_leaves((self.args, self.kwargs))
        return self.get("dtype") or next(leaf.dtype for leaf in leaves if isinstance(leaf, _Reach))

    @property
    def rule(self) -> Rule:
        """What stands in for the operation: by name; else views move, and element by element is a maximum."""
        name = self.func._schema.name.removeprefix("aten::")
        if self.in_place and not isinstance(self.args[0], _Reach):
            raise _NoRuleError(f"{name} of a constant")
        name = name.removesuffix("_") if self.in_place else name
        if name in RULES:
            return RULES[name]
        if self.func.is_view:
            return _move
        if torch.Tag.pointwise in self.func.tags:
            return _maximum
        raise _NoRuleError(name)

    @cached_property
    def shape(self) -> torch.Size:
        """Shape of the first output."""

        def blank(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            dtype = torch.float if value.is_floating_point() else value.dtype
            return torch.empty(value.shape, dtype=dtype, device="meta")

        output = self.func(*tree_map(blank, self.args), **tree_map(blank, self.kwargs))
        return torch.Size(output.shape if isinstance(output, Tensor) else output[0].shape)


Rule = Callable[[_Operation], Any]


def _move(op: _Operation) -> Any:
    """Views and copies: the elements are the same, elsewhere."""

    def reach(value: Any) -> Any:
        return value.reach if isinstance(value, _Reach) else value

    return op.func(*tree_map(reach, op.args), **tree_map(reach, op.kwargs))


def _restride(op: _Operation) -> Any:
    """``as_strided``: in place it serves global pooling to keep channels last in memory, and moves no element."""
    if not op.in_place:
        return _move(op)
    if tuple(op["size"]) != tuple(op["self"].shape):
        raise _NoRuleError("as_strided_")
    return op["self"]


def _join(op: _Operation) -> Tensor:
    """``cat`` and ``stack``: as `_move`, with constants among the parts."""
    parts = [
        part.reach if isinstance(part, _Reach) else torch.full(part.shape, NOTHING, device=part.device)
        for part in op["tensors"]
    ]
    joined: Tensor = op.func(parts, op.get("dim", 0))
    return joined


def _constant(op: _Operation) -> Tensor:
    """Depends on the shape of its argument only, or on chance."""
    return torch.full(op.shape, NOTHING, device=op["self"].device)


def _copy(op: _Operation) -> Tensor:
    """``copy_``: the new elements, whatever the old ones were."""
    source = op.given["src"]
    return source.reach if isinstance(source, _Reach) else torch.tensor(NOTHING)


def _maximum(op: _Operation) -> Tensor:
    """Element by element, with broadcasting."""
    tensors = [leaf for leaf in tree_leaves((op.args, op.kwargs)) if isinstance(leaf, Tensor)]
    reach = reduce(torch.maximum, [tensor.reach for tensor in tensors if isinstance(tensor, _Reach)])
    return reach.expand(torch.broadcast_shapes(*[tensor.shape for tensor in tensors])).clone()


def _along(op: _Operation) -> Tensor:
    """Every element depends on all elements along ``dim`` (all axes, if left out): sums, softmax, sorting."""
    reach: Tensor = op["self"]
    reach = reach.amax(op.get("dim", tuple(range(reach.ndim))), keepdim=True)
    return reach.expand(op.shape) if len(op.shape) == reach.ndim else reach.reshape(op.shape)


def _halves(op: _Operation) -> Tensor:
    """``glu``: one half of the channels gates the other."""
    return torch.maximum(*op["self"].chunk(2, op.get("dim", -1)))


def _product(op: _Operation) -> Tensor:
    """``mm`` and its like: an element depends on a row of the first matrix and a column of the second."""
    *added, first, second = op.args
    reaches = [tensor.reach for tensor in added if isinstance(tensor, _Reach)]
    reaches += [first.reach.amax(-1, keepdim=True)] if isinstance(first, _Reach) else []
    reaches += [second.reach.amax(-2, keepdim=True)] if isinstance(second, _Reach) else []
    return reduce(torch.maximum, reaches).expand(op.shape)


def _linear(op: _Operation) -> Tensor:
    """Every output feature depends on every input feature."""
    reach: Tensor = op["input"].amax(-1, keepdim=True)
    return reach.expand(op.shape)


def _attention(op: _Operation) -> Tensor:
    """PyTorch's fused attention: every token depends on all tokens."""
    tokens = [tensor.reach.amax([1, 2], keepdim=True) for tensor in op.args if isinstance(tensor, _Reach)]
    return reduce(torch.maximum, tokens).expand(op.args[0].shape)


def _convolution(op: _Operation) -> Tensor:
    """Convolution, also grouped, dilated or transposed: a window of all channels of its group."""
    if isinstance(op.given["weight"], _Reach):
        raise _NoRuleError("convolution with weights that depend on the image")
    kernel = op["weight"].shape[2:]
    stride, padding, dilation = (_per_axis(op[name], len(kernel)) for name in ("stride", "padding", "dilation"))
    reach = op["input"].unflatten(1, (op["groups"], -1)).amax(2)
    if op["transposed"]:  # a convolution of stride 1 over cells that lie `stride` apart
        span = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        around = [length // s + 2 for length, s in zip(span, stride, strict=True)]
        reach = op.kind.pad(reach, [(cells, cells) for cells in around])
        for axis, s in enumerate(stride, start=2):
            apart = F.pad(reach.movedim(axis, -1)[..., None], (0, s - 1), value=NOTHING)
            reach = apart.flatten(-2).movedim(-1, axis)
        padding = [length - p - cells * s for length, p, cells, s in zip(span, padding, around, stride, strict=True)]
        stride = [1] * len(kernel)
    reach = _window(op, reach, kernel, stride, padding, dilation)
    return reach.repeat_interleave(op.shape[1] // op["groups"], dim=1)


def _pool(op: _Operation) -> Tensor:
    """Average and maximum pooling."""
    axes = op["self"].ndim - 2
    kernel = _per_axis(op["kernel_size"], axes)
    stride = _per_axis(op.get("stride", kernel), axes)
    padding, dilation = _per_axis(op.get("padding", 0), axes), _per_axis(op.get("dilation", 1), axes)
    return _window(op, op["self"], kernel, stride, padding, dilation)


def _window(
    op: _Operation,
    reach: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The maximum over sliding windows, padded behind by what the output's size takes."""
    pads = [
        (p, (outputs - 1) * s + d * (k - 1) + 1 - inputs - p)
        for k, s, p, d, inputs, outputs in zip(
            kernel, stride, padding, dilation, reach.shape[2:], op.shape[2:], strict=True
        )
    ]
    reach = op.kind.pad(reach, pads)
    if max(kernel) == 1:
        places = (slice(None), slice(None), *[slice(None, None, s) for s in stride])
        return reach[places]
    pool: Callable[..., Tensor] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
    return pool(reach, kernel, stride, 0, dilation)


def _per_axis(value: int | Sequence[int], axes: int) -> list[int]:
    """One number for every axis, from one for all or one for each."""
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values


def _adaptive_pool(op: _Operation) -> Tensor:
    """Adaptive pooling, average or maximum."""
    pool: Callable[..., Tensor] = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)[
        len(op["output_size"]) - 1
    ]
    return pool(op["self"], op["output_size"])


def _pad(op: _Operation) -> Tensor:
    """Padding with a constant."""
    pad = op.get("pad") or op["padding"]
    return op.kind.pad(op["self"], list(zip(pad[-2::-2], pad[::-2], strict=True)))


def _mirror(op: _Operation) -> Any:
    """Padding with pixels of the image: needed at its border only."""
    return _pad(op) if op.kind is _EndlessReach else _move(op)


def _patchify(op: _Operation) -> Tensor:
    """``unfold``: windows side by side."""
    reach = op.kind.pad(op["self"], [(p, p) for p in op["padding"]])
    return F.unfold(reach, op["kernel_size"], op["dilation"], 0, op["stride"])


def _overlay(op: _Operation) -> Tensor:
    """``fold``: windows put in their places, where they overlap as a sum."""
    height, width = op["output_size"]
    (above, left), options = op["padding"], (op["kernel_size"], op["dilation"], 0, op["stride"])
    rows, cols = height + 2 * above, width + 2 * left
    places = F.unfold(torch.arange(float(rows * cols)).view(1, 1, rows, cols), *options).long()
    kernel = places.shape[1]
    windows = op["self"].unflatten(1, (-1, kernel)).flatten(2)
    reach = windows.new_full((*windows.shape[:2], rows * cols), NOTHING)
    reach = reach.scatter_reduce(2, places.flatten().to(windows.device).expand_as(windows), windows, "amax")
    return reach.unflatten(2, (rows, cols))[..., above : above + height, left : left + width]


def _resample(op: _Operation) -> Tensor:
    """Linear and cubic interpolation: an element depends on the few of each axis that have a weight."""
    reach: Tensor = op.args[0].reach
    scales = op.get("scale_factors", (op.get("scales_h"), op.get("scales_w")))
    for axis, scale in zip((-2, -1), scales, strict=True):
        size = reach.shape[axis]
        unit = torch.eye(size, dtype=torch.double)[None, None]
        weights = op.func.overloadpacket.default(unit, (size, op.shape[axis]), op["align_corners"], None, scale)[
            0, 0
        ].abs()
        weight, source = weights.topk(int((weights > 1e-9).sum(0).max()), dim=0)  # (sources, outputs)
        index = source.where(weight > 1e-9, source[:1]).to(reach.device)
        reach = torch.stack([reach.index_select(axis, cells) for cells in index]).amax(0)
    return reach


def _batch_norm(op: _Operation) -> Tensor:
    """Affine, unless it measures its statistics itself, as instance norm does: then the whole channel."""
    reach: Tensor = op["input"]
    if not op.get("training", False):
        return reach.clone()
    return reach.amax([0, *range(2, reach.ndim)], keepdim=True).expand_as(reach)


def _group_norm(op: _Operation) -> Tensor:
    """Every element depends on all elements of its group."""
    groups = op["input"].unflatten(1, (op["group"], -1))
    reach: Tensor = groups.amax(tuple(range(2, groups.ndim)), keepdim=True).expand_as(groups).flatten(1, 2)
    return reach


def _layer_norm(op: _Operation) -> Tensor:
    """Every element depends on all elements along the normalized axes."""
    reach: Tensor = op["input"]
    return reach.amax(tuple(range(-len(op["normalized_shape"]), 0)), keepdim=True).expand_as(reach)


RULES: dict[str, Rule] = {
    name: rule
    for rule, names in {
        _move: "_unsafe_view channel_shuffle flip gather index index_select native_channel_shuffle pixel_shuffle "
        "pixel_unshuffle repeat roll upsample_nearest1d upsample_nearest2d _upsample_nearest_exact2d",
        _restride: "as_strided",
        _join: "cat stack",
        _constant: "bernoulli empty_like fill full_like new_empty new_full new_ones new_zeros ones_like "
        "rand_like randn_like zero zeros_like",
        _copy: "copy",
        _maximum: "_prelu_kernel _to_copy hardswish log_sigmoid_forward native_dropout",
        _along: "_log_softmax _safe_softmax _softmax amax amin argmax argmin linalg_vector_norm logsumexp "
        "max mean median min norm prod sort std std_mean sum topk var var_mean",
        _halves: "glu",
        _product: "addmm baddbmm bmm mm",
        _linear: "linear",
        _attention: "_native_multi_head_attention _transformer_encoder_layer_fwd",
        _convolution: "convolution",
        _pool: "avg_pool1d avg_pool2d avg_pool3d max_pool2d_with_indices max_pool3d_with_indices",
        _adaptive_pool: "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d",
        _pad: "constant_pad_nd",
        _mirror: "reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d",
        _patchify: "im2col",
        _overlay: "col2im",
        _resample: "_upsample_bicubic2d_aa _upsample_bilinear2d_aa upsample_bicubic2d upsample_bilinear2d",
        _batch_norm: "_native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm native_batch_norm",
        _group_norm: "native_group_norm",
        _layer_norm: "_fused_rms_norm native_layer_norm",
    }.items()
    for name in names.split()
}
