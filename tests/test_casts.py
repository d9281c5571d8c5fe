"""Casts: to 8 bits they are quantization, to 16 arithmetic of that type, to whole numbers constants."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from captum_scoremap import LayerScoreMap, compile_map, freeze, linear_form
from tests.between import assert_exact, between, some_images

KINDS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
FEW = torch.float8_e4m3fn


def canvas(x: Tensor) -> Tensor:
    """Eight bits written beside plain numbers."""
    found = torch.zeros_like(x)
    found[:, :2], found[:, 2:] = x[:, :2].to(FEW), x[:, 2:].to(FEW)
    return found


def stored(x: Tensor) -> Tensor:
    cache = torch.zeros(x.shape, dtype=FEW)
    cache.copy_(x)
    return cache.to(x.dtype)


# The same as a cast to eight bits and back.
CASTS: dict[str, Callable[[Tensor], Tensor]] = {
    "to": lambda x: x.to(FEW).to(x.dtype),
    "type": lambda x: x.type(FEW).double(),
    "viewed": lambda x: x.to(FEW).transpose(1, 2).flatten(1).to(x.dtype).view(2, 4, 4, 4).transpose(1, 2),
    "in another layout": lambda x: x.to(FEW).contiguous(memory_format=torch.channels_last).to(x.dtype),
    "in parts": lambda x: torch.cat([x[:, :1].to(FEW), x.to(FEW)[:, 1:]], 1).to(x.dtype),
    "by index": lambda x: x.to(FEW)[:, [3, 2, 1, 0]].to(x.dtype).flip(1),
    "beside constants": lambda x: torch.cat([x.to(FEW), torch.ones(2, 4, 4, 4).to(FEW)]).to(x.dtype)[:2],
    "written to plain numbers": canvas,
    "written to eight bits": stored,
    "copied": lambda x: torch.zeros(x.shape, dtype=FEW).copy_(x.to(FEW)).to(x.dtype),
    "by a primitive": lambda x: torch.ops.prims.convert_element_type(x.to(FEW), x.dtype),
}


@pytest.mark.parametrize("name", CASTS)
def test_a_cast_to_eight_bits_is_passed_straight_through_and_what_it_rounds_is_a_constant(name: str) -> None:
    images, model, plain = some_images(), between(CASTS[name]), between(lambda x: x)
    assert_exact(model, model.conv, images)
    form, expected = linear_form(model, images, 1), linear_form(plain, images, 1)
    assert_close(form.coefficients, expected.coefficients)
    assert not torch.allclose(form.bias, expected.bias, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_frozen_model_of_a_cast_is_affine(kind: torch.dtype) -> None:
    images, model = some_images(), between(lambda x: x.to(kind).to(x.dtype))
    assert_exact(model, model.conv, images)
    frozen = freeze(model, images)
    assert_close(frozen(images), model(images))
    assert_close(frozen(3 * images) - frozen(images), 2 * (frozen(2 * images) - frozen(images)))


def test_a_product_of_eight_bits_goes_by_the_numbers_that_they_stand_for() -> None:
    weight = torch.linspace(-1, 1, 256).reshape(16, 16).to(FEW).t()
    scales = torch.tensor(0.5), torch.tensor(2.0)

    def scaled(x: Tensor) -> Tensor:
        flat = x.reshape(8, 16)
        found = torch._scaled_mm(flat.to(FEW), weight, *scales, out_dtype=torch.float32)
        return found.reshape(x.shape)

    images, model = some_images().float(), between(scaled).float()
    form = linear_form(model, images, 1)
    assert_close(form.sums + form.bias, form.score, rtol=1e-5, atol=1e-5)
    plain = between(lambda x: (x.reshape(8, 16) @ weight.to(x.dtype)).reshape(x.shape)).float()
    assert_close(form.coefficients, linear_form(plain, images, 1).coefficients)


class Eight(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to(FEW)


def test_maps_of_a_layer_that_returns_eight_bits_and_compiled_maps() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Eight(), Back(), nn.Flatten(), nn.Linear(64, 3)).eval()
    images = some_images().float()
    form = linear_form(model, images, 1, model[1])
    assert_close(form.activations, model[:2](images).float())
    assert_close(form.sums + form.bias, form.score)
    method = LayerScoreMap(model, model[0])
    compiled = compile_map(method, images, 1, backend="graph")
    assert_close(compiled(images + 0.1, 1), method.attribute(images + 0.1, 1))


class Back(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def test_a_compiled_map_of_fake_quantization_is_the_eager_one_where_other_numbers_are_out_of_range() -> None:
    model = between(lambda x: torch.fake_quantize_per_tensor_affine(x, 0.01, 0, -128, 127)).float()
    images = some_images().float()
    method = LayerScoreMap(model, model.conv)
    compiled = compile_map(method, 0.1 * images, 1, backend="graph")
    assert_close(compiled(10 * images, 1), method.attribute(10 * images, 1))


def part(x: Tensor) -> Tensor:
    cache = torch.zeros(x.shape, dtype=FEW)
    cache[:, :2] = x[:, :2]
    return cache.to(x.dtype)


def seen_elsewhere(x: Tensor) -> Tensor:
    cache = torch.zeros(x.shape, dtype=FEW)
    row = cache.view(2, -1)
    cache.copy_(x.to(FEW))
    return row.to(x.dtype).view_as(x)


REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "a part": part,
    "seen elsewhere": seen_elsewhere,
    "a primitive": lambda x: torch.ops.prims.convert_element_type(x, FEW).to(x.dtype),
}


@pytest.mark.parametrize("name", REFUSED)
def test_eight_bits_written_where_others_read_them_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match=r"made by a cast, in memory of their own, got torch.float8_e4m3fn from"):
        linear_form(between(REFUSED[name]), some_images(), 1)


WIDTHS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}


@pytest.mark.parametrize("kind", WIDTHS)
def test_what_is_cast_to_a_type_of_arithmetic_is_as_exact_as_that_type(kind: torch.dtype) -> None:
    images, model = some_images(), between(lambda x: x.to(kind).to(x.dtype))
    form, plain = linear_form(model, images, 1), linear_form(between(lambda x: x), images, 1)
    within = 8 * 2.0 ** -WIDTHS[kind]
    assert form.residual.abs().max() < within
    assert_close(form.coefficients, plain.coefficients, rtol=within, atol=within)


@pytest.mark.parametrize("kind", [torch.int8, torch.int32, torch.int64, torch.bool])
def test_whole_numbers_are_constants(kind: torch.dtype) -> None:
    images, alone = some_images(), between(lambda x: x.to(kind).to(x.dtype))
    with pytest.warns(UserWarning, match="a map is zero everywhere: the values of these operations are frozen"):
        form = linear_form(alone, images, 1)
    assert_close(form.bias, form.score)
    beside = between(lambda x: x - x.to(kind).to(x.dtype))
    assert_exact(beside, beside.conv, images)
    assert_close(linear_form(beside, images, 1).coefficients, linear_form(between(lambda x: x), images, 1).coefficients)
