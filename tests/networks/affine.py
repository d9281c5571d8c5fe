"""Operations that are affine as they are: layers with weights, arithmetic, views."""

from __future__ import annotations

import math
import operator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks.drawing import Context, Function, Step, axes, of_rank, piecewise


@piecewise
def convolution(context: Context, x: Tensor) -> Step | None:
    if not 1 <= axes(x) <= 3:
        return None
    channels = x.shape[1]
    groups = context.pick(1, 1, channels)
    kernel, dilation = context.number(1, 3), context.number(1, 2)
    mode = context.pick("zeros", "zeros", "reflect", "replicate", "circular")
    padding = context.number(0, kernel - 1)
    least = min(x.shape[2:])
    if dilation * (kernel - 1) + 1 > least or (mode != "zeros" and padding >= least):
        return None
    module = of_rank("Conv", x)(
        channels,
        context.number(1, 2) * (groups if groups > 1 else 2),
        kernel,
        stride=context.number(1, 2),
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=context.flag(),
        padding_mode=mode,
    )
    return context.random(module)


@piecewise
def functional_convolution(context: Context, x: Tensor) -> Step | None:
    if axes(x) != 2 or min(x.shape[2:]) < 2:
        return None
    weight = context.noise(3, x.shape[1], 2, 2) / math.sqrt(4 * x.shape[1])
    bias = context.noise(3) if context.flag() else None
    stride = context.number(1, 2)
    return Function("conv2d", lambda x, weight, bias: F.conv2d(x, weight, bias, stride), weight, bias)


@piecewise
def transposed_convolution(context: Context, x: Tensor) -> Step | None:
    if not 1 <= axes(x) <= 3:
        return None
    stride = context.number(1, 2)
    module = of_rank("ConvTranspose", x)(
        x.shape[1],
        context.number(1, 3),
        context.number(1, 3),
        stride=stride,
        output_padding=context.number(0, stride - 1),
        bias=context.flag(),
    )
    return context.random(module)


@piecewise
def linear(context: Context, x: Tensor) -> Step | None:
    inputs, outputs = x.shape[-1], context.number(2, 5)
    form = context.pick("module", "F.linear", "matmul", "rows")
    if form == "module":
        return context.random(nn.Linear(inputs, outputs, bias=context.flag()))
    weight = context.noise(outputs, inputs) / math.sqrt(inputs)
    if form == "F.linear":
        return Function("F.linear", F.linear, weight, context.noise(outputs))
    if form == "matmul":
        return Function("x @ w", lambda x, weight: x @ weight.t(), weight)
    return Function("einsum with weights", partial(torch.einsum, "...i,oi->...o"), weight)


@piecewise
def batch_norm(context: Context, x: Tensor) -> Step | None:
    if axes(x) > 3:
        return None
    dims = max(axes(x), 1)
    module = context.random(getattr(nn, f"BatchNorm{dims}d")(x.shape[1], affine=context.flag()))
    if context.flag():
        return module
    return Function("F.batch_norm", partial(F.batch_norm, eps=1e-3), module.running_mean, module.running_var)


@piecewise
def dropout(context: Context, x: Tensor) -> Step | None:
    return context.pick(
        nn.Dropout(0.5).eval(),
        nn.Dropout(0.3, inplace=True).eval(),
        nn.Identity(),
        Function("F.dropout", lambda x: F.dropout(x, 0.5, training=False)),
        Function("F.alpha_dropout", lambda x: F.alpha_dropout(x, 0.5, training=False)),
    )


@piecewise
def padding(context: Context, x: Tensor) -> Step | None:
    if not 1 <= axes(x) <= 3:
        return None
    mode = context.pick("constant", "reflect", "replicate", "circular")
    widths = [context.number(0, min(2, size - 1)) for size in reversed(x.shape[2:]) for _ in range(2)]
    if mode == "constant":
        value = context.pick(0.0, 0.7)
        return Function(f"F.pad {value}", lambda x: F.pad(x, widths, value=value))
    return Function(f"F.pad {mode}", lambda x: F.pad(x, widths, mode))


