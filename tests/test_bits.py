"""Masks of one bit: what is packed comes out as it went in, whatever the layout, type and number of gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from captum_scoremap import LayerScoreMap
from captum_scoremap.rules import bits
from captum_scoremap.rules.bits import Bits


def masked(shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator).relu()
    gradient = torch.randn(shape, generator=generator)
    return values.to(dtype, memory_format=layout), gradient.to(dtype)


@given(
    shape=st.tuples(st.integers(1, 3), st.sampled_from([8, 16]), st.integers(1, 9), st.integers(1, 9)),
    layouts=st.tuples(*[st.sampled_from([torch.contiguous_format, torch.channels_last])] * 2),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    step=st.sampled_from([8, 64, 2**20]),
    seed=st.integers(0, 99),
)
def test_a_product_with_the_mask_is_that_with_its_bits(
    shape: tuple[int, ...],
    layouts: tuple[torch.memory_format, torch.memory_format],
    dtype: torch.dtype,
    step: int,
    seed: int,
) -> None:
    values, gradient = masked(shape, layouts[0], dtype, seed)
    gradient = gradient.contiguous(memory_format=layouts[1])
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(bits, "_STRETCH", step)
        assert torch.equal(bits.in_stretches(values, Tensor.bool), values > 0)
        packed = Bits(values, Tensor.bool)
        assert torch.equal(packed.times(gradient), torch.where(values > 0, gradient, 0))


def test_a_gradient_that_repeats_itself_in_memory() -> None:
    values, _ = masked((2, 8, 4, 4), torch.contiguous_format, torch.float64, 0)
    gradient = torch.arange(16.0, dtype=torch.float64).view(2, 8, 1, 1).expand(2, 8, 4, 4)
    assert torch.equal(Bits(values, Tensor.bool).times(gradient), torch.where(values > 0, gradient, 0))


def test_values_with_gaps_or_an_odd_number_are_not_packed() -> None:
    values = torch.ones(4, 64, 128, 128)
    assert Bits.fit(values)
    assert Bits.fit(values.transpose(0, 2))
    assert not Bits.fit(values[..., ::2])
    assert not Bits.fit(torch.ones(3, 3, 3, 200001))
    assert not Bits.fit(torch.ones(8))


@pytest.mark.parametrize("activation", [torch.nn.ReLU(), torch.nn.ReLU6(inplace=True)])
def test_maps_of_many_labels_at_once_and_of_one_agree(
    activation: torch.nn.Module, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), activation, torch.nn.Flatten(), torch.nn.Linear(8 * 48 * 48, 4)
    )
    model = model.double().eval()
    image = 5 * torch.randn(1, 3, 48, 48, generator=generator, dtype=torch.float64)
    monkeypatch.setattr(bits, "_SMALL", 8)
    monkeypatch.setattr("captum_scoremap.rules.rule._LARGE", 8)
    layer = LayerScoreMap(model, model[0])
    packed = [layer.attribute(image, label) for label in range(4)]
    together = layer.attribute_targets(image)
    monkeypatch.setattr(Bits, "fit", staticmethod(lambda values: False))
    for label, one in enumerate(packed):
        assert torch.equal(one, layer.attribute(image, label))
        assert torch.allclose(one[0], together[0, label], rtol=1e-12, atol=1e-15)
