"""Score maps, sums and B of a batch: exact at every layer, also where something bypasses it or it changes in place."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from captum_scoremap import CompleteScoreMap, linear_form
from captum_scoremap.audit import audit
from captum_scoremap.audit.explaining import MapLayer, explain, map_layers
from captum_scoremap.linear import main_layers
from captum_scoremap.models import prepare
from tests import families
from tests.zoo import small_vit


class Bypassing(nn.Module):
    """Skips over its layers in every way: added, concatenated, changed in place, and straight from the image."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Linear(11, 5)

    def forward(self, image):
        one = F.relu(self.first(image), inplace=True)
        two = F.silu(self.second(one))
        three = self.third(two)
        three += one
        one.mul_(0.5)
        both = torch.cat([F.gelu(three), one, image], 1)
        return self.last(both.mean((2, 3)))


@pytest.fixture
def images(generator):
    return torch.rand(3, 3, 8, 8, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("names", [("first",), ("third",), ("first", "second", "third"), ("third", "second")])
def test_maps_sums_and_biases_are_those_of_the_linear_form(images, names):
    torch.manual_seed(0)
    model = Bypassing().double().eval()
    found = explain(model, map_layers(model, names, images[:1]), images, torch.tensor([-1, 0, 4]))
    for name in names:
        form = linear_form(model, images, found.labels[:, 0], model.get_submodule(name))
        torch.testing.assert_close(found.biases[name][:, 0], form.bias, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.sums[name][:, 0], form.sums, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.maps[name][:, :1], form.score_map(), rtol=0, atol=1e-12)
        assert found.residuals[name].max() < 1e-12


@pytest.mark.parametrize("names", [("first",), ("first", "second", "third")])
def test_complete_maps_leave_only_what_has_no_place(images, names):
    torch.manual_seed(0)
    model = Bypassing().double().eval()
    found = explain(model, map_layers(model, names, images[:1]), images, torch.tensor([-1, 0, 4]), kind="complete")
    for name in names:
        complete = CompleteScoreMap(model, model.get_submodule(name))
        for role in range(3):
            label = found.labels[:, role]
            has, own = label >= 0, (label[:, None] != found.labels[:, :role]).all(1) & (label >= 0)
            expected, placeless = complete.attribute(images, label.clamp(min=0), return_placeless=True)
            map_ = found.maps[name][:, role, None]
            torch.testing.assert_close(map_, expected * own[:, None, None, None], rtol=0, atol=1e-12)
            torch.testing.assert_close(found.biases[name][:, role], placeless.where(has, 0), rtol=0, atol=1e-12)
        assert found.residuals[name].max() < 1e-12


def test_images_of_which_something_is_not_finite_are_told(images):
    torch.manual_seed(0)
    model = Bypassing().double().eval()
    images[1, 0, 0, 0] = torch.nan
    found = explain(model, [MapLayer("first")], images, torch.tensor([-1] * 3))
    assert found.finite.tolist() == [True, False, True]
    kept = found.take(found.finite)
    alone = explain(model, [MapLayer("first")], images[::2], torch.tensor([-1] * 2))
    torch.testing.assert_close(kept.maps["first"], alone.maps["first"], rtol=0, atol=1e-12)
    assert kept.finite.all()


def test_maps_of_every_role_are_those_of_its_label(images):
    torch.manual_seed(0)
    model = Bypassing().double().eval()
    best, second = model(images).topk(2, 1).indices.T
    true = torch.stack([
        best[0],
        second[1],
        torch.tensor(-1),
    ])  # the first repeats, the second repeats, the third is none
    other = next(label for label in range(5) if label not in (int(best[2]), int(second[2])))
    for given, own in ((true, False), (torch.cat([true[:2], torch.tensor([other])]), True)):
        found = explain(model, [MapLayer("second")], images, given)
        assert found.labels.tolist() == torch.stack([best, second, given], 1).tolist()
        for role, label in enumerate((best, second, given)):
            has = label >= 0
            form = linear_form(model, images, label.clamp(min=0), model.second)
            for numbers, expected in ((found.sums, form.sums), (found.biases, form.bias)):
                torch.testing.assert_close(numbers["second"][:, role], expected.where(has, 0), rtol=0, atol=1e-12)
            torch.testing.assert_close(found.role_scores[:, role], form.score.where(has, 0), rtol=0, atol=1e-12)
            if role < 2:
                torch.testing.assert_close(found.maps["second"][:, role, None], form.score_map(), rtol=0, atol=1e-12)
        assert not found.maps["second"][:2, 2].any()
        if own:
            form = linear_form(model, images[2:], other, model.second)
            torch.testing.assert_close(found.maps["second"][2:, 2:], form.score_map(), rtol=0, atol=1e-12)
        else:
            assert not found.maps["second"][2, 2].any()


class Reusing(nn.Module):
    """One pooling module, used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2, self.conv3 = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(16, 10)

    def forward(self, image):
        for conv in (self.conv1, self.conv2, self.conv3):
            image = self.pool(F.relu(conv(image)))
        return self.fc(image.mean((2, 3)))


def test_a_module_that_is_used_three_times_does_no_harm(tmp_path):
    torch.manual_seed(0)
    names = ["conv1", "conv2", "conv3"]
    data = [(torch.rand(3, 64, 64), 0) for _ in range(4)]
    done = audit(data, Reusing().eval(), out=tmp_path, layers=names, progress=False)
    layers = done.analysis.summary["layers"]
    assert [layer["layer"] for layer in layers] == names
    assert max(layer["residual_max"] for layer in layers) < 1e-6
    assert done.analysis.summary["inexact"] == 0


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("alexnet", ["features.0", "features.3", "features.10"]),
        ("vgg11", ["features.0", "features.1", "features.8", "features.18"]),
        ("resnet18", ["bn1", "layer1.0.bn1", "layer1", "layer3.1.bn2", "layer4"]),
    ],
)
def test_relus_in_place_above_several_layers(tmp_path, name, layers):
    torch.manual_seed(0)
    model = families.with_fewer_channels(name).build().eval()
    data = [(torch.randn(3, 64, 64), 0) for _ in range(2)]
    done = audit(data, model, out=tmp_path, layers=layers, progress=False, prepare_model=False)
    scores = {image["index"]: abs(image["score"]) for image in done.images.to_pylist()}
    rows = done.layers.to_pylist()
    assert len(rows) == 2 * len(layers)
    assert all(row["residual"] < 1e-4 * scores[row["index"]] for row in rows)


def test_layers_that_the_scores_do_not_depend_on(images):
    class Idle(Bypassing):
        def forward(self, image):
            self.second(self.first(image))
            return super().forward(image)

    class Blind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.scores = nn.Parameter(torch.arange(3.0).double())

        def forward(self, image):
            return self.scores.expand(len(self.conv(image)), -1)

    class Side(Bypassing):
        def forward(self, image):
            self.third(image.repeat(1, 2, 1, 1)[:, :4])
            return self.last(torch.cat([self.first(image), image, image, image[:, :1]], 1).mean((2, 3)))

    torch.manual_seed(0)
    true = torch.tensor([-1, 0, 2])
    side = Side().double().eval()
    for model, name in ((Blind().double().eval(), "conv"), (side, "third")):
        found = explain(model, [MapLayer(name)], images, true)
        assert not found.maps[name].any()
        assert not found.sums[name].any()
        torch.testing.assert_close(found.biases[name], found.role_scores, rtol=0, atol=0)
        assert not found.residuals[name].any()
    found = explain(side, [MapLayer("first"), MapLayer("third")], images, true)
    assert found.maps["first"].any()
    assert not found.maps["third"].any()
    assert found.residuals["first"].max() < 1e-12
    # a layer that runs twice is that of its last call
    assert explain(Idle().double().eval(), [MapLayer("second")], images, true).residuals["second"].max() < 1e-12


@pytest.mark.parametrize(
    "build",
    [
        families.small_resnet,
        families.small_densenet,
        small_vit,
        partial(families.small_swin, 1),
        families.small_convnext,
    ],
)
def test_default_layers_of_networks_of_every_kind_are_exact(build):
    torch.manual_seed(0)
    side = 32 if build is small_vit else 96
    images = torch.rand(2, 3, side, side)
    model = prepare(build().eval(), images[:1])
    layers = map_layers(model, main_layers(model, images[:1])[-3:], images[:1])
    found = explain(model, layers, images, torch.tensor([3, -1]))
    for residual in found.residuals.values():
        assert residual.max() < 1e-4


def test_maps_of_tokens_are_grids():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 4, 4)
            self.token = nn.Parameter(torch.randn(1, 1, 8))
            self.norm = nn.LayerNorm(8)
            self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
            self.head = nn.Linear(8, 3)

        def forward(self, image):
            tokens = self.patches(image).flatten(2).transpose(1, 2)
            tokens = torch.cat([self.token.expand(len(image), -1, -1), tokens], 1)
            tokens = tokens + self.mlp(self.norm(tokens))
            return self.head(tokens.mean(1))

    torch.manual_seed(0)
    model, images = Tokens().double().eval(), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    found = explain(model, map_layers(model, ["norm", "mlp"], images[:1]), images, torch.tensor([-1, -1]))
    for name in ("norm", "mlp"):
        assert found.maps[name].shape == (2, 3, 4, 4)
        assert found.residuals[name].max() < 1e-12


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("last", r"layers must give maps .* got \(1, 5\) from 'last'"),
        ("idle", "layers must run when the model does, got 'idle'"),
    ],
)
def test_layers_without_a_map_are_named(images, name, message):
    model = Bypassing().double().eval()
    model.idle = nn.Identity()
    with pytest.raises(ValueError, match=message):
        map_layers(model, [name], images[:1])


def test_a_batch_in_which_a_layer_does_not_run_or_gives_no_tensor_is_an_error(images):
    class Pairs(Bypassing):
        def __init__(self) -> None:
            super().__init__()
            self.idle, self.pair = nn.Identity(), nn.Identity()

        def forward(self, image):
            self.pair((image, 2 * image))
            return super().forward(image)

    model, true = Pairs().double().eval(), torch.tensor([-1] * 3)
    with pytest.raises(ValueError, match="layers must run when the model does, got 'idle'"):
        explain(model, [MapLayer("first"), MapLayer("idle")], images, true)
    with pytest.raises(ValueError, match="layers must give one floating-point tensor, got 2 from 'pair'"):
        explain(model, [MapLayer("pair")], images, true)
    with pytest.raises(ValueError, match=r"layers must give maps .* got \(\) from 'pair'"):
        map_layers(model, ["pair"], images[:1])


def test_nothing_is_kept_of_a_batch(images):
    torch.manual_seed(0)
    model = Bypassing().double().eval()
    found = explain(model, [MapLayer("first")], images, torch.tensor([-1] * 3))
    assert not any(one.requires_grad for one in (found.scores, *found.maps.values(), *found.biases.values()))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
