"""How operations are put together: skips, shared modules, branches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.networks.drawing import Chain, Context, Function, Join, Step, like_input, piecewise


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
