"""Quantized and fake-quantized networks: scores of kernels of integers, by rules of the real numbers behind them."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.quantization as ao
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx
from torch.testing import assert_close

from captum_scoremap import (
    CompleteScoreMap,
    LayerScoreMap,
    UnsupportedOperationError,
    bias_terms,
    freeze,
    linear_form,
)
from captum_scoremap.rules import TANGENT, Rounded

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization"),
    pytest.mark.filterwarnings("ignore:.*reduce_range"),
    pytest.mark.filterwarnings("ignore:.*TypedStorage"),
    pytest.mark.filterwarnings("ignore:.*quantized"),
    pytest.mark.skipif("x86" not in torch.backends.quantized.supported_engines, reason="needs kernels for x86"),
]

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # kernels of integers know float32 alone


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Blocks(nn.Module):
    """A convolution with norm and ReLU, a shortcut, pooling, a product with a gate, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.gate, self.pool, self.head = nn.Conv2d(6, 6, 1), nn.MaxPool2d(2), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.pool(F.relu(x + self.second(x)))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.head(torch.cat([x[:, :3], F.hardswish(x[:, 3:])], 1).mean((2, 3)))


class Eager(nn.Module):
    """As the tutorials of eager quantization have it."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = ao.QuantStub(), ao.DeQuantStub()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
        self.again, self.clip = nn.Conv2d(6, 6, 3, padding=1), nn.ReLU6(inplace=True)
        self.sum = torch.ao.nn.quantized.FloatFunctional()
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(self.into(x))))
        x = self.sum.add(x, self.clip(self.again(x)))
        return self.out(self.head(self.pool(x).flatten(1)))


def spread(model: nn.Module) -> nn.Module:
    """Weights and norms that keep the image's differences."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.4)
    return model.eval()


def eager(mode: str) -> nn.Module:
    model = spread(Eager())
    model.qconfig = ao.get_default_qconfig("x86")
    if mode == "aware":
        model.qconfig = ao.get_default_qat_qconfig("x86")
    model = ao.fuse_modules(model, [["conv", "norm", "relu"]])
    model = ao.prepare_qat(model.train()) if mode == "aware" else ao.prepare(model)
    model(images())
    if mode == "aware":
        model.apply(ao.disable_observer)
    model.eval()
    return ao.convert(model) if mode == "static" else model


def traced(convert: Callable[[Any], nn.Module]) -> nn.Module:
    model = prepare_fx(spread(Blocks()), ao.get_default_qconfig_mapping("x86"), (images(),))
    model(images())
    return convert(model)


def dynamic(dtype: torch.dtype) -> nn.Module:
    layers = nn.Flatten(), nn.Linear(432, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 3)
    return ao.quantize_dynamic(spread(nn.Sequential(*layers)), {nn.Linear}, dtype=dtype)  # type: ignore[no-any-return]


