"""Faster ways and narrower holds: what the plain ones give, bit for bit or, of convolutions, but for rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from captum_scoremap import CompleteScoreMap, LayerScoreMap, ScoreMap, freeze, linear_form
from captum_scoremap.rules import Call, MaxPool, Value
from captum_scoremap.rules import activations as plain_ways
from captum_scoremap.speed import FAST, Packed, convolutions, convolved_otherwise, packed, plainly, transposed_otherwise
from captum_scoremap.speed.packed import Bits

LAYOUTS = (torch.contiguous_format, torch.channels_last)


class Network(nn.Module):
    """Everything that is held in fewer bytes, and everything that is chosen by bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU6(), nn.LeakyReLU(0.1), nn.Hardshrink(0.2))
        self.ends = nn.ModuleList([nn.PReLU(8), nn.Hardswish(), nn.AdaptiveMaxPool2d(5)])
        self.head = nn.Linear(8 * 25, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.maximum(self.body(x), self.ends[0](-x)).clamp(-1, 2)
        scores: Tensor = self.head(self.ends[2](self.ends[1](x) + x.abs()).flatten(1))
        return scores


@pytest.fixture(params=LAYOUTS, ids=["rows last", "channels last"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return Network().double().eval().to(memory_format=request.param)


@pytest.mark.parametrize("together", [1, 3])
def test_maps_are_those_of_the_plain_way_bit_for_bit(
    model: Network, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    monkeypatch.setattr(packed, "_LARGE", 8)
    monkeypatch.setattr(packed, "_CHUNK", 64)
    images = torch.randn(together, 3, 24, 16, generator=generator, dtype=torch.float64) * 3

    def everything() -> list[Tensor]:
        form = linear_form(model, images, 1, model.stem)
        frozen = freeze(model, images)
        return [
            ScoreMap(model).attribute(images, 2),
            *LayerScoreMap(model, [model.stem, model.body]).attribute(images, 0),
            LayerScoreMap(model, model.body).attribute_targets(images),
            CompleteScoreMap(model).attribute(images, 3),
            CompleteScoreMap(model, model.ends[1]).attribute(images, 3),
            form.coefficients,
            form.bias,
            frozen(images.flip(3)),
            *frozen.switches.values(),
        ]

    found = everything()
    with plainly():
        assert not FAST
        expected = everything()
    assert "pack" in FAST
    for at in (4, 3):  # the default complete map, and labels together: sums over memory that is laid out otherwise
        assert_close(found.pop(at), expected.pop(at), rtol=1e-13, atol=1e-15)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@given(
    shape=st.tuples(st.integers(1, 3), st.sampled_from([8, 16]), st.integers(1, 9), st.integers(1, 9)),
    layout=st.sampled_from(LAYOUTS),
    chunk=st.sampled_from([8, 64, 2**20]),
    seed=st.integers(0, 99),
)
def test_a_mask_comes_out_as_it_went_in(
    shape: tuple[int, ...], layout: torch.memory_format, chunk: int, seed: int
) -> None:
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(memory_format=layout) > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "_LARGE", 0)
        patch.setattr(packed, "_CHUNK", chunk)
        held = packed.pack(mask)
        assert isinstance(held, Bits)
        assert torch.equal(held.tensor, mask)
        assert held.tensor.stride() == mask.stride()


def test_masks_with_gaps_or_of_an_odd_number_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_LARGE", 0)
    whole = torch.ones(4, 8, 4, 4, dtype=torch.bool)
    for mask in (whole[..., ::2], torch.ones(3, 3, dtype=torch.bool), whole[:1].expand(4, 8, 4, 4), whole.byte()):
        assert packed.pack(mask) is mask
    assert isinstance(packed.pack(whole.transpose(0, 2)), Bits)
    assert isinstance(packed.pack(whole[1:]), Bits)
    monkeypatch.setattr(packed, "_LARGE", 10**6)
    assert packed.pack(whole) is whole


POOLS = {
    "two by two": (torch.ops.aten.max_pool2d_with_indices.default, ([2, 2],), MaxPool(2), torch.uint8),
    "padded, overlapping": (
        torch.ops.aten.max_pool2d_with_indices.default,
        ([3, 3], [2, 2], [1, 1]),
        MaxPool(2),
        torch.uint8,
    ),
    "dilated": (
        torch.ops.aten.max_pool2d_with_indices.default,
        ([3, 2], [1, 2], [0, 1], [4, 1], True),
        MaxPool(2),
        torch.int16,
    ),
    "three axes": (torch.ops.aten.max_pool3d_with_indices.default, ([2, 2, 2],), MaxPool(3), torch.int16),
    "adaptive": (torch.ops.aten.adaptive_max_pool2d.default, ([3, 4],), MaxPool(2, adaptive=True), torch.int16),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", POOLS)
def test_switches_come_out_as_they_went_in(name: str, layout: torch.memory_format, generator: torch.Generator) -> None:
    operation, arguments, rule, dtype = POOLS[name]
    shape = (2, 3, 4, 31, 35) if name == "three axes" else (2, 3, 31, 35)
    x = torch.randn(shape, generator=generator)
    x = x if x.dim() == 5 else x.to(memory_format=layout)
    output = operation(x, *arguments)
    call = Call(operation, (x, *arguments), {}, (x,), (Value(x),), output)
    state = rule.packed(call, rule.freeze(call))
    assert isinstance(state, Packed)
    assert state._narrow.dtype == dtype  # type: ignore[attr-defined]
    assert torch.equal(state.tensor, output[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bytes_choose_as_booleans_do(dtype: torch.dtype, generator: torch.Generator) -> None:
    x = (torch.randn(5, 7, generator=generator) * 4).clamp(0, 6).to(dtype)
    coefficients = torch.randn(5, 7, generator=generator).to(dtype)
    masks = [x > 0, x >= 6]
    cases = {
        "differs": [(x, 0.0), (x, 6.0)],
        "masked": [(coefficients, masks[0]), (coefficients, sum(mask.byte() for mask in masks))],
        "times": [(coefficients, x.clone())],
        "which_piece": [(masks, dtype)],
        "piece": [(masks[0], number, 2, dtype) for number in range(2)]
        + [(sum(mask.byte() for mask in masks), number, 3, dtype) for number in range(3)],
    }
    for name, calls in cases.items():
        fast, plain_way = FAST[name], getattr(plain_ways, name).__wrapped__
        for arguments in calls:
            expected = plain_way(*arguments)
            found = fast(*arguments)
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)


def test_large_masks_take_an_eighth(generator: torch.Generator) -> None:
    mask = torch.rand(2**22, generator=generator) > 0.5
    held = packed.pack(mask)
    assert isinstance(held, Bits)
    assert held._bits.untyped_storage().nbytes() == 2**19


GEOMETRIES = {  # kernel, stride, padding, and whether it is done otherwise if there are few channels
    "pointwise": (1, 1, 0, True),
    "padded": (1, 1, 1, False),
    "pointwise with a stride": (1, 2, 0, False),
    "several cells": (3, 1, 1, False),
    "patches": (4, 4, 0, True),
    "the first of a network": (7, 2, 3, True),
    "of AlexNet": (11, 4, 2, True),
    "without padding": (5, 2, 0, True),
    "three phases": (7, 3, 1, True),
    "narrow": (3, 2, 1, False),
}


@pytest.mark.parametrize(("axes", "layout"), [(1, LAYOUTS[0]), (2, LAYOUTS[0]), (2, LAYOUTS[1]), (3, LAYOUTS[0])])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_convolutions_are_those_of_pytorch(
    name: str, axes: int, layout: torch.memory_format, generator: torch.Generator
) -> None:
    size, step, pad, is_other = GEOMETRIES[name]
    geometry = ([step] * axes, [pad] * axes, [1] * axes, False, [0] * axes, 1)
    for more in range(step):  # cells that no kernel reaches at the end
        sides = [size + 2 * step + more + axis for axis in range(axes)]
        x, weight = (
            torch.randn(*shape, *some, generator=generator, dtype=torch.float64)
            for shape, some in (((2, 3), sides), ((5, 3), [size] * axes))
        )
        x, weight = (one.contiguous(memory_format=layout) for one in (x, weight))
        bias = torch.randn(5, generator=generator, dtype=torch.float64)
        output = torch.ops.aten.convolution(x, weight, bias, *geometry)
        forward = convolved_otherwise(x, weight, bias, *geometry)
        assert (forward is not None) == (name == "pointwise")
        if forward is not None:
            assert_close(forward, output, rtol=1e-12, atol=1e-13)
            assert forward.stride() == output.stride()
        coefficients = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        coefficients = coefficients.contiguous(memory_format=layout)
        mask = [True, False, False]
        expected, _, _ = torch.ops.aten.convolution_backward(coefficients, x, weight, None, *geometry, mask)
        found = transposed_otherwise(coefficients, x.shape, weight, *geometry)
        assert (found is not None) == is_other
        if found is not None:
            assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_convolutions_that_pytorch_does_faster_are_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    cells, weight = torch.ones(1, 4, 3, 3), torch.ones(6, 4, 1, 1)
    assert convolved_otherwise(cells, weight, None, *plain) is not None
    assert convolved_otherwise(cells, weight, None, *plain[:3], True, [0, 0], 1) is None
    assert convolved_otherwise(cells, torch.ones(6, 2, 1, 1), None, *plain[:5], 2) is None
    assert convolved_otherwise(cells[..., ::2], weight, None, *plain) is None
    assert convolved_otherwise(cells.to("meta"), weight.to("meta"), None, *plain) is None
    monkeypatch.setattr(convolutions, "_FEW_CELLS", 8)
    assert convolved_otherwise(cells, weight, None, *plain) is None
    assert transposed_otherwise(torch.ones(1, 6, 3, 3), cells.shape, weight, *plain) is None
    stem = ([2, 2], [3, 3], [1, 1], False, [0, 0], 1)
    coefficients = torch.ones(1, 6, 4, 4)
    assert transposed_otherwise(coefficients, (1, 4, 8, 8), torch.ones(6, 4, 7, 7), *stem) is not None
    assert transposed_otherwise(coefficients, (1, 5, 8, 8), torch.ones(6, 5, 7, 7), *stem) is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_maps_of_networks_with_such_convolutions(layout: torch.memory_format, generator: torch.Generator) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 7, 2, 3), nn.ReLU(), nn.Conv2d(8, 12, 1), nn.Hardswish(), nn.Conv2d(12, 12, 3, groups=12)),
        *(nn.Conv2d(12, 6, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 10 * 8, 4)),
    )
    model = model.double().eval().to(memory_format=layout)
    images = torch.randn(2, 3, 24, 20, generator=generator, dtype=torch.float64)

    def everything() -> list[Tensor]:
        maps = LayerScoreMap(model, [model[2], model[4]]).attribute(images, 1)
        return [ScoreMap(model).attribute(images, 2), *maps, LayerScoreMap(model, model[2]).attribute_targets(images)]

    found = everything()
    with plainly():
        expected = everything()
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, rtol=1e-11, atol=1e-13)
