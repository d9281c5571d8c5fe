"""Layers that return several tensors, hold the images elsewhere, are called by keyword, or are hooked by the user."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from captum.attr import LayerActivation, LayerGradientXActivation
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import roi_align

from captum_scoremap import LayerScoreMap, NeuronScoreMap, ScoreMap, bias_terms, freeze, linear_form
from captum_scoremap.rules import Linear, Tangent
from tests.between import EXACT, assert_exact, some_images


class Attributes(OrderedDict):
    """As Hugging Face's ModelOutput: entries are attributes, and numbers are positions."""

    def __init__(self, **entries: Any) -> None:
        super().__init__(entries)
        self.note = "kept"

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())


@dataclass
class Maps:
    low: Tensor
    high: Tensor
    name: str = "maps"


@dataclass(frozen=True)
class FrozenMaps:
    low: Tensor
    high: Tensor


Named = namedtuple("Named", ["low", "high"])

STRUCTURES: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "tuple": (lambda a, b: (a, b), lambda s: s),
    "list": (lambda a, b: [a, b], lambda s: (s[0], s[1])),
    "dict": (lambda a, b: {"low": a, "high": b}, lambda s: (s["low"], s["high"])),
    "OrderedDict": (lambda a, b: OrderedDict(low=a, high=b), lambda s: (s["low"], s["high"])),
    "attributes": (lambda a, b: Attributes(low=a, high=b), lambda s: (s.low, s.high) if s.note == "kept" else None),
    "attributes as a tuple": (lambda a, b: Attributes(low=a, high=b), lambda s: s.to_tuple()),
    "dataclass": (lambda a, b: Maps(a, b), lambda s: (s.low, s.high) if s.name == "maps" else None),
    "frozen dataclass": (lambda a, b: FrozenMaps(a, b), lambda s: (s.low, s.high)),
    "namedtuple": (lambda a, b: Named(a, b), lambda s: (s.low, s.high)),
    "nested": (lambda a, b: {"all": [a, (b, None, 3)]}, lambda s: (s["all"][0], s["all"][1][0])),
    "with a mask": (lambda a, b: (a, a > 0, b), lambda s: (s[0], s[2])),
    "with None": (lambda a, b: (a, None, b, "text"), lambda s: (s[0], s[2])),
    "nested attributes": (
        lambda a, b: Attributes(states=(a, b), extra=None),
        lambda s: s.states,
    ),
}


class Pyramid(nn.Module):
    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.pack = pack

    def forward(self, x: Tensor) -> Any:
        low = self.one(x).relu()
        return self.pack(low, self.two(low).relu())


