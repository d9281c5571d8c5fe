"""The lean recording gives what the plain computation gives, on every model of the zoo's short lists."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from captum_scoremap import LayerScoreMap, freeze
from captum_scoremap.freeze import Recording, Reduction
from captum_scoremap.freeze.lean import Placeholders
from captum_scoremap.rules import with_rules
from tests.layers import called_once
from tests.zoo import PIECEWISE_LINEAR, SMOOTH, entry, random_entry, spread


def outputs(model: nn.Module, inputs: Tensor, layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """What the layers give in an ordinary run, before anything changes it in place."""
    found: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda _, __, output, name=name: found.update({name: output.clone()}))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        model(inputs.clone())
    for handle in handles:
        handle.remove()
    return found


def straightforward(model: nn.Module, inputs: Tensor, label: int, layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Score maps as A·Y with A the gradient of the frozen model in the layer's output, layer by layer."""
    frozen, maps = freeze(model, inputs), {}
    for name, activations in outputs(model, inputs, layers).items():
        leaf = activations.clone().requires_grad_()
        score = frozen(inputs, {layers[name]: leaf})[:, label].sum()
        # a layer that only feeds a gate has no coefficients
        coefficients = torch.autograd.grad(score, leaf)[0] if score.requires_grad else torch.zeros_like(leaf)
        products = coefficients * activations
        maps[name] = products.sum(1, keepdim=True) if products.dim() > 1 else products
    return maps


@pytest.mark.parametrize("as_if_large", [False, True])
@pytest.mark.parametrize("name", [*PIECEWISE_LINEAR, *SMOOTH])
def test_lean_maps_equal_the_straightforward_ones(
    name: str, as_if_large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if as_if_large:  # then operations have adjoints of their own, and masks are packed
        monkeypatch.setattr("captum_scoremap.rules.rule._LARGE", 0)
        monkeypatch.setattr("captum_scoremap.rules.bits._SMALL", 2**10)
    model, inputs = random_entry(entry(name), images=2)
    with torch.no_grad():
        label = int(model(inputs.clone())[0].argmax())
    every = called_once(model, inputs)
    of_the_image = [one for one in every if "cpb_mlp" not in one]  # not the position tables of Swin V2
    layers = {one: every[one] for one in spread(of_the_image, 12)}
    lean = LayerScoreMap(model, list(layers.values())).attribute(inputs, label)
    expected = straightforward(model, inputs, label, layers)
    for found, (layer, score_map) in zip(lean, expected.items(), strict=True):
        size = float(score_map.abs().max())
        assert_close(
            found, score_map, rtol=1e-12, atol=1e-12 * size + 1e-300, msg=lambda text, at=layer: f"{at}: {text}"
        )


class Branches(nn.Module):
    """A layer whose output something else reads, before or after a change in place."""

    def __init__(self, rest: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 3, 3)
        self.head = nn.Linear(3, 2)
        self.rest = rest

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rest(self.layer(x)).mean((2, 3)))


def read_before(y: Tensor) -> Tensor:
    other = 2 * y
    return y.relu_() + other


def read_through_a_view(y: Tensor) -> Tensor:
    other = y.flatten(2).cumsum(-1).view_as(y)
    return F.relu(y, inplace=True) + other


def read_after(y: Tensor) -> Tensor:
    return y.relu_() + y.sigmoid()


def clamped_after_reading(y: Tensor) -> Tensor:
    y.relu_()
    other = y * 3
    return F.hardtanh_(y, 0.0, 0.1) + other


def changed_twice(y: Tensor) -> Tensor:
    return y.relu_().add_(1.0).mul_(2.0)


def clamped_below_zero(y: Tensor) -> Tensor:
    return F.hardtanh_(y, -0.1, 0.2)


REST = [read_before, read_through_a_view, read_after, clamped_after_reading, changed_twice, clamped_below_zero]


@pytest.mark.parametrize("rest", REST, ids=lambda rest: rest.__name__)
def test_activations_that_share_memory_with_a_change_in_place(
    rest: Callable[[Tensor], Tensor], generator: torch.Generator
) -> None:
    model = Branches(rest).double().eval()
    inputs = torch.randn(2, 2, 6, 6, generator=generator, dtype=torch.float64)
    layers = {"layer": model.layer}
    expected = straightforward(model, inputs, 1, layers)["layer"]
    assert expected.abs().max() > 0
    found = LayerScoreMap(model, model.layer).attribute(inputs, 1)
    assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_a_relu_in_place_costs_no_copy_of_the_layer_before_it(generator: torch.Generator) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(48, 2)).eval()
    inputs = torch.randn(1, 2, 6, 6, generator=generator)
    memory = []
    for once in (True, False):
        seen: list[int] = []
        handle = model[1].register_forward_hook(lambda _, __, output, seen=seen: seen.append(output.data_ptr()))
        recording = Recording(model, with_rules(None), {(model[0], False): Reduction(channel_dim=1)}, once=once)
        with torch.enable_grad():
            recording.record((inputs,), ())
        handle.remove()
        (activations,) = recording.tapped[model[0], False].activations
        memory.append(activations.data_ptr() == seen[0])
    assert memory == [True, False]


def test_activations_go_as_the_backward_pass_goes_by(generator: torch.Generator) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)).eval()
    inputs = torch.randn(1, 2, 6, 6, generator=generator)
    recording = Recording(model, with_rules(None), {(model[0], False): Reduction(channel_dim=1)}, once=True)
    with torch.enable_grad():
        score = recording.record((inputs,), ())[:, 0].sum()
    tapped = recording.tapped[model[0], False]
    assert not tapped.activations[0].is_meta
    torch.autograd.grad(score, tapped.anchors)
    assert tapped.activations[0].is_meta
    assert tapped.activations[0].shape == (1, 3, 4, 4)


@pytest.mark.parametrize("size", [8, 300])
def test_switches_are_kept_in_few_bytes(size: int, generator: torch.Generator) -> None:
    """Positions in planes of up to 2¹⁵ elements fit into two bytes, in larger ones into four."""
    inputs = torch.randn(1, 1, size, size, generator=generator, requires_grad=True)
    with Placeholders().instead_of([inputs]):
        output = F.max_pool2d(inputs, 2)
    kept = output.grad_fn._raw_saved_result1.data._tensor
    assert kept.dtype == (torch.int16 if size == 8 else torch.int32)
    (found,) = torch.autograd.grad(output.sum(), inputs)
    (expected,) = torch.autograd.grad(F.max_pool2d(inputs, 2).sum(), inputs)
    assert_close(found, expected, rtol=0, atol=0)


def test_large_maps_are_summed_image_by_image(generator: torch.Generator) -> None:
    coefficients, activations = torch.randn(2, 2, 9, 512, 512, generator=generator)
    found = Reduction(channel_dim=1)(coefficients, activations)
    assert_close(found, (coefficients * activations).sum(1, keepdim=True), rtol=1e-5, atol=1e-5)
