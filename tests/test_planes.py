"""Maps without an axis of channels, (N, h, w): planes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from captum_scoremap import CompleteScoreMap, ScoreMap
from tests.between import EXACT


def joined(y: Tensor) -> Tensor:
    return torch.stack([y[:, 0], y[:, 1]], -1)


# From maps, (N, C, h, w), to planes, (N, h, w).
PLANES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda y: y.mean(1),
    "maximum": lambda y: y.amax(1),
    "norm": lambda y: y.norm(dim=1),
    "one channel": lambda y: y[:, 0],
    "a single channel": lambda y: y[:, :1].squeeze(1),
    "padded": lambda y: F.pad(y, (1, 1, 1, 1), mode="reflect")[:, 0, 1:-1, 1:-1],
    "on its side and back": lambda y: y.sum(1).mT.contiguous().mT,
    "einsum": lambda y: torch.einsum("nchw,c->nhw", y, torch.arange(1.0, 5.0, dtype=y.dtype)),
    "a product": lambda y: (y.permute(0, 2, 3, 1) @ torch.ones(4, 1, dtype=y.dtype)).squeeze(-1),
    "a linear layer": lambda y: F.linear(y.permute(0, 2, 3, 1), torch.ones(1, 4, dtype=y.dtype))[..., 0],
    "complex numbers": lambda y: torch.view_as_complex(joined(y)).abs(),
    "pairs": lambda y: joined(y).norm(dim=-1),
}


@pytest.mark.parametrize("side", [24, 37, 40, 64])  # as many rows as tokens of a grid, some with class tokens
@pytest.mark.parametrize("name", PLANES)
def test_planes_without_an_axis_of_channels_are_no_tokens(name: str, side: int) -> None:
    class Planes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Linear(side * side, 5, bias=False)
            self.bias = nn.Parameter(torch.zeros(side, side))
            self.bias.data[1, 2:5] = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return self.head((PLANES[name](self.conv(x)) + self.bias).relu().flatten(1))

    model, images = Planes().double().eval(), torch.rand(2, 3, side, side, dtype=torch.float64)
    with torch.no_grad():
        on = PLANES[name](model.conv(images)) + model.bias > 0
        expected = model.head.weight[1].view(side, side) * model.bias * on
    of_bias = CompleteScoreMap(model, "image").attribute(images, 1) - ScoreMap(model).attribute(images, 1).sum(1, True)
    assert_close(of_bias[:, 0], expected, **EXACT)
