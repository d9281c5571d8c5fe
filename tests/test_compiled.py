"""Maps as graphs: equal to the eager ones at images they never saw, refused where they cannot be, and exported."""

from __future__ import annotations

import copy
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize, prune
from torch.testing import assert_close

from captum_scoremap import (
    CompiledMap,
    CompleteScoreMap,
    FusedScoreMap,
    LayerScoreMap,
    NeuronScoreMap,
    ScoreMap,
    UnsupportedOperationError,
    compile_map,
    linear_form,
)
from captum_scoremap.compiled import batches, export
from captum_scoremap.compiled.any_number import for_any_number
from captum_scoremap.compiled.decomposed import INDUCTOR, ONNX, functional
from captum_scoremap.compiled.export import read_back
from captum_scoremap.compiled.graph import trace
from captum_scoremap.compiled.held import hold_frozen
from captum_scoremap.rules import TANGENT
from tests.programs import needs_fork, start
from tests.state import untouched

LABELS = 5


class Network(nn.Module):
    """Masks, switches, gates, a squeeze-excitation, a residual branch and changes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Hardswish(inplace=True))
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Hardsigmoid())
        self.norm = nn.GroupNorm(2, 8)
        self.head = nn.Sequential(nn.AvgPool2d(3, 2, 1, ceil_mode=True), nn.Flatten(), nn.LazyLinear(LABELS))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        y = self.block(x)
        x = self.norm(x + y * self.squeeze(y))
        x[:, :4] += y[:, 4:]
        scores: Tensor = self.head(x)
        return scores


@pytest.fixture
def inputs(generator: torch.Generator) -> Tensor:
    return torch.randn(2, 3, 21, 16, generator=generator, dtype=torch.float64)


@pytest.fixture
def model(generator: torch.Generator, inputs: Tensor) -> Network:
    network = Network().double().eval()
    with torch.no_grad():
        network(inputs)
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.4)
        network.stem[1].running_var.abs_().add_(0.5)
    return network


METHODS: dict[str, tuple[Callable[[Network], Any], dict[str, Any]]] = {
    "the image": (ScoreMap, {}),
    "coefficients and the delta": (lambda m: ScoreMap(m, multiply_by_inputs=False), {"return_convergence_delta": True}),
    "one layer": (lambda m: LayerScoreMap(m, m.block), {}),
    "several layers": (lambda m: LayerScoreMap(m, [m.stem, m.block, m.norm]), {"return_convergence_delta": True}),
    "a layer's input": (
        lambda m: LayerScoreMap(m, m.norm),
        {"attribute_to_layer_input": True, "attr_dim_summation": False, "relu_attributions": True},
    ),
    "complete": (CompleteScoreMap, {"return_placeless": True}),
    "complete at a layer": (lambda m: CompleteScoreMap(m, m.block), {}),
    "fused": (FusedScoreMap, {}),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_graph_gives_the_map_at_images_and_labels_it_never_saw(
    model: Network, inputs: Tensor, name: str, generator: torch.Generator
) -> None:
    build, options = METHODS[name]
    method = build(model)
    with untouched(model, inputs):
        compiled = compile_map(method, inputs, 1, backend="graph", **options)
    for label in (0, [4, 2], torch.tensor([3, -1])):
        other = torch.randn(inputs.shape, generator=generator, dtype=torch.float64)
        with untouched(model, other):
            assert_close(compiled(other, label), method.attribute(other, label, **options), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_any_number_of_images_goes_through_what_was_compiled_for_one_number(
    model: Network, inputs: Tensor, name: str, size: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, options = METHODS[name]
    method = build(model)
    compiled = compile_map(method, torch.cat([inputs] * 2)[:size], 1, backend="graph", **options)
    monkeypatch.setattr(batches, "trace", None)  # nothing is compiled again
    for count in (1, 2, 5):
        other = torch.randn(count, *inputs.shape[1:], generator=generator, dtype=torch.float64)
        labels = torch.randint(LABELS, (count,), generator=generator)
        assert_close(compiled(other, labels), method.attribute(other, labels, **options), rtol=1e-11, atol=1e-13)


class Mixed(nn.Module):
    """Images that have a part in each other's scores, which no map can tell apart; or the number of images is fixed."""

    def __init__(self, fixed: int | None = None) -> None:
        super().__init__()
        self.linear, self.fixed = nn.Linear(4, 3), fixed

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(0) if self.fixed is None else x.reshape(self.fixed, 4)
        found: Tensor = self.linear(x.relu())
        return found


@pytest.mark.parametrize("size", [1, 2, 3])
def test_images_that_mix_are_compiled_for_each_number(size: int, generator: torch.Generator) -> None:
    method = ScoreMap(Mixed().eval())
    compiled = compile_map(method, torch.randn(size, 4, generator=generator), 1, backend="graph")
    for count in (1, 2, 3, 5):
        other = torch.randn(count, 4, generator=generator)
        assert_close(compiled(other, 2), method.attribute(other, 2))
    one = ScoreMap(Mixed(1).eval())
    single = torch.randn(1, 4, generator=generator)
    assert_close(compile_map(one, single, 1, backend="graph")(-single, 2), one.attribute(-single, 2))


def test_layers_that_have_images_elsewhere_than_first(generator: torch.Generator) -> None:
    class Sequences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:  # tokens before images
            found: Tensor = self.head(self.layer(x.transpose(0, 1)).relu().mean(0))
            return found

    model = Sequences().eval()
    method = LayerScoreMap(model, model.layer)
    compiled = compile_map(method, torch.randn(2, 5, 4, generator=generator), 1, backend="graph", channel_dim=-1)
    other = torch.randn(3, 5, 4, generator=generator)
    found = compiled(other, [0, 1, 2])
    assert found.shape == (5, 3, 1)
    assert_close(found, method.attribute(other, [0, 1, 2], channel_dim=-1))


def test_a_graph_goes_by_the_weights_as_they_are(model: Network, inputs: Tensor) -> None:
    method = ScoreMap(model)
    compiled = compile_map(method, inputs, 1, backend="graph")
    three = torch.cat([inputs, inputs[:1] * 2])
    assert_close(compiled(three, [1, 2, 3]), method.attribute(three, [1, 2, 3]))
    before = compiled(inputs, 1)
    with torch.no_grad():
        model.stem[0].weight.mul_(-1)
        model.stem[1].running_mean.add_(1)
    model.head[2].bias = nn.Parameter(torch.ones(LABELS, dtype=torch.float64))
    model.block[0].weight = nn.Parameter(model.block[0].weight.detach() * 2)
    after = compiled(inputs, 1)
    assert not torch.allclose(before, after)
    assert_close(after, method.attribute(inputs, 1))
    model.float()
    with pytest.raises(ValueError, match=r"must be as they were when the map was compiled, .* got .*float32"):
        compiled(inputs, 1)


