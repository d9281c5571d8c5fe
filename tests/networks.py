"""Random networks for Hypothesis: small, odd, and made of every operation that has a linear form.

A network is drawn operation by operation along a real activation, so that each operation fits the shape it
meets. Every operation is one function below: it draws its settings and returns a step, a module or a plain
function on tensors, or None where the shape does not suit it. Modules are reached by name, plain functions
are what a forward method calls in between, as in code written by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.layers import called_once

Step: TypeAlias = Callable[[Tensor], Tensor]
Build: TypeAlias = Callable[["Context", Tensor], "Step | None"]

LABELS = 3
LARGEST = 600  # elements of one image in any activation
LIMIT = 1e3  # magnitude of any activation


class Function:
    """A step that is no module: what a forward method calls on its own."""

    def __init__(self, name: str, function: Step) -> None:
        self.name = name
        self.function = function

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def __repr__(self) -> str:
        return self.name


class Chain(nn.Module):
    """Steps one after the other; those that are modules are submodules."""

    def __init__(self, *steps: Step) -> None:
        super().__init__()
        self.steps = steps
        for i, step in enumerate(steps):
            if isinstance(step, nn.Module):
                self.add_module(str(i), step)

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x

    def extra_repr(self) -> str:
        plain = [f"{i}: {step!r}" for i, step in enumerate(self.steps) if not isinstance(step, nn.Module)]
        return ", ".join(plain)


class Join(nn.Module):
    """Branches that read the same tensor, and what joins their outputs."""

    def __init__(self, name: str, join: Callable[..., Tensor], *branches: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.join = join
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(*(branch(x) for branch in self.branches))

    def extra_repr(self) -> str:
        return self.name


@dataclass
class Context:
    """What an operation needs to draw its settings."""

    draw: st.DrawFn
    smooth: bool
    seed: int
    depth: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def pick(self, *values: object) -> object:
        return self.draw(st.sampled_from(values))

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def flag(self) -> bool:
        return self.draw(st.booleans())

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def random(self, module: nn.Module) -> nn.Module:
        """Weights of unit gain, biases and norm statistics of non-trivial size."""
        module.double().eval()
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            if not value.is_floating_point():
                continue
            noise = self.noise(*value.shape)
            if value.dim() > 1:
                noise = noise / math.sqrt(value[0].numel())
            elif "running_var" in name or (name.endswith("weight") and value.dim() == 1):
                noise = noise.abs() * 0.5 + 0.5
            else:
                noise = noise * 0.5
            value.data.copy_(noise)
        return module


OPERATIONS: dict[str, Build] = {}
SMOOTH: dict[str, Build] = {}


def piecewise(build: Build) -> Build:
    OPERATIONS[build.__name__] = build
    return build


def smooth(build: Build) -> Build:
    SMOOTH[build.__name__] = build
    return build


def axes(x: Tensor) -> int:
    """The number of spatial axes."""
    return x.dim() - 2


def of_rank(name: str, x: Tensor) -> Callable[..., nn.Module]:
    """``nn.Conv2d`` and the like for as many axes as x has."""
    module: Callable[..., nn.Module] = getattr(nn, f"{name}{axes(x)}d")
    return module


# --- affine --------------------------------------------------------------------------------------------


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
    return Function("conv2d", lambda x: F.conv2d(x, weight, bias, stride))


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
        bias = context.noise(outputs)
        return Function("F.linear", lambda x: F.linear(x, weight, bias))
    if form == "matmul":
        return Function("x @ w", lambda x: x @ weight.t())
    return Function("einsum with weights", lambda x: torch.einsum("...i,oi->...o", x, weight))


@piecewise
def batch_norm(context: Context, x: Tensor) -> Step | None:
    if axes(x) > 3:
        return None
    dims = max(axes(x), 1)
    module = context.random(getattr(nn, f"BatchNorm{dims}d")(x.shape[1], affine=context.flag()))
    if context.flag():
        return module
    mean, variance = module.running_mean, module.running_var
    return Function("F.batch_norm", lambda x: F.batch_norm(x, mean, variance, eps=1e-3))


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

    def sub_(x: Tensor) -> Tensor:
        x -= constant
        return x

    def scaled(x: Tensor) -> Tensor:
        x *= 0.8
        return x.div_(1.2)

    return context.pick(
        Function("x + c", lambda x: x + constant),
        Function("c - x", lambda x: constant - x),
        Function("x * c", lambda x: x * constant),
        Function("x / 1.5", lambda x: x / 1.5),
        Function("-x", lambda x: -x),
        Function("add alpha", lambda x: torch.add(x, constant, alpha=0.3)),
        Function("x -= c", sub_),
        Function("x *= 0.8", scaled),
        Function("x.add_(c)", lambda x: x.add_(constant)),
        Function("x.mul_(c)", lambda x: x.mul_(constant)),
        Function("lerp", lambda x: torch.lerp(x, constant, 0.25)),
    )


# --- views ---------------------------------------------------------------------------------------------


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


def relu_in_part(x: Tensor) -> Tensor:
    """Change a view in place, and with it what it is a view of."""
    x[:, : (x.shape[1] + 1) // 2].relu_()
    return x


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
        Function("masked_fill", lambda x: x.masked_fill(torch.arange(x.shape[-1]) == 0, 0.3)),
        Function("where", lambda x: torch.where(torch.arange(x.shape[-1]) % 2 == 0, x, -x)),
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


# --- piecewise linear ----------------------------------------------------------------------------------


@piecewise
def rectifier(context: Context, x: Tensor) -> Step | None:
    inplace = context.flag()
    return context.pick(
        nn.ReLU(inplace),
        nn.LeakyReLU(0.1, inplace),
        nn.LeakyReLU(-0.4),
        nn.ReLU6(inplace),
        nn.Hardtanh(-0.5, 0.8, inplace),
        nn.Threshold(0.2, -0.6, inplace),
        nn.RReLU(inplace=inplace).eval(),
        context.random(nn.PReLU(x.shape[1])),
        context.random(nn.PReLU()),
        Function("F.relu", lambda x: F.relu(x, inplace=inplace)),
        Function("torch.relu", torch.relu),
        Function("relu_", lambda x: x.relu_()),
        Function("relu6", F.relu6),
        Function("leaky_relu_", lambda x: F.leaky_relu_(x, 0.3)),
        Function("prelu", lambda x: F.prelu(x, torch.tensor([0.3], dtype=x.dtype))),
        Function("clamp", lambda x: x.clamp(-0.4, 0.6)),
        Function("clamp min", lambda x: torch.clamp(x, min=-0.2)),
        Function("clamp_", lambda x: x.clamp_(max=0.9)),
        Function("clamp_min", lambda x: x.clamp_min(0.1)),
        Function("hardtanh_", lambda x: F.hardtanh_(x, -0.7, 0.7)),
        Function("threshold", lambda x: F.threshold(x, 0.0, 0.5)),
        Function("threshold_", lambda x: F.threshold_(x, -0.1, -0.1)),
        Function("abs", torch.abs),
        Function("abs_", lambda x: x.abs_()),
        Function("built-in abs", abs),
        Function("relu of a part, in place", relu_in_part),
        Function("maximum", lambda x: torch.maximum(x, torch.zeros_like(x))),
        Function("minimum", lambda x: torch.minimum(x, 0.5 * x)),
        Function("x where positive", lambda x: torch.where(x > 0, x, 0.2 * x)),
        Function("x * mask", lambda x: x * (x > 0)),
    )


@piecewise
def max_pooling(context: Context, x: Tensor) -> Step | None:
    if not 1 <= axes(x) <= 3 or min(x.shape[2:]) < 3:
        return None
    kernel, stride = context.number(2, 3), context.number(1, 3)
    padded, ceil = context.number(0, 1), context.flag()
    pool = getattr(F, f"max_pool{axes(x)}d")
    return context.pick(
        of_rank("MaxPool", x)(kernel, stride, padded, ceil_mode=ceil),
        of_rank("MaxPool", x)(2, stride, dilation=2),
        of_rank("AdaptiveMaxPool", x)(context.number(1, 3)),
        Function("F.max_pool", lambda x: pool(x, kernel, stride, padded, ceil_mode=ceil)),
    )


@piecewise
def maximum_over_axis(context: Context, x: Tensor) -> Step | None:
    options = [
        Function("max", lambda x: x.max(-1, keepdim=True).values),
        Function("amax", lambda x: x.amax(1, keepdim=True) - x),
        Function("min", lambda x: torch.min(x, 1, keepdim=True)[0]),
    ]
    if x.shape[1] % 2 == 0:
        options += [Function("maxout", lambda x: x.unflatten(1, (-1, 2)).amax(2))]
        options += [Function("maxout", lambda x: torch.max(*x.chunk(2, 1)))]
    return context.pick(*options)


# --- how steps are put together ------------------------------------------------------------------------


def body(context: Context, x: Tensor, length: int) -> Chain:
    """A chain of operations on x, each drawn for the shape it meets."""
    table = OPERATIONS | SMOOTH if context.smooth else OPERATIONS
    names = [*sorted(table), *["convolution", "rectifier", "max_pooling"] * 2]  # the ones that matter most
    steps: list[Step] = []
    for _ in range(length):
        step = table[context.draw(st.sampled_from(names))](context, x)
        if step is None:
            continue
        with torch.no_grad():
            y = step(x.clone())
        if 0 < y[0].numel() <= LARGEST and y.abs().max() <= LIMIT:
            steps.append(step)
            x = y
    return Chain(*steps)


def branch(context: Context, x: Tensor) -> Chain:
    """A chain one level down, or nothing at the bottom."""
    context.depth += 1
    steps = body(context, x, context.number(1, 3) if context.depth <= 2 else 0)
    context.depth -= 1
    return steps


def like_input(context: Context, x: Tensor) -> Chain:
    """A branch whose output has the shape of its input: projected back to it where need be."""
    steps = branch(context, x)
    with torch.no_grad():
        y = steps(x.clone())
    if y.shape == x.shape:
        return steps
    project = context.random(nn.Linear(y[0].numel(), x[0].numel()))
    return Chain(steps, nn.Flatten(1), project, nn.Unflatten(1, x.shape[1:]))


def add_(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


class Residual(nn.Module):
    """The body of x, and x itself: added, in place or not, or concatenated."""

    def __init__(self, body: nn.Module, join: str, last: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.join = join
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x.clone())
        match self.join:
            case "add":
                y = x + y
            case "add_":
                y = add_(self.last(y), x)
            case "torch.add":
                y = torch.add(x, y)
            case "concat":
                y = torch.cat([x, y], 1)
        return self.last(y) if self.join != "add_" else y

    def extra_repr(self) -> str:
        return self.join


class Shared(nn.Module):
    """One module called twice."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.body(x)) + x


