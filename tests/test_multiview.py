"""Views of an image of any size: each scored as its crop, all of them one exact linear form."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision import models
from torchvision.transforms.functional import ten_crop

from captum_scoremap import LayerScoreMap, MultiView, linear_form
from captum_scoremap.multiview.heads import ViewByView
from captum_scoremap.multiview.sliding import Sliding

LABELS = 3


class Doubled(nn.Module):
    """A head's layer that no table knows."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@dataclass(frozen=True)
class Network:
    """A network in two parts, and the window of its head."""

    features: nn.Sequential
    head: nn.Sequential
    window: tuple[int, int]

    def plain(self, crops: Tensor) -> Tensor:
        return self.head(self.features(crops))


def heads(channels: int, window: tuple[int, int]) -> dict[str, Callable[[], nn.Sequential]]:
    """Heads of every kind: on the window's values, on its mean, on its mean as a map, and unknown."""
    values, act = channels * window[0] * window[1], nn.Tanh()
    return {
        "fully-connected": lambda: nn.Sequential(
            nn.Flatten(), nn.Dropout(), nn.Linear(values, 5), nn.ReLU(), nn.LayerNorm(5), nn.Linear(5, LABELS)
        ),
        "one activation twice": lambda: nn.Sequential(
            nn.Flatten(), act, nn.Linear(values, 4), act, nn.Linear(4, 4), act, nn.Linear(4, LABELS)
        ),
        "resized": lambda: nn.Sequential(
            nn.AdaptiveAvgPool2d(window), nn.Tanh(), nn.Flatten(), nn.Linear(values, LABELS)
        ),
        "averaged": lambda: nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(channels), nn.Linear(channels, LABELS)
        ),
        "convolved": lambda: nn.Sequential(
            nn.AdaptiveAvgPool2d((1, 1)), nn.Conv2d(channels, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(6, LABELS)
        ),
        "bent, then averaged": lambda: nn.Sequential(
            nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, LABELS)
        ),
        "unknown": lambda: nn.Sequential(nn.Flatten(), Doubled(), nn.Linear(values, LABELS)),
        "spatial": lambda: nn.Sequential(
            nn.Conv2d(channels, 4, 3, padding=1), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4, LABELS)
        ),
    }


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """Networks without padding, float64."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    channels, layers = 2, []
    for _ in range(draw(st.integers(1, 3))):
        after = draw(st.integers(1, 4))
        kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
        layers += [nn.Conv2d(channels, after, kernel, stride=draw(st.integers(1, 2))), nn.ReLU()]
        if draw(st.booleans()):
            size = draw(st.integers(2, 3))
            layers.append(nn.MaxPool2d(size, stride=draw(st.integers(1, size))))
        channels = after
    window = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    head = heads(channels, window)[draw(st.sampled_from(sorted(heads(1, (1, 1)))))]()
    network = Network(nn.Sequential(*layers), head, window)
    for part in (network.features, network.head):
        part.double().eval()
    return network


@st.composite
def questions(draw: st.DrawFn) -> tuple[Network, MultiView, Tensor]:
    """A network, its multi-view architecture at some stride, and an image at least one view large."""
    network = draw(networks())
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    multi_view = MultiView(network.features, network.head, network.window, stride)
    if draw(st.booleans()):  # a view may have pixels to spare, as 224 of AlexNet
        cell, smallest = multi_view._geometry.stride, multi_view.view_size
        size = tuple(side + draw(st.integers(0, step - 1)) for side, step in zip(smallest, cell, strict=True))
        multi_view = MultiView(network.features, network.head, network.window, stride, view_size=size)
    height, width = (side + draw(st.integers(0, 17)) for side in multi_view.view_size)
    image = torch.randn(draw(st.integers(1, 2)), 2, height, width, dtype=torch.float64)
    return network, multi_view, image


@settings(max_examples=150, deadline=None)
@given(questions())
def test_without_padding_every_view_scores_as_its_crop(question: tuple[Network, MultiView, Tensor]) -> None:
    network, multi_view, image = question
    scores = multi_view.view_scores(image)
    boxes = multi_view.view_boxes(*image.shape[2:])
    assert boxes.dtype == torch.int64
    crops = [network.plain(image[:, :, y0:y1, x0:x1]) for x0, y0, x1, y1 in boxes.tolist()]
    torch.testing.assert_close(scores.flatten(2), torch.stack(crops, 2), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(multi_view(image), torch.stack(crops, 2).mean(2), rtol=1e-10, atol=1e-10)


# of a layer that a head has several times; the form of its last run holds, too
@pytest.mark.filterwarnings(r"ignore:a \w+ runs \d+ times")
@settings(max_examples=60, deadline=None)
@given(questions(), st.data())
def test_the_linear_form_holds_at_every_layer(question: tuple[Network, MultiView, Tensor], data: st.DataObject) -> None:
    _, multi_view, image = question
    names = [name for name, module in multi_view.named_modules() if name and not list(module.children())]
    name = data.draw(st.sampled_from(names))
    target = data.draw(st.integers(0, LABELS - 1))
    form = linear_form(multi_view, image, target, multi_view.get_submodule(name))
    assert form.relative_residual.max() < 1e-12
    torch.testing.assert_close(form.score, multi_view(image)[:, target], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", sorted(heads(1, (1, 1))))
def test_which_heads_run_as_convolutions(kind: str) -> None:
    multi_view = MultiView(nn.Conv2d(1, 2, 3), heads(2, (2, 3))[kind](), (2, 3))
    batched = kind in {"unknown", "spatial", "bent, then averaged"}
    assert isinstance(multi_view.head, ViewByView) == batched
    assert multi_view.sliding.average == (kind in {"averaged", "convolved"})


def test_the_map_of_the_last_pooling_layer_sums_over_all_views(generator: torch.Generator) -> None:
    """M(x, y) of Eq. (4), assembled from the gradients of single crops."""
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2)).double()
    head = nn.Sequential(nn.Flatten(), nn.Linear(4 * 6, 5), nn.ReLU(), nn.Linear(5, LABELS)).double()
    multi_view = MultiView(features, head, (2, 3)).eval()
    image = torch.randn(1, 1, 13, 17, dtype=torch.float64, generator=generator)
    rows, cols = multi_view.view_scores(image).shape[2:]
    expected = torch.zeros(1, 1, *features(image).shape[2:], dtype=torch.float64)
    for row in range(rows):
        for col in range(cols):
            window = features(image)[:, :, row : row + 2, col : col + 3].detach().requires_grad_()
            (gradient,) = torch.autograd.grad(head(window)[0, 1], window)
            expected[:, :, row : row + 2, col : col + 3] += (gradient * window).sum(1, keepdim=True).detach()
    got = LayerScoreMap(multi_view, features[2]).attribute(image, target=1)
    torch.testing.assert_close(got, expected / (rows * cols), rtol=1e-10, atol=1e-12)


def test_the_map_of_the_sliding_layer_has_one_value_per_view(generator: torch.Generator) -> None:
    multi_view = MultiView(nn.Conv2d(1, 2, 3), nn.Sequential(nn.Flatten(), nn.Linear(8, LABELS)), 2).eval()
    image = torch.randn(1, 1, 8, 9, generator=generator)
    scores = multi_view.view_scores(image)[:, 2:3]
    got = LayerScoreMap(multi_view, multi_view.sliding).attribute(image, target=2)
    torch.testing.assert_close(got * scores[0].numel(), scores - multi_view.head[1].bias[2])


# --- AlexNet, the paper's network ----------------------------------------------------------------------

PAPER_LAYERS = {
    "features.0": nn.Conv2d,
    "features.2": nn.MaxPool2d,
    "features.3": nn.Conv2d,
    "features.5": nn.MaxPool2d,
    "features.6": nn.Conv2d,
    "features.8": nn.Conv2d,
    "features.10": nn.Conv2d,
    "features.12": nn.MaxPool2d,
    "sliding": Sliding,
    "head.1": nn.Linear,
    "head.4": nn.Linear,
    "head.6": nn.Linear,
    "sum_pooling": nn.Module,
}


@pytest.fixture(scope="module")
def alexnet() -> nn.Module:
    torch.manual_seed(0)
    return models.alexnet(num_classes=7).eval()


def test_alexnet_at_its_own_size_is_the_plain_model(alexnet: nn.Module, generator: torch.Generator) -> None:
    image = torch.randn(2, 3, 224, 224, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(MultiView.from_classifier(alexnet)(image), alexnet(image))


def test_all_thirteen_layers_of_the_paper_have_score_maps(alexnet: nn.Module, generator: torch.Generator) -> None:
    multi_view = MultiView.from_classifier(alexnet)
    image = torch.randn(1, 3, 256, 300, generator=generator)
    layers = [multi_view.get_submodule(name) for name in PAPER_LAYERS]
    for layer, kind in zip(layers, PAPER_LAYERS.values(), strict=True):
        assert isinstance(layer, kind)
    maps, deltas = LayerScoreMap(multi_view, layers).attribute(image, target=5, return_convergence_delta=True)
    scale = multi_view(image)[:, 5].abs()
    for name, score_map, delta in zip(PAPER_LAYERS, maps, deltas, strict=True):
        assert score_map.shape[:2] == (1, 1)
        assert delta.abs() < 1e-3 * scale, name
    assert [tuple(m.shape[2:]) for m in maps[-5:-1]] == [(2, 3)] * 4  # one value per view


def test_boxes_of_alexnet(alexnet: nn.Module) -> None:
    multi_view = MultiView.from_classifier(alexnet)
    assert (multi_view.window, multi_view.view_size) == ((6, 6), (224, 224))
    assert multi_view.view_boxes(256, 300).tolist() == [
        [0, 0, 224, 224],
        [32, 0, 256, 224],
        [64, 0, 288, 224],
        [0, 32, 224, 256],
        [32, 32, 256, 256],
        [64, 32, 288, 256],
    ]
    smallest = MultiView(alexnet.features, alexnet.classifier, 6).view_size
    assert smallest == (223, 223)
    assert alexnet.features(torch.zeros(1, 3, 223, 223)).shape[2:] == (6, 6)
    assert alexnet.features(torch.zeros(1, 3, 222, 222)).shape[2:] == (5, 5)


# --- ten crops -----------------------------------------------------------------------------------------


def test_ten_crops_are_those_of_torchvision(generator: torch.Generator) -> None:
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2)).double()
    for head in (
        nn.Sequential(nn.Flatten(), nn.Linear(4 * 9, LABELS)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, LABELS)),
    ):
        multi_view = MultiView(features, head.double(), 3, views="ten-crop").eval()
        image = torch.randn(2, 2, 16, 24, dtype=torch.float64, generator=generator)
        expected = torch.stack([head(features(crop)) for crop in ten_crop(image, 8)], 2)
        scores = multi_view.view_scores(image)
        assert scores.shape == (2, LABELS, 2, 5)
        torch.testing.assert_close(scores.flatten(2), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(multi_view(image), expected.mean(2), rtol=1e-10, atol=1e-10)
        boxes = multi_view.view_boxes(16, 24).tolist()
        assert boxes[:5] == [[0, 0, 8, 8], [16, 0, 24, 8], [0, 8, 8, 16], [16, 8, 24, 16], [8, 4, 16, 12]]
        assert boxes[5:] == [[16, 0, 24, 8], [0, 0, 8, 8], [16, 8, 24, 16], [0, 8, 8, 16], [8, 4, 16, 12]]
        for layer in (features[0], features[2], multi_view.sliding, multi_view.sum_pooling):
            assert linear_form(multi_view, image, 1, layer).relative_residual.max() < 1e-12


# --- ready classifiers ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A classifier and the smallest views worth testing; None for its own size."""

    build: Callable[[], nn.Module]
    view_size: int | None = 64


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return pytest.importorskip("timm").create_model(name, num_classes=5, **options)

    return build