def test_layouts_in_memory_and_modes_around_the_call_change_nothing(model: Network, inputs: Tensor) -> None:
    compiled = compile_map(ScoreMap(model), inputs, 1, backend="graph")
    expected = compiled(inputs, 1)
    assert_close(compiled(inputs.to(memory_format=torch.channels_last), 1), expected)
    assert_close(compiled(inputs.clone().requires_grad_(), 1), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(compiled(inputs, 1), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = compile_map(ScoreMap(model.float()), inputs.float(), 1, backend="graph")
        wanted = ScoreMap(model).attribute(inputs.float(), 1)
    assert_close(half(inputs.float(), 1), wanted)


def test_tokens_tuples_and_targets_that_are_functions(generator: torch.Generator) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval().double()
    embedding, head = nn.Embedding(11, 8).double(), nn.Linear(8, 3).double()

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.embedding, self.head = layer, embedding, head

        def forward(self, ids: Tensor) -> Tensor:
            found: Tensor = self.head(self.layer(self.embedding(ids)))
            return found

    def first_token(output: Tensor) -> Tensor:
        return output[:, 0, 1]

    model = Tokens()
    method = LayerScoreMap(model, model.embedding)
    ids = torch.randint(11, (2, 6), generator=generator)
    with_function = compile_map(method, ids, first_token, backend="graph", channel_dim=-1)
    assert_close(with_function(ids.flip(1)), method.attribute(ids.flip(1), first_token, channel_dim=-1))
    with pytest.raises(ValueError, match="target must be left out"):
        with_function(ids, 1)
    several = compile_map(method, ids, (0, 1), backend="graph", channel_dim=-1)
    targets = [(5, 2), (0, 0)]
    assert_close(several(ids, targets), method.attribute(ids, targets, channel_dim=-1))

    named = ScoreMap(lambda x: {"logits": head(x.tanh())})  # as the models of Hugging Face return them
    rows = torch.rand(2, 8, generator=generator, dtype=torch.float64)
    assert_close(compile_map(named, rows, 1, backend="graph")(rows + 1, [2, 0]), named.attribute(rows + 1, [2, 0]))

    pair = ScoreMap(lambda a, b: (a * b.tanh()).sum(1))
    tensors = torch.rand(2, 4, generator=generator), torch.rand(2, 4, generator=generator)
    one_score = compile_map(pair, tensors, backend="graph")
    swapped = tensors[::-1]
    assert_close(one_score(swapped), pair.attribute(swapped))
    with pytest.raises(ValueError, match="inputs must be as the map was compiled for, a tuple of"):
        one_score(tensors[0])


def test_own_rules_are_part_of_the_graph(generator: torch.Generator) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).eval()
    x = torch.rand(2, 4, generator=generator)
    method = ScoreMap(model, rules={"tanh": TANGENT["tanh"]})
    assert_close(compile_map(method, x, 0, backend="graph")(-x, 1), method.attribute(-x, 1))


class Branches(nn.Module):
    """A linear layer behind what a test puts there."""

    def __init__(self, before: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.before = before
        self.linear = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.linear(self.before(x))
        return found


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "bool": (lambda x: x * 2 if x.sum() > 0 else x, r"must not branch on numbers .* at \S*test_compiled.py:\d+"),
    "equal": (lambda x: x * 2 if torch.equal(x[0], x[1]) else x, "must not branch on numbers"),
    "item": (lambda x: x * x.detach().max().item(), "must not branch on numbers"),
    "tolist": (lambda x: x * 2 if x.argmax(1).tolist()[0] else x, r"must not read numbers .* Tensor.tolist\(\)"),
    "numpy": (lambda x: x * 2 if (x > 0.5).numpy().any() else x, r"must not read numbers .* Tensor.numpy\(\)"),
    "mask": (lambda x: x * x[x > 0.5].mean(), r"shapes do not depend on numbers .* index at \S*test_compiled.py:\d+"),
    "nonzero": (lambda x: x * len((x > 0.5).nonzero()), "shapes do not depend on numbers .* nonzero"),
    "noise": (lambda x: x + torch.rand(4), "must draw no noise"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_graph_is_refused_with_the_reason(name: str) -> None:
    before, reason = REFUSED[name]
    model, x = Branches(before).eval(), torch.linspace(0, 1, 8).reshape(2, 4)
    with untouched(model, x), pytest.raises(ValueError, match=reason):
        compile_map(ScoreMap(model), x, 1, backend="graph")


def test_what_differs_from_call_to_call_is_refused() -> None:
    calls: list[int] = []

    def now_and_then(x: Tensor) -> Tensor:
        calls.append(1)
        return x * len(calls)

    with pytest.raises(ValueError, match=r"the graph must give what method.attribute gives"):
        compile_map(ScoreMap(Branches(now_and_then).eval()), torch.rand(2, 4), 1, backend="graph")

    model = Branches(lambda x: x * model.calls.add_(1)).eval()
    with pytest.raises(ValueError, match=r"leave its tensors as they are .* 'calls'"):
        compile_map(ScoreMap(model), torch.rand(2, 4), 1, backend="graph")


class ChoosesTokens(nn.Module):
    """Goes on with those patches of an image that score highest, as DynamicViT (Rao et al. 2021) does."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.mlp, self.head = (
            nn.Conv2d(3, 8, 4, 4),
            nn.Sequential(nn.Linear(8, 8), nn.GELU()),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT
        chosen = tokens.mean(2).topk(5, 1)[1]
        tokens = tokens.gather(1, chosen[:, :, None].expand(-1, -1, 8))
        scores: Tensor = self.head(self.mlp(tokens).mean(1))
        return scores


class Between(nn.Module):
    """Two convolutions and a head, with what a test puts between the convolutions."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.after, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.after(self.between(self.before(x))).relu().mean((2, 3)))
        return scores


def half_with_more(x: Tensor) -> Tensor:
    halves = torch.stack(x.chunk(2, 3), 1)
    chosen = halves.pow(2).mean((2, 3, 4)).argmax(1)
    return halves.gather(1, chosen.view(-1, 1, 1, 1, 1).expand(-1, 1, *halves.shape[2:]))[:, 0]


def warped(x: Tensor) -> Tensor:
    """As a spatial transformer (Jaderberg et al. 2015)."""
    affine = torch.eye(2, 3) + x.mean((1, 2, 3)).tanh().view(-1, 1, 1)
    grid = F.affine_grid(affine, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def zeroed_in_place(x: Tensor) -> Tensor:
    x = x.clone()
    x[x < 0] = 0
    return x


@pytest.mark.parametrize(
    ("model", "layer", "chooses"),
    [
        (ChoosesTokens(), "patches", "topk|gather"),
        (Between(half_with_more), "before", "gather"),
        (Between(warped), "after", "grid_sample"),
    ],
)
def test_constants_that_stand_elsewhere_at_another_image_are_refused(
    model: nn.Module, layer: str, chooses: str, generator: torch.Generator
) -> None:
    x, other = torch.randn(2, 2, 3, 16, 16, generator=generator)
    model.eval()
    message = rf"places of constants must not depend .*, got those of ({chooses}), .* Use method\.attribute\."
    for method in CompleteScoreMap(model, "image"), FusedScoreMap(model, model.get_submodule(layer)):
        method.attribute(x, 1)
        with pytest.raises(ValueError, match=message):
            compile_map(method, x, 1, backend="graph")
    plain = ScoreMap(model)
    assert_close(compile_map(plain, x, 1, backend="graph")(other, 2), plain.attribute(other, 2))


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x.masked_fill(x < 0, 0),
        lambda x: torch.where(x > 0, x, torch.zeros(())),
        lambda x: torch.maximum(x, x.flip(3)),
        lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
        zeroed_in_place,
    ],
    ids=["filled", "chosen", "maximum", "unpooled", "in place"],
)
def test_masks_of_the_image_leave_constants_where_they_are(
    between: Callable[[Tensor], Tensor], generator: torch.Generator
) -> None:
    x, other = torch.randn(2, 2, 3, 16, 16, generator=generator)
    method = CompleteScoreMap(Between(between).eval(), "image")
    assert_close(compile_map(method, x, 1, backend="graph")(other, 2), method.attribute(other, 2))


def test_constants_may_be_read(generator: torch.Generator) -> None:
    power = nn.Parameter(torch.tensor(3.0))
    pooled = ScoreMap(lambda x: x.clamp(min=1e-6).pow(power).mean(1).pow(1.0 / power))
    x = torch.rand(2, 4, generator=generator)
    compiled = compile_map(pooled, x, backend="graph")
    assert_close(compiled(1 - x), pooled.attribute(1 - x))


def test_wrong_calls_say_what_must_be(model: Network, inputs: Tensor) -> None:
    compiled = compile_map(ScoreMap(model), inputs, 1, backend="graph")
    with pytest.raises(ValueError, match=r"\(N, 3, 21, 16\) of torch.float64 on cpu, got \(N, 3, 20, 16\)"):
        compiled(inputs[:, :, 1:], 1)
    with pytest.raises(ValueError, match=r"of torch.float64 on cpu, got .* of torch.float32"):
        compiled(inputs.float(), 1)
    with pytest.raises(ValueError, match="target must be given"):
        compiled(inputs)
    with pytest.raises(ValueError, match="target must be from 0 to 4, got 5"):
        compiled(inputs, 5)
    with pytest.raises(ValueError, match="inputs must be finite"):
        compiled(inputs * torch.nan, 1)
    with pytest.raises(ValueError, match=r"path must end in \.pt2 or \.onnx"):
        compiled.export("map.txt")
    with pytest.raises(TypeError, match=r"method must be a ScoreMap, .* got NeuronScoreMap"):
        compile_map(NeuronScoreMap(model, model.block), inputs, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"backend must be .* got .fast."):
        compile_map(ScoreMap(model), inputs, 1, backend="fast")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedOperationError, match="bessel_j0"):
        compile_map(ScoreMap(torch.special.bessel_j0), inputs[:, 0, 0], 1, backend="graph")


# -- files


class Plain(Network):
    """As it, without what lies beside one path."""

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.block(self.pool(self.stem(x))))
        return scores


