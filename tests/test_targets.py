"""Many labels at once equal one call for each, whichever way they are pushed."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torchvision
from torch import Tensor, nn

import captum_scoremap.linear.all_labels
from captum_scoremap import LayerScoreMap

LABELS = 12
CASES = {
    "alexnet": ("features.12", 1, 64),
    "resnet18": ("layer4.0.conv2", 1, 64),
    "squeezenet1_1": ("features.12.expand1x1", 1, 64),
    "mobilenet_v3_small": ("features.11.block.2.fc1", 1, 64),
    "densenet121": ("features.denseblock4.denselayer3", 1, 32),
    "swin_t": ("features.7.1.mlp", -1, 64),
    "convnext_tiny": ("features.7.2", 1, 32),
}


def build(name: str) -> tuple[nn.Module, nn.Module, int, Tensor]:
    layer, channel_dim, size = CASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(torchvision.models, name)(weights=None, num_classes=LABELS).double().eval()
        inputs = torch.randn(2, 3, size, size, dtype=torch.float64)
    return model, model.get_submodule(layer), channel_dim, inputs


@pytest.mark.parametrize("name", CASES)
def test_both_ways_equal_one_call_for_each_label(name: str) -> None:
    model, layer, channel_dim, inputs = build(name)
    method = LayerScoreMap(model, layer)
    every = [method.attribute(inputs, label, channel_dim=channel_dim) for label in range(LABELS)]
    expected = torch.cat(every, channel_dim)
    scale = float(expected.abs().max())
    for positions in (0, 10**9):  # fewer and more than there are labels
        with mock.patch.object(captum_scoremap.linear.all_labels, "_positions", lambda *_, count=positions: count):
            found = method.attribute_targets(inputs, channel_dim=channel_dim, internal_batch_size=10)
            some = method.attribute_targets(inputs, [3, 7], channel_dim=channel_dim)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * scale)
        chosen = torch.cat([every[3], every[7]], channel_dim)
        torch.testing.assert_close(some, chosen, rtol=0, atol=1e-12 * scale)
        assert not found.requires_grad


def test_a_list_of_layers_gives_a_list() -> None:
    model, _, _, inputs = build("resnet18")
    layers = [model.layer1, model.layer4]
    found = LayerScoreMap(model, layers).attribute_targets(inputs)
    assert [one.shape[1] for one in found] == [LABELS, LABELS]
    for maps, layer in zip(found, layers, strict=True):
        expected = LayerScoreMap(model, layer).attribute(inputs, 5)
        torch.testing.assert_close(maps[:, 5:6], expected, rtol=1e-9, atol=1e-14)


def test_targets_must_be_named_where_they_cannot_be_counted() -> None:
    model = nn.Conv2d(3, 4, 3).eval()
    with pytest.raises(ValueError, match=r"targets must be given for a model that does not return \(N, K\)"):
        LayerScoreMap(model, model).attribute_targets(torch.rand(1, 3, 5, 5))
    model, layer, _, inputs = build("alexnet")
    with pytest.raises(ValueError, match="targets must name at least one label, got none"):
        LayerScoreMap(model, layer).attribute_targets(inputs, [])
    with pytest.raises(ValueError, match="target must be from 0 to 11, got 12"):
        LayerScoreMap(model, layer).attribute_targets(inputs, [12])
