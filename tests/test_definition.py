"""Every fast way to a score map gives what the definition gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from captum_scoremap import LayerScoreMap, ScoreMap, freeze, linear_form
from captum_scoremap.linear import Reduction, definition
from captum_scoremap.rules import Value, with_rules
from captum_scoremap.tape import Recording, Site, Tape
from tests.families import PIECEWISE_LINEAR, SMOOTH, small_resnet, small_swin
from tests.layers import called_once
from tests.zoo import Entry, random_entry, spread

LABELS = 4


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.gate = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 6)
        self.act, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.head = nn.Linear(6, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        x = x + self.act(self.inner(x)) * self.gate(x.mean((2, 3))).sigmoid()[:, :, None, None]
        return self.head(self.pool(x).mean((2, 3)))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.ones(1, 1, 8))
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True, norm_first=True) for _ in "ab")
        )
        self.head = nn.Linear(8, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.blocks(torch.cat([self.token.expand(len(x), -1, -1), patches], 1))[:, 0])


@dataclass(frozen=True)
class Network:
    build: Callable[[], nn.Module]
    layers: tuple[str, ...]
    channel_dim: int = 1
    size: int = 16
    images: int = 3


NETWORKS = {
    "residual": Network(Residual, ("stem", "norm", "inner", "pool")),
    "residual, one image": Network(Residual, ("stem", "inner"), images=1),
    "transformer": Network(Tokens, ("blocks.0", "blocks.1.linear1"), -1),
    "resnet": Network(lambda: small_resnet(LABELS), ("layer1", "layer3.0.conv1"), size=32),
    "swin": Network(lambda: small_swin(1, LABELS), ("features.1", "features.3.1.mlp"), -1, 32),
}


@dataclass(frozen=True)
class Defined:
    """One recorded run, and what the definition makes of it."""

    tape: Tape
    output: Value
    layer: Value
    activations: Tensor
    bit: int

    @classmethod
    def of(cls, model: nn.Module, image: Tensor, label: int, layer: nn.Module | None) -> Defined:
        site: Site | None = None if layer is None else (layer, False)
        recording = Recording(model, with_rules(None), [] if site is None else [site], keep_bypass=True)
        recording.record((image,), (), lambda scores: scores[:, label])
        tapped, output = recording.tapped[site], recording.tape.value_of_output()
        assert output is not None
        return cls(recording.tape, output, tapped.values[0], tapped.activations[0], tapped.bit)

    @property
    def arguments(self) -> tuple[Tape, Value, Value, Tensor, int]:
        return self.tape, self.layer, self.output, self.activations, self.bit

    @property
    def coefficients(self) -> Tensor:
        return definition.coefficients(*self.arguments)

    @property
    def bias(self) -> Tensor:
        with torch.no_grad():
            return definition.bias(*self.arguments)

    def score_map(self, channel_dim: int) -> Tensor:
        return definition.score_map(*self.arguments, channel_dim)


CASES = [pytest.param(name, layer, id=f"{name}-{layer}") for name, n in NETWORKS.items() for layer in (None, *n.layers)]


@pytest.mark.parametrize(("name", "layer_name"), CASES)
def test_fast_ways_equal_the_definition(name: str, layer_name: str | None, generator: torch.Generator) -> None:
    network = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = network.build().double().eval()
    image = torch.randn(network.images, 3, network.size, network.size, dtype=torch.float64, generator=generator)
    layer = None if layer_name is None else model.get_submodule(layer_name)
    channel_dim = 1 if layer is None else network.channel_dim
    every = [Defined.of(model, image, label, layer) for label in range(LABELS)]
    maps = [one.score_map(channel_dim) for one in every]
    label, expected = 2, every[2]
    size = float(maps[label].abs().max())
    near = {"rtol": 1e-10, "atol": 1e-12 * size}

    form = linear_form(model, image, label, layer)
    assert_close(form.coefficients, expected.coefficients, rtol=1e-10, atol=1e-12)
    assert_close(form.activations, expected.activations, rtol=0, atol=0)
    assert_close(form.bias, expected.bias, rtol=1e-10, atol=1e-12)
    assert_close(form.score_map(channel_dim), maps[label], **near)
    assert_close(form.residual, torch.zeros_like(form.residual), rtol=0, atol=1e-10)
    with torch.no_grad():
        assert_close(form.score, model(image)[:, label], rtol=1e-12, atol=1e-13)
    if layer is None:
        sub_scores, delta = ScoreMap(model).attribute(image, label, return_convergence_delta=True)
        assert_close(sub_scores.sum(1, keepdim=True), maps[label], **near)
        assert_close(delta, torch.zeros_like(delta), rtol=0, atol=1e-10)
        return
    method = LayerScoreMap(model, layer)
    found, delta = method.attribute(image, label, return_convergence_delta=True, channel_dim=channel_dim)
    assert_close(found, maps[label], **near)
    assert_close(delta, torch.zeros_like(delta), rtol=0, atol=1e-10)
    assert_close(method.attribute(image, label, channel_dim=channel_dim), maps[label], **near)
    several = LayerScoreMap(model, [layer, layer]).attribute(image, label, channel_dim=channel_dim)
    assert_close(several[1], maps[label], **near)
    together = torch.cat(maps, channel_dim)
    for at_once in (None, 1, 7):
        found = method.attribute_targets(image, channel_dim=channel_dim, internal_batch_size=at_once)
        assert_close(found, together, **near)
    one_label_per_image = torch.arange(network.images) % LABELS
    found = method.attribute(image, one_label_per_image, channel_dim=channel_dim)
    chosen = torch.stack([maps[int(one)][index] for index, one in enumerate(one_label_per_image)])
    assert_close(found, chosen, **near)
    alone = torch.cat([method.attribute(image[i : i + 1], label, channel_dim=channel_dim) for i in range(len(image))])
    assert_close(alone, maps[label], rtol=1e-9, atol=1e-11 * size)


def by_autograd(model: nn.Module, inputs: Tensor, label: int, layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Score maps as A·Y with A the gradient of the frozen model in the layer's output, layer by layer."""
    outputs: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda _, __, output, name=name: outputs.update({name: output.clone()}))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        model(inputs.clone())
    for handle in handles:
        handle.remove()
    frozen, maps = freeze(model, inputs), {}
    for name, activations in outputs.items():
        leaf = activations.clone().requires_grad_()
        score = frozen(inputs, {layers[name]: leaf})[:, label].sum()
        # a layer that only feeds a gate has no coefficients
        gradient = torch.autograd.grad(score, leaf, allow_unused=True)[0] if score.requires_grad else None
        products = activations * (0 if gradient is None else gradient)
        maps[name] = products.sum(1, keepdim=True) if products.dim() > 1 else products
    return maps


