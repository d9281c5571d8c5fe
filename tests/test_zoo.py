"""S = A·Y + B at the image and at every layer of the models that people use."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from captum_scoremap import LayerScoreMap, bias_terms, linear_form
from captum_scoremap.models import load_model
from tests.state import untouched
from tests.zoo import (
    PIECEWISE_LINEAR,
    SMOOTH,
    Entry,
    all_of_torchvision,
    entry,
    families_of_timm,
    measure,
    random_entry,
    relative_residual,
)


def holds(item: Entry, tolerance: float, seconds: float) -> None:
    model, inputs = random_entry(item)
    with untouched(model, inputs):
        row = measure(item, model, inputs, seconds=seconds)
    assert row.checked > 0
    assert row.forward <= 1e-12
    assert row.at_input <= tolerance, f"residual {row.at_input:.1e} at the image"
    assert row.at_layers <= tolerance, f"residual {row.at_layers:.1e} at {row.worst}"


@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_identity_holds_at_every_layer(name: str) -> None:
    holds(entry(name), 1e-10, seconds=float("inf"))


@pytest.mark.parametrize("name", SMOOTH)
def test_identity_holds_for_networks_that_are_not_piecewise_linear(name: str) -> None:
    holds(entry(name), 1e-9, seconds=5)


@pytest.mark.sweep
@pytest.mark.parametrize("item", all_of_torchvision(), ids=str)
def test_identity_holds_for_all_of_torchvision(item: Entry) -> None:
    holds(item, 1e-9, seconds=60)


@pytest.mark.sweep
def test_identity_holds_for_families_of_timm(subtests: pytest.Subtests) -> None:
    for item in families_of_timm():
        with subtests.test(str(item)):
            holds(item, 1e-9, seconds=60)
