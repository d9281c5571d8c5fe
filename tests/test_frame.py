"""Models that resize or pad the image themselves: maps of the image's size show things where they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from captum_scoremap import CompleteScoreMap, FusedScoreMap, bias_maps, compile_map, linear_form
from captum_scoremap.layout import channel_dim_of
from captum_scoremap.linear import main_layers
from captum_scoremap.places import Frame, frame_of
from captum_scoremap.rules import with_rules
from captum_scoremap.tape import Recording

SIZES = [(64, 64), (50, 37), (64, 65), (40, 60), (40, 90), (33, 31)]
EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Detector(nn.Module):
    """Resizes and pads as torchvision's detectors do, and adds up what it sees; every step has a bias."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.transform = GeneralizedRCNNTransform(64, 1000, [0.2] * 3, [0.5] * 3, **options)
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        for parameter in self.features.parameters():
            nn.init.uniform_(parameter, 0.1, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        images, _ = self.transform(list(x))
        return self.features(images.tensors).sum((1, 2, 3))[:, None]


class Centered(Detector):
    """Pads on all sides."""

    def forward(self, x: Tensor) -> Tensor:
        return self.features(F.pad(x, (24, 8, 16, 40))).sum((1, 2, 3))[:, None]


@pytest.fixture(params=["padded", "squashed", "centered"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if request.param == "centered":
            return Centered().double().eval()
        options = {} if request.param == "padded" else {"fixed_size": (64, 64), "size_divisible": 1}
        return Detector(**options).double().eval()


def center(one: Tensor) -> tuple[float, float]:
    """The center of mass of the positive part of a map, (H, W)."""
    mass = one.clamp(min=0)
    rows, columns = (torch.arange(side, dtype=one.dtype) for side in one.shape)
    return float((mass.sum(1) * rows).sum() / mass.sum()), float((mass.sum(0) * columns).sum() / mass.sum())


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_what_was_planted_is_found_where_it_is(model: nn.Module, height: int, width: int) -> None:
    row, column = height // 4, 3 * width // 4
    empty = torch.full((2, 3, height, width), 0.2, dtype=torch.float64)
    image = empty.clone()
    image[:, :, row - 3 : row + 4, column - 3 : column + 4] = 1
    layers = [model.features[1], model.features[3]]
    with torch.random.fork_rng():
        for method in (CompleteScoreMap(model), CompleteScoreMap(model, layers), CompleteScoreMap(model, "image")):
            complete, placeless = method.attribute(image, 0, return_placeless=True)
            assert complete.shape == (2, 1, height, width)
            torch.testing.assert_close(complete.sum((1, 2, 3)) + placeless, model(image)[:, 0], **EXACT)
            found = complete - method.attribute(empty, 0)
            assert center(found[0, 0]) == pytest.approx((row, column), abs=2.0)
        for method in (FusedScoreMap(model), FusedScoreMap(model, layers)):
            highest = int(method.attribute(image, 0)[0, 0].argmax())
            assert divmod(highest, width) == pytest.approx((row, column), abs=4)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_sums_hold_on_the_layer_s_own_grid(model: nn.Module, height: int, width: int) -> None:
    image = torch.rand(2, 3, height, width, dtype=torch.float64)
    for layer in (None, model.features[1], model.features[3]):
        form = linear_form(model, image, 0, layer)
        torch.testing.assert_close(form.complete_map().sum((1, 2, 3)) + form.placeless, form.score, **EXACT)
        assert float(form.relative_residual.max()) < 1e-12
        found = bias_maps(model, image, 0, layer)
        shares = [*(one.flatten(1).sum(1) for one in found.maps.values()), *found.placeless.values()]
        total = sum(shares, torch.zeros_like(form.bias))
        torch.testing.assert_close(total, form.bias, **EXACT)


def test_main_layers_of_a_squashed_photograph() -> None:
    model = Detector(fixed_size=(64, 64), size_divisible=1).eval()
    for height, width in ((64, 64), (64, 96), (96, 64), (40, 90)):
        assert main_layers(model, torch.rand(1, 3, height, width)) == ["features.1", "features"]


def test_main_layers_above_tiles_are_those_of_the_image() -> None:
    """The first convolution sees more images than there are, which are parts of them."""

    class Tiles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.across, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 5, 3, 2, 1), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            tiles = x.unflatten(3, (2, -1)).unflatten(2, (2, -1)).permute(0, 2, 4, 1, 3, 5)
            found = self.inside(tiles.flatten(0, 2)).unflatten(0, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5)
            return self.head(self.across(found.flatten(4).flatten(2, 3)).mean((2, 3)))

    assert main_layers(Tiles().eval(), torch.rand(1, 3, 64, 64)) == ["across"]


def test_frames() -> None:
    def frame(function: object, shape: tuple[int, ...]) -> tuple[object, ...]:
        recording = Recording(function, with_rules(None), [])
        recording.record((torch.rand(shape),), (), lambda output: output.flatten(1).sum(1))
        found = frame_of(recording.tape, shape)
        return found.shape[2:], found.rows, found.columns

    conv = nn.Conv2d(3, 2, 3)
    shape = (1, 3, 20, 30)
    assert frame(conv, shape) == ((20, 30), (0, 20), (0, 30))
    assert frame(lambda x: conv(F.pad(x, (1, 2, 3, 4))), shape) == ((27, 33), (3, 23), (1, 31))
    # the padding that some frameworks take out of a convolution is the convolution's own
    assert frame(lambda x: conv(F.pad(x, (0, 1, 0, 1))), shape) == ((20, 30), (0, 20), (0, 30))
    assert frame(lambda x: conv(F.interpolate(x, size=(40, 40))), shape) == ((40, 40), (0, 40), (0, 40))
    assert frame(lambda x: conv(F.interpolate(x, size=(10, 10))), shape) == ((10, 10), (0, 10), (0, 10))
    # no frame of the whole image: a crop, patches, a convolution on features, no convolution
    for function in (lambda x: conv(x[..., :15]), lambda x: conv(F.pixel_unshuffle(x, 2)[:, :3]), lambda x: 2 * x):
        assert frame(function, shape) in [((20, 30), (0, 20), (0, 30)), ((10, 15), (0, 10), (0, 15))]


def test_the_part_of_a_frame_that_is_the_image() -> None:
    frame = Frame((12, 24), (1, 3, 20, 40), rows=(4, 16), columns=(12, 36))
    assert frame.box == (12, 24)
    assert frame.is_padded
    assert frame.is_of_image(torch.zeros(1, 1, 12, 24))
    cells = torch.zeros(1, 1, 10, 20)
    cells[:, :, 2:8, 6:18] = 1.0  # of two pixels each
    assert frame.cut(cells).shape == (1, 1, 6, 12)
    assert_close(frame.cut(cells)[:, :, 1:-1, 1:-1], torch.ones(1, 1, 4, 10))
    back = frame.on_grid(torch.ones(1, 1, 12, 24), (5, 10))  # of four each, sums kept
    expected = torch.zeros(1, 1, 5, 10)
    expected[:, :, 1:4, 3:9] = 16.0
    assert_close(back, expected)


def test_a_compiled_complete_map_of_a_model_that_pads() -> None:
    model = Centered().double().eval()
    image, other = torch.rand(2, 1, 3, 20, 30, dtype=torch.float64)
    method = CompleteScoreMap(model, [model.features[1]])
    compiled = compile_map(method, image, 0, backend="graph")
    torch.testing.assert_close(compiled(other, 0), method.attribute(other, 0), **EXACT)


def test_squares_are_told_by_their_sides() -> None:
    assert channel_dim_of((1, 64, 80, 80), (1, 3, 100, 150)) == 1  # 64 x 80 is more like the image
    assert channel_dim_of((1, 14, 14, 96), (1, 3, 100, 150)) == -1


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_a_layer_s_map_without_its_padding(model: nn.Module, height: int, width: int) -> None:
    row, column = height // 4, 3 * width // 4
    image = torch.full((1, 3, height, width), 0.2, dtype=torch.float64)
    image[:, :, row - 3 : row + 4, column - 3 : column + 4] = 1
    form = linear_form(model, image, 0, model.features[1])
    assert form.input_shape[0] == 1
    score_map = form.on_image(form.score_map())
    scale = height / score_map.shape[2], width / score_map.shape[3]
    highest = divmod(int(score_map[0, 0].argmax()), score_map.shape[3])
    found = tuple((place + 0.5) * size for place, size in zip(highest, scale, strict=True))
    assert found == pytest.approx((row, column), abs=4)
    assert (form + form).on_image(form.score_map()).equal(score_map)
    _, axes = form.plot(image)
    assert axes.images[1].get_array().shape == (height, width)
    whole = linear_form(model, image, 0)
    assert whole.on_image(whole.score_map()).equal(whole.score_map())


class Unpadded(Centered):
    """Pads on all sides, and ends with a convolution on the image's own rows and columns."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (24, 8, 16, 40))
        seen = F.interpolate(self.features(padded), size=padded.shape[2:])
        return self.last(seen[..., 16 : 16 + x.shape[2], 24 : 24 + x.shape[3]]).sum((1, 2, 3))[:, None]


def test_constants_of_the_image_stand_in_it_on_the_grid_of_a_padded_layer() -> None:
    model = Unpadded().double().eval()
    image = torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    form = linear_form(model, image, 0, model.features[3])
    above = form.complete_map() - form.score_map()
    assert above.shape == (2, 1, 20, 16)
    expected = torch.zeros_like(above)
    expected[..., 4:10, 6:14] = 16 * model.last.bias.detach()  # pixels of a cell
    torch.testing.assert_close(above, expected, **EXACT)
