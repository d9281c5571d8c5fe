"""Bad input: a clear error, and everything as before."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from captum_scoremap import (
    LayerScoreMap,
    NeuronScoreMap,
    ScoreMap,
    bias_terms,
    freeze,
    linear_form,
)
from captum_scoremap.checks import UnsupportedOperationError
from captum_scoremap.rules import Call, Rule, Tangent
from tests.state import untouched

NONE = Tangent()  # of no operation


class Argmax(nn.Module):
    """A layer that gives no float tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(1, keepdim=True)


class Network(nn.Module):
    """Batch norm, dropout, a ReLU that runs twice, a layer that never runs and one of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 2)
        self.argmax = Argmax()
        self.dropout = nn.Dropout()
        self.head = nn.Linear(4, 5)
        self.unused = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv1(x)))
        x = self.relu(self.conv2(x))
        x = x + 0 * self.argmax(x)
        return self.head(self.dropout(x).mean((2, 3)))


class Exotic(nn.Module):
    """Two operations without a rule, in two modules."""

    class Exponential(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.matrix_exp(x)

    class Bessel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    def __init__(self) -> None:
        super().__init__()
        self.exponential = self.Exponential()
        self.bessel = self.Bessel()

    def forward(self, x: Tensor) -> Tensor:
        return self.bessel(self.exponential(x)).mean((2, 3))


def network() -> nn.Module:
    torch.manual_seed(0)
    return Network().double().eval()


def piecewise_linear() -> nn.Sequential:
    """Without batch norm and dropout, so that it takes an image without a batch dimension in its stride."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(-3), nn.Linear(4, 5))
    return model.double().eval()


def scripted() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated, models that were scripted remain
        return torch.jit.trace(piecewise_linear(), images())


