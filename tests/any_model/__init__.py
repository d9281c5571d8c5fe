"""What people hand over, one row each: models and wrappers far from the classifiers of a zoo.

A row says how to build a small one with random weights, which of its scores is explained, and what must come of it: the
linear form is exact at the input and at three layers, or it is refused with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_scoremap import ScoreMap, UnsupportedOperationError, linear_form
from captum_scoremap.rules import TANGENT
from captum_scoremap.scores import Target, select_scores
from tests.zoo import randomize, relative_residual, spread

Model = Callable[..., Any]
REFUSALS = (UnsupportedOperationError, TypeError, ValueError)


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        build: Makes the model and its input, (N, ...), in float64.
        target: Which score is explained.
        layers: Names of layers; None for three, spread over those that run once.
        refused: What the error must say; "" where there must be none.
        tolerance: The largest relative residual.
        gradient: Who else knows A under the tangent everywhere: "autograd"; "differences" along a random direction,
            where the model detaches or autograd cannot follow; "" for none, where places are frozen even then.
        random: Whether to fill the model with random numbers.
    """

    build: Callable[[], tuple[Model, Tensor]]
    target: Target = 1
    layers: tuple[str, ...] | None = None
    refused: str = ""
    tolerance: float = 1e-9
    gradient: str = "autograd"
    random: bool = True

    def check(self) -> None:
        """Hold the row to what it says."""
        with torch.random.fork_rng(), default_dtype(torch.float64):
            torch.manual_seed(0)
            model, inputs = self.build()
            if isinstance(model, nn.Module):
                model.double().eval()
                if self.random:
                    randomize(model, inputs, torch.Generator().manual_seed(0))
            if self.refused:
                self.check_refused(model, inputs)
            else:
                self.check_exact(model, inputs)
                if self.gradient == "autograd":
                    self.check_gradient(model, inputs)
                elif self.gradient:
                    self.check_differences(model, inputs)

    def check_refused(self, model: Model, inputs: Tensor) -> None:
        with pytest.raises(REFUSALS, match=re.escape(self.refused)):
            linear_form(model, inputs, self.target)

    def check_exact(self, model: Model, inputs: Tensor) -> None:
        """S is the model's own, and S = A·Y + B with B by the steps forward."""
        with torch.no_grad():
            score = select_scores(model(inputs.clone()), self.target, len(inputs))
        modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}
        names = self.layers
        if names is None:
            names = layers_of_images(model, inputs) if isinstance(model, nn.Module) else ()
        for name in (None, *names):
            form = linear_form(model, inputs, self.target, None if name is None else modules[name])
            torch.testing.assert_close(form.score, score, rtol=1e-12, atol=1e-13)
            residual = relative_residual(form.score, form.sums, form.bias)
            assert residual <= self.tolerance, f"residual {residual:.1e} at {name or 'the input'}"
            if name is None:
                assert form.coefficients.abs().max() > 0

    def check_gradient(self, model: Model, inputs: Tensor) -> None:
        """What no step was recorded for would be missing from A, and not from autograd's gradient."""
        leaf = inputs.clone().requires_grad_()
        with torch.enable_grad():
            (expected,) = torch.autograd.grad(select_scores(model(leaf), self.target, len(inputs)).sum(), leaf)
        found = ScoreMap(model, multiply_by_inputs=False, rules=TANGENT).attribute(inputs, self.target)
        difference = (found - expected).abs().max() / expected.abs().max()
        assert difference <= self.tolerance, f"coefficients differ from the gradient by {difference:.1e}"

    def check_differences(self, model: Model, inputs: Tensor) -> None:
        """The model itself, a little to each side of the image: whatever it detaches still counts."""
        direction = torch.randn_like(inputs)
        coefficients = ScoreMap(model, multiply_by_inputs=False, rules=TANGENT).attribute(inputs, self.target)
        found = (coefficients * direction).flatten(1).sum(1)
        differences = []
        for step in (1e-4, 1e-6, 1e-9):  # too large for kinks, too small for rounding: one of them is neither
            places = inputs + step * direction, inputs - step * direction
            with torch.no_grad():
                ahead, behind = (select_scores(model(place), self.target, len(inputs)) for place in places)
            expected = (ahead - behind) / (2 * step)
            differences.append(float((found - expected).abs().max() / expected.abs().max()))
        allowed = 1e-5 if self.tolerance <= 1e-9 else 1e-2
        assert min(differences) <= allowed, f"coefficients differ from differences of the score by {differences}"


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Have what a model makes without naming a type be of this one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def layers_of_images(model: nn.Module, inputs: Tensor) -> tuple[str, ...]:
    """Names of three layers that run once and hold the images along a dimension, spread over the model."""
    found: dict[str, list[Any]] = {}

    def recorder(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: found.setdefault(name, []).append(output)

    handles = [module.register_forward_hook(recorder(name)) for name, module in model.named_modules() if name]
    with torch.no_grad():
        model(inputs.clone())
    for handle in handles:
        handle.remove()
    once = [name for name, outputs in found.items() if len(outputs) == 1]
    return tuple(spread([name for name in once if holds_images(found[name][0], len(inputs))], 3))


def holds_images(output: object, count: int) -> bool:
    return isinstance(output, Tensor) and output.is_floating_point() and count in output.shape[:2]