EXPORTED: dict[str, tuple[Callable[[Network], Any], list[str]]] = {
    "the image": (ScoreMap, ["scores", "map", "bias", "residual"]),
    "layers": (
        lambda m: LayerScoreMap(m, [m.stem, m.block]),
        ["scores", "map.stem", "bias.stem", "residual.stem", "map.block", "bias.block", "residual.block"],
    ),
    "complete": (CompleteScoreMap, ["scores", "map", "placeless", "residual"]),
    "fused": (FusedScoreMap, ["scores", "map"]),
}


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.parametrize("name", EXPORTED)
def test_a_file_gives_scores_maps_and_both_sides_of_the_sum(
    model: Network, inputs: Tensor, tmp_path: Path, name: str, suffix: str, generator: torch.Generator
) -> None:
    """Of all operations for the image, and where constants are mapped; what others make of these is the same."""
    build, names = EXPORTED[name]
    model, image = model.float(), inputs.float()
    if name in {"layers", "fused"} or (name == "complete" and suffix == ".pt2"):
        model.__class__ = Plain
    method = build(model)
    exported = compile_map(method, image, 1, backend="graph").export(tmp_path / f"map{suffix}")
    path = exported.path
    assert exported.takes == {"image": (("N", *image.shape[1:]), torch.float32), "target": (("N",), torch.int64)}
    assert list(exported.returns) == names
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    other = torch.randn(image.shape, generator=generator)
    labels = torch.tensor([4, 0])
    found = dict(zip(names, read_back(path, ["image", "target"], names)(other, labels), strict=True))
    score = model(other).gather(1, labels[:, None])[:, 0].detach()
    assert_close(found["scores"], model(other).detach(), rtol=1e-5, atol=1e-5)
    maps = method.attribute(other, labels)
    expected = maps if isinstance(maps, list) else [maps]
    for key, one in zip([key for key in names if key.startswith("map")], expected, strict=True):
        assert_close(found[key], one, rtol=1e-4, atol=1e-5 * float(one.abs().max()))
        other_side = key.replace("map", "placeless" if "placeless" in found else "bias")
        if other_side in found:
            assert_close(found[key].flatten(1).sum(1) + found[other_side], score, rtol=1e-4, atol=1e-5)
            assert float(found[key.replace("map", "residual")].abs().max()) < 1e-5
    if name == "layers":  # B by the frozen model with the layer at zero
        assert_close(found["bias.block"], linear_form(model, other, labels, model.block).bias, rtol=1e-4, atol=1e-5)