@piecewise
def residual(context: Context, x: Tensor) -> Step | None:
    last = context.pick(nn.ReLU(inplace=True), nn.Identity(), nn.ReLU())
    return Residual(like_input(context, x), context.pick("add", "add_", "torch.add", "concat"), last)


@piecewise
def shared(context: Context, x: Tensor) -> Step | None:
    return Shared(like_input(context, x))


@piecewise
def branches(context: Context, x: Tensor) -> Step | None:
    first, second = like_input(context, x), like_input(context, x)

    def joined(name: str, join: Callable[..., Tensor]) -> Step:
        return Join(name, join, Chain(Function("clone", torch.clone), first), Chain(second))

    return context.pick(
        joined("concat", lambda a, b: torch.cat((a, b), 1)),
        joined("maximum", torch.maximum),
        joined("difference", torch.sub),
        joined("stacked mean", lambda a, b: torch.stack((a, b)).mean(0)),
    )


# --- smooth --------------------------------------------------------------------------------------------


@smooth
def gate(context: Context, x: Tensor) -> Step | None:
    inplace = context.flag()
    return context.pick(
        nn.GELU(),
        nn.GELU("tanh"),
        nn.SiLU(inplace),
        nn.Mish(inplace),
        nn.Hardswish(inplace),
        nn.Tanh(),
        nn.ELU(0.7, inplace),
        nn.SELU(inplace),
        nn.CELU(0.8, inplace),
        Function("F.gelu", F.gelu),
        Function("F.silu", F.silu),
        Function("tanh_", lambda x: x.tanh_()),
        Function("x * sigmoid(1.702 x)", lambda x: x * torch.sigmoid(1.702 * x)),
        Function("elu_", F.elu_),
        Function("sin", torch.sin),
    )