FAMILIES = {
    "alexnet": Family(lambda: models.alexnet(num_classes=5), None),
    "vgg11_bn": Family(lambda: models.vgg11_bn(num_classes=5), None),
    "squeezenet1_0": Family(lambda: models.squeezenet1_0(num_classes=5)),
    "squeezenet1_1": Family(lambda: models.squeezenet1_1(num_classes=5)),
    "resnet18": Family(lambda: models.resnet18(num_classes=5)),
    "resnext50_32x4d": Family(lambda: models.resnext50_32x4d(num_classes=5)),
    "densenet121": Family(lambda: models.densenet121(num_classes=5)),
    "googlenet": Family(lambda: models.googlenet(num_classes=5, init_weights=False)),
    "googlenet, pretrained form": Family(
        lambda: models.googlenet(num_classes=5, init_weights=False, transform_input=True, aux_logits=False)
    ),
    "inception_v3": Family(lambda: models.inception_v3(num_classes=5, init_weights=False), 107),
    "shufflenet_v2_x0_5": Family(lambda: models.shufflenet_v2_x0_5(num_classes=5)),
    "regnet_x_400mf": Family(lambda: models.regnet_x_400mf(num_classes=5)),
    "mobilenet_v2": Family(lambda: models.mobilenet_v2(num_classes=5)),
    "mobilenet_v3_small": Family(lambda: models.mobilenet_v3_small(num_classes=5)),
    "efficientnet_b0": Family(lambda: models.efficientnet_b0(num_classes=5)),
    "efficientnet_v2_s": Family(lambda: models.efficientnet_v2_s(num_classes=5)),
    "mnasnet0_5": Family(lambda: models.mnasnet0_5(num_classes=5)),
    "convnext_tiny": Family(lambda: models.convnext_tiny(num_classes=5)),
    "timm efficientnet_lite0": Family(timm_model("tf_efficientnet_lite0")),
    "timm resnet18": Family(timm_model("resnet18")),
    "timm resnetv2": Family(timm_model("resnetv2_50")),
    "timm mobilenetv3": Family(timm_model("mobilenetv3_small_050")),
    "timm convnext": Family(timm_model("convnext_atto")),
    "timm regnet": Family(timm_model("regnetx_002")),
    "timm densenet": Family(timm_model("densenet121")),
    "timm vgg": Family(timm_model("vgg11"), None),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_classifiers_of_every_family_become_their_multi_view_architecture(name: str) -> None:
    family = FAMILIES[name]
    torch.manual_seed(0)
    model = family.build().eval()
    dtype, tolerance = (torch.float32, 1e-4) if family.view_size is None else (torch.float64, 1e-8)
    model.to(dtype)
    before = {key: float(value.double().sum()) for key, value in model.state_dict().items()}
    multi_view = MultiView.from_classifier(model, view_size=family.view_size)
    (height, width), (down, right) = multi_view.view_size, multi_view._geometry.stride
    image = torch.randn(1, 3, height, width, dtype=dtype)
    larger = torch.randn(1, 3, height + 2 * down, width + right, dtype=dtype)
    with torch.no_grad():
        expected = model(image)
        torch.testing.assert_close(
            multi_view(image), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
        )
        scores = multi_view.view_scores(larger)
    assert scores.shape[2:] == (3, 2)
    assert len(multi_view.view_boxes(*larger.shape[2:])) == 6
    assert not isinstance(multi_view.head, ViewByView)
    own = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in multi_view.parameters()} <= own
    assert not any(module.training for module in multi_view.modules())
    assert {key: float(value.double().sum()) for key, value in model.state_dict().items()} == before