class Windows(nn.Module):
    """Attention in windows of each image, of which there are four for each, and a token that stands for the image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Conv2d(3, 6, 2, 2), nn.Linear(6, 18)
        self.token, self.head = nn.Parameter(torch.randn(1, 1, 6)), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        count = len(x)
        tokens = F.unfold(self.embed(x), 2, stride=2).reshape(count, 6, 4, 4).transpose(1, 3).reshape(count * 4, 4, 6)
        q, k, v = self.mix(tokens).chunk(3, -1)
        attended = F.scaled_dot_product_attention(q, k, v).reshape(count, 16, 6)
        both = torch.cat([self.token.expand(count, -1, -1), attended], 1).permute(1, 0, 2)
        hidden = torch.zeros(len(both), count, 6) + both.relu()
        return self.head(hidden.mean(0))


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.parametrize("build", [lambda m: ScoreMap(m), lambda m: LayerScoreMap(m, [m.embed, m.mix])])
def test_a_file_takes_any_number_of_images(
    tmp_path: Path, suffix: str, build: Callable[[Windows], Any], generator: torch.Generator
) -> None:
    model = Windows().eval()
    method = build(model)
    options = {} if isinstance(method, ScoreMap) else {"channel_dim": -1}
    exported = compile_map(
        method, torch.randn(1, 3, 8, 8, generator=generator), 1, backend="graph", **options
    ).export(tmp_path / f"map{suffix}")  # fmt: skip
    assert exported.takes == {"image": (("N", 3, 8, 8), torch.float32), "target": (("N",), torch.int64)}
    assert exported.returns["scores"] == (("N", 5), torch.float32)
    if options:
        assert exported.returns["map.mix"] == (("4*N", 4, 1), torch.float32)
    program = read_back(exported.path, ["image", "target"], list(exported.returns))
    for count in (1, 2, 5):
        images = torch.randn(count, 3, 8, 8, generator=generator)
        labels = torch.randint(5, (count,), generator=generator)
        found = dict(zip(exported.returns, program(images, labels), strict=True))
        maps = method.attribute(images, labels, **options)
        for key, one in zip([key for key in found if "map" in key], maps if options else [maps], strict=True):
            assert_close(found[key], one, rtol=1e-4, atol=1e-6)
    if suffix == ".onnx":
        session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
        assert {one.name: tuple(one.shape) for one in (*session.get_inputs(), *session.get_outputs())} == {
            name: shape for name, (shape, _) in {**exported.takes, **exported.returns}.items()
        }


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * 2,
        lambda x: x.reshape(3, len(x)).sum(0),
        lambda x: torch.cat([x, x.new_ones(1, 3)]).reshape(3, len(x) + 1),
        lambda x: x.repeat(2, 1).reshape(2 * len(x) * 3) / (4 * len(x) - 3),
    ],
)
def test_sizes_go_along_a_line_through_two_numbers(
    function: Callable[[Tensor], Tensor], generator: torch.Generator
) -> None:
    graphs = [trace(lambda x: [function(x)], (torch.zeros(count, 3),)).module for count in (2, 4)]
    module = for_any_number(*graphs, (2, 4))
    for count in (1, 2, 3, 4, 9):
        x = torch.randn(count, 3, generator=generator)
        assert_close(module(x)[0], function(x), rtol=0, atol=0)
    assert len(module.graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int)) <= 1


def test_sizes_off_a_line_of_whole_numbers_are_refused() -> None:
    graphs = [trace(lambda x: [x.new_ones(len(x) ** 2 // 4)], (torch.zeros(count, 3),)).module for count in (2, 5)]
    with pytest.raises(ValueError, match=r"sizes must go with the number of images, got \(1, 6\) for \(2, 5\) of them"):
        for_any_number(*graphs, (2, 5))


ONE_NUMBER: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "rows that are counted": (lambda x: x.reshape(2, 12).sum(1, keepdim=True), "shape"),
    "a constant that goes with them": (lambda x: x.flatten(1).relu() * (1 / len(x)), "other values"),
    "a branch on their number": (lambda x: (x.relu() if len(x) == 2 else x.sigmoid()).flatten(1), "others"),
    "a tensor of as many": (lambda x: x.flatten(1).relu() * torch.tensor([1.0] * len(x))[:, None], "other"),
}


@pytest.mark.parametrize("name", ONE_NUMBER)
def test_a_file_of_what_goes_with_the_number_of_images_takes_that_of_the_example(
    name: str, tmp_path: Path, generator: torch.Generator
) -> None:
    model, reason = ONE_NUMBER[name]
    images = torch.randn(2, 3, 2, 2, generator=generator)
    compiled = compile_map(ScoreMap(model), images, 0, backend="graph")
    with pytest.warns(UserWarning, match=f"map.pt2 takes 2 images at a time, .*{reason}"):
        exported = compiled.export(tmp_path / "map.pt2")
    assert exported.takes["image"] == ((2, 3, 2, 2), torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled.export(tmp_path / "map.pt2", any_number=False) == exported
    other = torch.randn(2, 3, 2, 2, generator=generator)
    arguments = [other, torch.zeros(2, dtype=torch.int64)][: len(exported.takes)]
    program = read_back(exported.path, list(exported.takes), list(exported.returns))
    found = dict(zip(exported.returns, program(*arguments), strict=True))
    assert_close(found["map"], ScoreMap(model).attribute(other, 0), rtol=1e-5, atol=1e-6)


def test_a_file_needs_a_folder(model: Network, inputs: Tensor, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"path must be in a folder that exists, got '.*map.onnx'. Make .*gone/"
    ):
        compile_map(ScoreMap(model), inputs, 1, backend="graph").export(tmp_path / "gone" / "map.onnx")


def test_a_file_loads_without_this_package(model: Network, inputs: Tensor, tmp_path: Path) -> None:
    model.__class__ = Plain
    path = compile_map(ScoreMap(model), inputs, 1, backend="graph").export(tmp_path / "map.pt2").path
    code = (
        "import sys, torch\n"
        "sys.modules['captum_scoremap'] = sys.modules['captum'] = None\n"
        f"found = torch.export.load({str(path)!r}).module()(torch.ones(2, 3, 21, 16).double(), torch.tensor([1, 2]))\n"
        "print(sorted(found), float(found['residual'].abs().max()) < 1e-10)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert printed.stdout.strip() == "['bias', 'map', 'residual', 'scores'] True"


def test_what_onnx_lacks_is_named_and_leaves_no_file(tmp_path: Path) -> None:
    compiled = compile_map(ScoreMap(lambda x: x.erfinv().sum(1)), torch.rand(1, 4) * 0.5, backend="graph")
    with pytest.raises(ValueError, match=r"operations that ONNX has, got prims.erf_inv. Export to \.pt2"):
        compiled.export(tmp_path / "map.onnx")
    assert not list(tmp_path.iterdir())


def gated(x: Tensor) -> Tensor:
    """As cells of GRUs: parts that share memory, one of them changed in place."""
    first, second = x.unsafe_chunk(2, 1)
    return first.sigmoid_().mul(2) + second


@pytest.mark.parametrize(
    "operate", [gated, lambda x: F.pad(x, (1, 2, 0, 3), "circular"), lambda x: F.adaptive_max_pool2d(x, (3, 2))]
)
def test_what_lies_around_a_view_in_memory_is_in_an_onnx_file(
    operate: Callable[[Tensor], Tensor], tmp_path: Path, generator: torch.Generator
) -> None:
    x, y = torch.randn(2, 1, 4, 5, 5, generator=generator)
    weights = torch.randn(operate(x.clone()).shape, generator=generator)
    method = ScoreMap(lambda x: (operate(x.clone()) * weights).flatten(1).sum(1))
    path = compile_map(method, x, backend="graph").export(tmp_path / "map.onnx").path
    (found,) = read_back(path, ["image"], ["map"])(y)
    assert_close(found, method.attribute(y), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(7,), (7, 9), (3, 7, 4)])
def test_interpolation_by_centers_is_in_an_onnx_file(
    size: tuple[int, ...], tmp_path: Path, generator: torch.Generator
) -> None:
    x, y = torch.randn(2, 2, 3, *[5] * len(size), generator=generator)
    weights = torch.randn(3, *size, generator=generator)
    method = ScoreMap(lambda x: (F.interpolate(x, size, mode="nearest-exact") * weights).flatten(1).sum(1))
    path = compile_map(method, x, backend="graph").export(tmp_path / "map.onnx").path
    found = read_back(path, ["image"], ["scores", "map"])(y)
    assert_close(found[0], method.forward_func(y), rtol=1e-5, atol=1e-5)
    assert_close(found[1], method.attribute(y), rtol=1e-5, atol=1e-6)


def test_what_a_runtime_lacks_is_said(tmp_path: Path) -> None:
    """It has no convolution of float64."""
    model = nn.Sequential(nn.Conv3d(3, 4, 2), nn.Flatten()).double().eval()
    compiled = compile_map(ScoreMap(model), torch.rand(1, 3, 3, 3, 3).double(), 1, backend="graph")
    with pytest.raises(ValueError, match=r"the file must run in onnxruntime, which says: .* or export to \.pt2"):
        compiled.export(tmp_path / "map.onnx")
    assert not list(tmp_path.iterdir())


TRANSPOSED: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "convolution": (lambda x: F.conv2d(x, WEIGHT, None, (2, 3), (1, 0), (1, 2)), (2, 4, 11, 13)),
    "convolution in groups": (lambda x: F.conv2d(x, WEIGHT[:, :2], None, 2, 1, 1, 2), (2, 4, 10, 9)),
    "convolution of one axis": (lambda x: F.conv1d(x, WEIGHT[..., 0], None, 2, 1), (2, 4, 12)),
    "convolution of three axes": (
        lambda x: F.conv3d(x, WEIGHT[..., None].expand(6, 4, 3, 3, 2), None, 2, 1),
        (1, 4, 6, 7, 5),
    ),
    "transposed convolution": (lambda x: F.conv_transpose2d(x, WEIGHT, None, (2, 3), 1, 1), (2, 6, 5, 4)),
    "max-pooling": (lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True), (2, 3, 9, 8)),
    "average-pooling": (lambda x: F.avg_pool2d(x, (3, 2), 2, 1, True, False), (2, 3, 9, 8)),
    "average-pooling by a divisor": (lambda x: F.avg_pool2d(x, 3, 2, 1, divisor_override=4), (2, 3, 9, 8)),
    "adaptive average-pooling": (lambda x: F.adaptive_avg_pool2d(x, (3, 5)), (2, 3, 7, 8)),
    "nearest": (lambda x: F.interpolate(x, (7, 9)), (2, 3, 4, 5)),
    "bilinear": (lambda x: F.interpolate(x, (7, 9), mode="bilinear", align_corners=True), (2, 3, 4, 5)),
    "bilinear by a factor": (lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear"), (2, 3, 4, 5)),
    "bicubic": (lambda x: F.interpolate(x, (7, 9), mode="bicubic"), (2, 3, 4, 5)),
    "nearest, one axis": (lambda x: F.interpolate(x, 7), (2, 3, 4)),
    "nearest, three axes": (lambda x: F.interpolate(x, scale_factor=(2, 1.5, 2)), (1, 2, 3, 4, 2)),
    "linear": (lambda x: F.interpolate(x, scale_factor=1.7, mode="linear"), (2, 3, 5)),
    "trilinear": (lambda x: F.interpolate(x, (5, 7, 3), mode="trilinear", align_corners=True), (1, 2, 3, 4, 2)),
    "bilinear, smoothed": (lambda x: F.interpolate(x, (3, 5), mode="bilinear", antialias=True), (2, 3, 7, 8)),
    "adaptive max-pooling": (lambda x: F.adaptive_max_pool2d(x, (3, 5)), (2, 3, 7, 8)),
    "adaptive max-pooling, three axes": (lambda x: F.adaptive_max_pool3d(x, (2, 3, 1)), (1, 2, 5, 4, 3)),
    "replication, three axes": (lambda x: F.pad(x, (1, 2, 0, 3, 2, 1), "replicate"), (1, 2, 3, 5, 4)),
    "circular": (lambda x: F.pad(x, (1, 2, 0, 3), "circular"), (2, 3, 5, 4)),
    "sliding windows": (lambda x: x.unfold(2, 3, 2), (2, 3, 9, 4)),
    "a diagonal": (lambda x: x.diagonal(-1, 1, 3), (2, 5, 3, 4)),
    "a diagonal above": (lambda x: x.diagonal(1, 1, 2), (2, 3, 5)),
    "reflection": (lambda x: F.pad(x, (1, 2, 0, 3), "reflect"), (2, 3, 5, 4)),
    "replication": (lambda x: F.pad(x, (1, 2, 0, 3), "replicate"), (2, 3, 5, 4)),
    "slices": (lambda x: x[:, :, 1:7:3, -3:], (2, 3, 9, 8)),
    "one of many": (lambda x: x[:, -2], (2, 3, 5)),
    "batch norm": (lambda x: F.batch_norm(x, WEIGHT[0, :3, 0, 0], WEIGHT[1, :3, 0, 0] ** 2, eps=0.1), (2, 3, 5)),
    "masks": (lambda x: F.relu6(x.mul(4)) + x.relu() + x.abs() + x.clamp(-0.5, 0.5), (2, 3, 5)),
}
WEIGHT = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_steps_in_operations_that_onnx_has(name: str, generator: torch.Generator) -> None:
    operate, shape = TRANSPOSED[name]
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    y = torch.randn(shape, generator=generator, dtype=torch.float64)
    weights = torch.randn(operate(x).shape, generator=generator, dtype=torch.float64)
    method = ScoreMap(lambda x: (operate(x) * weights).flatten(1).sum(1))
    graph = trace(lambda x: [method.attribute(x)], (x,))
    state = graph.read()
    module = functional(graph.module, (x, *state), ONNX)
    names = {str(node.target) for node in module.graph.nodes}
    assert not [name for name in names if "backward" in name or "empty" in name or "view.dtype" in name]
    assert_close(module(y, *state)[0], method.attribute(y), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in TRANSPOSED if re.search("nearest|linear|cubic", name)])
def test_enlargements_of_any_number_of_images(name: str, tmp_path: Path, generator: torch.Generator) -> None:
    """PyTorch's own backward operations of these take no sizes that are symbols."""
    operate, (_, *shape) = TRANSPOSED[name]
    images = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    weights = torch.randn(operate(images[:1]).shape, generator=generator, dtype=torch.float64)
    method = ScoreMap(lambda x: (operate(x) * weights).flatten(1).sum(1))
    exported = compile_map(method, images[:1], backend="graph").export(tmp_path / "map.pt2")
    (found,) = read_back(exported.path, ["image"], ["map"])(images)
    assert_close(found, method.attribute(images), rtol=1e-10, atol=1e-12)