@smooth
def tangent(context: Context, x: Tensor) -> Step | None:
    return context.pick(
        nn.Softplus(),
        nn.LogSigmoid(),
        nn.Sigmoid(),
        nn.Hardsigmoid(),
        nn.Softmax(1),
        nn.LogSoftmax(-1),
        Function("exp", lambda x: torch.exp(x.clamp(max=1.0))),
        Function("log", lambda x: torch.log(x.abs() + 0.5)),
        Function("sigmoid_", lambda x: x.sigmoid_()),
        Function("square", lambda x: x.square()),
        Function("power", lambda x: 0.1 * x**2),
        Function("sqrt", lambda x: torch.sqrt(x.abs() + 0.1)),
    )


@smooth
def scale(context: Context, x: Tensor) -> Step | None:
    channels, size = x.shape[1], x.shape[-1]
    weight = context.noise(size)
    options: list[Step] = [
        Function("F.normalize", lambda x: F.normalize(x, dim=1)),
        Function("rms by hand", lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)),
        Function("x / norm", lambda x: x / (x.norm(dim=1, keepdim=True) + 0.1)),
    ]
    if size > 1:
        options += [
            context.random(nn.LayerNorm(size, eps=1e-3)),
            context.random(nn.LayerNorm(list(x.shape[1:]), eps=1e-3)),
            Function("F.layer_norm", lambda x: F.layer_norm(x, (size,), weight, eps=1e-3)),
            context.random(nn.RMSNorm(size, eps=1e-3)),
        ]
    if axes(x) >= 1 and x[0, 0].numel() > 1:
        groups = context.pick(1, channels)
        options += [
            context.random(nn.GroupNorm(groups, channels, eps=1e-3)),
            nn.LocalResponseNorm(context.number(1, 3), alpha=0.5, k=1.0),
        ]
        if axes(x) <= 3:
            options += [context.random(of_rank("InstanceNorm", x)(channels, eps=1e-3, affine=True))]
    return context.pick(*options)


