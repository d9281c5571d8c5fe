"""Operations that are not piecewise linear: gates, tangents, scales, products, attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks.drawing import Chain, Context, Function, Join, Step, axes, like_input, of_rank, smooth


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
            Function("F.layer_norm", lambda x, weight: F.layer_norm(x, (size,), weight, eps=1e-3), weight),
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