# -- compiled


def test_without_a_compiler_the_plain_graph_runs(
    model: Network, inputs: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor
    from torch._inductor.exc import InvalidCxxCompiler

    def broken(*_: object, **__: object) -> None:
        raise InvalidCxxCompiler

    monkeypatch.setattr(torch._inductor, "compile", broken)
    with pytest.warns(UserWarning, match="runs as a plain graph, for Inductor cannot compile it here") as caught:
        compiled = compile_map(ScoreMap(model), inputs, 1)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert_close(compiled(inputs, 2), ScoreMap(model).attribute(inputs, 2))


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler"
)


@needs_compiler
def test_inductor_gives_the_same_map(generator: torch.Generator) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardswish(), nn.Flatten(), nn.Linear(64, 3)).eval().double()
    x = torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        compiled = compile_map(ScoreMap(model), x, 1)
    other = torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64)
    assert_close(compiled(other, [2, 0]), ScoreMap(model).attribute(other, [2, 0]), rtol=1e-9, atol=1e-11)
    with torch.no_grad():
        model[0].weight.neg_()
    assert_close(compiled(other, [2, 0]), ScoreMap(model).attribute(other, [2, 0]), rtol=1e-9, atol=1e-11)


@needs_compiler
@pytest.mark.parametrize(
    ("pool", "axes"), [(nn.AvgPool2d(3, 2, 1, ceil_mode=True), 2), (nn.AvgPool3d(2, ceil_mode=True), 3)]
)
def test_inductor_gives_averages_of_windows_that_reach_beyond_the_padding(
    pool: nn.Module, axes: int, generator: torch.Generator
) -> None:
    x = torch.randn(2, 3, *[6 if axes == 2 else 5] * axes, generator=generator)
    method = ScoreMap(nn.Sequential(pool, nn.Flatten()))
    assert_close(compile_map(method, x, 1)(-x, 2), method.attribute(-x, 2))