def test_another_size_of_view_runs_alexnets_pooling_on_every_window(alexnet: nn.Module) -> None:
    """At 256 pixels the map has 7 x 7 cells, which AlexNet pools to 6 x 6."""
    multi_view = MultiView.from_classifier(alexnet, view_size=256)
    assert isinstance(multi_view.head, ViewByView)
    image = torch.randn(1, 3, 256, 288, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(multi_view.view_scores(image[..., :256])[..., 0, 0], alexnet(image[..., :256]))
        assert multi_view.view_scores(image).shape == (1, 7, 1, 2)


def test_the_layers_are_the_users_own(alexnet: nn.Module) -> None:
    model = copy.deepcopy(alexnet)
    multi_view = MultiView.from_classifier(model)
    assert multi_view.features is model.features
    image = torch.randn(1, 3, 224, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = multi_view(image)
        model.classifier[6].bias += 1.0
        torch.testing.assert_close(multi_view(image), before + 1.0)
        model.double()
        torch.testing.assert_close(multi_view(image.double()).float(), before + 1.0)
        copied = copy.deepcopy(multi_view)
        model.classifier[6].bias += 1.0
        torch.testing.assert_close(copied(image.double()).float(), before + 1.0)
    calls: list[tuple[int, ...]] = []
    with model.classifier[6].register_forward_hook(lambda _m, _i, output: calls.append(tuple(output.shape))):
        multi_view(image.double())
    assert calls == [(1, 7, 1, 2)]


def test_a_module_reached_by_two_names_keeps_its_weights() -> None:
    shared = nn.Conv2d(2, 2, 3, padding=1)
    features = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU())})
    features.forward = lambda x: features["b"](features["a"](x))  # type: ignore[method-assign]
    before = shared.weight.detach().clone()
    multi_view = MultiView(features, nn.Sequential(nn.Flatten(), nn.Linear(8, LABELS)), 2)
    assert multi_view.view_boxes(3, 4).shape == (6, 4)
    torch.testing.assert_close(shared.weight.detach(), before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(alexnet: nn.Module, dtype: torch.dtype) -> None:
    multi_view = MultiView.from_classifier(copy.deepcopy(alexnet).to(dtype))
    assert multi_view(torch.zeros(1, 3, 224, 256, dtype=dtype)).dtype == dtype


def test_a_model_in_training_stays_so(alexnet: nn.Module) -> None:
    model = copy.deepcopy(alexnet).train()
    model.features[3].eval()
    multi_view = MultiView.from_classifier(model)
    assert multi_view.training
    assert model.classifier[1].training
    assert not model.features[3].training


def test_probabilities_by_score_and_by_view(generator: torch.Generator) -> None:
    multi_view = MultiView(nn.Conv2d(1, 2, 3), nn.Sequential(nn.Flatten(), nn.Linear(8, LABELS)), 2).eval()
    image = torch.randn(2, 1, 7, 8, generator=generator)
    scores = multi_view.view_scores(image).flatten(2)
    torch.testing.assert_close(multi_view.probabilities(image), scores.mean(2).softmax(1))
    torch.testing.assert_close(multi_view.probabilities(image, by="view"), scores.softmax(1).mean(2))


# --- localization with truth ---------------------------------------------------------------------------

SIDE, VIEW = 8, 16  # pixels of a digit, and of a view
CANVAS = (48, 64)


def digit_views(digits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Views with one digit anywhere in them, also cut off, and the fraction of it that is seen."""
    corners = torch.randint(2 - SIDE, VIEW - 1, (len(digits), 2), generator=generator)
    around = nn.functional.pad(digits, (VIEW, VIEW, VIEW, VIEW))
    views = around.unfold(1, VIEW, 1).unfold(2, VIEW, 1)[
        torch.arange(len(digits)), VIEW - corners[:, 0], VIEW - corners[:, 1]
    ]
    seen = ((corners + SIDE).clamp(max=VIEW) - corners.clamp(min=0)).prod(1) / SIDE**2
    return views[:, None], seen


def trained_on_views(digits: Tensor, labels: Tensor, generator: torch.Generator) -> nn.Sequential:
    """A network whose scores on a view are, as far as the digit is seen, 1 for its label and -0.3 for all others.

    It has no biases: what a score map shows is the whole score.
    """
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 4 * 4, 64, bias=False), nn.ReLU(), nn.Linear(64, 10, bias=False)),
    )
    steps, rate = 1400, 6e-3
    optimizer = torch.optim.Adam(network.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(digits), (64,), generator=generator)
        views, seen = digit_views(digits[chosen], generator)
        wanted = seen[:, None] * (nn.functional.one_hot(labels[chosen], 10) * 1.3 - 0.3)
        optimizer.zero_grad()
        (network(views) - wanted).square().mean().backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@dataclass(frozen=True)
class Canvas:
    """A large image with digits of different labels, and where they are."""

    pixels: Tensor
    places: dict[int, tuple[slice, slice]]


def canvas(digits: Tensor, labels: Tensor, count: int, generator: torch.Generator) -> Canvas:
    pixels = torch.zeros(1, *CANVAS)
    places: dict[int, tuple[slice, slice]] = {}
    while len(places) < count:
        chosen = int(torch.randint(len(digits), (), generator=generator))
        y, x = (int(torch.randint(side - SIDE + 1, (), generator=generator)) for side in CANVAS)
        apart = all(max(abs(y - r.start), abs(x - c.start)) >= 1.5 * SIDE for r, c in places.values())
        if apart and int(labels[chosen]) not in places:
            places[int(labels[chosen])] = place = (slice(y, y + SIDE), slice(x, x + SIDE))
            pixels[0][place] = digits[chosen]
    return Canvas(pixels, places)


@pytest.mark.slow
def test_score_maps_point_at_the_digit_and_not_at_absent_labels(generator: torch.Generator) -> None:
    """On 200 canvases with four digits each, none of which the network was trained on.

    Counted for each digit: whether the score map of its label, averaged over windows as large as a digit, has its peak
    on the digit. Counted for each digit and each label that is not on the canvas: whether that label's map is negative
    or flat there, that is, its sum over the digit is below a tenth of the sum of the digit's own label.
    """
    datasets = pytest.importorskip("sklearn.datasets")
    found = datasets.load_digits()
    digits, labels = torch.tensor(found.images / 16, dtype=torch.float32), torch.tensor(found.target)
    train, test = slice(0, 1297), slice(1297, None)
    network = trained_on_views(digits[train], labels[train], generator)
    multi_view = MultiView(network[:8], network[8:], VIEW // 4)
    canvases = [canvas(digits[test], labels[test], 4, generator) for _ in range(200)]
    images = torch.stack([each.pixels for each in canvases])
    maps = LayerScoreMap(multi_view, network[6]).attribute_targets(images)
    maps = LayerScoreMap.interpolate(maps, CANVAS)
    smooth = nn.functional.avg_pool2d(maps, SIDE - 1, 1, SIDE // 2 - 1)
    peaks, quiet = [], []
    for each, own, averaged in zip(canvases, maps, smooth, strict=True):
        for label, place in each.places.items():
            inside = torch.zeros(CANVAS, dtype=torch.bool)
            inside[place] = True
            peaks.append(bool(inside.flatten()[averaged[label].argmax()]))
            total = own[label][place].sum()
            quiet += [bool(own[other][place].sum() < 0.1 * total) for other in range(10) if other not in each.places]
    assert len(peaks) == 800
    assert sum(peaks) >= 0.95 * len(peaks)
    assert len(quiet) == 4800
    assert sum(quiet) >= 0.95 * len(quiet)


# --- bad input -----------------------------------------------------------------------------------------


def small(**options: Any) -> MultiView:
    settings = {"window": 2, **options}
    return MultiView(nn.Conv2d(1, 2, 3, stride=2), nn.Sequential(nn.Flatten(), nn.Linear(8, 3)), **settings)


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda: small(stride=0), ValueError, "stride must be a positive integer or a pair of them, got 0"),
        (lambda: small(stride=(1, 2, 3)), ValueError, r"stride must be .* got \(1, 2, 3\)"),
        (lambda: small(window=-1), ValueError, "window must be a positive integer or a pair of them, got -1"),
        (lambda: small(window=1.5), ValueError, "window must be a positive integer or a pair of them, got 1.5"),
        (lambda: small(views="all"), ValueError, "views must be 'dense' or 'ten-crop', got 'all'"),
        (lambda: small(views="ten-crop", stride=2), ValueError, "stride must be 1 for views='ten-crop', got 2"),
        (lambda: small(view_size=20), ValueError, r"as large as the window, 2 x 2, got 20 x 20 .* give 9 x 9"),
        (lambda: MultiView(nn.Conv2d, nn.Flatten(), 2), TypeError, "features must be a torch.nn.Module, got type"),
        (lambda: MultiView(nn.Flatten(), "head", 2), TypeError, "head must be a torch.nn.Module, got str"),
        (
            lambda: small()(torch.zeros(1, 1, 4, 9)),
            ValueError,
            "images must be at least one view large, 5 x 5 pixels, got 4 x 9. Enlarge them",
        ),
        (lambda: small()(torch.zeros(1, 1, 2, 9)), ValueError, "at least one view large, 5 x 5 pixels, got 2 x 9"),
        (lambda: small().view_boxes(4, 9), ValueError, "at least one view large, 5 x 5 pixels, got 4 x 9"),
        (
            lambda: small(window=30)(torch.zeros(1, 1, 20, 20)),
            ValueError,
            "at least one view large, 61 x 61 pixels, got 20 x 20",
        ),
        (lambda: small()(torch.zeros(1, 9, 9)), ValueError, r"images must be a batch .* Use images\[None\]"),
        (lambda: small()(torch.zeros(9, 9)), ValueError, r"images must be a batch .* got \(9, 9\)"),
        (
            lambda: small(window=3)(torch.zeros(1, 1, 9, 9)),
            ValueError,
            "window must hold the 8 values that the head takes, got 18",
        ),
        (
            lambda: MultiView(nn.Flatten(), nn.Flatten(), 2)(torch.zeros(1, 3, 8, 8)),
            ValueError,
            r"features must return maps \(N, C, H, W\), got \(1, 192\)",
        ),
        (
            lambda: MultiView(nn.AdaptiveAvgPool2d(4), nn.Flatten(), 2).view_boxes(32, 32),
            ValueError,
            "features must return larger maps for larger images",
        ),
        (
            lambda: MultiView(nn.Upsample(scale_factor=2), nn.Flatten(), 2).view_boxes(32, 32),
            ValueError,
            "features must return one more cell every so many pixels",
        ),
        (
            lambda: MultiView(nn.Conv2d(1, 1, 1), Doubled(), 2)(torch.zeros(1, 1, 3, 3)),
            ValueError,
            r"head must return scores \(N, K\), got \(4, 1, 2, 2\)",
        ),
        (lambda: small().probabilities(torch.zeros(1, 1, 9, 9), by="vote"), ValueError, "by must be .* got 'vote'"),
        (lambda: MultiView.from_classifier("alexnet"), TypeError, "model must be a torch.nn.Module, got str"),
        (lambda: MultiView.from_classifier(nn.Linear(2, 2)), ValueError, "known family .* got Linear"),
        # another library's, of the same name
        (lambda: MultiView.from_classifier(type("ResNet", (nn.Sequential,), {})()), ValueError, "family .* got ResNet"),
        (lambda: MultiView.from_classifier(type("VGG", (nn.Sequential,), {})()), ValueError, "family .* got VGG"),
        (lambda: MultiView.from_classifier(type("RegNet", (nn.Sequential,), {})()), ValueError, "family .* got RegNet"),
        (
            lambda: MultiView.from_classifier(models.VisionTransformer(32, 16, 1, 2, 8, 8)),
            ValueError,
            r"got VisionTransformer. Build MultiView\(features, head, window\) by hand",
        ),
        (lambda: MultiView.from_classifier(models.swin_t()), ValueError, "got SwinTransformer. Build MultiView"),
        (
            lambda: MultiView.from_classifier(timm_model("swin_tiny_patch4_window7_224")()),
            ValueError,
            "got SwinTransformer. Build MultiView",
        ),
        (
            lambda: MultiView.from_classifier(timm_model("vit_tiny_patch16_224", depth=1)()),
            ValueError,
            "got VisionTransformer. Build MultiView",
        ),
    ],
)
def test_bad_input(act: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        act()


class Rewired(models.ResNet):
    """A ResNet whose forward pass is another."""

    def __init__(self) -> None:
        super().__init__(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_model_that_is_not_reproduced_is_refused() -> None:
    with pytest.raises(ValueError, match=r"whose layers run in their usual order .* got Rewired"):
        MultiView.from_classifier(Rewired().eval(), view_size=64)
