"""Half precision and autocast: maps near those of float32, within stated tolerances."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from captum_scoremap import LayerScoreMap, linear_form

# Of the largest value of the map in float32. A network of ten operations rounds about as often; bfloat16 has 8 bits of
# mantissa, float16 has 11.
TOLERANCE = {torch.bfloat16: 8e-2, torch.float16: 1e-2}


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.pool, self.gate = nn.MaxPool2d(2), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.norm1(self.conv1(x)).relu())
        x = nn.functional.silu(self.norm2(self.conv2(x)))
        x = x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()
        return self.head(x.mean((2, 3)))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


MODELS: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "convolutional": (Convolutional, "conv2", 1),
    "tokens": (Tokens, "block", -1),
}


def build(name: str) -> tuple[nn.Module, nn.Module, int, Tensor]:
    make, layer, channel_dim = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval()
        inputs = torch.randn(2, 3, 16, 16)
    return model, model.get_submodule(layer), channel_dim, inputs


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", MODELS)
def test_half_precision_is_near_single(name: str, dtype: torch.dtype) -> None:
    model, layer, channel_dim, inputs = build(name)
    expected = LayerScoreMap(model, layer).attribute(inputs, 2, channel_dim=channel_dim)
    model.to(dtype)
    form = linear_form(model, inputs.to(dtype), 2, layer)
    found = form.score_map(channel_dim)
    assert found.dtype == dtype
    assert distance(found, expected) < TOLERANCE[dtype]
    assert float(form.relative_residual.max()) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", MODELS)
def test_autocast_is_near_single(name: str) -> None:
    model, layer, channel_dim, inputs = build(name)
    expected = LayerScoreMap(model, layer).attribute(inputs, 2, channel_dim=channel_dim)
    with torch.autocast("cpu", torch.bfloat16):
        found, delta = LayerScoreMap(model, layer).attribute(
            inputs, 2, channel_dim=channel_dim, return_convergence_delta=True
        )
    assert distance(found, expected) < TOLERANCE[torch.bfloat16]
    assert float(delta.abs().max()) < TOLERANCE[torch.bfloat16]