def test_a_function_as_target_of_a_fused_map_is_another_score_than_the_label(model: Network, inputs: Tensor) -> None:
    method = FusedScoreMap(model)

    def second(output: Tensor) -> Tensor:
        return output[:, 1]

    assert_close(compile_map(method, inputs, second, backend="graph")(inputs), method.attribute(inputs, second))
    assert not torch.allclose(method.attribute(inputs, second), method.attribute(inputs, 1))


class ChannelsLast(nn.Module):
    """A linear layer on (N, h, w, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.linear, self.head = nn.Conv2d(3, 24, 2, 2), nn.Linear(24, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.stem(x).permute(0, 2, 3, 1)).relu()
        return self.head(y.mean((1, 2)))


def test_a_file_sums_over_the_channels_that_the_eager_map_does(tmp_path: Path, generator: torch.Generator) -> None:
    model = ChannelsLast().eval()
    images, labels = torch.randn(2, 3, 16, 16, generator=generator), torch.tensor([4, 0])
    method = LayerScoreMap(model, model.linear)
    exported = compile_map(method, images, labels, backend="graph").export(tmp_path / "map.pt2")
    expected = method.attribute(images, labels)
    assert expected.shape == (2, 8, 8, 1)
    found = read_back(exported.path, ["image", "target"], list(exported.returns))(images, labels)
    by_name = dict(zip(exported.returns, found, strict=True))
    assert_close(by_name["map"], expected, rtol=1e-4, atol=1e-6)


def with_frozen_held(method: ScoreMap, x: Tensor) -> tuple[fx.GraphModule, list[Tensor], list[fx.Node]]:
    """Return the graph of a map as Inductor gets it, the state that it reads, and what is held in it."""
    graph = trace(lambda x: [method.attribute(x, 1)], (x,), dict(method.forward_func.named_modules()))
    state = graph.read()
    module = functional(graph.module, [x, *state])
    hold_frozen(module)
    return module, state, [node for node in module.graph.nodes if "force_stride_order" in str(node.target)]


def test_masks_are_held_as_bytes_where_they_outlive_what_they_were_made_of(generator: torch.Generator) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU6(), nn.Flatten(),
        nn.Linear(8 * 24 * 24, 4),
    ).eval()  # fmt: skip
    x, other = torch.randn(2, 2, 3, 24, 24, generator=generator)
    method = ScoreMap(model)
    module, state, held = with_frozen_held(method, x)
    assert [(node.meta.get("val"), len(node.users)) for node in held] == [(None, 1)] * 2
    assert_close(module(other, *state)[0], method.attribute(other, 1), rtol=0, atol=0)
    types = {node.args[0].args[1] for node in held}
    assert types == {torch.uint8}


@pytest.mark.parametrize(
    ("channels", "layout", "shape"),
    [
        (16, torch.contiguous_format, (1, 2, 256, 256)),
        (16, torch.channels_last, (1, 16, 32, 256)),
        (17, torch.contiguous_format, (1, 17, 32, 256)),
    ],
)
def test_large_masks_are_held_as_bits(
    channels: int, layout: torch.memory_format, shape: tuple[int, ...], generator: torch.Generator
) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, 4, 4, 4), nn.Flatten(),
        nn.Linear(4 * 64 * 64, 4),
    ).eval().to(memory_format=layout)  # fmt: skip
    x, other = torch.randn(2, 1, 3, 256, 256, generator=generator).unbind()
    method = ScoreMap(model)
    module, state, held = with_frozen_held(method, x)
    values = Values(module)
    assert_close(values.run(other, *state)[0], method.attribute(other, 1), rtol=0, atol=0)
    as_bytes, as_bits = (values.found[node] for node in held)
    assert as_bytes.dtype == as_bits.dtype == torch.uint8
    assert as_bytes.shape == (1, channels, 256, 256)
    assert as_bits.shape == shape


class Values(fx.Interpreter):
    """A run of a graph that keeps what each node returns."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.found[n] = super().run_node(n)
        return self.found[n]


