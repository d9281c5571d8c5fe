"""Random networks for Hypothesis: small, odd, and made of every operation that has a linear form.

A network is drawn operation by operation along a real activation, so that each operation fits the shape it
meets. Every operation is one function: it draws its settings and returns a step, a module or a plain function on
tensors, or None where the shape does not suit it. Modules are reached by name, plain functions are what a
forward method calls in between, as in code written by hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.layers import called_once
from tests.networks import affine, curved, joins, pieces  # noqa: F401 - each fills the table of operations
from tests.networks.drawing import Chain, Context, body

LABELS = 3


@dataclass(frozen=True)
class RandomNetwork:
    """A network with scores (N, LABELS), images for it, and the layers that it calls exactly once."""

    model: nn.Module
    inputs: Tensor
    layers: tuple[str, ...]

    def __repr__(self) -> str:
        return f"inputs {tuple(self.inputs.shape)}, layers {self.layers}\n{self.model}"


@st.composite
def networks(draw: st.DrawFn, smooth: bool = False) -> RandomNetwork:
    """Random networks; with `smooth` also of operations that are not piecewise linear."""
    context = Context(draw, smooth, draw(st.integers(0, 2**16)))
    spatial = context.number(1, 3)
    largest = {1: 11, 2: 7, 3: 4}[spatial]
    size = [context.number(3, largest) for _ in range(spatial)]
    inputs = context.noise(context.number(1, 2), context.number(1, 4), *size)
    trunk = body(context, inputs, context.number(1, 7))
    with torch.no_grad():
        features = trunk(inputs.clone()).flatten(1).shape[1]
    head = context.random(nn.Linear(features, LABELS))
    model = Chain(trunk, nn.Flatten(), head).double().eval()
    return RandomNetwork(model, inputs, tuple(called_once(model, inputs)))
