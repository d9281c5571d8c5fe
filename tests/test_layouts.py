"""The image turned, or cut into blocks, inside of the network: what stands where is told by what was moved."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from captum_scoremap import CompleteScoreMap, LayerScoreMap, bias_maps
from captum_scoremap.linear import Subject, main_layers
from captum_scoremap.linear.subject import scores_of
from captum_scoremap.places.following import positions_in
from tests.between import Turned
from tests.test_positions import filled, images

Move = Callable[[Tensor], Tensor]


class Cnn(nn.Module):
    """Convolutions with and without a stride, a norm on channels that come last, and pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 1, 1)
        self.norm, self.pool, self.head = nn.LayerNorm(6), nn.AvgPool2d(2), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x).relu())
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).relu()
        return self.head(self.pool(x).square().mean((2, 3)))


class Tokens(nn.Module):
    """A class token before patches, attention, and a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.zeros(1, 1, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.body, self.head = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        tokens = tokens + self.body(tokens)
        return self.head(tokens.mean(1))


class Merging(nn.Module):
    """Linear layers on channels that come last, between which every four cells become one, as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 6, 2, 2), nn.Linear(6, 6)
        self.reduction, self.after, self.head = nn.Linear(24, 5, bias=False), nn.Linear(5, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        x = x + self.body(x).relu()
        x = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], -1)
        x = self.reduction(x)
        return self.head((x + self.after(x).relu()).square().mean((1, 2)))