class FakeByHand(nn.Module):
    """Fake quantization of the image and the weights, one scale for all or one for each channel."""

    def __init__(self, by_channel: bool) -> None:
        super().__init__()
        self.conv, self.head, self.by_channel = nn.Conv2d(3, 6, 3), nn.Linear(6, 3), by_channel

    def fake(self, x: Tensor, axis: int) -> Tensor:
        if self.by_channel:
            scales = torch.linspace(0.02, 0.04, x.shape[axis])
            return torch.fake_quantize_per_channel_affine(x, scales, torch.zeros_like(scales), axis, -64, 63)
        return torch.fake_quantize_per_tensor_affine(x, 0.03, 3, -64, 63)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.fake(x, 1), self.fake(self.conv.weight, 0), self.conv.bias)
        return self.head(self.fake(x.relu(), 1).mean((2, 3)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "static, eager": lambda: eager("static"),
    "observed, eager": lambda: eager("observed"),
    "quantization-aware": lambda: eager("aware"),
    "static, traced": lambda: traced(convert_fx),
    "observed, traced": lambda: traced(lambda model: model),
    "reference, traced": lambda: traced(convert_to_reference_fx),
    "dynamic": lambda: dynamic(torch.qint8),
    "dynamic, half": lambda: dynamic(torch.float16),
    "fake by hand": lambda: spread(FakeByHand(False)),
    "fake by hand, by channel": lambda: spread(FakeByHand(True)),
}
FAKE = ("quantization-aware", "fake by hand", "fake by hand, by channel")

each_network = pytest.mark.parametrize("name", NETWORKS)


@each_network
def test_the_form_is_exact_and_its_constants_add_up(name: str) -> None:
    model, inputs = NETWORKS[name](), images()
    expected = model(inputs)[:, 1]
    form = linear_form(model, inputs, 1)
    assert_close(form.score, expected, rtol=0, atol=0)
    assert_close(form.sums + form.bias, form.score, **CLOSE)
    assert form.coefficients.abs().max() > 1e-4
    assert_close(sum(bias_terms(model, inputs, 1).values()), form.bias, **CLOSE)
    assert_close(freeze(model, inputs)(inputs)[:, 1], expected, **CLOSE)
    complete, placeless = CompleteScoreMap(model, "image").attribute(inputs, 1, return_placeless=True)
    assert_close(complete.sum((1, 2, 3)) + placeless, expected, **CLOSE)


def copied(output: Any) -> Any:
    return output.clone() if isinstance(output, Tensor) else output  # the next layer may change it in place


@each_network
def test_it_is_exact_at_every_layer(name: str) -> None:
    model, inputs = NETWORKS[name](), images(1)
    seen = 0
    for _, layer in model.named_modules():
        outputs: list[Any] = []
        handle = layer.register_forward_hook(lambda _layer, _inputs, output, kept=outputs: kept.append(copied(output)))
        expected = model(inputs)[:, 1]
        handle.remove()
        if layer is model or len(outputs) != 1 or not isinstance(outputs[0], Tensor):
            continue
        form = linear_form(model, inputs, 1, layer)
        assert_close(form.score, expected, rtol=0, atol=0)
        assert_close(form.sums + form.bias, form.score, **CLOSE)
        numbers = outputs[0].dequantize() if outputs[0].is_quantized else outputs[0]
        assert_close(form.activations, numbers, **CLOSE)
        seen += 1
    assert seen >= 1


@pytest.mark.parametrize("name", FAKE)
def test_coefficients_are_those_that_training_goes_by(name: str) -> None:
    """Autograd passes fake quantization straight through where it is in range."""
    model, inputs = NETWORKS[name](), images()
    leaf = inputs.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    assert_close(linear_form(model, inputs, 1, rules=TANGENT).coefficients, expected, **CLOSE)


class Saturated(nn.Module):
    """Integers' kernels, and by hand what they stand for: numbers out of range have no slope."""

    def __init__(self, zero_point: int) -> None:
        super().__init__()
        self.zero_point = zero_point
        self.layer = torch.ao.nn.quantized.Linear(6, 3)
        weight = torch.quantize_per_tensor(torch.linspace(-1, 1, 18).view(3, 6), 0.01, 0, torch.qint8)
        self.layer.set_weight_bias(weight, torch.tensor([0.1, -0.2, 0.3]))
        self.layer.scale, self.layer.zero_point = 0.02, 128

    def forward(self, x: Tensor) -> Tensor:
        x = torch.quantize_per_tensor(x, 0.01, self.zero_point, torch.quint8)
        return self.layer(x.relu()).dequantize()

    def by_hand(self, x: Tensor, label: int) -> Tensor:
        """Coefficients of a label, from masks."""
        weight = self.layer.weight().dequantize()
        integers = torch.round(x / 0.01) + self.zero_point
        inside = (integers >= 0) & (integers <= 255) & (integers > self.zero_point)  # ReLU sees what was rounded
        numbers = ((integers.clamp(0, 255) - self.zero_point) * 0.01).clamp(min=0)
        reached = torch.round((numbers @ weight.T + self.layer.bias()) / 0.02) + 128
        out = ((reached >= 0) & (reached <= 255))[:, label]
        return inside.float() * weight[label] * out[:, None]


@pytest.mark.parametrize("zero_point", [0, 40])
@pytest.mark.parametrize("label", [0, 1, 2])
def test_what_is_out_of_range_has_no_slope(zero_point: int, label: int) -> None:
    model = Saturated(zero_point)
    x = torch.tensor([[0.5, -0.3, 1.2, 3.1, 0.004, 2.0], [2.4, 2.3, 2.2, 2.5, 2.4, 2.1]])
    form = linear_form(model, x, label)
    assert_close(form.coefficients, model.by_hand(x, label), rtol=1e-6, atol=1e-6)
    assert_close(form.sums + form.bias, model(x)[:, label], **CLOSE)


# The first and the last integers among them: -128 and 127 less a zero point of 10.
STEPS = torch.tensor([-900.0, -143.0, -138.0, -130.0, -101.0, -2.0, 0.0, 3.0, 101.0, 117.0, 122.0, 150.0, 900.0])
SCALES, ZERO_POINTS = torch.tensor([0.02, 0.01, 0.04]), torch.tensor([10, 0, -20])


@pytest.mark.parametrize(
    ("per", "scale", "zero_point", "axis"),
    [("tensor", 0.02, 10, ()), ("tensor", 0.5, -3, ()), ("channel", SCALES, ZERO_POINTS, (1,))],
)
def test_what_is_out_of_the_range_of_exported_integers_has_no_slope(
    per: str, scale: Any, zero_point: Any, axis: tuple[int, ...]
) -> None:
    import torch.ao.quantization.fx._decomposed  # registers the operations

    operations = torch.ops.quantized_decomposed
    quantize, read = (getattr(operations, f"{name}_per_{per}") for name in ("quantize", "dequantize"))
    options = scale, zero_point, *axis, -128, 127, torch.int8
    x = STEPS[:, None] * torch.as_tensor(scale).reshape(1, -1)  # a row of numbers of steps for each channel
    form = linear_form(lambda x: read(quantize(x, *options), *options).sum(1), x)
    integers = torch.round(x / scale) + zero_point
    assert_close(form.coefficients, ((integers >= -128) & (integers <= 127)).float(), rtol=0, atol=0)
    assert_close(form.sums + form.bias, form.score, **CLOSE)


def test_what_is_out_of_the_range_of_integers_has_no_slope() -> None:
    x = 0.5 * STEPS[:, None]
    form = linear_form(lambda x: torch.quantize_per_tensor(x, 0.5, 10, torch.qint8).dequantize().sum(1), x)
    assert_close(form.coefficients, ((STEPS >= -138) & (STEPS <= 117)).float()[:, None], rtol=0, atol=0)
    assert_close(form.sums + form.bias, form.score, **CLOSE)


QUANTIZED: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu in place": torch.relu_,
    "hardtanh": lambda q: F.hardtanh(q, -0.5, 0.5),
    "leaky relu": lambda q: torch.ops.quantized.leaky_relu(q, 0.1, False, 0.02, 60),
    "elu": lambda q: torch.ops.quantized.elu(q, 0.02, 60),
    "hardswish": lambda q: torch.ops.quantized.hardswish(q, 0.02, 60),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softmax": lambda q: torch.ops.quantized.softmax(q, 1, 1 / 256, 0),
    "sum": lambda q: torch.ops.quantized.add(q, q.flip(1), 0.03, 60),
    "sum and relu": lambda q: torch.ops.quantized.add_relu(q, q.flip(1), 0.03, 0),
    "product": lambda q: torch.ops.quantized.mul(q, q.flip(1), 0.03, 60),
    "with a number": lambda q: torch.ops.quantized.mul(q, 0.5),
    "convolution of one dimension": lambda q: one_dimensional()(q.flatten(2))[..., None],
    "matrix product": lambda q: torch.ops.quantized.matmul(q, q.transpose(2, 3), 0.1, 60),
    "joined": lambda q: torch.ops.quantized.cat([q, q.flip(1)], 1, 0.03, 60),
    "max pooling": lambda q: F.max_pool2d(q, 2),
    "average pooling": lambda q: F.avg_pool2d(q, 2),
    "adaptive pooling": lambda q: F.adaptive_avg_pool2d(q, 2),
    "mean": lambda q: q.mean((2, 3), keepdim=True),
    "nearest": lambda q: F.interpolate(q, scale_factor=2.0),
    "bilinear": lambda q: F.interpolate(q, scale_factor=2.0, mode="bilinear", align_corners=False),
    "padding": lambda q: F.pad(q, (1, 1), value=0.1),
    "views": lambda q: q.permute(0, 2, 3, 1).reshape(2, 9, 4).transpose(1, 2).unflatten(2, (3, 3)),
    "parts": lambda q: q[:, 1:3, ::2],
    "batch norm": lambda q: torch.ops.quantized.batch_norm2d(
        q, torch.ones(4), torch.linspace(-1, 1, 4), torch.zeros(4), torch.ones(4), 1e-5, 0.03, 60
    ),
    "layer norm": lambda q: torch.ops.quantized.layer_norm(q, [3], torch.ones(3), torch.ones(3), 1e-5, 0.03, 60),
    "group norm": lambda q: torch.ops.quantized.group_norm(q, 2, torch.ones(4), torch.ones(4), 1e-5, 0.03, 60),
}


