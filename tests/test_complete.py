"""Complete maps: nothing of S without a place."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.testing import assert_close

from captum_scoremap import (
    CompleteScoreMap,
    FusedScoreMap,
    LayerScoreMap,
    MultiView,
    bias_maps,
    bias_terms,
    linear_form,
    prepare,
)
from captum_scoremap.attribution import default_layers
from captum_scoremap.layout import resized
from captum_scoremap.linear import Subject, main_layers, main_modules
from captum_scoremap.metrics import cause_game, single_deletion
from captum_scoremap.rules import DEFAULT
from tests import families
from tests.state import untouched

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": families.small_resnet,
    "mobilenet_v3": families.small_mobilenet_v3,
    "densenet": families.small_densenet,
    "googlenet": families.with_fewer_channels("googlenet").build,
    "convnext": families.small_convnext,
    "swin": partial(families.small_swin, 1),
    "vit_tiny": lambda: timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=64, depth=3),
}


def drawn(name: str, generator: torch.Generator) -> tuple[nn.Module, Tensor]:
    model = NETWORKS[name]().double().eval()
    with torch.no_grad():
        for name_of, parameter in model.named_parameters():  # biases are zero as built
            if name_of.endswith("bias"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model, torch.randn(2, 3, 64, 64, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", NETWORKS)
def test_complete_maps_add_up_at_the_image_and_at_layers(name: str, generator: torch.Generator) -> None:
    model, images = drawn(name, generator)
    with torch.no_grad():
        score = model(images)[:, 3]
    layers = list(main_modules(Subject(model, (images,))))[-3:]
    choices = ["image", None, *layers] if len(layers) > 1 else ["image", *layers]
    with untouched(model, images):
        for choice in choices:
            complete, placeless = CompleteScoreMap(model, choice).attribute(images, 3, return_placeless=True)
            assert complete.shape[:2] == (2, 1)
            assert_close(complete.sum((1, 2, 3)) + placeless, score, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", NETWORKS)
def test_bias_maps_add_up_to_the_bias_and_to_its_terms(name: str, generator: torch.Generator) -> None:
    model, images = drawn(name, generator)
    found = bias_maps(model, images, 3)
    entries = [one.sum((1, 2, 3)) for one in found.maps.values()] + list(found.placeless.values())
    assert_close(sum(entries), linear_form(model, images, 3).bias, rtol=1e-9, atol=1e-10)
    terms = bias_terms(model, images, 3)
    for term in terms:
        places = [one for key, one in found.maps.items() if key.partition("#")[0] == term]
        rest = found.placeless.get(term, torch.zeros(2, dtype=torch.float64))
        total = sum((one.sum((1, 2, 3)) for one in places), rest)
        assert_close(total, terms[term], rtol=1e-8, atol=1e-10)


def test_bias_maps_of_tokens_leave_out_the_class_token(generator: torch.Generator) -> None:
    model, images = drawn("vit_tiny", generator)
    layer = model.blocks[1]
    found = bias_maps(model, images, 3, layer)
    total = sum([one.sum((1, 2, 3)) for one in found.maps.values()] + list(found.placeless.values()))
    form = linear_form(model, images, 3, layer)
    assert form.sub_scores[:, 0].abs().max() > 0
    assert_close(total, form.bias, rtol=1e-9, atol=1e-10)
    complete, placeless = CompleteScoreMap(model, layer).attribute(images, 3, return_placeless=True)
    assert complete.shape == (2, 1, 4, 4)
    assert_close(complete.sum((1, 2, 3)) + placeless, form.score, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("build", [families.with_fewer_channels("alexnet").build, families.small_resnet])
def test_multi_view_networks_have_complete_maps_of_the_whole_image(
    build: Callable[[], nn.Module], generator: torch.Generator
) -> None:
    model = build().double().eval()
    views = MultiView.from_classifier(model)
    images = torch.randn(2, 3, 256, 288, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        score = views(images)[:, 3]
    for layers, size in (
        (None, (256, 288)),
        ("image", (256, 288)),
        (views.sliding, views.view_scores(images).shape[2:]),
    ):
        complete, placeless = CompleteScoreMap(views, layers).attribute(images, 3, return_placeless=True)
        assert complete.shape == (2, 1, *size)
        assert_close(complete.sum((1, 2, 3)) + placeless, score, rtol=1e-10, atol=1e-10)
    below = list(main_modules(Subject(views.features, (images,))))[-2:]
    rows = [CompleteScoreMap(views, layer).attribute(images, 3).shape[2] for layer in below]
    weights = [1 / count / sum(1 / other for other in rows) for count in rows]
    maps = [CompleteScoreMap(views, [layer]).attribute(images, 3) for layer in below]
    by_hand = sum(weight * one for weight, one in zip(weights, maps, strict=True))
    assert_close(CompleteScoreMap(views).attribute(images, 3), by_hand)


def test_the_preprocessing_mean_moves_score_between_map_and_bias_at_the_same_place(generator: torch.Generator) -> None:
    """What an origin of the pixels takes from A·Y it gives to the constant at the same place: regional sums stay."""
    model, images = drawn("resnet", generator)
    mean = torch.tensor([0.3, -0.5, 0.8], dtype=torch.float64).view(3, 1, 1)
    shifted = nn.Sequential(AddConstant(mean), model).eval()
    assert_close(shifted(images - mean), model(images))
    plain = [linear_form(one, x, 3).sums for one, x in ((model, images), (shifted, images - mean))]
    assert (plain[0] - plain[1]).abs().max() > 1e-3
    maps = [CompleteScoreMap(one, "image").attribute(x, 3) for one, x in ((model, images), (shifted, images - mean))]
    assert_close(maps[0], maps[1], rtol=1e-9, atol=1e-10)


class Windowed(nn.Module):
    """A linear layer on every position, in windows of a map that is padded and rolled, as in Swin, or directly."""

    def __init__(self, windows: bool) -> None:
        super().__init__()
        self.stem, self.linear, self.norm = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)
        self.windows = windows

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        if self.windows:
            n, h, w, c = x.shape
            padded = nn.functional.pad(x, (0, 0, 0, 4 - w % 4, 0, 4 - h % 4)).roll((-1, -2), (1, 2))
            rows, columns = padded.shape[1] // 4, padded.shape[2] // 4
            windows = padded.reshape(n, rows, 4, columns, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
            windows = self.norm(self.linear(windows).relu())
            padded = windows.reshape(n, rows, columns, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(padded.shape)
            x = padded.roll((1, 2), (1, 2))[:, :h, :w]
        else:
            x = self.norm(self.linear(x).relu())
        return self.head(x.square().mean((1, 2)))


@pytest.mark.parametrize("scale", [1.0, 1e6, 1e-6])  # of the score: rounding grows with it
def test_constants_inside_windows_stand_at_their_positions(scale: float, generator: torch.Generator) -> None:
    direct = Windowed(False).double().eval().requires_grad_(False)
    windowed = Windowed(True).double().eval().requires_grad_(False)
    direct.head.weight.mul_(scale)
    windowed.load_state_dict(direct.state_dict())
    images = torch.randn(2, 3, 20, 14, generator=generator, dtype=torch.float64)
    assert_close(windowed(images), direct(images))
    expected, found = (bias_maps(model, images, 1) for model in (direct, windowed))
    assert set(found.placeless) == {"head"}
    near = {"rtol": 1e-9, "atol": 1e-12 * scale}
    for name in ("linear", "norm"):
        assert_close(found.maps[name], expected.maps[name], **near)
    layer = CompleteScoreMap(windowed, windowed.linear).attribute(images, 1)
    assert_close(layer, CompleteScoreMap(direct, direct.linear).attribute(images, 1), **near)


@pytest.mark.parametrize("build", [partial(families.small_swin, 1), partial(families.small_swin, 2), "vit"])
def test_every_image_of_a_batch_has_its_own(build: Any, generator: torch.Generator) -> None:
    """Windows and tokens before images in memory: rows of several images lie between each other."""
    if build == "vit":
        model: nn.Module = torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=5)
        images = torch.randn(3, 3, 32, 32, generator=generator, dtype=torch.float64)
    else:
        model, images = build(), torch.randn(3, 3, 64, 64, generator=generator, dtype=torch.float64)
    model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    maps, placeless = CompleteScoreMap(model, "image").attribute(images, 3, return_placeless=True)
    for one, image, rest in zip(maps, images, placeless, strict=True):
        alone, rest_alone = CompleteScoreMap(model, "image").attribute(image[None], 3, return_placeless=True)
        assert_close(one[None], alone, rtol=1e-8, atol=1e-11)
        assert_close(rest[None], rest_alone, rtol=1e-8, atol=1e-11)


def test_as_many_tokens_as_images_are_told_apart(generator: torch.Generator) -> None:
    """Tokens come first: (tokens, N, C), whose shape is that of (N, tokens, C)."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.norm, self.head = nn.Conv2d(3, 8, 2, 2), nn.LayerNorm(8), nn.Linear(8, 3)
            self.mix = nn.TransformerEncoderLayer(8, 2, 16, batch_first=False)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.patches(x).flatten(2).permute(2, 0, 1)
            return self.head(self.norm(self.mix(tokens)).mean(0))

    model = Tokens().double().eval()
    images = torch.randn(9, 3, 6, 6, generator=generator, dtype=torch.float64)
    for layer in (model.patches, model.mix, model.norm):
        each = [CompleteScoreMap(model, layer).attribute(image[None], 1) for image in images]
        for count in (4, 9):
            found = CompleteScoreMap(model, layer).attribute(images[:count], 1)
            assert_close(found, torch.cat(each[:count]), rtol=1e-9, atol=1e-12)