class Bodied(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        pack, self.unpack = STRUCTURES[name]
        self.body, self.head = Pyramid(pack), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.unpack(self.body(x))
        return self.head(torch.cat([low.mean((2, 3)), high.mean((2, 3))], 1))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double().eval()


@pytest.mark.parametrize("name", STRUCTURES)
def test_layers_with_several_tensors_have_a_map_of_each(name: str) -> None:
    images, model = some_images(), seeded(lambda: Bodied(name))
    maps, delta = LayerScoreMap(model, model.body).attribute(images, 1, return_convergence_delta=True)
    form = linear_form(model, images, 1, model.body)
    with torch.no_grad():
        weight = model.head.weight[1]
        low, high = model.unpack(model.body(images))
    assert [tuple(one.shape) for one in maps] == [(2, 1, 6, 6), (2, 1, 3, 3)]
    assert_close(maps[0].sum((1, 2, 3)), (low.mean((2, 3)) * weight[:4]).sum(1), **EXACT)
    assert_close(maps[1].sum((1, 2, 3)), (high.mean((2, 3)) * weight[4:]).sum(1), **EXACT)
    assert_close(delta, torch.zeros_like(delta), rtol=0, atol=1e-13)
    assert_close(form.sums + form.bias, model(images)[:, 1].detach(), **EXACT)
    assert_close(form.bias, model.head.bias[1].detach().expand(2), **EXACT)
    assert isinstance(form.activations, tuple)
    assert_close(form.activations, (low, high), **EXACT)


def test_structures_of_one_tensor_have_one_map() -> None:
    class One(nn.Module):
        def __init__(self, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> None:
            super().__init__()
            self.body, self.head, self.unpack = nn.Sequential(nn.Conv2d(3, 4, 3), Packed(pack)), nn.Linear(4, 3), unpack

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.unpack(self.body(x)).mean((2, 3)))

    images = some_images()
    plain = seeded(lambda: One(lambda y: y, lambda y: y))
    expected = LayerScoreMap(plain, plain.body).attribute(images, 1)
    for pack, unpack in (
        (lambda y: Attributes(last=y), lambda s: s.last),
        (lambda y: {"last": y}, lambda s: s["last"]),
    ):
        model = seeded(lambda pack=pack, unpack=unpack: One(pack, unpack))
        found = LayerScoreMap(model, model.body).attribute(images, 1)
        assert_close(found, expected, **EXACT)


class Packed(nn.Module):
    def __init__(self, pack: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.pack = pack

    def forward(self, x: Tensor) -> Any:
        return self.pack(x)


# --- where the images lie -----------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **kwargs or {})


class SequenceFirst(nn.Module):
    """Tokens of shape (tokens, N, C), by a layer with attention or without."""

    def __init__(self, layer: nn.Module, patch: int = 3) -> None:
        super().__init__()
        self.patches, self.layer, self.head = nn.Conv2d(3, 8, patch, patch), layer, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).permute(2, 0, 1)
        layer = self.layer(tokens)
        return self.head((tokens + (layer[0] if isinstance(layer, tuple) else layer)).mean(0))


SEQUENCES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU()),
    "transformer": lambda: nn.TransformerEncoderLayer(8, 2, 16),
    "stack": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False),
    "norm": lambda: nn.LayerNorm(8),
    "recurrent": lambda: nn.LSTM(8, 8),
}


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("name", SEQUENCES)
def test_sums_are_those_of_each_image_alone(name: str, count: int) -> None:
    model, images = seeded(lambda: SequenceFirst(SEQUENCES[name]())), some_images(count)  # four tokens
    alone = [linear_form(model, one[None], 1, model.layer) for one in images]
    form = linear_form(model, images, 1, model.layer)
    assert_close(form.sums, torch.cat([one.sums for one in alone]), **EXACT)
    assert_close(form.bias, torch.cat([one.bias for one in alone]), **EXACT)
    assert_close(form.residual, torch.zeros_like(form.residual), rtol=0, atol=1e-13)
    _, delta = LayerScoreMap(model, model.layer).attribute(images, 1, return_convergence_delta=True, channel_dim=-1)
    assert_close(delta, torch.zeros_like(delta), rtol=0, atol=1e-13)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}])