def one_dimensional() -> nn.Module:
    layer = torch.ao.nn.quantized.Conv1d(4, 5, 3, padding=1)
    weight = torch.quantize_per_tensor(torch.linspace(-1, 1, 60).view(5, 4, 3), 0.01, 0, torch.qint8)
    layer.set_weight_bias(weight, torch.linspace(-1, 1, 5))
    layer.scale, layer.zero_point = 0.05, 60
    return layer


@pytest.mark.parametrize("name", QUANTIZED)
def test_operations_between_quantized_tensors(name: str) -> None:
    def model(x: Tensor) -> Tensor:
        q = QUANTIZED[name](torch.quantize_per_tensor(x, 0.02, 60, torch.quint8))
        return (q.dequantize() * torch.linspace(1, 2, q[0].numel()).view(1, *q.shape[1:])).sum((1, 2, 3))

    inputs = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    form = linear_form(model, inputs)
    assert_close(form.score, model(inputs), rtol=1e-6, atol=1e-6)
    assert_close(form.sums + form.bias, form.score, **CLOSE)
    assert form.coefficients.abs().max() > 0
    assert_close(sum(bias_terms(model, inputs).values()), form.bias, **CLOSE)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "flattened": lambda q: q.clone().flatten(1),
    "pooled and flattened": lambda q: F.adaptive_avg_pool2d(q, 2).flatten(1),
    "of its memory": lambda q: q.clone().as_strided((2, 18), (36, 2), 1),
    "of its memory, after a sum": lambda q: torch.ops.quantized.add(q, q, 0.02, 60).as_strided((2, 18), (36, 2), 1),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", VIEWS)