class AddConstant(nn.Module):
    """Give pixels another origin."""

    def __init__(self, constant: Tensor) -> None:
        super().__init__()
        self.register_buffer("constant", constant)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.constant


class Small(nn.Module):
    """A convolution beside a shortcut, by hand: S = sum over positions of w·(relu(conv(x)) + x) + b."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 2, 1), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.conv(x).relu() + x).sum((2, 3)))


def test_a_network_by_hand(generator: torch.Generator) -> None:
    model = Small().double().eval()
    images = torch.randn(2, 2, 3, 4, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        before = model.conv(images)
        mask, weight = (before > 0).double(), model.head.weight[1]
        bias = (mask * model.conv.bias[:, None, None] * weight[:, None, None]).sum(1, keepdim=True)
        shortcut = (images * weight[:, None, None]).sum(1, keepdim=True)
        branch = (before * mask * weight[:, None, None]).sum(1, keepdim=True)
    at_image = bias_maps(model, images, 1)
    assert_close(at_image.maps["conv"], bias)
    assert_close(at_image.placeless["head"], model.head.bias[1].detach().expand(2))
    complete = CompleteScoreMap(model, "image").attribute(images, 1)
    assert_close(complete, branch + shortcut)
    # at the convolution the shortcut is a bypass: it counts, at its place
    form = linear_form(model, images, 1, model.conv)
    assert_close(form.score_map(), branch)
    assert_close(form.complete_map(), branch + shortcut)
    assert_close(form.complete_map().sum((1, 2, 3)) + form.placeless, form.score)


def test_folding_norms_does_not_change_the_map(generator: torch.Generator) -> None:
    model = families.small_resnet().double().eval()
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.1 * torch.rand(buffer.shape, generator=generator, dtype=torch.float64))
    images = torch.randn(1, 3, 64, 64, generator=generator, dtype=torch.float64)
    folded = prepare(model)
    for layer in ("image", "layer2", "layer4"):
        maps = [
            CompleteScoreMap(one, layer if layer == "image" else one.get_submodule(layer)).attribute(images, 5)
            for one in (model, folded)
        ]
        assert_close(maps[0], maps[1], rtol=1e-9, atol=1e-9)


def test_the_mean_of_layers_is_the_mean_of_their_maps(generator: torch.Generator) -> None:
    model, images = drawn("resnet", generator)
    layers = [model.layer2, model.layer4]
    alone = [linear_form(model, images, 1, layer).complete_map((64, 64)) for layer in layers]
    assert_close(CompleteScoreMap(model, layers).attribute(images, 1), (alone[0] + alone[1]) / 2, rtol=1e-9, atol=1e-9)


def test_default_layers_count_less_where_the_score_is_at_the_class_token(generator: torch.Generator) -> None:
    stem = [torchvision.models.vision_transformer.ConvStemConfig(out, 3, 2) for out in (8, 16)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torchvision.models.VisionTransformer(32, 4, 4, 2, 16, 32, num_classes=5, conv_stem_configs=stem)
    model = model.double().eval()
    with torch.no_grad():
        model.heads.head.weight.normal_(generator=generator)  # zero as built
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    images = torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)
    found, placeless = CompleteScoreMap(model).attribute(images, 1, return_placeless=True)
    with torch.no_grad():
        assert_close(found.sum((1, 2, 3)) + placeless, model(images)[:, 1], rtol=1e-10, atol=1e-10)

    *_, (finer, (before, _)), (coarser, (rows, _)) = main_modules(Subject(model, (images,))).items()
    tokens = LayerScoreMap(model, coarser).attribute(images, 1)[:, :, 0]
    at_patches, at_class_token = tokens[:, 1:].sum(1).abs(), tokens[:, 0].abs()
    assert bool((at_class_token > at_patches).all())
    weights = torch.stack([torch.full_like(placeless, 1 / before), at_patches / (at_patches + at_class_token) / rows])
    maps = [linear_form(model, images, 1, layer).complete_map((32, 32)) for layer in (finer, coarser)]
    by_hand = sum((weight / weights.sum(0)).view(2, 1, 1, 1) * one for weight, one in zip(weights, maps, strict=True))
    assert_close(found, by_hand, rtol=1e-9, atol=1e-9)
    named = CompleteScoreMap(model, [finer, coarser]).attribute(images, 1)  # what a user names is not weighed
    assert_close(named, (maps[0] + maps[1]) / 2, rtol=1e-9, atol=1e-9)


def test_a_score_that_does_not_depend_on_the_layer_is_placeless(generator: torch.Generator) -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            self.unused(x)
            return self.used(x).mean((2, 3))

    model = Aside().double().eval()
    images = torch.randn(2, 2, 3, 3, generator=generator, dtype=torch.float64)
    complete, placeless = CompleteScoreMap(model, model.unused).attribute(images, 0, return_placeless=True)
    assert not complete.any()
    assert_close(placeless, model(images)[:, 0].detach())


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (3, 2), (4, 9)])
def test_resizing_keeps_sums(size: tuple[int, int], generator: torch.Generator) -> None:
    one = torch.randn(2, 1, 4, 3, generator=generator, dtype=torch.float64)
    assert_close(resized(one, size).sum((2, 3)), one.sum((2, 3)))


@pytest.mark.parametrize("build", [CompleteScoreMap, FusedScoreMap])
def test_default_layers_are_those_of_the_model_as_it_is(build: Any, generator: torch.Generator) -> None:
    def block(channels: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU())

    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    model = nn.Sequential(block(3), nn.MaxPool2d(2), block(8), *head).eval()
    images = torch.rand(2, 3, 12, 12, generator=generator)
    method = build(model)
    method.attribute(images, 1)
    model[2] = block(8)
    assert_close(method.attribute(images, 1), build(copy.deepcopy(model)).attribute(images, 1))


@pytest.mark.parametrize("build", [CompleteScoreMap, FusedScoreMap])
def test_default_layers_are_looked_for_once_for_a_model_and_size(
    build: Any, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[torch.Size] = []
    plain = default_layers.main_modules
    monkeypatch.setattr(
        default_layers,
        "main_modules",
        lambda subject, *of: looked.append(subject.inputs[0].shape) or plain(subject, *of),
    )
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), *head).eval()
    maps = []
    for size in (12, 16, 12):
        images = torch.rand(2, 3, size, size, generator=generator)
        maps += [build(model).attribute(images[:1], 1), build(model).attribute(images, 1)[:1]]
        assert_close(maps[-2], maps[-1])
        assert_close(maps[-1], build(copy.deepcopy(model)).attribute(images[:1], 1))
        looked.pop()  # of the copy
    assert [shape[2] for shape in looked] == [12, 16]
    build(model, rules={"relu": DEFAULT["relu"]}).attribute(images, 1)  # other rules may find other layers
    assert len(looked) == 3

    def of_first(output: Tensor, holds: nn.Module = model) -> Tensor:
        return output[:, 1]

    for _ in range(2):  # a function, which may be about another head
        assert bool(build(model).attribute(images, of_first).any())
    assert len(looked) == 4
    reference = weakref.ref(model)
    del model, of_first
    gc.collect()
    assert reference() is None


class Forked(nn.Module):
    """One of two ways, as an argument says."""

    def __init__(self) -> None:
        super().__init__()
        self.ways = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, way: int) -> Tensor:
        return self.head(self.ways[way](x).mean((2, 3)))


def test_default_layers_are_those_of_the_way_that_arguments_lead(generator: torch.Generator) -> None:
    model, images = Forked().eval(), torch.rand(2, 3, 12, 12, generator=generator)
    method = CompleteScoreMap(model)
    for way in (0, 1, 0):
        expected = CompleteScoreMap(model, [model.ways[way]]).attribute(images, 1, way)
        assert_close(CompleteScoreMap(model).attribute(images, 1, way), expected)
        assert_close(method.attribute(images, 1, way), expected)


class EarlyExit(nn.Module):
    """Bright images leave early, as in BranchyNet (Teerapittayanon et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(nn.Conv2d(channels, 4, 3, 2, 1), nn.ReLU()) for channels in (3, 4, 4))
        self.heads = nn.ModuleList(nn.Linear(4, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        features = self.stages[1](self.stages[0](x))
        if x.mean() > 0:
            return self.heads[0](features.mean((2, 3)))
        return self.heads[1](self.stages[2](features).mean((2, 3)))


@pytest.mark.parametrize("wraps", [False, True], ids=["a module", "a function"])
@pytest.mark.parametrize("build", [CompleteScoreMap, FusedScoreMap])
def test_default_layers_are_those_of_the_route_that_an_image_takes(
    build: Any, wraps: bool, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, plain = [], default_layers.main_modules
    monkeypatch.setattr(default_layers, "main_modules", lambda *of: looked.append(of) or plain(*of))
    bright = torch.rand(2, 3, 16, 16, generator=generator)
    original = EarlyExit().eval()
    expected = [build(copy.deepcopy(original)).attribute(images, 1) for images in (bright, -bright)]
    for order in (0, 1, 0, 1), (1, 0, 0, 1):
        model = copy.deepcopy(original)
        looked.clear()
        method = build((lambda x, model=model: model(x)) if wraps else model)
        for number in order:
            assert_close(method.attribute((bright, -bright)[number], 1), expected[number])
        assert len(looked) == 2


def test_default_layers_of_a_function_are_those_of_the_network_that_it_calls(generator: torch.Generator) -> None:
    def network() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        ).eval()

    networks, images = [network()], torch.rand(2, 3, 12, 12, generator=generator)
    method = CompleteScoreMap(lambda x: networks[0](x))
    for _ in range(2):
        assert_close(method.attribute(images, 1), CompleteScoreMap(networks[0]).attribute(images, 1))
        networks[0] = network()
        gc.collect()


class Heads(nn.Module):
    """Segmentation with an auxiliary head, which runs last, or without."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU())
        self.coarse = nn.Sequential(nn.Conv2d(6, 6, 3, 2, 1), nn.ReLU())
        self.head, self.auxiliary_head = (
            nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1)) for _ in "12"
        )
        self.names = ["out", "aux"]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.fine(x)
        found = {"out": self.head(self.coarse(fine))}
        if "aux" in self.names:
            found["aux"] = self.auxiliary_head(fine)
        return found


def out(output: dict[str, Tensor]) -> Tensor:
    return output["out"][:, 1].mean((1, 2))


@pytest.mark.parametrize("build", [CompleteScoreMap, FusedScoreMap])
def test_default_layers_are_on_the_way_to_the_score(build: Any, generator: torch.Generator) -> None:
    model = Heads().double().eval()
    images = torch.randn(2, 3, 24, 24, generator=generator, dtype=torch.float64)
    found = build(model).attribute(images, out)
    of_other = build(model).attribute(images, lambda output: output["aux"][:, 1].mean((1, 2)))
    of_function = build(lambda x: out(model(x))).attribute(images)
    alone = copy.deepcopy(model)
    alone.names = ["out"]
    expected = build(alone).attribute(images, out)
    assert_close(found, expected)
    assert_close(of_function, expected)
    assert not torch.allclose(of_other, found)
    if build is CompleteScoreMap:
        _, placeless = build(model).attribute(images, out, return_placeless=True)
        assert_close(placeless, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
        score = model(images)["aux"][:, 1].mean((1, 2))
        assert_close(of_other.sum((1, 2, 3)), score)


class Decoder(nn.Module):
    """A map of the image's size, (N, H, W), of coarser ones, as depth is estimated."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse, self.coarsest = (
            nn.Sequential(nn.Conv2d(channels, 6, 3, 2, 1), nn.ReLU()) for channels in (3, 6, 6)
        )
        self.up = nn.Sequential(nn.Upsample(scale_factor=8), nn.Conv2d(6, 4, 3, 1, 1), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(4, 1, 1), nn.Flatten(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.coarsest(self.coarse(self.fine(x)))))


@pytest.mark.parametrize("size", [(24, 24), (64, 64)])  # of which one has as many columns as cells of a square
def test_default_layers_of_a_decoder_are_the_coarsest(size: tuple[int, int], generator: torch.Generator) -> None:
    model = Decoder().double().eval()
    images = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)
    assert main_layers(model, images) == ["fine", "coarse", "coarsest", "up"]

    def target(output: Tensor) -> Tensor:
        return output[:, 4:9, 7:20].mean((1, 2))

    found = CompleteScoreMap(model).attribute(images, target)
    finer, coarser = (
        CompleteScoreMap(model, [one]).attribute(images, target) for one in (model.coarse, model.coarsest)
    )
    assert_close(found, finer / 3 + coarser * 2 / 3)


