"""Networks that depend on the image through frozen values alone: quantized, binary, spiking, with a codebook."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from captum_scoremap import CompleteScoreMap, FusedScoreMap, LayerScoreMap, ScoreMap, linear_form
from captum_scoremap.linear import main_layers
from captum_scoremap.rules import Rounded
from tests.between import EXACT, Wrapped

Function = Callable[[Tensor], Tensor]


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(4 * x) / 4

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def in_place(x: Tensor) -> Tensor:
    x = x + 0.1
    return x.mul_(3).round_().div_(3)


CODES = torch.linspace(-1, 1, 8, dtype=torch.float64)

FROZEN: dict[str, Function] = {
    "rounding": torch.round,
    "rounding in place": in_place,
    "a custom function": StraightThrough.apply,
    "signs": torch.sign,
    "spikes": lambda x: (x > 0.2).to(x.dtype),
    "a choice": lambda x: torch.where(x > 0.2, 0.5, -1.0).to(x.dtype),
    "whole numbers": lambda x: (4 * x).long().to(x.dtype) / 4,
    "a codebook": lambda x: CODES[(x[..., None] - CODES).abs().argmin(-1)],
    "a mask, written": lambda x: torch.zeros_like(x).masked_fill_(x > 0.2, 0.5),
}


def network(function: Function) -> nn.Sequential:
    """Two layers, each with its values frozen after it, and two above them."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        Wrapped(function),
        nn.Conv2d(4, 4, 3, padding=1),
        Wrapped(function),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    ).to(torch.float64)


def some_images() -> Tensor:
    return 2 * torch.rand(2, 3, 18, 18, dtype=torch.float64)


@pytest.mark.parametrize("function", FROZEN.values(), ids=FROZEN)
def test_default_layers_are_those_above_what_is_frozen(function: Function) -> None:
    model, images = network(function).eval(), some_images()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main_layers(model, images) == ["3", "6"]
        maps, placeless = CompleteScoreMap(model).attribute(images, 1, return_placeless=True)
        fused = FusedScoreMap(model).attribute(images, 1)
    assert_close(maps.sum((1, 2, 3)) + placeless, model(images)[:, 1], **EXACT)
    assert maps.any()
    assert fused.any()
    assert_close(placeless, model[-1].bias[1].expand(2), **EXACT)


@pytest.mark.parametrize("function", FROZEN.values(), ids=FROZEN)
def test_complete_maps_of_a_layer_above_are_those_of_the_rest_alone(function: Function) -> None:
    model, images = network(function).eval(), some_images()
    found = CompleteScoreMap(model, model[3]).attribute(images, 1)
    alone = CompleteScoreMap(model[4:], "image").attribute(model[:4](images).detach(), 1)
    assert_close(found, alone, **EXACT)


@pytest.mark.parametrize("function", FROZEN.values(), ids=FROZEN)
def test_maps_below_warn_and_name_all_that_is_frozen(function: Function) -> None:
    model, images = network(function).eval(), some_images()
    with pytest.warns(UserWarning, match=r"a map is zero everywhere: .* in '1', .* in '3'\. All of S is in B"):
        assert not ScoreMap(model).attribute(images, 1).any()
    with pytest.warns(UserWarning, match="a map is zero everywhere"):
        assert not LayerScoreMap(model, model[2]).attribute(images, 1).any()
    with pytest.warns(UserWarning, match="a map is zero everywhere"):
        maps, placeless = CompleteScoreMap(model, model[0]).attribute(images, 1, return_placeless=True)
    assert not maps.any()
    assert_close(placeless, model(images)[:, 1], **EXACT)


