"""What must hold for networks that nobody chose."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from torch import Tensor, nn
from torch.testing import assert_close

from captum_scoremap import FrozenModel, bias_terms, freeze, linear_form
from captum_scoremap.rules import TANGENT
from tests.networks import LABELS, RandomNetwork, networks
from tests.state import untouched
from tests.zoo import relative_residual, spread

TOLERANCE = 1e-10
LAYERS = 4  # checked of each network, beside the image


def run(check: Callable[[RandomNetwork], None], count: int, smooth: bool) -> None:
    """The check on `count` networks, always the same ones in the normal run."""
    drawn = settings(
        max_examples=count,
        deadline=None,
        derandomize=count <= 200,
        database=None,
        print_blob=True,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    drawn(given(networks(smooth=smooth))(check))()


def check_identity(network: RandomNetwork) -> None:
    """S = A·Y + B at the image and at several layers; the model's own score; nothing changed."""
    model, inputs = network.model, network.inputs
    with torch.no_grad():
        scores = model(inputs.clone())
    labels = torch.arange(len(inputs)) % LABELS
    expected = scores.gather(1, labels[:, None])[:, 0]
    with untouched(model, inputs):
        assert_close(freeze(model, inputs)(inputs), scores, rtol=1e-10, atol=1e-12)
        for name in (None, *spread(network.layers, LAYERS)):
            layer = None if name is None else model.get_submodule(name)
            form = linear_form(model, inputs, labels, layer)
            assert_close(form.score, expected, rtol=1e-12, atol=1e-14)
            product = form.sub_scores.flatten(1).sum(1)
            worst = relative_residual(expected, product, form.bias)
            assert worst <= TOLERANCE, f"residual {worst:.1e} at {name or 'the image'}"
            assert_close(form.residual, expected - (product + form.bias), rtol=0, atol=1e-9)


def check_bias_terms(network: RandomNetwork) -> None:
    """The share of every bias, summed, is the bias of the frozen model at zero."""
    model, inputs = network.model, network.inputs
    with untouched(model, inputs):
        terms = bias_terms(model, inputs, 0)
        bias = linear_form(model, inputs, 0).bias
    shares = torch.stack([torch.zeros_like(bias), *terms.values()])
    size = 1 + shares.abs().sum(0)
    assert ((shares.sum(0) - bias).abs() <= TOLERANCE * size).all()


def on_a_boundary(frozen: FrozenModel, model: nn.Module, inputs: Tensor) -> bool:
    """Whether values are equal, so that rounding tells which is larger, here and elsewhere: windows of padding, say."""
    draws = torch.Generator().manual_seed(0)
    near = [1e-7 * torch.randn(inputs.shape, dtype=inputs.dtype, generator=draws) for _ in range(8)]
    return not all(frozen.same_region(freeze(model, inputs + change)) for change in near)


def check_region(network: RandomNetwork) -> None:
    """Gradient and coefficients agree; along a ray the switch that is named flips first, where it is said to."""
    model, inputs = network.model, network.inputs
    form, tangent = linear_form(model, inputs, 0), linear_form(model, inputs, 0, rules=TANGENT)
    largest = float(form.coefficients.abs().max())
    assert_close(tangent.coefficients, form.coefficients, rtol=0, atol=TOLERANCE * (1 + largest))

    direction = torch.linspace(-1, 1, inputs[0].numel(), dtype=inputs.dtype).cos().view_as(inputs[0])
    frozen = freeze(model, inputs)
    assume(not on_a_boundary(frozen, model, inputs))
    boundary = frozen.distance_to_boundary(direction.expand_as(inputs))
    for image, (distance, switch) in enumerate(zip(boundary.distance.tolist(), boundary.switch, strict=True)):
        ray = torch.zeros_like(inputs)
        ray[image] = direction
        if switch == "":
            assert distance == float("inf")
            assert frozen.same_region(freeze(model, inputs + 1e3 * ray))
        else:
            assert frozen.flipped(freeze(model, inputs + (1 - 1e-7) * distance * ray)) == {}
            assert switch in frozen.flipped(freeze(model, inputs + (1 + 1e-7) * distance * ray))


@pytest.mark.parametrize("smooth", [False, True], ids=["piecewise linear", "smooth"])
def test_identity_holds(smooth: bool, pytestconfig: pytest.Config) -> None:
    run(check_identity, pytestconfig.getoption("networks"), smooth)


@pytest.mark.parametrize("smooth", [False, True], ids=["piecewise linear", "smooth"])
def test_bias_terms_sum_to_the_bias(smooth: bool, pytestconfig: pytest.Config) -> None:
    run(check_bias_terms, pytestconfig.getoption("networks") // 4, smooth)


def test_region_ends_where_the_frozen_model_says(pytestconfig: pytest.Config) -> None:
    run(check_region, pytestconfig.getoption("networks") // 4, smooth=False)