class Joined(nn.Module):
    """Scores of two grids of cells, as a detector has them, behind one another."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.fine, self.coarse = (nn.Sequential(nn.Conv2d(c, 6, 3, 2, 1), nn.ReLU()) for c in (3, 6, 6))
        self.up, self.fine_head, self.coarse_head = (nn.Conv2d(6, width, 1) for width in (6, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(self.below(x))
        coarse = self.coarse(fine)
        fine = fine + nn.functional.interpolate(self.up(coarse), scale_factor=2)
        return torch.cat([self.fine_head(fine).flatten(2), self.coarse_head(coarse).flatten(2)], 2)


@pytest.mark.parametrize("target", [(1, 3), (1, 40), [(1, 3), (2, 40)]])
def test_labels_of_heads_that_are_joined_have_maps(target: Any, generator: torch.Generator) -> None:
    model = Joined().double().eval()
    images = torch.randn(2, 3, 24, 24, generator=generator, dtype=torch.float64)
    found, placeless = CompleteScoreMap(model).attribute(images, target, return_placeless=True)
    labels = target if isinstance(target, list) else [target] * 2
    score = torch.stack([row[label] for row, label in zip(model(images), labels, strict=True)])
    assert_close(found.sum((1, 2, 3)), score)
    assert_close(placeless, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    assert bool(FusedScoreMap(model).attribute(images, target).flatten(1).any(1).all())


class _Unhashable:
    """A callable of a user's that is equal to others, and so has no hash."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> Tensor:
        return self.model(x)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Unhashable)