class Shuffled(nn.Module):
    """Channels that are shuffled between convolutions of groups, as in ShuffleNet."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.after, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1, groups=2), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).relu()
        x = x.view(len(x), 2, 3, *x.shape[2:]).transpose(1, 2).reshape(x.shape)
        return self.head(self.after(x).square().mean((2, 3)))


def halves(x: Tensor) -> Tensor:
    """Return the left half behind the right one."""
    return x.roll(x.shape[-1] // 2, -1)


TURNS: dict[str, tuple[Move, Move]] = {
    "mirrored": (lambda x: x.flip(-1), lambda x: x.flip(-1)),
    "upside down": (lambda x: x.flip(2), lambda x: x.flip(2)),
    "on its side": (lambda x: x.transpose(2, 3), lambda x: x.transpose(2, 3)),
    "a quarter turn": (lambda x: torch.rot90(x, 1, (2, 3)), lambda x: torch.rot90(x, -1, (2, 3))),
    "columns chosen": (lambda x: x[..., list(range(x.shape[-1]))[::-1]], lambda x: x.flip(-1)),
    "halves swapped": (halves, halves),
    "two turns": (lambda x: x.flip(-1).transpose(2, 3), lambda x: x.transpose(2, 3).flip(-1)),
}


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("build", [Cnn, Tokens, Merging, Shuffled])
@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
def test_maps_of_a_turned_image_lie_as_the_image_does(build: type[nn.Module], turn: str, size: tuple[int, int]) -> None:
    """A network that turns the image first has the maps that it has of the turned image, turned back."""
    do, undo = TURNS[turn]
    net, x = filled(build()), images(2, 3, *size)
    model = Turned(net, do)
    layer = net.get_submodule("body")
    if turn != "halves swapped":  # between whose halves no cell is interpolated
        got, expected = (CompleteScoreMap(one, [layer]).attribute(at, 1) for one, at in ((model, x), (net, do(x))))
        assert_close(got, undo(expected), rtol=1e-9, atol=1e-12)
    found, plain = bias_maps(model, x, 1).maps, bias_maps(net, do(x), 1).maps
    for one, other in zip(found.values(), plain.values(), strict=True):
        assert_close(one, undo(other), rtol=1e-9, atol=1e-12)
    if size[0] == size[1]:
        with pytest.warns(UserWarning, match="looks like a picture of the image, but is none"):
            LayerScoreMap(model, layer).attribute(x, 1)


class WithAMirror(Cnn):
    def mirrored(self, x: Tensor) -> Tensor:
        return self(x.flip(-1))


def test_what_turns_the_image_around_a_layer_is_asked_about_whatever_the_layer_gave_alone() -> None:
    net, x = filled(WithAMirror()), images(2, 3, 16, 16)
    layer = net.get_submodule("body")
    LayerScoreMap(net, layer).attribute(x, 1)  # a map: no warning
    for model in (Turned(net, lambda x: x.flip(-1)), lambda x: net(x.flip(-1)), net.mirrored):
        for _ in range(2):
            with pytest.warns(UserWarning, match="looks like a picture of the image, but is none"):
                LayerScoreMap(model, layer).attribute(x, 1)
    LayerScoreMap(net, layer).attribute(x, 1)


@pytest.mark.parametrize("build", [Cnn, Tokens])
def test_the_mean_over_an_image_and_its_mirror_image_has_the_mean_of_their_maps(build: type[nn.Module]) -> None:
    class Both(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return (self.net(x) + self.net(x.flip(-1))) / 2

    net, x = filled(build()), images(2, 3, 16, 16)
    found = bias_maps(Both(net), x, 1)
    upright, mirrored = bias_maps(net, x, 1), bias_maps(net, x.flip(-1), 1)
    for got, one, other in zip(found.maps.values(), upright.maps.values(), mirrored.maps.values(), strict=True):
        assert_close(got, (one + other.flip(-1)) / 2, rtol=1e-9, atol=1e-12)


class Blocks(nn.Module):
    """Perceptrons with shortcuts on sixteen blocks of sixteen cells, (N, 16, 16, C), as if a map; or on the map."""

    def __init__(self, *, cuts: bool) -> None:
        super().__init__()
        self.stem, self.cuts, self.head = nn.Conv2d(3, 5, 1), cuts, nn.Linear(5, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 5), nn.ReLU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        if self.cuts:
            x = x.reshape(len(x), 4, 4, 4, 4, 5).transpose(2, 3).reshape(len(x), 16, 16, 5)
        for layer in self.layers:
            x = x + layer(x)
        if self.cuts:
            x = x.reshape(len(x), 4, 4, 4, 4, 5).transpose(2, 3).reshape(len(x), 16, 16, 5)
        return self.head(x.square().mean((1, 2)))


def test_blocks_of_cells_that_look_like_a_map_stand_where_they_were_cut() -> None:
    model, x = filled(Blocks(cuts=True)), images(2, 3, 16, 16)
    plain = Blocks(cuts=False).double()
    plain.load_state_dict(model.state_dict())
    found, expected = bias_maps(model, x, 1).maps, bias_maps(plain, x, 1).maps
    assert found.keys() == expected.keys()
    for name, one in found.items():
        assert_close(one, expected[name], rtol=1e-9, atol=1e-12)


class Frequencies(nn.Module):
    """Each block's pixels in another order, as channels, normalized by constants; as networks on frequencies begin."""

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.order, self.mix, self.head = order, nn.Conv2d(len(order) * 3, 6, 1), nn.Linear(6, 4)
        self.body = nn.Conv2d(6, 6, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, height, width = x.shape
        blocks = x.view(n, 3, height // 4, 4, width // 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, 16)
        blocks = (blocks[:, :, self.order] - 0.1) / 0.7
        maps = blocks.view(n, height // 4, width // 4, -1).permute(0, 3, 1, 2)
        return self.head(self.body(self.mix(maps).relu()).square().mean((2, 3)))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("order", [torch.arange(16).flip(0), torch.tensor([0, 1, 4])], ids=["all", "some"])
def test_channels_made_of_chosen_pixels_of_each_block_are_a_map_of_blocks(order: Tensor, count: int) -> None:
    model, x = filled(Frequencies(order)), images(count, 3, 32, 32)
    assert "body" in main_layers(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LayerScoreMap(model, model.body).attribute(x, 1)
    found = bias_maps(model, x, 1, model.mix).maps
    assert found["body"].shape == (count, 1, 8, 8)


def test_places_are_held_once_for_all_images_and_channels() -> None:
    """What is padded, and then cut into windows, would else be compared element by element for each step."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 5, 3, 2), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(F.pad(x, (0, 1, 0, 1))).relu()
            x = x.reshape(len(x), 5, 4, 2, 4, 2).permute(0, 1, 2, 4, 3, 5).reshape(len(x), 5, 16, 4)
            return self.head(x.square().mean((2, 3)))

    model, x = filled(Padded()), images(2, 3, 16, 16)
    recording, _ = Subject(model, (x,)).record(scores_of(1, 2), [None])
    known, _ = positions_in(recording.tape, x.shape)
    held = [part for value, (one, *_) in known.items() if value.ndim == 4 for part in (one.row, one.column)]
    assert len(held) > 2
    assert all(part.shape[:2] == (1, 1) for part in held)
