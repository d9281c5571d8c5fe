"""Operations with masks and switches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks.drawing import Context, Function, Step, axes, of_rank, piecewise


def relu_in_part(x: Tensor) -> Tensor:
    """Change a view in place, and with it what it is a view of."""
    x[:, : (x.shape[1] + 1) // 2].relu_()
    return x


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
        Function("prelu", lambda x: F.prelu(x, x.new_tensor([0.3]))),
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
        # not all of x, which a residual adds again: what is then equal everywhere, rounding alone would tell apart
        Function("amax", lambda x: x.amax(1, keepdim=True) - 0.7 * x),
        Function("min", lambda x: torch.min(x, 1, keepdim=True)[0]),
    ]
    if x.shape[1] % 2 == 0:
        options += [Function("maxout", lambda x: x.unflatten(1, (-1, 2)).amax(2))]
        options += [Function("maxout", lambda x: torch.max(*x.chunk(2, 1)))]
    return context.pick(*options)