def test_default_layers_of_a_callable_without_a_hash(generator: torch.Generator) -> None:
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), *head).eval()
    images = torch.rand(2, 3, 12, 12, generator=generator)
    assert_close(
        CompleteScoreMap(_Unhashable(model)).attribute(images, 1), CompleteScoreMap(model).attribute(images, 1)
    )


def test_bad_layers_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5)).eval()
    images = torch.rand(1, 3, 6, 6)
    with pytest.raises(ValueError, match="must return a map"):
        CompleteScoreMap(model, model[2]).attribute(images, 1)
    with pytest.raises(ValueError, match="at least one module"):
        CompleteScoreMap(model, [])
    with pytest.raises(TypeError, match="layer must be a module"):
        CompleteScoreMap(model, "0")
    with pytest.raises(ValueError, match="one tensor of images"):
        bias_maps(nn.Linear(3, 2), torch.rand(1, 3), 0)


def test_cause_game_and_single_deletion_are_right_for_a_linear_model(generator: torch.Generator) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(2 * 8 * 8, 3)).double().eval()
    images = torch.rand(3, 2, 8, 8, generator=generator, dtype=torch.float64)
    changed = images.clone()
    changed[:, :, 2:5, 1:4] += 1.0
    target = torch.tensor([0, 1, 2])

    def exact(inputs: Tensor, target: Tensor) -> Tensor:
        return (model[1].weight[target].reshape(-1, 2, 8, 8) * inputs).detach()

    game = cause_game(model, exact, images, changed, target)
    assert_close(game.placed, game.rise)
    assert game.error < 1e-12
    assert game.correlation > 1 - 1e-9
    assert_close(single_deletion(model, exact, images, target), torch.ones(3, dtype=torch.float64))
    assert cause_game(model, lambda x, t: -exact(x, t), images, changed, target).error == pytest.approx(2)
    with pytest.raises(ValueError, match="must differ"):
        cause_game(model, exact, images, images, target)