def in_script(module: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(module)


def images() -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def with_value(value: float) -> Tensor:
    changed = images()
    changed[1, 2, 3, 4] = value
    return changed


class Summed(nn.Module):
    """One score for each image, (N,)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum((1, 2, 3))


@dataclass(frozen=True)
class Arguments:
    """Of a call; each entry below takes what it needs."""

    model: Any
    inputs: Any
    target: Any
    layer: Any
    rules: Any


ENTRIES: dict[str, Callable[[Arguments], object]] = {
    "ScoreMap": lambda c: ScoreMap(c.model, rules=c.rules).attribute(c.inputs, c.target),
    "LayerScoreMap": lambda c: LayerScoreMap(c.model, c.layer, rules=c.rules).attribute(c.inputs, c.target),
    "NeuronScoreMap": lambda c: NeuronScoreMap(c.model, c.layer, rules=c.rules).attribute(c.inputs, 0),
    "linear_form": lambda c: linear_form(c.model, c.inputs, c.target, c.layer, rules=c.rules),
    "bias_terms": lambda c: bias_terms(c.model, c.inputs, c.target, rules=c.rules),
    "freeze": lambda c: freeze(c.model, c.inputs, rules=c.rules),
}
ALL = tuple(ENTRIES)
WITH_TARGET = ("ScoreMap", "LayerScoreMap", "linear_form", "bias_terms")
WITH_LAYER = ("LayerScoreMap", "NeuronScoreMap", "linear_form")


def usual_layer(model: Any, entry: str) -> nn.Module:
    """The first convolution; for neurons the last linear layer."""
    if not isinstance(model, nn.Module):
        return nn.Identity()
    kind = nn.Linear if entry == "NeuronScoreMap" else nn.Conv2d
    layers = [m for name, m in model.named_modules() if isinstance(m, kind) and name != "unused"]
    return layers[0] if layers else model


@dataclass(frozen=True)
class Bad:
    """One mistake, where it can be made, and what is said about it."""

    name: str
    error: type[Exception] | tuple[type[Exception], ...]
    match: str
    model: Callable[[], Any] = network
    inputs: Callable[[], Any] = images
    target: Any = 1
    layer: Callable[[Any], Any] | None = None
    rules: Any = None
    entries: tuple[str, ...] = field(default=ALL)


class WrongShape(Rule):
    def freeze(self, call: Call) -> Any:
        return None

    def apply(self, call: Call, state: Any) -> Any:
        return call.input.clamp_min(0)[..., :1]


class WrongType(WrongShape):
    def apply(self, call: Call, state: Any) -> Any:
        return call.input.clamp_min(0).float()


class WrongValue(WrongShape):
    def apply(self, call: Call, state: Any) -> Any:
        return call.input * 0.5


class NoTensor(WrongShape):
    def apply(self, call: Call, state: Any) -> Any:
        return None


BAD = [
    Bad(
        "no batch dimension",
        ValueError,
        r"inputs must have a batch dimension",
        piecewise_linear,
        lambda: images()[0],
        entries=WITH_TARGET,
    ),
    Bad("a single number", ValueError, r"inputs must have a batch dimension", inputs=lambda: images()[0, 0, 0, 0]),
    Bad(
        "wrong number of channels",
        (RuntimeError, ValueError),
        r"to have 3 channels, but got 4",
        inputs=lambda: images()[:, [0, 0, 1, 2]],
    ),
    Bad(
        "target of one score for each image",
        ValueError,
        r"target must be None for a model that returns one score for each image, \(2,\); got 1",
        lambda: Summed().double().eval(),
        entries=("ScoreMap", "linear_form", "bias_terms"),
    ),
    Bad(
        "integers",
        TypeError,
        r"inputs must be floating point, got torch\.uint8.* / 255",
        inputs=lambda: images().to(torch.uint8),
    ),
    Bad("not a tensor", TypeError, r"inputs must be .*tensor", inputs=lambda: images().numpy()),
    Bad("NaN", ValueError, r"inputs must be finite, got 1 ", inputs=lambda: with_value(math.nan)),
    Bad("infinite", ValueError, r"inputs must be finite, got 1 ", inputs=lambda: with_value(-math.inf)),
    Bad("empty batch", ValueError, r"empty batch", inputs=lambda: images()[:0]),
    Bad("no target", ValueError, r"target must", target=None, entries=WITH_TARGET),
    Bad("target too large", ValueError, r"target must .* got 5", target=5, entries=WITH_TARGET),
    Bad("target too small", ValueError, r"target must .* got -6", target=-6, entries=WITH_TARGET),
    Bad(
        "one target too large",
        ValueError,
        r"target must .* got 7",
        target=torch.tensor([0, 7]),
        entries=WITH_TARGET,
    ),
    Bad("too many targets", ValueError, r"target must .* got 3", target=[0, 1, 2], entries=WITH_TARGET),
    Bad(
        "too many targets, as a tensor",
        ValueError,
        r"target must .* got 3",
        target=torch.tensor([0, 1, 2]),
        entries=WITH_TARGET,
    ),
    Bad("target of another kind", TypeError, r"target must", target="cat", entries=WITH_TARGET),
    Bad(
        "layer of another model",
        ValueError,
        r"layer must be part of the model",
        layer=lambda _model: nn.ReLU(),
        entries=WITH_LAYER,
    ),
    Bad(
        "layer by name",
        TypeError,
        r"layer must be a module, .*'conv1'",
        layer=lambda _: "conv1",
        entries=WITH_LAYER,
    ),
    Bad("layer by number", TypeError, r"layer must be a module, got int", layer=lambda _: 1, entries=WITH_LAYER),
    Bad(
        "layer that never runs",
        ValueError,
        r"layer must run",
        layer=lambda model: model.unused,
        entries=WITH_LAYER,
    ),
    Bad(
        "layer of integers",
        (TypeError, ValueError),
        r"layer must have a floating-point output",
        layer=lambda model: model.argmax,
        entries=WITH_LAYER,
    ),
    Bad(
        "training with batch norm",
        ValueError,
        r"(?s)evaluation mode.*norm",
        lambda: network().train(),
    ),
    Bad("compiled", TypeError, r"got a compiled one", lambda: torch.compile(piecewise_linear())),
    Bad("scripted", TypeError, r"got a scripted one", scripted),
    Bad("no model", TypeError, r"forward_func must be", lambda: "resnet18"),
    Bad(
        "rules are no mapping",
        TypeError,
        r"rules must be a mapping",
        rules=[WrongShape()],
    ),
    Bad(
        "rules of a class", TypeError, r"got the class GELU, which is none. Did you mean 'gelu'", rules={nn.GELU: NONE}
    ),
    Bad("rules of a module", TypeError, r"got a module \(ReLU6\), .*Did you mean 'relu6'", rules={nn.ReLU6(): NONE}),
    Bad("rules of a function of others", TypeError, r"got the function len, which is none", rules={len: NONE}),
    Bad("rules of a number", TypeError, r"such as 'relu', .* got 3, which is none.$", rules={3: NONE}),
    Bad("rules of a name", ValueError, r"rules must name .* got 'geluu', .*Did you mean 'gelu'", rules={"geluu": NONE}),
    Bad("rules of capitals", ValueError, r"got 'MaxPool2d'.*Did you mean 'max_pool2d'", rules={"MaxPool2d": NONE}),
    Bad("rules of a library", ValueError, r"got 'none::relus'.*Did you mean 'relu'", rules={"none::relus": NONE}),
    Bad("rule is no rule", TypeError, r"rules\['relu'\] must be a Rule", rules={"relu": torch.relu}),
    Bad(
        "rule of wrong shape",
        ValueError,
        r"rule for 'relu' \(WrongShape\).*'relu'.*shape",
        rules={"relu": WrongShape()},
    ),
    Bad(
        "rule of wrong type",
        ValueError,
        r"rule for 'relu' \(WrongType\).*float64",
        rules={"relu": WrongType()},
    ),
    Bad(
        "rule of wrong value",
        ValueError,
        r"rule for 'relu' \(WrongValue\).*value",
        rules={"relu": WrongValue()},
    ),
    Bad("rule without a value", TypeError, r"rule for 'relu' \(NoTensor\).*tensor", rules={"relu": NoTensor()}),
    Bad(
        "operations without a rule",
        UnsupportedOperationError,
        r"(?s)matrix_exp in 'exponential'.*bessel_j0 in 'bessel'.*rules=",
        Exotic,
    ),
]


CASES = [pytest.param(entry, bad, id=f"{bad.name}-{entry}") for bad in BAD for entry in bad.entries]


@pytest.mark.parametrize(("entry", "bad"), CASES)
def test_bad_input_is_named_and_nothing_is_changed(entry: str, bad: Bad) -> None:
    model, inputs = bad.model(), bad.inputs()
    layer = bad.layer(model) if bad.layer else usual_layer(model, entry)
    call = Arguments(model, inputs, bad.target, layer, bad.rules)
    watched = model if isinstance(model, nn.Module) else nn.Identity()
    tensors = (inputs,) if isinstance(inputs, Tensor) else ()
    with untouched(watched, *tensors), pytest.raises(bad.error, match=bad.match):
        ENTRIES[entry](call)


@pytest.mark.parametrize("entry", ALL)
def test_inference_mode_is_named(entry: str) -> None:
    model, inputs = network(), images()
    call = Arguments(model, inputs, 1, usual_layer(model, entry), None)
    with (
        untouched(model, inputs),
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=r"torch\.inference_mode"),
    ):
        ENTRIES[entry](call)


@pytest.mark.parametrize("entry", ALL)
def test_tensor_made_in_inference_mode_is_named(entry: str) -> None:
    model = network()
    with torch.inference_mode():
        inputs = images()
    call = Arguments(model, inputs, 1, usual_layer(model, entry), None)
    with untouched(model), pytest.raises(RuntimeError, match=r"torch\.inference_mode.*clone"):
        ENTRIES[entry](call)


@pytest.mark.parametrize("entry", ALL)
def test_model_that_raises_leaves_nothing_behind(entry: str) -> None:
    model, inputs = network(), images()
    assert isinstance(model, Network)

    def broken(x: Tensor) -> Tensor:
        raise KeyError("broken head")

    model.head.forward = broken
    call = Arguments(model, inputs, 1, usual_layer(model, entry), None)
    with untouched(model, inputs), pytest.raises(KeyError, match="broken head"):
        ENTRIES[entry](call)


@pytest.mark.parametrize("entry", WITH_TARGET)
def test_score_behind_softmax_warns(entry: str) -> None:
    model, inputs = nn.Sequential(network(), nn.Softmax(1)).eval(), images()
    call = Arguments(model, inputs, 1, usual_layer(model, entry), None)
    with untouched(model, inputs), pytest.warns(UserWarning, match=r"softmax.*logits"):
        ENTRIES[entry](call)


def test_softmax_inside_does_not_warn() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 6), nn.Softmax(1), nn.Linear(6, 5)).double().eval()
    linear_form(model, images(), 0)


class Untied(Network):
    """The same network with a ReLU of its own for the second call."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv1(x)))
        x = self.second(self.conv2(x))
        x = x + 0 * self.argmax(x)
        return self.head(self.dropout(x).mean((2, 3)))


@pytest.mark.parametrize(
    "hidden",
    [scripted, lambda: in_script(piecewise_linear()), lambda: torch.compile(piecewise_linear(), backend="eager")],
    ids=["traced", "scripted", "compiled"],
)
def test_what_is_scripted_or_compiled_inside_a_model_is_seen(hidden: Callable[[], Any]) -> None:
    first = nn.Conv2d(3, 3, 1).double()
    model, inputs = nn.Sequential(first, hidden()).eval(), images()
    plain = nn.Sequential(first, piecewise_linear()).eval()
    for _ in range(3):  # scripted code is optimized once it has run
        with torch.no_grad():
            scores = model(inputs)
    for layer in (None, first):
        form, expected = linear_form(model, inputs, 1, layer), linear_form(plain, inputs, 1, layer)
        assert_close(form.score, scores[:, 1], rtol=1e-12, atol=1e-14)
        for name in ("coefficients", "bias", "sums"):
            assert_close(getattr(form, name), getattr(expected, name), rtol=1e-12, atol=1e-14)


def test_last_call_of_a_layer_that_runs_twice_counts() -> None:
    tied, inputs = network(), images()
    untied = Untied().double().eval()
    untied.load_state_dict(tied.state_dict())
    expected = linear_form(untied, inputs, 1, untied.second)
    with pytest.warns(UserWarning, match=r"ReLU runs 2 times; its map is that of its last call"):
        form = linear_form(tied, inputs, 1, tied.get_submodule("relu"))
    for name in ("coefficients", "activations", "bias", "score"):
        assert_close(getattr(form, name), getattr(expected, name), rtol=0, atol=1e-14)
    assert_close(form.residual, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-13)


def test_error_after_success_is_as_clear_as_before() -> None:
    """An attribution object survives an error."""
    model, inputs = network(), images()
    attribution = LayerScoreMap(model, model.get_submodule("conv1"))
    before = copy.deepcopy(attribution.attribute(inputs, 1))
    with pytest.raises(ValueError, match=r"inputs must be finite"):
        attribution.attribute(with_value(math.nan), 1)
    assert_close(attribution.attribute(inputs, 1), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        (Tensor.to_sparse, r"layout torch\.sparse_coo"),
        (lambda inputs: inputs[:, 0].to_sparse_csr(), r"layout torch\.sparse_csr"),
        (lambda inputs: inputs.to("meta"), "the device meta, without any"),
        (lambda inputs: torch.nested.as_nested_tensor(list(inputs), layout=torch.jagged), r"layout torch\.jagged"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning", "ignore:The PyTorch API of nested:UserWarning")
def test_inputs_are_dense_tensors_of_numbers(made: Callable[[Tensor], Tensor], kind: str) -> None:
    model, odd = piecewise_linear(), made(images())
    for attribute in (ScoreMap(model).attribute, lambda *given: linear_form(model, *given)):
        with pytest.raises(TypeError, match=rf"inputs must be dense tensors of numbers, got one (of|on) {kind}"):
            attribute(odd, 1)


CHANNELS: dict[str, Callable[[nn.Sequential, Any], object]] = {
    "map": lambda m, dim: LayerScoreMap(m, m[0]).attribute(images(), 1, channel_dim=dim),
    "all labels": lambda m, dim: LayerScoreMap(m, m[0]).attribute_targets(images(), channel_dim=dim),
    "form": lambda m, dim: linear_form(m, images(), 1, m[0]).score_map(dim),
    "neuron": lambda m, dim: NeuronScoreMap(m, m[2]).attribute(
        images(), 1, to_layer=m[0], attr_dim_summation=True, channel_dim=dim
    ),
}


@pytest.mark.parametrize("call", CHANNELS)
@pytest.mark.parametrize("dim", [4, -5, 0, -4, "1", 1.0, True, (1,)])
def test_a_dimension_that_holds_no_channels_is_named(call: str, dim: object) -> None:
    kind, match = TypeError, rf"channel_dim must be an integer, got {re.escape(repr(dim))}\. Leave it out"
    if type(dim) is int:
        kind, match = ValueError, rf"channel_dim must be .* from -4 to 3 .*, got {dim} for a layer of \(2, 4, 4, 4\)"
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 3)).double().eval()
    with pytest.raises(kind, match=match):
        CHANNELS[call](model, dim)


def test_images_that_do_not_come_first_leave_the_first_dimension_free() -> None:
    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1).T  # (numbers, N)

    layer = Layer()
    model, x = lambda x: layer(x).T, images()
    found = LayerScoreMap(model, layer).attribute(x, 1, channel_dim=0)
    assert_close(found, x.flatten(1)[:, 1][None], rtol=0, atol=0)
