"""A small network with something between its layers, and what must hold of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from captum_scoremap import LayerScoreMap, ScoreMap, UnsupportedOperationError, bias_terms, freeze, linear_form

EXACT = {"rtol": 1e-12, "atol": 1e-13}


class Between(nn.Module):
    """A convolution, a function of its output (N, 4, 4, 4) that keeps the shape, and a linear head."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(64, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.conv(x)).flatten(1))


class Wrapped(nn.Module):
    """Any function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Turned(nn.Module):
    """A network that turns its images first."""

    def __init__(self, net: nn.Module, turn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.turn = net, turn

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.net(self.turn(x))
        return scores


def between(function: Callable[[Tensor], Tensor]) -> Between:
    """The network, always with the same parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Between(function).double().eval()


def some_images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def assert_exact(model: nn.Module, layer: nn.Module | None, images: Tensor, **kwargs: Any) -> None:
    """S = A·Y + B at the input and at a layer, the constants' shares are B, and all ways to the map agree."""
    with torch.no_grad():
        score = model(images)[:, 1]
    for site in (None, layer):
        form = linear_form(model, images, 1, site, **kwargs)
        assert_close(form.score, score, **EXACT)
        assert_close(form.sums + form.bias, score, **EXACT)
    shares = bias_terms(model, images, 1, **kwargs)
    total = sum(shares.values(), torch.zeros_like(score))
    assert_close(total, linear_form(model, images, 1, **kwargs).bias, **EXACT)
    if layer is not None:
        method = LayerScoreMap(model, layer, **kwargs)
        one = method.attribute(images, 1)
        assert_close(method.attribute_targets(images)[:, 1:2], one, **EXACT)


def assert_as_plain(function: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], **kwargs: Any) -> None:
    """A function between two layers has the linear form of the same function written plainly."""
    images, model, other = some_images(), between(function), between(plain)
    assert_exact(model, model.conv, images, **kwargs)
    for site, same in ((None, None), (model.conv, other.conv)):
        form, expected = linear_form(model, images, 1, site, **kwargs), linear_form(other, images, 1, same, **kwargs)
        assert_close(form.coefficients, expected.coefficients, **EXACT)
        assert_close(form.bias, expected.bias, **EXACT)
        assert expected.coefficients.abs().max() > 1e-3


def assert_is_gradient(function: Callable[[Tensor], Tensor], **kwargs: Any) -> None:
    """A piecewise-linear function between two layers has autograd's gradient for its coefficients."""
    images, model = some_images(), between(function)
    assert_exact(model, model.conv, images, **kwargs)
    leaf = images.clone().requires_grad_()
    model(leaf)[:, 1].sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().max() > 1e-3
    found = ScoreMap(model, multiply_by_inputs=False, **kwargs).attribute(images, 1)
    assert_close(found, leaf.grad, **EXACT)


WAYS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "linear_form": lambda m, x: linear_form(m, x, 1),
    "layer map": lambda m, x: LayerScoreMap(m, m.conv).attribute(x, 1),
    "all labels": lambda m, x: LayerScoreMap(m, m.conv).attribute_targets(x),
    "bias_terms": lambda m, x: bias_terms(m, x, 1),
    "freeze": freeze,
}


def assert_refused(function: Callable[[Tensor], Tensor], match: str) -> None:
    """Every way to explain a model with a function in it says what hid."""
    model, images = between(function), some_images()
    for call in WAYS.values():
        with pytest.raises(UnsupportedOperationError, match=match):
            call(model, images)