class Gated(nn.Module):
    """Tokens, half of whose channels gate the other half, a norm, and a head on all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 2, 2), nn.LayerNorm(4), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = nn.functional.glu(self.conv(x).flatten(2).transpose(1, 2), -1)
        return self.head(self.norm(tokens).flatten(1))


def test_constants_of_tokens_with_fewer_channels_stand_at_their_positions(generator: torch.Generator) -> None:
    model, images = Gated().double(), torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        model.norm.bias.copy_(torch.randn(4, generator=generator, dtype=torch.float64))
    found = bias_maps(model, images, 1)
    expected = (model.head.weight[1].view(16, 4) * model.norm.bias).sum(1).view(1, 1, 4, 4).expand(2, 1, 4, 4)
    assert_close(found.maps["norm"], expected.detach(), rtol=1e-12, atol=1e-14)


class Table(nn.Module):
    """Eight windows of six tokens, made of what has no place: (N, 8, 6, C) is like a map, but not in proportion."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.table = nn.Linear(3, 960), nn.Parameter(torch.ones(8, 6, 20))

    def forward(self, x: Tensor) -> Tensor:
        return (self.fc(x.mean((2, 3))).view(-1, 8, 6, 20) + self.table).sum((1, 2))


def test_windows_by_tokens_are_no_rows_and_columns() -> None:
    found = bias_maps(Table().double(), torch.ones(2, 3, 16, 16, dtype=torch.float64), 1)
    assert found.maps == {}, found
    assert_close(found.placeless["table"], torch.full((2,), 48.0, dtype=torch.float64))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_constants_beside_images_that_do_not_come_first(offset: float) -> None:
    """(features, N): of which image a constant is, only one pass for each image says."""
    weight = torch.ones(5, 48, dtype=torch.float64)
    images = torch.ones(2, 3, 4, 4, dtype=torch.float64)

    def model(x: Tensor) -> Tensor:
        return (weight @ x.flatten(1).t() + torch.tensor([offset, 3 * offset], dtype=x.dtype)).t()

    found = bias_maps(model, images, 1)
    assert not found.maps
    expected = torch.tensor([offset, 3 * offset], dtype=torch.float64)
    assert_close(sum(found.placeless.values(), torch.zeros(2, dtype=torch.float64)), expected, rtol=1e-12, atol=0)