@pytest.mark.parametrize("act", [nn.GELU, nn.SiLU, nn.Hardswish, nn.Tanh])
def test_gates_are_held_instead_of_both_tensors_of_their_quotient(
    act: type[nn.Module], generator: torch.Generator
) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), act(), nn.Conv2d(8, 8, 3, padding=1), act(), nn.Flatten(),
        nn.Linear(8 * 24 * 24, 4),
    ).eval()  # fmt: skip
    x, other = torch.randn(2, 2, 3, 24, 24, generator=generator)
    method = ScoreMap(model)
    module, state, held = with_frozen_held(method, x)
    assert [(node.args[0].meta["val"].dtype, len(node.users)) for node in held] == [(torch.float32, 1)] * 2
    assert_close(module(other, *state)[0], method.attribute(other, 1), rtol=0, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolutions_are_compiled_as_what_is_faster(layout: torch.memory_format, generator: torch.Generator) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 7, 2, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 3, 2, 2, 2, 2),
        nn.Flatten(), nn.Linear(6 * 6 * 6, 4),
    ).double().eval().to(memory_format=layout)  # fmt: skip
    x, other = torch.randn(2, 1, 3, 24, 24, generator=generator, dtype=torch.float64).unbind()
    method = ScoreMap(model)
    graph = trace(lambda x: [method.attribute(x, 1)], (x,), dict(model.named_modules()))
    module = functional(graph.module, [x, *graph.read()], INDUCTOR)
    counts = [len(module.graph.find_nodes(op="call_function", target=one)) for one in INDUCTOR]
    assert counts[:2] == [4, 0]  # the first one, its transpose by phases, the last one, and its transpose
    assert_close(module(other, *graph.read())[0], method.attribute(other, 1), rtol=1e-11, atol=1e-13)


