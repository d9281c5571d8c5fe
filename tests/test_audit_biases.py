"""B without the work below a layer is B of the whole frozen model, also where something bypasses the layer."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import get_model

from captum_scoremap import linear_form
from captum_scoremap.audit.explaining import explain, map_layers
from captum_scoremap.models import prepare
from captum_scoremap.models.layers import main_layers


class Bypassing(nn.Module):
    """Skips over its layers in every way: added, concatenated, changed in place, and straight from the image."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Linear(11, 5)

    def forward(self, image):
        one = F.relu(self.first(image), inplace=True)
        two = F.silu(self.second(one))
        three = self.third(two)
        three += one
        one.mul_(0.5)
        both = torch.cat([F.gelu(three), one, image], 1)
        return self.last(both.mean((2, 3)))


@pytest.fixture
def images(generator):
    return torch.rand(3, 3, 8, 8, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("names", [("first",), ("third",), ("first", "second", "third"), ("third", "second")])
def test_biases_are_those_of_the_whole_frozen_model(images, names):
    torch.manual_seed(0)
    model = Bypassing().double().eval()
    found = explain(model, map_layers(model, names, images[:1]), images, torch.tensor([-1, 0, 4]))
    for name in names:
        form = linear_form(model, images, found.labels[:, 0], model.get_submodule(name))
        torch.testing.assert_close(found.biases[name], form.bias, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.sums[name], form.sums, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.maps[name][:, :1], form.score_map(), rtol=0, atol=1e-12)
        assert found.residuals[name].max() < 1e-12


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "vit_b_32", "swin_t", "convnext_tiny"])
def test_default_layers_of_networks_of_every_kind_are_exact(name):
    torch.manual_seed(0)
    images = torch.rand(2, 3, 224 if name == "vit_b_32" else 96, 224 if name == "vit_b_32" else 96)
    model = prepare(get_model(name).eval(), images[:1])
    layers = map_layers(model, main_layers(model, images[:1])[-3:], images[:1])
    found = explain(model, layers, images, torch.tensor([3, -1]))
    for residual in found.residuals.values():
        assert residual.max() < 1e-4


def test_maps_of_tokens_are_grids():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 4, 4)
            self.token = nn.Parameter(torch.randn(1, 1, 8))
            self.norm = nn.LayerNorm(8)
            self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
            self.head = nn.Linear(8, 3)

        def forward(self, image):
            tokens = self.patches(image).flatten(2).transpose(1, 2)
            tokens = torch.cat([self.token.expand(len(image), -1, -1), tokens], 1)
            tokens = tokens + self.mlp(self.norm(tokens))
            return self.head(tokens.mean(1))

    torch.manual_seed(0)
    model, images = Tokens().double().eval(), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    found = explain(model, map_layers(model, ["norm", "mlp"], images[:1]), images, torch.tensor([-1, -1]))
    for name in ("norm", "mlp"):
        assert found.maps[name].shape == (2, 3, 4, 4)
        assert found.residuals[name].max() < 1e-12


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("last", r"layers must give maps .* got \(1, 5\) from 'last'"),
        ("idle", "layers must run when the model does, got 'idle'"),
    ],
)
def test_layers_without_a_map_are_named(images, name, message):
    model = Bypassing().double().eval()
    model.idle = nn.Identity()
    with pytest.raises(ValueError, match=message):
        map_layers(model, [name], images[:1])
