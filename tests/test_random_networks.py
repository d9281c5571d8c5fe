"""The identity S = A·Y + B for networks that nobody chose."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch.testing import assert_close

from captum_scoremap import freeze, linear_form
from tests.networks import LABELS, RandomNetwork, networks
from tests.state import untouched
from tests.zoo import relative_residual, spread

TOLERANCE = 1e-10
LAYERS = 4  # checked of each network, beside the image


def check(network: RandomNetwork) -> None:
    model, inputs = network.model, network.inputs
    with torch.no_grad():
        scores = model(inputs.clone())
    labels = torch.arange(len(inputs)) % LABELS
    expected = scores.gather(1, labels[:, None])[:, 0]
    with untouched(model, inputs):
        frozen = freeze(model, inputs)
        assert_close(frozen(inputs), scores, rtol=1e-10, atol=1e-12)
        for name in (None, *spread(network.layers, LAYERS)):
            layer = None if name is None else model.get_submodule(name)
            form = linear_form(model, inputs, labels, layer)
            assert_close(form.score, expected, rtol=1e-12, atol=1e-14)
            product = form.sub_scores.flatten(1).sum(1)
            worst = relative_residual(expected, product, form.bias)
            assert worst <= TOLERANCE, f"residual {worst:.1e} at {name or 'the image'}"
            assert_close(form.residual, expected - (product + form.bias), rtol=0, atol=1e-9)


@pytest.mark.parametrize("smooth", [False, True], ids=["piecewise linear", "smooth"])
def test_identity_holds_for_random_networks(smooth: bool, pytestconfig: pytest.Config) -> None:
    count: int = pytestconfig.getoption("networks")
    run = settings(
        max_examples=count,
        deadline=None,
        derandomize=count <= 200,
        database=None,
        print_blob=True,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    run(given(networks(smooth=smooth))(check))()