@piecewise
def interpolation(context: Context, x: Tensor) -> Step | None:
    if not 1 <= axes(x) <= 3:
        return None
    mode = context.pick("nearest", {1: "linear", 2: "bilinear", 3: "trilinear"}[axes(x)])
    align = None if mode == "nearest" else context.flag()
    if context.flag():
        return nn.Upsample(scale_factor=1.5, mode=mode, align_corners=align)
    size = [context.number(2, 6) for _ in range(axes(x))]
    return Function(f"F.interpolate {mode}", lambda x: F.interpolate(x, size, mode=mode, align_corners=align))


@piecewise
def average_pooling(context: Context, x: Tensor) -> Step | None:
    if not 1 <= axes(x) <= 3 or min(x.shape[2:]) < 2:
        return None
    return context.pick(
        of_rank("AvgPool", x)(2, stride=context.number(1, 2), padding=context.number(0, 1)),
        of_rank("AvgPool", x)(2, stride=2, ceil_mode=True, count_include_pad=False),
        of_rank("AdaptiveAvgPool", x)(context.number(1, 3)),
        Function("mean", lambda x: x.mean(-1, keepdim=True)),
        Function("cumsum", lambda x: x.cumsum(-1)),
        Function("x - mean", lambda x: x - x.mean(1, keepdim=True)),
    )


@piecewise
def arithmetic(context: Context, x: Tensor) -> Step | None:
    constant = context.noise(*x.shape[1:])

    def scaled(x: Tensor) -> Tensor:
        x *= 0.8
        return x.div_(1.2)

    return context.pick(
        Function("x + c", operator.add, constant),
        Function("c - x", lambda x, constant: constant - x, constant),
        Function("x * c", operator.mul, constant),
        Function("x / 1.5", lambda x: x / 1.5),
        Function("-x", lambda x: -x),
        Function("add alpha", partial(torch.add, alpha=0.3), constant),
        Function("x -= c", operator.isub, constant),
        Function("x *= 0.8", scaled),
        Function("x.add_(c)", Tensor.add_, constant),
        Function("x.mul_(c)", Tensor.mul_, constant),
        Function("lerp", lambda x, constant: torch.lerp(x, constant, 0.25), constant),
    )


def shuffle(x: Tensor) -> Tensor:
    """The channel shuffle of ShuffleNet."""
    n, channels, *size = x.shape
    return x.view(n, 2, channels // 2, *size).transpose(1, 2).contiguous().view(n, channels, *size)


def overwrite(x: Tensor) -> Tensor:
    """Write into a part of a copy."""
    y = x.clone()
    y[:, 0] = 0.5
    y[:, :1] += x[:, -1:]
    return y


@piecewise
def views(context: Context, x: Tensor) -> Step | None:
    options = [
        Function("flatten", lambda x: x.flatten(1)),
        Function("flip", lambda x: x.flip(-1)),
        Function("roll", lambda x: torch.roll(x, 1, -1)),
        Function("reversed chunks", lambda x: torch.cat(x.chunk(2, 1)[::-1], 1)),
        Function("index", lambda x: x[:, list(range(x.shape[1]))[::-1]]),
        Function("unbind and stack", lambda x: torch.stack(x.unbind(1)[::-1], 1)),
        Function("expand", lambda x: x[:, :1].expand_as(x) + x),
        Function("write", overwrite),
        Function("masked_fill", lambda x: x.masked_fill(torch.arange(x.shape[-1], device=x.device) == 0, 0.3)),
        Function("where", lambda x: torch.where(torch.arange(x.shape[-1], device=x.device) % 2 == 0, x, -x)),
        nn.Flatten(1),
    ]
    if axes(x) >= 1 and x.shape[1] % 2 == 0:
        options += [Function("channel shuffle", shuffle)]
    if axes(x) >= 1:
        options += [Function("transpose", lambda x: x.transpose(1, -1))]
        options += [Function("slice", lambda x: x[..., ::2])]
    if axes(x) == 2:
        options += [Function("permute", lambda x: x.permute(0, 2, 3, 1))]
        options += [Function("channels_last", lambda x: x.contiguous(memory_format=torch.channels_last))]
        if x.shape[1] % 4 == 0:
            options += [nn.PixelShuffle(2), nn.ChannelShuffle(2)]
        if x.shape[2] % 2 == x.shape[3] % 2 == 0:
            options += [Function("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2))]
        if min(x.shape[2:]) >= 2:
            options += [Function("unfold", lambda x: F.unfold(x, 2).unflatten(1, (-1, 4)).mean(1))]
    return context.pick(*options)