def test_single_precision_has_a_kernel_of_its_own_for_recurrent_layers(options: dict[str, Any]) -> None:
    model = seeded(lambda: SequenceFirst(nn.LSTM(8, 4 if "bidirectional" in options else 8, **options))).float()
    images = some_images(2).float()
    single = linear_form(model, images, 1)
    with torch.no_grad(), Operations() as seen:
        model(images)
    assert "mkldnn_rnn_layer" in seen.names
    double = linear_form(model.double(), images.double(), 1)
    for name in ("score", "bias", "coefficients"):
        assert_close(getattr(single, name).double(), getattr(double, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("name", ["linear", "transformer", "norm"])
def test_all_labels_are_as_one_label_for_sequences(name: str, count: int) -> None:
    model, images = seeded(lambda: SequenceFirst(SEQUENCES[name]())), some_images(count)
    method = LayerScoreMap(model, model.layer)
    every = method.attribute_targets(images, channel_dim=-1)
    assert every.shape == (4, count, 3)
    for label in range(3):
        one = method.attribute(images, label, channel_dim=-1)
        assert_close(every[..., label : label + 1], one, **EXACT)


def test_images_folded_with_windows_are_told_apart() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Sequential(nn.Linear(27, 8), nn.ReLU()), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            count = len(x)
            windows = x.unfold(2, 3, 3).unfold(3, 3, 3).permute(0, 2, 3, 1, 4, 5).reshape(count * 4, 27)
            return self.head(self.layer(windows).view(count, 4, 8).mean(1))

    model = seeded(Windows)
    for count in (1, 2, 3):
        images = some_images(count)
        alone = torch.cat([linear_form(model, one[None], 1, model.layer).sums for one in images])
        form = linear_form(model, images, 1, model.layer)
        assert_close(form.sums, alone, **EXACT)
        assert_exact(model, None, images)


# --- calls by keyword, rows, hooks, empty tensors -----------------------------------------------------


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.block, self.head = nn.Conv2d(3, 4, 3), Scaled(), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(factor=2.0, hidden=self.conv(x).relu())
        return self.head(input=y.flatten(1))


class Scaled(nn.Module):
    def forward(self, *, hidden: Tensor, factor: float = 1.0) -> Tensor:
        return hidden * factor


def test_layers_called_by_keyword_have_an_input() -> None:
    images, model = some_images(), seeded(Keyword)
    weight = model.head.weight[1].detach()
    form = linear_form(model, images, 1, model.head, attribute_to_layer_input=True)
    assert_close(form.coefficients, weight.expand(2, -1), **EXACT)
    assert_close(form.sums + form.bias, form.score, **EXACT)
    inner = linear_form(model, images, 1, model.block, attribute_to_layer_input=True)
    assert_close(inner.coefficients, 2 * weight.view(4, 4, 4).expand(2, -1, -1, -1), **EXACT)
    found = LayerScoreMap(model, model.block).attribute(images, 1, attribute_to_layer_input=True)
    assert_close(found, inner.score_map(), **EXACT)
    every = LayerScoreMap(model, model.block).attribute_targets(images, attribute_to_layer_input=True)
    assert_close(every[:, 1:2], found, **EXACT)


class Queries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.heads = nn.Conv2d(3, 4, 3), nn.Linear(64, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(self.conv(x).relu().flatten(1)).reshape(-1, 3)


@pytest.mark.parametrize("count", [1, 2])
def test_several_rows_of_scores_are_refused_with_advice_that_works(count: int) -> None:
    images, model = some_images(count), seeded(Queries)
    calls: dict[str, Callable[[Any], object]] = {
        "map": lambda t: ScoreMap(model).attribute(images, t),
        "form": lambda t: linear_form(model, images, t),
        "layer": lambda t: LayerScoreMap(model, model.conv).attribute(images, t),
        "bias": lambda t: bias_terms(model, images, t),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"one row of scores for each image, got {4 * count} for {count}"):
            call(1)
        advised = call(lambda out: out.reshape(count, -1, *out.shape[1:])[:, 2, 1])
        if name == "form":
            assert_close(advised.score, model(images).view(count, 4, 3)[:, 2, 1].detach(), **EXACT)
            assert_close(advised.sums + advised.bias, advised.score, **EXACT)


PUSH = torch.linspace(-1, 1, 4, dtype=torch.float64)[:, None, None]

HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "add": lambda m: m.register_forward_hook(lambda module, args, output: output + PUSH),
    "replace": lambda m: m.register_forward_hook(lambda module, args, output: output.relu() * 2),
    "in place": lambda m: m.register_forward_hook(lambda module, args, output: output.add_(PUSH)),
    "first of all": lambda m: m.register_forward_hook(lambda module, args, output: output * 3, prepend=True),
    "by keyword": lambda m: m.register_forward_hook(lambda module, args, kwargs, output: output * 3, with_kwargs=True),
    "of the input": lambda m: m.register_forward_pre_hook(lambda module, args: (args[0] * 2 - PUSH,)),
    "watching": lambda m: m.register_forward_hook(lambda module, args, output: None),
    "two": lambda m: (HOOKS["add"](m), HOOKS["replace"](m)),
}


def hooked(name: str) -> nn.Sequential:
    model = seeded(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.1), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(64, 3))
    )
    HOOKS[name](model[1])
    return model


@pytest.mark.parametrize("name", HOOKS)
def test_what_goes_on_from_a_hooked_layer_is_its_output(name: str) -> None:
    images, model = some_images(), hooked(name)
    form = linear_form(model, images, 1, model[1])
    assert_close(form.activations, LayerActivation(model, model[1]).attribute(images).detach(), **EXACT)
    captums = LayerGradientXActivation(model, model[1]).attribute(images, 1)
    assert_close(form.sub_scores, captums.detach(), **EXACT)
    found = LayerScoreMap(model, model[1]).attribute(images, 1, attr_dim_summation=False)
    assert_close(found, captums.detach(), **EXACT)
    assert_exact(model, model[1], images)
    before = linear_form(model, images, 1, model[1], attribute_to_layer_input=True)
    assert_close(before.sums + before.bias, before.score, **EXACT)


def test_hooks_change_the_frozen_model_and_neurons_too() -> None:
    images, model = some_images(), hooked("add")
    assert_close(freeze(model, images)(images), model(images).detach(), **EXACT)
    neuron = NeuronScoreMap(model, model[1]).attribute(images, (1, 2, 2), return_convergence_delta=True)
    assert_close(neuron[1], torch.zeros_like(neuron[1]), rtol=0, atol=1e-13)