@smooth
def squeeze_and_excitation(context: Context, x: Tensor) -> Step | None:
    if axes(x) != 2:
        return None
    channels = x.shape[1]
    last = context.pick(nn.Sigmoid(), nn.Hardsigmoid())
    gates = Chain(
        nn.AdaptiveAvgPool2d(1),
        context.random(nn.Conv2d(channels, 2, 1)),
        context.pick(nn.ReLU(inplace=True), nn.SiLU()),
        context.random(nn.Conv2d(2, channels, 1)),
        last,
    )
    join = context.pick(torch.mul, lambda x, weights: weights * x, lambda x, weights: x.clone().mul_(weights))
    return Join("x * gates", join, nn.Identity(), gates)


@smooth
def product(context: Context, x: Tensor) -> Step | None:
    first, second = like_input(context, x), like_input(context, x)
    squash = Function("tanh", torch.tanh)  # keeps products of products small
    options = [
        ("a * b", torch.mul),
        ("einsum", lambda a, b: torch.einsum("n...,n...->n...", a, b)),
        ("a / (1 + |b|)", lambda a, b: a / (1 + b.abs())),
    ]
    if axes(x) >= 1:
        options += [
            ("a @ b^T", lambda a, b: a @ b.transpose(-1, -2) / a.shape[-1]),
            ("softmax(a) * b", lambda a, b: a.softmax(-1) * b),
        ]
    name, join = context.pick(*options)
    return Join(name, join, Chain(Function("clone", torch.clone), first, squash), Chain(second, squash))


@smooth
def gated_linear_unit(context: Context, x: Tensor) -> Step | None:
    return Function("glu", lambda x: F.glu(x, 1)) if x.shape[1] % 2 == 0 else None


class Attention(nn.Module):
    """Self-attention of tokens (N, L, D), by hand or by the fused call."""

    def __init__(self, width: int, fused: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v)
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v

    def extra_repr(self) -> str:
        return "fused" if self.fused else "by hand"


class MultiHead(nn.Module):
    """``nn.MultiheadAttention`` as self-attention."""

    def __init__(self, width: int, heads: int, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.attention(x, x, x, need_weights=self.need_weights)[0]
        return output


@smooth
def attention(context: Context, x: Tensor) -> Step | None:
    if axes(x) != 1 or x.shape[-1] > 16:
        return None
    width = x.shape[-1]
    heads = context.pick(1, 2) if width % 2 == 0 else 1
    return context.pick(
        context.random(Attention(width, context.flag())),
        context.random(MultiHead(width, heads, context.flag())),
    )


# --- networks ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RandomNetwork:
    """A network with scores (N, LABELS), images for it, and the layers that it calls exactly once."""

    model: nn.Module
    inputs: Tensor
    layers: tuple[str, ...]

    def __repr__(self) -> str:
        return f"inputs {tuple(self.inputs.shape)}, layers {self.layers}\n{self.model}"


@st.composite
def networks(draw: st.DrawFn, smooth: bool = False) -> RandomNetwork:
    """Random networks; with `smooth` also of operations that are not piecewise linear."""
    context = Context(draw, smooth, draw(st.integers(0, 2**16)))
    spatial = context.number(1, 3)
    largest = {1: 11, 2: 7, 3: 4}[spatial]
    size = [context.number(3, largest) for _ in range(spatial)]
    inputs = context.noise(context.number(1, 2), context.number(1, 4), *size)
    trunk = body(context, inputs, context.number(1, 7))
    with torch.no_grad():
        features = trunk(inputs.clone()).flatten(1).shape[1]
    head = context.random(nn.Linear(features, LABELS))
    model = Chain(trunk, nn.Flatten(), head).double().eval()
    return RandomNetwork(model, inputs, tuple(called_once(model, inputs)))
