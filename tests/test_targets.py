"""Many labels at once equal one call for each, whichever way they are pushed."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.testing import assert_close

import captum_scoremap.linear.all_labels
from captum_scoremap import (
    CompleteScoreMap,
    FusedScoreMap,
    LayerScoreMap,
    ScoreMap,
    bias_terms,
    linear_form,
)
from captum_scoremap.scores import similarity

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


SAME = {"rtol": 1e-12, "atol": 1e-12}  # float64; sums in another order


@pytest.mark.parametrize(
    ("target", "plain"),
    [
        (np.int64(3), 3),
        (np.array([3, 5]), [3, 5]),
        ([np.int32(3), np.int64(5)], [3, 5]),
        ((np.int64(3),), 3),
        (torch.tensor([3, 5], dtype=torch.int32), [3, 5]),
        ([torch.tensor(3), torch.tensor(5)], [3, 5]),
    ],
    ids=str,
)
def test_numbers_of_numpy(target: Any, plain: Any) -> None:
    model, layer, _, inputs = build("alexnet")
    assert torch.equal(ScoreMap(model).attribute(inputs, target), ScoreMap(model).attribute(inputs, plain))
    method = LayerScoreMap(model, layer)
    assert torch.equal(method.attribute(inputs, target), method.attribute(inputs, plain))


def test_targets_alone_are_refused() -> None:
    model, layer, _, inputs = build("alexnet")
    for targets in (3, np.int64(3), lambda output: output[:, 0]):
        with pytest.raises(TypeError, match=r"targets must be a sequence of labels, got .* Put it in a list"):
            LayerScoreMap(model, layer).attribute_targets(inputs, targets)


@pytest.mark.parametrize("target", [np.float64(3), np.array([1.0, 2.0]), [1.5, 2.0], True, [True, False], np.True_])
def test_targets_that_are_no_integers(target: Any) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 3)).eval()
    with pytest.raises(TypeError, match="target must"):
        ScoreMap(model).attribute(torch.rand(2, 2, 2, 2), target)


# --- functions of the output ----------------------------------------------------------------------------------------


def margin(output: Tensor) -> Tensor:
    return output[:, 3] - output[:, [0, 5]].logsumexp(1)


FUNCTIONS = {
    "difference": lambda output: output[:, 3] - output[:, 5],
    "log-odds": margin,
    "similarity": similarity(torch.linspace(-1, 1, LABELS, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("model_name", ["resnet18", "swin_t"])
def test_functions_of_the_output(name: str, model_name: str) -> None:
    """Every entry that takes a target explains the same function, exactly."""
    target = FUNCTIONS[name]
    model, layer, channel_dim, inputs = build(model_name)
    score = target(model(inputs)).detach()
    assert_close(linear_form(model, inputs, target).score, score, **SAME)
    form = linear_form(model, inputs, target, layer)
    assert_close(form.sums + form.bias, score, rtol=1e-12, atol=1e-12)
    assert_close(sum(bias_terms(model, inputs, target).values()), linear_form(model, inputs, target).bias, **SAME)
    method = LayerScoreMap(model, layer)
    one, delta = method.attribute(inputs, target, channel_dim=channel_dim, return_convergence_delta=True)
    assert_close(delta, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    label = method.attribute(inputs, 7, channel_dim=channel_dim)
    for positions in (0, 10**9):  # pushed forward, pushed back
        with mock.patch.object(captum_scoremap.linear.all_labels, "_positions", lambda *_, count=positions: count):
            several = method.attribute_targets(inputs, [target, 7], channel_dim=channel_dim)
        assert_close(several, torch.cat([one, label], channel_dim), **SAME)
    complete, placeless = CompleteScoreMap(model).attribute(inputs, target, return_placeless=True)
    assert_close(complete.sum((1, 2, 3)) + placeless, score, **SAME)
    assert FusedScoreMap(model).attribute(inputs, target).shape == (2, 1, *inputs.shape[2:])


def test_a_function_of_one_label_is_that_label() -> None:
    model, layer, _, inputs = build("resnet18")
    for method in (ScoreMap(model), LayerScoreMap(model, layer), CompleteScoreMap(model)):
        assert_close(method.attribute(inputs, lambda output: output[:, 3]), method.attribute(inputs, 3), **SAME)


def test_functions_that_do_not_fit_are_named() -> None:
    model, _, _, inputs = build("resnet18")
    wrong = r"a target function must return one score for each image, \(2,\), got"
    for target in (torch.sum, lambda output: output, lambda output: output[:1, 0]):
        with pytest.raises(ValueError, match=wrong):
            ScoreMap(model).attribute(inputs, target)
    with pytest.raises(TypeError, match=r"a target function must return a floating-point tensor"):
        ScoreMap(model).attribute(inputs, lambda output: 3)
    one = ScoreMap(model).attribute(inputs[:1], lambda output: output[0, 3])  # of one image, a number will do
    assert_close(one, ScoreMap(model).attribute(inputs[:1], 3), **SAME)
