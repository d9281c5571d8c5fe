"""TorchScript: constants that no operation makes, and what is none."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from captum_scoremap import LayerScoreMap
from tests.between import EXACT, assert_as_plain, assert_exact, assert_refused, between, some_images

TYPES = "dtype=x.dtype"

# A statement of TorchScript, and the same in Python.
LITERALS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "a list": (
        f"return x * torch.tensor([1.0, 2.0, 3.0, 0.1], {TYPES})",
        lambda x: x * torch.tensor([1.0, 2.0, 3.0, 0.1]).to(x.dtype),  # TorchScript makes it in single precision
    ),
    "of a type": (
        "return x.relu() * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)",
        lambda x: x.relu() * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64),
    ),
    "of lists": (
        f"return x @ torch.tensor([[1.0, 2.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]], {TYPES}).t() @ x.new_ones([2, 4])",
        lambda x: (
            x @ torch.tensor([[1.0, 2.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]], dtype=x.dtype).t() @ x.new_ones([2, 4])
        ),
    ),
    "whole numbers": (f"return x + torch.tensor([1, 2, 3, 4], {TYPES})", lambda x: x + torch.arange(1, 5)),
    "as_tensor": (
        f"return x * torch.as_tensor([1.0, 2.0, 3.0, 4.0], {TYPES})",
        lambda x: x * torch.arange(1.0, 5),
    ),
    "a single number": ("return x * torch.tensor(2.5)", lambda x: x * 2.5),
    "assigned": (
        "y = torch.zeros_like(x)\n    y[:, 0] = 3.0\n    y[:, 1:] = x[:, 1:]\n    return y",
        lambda x: torch.cat([torch.full_like(x[:, :1], 3.0), x[:, 1:]], 1),
    ),
    "ones beside a gate": ("return x * torch.ones([4]) + x * x.sigmoid()", lambda x: x + x * x.sigmoid()),
    "where": (
        "return torch.where(x > 0, x, torch.tensor(0.5, dtype=x.dtype))",
        lambda x: torch.where(x > 0, x, 0.5),
    ),
}


def scripted(body: str) -> Any:
    """Code that did not run yet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.CompilationUnit(f"def function(x: Tensor):\n    {body}\n").function


@pytest.mark.parametrize(("runs", "with_gradients"), [(0, False), (3, False), (3, True)])
@pytest.mark.parametrize("name", LITERALS)
def test_literals_in_scripted_code_are_constants(name: str, runs: int, with_gradients: bool) -> None:
    """Code that ran with gradients on is in parts, each a graph of its own."""
    body, plain = LITERALS[name]
    function = scripted(body)
    for _ in range(runs):
        function(torch.randn(2, 4, 4, 4, dtype=torch.float64, requires_grad=with_gradients))
    assert_as_plain(function, plain)


def test_literals_of_several_functions_in_one_first_run() -> None:
    functions = [scripted(LITERALS[name][0]) for name in LITERALS]

    def all_of_them(x: Tensor) -> Tensor:
        for function in functions:
            x = function(x)
        return x

    def plainly(x: Tensor) -> Tensor:
        for _, plain in LITERALS.values():
            x = plain(x)
        return x

    model, other, images = between(all_of_them), between(plainly), some_images()
    first = LayerScoreMap(model, model.conv).attribute(images, 1)
    assert_close(first, LayerScoreMap(other, other.conv).attribute(images, 1), **EXACT)
    assert_exact(model, model.conv, images)


LISTS_OF_THE_IMAGE = {
    "one by one": f"return x * torch.tensor([float(x[0, 0, 0, 0]), float(x[0, 0, 0, 1]), 3.0, 4.0], {TYPES})",
    "all at once": (
        "row = torch.jit.annotate(List[float], x[0, 0, 0].to(torch.float32).tolist())\n"
        f"    return x * torch.tensor(row, {TYPES})"
    ),
}


@pytest.mark.parametrize("runs", [0, 3])
@pytest.mark.parametrize("name", LISTS_OF_THE_IMAGE)
def test_lists_of_the_images_numbers_in_scripted_code_are_refused(name: str, runs: int) -> None:
    function = scripted(LISTS_OF_THE_IMAGE[name])
    for _ in range(runs):
        function(torch.randn(2, 4, 4, 4, dtype=torch.float64))
    assert_refused(function, "what filled a new tensor's memory")


def test_what_something_else_fills_is_refused_though_scripted_code_has_literals() -> None:
    literal = scripted(LITERALS["a list"][0])

    def function(x: Tensor) -> Tensor:
        found = torch.empty(4, dtype=x.dtype)
        np.copyto(found.numpy(), x[0, 0, 0].sigmoid().numpy())
        return literal(x) * found

    assert_refused(function, "what was written to a tensor's memory|what filled a new tensor's memory")
