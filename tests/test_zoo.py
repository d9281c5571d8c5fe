"""S = A·Y + B at the image and at every layer of the models that people use."""

from __future__ import annotations

import copy
import re
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.models.resnet import BasicBlock

from captum_scoremap import LayerScoreMap, bias_terms, linear_form
from captum_scoremap.models import load_model, read_image
from tests import hugging_face
from tests.families import PIECEWISE_LINEAR, SMOOTH
from tests.state import untouched
from tests.zoo import (
    Entry,
    all_of_torchvision,
    all_of_transformers,
    at_zero,
    entries_of,
    entry,
    families_of_timm,
    in_single_precision,
    measure,
    measured,
    random_entry,
    relative_residual,
)


def holds(item: Entry, tolerance: float, most: int | None = None) -> None:
    model, inputs = random_entry(item)
    with untouched(model, inputs):
        row = measure(item, model, inputs, most)
    assert row.checked > 0
    assert row.forward <= 1e-12
    assert row.at_input <= tolerance, f"residual {row.at_input:.1e} at the image"
    assert row.at_layers <= tolerance, f"residual {row.at_layers:.1e} at {row.worst}"


@pytest.mark.parametrize("item", PIECEWISE_LINEAR, ids=str)
def test_identity_holds_at_every_layer(item: Entry) -> None:
    holds(item, 1e-10)


@pytest.mark.parametrize("item", SMOOTH, ids=str)
def test_identity_holds_for_networks_that_are_not_piecewise_linear(item: Entry) -> None:
    holds(item, 1e-9)


@pytest.mark.sweep
@pytest.mark.parametrize("item", all_of_torchvision(), ids=str)
def test_identity_holds_for_all_of_torchvision(item: Entry) -> None:
    holds(item, 1e-9)


@pytest.mark.sweep
def test_families_of_timm_are_exact_or_say_what_is_unsupported() -> None:
    wrong = []
    for row in measured(families_of_timm(), most=24):
        tolerance = 1e-5 if in_single_precision(row.entry) else 1e-9
        if not row.problem.startswith("unsupported") and not max(row.at_input, row.at_layers) <= tolerance:
            wrong.append(row)
    assert not wrong


FEW_OF_TRANSFORMERS = (
    "ConvNextV2",
    "ImageGPT",
    "PerceiverForImageClassificationFourier",
    "PPLCNet",
    "Siglip2",
    "Swinv2",
)


@pytest.mark.parametrize("name", FEW_OF_TRANSFORMERS)
def test_identity_holds_for_models_of_transformers(name: str) -> None:
    pytest.importorskip("transformers")
    (item,) = entries_of("transformers", [name])
    holds(item, 1e-9, most=24)


@pytest.mark.sweep
def test_all_of_transformers_are_exact() -> None:
    pytest.importorskip("transformers")
    wrong = []
    for row in measured(all_of_transformers()):
        tolerance = 1e-5 if in_single_precision(row.entry) else 1e-9
        worst = max(row.at_input, row.at_layers, row.forward, row.complete, row.bias_maps)
        if row.entry.name not in hugging_face.MISSING and not worst <= tolerance:
            wrong.append(row)
    assert not wrong


def without_inplace(model: nn.Module) -> nn.Module:
    """A copy of a ResNet of basic blocks that changes nothing in place."""

    def forward(block: BasicBlock, x: Tensor) -> Tensor:
        skip = x if block.downsample is None else block.downsample(x)
        return torch.relu(block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x))))) + skip)

    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, BasicBlock):
            module.forward = partial(forward, module)
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


def test_operations_in_place_do_not_reach_the_layer_before_them() -> None:
    """The output of layer4.1.bn2 is changed by the skip addition and by the ReLU after it, both in place."""
    model, inputs = random_entry(entry("resnet18"), images=2)
    plain = without_inplace(model)
    target = torch.tensor([3, 5])
    maps = [
        LayerScoreMap(network, network.get_submodule("layer4.1.bn2")).attribute(
            inputs, target, attr_dim_summation=False, return_convergence_delta=True
        )
        for network in (model, plain)
    ]
    (sub_scores, delta), (expected, _) = maps
    assert expected.abs().max() > 0
    assert_close(sub_scores, expected, rtol=1e-12, atol=1e-14)
    assert_close(delta, torch.zeros_like(delta), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["resnet18", "swin_t"])
def test_two_routes_to_the_bias_agree(name: str) -> None:
    """B from the frozen model at zero, and as the sum of the share of every bias."""
    model, inputs = random_entry(entry(name), images=2)
    target = torch.tensor([3, 5])
    form = linear_form(model, inputs, target)
    terms = bias_terms(model, inputs, target)
    assert sum(share.abs().max() > 0 for share in terms.values()) > 20
    total = torch.stack(list(terms.values())).sum(0)
    size = torch.stack(list(terms.values())).abs().sum(0)
    assert ((total - form.bias).abs() <= 1e-12 * size).all()


def test_efficientnet_lite_with_real_weights_in_single_precision() -> None:
    """At the image and at the output of every block."""
    loaded = load_model()
    model = loaded.module
    inputs = loaded.preprocessing(read_image("sample:chelsea"))[None]
    with torch.no_grad():
        score, label = model(inputs).max(1)
    blocks = {name: module for name, module in model.named_modules() if re.fullmatch(r"blocks\.\d\.\d", name)}
    assert len(blocks) == 16
    with untouched(model, inputs):
        form = linear_form(model, inputs, label)
        products = LayerScoreMap(model, list(blocks.values())).attribute(inputs, label, attr_dim_summation=False)
    assert relative_residual(score, form.sub_scores.sum()[None], form.bias) <= 1e-4
    biases = at_zero(model, inputs, int(label), blocks)
    for (name, bias), product in zip(biases.items(), products, strict=True):
        assert relative_residual(score, product.sum()[None], bias) <= 1e-4, name
