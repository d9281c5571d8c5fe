"""The check of a model: what is linear, what is frozen, what is left over."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from captum_scoremap import bias_terms, linear_form
from captum_scoremap.cli import main
from captum_scoremap.linear import check_exactness
from captum_scoremap.rules import Call, Frozen, Rule, Tangent


class Small(nn.Module):
    """A residual network with a class token's worth of odd parts: a norm, a gate, a parameter that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU()
        self.shift = nn.Parameter(torch.full((1, 4, 1, 1), 0.3))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x + self.act(self.norm(x)) + self.shift
        return self.head(x.mean((2, 3)))


class Strange(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.special.bessel_j0(x) + torch.linalg.matrix_exp(x))


def small() -> nn.Module:
    """For the command line."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Small()


def strange() -> nn.Module:
    """For the command line."""
    return Strange()


@pytest.fixture
def inputs(generator: torch.Generator) -> Tensor:
    return torch.rand(1, 3, 8, 8, dtype=torch.float64, generator=generator)


def test_every_layer_of_an_exact_model_is_reported(inputs: Tensor) -> None:
    model = small().double().eval()
    found = check_exactness(model, inputs, 1)
    layers = {layer.layer: layer for layer in found.layers}
    assert set(layers) == {"input", "conv", "norm", "act", "", "head"}
    assert found.layers[0].layer == "input"
    assert layers["act"].operations == {("silu", "gate"): 1}
    assert layers["conv"].operations == {("conv", "linear"): 1}
    assert [name for name, layer in layers.items() if layer.residual is None] == [""]
    assert found.is_exact
    assert found.worst < 1e-12


def test_shares_of_the_bias_sum_to_it(inputs: Tensor) -> None:
    model = small().double().eval()
    found = check_exactness(model, inputs, 1)
    expected = float(linear_form(model, inputs, 1).bias)
    assert sum(layer.bias for layer in found.layers) == pytest.approx(expected, rel=1e-12)
    assert found.bias == pytest.approx(expected, rel=1e-12)
    terms = bias_terms(model, inputs, 1)
    for layer in found.layers:
        term = terms.get(layer.layer or "shift", torch.zeros(1))  # which is the model's own
        assert layer.bias == pytest.approx(float(term), rel=1e-12)


def test_unsupported_operations_are_findings(inputs: Tensor) -> None:
    found = check_exactness(Strange().double().eval(), inputs, 1)
    assert {name for layer in found.layers for name in layer.unsupported} == {"special_bessel_j0", "linalg_matrix_exp"}
    assert not found.is_exact
    rules = {"special_bessel_j0": Frozen(), "linalg_matrix_exp": Tangent()}
    assert check_exactness(Strange().double().eval(), inputs, 1, rules=rules).is_exact


class Positions(nn.Module):
    """A layer that does not depend on the image, beside one that does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Embedding(8, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x) + self.table(torch.arange(8)).t()[:, None]
        return self.head(x.mean((2, 3)))


def test_a_layer_that_does_not_depend_on_the_image_has_no_residual(inputs: Tensor) -> None:
    found = check_exactness(Positions().double().eval(), inputs, 1, tolerance=1e-12)
    assert {layer.layer for layer in found.layers if layer.residual is not None} == {"input", "conv", "head"}
    assert found.is_exact
    assert not replace(found, tolerance=-1.0).is_exact


class Wrong(Rule):
    """Freezes a value of its own choice, which verification must not let through."""

    def freeze(self, call: Call) -> None:
        """Nothing."""

    def apply(self, call: Call, state: None) -> Tensor:
        return call.input * 2


def test_a_wrong_rule_is_named(inputs: Tensor) -> None:
    with pytest.raises(ValueError, match=r"rule for 'silu' \(Wrong\), in module 'act'"):
        check_exactness(small().double().eval(), inputs, 1, rules={"silu": Wrong()})


class Off(Rule):
    """A ReLU, whose transpose is off by a fraction."""

    def __init__(self, fraction: float) -> None:
        self.fraction = fraction

    def freeze(self, call: Call) -> Tensor:
        return call.input > 0

    def apply(self, call: Call, state: Tensor) -> Tensor:
        return call.input * state

    def transpose(self, call: Call, state: Tensor, gradients: tuple[Tensor, ...]) -> list[Tensor]:
        return [(1 + self.fraction) * gradients[0] * state]


def test_residuals_are_those_at_the_outputs_of_layers(inputs: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).double().eval()
    found = check_exactness(model, inputs, 1, rules={"relu": Off(0.1)})
    residuals = {layer.layer: layer.residual for layer in found.layers}
    assert all(residuals[name] > 1e-3 for name in ("input", "0"))  # below the rule whose transpose is off
    assert all(residuals[name] < 1e-12 for name in "123")


@pytest.mark.parametrize(
    ("dtype", "fraction"), [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 5e-2), (torch.float16, 5e-2)]
)
def test_what_counts_as_rounding_depends_on_the_type(dtype: torch.dtype, fraction: float) -> None:
    model, inputs = nn.ReLU(), torch.ones(1, 1, dtype=dtype)
    for times, is_exact in ((1.5, True), (3, False)):  # A·Y is half of |S| + |A·Y|
        found = check_exactness(model, inputs, 0, rules={"relu": Off(times * fraction)})
        assert found.worst == pytest.approx(times * fraction / 2, rel=0.2)
        assert found.is_exact is is_exact


def test_the_command_line_says_exact(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--model", "tests.test_exactness:small", "--device", "cpu", "--dtype", "float64"]) == 0
    printed = capsys.readouterr().out
    assert "silu (gate)" in printed
    assert "Exact: largest residual" in printed


def test_the_command_line_fails_for_what_is_not_exact(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--model", "tests.test_exactness:strange", "--device", "cpu", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["exact"] is False
    assert found["worst_residual"] is None
    unsupported = {name for layer in found["layers"] for name in layer["unsupported"]}
    assert unsupported == {"special_bessel_j0", "linalg_matrix_exp"}


@pytest.mark.parametrize("tolerance", [-1.0, float("nan")])
def test_a_tolerance_that_nothing_meets_is_an_error(tolerance: float) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
    with pytest.raises(ValueError, match="tolerance must be a number from 0, got"):
        check_exactness(model, torch.rand(1, 4), 1, tolerance=tolerance)
    assert check_exactness(model, torch.zeros(1, 4), 1, tolerance=0.0).is_exact
