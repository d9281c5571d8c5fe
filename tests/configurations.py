"""One table of ways to call an attribution method, of Captum's or ours, and the small networks for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn


class Image(nn.Module):
    """A small piecewise-linear network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.relu(self.conv(x))).flatten(1))


class InPlace(Image):
    """The same, with a ReLU that overwrites the convolution's output."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)


class TwoInputs(nn.Module):
    """Two images, and arguments of every kind that are no input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3)
        self.second = nn.Conv2d(1, 4, 3)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(64, 3)

    def forward(
        self, x: Tensor, y: Tensor, weight: Tensor | None = None, times: int = 1, mode: str | None = None
    ) -> Tensor:
        features = self.relu(self.first(x) + self.second(y))
        if weight is not None:
            features = features * weight
        return self.fc(features.flatten(1)) * times + (1 if mode == "shifted" else 0)


class Pair(nn.Module):
    """A layer with two inputs and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(4, 3, 1)
        self.right = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(x), self.right(y)


class SeveralTensors(nn.Module):
    """A network around such a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.relu = nn.ReLU()
        self.pair = Pair()
        self.fc = nn.Linear(80, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.fc(torch.cat(self.pair(self.relu(x), -x), 1).flatten(1))


class OneInputUnderTheOther(SeveralTensors):
    """The same, where the layer's second input is what its first is made of."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.fc(torch.cat(self.pair(self.relu(x), x), 1).flatten(1))


class Grid(Image):
    """Scores (N, 3, 5), for targets that are tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 15)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).unflatten(1, (3, 5))


class OneScore(Image):
    """One score for each image, (N,), or (N, 1)."""

    def __init__(self, keepdim: bool) -> None:
        super().__init__()
        self.keepdim = keepdim

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sum(1, keepdim=self.keepdim)


def built(make: Callable[[], nn.Module]) -> Any:
    """The module with weights that are the same in every test."""
    generator = torch.Generator().manual_seed(3)
    model = make().double().eval()
    for value in model.parameters():
        value.data = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    return model


def randn(*shape: int, seed: int = 4) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parallel_on_cpu(model: nn.Module) -> nn.DataParallel[nn.Module]:
    """The wrapper as it is where there is no GPU."""
    with mock.patch("torch.cuda.is_available", return_value=False):
        return nn.DataParallel(model)


# --- the table of configurations -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Configuration:
    """One way to call an attribution method.

    Attributes:
        name: For pytest.
        model: Makes it.
        inputs: The images.
        layer: Name of the layer.
        target: In one of Captum's forms.
        additional: Additional arguments of the model.
        at_input: Whether the layer's input is meant.
        wrap: Makes of the model what is handed to the method.
        device_ids: For the constructors of layer and neuron methods.
        is_tuple: Whether a single input is handed over as a tuple.
        neuron: Selector of a neuron of the layer.
    """

    name: str
    model: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...]
    layer: str
    target: Any = 1
    additional: Any = None
    at_input: bool = False
    wrap: Callable[[nn.Module], Any] = lambda model: model
    device_ids: list[int] | None = None
    is_tuple: bool = False
    neuron: Any = (1, 1, 0)

    def call(self) -> tuple[nn.Module, Any, nn.Module, Any]:
        """Model, what is explained, layer, inputs."""
        model = built(self.model)
        copies = tuple(tensor.clone() for tensor in self.inputs)  # Captum asks them for gradients
        inputs = copies if self.is_tuple or len(copies) > 1 else copies[0]
        return model, self.wrap(model), model.get_submodule(self.layer), inputs


X = (randn(2, 2, 6, 6),)
XY = (randn(2, 2, 6, 6), randn(2, 1, 6, 6, seed=5))
WEIGHT = randn(2, 4, 4, 4, seed=6)
TENSOR, LIST, TUPLES = torch.tensor, [0, 2], [(0, 4), (2, 1)]

CONFIGURATIONS = [
    Configuration("int", Image, X, "relu"),
    Configuration("negative int", Image, X, "relu", -1),
    Configuration("tensor of no dimension", Image, X, "relu", TENSOR(2)),
    Configuration("tensor of one", Image, X, "relu", TENSOR([2])),
    Configuration("tensor", Image, X, "conv", TENSOR([0, 2])),
    Configuration("list", Image, X, "conv", LIST),
    Configuration("tuple", Grid, X, "pool", (2, 3)),
    Configuration("list of tuples", Grid, X, "conv", TUPLES),
    Configuration("no target, (N,)", lambda: OneScore(False), X, "relu", None),
    Configuration("no target, (N, 1)", lambda: OneScore(True), X, "relu", None),
    Configuration("tuple of one input", Image, X, "conv", is_tuple=True),
    Configuration("one image", Image, (X[0][:1],), "conv"),
    Configuration("two inputs", TwoInputs, XY, "relu"),
    Configuration("layer of one input", TwoInputs, XY, "second"),
    Configuration("one argument", TwoInputs, XY, "relu", additional=WEIGHT),
    Configuration("many arguments", TwoInputs, XY, "relu", LIST, (WEIGHT, 3, "shifted")),
    Configuration("None as argument", TwoInputs, XY, "first", additional=(None, 2)),
    Configuration("layer input", Image, X, "relu", at_input=True),
    Configuration("pool input", Image, X, "pool", at_input=True),
    Configuration("several outputs", SeveralTensors, X, "pair", neuron=lambda layer: layer[0][:, 0, 1, 1]),
    Configuration(
        "several layer inputs", SeveralTensors, X, "pair", at_input=True, neuron=lambda layer: layer[1].sum((1, 2, 3))
    ),
    Configuration("function", Image, X, "relu", wrap=lambda model: lambda x: model(2 * x) - 1),
    Configuration("method", Image, X, "conv", wrap=lambda model: model.forward),
    Configuration("DataParallel", Image, X, "relu", wrap=parallel_on_cpu),
    Configuration("DataParallel, device_ids", Image, X, "conv", LIST, wrap=parallel_on_cpu, device_ids=[0]),
    Configuration("device_ids", Image, X, "relu", device_ids=[0]),
    Configuration("slice of neurons", Image, X, "relu", neuron=(slice(0, 2), 1, slice(None))),
    Configuration("selector", Image, X, "relu", neuron=lambda layer: layer[:, 1].mean((1, 2))),
    Configuration("index of a vector", Image, X, "fc", neuron=2),
]