@pytest.mark.filterwarnings("ignore:the score map of:UserWarning")  # of layers inside a window's attention
@pytest.mark.parametrize("item", [*PIECEWISE_LINEAR, *SMOOTH], ids=str)
def test_maps_of_the_zoo_are_gradients_of_frozen_models(item: Entry) -> None:
    model, inputs = random_entry(item, images=2)
    with torch.no_grad():
        label = int(model(inputs.clone())[0].argmax())
    every = called_once(model, inputs)
    of_the_image = [one for one in every if "cpb_mlp" not in one]  # not the position tables of Swin V2
    layers = {one: every[one] for one in spread(of_the_image, 12)}
    found = LayerScoreMap(model, list(layers.values())).attribute(inputs, label, channel_dim=1)
    expected = by_autograd(model, inputs, label, layers)
    for one, (layer, score_map) in zip(found, expected.items(), strict=True):
        size = float(score_map.abs().max())
        near = {"rtol": 1e-12, "atol": 1e-12 * size + 1e-300}
        assert_close(one, score_map, **near, msg=lambda text, at=layer: f"{at}: {text}")


def test_large_maps_are_summed_image_by_image(generator: torch.Generator) -> None:
    coefficients, activations = torch.randn(2, 2, 9, 512, 512, generator=generator)
    found = Reduction(channel_dim=1)(coefficients, activations)
    assert_close(found, (coefficients * activations).sum(1, keepdim=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("quotient", "is_gate"),
    [
        (lambda one, other: one.sigmoid() / other, True),
        (lambda one, other: one / other.sigmoid(), False),
        (lambda one, other: 3 / one, True),
    ],
    ids=["of a gate", "by a gate", "of a constant"],
)
def test_a_quotient_is_a_gate_where_its_numerator_is(
    quotient: Callable[[Tensor, Tensor], Tensor], is_gate: bool
) -> None:
    """A gate is a constant factor; else both factors share the product."""
    x = torch.tensor([[0.5, 2.0, 3.0]], dtype=torch.float64)
    form = linear_form(lambda x: quotient(x[:, :1], x[:, 1:2]) * x[:, 2:], x, 0)
    share = form.score if is_gate else form.score / 2
    expected = torch.stack([form.score - share, torch.zeros_like(share), share], 1)
    assert_close(form.sub_scores, expected)
