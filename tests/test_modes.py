"""Modes that a model runs under, and those it switches on itself: what it computes under them is what is explained."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from captum_scoremap import LayerScoreMap, bias_terms, freeze, linear_form
from tests.between import EXACT, assert_exact, between, some_images


class Under(nn.Module):
    """A model that runs another one in a context."""

    def __init__(self, model: nn.Module, context: Callable[[], torch.no_grad]) -> None:
        super().__init__()
        self.model, self.context = model, context

    def forward(self, x: Tensor) -> Tensor:
        with self.context():
            return self.model(x)


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "function", [torch.relu, lambda x: x.relu_(), lambda x: (x[:, :2].mul_(x.sigmoid()[:, :2]), x)[1]]
)
def test_models_that_switch_gradients(
    context: Callable[[], torch.no_grad], function: Callable[[Tensor], Tensor]
) -> None:
    plain, images = between(function), some_images()
    model = Under(plain, context)
    form, expected = linear_form(model, images, 1, plain.conv), linear_form(plain, images, 1, plain.conv)
    assert_close(form.coefficients, expected.coefficients, **EXACT)
    assert_close(form.bias, expected.bias, **EXACT)
    assert_exact(plain, plain.conv, images)
    maps = LayerScoreMap(model, plain.conv).attribute_targets(images)
    assert_close(maps, LayerScoreMap(plain, plain.conv).attribute_targets(images), **EXACT)
    assert_close(freeze(model, images)(images), freeze(plain, images)(images), **EXACT)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_are_one_operation_under_inference_mode(bias: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(4, 6, bias=bias), nn.ReLU(), nn.Linear(6, 3, bias=bias)).double()
    inputs = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4)
    found, expected = bias_terms(Under(plain, torch.inference_mode), inputs, 1), bias_terms(plain, inputs, 1)
    assert len(found) == 2 * bias
    for name, share in expected.items():
        assert_close(found[f"model.{name}"], share, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_the_call_and_what_it_remembers(dtype: torch.dtype) -> None:
    """Parameters that an earlier call cast are taken from a store that no operation reads."""
    model, images = between(torch.relu).float(), some_images().float()
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        score = model(images)[:, 1].float()
        for layer in (None, model.conv):
            form = linear_form(model, images, 1, layer)
            assert_close(form.score.float(), score, rtol=2e-2, atol=2e-2)
            assert_close((form.sums + form.bias).float(), score, rtol=2e-2, atol=2e-2)
        total = sum(bias_terms(model, images, 1).values())
    assert_close(torch.as_tensor(total).float(), linear_form(model, images, 1).bias, rtol=2e-2, atol=2e-2)
    assert form.coefficients.abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore:`torch.jit:")
@pytest.mark.parametrize("compiler", [torch.jit.script, lambda m: torch.jit.trace(m, some_images())])
def test_scripted_parts_are_seen_but_are_no_layers(compiler: Callable[[nn.Module], nn.Module]) -> None:
    inner = between(torch.relu).conv
    model = nn.Sequential(compiler(inner), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3).double())
    plain, images = nn.Sequential(inner, *model[1:]), some_images()
    assert_exact(model, model[1], images)
    assert_close(linear_form(model, images, 1).coefficients, linear_form(plain, images, 1).coefficients, **EXACT)
    assert_close(freeze(model, images)(0 * images)[:, 1], linear_form(plain, images, 1).bias, **EXACT)
    with pytest.raises(TypeError, match="layer must be a model whose operations can be seen, got a scripted one"):
        linear_form(model, images, 1, model[0])


@pytest.mark.filterwarnings("ignore:`torch.jit:")
@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_scripted_model_of_a_file_is_explained_in_a_function_as_its_error_says(is_frozen: bool) -> None:
    plain, images, file = between(torch.relu), some_images(), io.BytesIO()
    script = torch.jit.script(nn.Sequential(plain.conv, nn.ReLU(), nn.Flatten(), plain.head).eval())
    torch.jit.save(torch.jit.freeze(script) if is_frozen else script, file)
    file.seek(0)
    model = torch.jit.load(file)
    with pytest.raises(TypeError, match=r"of a file, which has none, call it in a function: lambda x: model\(x\)\.$"):
        linear_form(model, images, 1)
    found, expected = linear_form(lambda x: model(x), images, 1), linear_form(plain, images, 1)
    for name in ("coefficients", "bias", "score"):
        assert_close(getattr(found, name), getattr(expected, name), **EXACT)