@pytest.mark.parametrize("name", ["rounding", "rounding in place", "a custom function", "signs"])
def test_the_warning_says_how_rounding_is_passed_straight_through(name: str) -> None:
    model, images = network(FROZEN[name]).eval(), some_images()
    with pytest.warns(UserWarning, match="a map is zero everywhere") as caught:
        linear_form(model, images, 1)
    advice = str(caught[0].message).partition("straight through: rules=")[2].partition(", with `")
    scope: dict[str, Any] = {}
    exec(advice[2].partition("`")[0], scope)
    rules = eval(advice[0], scope)
    form = linear_form(model, images, 1, rules=rules)
    assert form.coefficients.any()
    assert_close((form.coefficients * images).sum((1, 2, 3)) + form.bias, model(images)[:, 1], **EXACT)
    maps, placeless = CompleteScoreMap(model, rules=rules).attribute(images, 1, return_placeless=True)
    assert_close(maps.sum((1, 2, 3)) + placeless, model(images)[:, 1], **EXACT)


def test_rounding_passed_straight_through_has_the_estimators_gradient() -> None:
    model, images = network(StraightThrough.apply).eval(), some_images().requires_grad_()
    (gradient,) = torch.autograd.grad(model(images)[:, 1].sum(), images)
    form = linear_form(model, images.detach(), 1, rules={"round": Rounded()})
    assert_close(form.coefficients, gradient, **EXACT)


class Tokens(nn.Module):
    """Rounded tokens of patches, with a class token before them or channels behind rows and columns, and two layers."""

    def __init__(self, *, are_rows: bool) -> None:
        super().__init__()
        self.patches, self.quantizer = nn.Conv2d(3, 8, 4, 4), Wrapped(torch.round)
        self.token, self.are_rows = nn.Parameter(torch.ones(1, 1, 8)), are_rows
        self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = 3 * self.patches(x).permute(0, 2, 3, 1)
        if not self.are_rows:
            y = torch.cat([self.token.expand(len(x), -1, -1), y.flatten(1, 2)], 1)
        return self.head(self.hidden(self.quantizer(y)).relu().flatten(1, -2).mean(1))


@pytest.mark.parametrize("are_rows", [True, False], ids=["rows and columns", "tokens"])
def test_frozen_tokens_stand_where_their_shape_says(are_rows: bool) -> None:
    model, images = Tokens(are_rows=are_rows).double().eval(), torch.rand(2, 3, 20, 28, dtype=torch.float64)
    maps, placeless = CompleteScoreMap(model, model.quantizer).attribute(images, 1, return_placeless=True)
    with torch.no_grad():
        tokens = (3 * model.patches(images)).round().permute(0, 2, 3, 1)
        expected = (model.hidden(tokens).relu() @ model.head.weight[1]) / (35 if are_rows else 36)
    assert_close(maps[:, 0], expected, **EXACT)
    assert_close(maps.sum((1, 2, 3)) + placeless, model(images)[:, 1], **EXACT)


class Spiking(nn.Module):
    """Four steps in time of two layers of integrating neurons that spike above 1."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        one = two = score = torch.zeros((), dtype=x.dtype)
        for _ in range(4):
            one = 0.9 * one + 3 * self.first(x)
            spikes = (one > 1).to(x.dtype)
            one = one - spikes
            two = 0.9 * two + 3 * self.second(spikes)
            score = score + self.head((two > 1).to(x.dtype).mean((2, 3)))
        return score


def test_a_spiking_network_says_that_nothing_of_its_score_has_a_place() -> None:
    model, images = Spiking().eval().to(torch.float64), some_images()
    with pytest.warns(UserWarning, match="a map is zero everywhere: the values of these operations are frozen.*gt"):
        maps, placeless = CompleteScoreMap(model).attribute(images, 1, return_placeless=True)
    assert not maps.any()
    assert_close(placeless, model(images)[:, 1], **EXACT)


def test_a_constant_layer_stands_nowhere_beside_frozen_values() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(1, 4, 16, 16))

        def forward(self) -> Tensor:
            return self.table.sin()

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.positions, self.head = nn.Conv2d(3, 4, 3), Positions(), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.conv(x).round() + self.positions()).mean((2, 3)))

    model, images = Network().eval().to(torch.float64), some_images()
    with pytest.raises(ValueError, match="the layer must have a place in the image"):
        CompleteScoreMap(model, model.positions).attribute(images, 1)
