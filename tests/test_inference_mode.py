"""Models whose weights were made under ``torch.inference_mode``, of which autograd can save none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from captum_scoremap import (
    CompleteScoreMap,
    FusedScoreMap,
    LayerScoreMap,
    NeuronScoreMap,
    ScoreMap,
    bias_terms,
    compile_map,
    freeze,
    linear_form,
    prepare,
)
from tests.between import EXACT, some_images


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(64, 3)
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(1, 2, 4, dtype=x.dtype)
        x = nn.functional.softplus(self.norm(self.conv(x))) * self.table
        return self.head(x.flatten(1))


def made_under_it() -> nn.Module:
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(0)
        return Small().double().eval()


def run_under_it() -> nn.Module:
    """Weights as ever, and a table that the first run made."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Small().double().eval()
    with torch.inference_mode():
        model(some_images())
    return model


MADE = {"made under it": made_under_it, "run under it": run_under_it}


def gradient(model: nn.Module, images: Tensor) -> Tensor:
    leaf = images.clone().requires_grad_()
    return torch.autograd.grad(freeze(model, images)(leaf)[:, 1].sum(), leaf)[0]


def of_a_layer(model: nn.Module, images: Tensor) -> Tensor:
    conv: Any = model.conv
    return LayerScoreMap(model, conv).attribute(images, 1)  # type: ignore[return-value]  # one layer, one tensor


def of_all_labels(model: nn.Module, images: Tensor) -> Tensor:
    conv: Any = model.conv
    return LayerScoreMap(model, conv).attribute_targets(images)


def of_a_neuron(model: nn.Module, images: Tensor) -> Any:
    conv: Any = model.conv
    return NeuronScoreMap(model, conv).attribute(images, (0, 0, 0))


CALLS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "image": lambda model, x: ScoreMap(model).attribute(x, 1),
    "layer": of_a_layer,
    "all labels": of_all_labels,
    "neuron": of_a_neuron,
    "complete": lambda model, x: CompleteScoreMap(model).attribute(x, 1),
    "fused": lambda model, x: FusedScoreMap(model).attribute(x, 1),
    "bias": lambda model, x: linear_form(model, x, 1).bias,
    "bias terms": lambda model, x: sum(bias_terms(model, x, 1).values()),
    "frozen": lambda model, x: freeze(model, x)(2 * x),
    "gradient of the frozen": gradient,
    "boundary": lambda model, x: freeze(model, x).distance_to_boundary(x).distance,
    "prepared": lambda model, x: ScoreMap(prepare(model)).attribute(x, 1),
    "compiled": lambda model, x: compile_map(ScoreMap(model), x, 1, backend="graph")(x, 1),
}


@pytest.mark.parametrize("how", MADE)
@pytest.mark.parametrize("name", CALLS)
def test_tensors_made_under_inference_mode_are_as_others(name: str, how: str) -> None:
    model, images = MADE[how](), some_images()
    tensors = [*model.parameters(), *model.buffers(), model.table]
    assert any(one is not None and one.is_inference() for one in tensors)
    expected = CALLS[name](copy.deepcopy(model), images)
    assert_close(CALLS[name](model, images), expected, **EXACT)


@pytest.mark.parametrize("how", MADE)
def test_create_graph_says_what_works(how: str) -> None:
    model, images = MADE[how](), some_images()
    options = {"grad_kwargs": {"create_graph": True}}
    with pytest.raises(RuntimeError, match=r"got some made under torch.inference_mode.*copy.deepcopy\(model\)"):
        ScoreMap(model).attribute(images, 1, **options)
    found = ScoreMap(copy.deepcopy(model)).attribute(images, 1, **options)
    assert_close(found, ScoreMap(model).attribute(images, 1), **EXACT)
