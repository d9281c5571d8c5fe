"""What every operation is drawn with: steps, chance, and the table of operations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

LARGEST = 600  # elements of one image in any activation
LIMIT = 1e3  # magnitude of any activation

Step: TypeAlias = Callable[[Tensor], Tensor]
Build: TypeAlias = Callable[["Context", Tensor], "Step | None"]


class Function:
    """A step that is no module: what a forward method calls on its own, with constants that follow it to a device."""

    def __init__(self, name: str, function: Callable[..., Tensor], *constants: Tensor | None) -> None:
        self.name = name
        self.function = function
        self.constants = constants

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x, *(one if one is None else one.to(x.device) for one in self.constants))

    def __repr__(self) -> str:
        return self.name


class Chain(nn.Module):
    """Steps one after the other; those that are modules are submodules."""

    def __init__(self, *steps: Step) -> None:
        super().__init__()
        self.steps = steps
        for i, step in enumerate(steps):
            if isinstance(step, nn.Module):
                self.add_module(str(i), step)

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x

    def extra_repr(self) -> str:
        plain = [f"{i}: {step!r}" for i, step in enumerate(self.steps) if not isinstance(step, nn.Module)]
        return ", ".join(plain)


class Join(nn.Module):
    """Branches that read the same tensor, and what joins their outputs."""

    def __init__(self, name: str, join: Callable[..., Tensor], *branches: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.join = join
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(*(branch(x) for branch in self.branches))

    def extra_repr(self) -> str:
        return self.name


@dataclass
class Context:
    """What an operation needs to draw its settings."""

    draw: st.DrawFn
    smooth: bool
    seed: int
    depth: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def pick(self, *values: object) -> object:
        return self.draw(st.sampled_from(values))

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def flag(self) -> bool:
        return self.draw(st.booleans())

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def random(self, module: nn.Module) -> nn.Module:
        """Weights of unit gain, biases and norm statistics of non-trivial size."""
        module.double().eval()
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            if not value.is_floating_point():
                continue
            noise = self.noise(*value.shape)
            if value.dim() > 1:
                noise = noise / math.sqrt(value[0].numel())
            elif "running_var" in name or (name.endswith("weight") and value.dim() == 1):
                noise = noise.abs() * 0.5 + 0.5
            else:
                noise = noise * 0.5
            value.data.copy_(noise)
        return module


OPERATIONS: dict[str, Build] = {}
SMOOTH: dict[str, Build] = {}


def piecewise(build: Build) -> Build:
    OPERATIONS[build.__name__] = build
    return build


def smooth(build: Build) -> Build:
    SMOOTH[build.__name__] = build
    return build


def axes(x: Tensor) -> int:
    """The number of spatial axes."""
    return x.dim() - 2


def of_rank(name: str, x: Tensor) -> Callable[..., nn.Module]:
    """``nn.Conv2d`` and the like for as many axes as x has."""
    module: Callable[..., nn.Module] = getattr(nn, f"{name}{axes(x)}d")
    return module


def body(context: Context, x: Tensor, length: int) -> Chain:
    """A chain of operations on x, each drawn for the shape it meets."""
    table = OPERATIONS | SMOOTH if context.smooth else OPERATIONS
    names = [*sorted(table), *["convolution", "rectifier", "max_pooling"] * 2]  # the ones that matter most
    steps: list[Step] = []
    for _ in range(length):
        step = table[context.draw(st.sampled_from(names))](context, x)
        if step is None:
            continue
        with torch.no_grad():
            y = step(x.clone())
        if 0 < y[0].numel() <= LARGEST and y.abs().max() <= LIMIT:
            steps.append(step)
            x = y
    return Chain(*steps)


def branch(context: Context, x: Tensor) -> Chain:
    """A chain one level down, or nothing at the bottom."""
    context.depth += 1
    steps = body(context, x, context.number(1, 3) if context.depth <= 2 else 0)
    context.depth -= 1
    return steps


def like_input(context: Context, x: Tensor) -> Chain:
    """A branch whose output has the shape of its input: projected back to it where need be."""
    steps = branch(context, x)
    with torch.no_grad():
        y = steps(x.clone())
    if y.shape == x.shape:
        return steps
    project = context.random(nn.Linear(y[0].numel(), x[0].numel()))
    return Chain(steps, nn.Flatten(1), project, nn.Unflatten(1, x.shape[1:]))