def test_views_of_quantized_tensors_show_the_same_elements_in_any_layout(
    name: str, layout: torch.memory_format
) -> None:
    """Kernels of quantized tensors lay out what they return in their own way."""
    steps = torch.arange(72).view(2, 4, 3, 3)

    def model(x: Tensor) -> Tensor:
        found = VIEWS[name](torch.quantize_per_tensor(x, 0.02, 0, torch.quint8).contiguous(memory_format=layout))
        return (found.dequantize() * torch.linspace(1, 2, found.shape[1])).sum(1)

    inputs = 0.02 * (steps + 1.0)
    found = linear_form(model, inputs).coefficients
    for place in range(0, 72, 7):
        change = 0.24 * (steps == place)  # by twelve integers, which an average of four does not round away
        slope = (model(inputs + change) - model(inputs)).sum() / 0.24
        assert_close(found.flatten()[place], slope, rtol=0, atol=0.17)


def test_a_map_of_integers_is_near_that_of_real_numbers() -> None:
    plain, quantized = spread(Blocks()), traced(convert_fx)
    one = LayerScoreMap(plain, plain.first[2]).attribute(images(1), 1)
    other = LayerScoreMap(quantized, quantized.get_submodule("first.0")).attribute(images(1), 1)
    assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1] > 0.9