class Small(nn.Module):
    """One of each kind of thing that a graph holds besides tensors, and what its runs leave behind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.act, self.drop = nn.Sequential(nn.LeakyReLU(0.1)), nn.Dropout(0.5)
        self.head = nn.Linear(4, LABELS)
        self.scale, self.shift, self.powers = 1.5, torch.tensor([1.0, 2, 3, 4])[:, None, None], {"used": [2, 3]}
        self.unlisted, self.rows = [nn.Linear(4, 4)], np.array([1, 2])
        self.runs, self.seen, self.history = 0, None, []

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x))) * self.scale + self.shift
        x = x ** self.powers["used"][0] * float(self.rows[0])
        self.runs, self.seen = self.runs + 1, x
        self.history.append(x.shape)
        found: Tensor = self.head(self.drop(self.unlisted[0](x.mean((2, 3)))))
        return found


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def at(name: str, value: object) -> Callable[[Small], object]:
    """Return what puts a value in a place of a model."""
    owner, _, key = name.rpartition(".")
    return lambda model: setattr(model.get_submodule(owner), key, value)


CHANGES: dict[str, tuple[str, Callable[[Small], object]]] = {
    "another head": ("head", at("head", nn.Linear(4, LABELS))),
    "a head of other labels": ("head", at("head", nn.Linear(4, LABELS + 1))),
    "a module without tensors": ("act.0", lambda model: setattr(model.act, "0", nn.GELU())),
    "a module with children": ("act", at("act", nn.Sequential(nn.LeakyReLU(0.1)))),
    "a module less": ("act.0", lambda model: model.act.__delitem__(0)),
    "a module more": ("act.1", lambda model: model.act.append(nn.Tanh())),
    "training": ("training', True for False", lambda model: model.train()),
    "training of one": ("drop.training", lambda model: model.drop.train()),
    "a slope": ("act.0.negative_slope', 0.9 for 0.1", at("act.0.negative_slope", 0.9)),
    "eps": ("norm.eps', 0.1 for 1e-05", at("norm.eps", 0.1)),
    "a stride": ("conv.stride", at("conv.stride", (2, 2))),
    "a number": ("scale', 3.0 for 1.5", at("scale", 3.0)),
    "a number that is gone": ("scale", lambda model: delattr(model, "scale")),
    "a tensor": ("shift", at("shift", torch.ones(4, 1, 1))),
    "an array": ("rows", at("rows", np.array([3, 4]))),
    "a number in a list": ("powers.used.0', 3 for 2", lambda model: model.powers["used"].__setitem__(0, 3)),
    "a module in a list": ("unlisted.0", lambda model: model.unlisted.__setitem__(0, nn.Linear(4, 4))),
    "a forward pass": ("act.0.forward", at("act.0.forward", torch.tanh)),
    "a class": ("act.0', a ReLU for a LeakyReLU", at("act.0.__class__", nn.ReLU)),
    "a parametrization": (
        "head', a ParametrizedLinear for a Linear",
        lambda model: parametrize.register_parametrization(model.head, "weight", Doubled()),
    ),
    "a pruned weight": ("head.weight", lambda model: prune.l1_unstructured(model.head, "weight", 0.5)),
    "a hook": ("head.hooks.", lambda model: model.head.register_forward_hook(lambda _, __, output: output * 2)),
    "a hook before": ("head.hooks.", lambda model: model.head.register_forward_pre_hook(lambda _, args: args)),
    "a bias that there was none of": ("conv.bias", at("conv.bias", nn.Parameter(torch.ones(4)))),
}


CALLED: dict[str, Callable[[Small], Callable[[Tensor], Tensor]]] = {
    "model": lambda model: model,
    "function": lambda model: lambda x: model(x),
    "method": lambda model: model.forward,
}


@pytest.fixture(scope="module")
def compiled_small() -> Callable[[str], tuple[Small, CompiledMap]]:
    """A model and the map of it, by how it is called: copies of what was compiled once, but of functions."""

    def compiled(called: str) -> tuple[Small, CompiledMap]:
        model = Small().eval()
        return model, compile_map(ScoreMap(CALLED[called](model)), torch.rand(2, 3, 8, 8), 1, backend="graph")

    once = {called: compiled(called) for called in ("model", "method")}
    return lambda called: copy.deepcopy(once[called]) if called in once else compiled(called)


@pytest.mark.parametrize("case", CHANGES)
def test_a_model_that_has_changed_otherwise_than_in_its_weights_is_refused(
    case: str, compiled_small: Callable[[str], tuple[Small, CompiledMap]]
) -> None:
    what, change = CHANGES[case]
    images = torch.rand(2, 3, 8, 8)
    for called in CALLED:
        model, compiled = compiled_small(called)
        model(images)  # what a run leaves behind is no change
        assert_close(compiled(images, 2), ScoreMap(model).attribute(images, 2))
        change(model)
        with pytest.raises(ValueError, match=rf"as it was when .* got another '{re.escape(what)}.*compile the map aga"):
            compiled(images, 1)
        with pytest.raises(ValueError, match=rf"as it was when .* got another '{re.escape(what)}"):
            compiled.export("never.pt2")


def test_a_model_that_is_set_back_is_as_it_was_and_one_that_is_compiled_again_is_followed() -> None:
    model, images = Small().eval(), torch.rand(2, 3, 8, 8)
    compiled = compile_map(ScoreMap(model), images, 1, backend="graph")
    expected = compiled(images, 1)
    model.train()
    model.eval()
    model.norm.eps, model.conv.stride, model.powers = float("1e-5"), (1, 1), {"used": [2, 3]}
    with model.head.register_forward_hook(lambda _, __, output: output * 2):
        doubled = compile_map(ScoreMap(model), images, 1, backend="graph")
        assert_close(doubled(images, 1), expected * 2)
    assert_close(compiled(images, 1), expected)
    with pytest.raises(ValueError, match=r"another 'head\.hooks"):
        doubled(images, 1)
    model.head.weight = None
    with pytest.raises(ValueError, match=r"tensors must be as they were .* got none for 'head\.weight'"):
        compiled(images, 1)


def test_a_method_that_has_changed_is_refused() -> None:
    model, images = Small().eval(), torch.rand(2, 3, 8, 8)
    method = LayerScoreMap(model, model.conv)
    compiled = compile_map(method, images, 1, backend="graph")
    method.layer = model.act
    with pytest.raises(ValueError, match=r"got another 'method\.layer'"):
        compiled(images, 1)


def test_copies_go_by_the_model_that_is_copied_with_them() -> None:
    model = nn.Sequential(Mixed(), nn.LeakyReLU(0.1)).eval()
    images = torch.rand(2, 4)
    compiled = compile_map(ScoreMap(model), images, 1, backend="graph")
    expected = compiled(images, 1)
    other, copied = copy.deepcopy((model, compiled))
    with torch.no_grad():
        other[0].linear.weight.neg_()
    for count in (2, 3):  # this one is compiled for each
        more = torch.rand(count, 4)
        assert_close(copied(more, 1), ScoreMap(other).attribute(more, 1))
    other[1].negative_slope = 0.5
    with pytest.raises(ValueError, match=r"another '1\.negative_slope', 0\.5 for 0\.1"):
        copied(images, 1)
    assert_close(compiled(images, 1), expected)
    assert copy.copy(compiled) is compiled


def test_compiled_maps_are_not_pickled() -> None:
    compiled = compile_map(ScoreMap(small()), torch.rand(1, 3, 8, 8), 1, backend="graph")
    with pytest.raises(TypeError, match=r"must stay in its process, .* as a file: compiled\.export\(path\)"):
        pickle.dumps(compiled)


def test_weights_of_another_type_or_layout_are_told_apart() -> None:
    model, images = small(), torch.rand(1, 3, 8, 8)
    compiled = compile_map(ScoreMap(model), images, 1, backend="graph")
    model.to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"strides \(27, 9, 3, 1\); got .* strides \(27, 1, 9, 3\) for '0\.weight'"):
        compiled(images, 1)
    model.to(memory_format=torch.contiguous_format).half()
    with pytest.raises(ValueError, match=r"float32, on cpu, .*; got .*float16"):
        compiled(images, 1)


def test_maps_that_other_threads_compute_of_a_model_change_nothing() -> None:
    model, images = Small().eval(), torch.rand(2, 3, 8, 8)
    compiled = compile_map(ScoreMap(model), images, 1, backend="graph")
    expected = compiled(images, 1)
    with ThreadPoolExecutor(1) as pool:
        for layer in (model.act, model.conv):
            eager = [pool.submit(LayerScoreMap(model, layer).attribute, images, 1) for _ in range(10)]
            while not all(one.done() for one in eager):
                assert_close(compiled(images, 1), expected)


def small() -> nn.Sequential:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, LABELS))
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), head).eval()


def test_maps_with_gradients_are_refused() -> None:
    model, images = small(), torch.rand(2, 3, 8, 8)
    for method in (ScoreMap(model), LayerScoreMap(model, model[0])):
        with pytest.raises(ValueError, match=r"grad_kwargs must be left out, got create_graph: .*method\.attribute"):
            compile_map(method, images, 1, backend="graph", grad_kwargs={"create_graph": True})


def test_files_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model, images = small(), torch.rand(1, 3, 8, 8)
    compiled = compile_map(ScoreMap(model), images, 1, backend="graph")
    for name in ("MAP.PT2", "~/of mine ä.pt2"):
        written = compiled.export(tmp_path / name if name[0] != "~" else name, any_number=False).path
        assert capfd.readouterr().err == ""
        assert written.parent == tmp_path
        assert_close(read_back(written, ["image", "target"], ["map"])(images, torch.tensor([1])), [compiled(images, 1)])
        capfd.readouterr()  # PyTorch says something of the suffix here
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(ValueError, match=r"path must be a file, got '.*folder\.pt2', a folder\. Name a file in it"):
        compiled.export(tmp_path / "folder.pt2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["MAP.PT2", "folder.pt2", "of mine ä.pt2"]


def export_and_die(path: Path) -> None:
    """Die once the file is written, before it has its name."""
    export.read_back = lambda *_: os._exit(9)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
    compile_map(ScoreMap(model), torch.rand(1, 3, 2, 2), 1, backend="graph").export(path)


@needs_fork
@pytest.mark.parametrize("name", ["map.pt2", "map.onnx"])
def test_what_a_killed_export_leaves_is_gone_after_the_next(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    process = start(export_and_die, path)
    process.join()
    assert process.exitcode == 9
    assert not path.exists()
    compile_map(ScoreMap(small()), torch.rand(1, 3, 8, 8), 1, backend="graph").export(path)
    assert list(tmp_path.iterdir()) == [path]


def test_what_onnxruntime_refuses_is_said_without_the_name_of_a_draft(tmp_path: Path) -> None:
    model, images = small().bfloat16(), torch.rand(1, 3, 8, 8).bfloat16()
    compiled = compile_map(ScoreMap(model), images, 1, backend="graph")
    with pytest.raises(ValueError, match=r"onnxruntime, which says: This is an invalid model") as raised:
        compiled.export(tmp_path / "map.onnx", any_number=False)
    assert str(tmp_path) not in str(raised.value)