class Folded(nn.Module):
    """Windows of two by two positions, beside one another in the batch, as MobileViT has them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.mix, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.patches(x)
        count, channels, rows, columns = maps.shape
        folded = maps.reshape(count, channels, rows // 2, 2, columns // 2, 2).permute(0, 3, 5, 2, 4, 1)
        tokens = folded.reshape(count * 4, rows * columns // 4, channels)
        for _ in range(2):
            tokens = tokens + self.mix(self.norm(tokens)).relu()
        return self.head(tokens.reshape(count, -1, channels).mean(1))


class Ragged(nn.Module):
    """Rows of all images in one table, of each another number, as regions of interest are."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.mix, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        kept = [one[: 4 + int(one.sum() > 0)] for one in tokens]
        found = self.mix(torch.cat(kept)).relu().split([len(one) for one in kept])
        return self.head(torch.stack([one.mean(0) for one in found]))


@pytest.mark.parametrize("kind", [Folded, Ragged])
@pytest.mark.parametrize("layers", [None, "image"])
def test_maps_of_several_images_are_those_of_each(
    kind: type[nn.Module], layers: Literal["image"] | None, generator: torch.Generator
) -> None:
    model = kind().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    images = torch.randn(3, 3, 12, 12, generator=generator, dtype=torch.float64)
    method = CompleteScoreMap(model, layers)
    found, rest = method.attribute(images, 1, return_placeless=True)
    assert_close(found.sum((1, 2, 3)) + rest, model(images)[:, 1].detach(), rtol=1e-12, atol=1e-12)
    for image, one, other in zip(images, found, rest, strict=True):
        alone, placeless = method.attribute(image[None], 1, return_placeless=True)
        assert_close(one[None], alone, rtol=1e-10, atol=1e-12)
        assert_close(other[None], placeless, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("window", [1, 2])
def test_complex_numbers_that_are_cut_into_windows_stand_where_they_are(window: int) -> None:
    weights = torch.linspace(-1, 1, 39, dtype=torch.float64).reshape(13, 3)

    def model(x: Tensor) -> Tensor:
        return F.unfold(torch.fft.fft2(x), window).real.flatten(1)[:, :13] @ weights

    image = torch.linspace(-1, 2, 36, dtype=torch.float64).reshape(1, 1, 6, 6)
    complete, placeless = CompleteScoreMap(model, "image").attribute(image, 1, return_placeless=True)
    assert_close(complete.sum((1, 2, 3)) + placeless, model(image)[:, 1])