def test_a_quantizer_of_ones_own_passes_straight_through_by_a_rule() -> None:
    model = spread(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(600, 3)))
    by_hand = lambda x: model(torch.round(x / 0.1) * 0.1)  # noqa: E731
    inputs = images()
    with pytest.warns(UserWarning, match="a map is zero everywhere: .* round"):
        linear_form(by_hand, inputs, 1)
    form = linear_form(by_hand, inputs, 1, rules={"round": Rounded()})
    assert_close(form.score, by_hand(inputs)[:, 1], **CLOSE)
    assert_close(form.sums + form.bias, form.score, **CLOSE)
    rounded = torch.round(inputs / 0.1) * 0.1
    assert_close(form.coefficients, linear_form(model, rounded, 1).coefficients, **CLOSE)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.LSTM(36, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x.flatten(2).reshape(len(x), 12, 36))[0][:, -1])


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a dynamic LSTM": (
        lambda: ao.quantize_dynamic(spread(Recurrent()), {nn.LSTM}),
        "quantized_lstm in 'cells'\nExplain the model as it was before this part was quantized",
    ),
    "integers taken out": (
        lambda: lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8).int_repr().float().flatten(1)[:, :3],
        "int_repr",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_says_what_works(name: str) -> None:
    make, said = REFUSED[name]
    with pytest.raises(UnsupportedOperationError) as problem:
        linear_form(make(), images(), 1)
    assert said in str(problem.value)
    assert "Tangent()" not in str(problem.value)


torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")


def by_torchao(name: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao import quantization

        layers = nn.Flatten(), nn.Linear(432, 64), nn.ReLU(), nn.Linear(64, 3)
        model = spread(nn.Sequential(*layers))
        quantization.quantize_(model, getattr(quantization, name)())
    return model


@torchao
@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "IntxWeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_weights_that_torchao_quantized(name: str) -> None:
    model, inputs = by_torchao(name), images()
    form = linear_form(model, inputs, 1)
    assert_close(form.score, model(inputs)[:, 1], **CLOSE)
    assert_close(form.sums + form.bias, form.score, **CLOSE)
    leaf = inputs.clone().requires_grad_()
    assert_close(form.coefficients, torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)[0], **CLOSE)


@torchao
def test_integers_that_torchao_multiplies_are_refused() -> None:
    """Their values are frozen, the scales beside them are not: a map of the scales alone would mean nothing."""
    with pytest.raises(
        UnsupportedOperationError, match=r"(?s)quantized _int_mm in '1'.*before this part was quantized"
    ):
        linear_form(by_torchao("Int8DynamicActivationInt8WeightConfig"), images(), 1)


@torchao
def test_an_exported_network_with_integers_between() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization.pt2e import quantize_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        settings = x86.get_default_x86_inductor_quantization_config()
        quantizer = x86.X86InductorQuantizer().set_global(settings)
        model = quantize_pt2e.prepare_pt2e(torch.export.export(spread(Blocks()), (images(),)).module(), quantizer)
        model(images())
        model = quantize_pt2e.convert_pt2e(model)
        form = linear_form(model, images(), 1)
    assert_close(form.score, model(images())[:, 1], **CLOSE)
    assert_close(form.sums + form.bias, form.score, **CLOSE)
    plain = linear_form(spread(Blocks()), images(), 1)
    pair = torch.stack([form.sub_scores.flatten(), plain.sub_scores.flatten()])
    assert torch.corrcoef(pair)[0, 1] > 0.9