EMPTY: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: torch.cat([nn.functional.gelu(x[:, :0]), nn.functional.gelu(x)], 1),
    "sum": lambda x: x.relu() + x[:, :0].sin().sum(),
    "product": lambda x: torch.cat([x[:, :0] * x[:, :0].sigmoid(), x.relu()], 1),
    "matrix": lambda x: x.relu() + (x[:, :0] @ x.new_ones(0, 108)),
    "norm": lambda x: torch.cat([nn.functional.layer_norm(x[:0], (108,)), x.relu()], 0),
    "index": lambda x: torch.cat([x[:, x[0] > 1e9].exp(), x.relu()], 1),
    "in place": lambda x: torch.cat([(x[:, :0] * 1).relu_(), x.abs()], 1),
    "softmax": lambda x: torch.cat([x[:0].softmax(1), x.relu()], 0),
    "nothing of the image": lambda x: torch.cat([x.new_zeros(2, 0), x.relu()], 1),
}


@pytest.mark.parametrize("name", EMPTY)
def test_empty_tensors_pass(name: str) -> None:
    head = seeded(lambda: nn.Linear(108, 3))
    images = some_images()
    model = lambda x: head(EMPTY[name](x.flatten(1)))  # noqa: E731
    form = linear_form(model, images, 1)
    assert_close(form.score, model(images)[:, 1].detach(), **EXACT)
    assert_close(form.sums + form.bias, form.score, **EXACT)
    bias_terms(model, images, 1)


@pytest.mark.parametrize("rules", [{"gelu": Tangent()}, {"sum": Linear()}, {"relu": Tangent()}, {"sin": Tangent()}])
@pytest.mark.parametrize("name", ["gelu", "sum"])
def test_rules_of_ones_own_meet_empty_tensors(name: str, rules: dict[str, Any]) -> None:
    head = seeded(lambda: nn.Linear(108, 3))
    form = linear_form(lambda x: head(EMPTY[name](x.flatten(1))), some_images(), 1, rules=rules)
    assert_close(form.sums + form.bias, form.score, **EXACT)


class Rows(nn.Module):
    """A table with as many rows as there are images, by chance, that is added as a whole to the scores of each."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.ones(2, 3))

    def forward(self) -> Tensor:
        return self.rows * 2


class WithRows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = Rows(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.table().sum(0)


def test_as_many_rows_as_images_are_not_taken_for_images() -> None:
    model = WithRows().double()
    for count in (1, 2):
        form = linear_form(model, torch.ones(count, 4, dtype=torch.float64), 1, model.table)
        assert_close(form.sums + form.bias, form.score, **EXACT)
        assert_close(form.sums, form.activations[:, 1].sum().expand(count), **EXACT)


class Regions(nn.Module):
    """One region of the first image, two of the second: (3, 8), which hold the images along no dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head, self.scores = nn.Conv2d(3, 4, 3), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        boxes = torch.tensor([[0.0, 1, 1, 4, 4], [1, 0, 0, 3, 4], [1, 2, 2, 5, 5]], dtype=x.dtype)
        regions = self.head(roi_align(self.conv(x), boxes, 2).flatten(1)).relu()
        scores = self.scores(regions)
        return torch.stack([scores[0], scores[1:].amax(0)])


def test_regions_of_several_images_are_summed_image_by_image() -> None:
    model = seeded(Regions)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    form = linear_form(model, x, 1, model.head)
    assert_close(form.sums + form.bias, form.score, **EXACT)
    assert_close(form.sums[0], form.sub_scores[0].sum(), **EXACT)
    _, delta = LayerScoreMap(model, model.head).attribute(x, 1, return_convergence_delta=True)
    assert delta.shape == (2,)
    assert delta.abs().max() < 1e-12
    with pytest.raises(ValueError, match=r"must hold the 2 images along one dimension, got \(3, 8\)"):
        LayerScoreMap(model, model.head).compute_convergence_delta(form.sub_scores, None, x, 1)


def test_as_many_tokens_as_images_are_not_taken_for_images() -> None:
    """(tokens, N, C): all labels at once are as one label for each, where tokens and images are both two."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer, head = nn.Linear(3, 5).double(), nn.Linear(5, 7).double()
        x = torch.randn(2, 2, 3, dtype=torch.float64)
    model = nn.ModuleDict({"layer": layer, "head": head})
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)[:, None, None]
    method = LayerScoreMap(lambda x: head((layer(x.transpose(0, 1)).relu() * weights).sum(0)), model["layer"])
    found = method.attribute_targets(x, channel_dim=-1)
    for label in range(7):
        assert_close(found[..., label : label + 1], method.attribute(x, label, channel_dim=-1), **EXACT)
