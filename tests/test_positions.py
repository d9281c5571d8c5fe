"""What stands at positions of the image, and what only looks like it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.ops import roi_align

from captum_scoremap import CompleteScoreMap, FusedScoreMap, LayerScoreMap, bias_maps, linear_form
from captum_scoremap.layout import resized
from captum_scoremap.linear import main_layers
from captum_scoremap.places import placement
from tests.between import Turned


def images(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def filled(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.double().eval().parameters():
            parameter.normal_(0, 0.4, generator=generator)
    return model


class Attention(nn.Module):
    """By products and a softmax, with a module for its weights, as many libraries write it, or by one operation."""

    def __init__(self, width: int, *, is_fused: bool) -> None:
        super().__init__()
        self.queries, self.keys = nn.Linear(width, width), nn.Linear(width, width)
        self.values, self.weights, self.is_fused = nn.Linear(width, width), nn.Softmax(-1), is_fused

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        queries, keys, values = (
            part(one).unflatten(2, (2, -1)).transpose(1, 2)
            for part, one in ((self.queries, x), (self.keys, memory), (self.values, memory))
        )
        if self.is_fused:
            found = F.scaled_dot_product_attention(queries, keys, values)
        else:
            found = self.weights(queries @ keys.transpose(2, 3)) @ values
        return found.transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, width: int, *, is_fused: bool) -> None:
        super().__init__()
        self.attend, self.norm = Attention(width, is_fused=is_fused), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU())

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        x = x + self.attend(self.norm(x), x if memory is None else memory)
        return x + self.mlp(x)


class Queries(nn.Module):
    """A detector of as many object queries as its encoder has cells."""

    def __init__(self, *, is_fused: bool, chooses: bool = False) -> None:
        super().__init__()
        self.patches, self.table = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.zeros(1, 16, 8))
        self.encoder = Block(8, is_fused=is_fused)
        self.decoder = nn.ModuleList(Block(8, is_fused=is_fused) for _ in range(3))
        self.head, self.chooses = nn.Linear(8, 3), chooses

    def forward(self, x: Tensor) -> Tensor:
        memory = self.encoder(self.patches(x).flatten(2).transpose(1, 2))
        queries = self.table.expand(len(x), -1, -1)
        if self.chooses:  # the cells that score highest, in that order
            best = memory.sum(2).topk(16).indices
            queries = memory.gather(1, best[..., None].expand(-1, -1, 8))
        for block in self.decoder:
            queries = block(queries, memory)
        return self.head(queries)[:, 2]


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("count", [1, 2])
def test_queries_are_no_positions(count: int, is_fused: bool) -> None:
    model, x = filled(Queries(is_fused=is_fused)), images(count, 3, 16, 16)
    assert main_layers(model, x) == ["patches", "encoder"]
    found = bias_maps(model, x, 1, model.encoder)
    # keys and values are of the encoder's cells, all else of a query
    assert {name for name in found.maps if "decoder" in name} <= {
        f"decoder.{number}.attend.{part}" for number in range(3) for part in ("keys", "values")
    }
    assert {"decoder.0.mlp.0", "decoder.2.mlp.0", "head"} <= set(found.placeless)
    with pytest.raises(ValueError, match="the layer must have a place in the image"):
        CompleteScoreMap(model, model.decoder[1]).attribute(x, 1)
    with pytest.raises(ValueError, match=r"of the image's positions, got .* from a Block"):
        FusedScoreMap(model, model.decoder[1]).attribute(x, 1)
    complete, placeless = CompleteScoreMap(model).attribute(x, 1, return_placeless=True)
    assert_close(complete.sum((1, 2, 3)) + placeless, model(x)[:, 1].detach(), rtol=1e-12, atol=1e-12)
    assert FusedScoreMap(model).attribute(x, 1).shape == (count, 1, 16, 16)


def test_chosen_rows_stand_where_they_were_chosen() -> None:
    """A decoder without attention to anything else: all of a row's constants are at the cell that it came from."""

    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.mlp, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.patches(x).flatten(2).transpose(1, 2)
            order = tokens[..., 0].argsort(1)
            tokens = tokens.gather(1, order[..., None].expand(-1, -1, 8))
            return self.head(tokens + self.mlp(tokens).relu())[:, 0]

    model, x = filled(Chosen()), images(2, 3, 16, 16)
    cells = model.patches(x)[:, 0].flatten(1).argmin(1)
    found = bias_maps(model, x, 1).maps["mlp"].flatten(1)
    assert [one.nonzero().tolist() for one in found] == [[[int(cell)]] for cell in cells]


def test_constants_of_a_region_stand_in_it() -> None:
    """One region of one image: (1, C, h, w), like a map of the whole image."""

    class Region(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.mask = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 4, 3, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            boxes = [torch.tensor([[2.0, 4.0, 8.0, 10.0]], dtype=x.dtype)] * len(x)
            return self.mask(roi_align(self.features(x).relu(), boxes, 4, aligned=True)).mean((2, 3))

    model = filled(Region())
    for count in (1, 2):
        x = images(count, 3, 16, 16)
        found = bias_maps(model, x, 1).maps["mask"]
        assert_close(found.sum((1, 2, 3)), model.mask.bias[1].detach().expand(count), rtol=1e-12, atol=1e-12)
        outside = torch.ones(16, 16, dtype=torch.bool)
        outside[3:11, 1:9] = False  # cells lie between pixels
        assert not found[:, 0, outside].any()


def in_windows(x: Tensor) -> Tensor:
    """As Hiera of SAM 2 pools the queries of windows that are larger than the map, and takes its part of them."""
    return F.max_pool2d(F.pad(x, (0, 6, 0, 6)), 2)[:, :, :4, :4]


POOLED: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "around": (lambda x: F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2), 4),
    "below and beside": (lambda x: F.max_pool2d(F.pad(x, (0, 1, 0, 1)), 2, 1), 8),
    "cropped": (lambda x: F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), 3, 2)[:, :, 1:3, 1:3], 4),
    "windows": (in_windows, 4),
}


def overwritten(x: Tensor) -> Tensor:
    x = x.clone()
    x[x < 0.2] = 0.1
    return x


def in_windows_of_four(x: Tensor) -> Tensor:
    """Attention inside shifted windows of a map that is padded to be cut."""
    x = F.pad(x.roll((-2, -2), (2, 3)), (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
    parts = x.unflatten(3, (-1, 4)).unflatten(2, (-1, 4)).permute(0, 2, 4, 3, 5, 1)
    tokens = parts.flatten(3, 4).flatten(0, 2)
    tokens = tokens + F.scaled_dot_product_attention(tokens, tokens, tokens)
    return tokens.view(parts.shape).permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3).roll((2, 2), (2, 3))


def sampled(x: Tensor, scale: int) -> Tensor:
    size = [*x.shape[:2], scale * x.shape[2], scale * x.shape[3]]
    grid = F.affine_grid(torch.eye(2, 3, dtype=x.dtype).expand(len(x), 2, 3), size, align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


# What networks do to maps between convolutions.
BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "response norm": lambda x: F.local_response_norm(x, 5),
    "response norm of even size": lambda x: F.local_response_norm(x, 4),
    "pooling of channels, too": lambda x: F.avg_pool3d(x[:, None], 3, 1, 1)[:, 0],
    "pooling of channels behind padding": lambda x: F.max_pool3d(F.pad(x[:, None], (1,) * 6), 3, 1)[:, 0],
    "sampling": lambda x: sampled(x, 1),
    "sampling twice as finely": lambda x: sampled(x, 2),
    "a mask in place": overwritten,
    "windows": in_windows_of_four,
    "blur": lambda x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3, 2),
    "switches": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    "channels shuffled": lambda x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2),
    "rows by columns": lambda x: x + x.mean(2, keepdim=True) + x.mean(3, keepdim=True),
    "vmap": lambda x: torch.vmap(lambda one: F.avg_pool2d(one, 3, 1, 1))(x),
}


@pytest.mark.parametrize("name", BETWEEN)
@pytest.mark.parametrize("size", [(24, 24), (28, 36)])
def test_what_is_behind_is_a_map_again(name: str, size: tuple[int, int]) -> None:
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after, self.last = (
                nn.Sequential(nn.Conv2d(channels, 8, 3, stride, 1), nn.BatchNorm2d(8), nn.ReLU())
                for channels, stride in ((3, 2), (8, 1), (8, 2))
            )
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.last(self.after(BETWEEN[name](self.before(x)))).mean((2, 3)))

    model, x = filled(Between()), images(2, 3, *size)
    assert main_layers(model, x)[-2:] == ["after", "last"]
    for layers in (None, "image", model.before, model.last):
        complete, placeless = CompleteScoreMap(model, layers).attribute(x, 1, return_placeless=True)
        assert_close(placeless, model.head.bias[1].detach().expand(2), rtol=0, atol=1e-10)
        assert_close(complete.sum((1, 2, 3)) + placeless, model(x)[:, 1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("from_left", [False, True])
def test_tokens_that_are_mixed_among_themselves_keep_their_positions(from_left: bool) -> None:
    """As the spatial gate of gMLP: what is added to the mixture stands at its token."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.mixes, self.head = nn.Conv2d(3, 6, 4, 4), nn.Linear(16, 16), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.patches(x).flatten(2).transpose(1, 2).chunk(2, 2)
            mixed = self.mixes.weight @ second if from_left else (second.mT @ self.mixes.weight.T).mT
            return self.head((first * (mixed + self.mixes.bias[:, None])).mean(1))

    model, x = filled(Gate()), images(2, 3, 16, 16)
    for layers in ("image", model.patches):
        _, placeless = CompleteScoreMap(model, layers).attribute(x, 1, return_placeless=True)
        assert_close(placeless, model.head.bias[1].detach().expand(2), rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(("kernel", "size"), [(3, (16, 16)), (5, (14, 22)), (7, (20, 16))])
def test_padding_by_a_map_s_own_cells_makes_a_map(mode: str, kernel: int, size: tuple[int, int]) -> None:
    def block(channels: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(channels, 6, kernel, stride, kernel // 2, padding_mode=mode), nn.BatchNorm2d(6), nn.ReLU()
        )

    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    model = filled(nn.Sequential(block(3, 1), block(6, 2), nn.MaxPool2d(2), block(6, 1), *head))
    x = images(2, 3, *size)
    assert main_layers(model, x) == ["0", "1", "3"]
    for layers in (None, "image"):
        _, placeless = CompleteScoreMap(model, layers).attribute(x, 1, return_placeless=True)
        assert_close(placeless, model[-1].bias[1].detach().expand(2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d])
def test_padding_by_one_row_and_column_on_one_side_makes_a_map(kind: type[nn.Module]) -> None:
    """As exported networks pad for convolutions with a stride; the ramp shows where the map's cells stand."""
    model = filled(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), kind((0, 1, 0, 1)), nn.Conv2d(4, 4, 2)))
    x, ramp = images(1, 3, 8, 8), images(1, 1, 1, 8)

    def score(x: Tensor) -> Tensor:
        return (model(x) * ramp).sum((1, 2, 3))[:, None]

    constants = bias_maps(score, x, 0).maps["3"]
    expected = (model[3].bias.detach().sum() * ramp).expand(1, 1, 8, 8)
    assert_close(constants, expected)


@pytest.mark.parametrize("name", POOLED)
@pytest.mark.parametrize("count", [1, 2])
def test_cells_that_are_pooled_behind_padding_stand_where_they_do(name: str, count: int) -> None:
    """Padding of a pooling is its own; that of windows is not. The score reads one cell."""
    pool, side = POOLED[name]

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.after = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.after(pool(self.stem(x)))[:, :, 0, 1]

    model, x = filled(Pooled()), images(count, 3, 16, 16)
    found = bias_maps(model, x, 1).maps["after"]
    assert found.shape[2:] == (side, side)
    cell = [1, 2] if name == "cropped" else [0, 1]
    assert [one.nonzero().tolist() for one in found[:, 0]] == [[cell]] * count


@pytest.mark.parametrize("shift", [0.0, 0.01])
@pytest.mark.parametrize("points", ["none", "in a row", "in half the rows"])
def test_a_warped_map_keeps_positions_and_sampled_points_have_none(points: str, shift: float) -> None:
    """As a spatial transformer samples, on a grid of about the map's proportions, and as deformable attention does."""

    class Sampled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.after = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            whole = F.affine_grid(
                torch.eye(2, 3).to(x).expand(len(x), -1, -1), [len(x), 4, 16, 16], align_corners=False
            )
            if shift:  # the image says where
                whole = whole + shift * x.mean((1, 2, 3), keepdim=True)
            grid = whole.reshape(len(x), -1, 1, 2) if points == "in a row" else whole
            grid = grid[:, ::2] if points == "in half the rows" else grid
            return self.after(F.grid_sample(self.features(x), grid, align_corners=False)).mean((2, 3))

    model, x = filled(Sampled()), images(2, 3, 16, 16)
    found = bias_maps(model, x, 1)
    assert ("after" in found.maps) == (points == "none") == ("after" not in found.placeless)
    share = (found.maps if points == "none" else found.placeless)["after"].reshape(2, -1).sum(1)
    assert_close(share, model.after.bias[1].detach().expand(2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("choose", "keeps"),
    [
        (lambda x: x[:, [2, 0, 1, 3]], True),
        (lambda x: x[torch.arange(len(x))], True),
        (lambda x: x.index_select(1, torch.tensor([3, 2, 1, 0])), True),
        (lambda x: x[:, :, torch.arange(15, -1, -1) // 2], False),
    ],
    ids=["channels", "images", "channels, selected", "rows"],
)
def test_chosen_channels_and_images_keep_positions(choose: Callable[[Tensor], Tensor], keeps: bool) -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.after = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.after(choose(self.features(x))).mean((2, 3))

    model, x = filled(Chosen()), images(2, 3, 16, 16)
    assert main_layers(model, x) == ["after" if keeps else "features"]
    assert_close(bias_maps(model, x, 1).maps["after"].sum((1, 2, 3)), model.after.bias[1].detach().expand(2))


def test_channels_are_no_rows_where_pooling_brings_a_map_to_other_proportions() -> None:
    """(N, 8, 5, 5) of 24 x 16 pixels: as (N, h, w, C) that would be 8 rows of 5, in proportion."""
    model = filled(nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.AdaptiveMaxPool2d(5), nn.Flatten(), nn.Linear(200, 3)))
    x = images(2, 3, 24, 16)
    assert main_layers(model, x) == ["0", "1"]
    placed, _ = linear_form(model, x, 1, model[1])._placed()
    expected = (model[:2](x) * model[3].weight[1].view(8, 5, 5)).sum(1, keepdim=True).detach()
    assert_close(placed, expected, rtol=1e-12, atol=1e-12)


class Patches(nn.Module):
    """A vision transformer whose patches are cut by a reshape: no convolution returns a map."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(48, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(Block(8, is_fused=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(F.unfold(x, 4, stride=4).transpose(1, 2))
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(tokens.mean(1))


def test_attention_is_no_map() -> None:
    """Heads by queries by keys, (N, 2, 16, 16), are as many rows as columns; the tokens are 4 x 4."""
    model, x = filled(Patches()), images(1, 3, 16, 16)
    assert main_layers(model, x) == ["blocks.1", "blocks.2", "blocks.3"]


class Windows(nn.Module):
    """Windows of tokens, (N, 4, 49, 48): rows and columns would be 49 tokens and 48 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.table = nn.Conv2d(3, 48, 4, 4), Table()
        self.mlp, self.head = nn.Sequential(nn.Linear(48, 48), nn.GELU()), nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.patches(x)
        windows = maps.unflatten(3, (2, 7)).unflatten(2, (2, 7)).permute(0, 2, 4, 3, 5, 1).flatten(1, 2).flatten(2, 3)
        windows = windows + self.mlp(windows) + self.table()
        return self.head(windows.mean((1, 2)))


def of_window(model: Windows, x: Tensor, window: int) -> Tensor:
    """What the bias of the first linear layer adds at each of a window's cells, (7, 7): by the gate of its GELU."""
    maps = model.patches(x)
    rows, columns = divmod(window, 2)
    own = maps[0, :, 7 * rows : 7 * rows + 7, 7 * columns : 7 * columns + 7].permute(1, 2, 0)
    before = model.mlp[0](own)
    weights = F.gelu(before) / before * model.mlp[0].bias
    return (weights @ model.head.weight[1]).detach() / 196


class Table(nn.Module):
    """A table of positions that a module returns, given nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, 1, 56, 56))

    def forward(self) -> Tensor:
        return self.table.mean()[None, None, None, None] * torch.ones(1, 1, 49, 48, dtype=self.table.dtype)


def test_tokens_by_channels_are_no_map_nor_are_tables() -> None:
    model, x = filled(Windows()), images(1, 3, 56, 56)
    assert main_layers(model, x) == ["patches"]
    found = bias_maps(model, x, 1)
    assert_close(found.maps["mlp.0"][0, 0, 7:, :7], of_window(model, x, 2), rtol=1e-10, atol=1e-12)


class Filtered(nn.Module):
    """An image that is blurred and made a square before the network sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 3, 3, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        blurred = F.conv2d(x, x.new_full((3, 1, 3, 3), 1 / 9), padding=1, groups=3)
        return self.net(F.interpolate(blurred, (16, 16), mode="bilinear", antialias=True)).mean((2, 3))


def test_maps_behind_a_filter_are_laid_over_the_whole_image() -> None:
    model, x = filled(Filtered()), images(1, 3, 16, 48)
    complete, placeless = CompleteScoreMap(model).attribute(x, 1, return_placeless=True)
    assert_close(complete.sum((1, 2, 3)) + placeless, model(x)[:, 1].detach(), rtol=1e-12, atol=1e-12)
    changed = x.clone()
    changed[..., 36:] += 1
    difference = (CompleteScoreMap(model).attribute(changed, 1) - complete).abs()[0, 0].sum(0)
    assert difference[36:].sum() > 3 * difference[:28].sum()


OVERWRITTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "a shift": lambda x: F.pad(x, (0, 0, 1, -1)),
    "a shift beside": lambda x: F.pad(x, (0, 0, 1, -1), value=0.3) + x,
    "a shift of numbers": lambda x: F.pad(x, (0, 0, 2, -2), value=0.3),
    "chosen tokens": lambda x: x.index_put((torch.arange(len(x)), torch.arange(len(x)) + 3), x.new_tensor(0.25)),
    "a mask": lambda x: x.masked_fill(torch.arange(16)[:, None] % 3 == 0, 0.25),
    "a mask in place": lambda x: (x := x.clone(), x.__setitem__((slice(None), torch.arange(16) % 3 == 0), 0.25))[0],
}


@pytest.mark.parametrize("name", OVERWRITTEN)
@pytest.mark.parametrize("count", [1, 2])
def test_what_stands_on_constants_that_were_written_over_tokens_is_not_lost(name: str, count: int) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.mlp = nn.Conv2d(3, 5, 4, stride=4), nn.LayerNorm(5), nn.Linear(5, 5)
            self.head = nn.Linear(80, 3)

        def forward(self, x: Tensor) -> Tensor:
            tokens = OVERWRITTEN[name](self.conv(x).flatten(2).transpose(1, 2))
            return self.head(self.mlp(self.norm(self.mlp(tokens))).flatten(1))

    model, inputs = filled(Model()), images(count, 3, 16, 16)
    for layer in (None, model.conv):
        form, parts = linear_form(model, inputs, 1, layer), bias_maps(model, inputs, 1, layer)
        total = sum(one.sum((1, 2, 3)) for one in parts.maps.values()) + sum(parts.placeless.values())
        assert_close(total, form.bias, rtol=1e-9, atol=1e-12)
    complete, placeless = CompleteScoreMap(model, model.conv).attribute(inputs, 1, return_placeless=True)
    assert_close(complete.sum((1, 2, 3)) + placeless, model(inputs)[:, 1], rtol=1e-9, atol=1e-12)


class Unrolled(nn.Module):
    """Tokens window by window, a maximum over each window's cells, and shortcuts on the way, as Hiera has them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 3)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).unflatten(3, (4, 2)).unflatten(2, (4, 2)).permute(0, 3, 5, 2, 4, 1).flatten(1, 4)
        tokens = tokens + self.first(tokens).relu()
        tokens = tokens + self.last(tokens).relu()
        return self.head(tokens.unflatten(1, (4, 16)).amax(1).mean(1))


def test_tokens_in_another_order_stand_at_their_places() -> None:
    model, x = filled(Unrolled()), images(1, 3, 16, 16)
    before = model.patches(x).movedim(1, -1)
    before = before + model.first(before).relu()
    after = before + model.last(before).relu()
    _, largest = F.max_pool2d(after.movedim(-1, 1), 2, return_indices=True)
    chosen = (
        torch.zeros(1, 8, 64, dtype=x.dtype).scatter_(2, largest.flatten(2), 1.0).unflatten(2, (8, 8)).movedim(1, -1)
    )
    units = (model.last(before) > 0) * model.last.bias
    expected = (chosen * units * model.head.weight[1] / 16).sum(-1).detach()
    assert_close(bias_maps(model, x, 1).maps["last"][:, 0], expected, rtol=1e-10, atol=1e-12)


class Stages(nn.Module):
    """Blocks on tokens, in a stage that returns a map, as TinyViT has them."""

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.mlp = nn.Conv2d(8, 8, 2, 2), nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            x = self.down(x)
            tokens = x.flatten(2).transpose(1, 2)
            return (tokens + self.mlp(tokens)).transpose(1, 2).view_as(x)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 3)
        self.stages = nn.ModuleList(Stages.Stage() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))


def test_stages_are_preferred_to_the_blocks_in_them() -> None:
    assert main_layers(filled(Stages()), images(1, 3, 32, 32)) == ["stem", "stages.0", "stages.1"]


def test_maps_are_preferred_to_tokens_in_what_returns_them() -> None:
    """As in Swin: a stage deeper in the model than the stem of the same resolution, whose perceptrons see tokens."""
    model = filled(Stages())
    model.stages = nn.Sequential(*model.stages)
    model.stages[0].down = nn.Identity()
    model.forward = lambda x: model.head(model.stages(model.stem(x)).mean((2, 3)))
    assert main_layers(model, images(1, 3, 32, 32)) == ["stem", "stages"]


class Unfolded(nn.Module):
    """Patches of 2 x 2 cells in 8 x 8, (N, C, 4, 16) or, of 4 x 4, (N, C, 4, 4), as MobileViT v2 has them."""

    def __init__(self, *, by_columns: bool) -> None:
        super().__init__()
        self.stem, self.local, self.by_columns = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 3, 1, 1), by_columns
        self.mix, self.head = nn.Sequential(nn.Conv2d(8, 8, 1), nn.SiLU()), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.local(self.stem(x)).relu()
        rows, columns = (side // 2 for side in x.shape[2:])
        if self.by_columns:
            patches = F.unfold(x, 2, stride=2).view(len(x), 8, 4, -1)
        else:
            cut = x.view(len(x), 8, rows, 2, columns, 2)
            patches = cut.permute(0, 1, 3, 5, 2, 4).reshape(len(x), 8, 4, -1)
        patches = patches + self.mix(patches)
        whole = patches.view(len(x), 8, 2, 2, rows, columns).permute(0, 1, 4, 2, 5, 3).reshape(x.shape)
        return self.head(whole.mean((2, 3)))


@pytest.mark.parametrize("count", [1, 2])
def test_windows_of_as_many_cells_as_there_are_windows_are_no_map(count: int) -> None:
    """As MobileViT has them at its last stage, (N windows, cells, C): the pixels at one place of all patches."""

    class Windowed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.mix, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            cut = self.stem(x).reshape(len(x), 8, 2, 2, 2, 2).permute(0, 3, 5, 2, 4, 1).reshape(len(x) * 4, 4, 8)
            mixed = self.mix(cut)
            return self.head(mixed.reshape(len(x), 4, 4, 8)[:, 1, 2])

    model, x = filled(Windowed()), images(count, 3, 16, 16)
    found = bias_maps(model, x, 1).maps["mix"]
    assert found.shape == (count, 1, 4, 4)
    # of patch 2, the one below, the pixel beside
    assert [one.nonzero().tolist() for one in found[:, 0]] == [[[2, 1]]] * count


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("by_columns", [False, True])
def test_unfolded_patches_stand_where_they_were_cut(count: int, by_columns: bool) -> None:
    model, x = filled(Unfolded(by_columns=by_columns)), images(count, 3, 16, 16)
    assert main_layers(model, x) == ["local"]
    before = model.local(model.stem(x)).relu()
    mixed = model.mix[0](before)
    gates = F.silu(mixed) / mixed
    expected = (gates * model.mix[0].bias[:, None, None] * model.head.weight[1][:, None, None] / 16).sum(1).detach()
    assert_close(bias_maps(model, x, 1).maps["mix.0"][:, 0], expected, rtol=1e-10, atol=1e-12)
    form = linear_form(model, x, 1, model.mix)
    expected = (F.silu(mixed) * model.head.weight[1][:, None, None] / 16).sum(1).detach()
    assert_close(form._placed()[0][:, 0], expected, rtol=1e-10, atol=1e-12)
    with pytest.warns(UserWarning, match=r"'mix', whose tensor is \(., 8, 4, 4\), looks like a picture"):
        LayerScoreMap(model, model.mix).attribute(x, 1)


def test_a_layer_that_gives_maps_is_asked_about_once_for_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = filled(Patches()), []
    plain = placement.Placement.is_map
    monkeypatch.setattr(placement.Placement, "is_map", lambda self, value: asked.append(value) or plain(self, value))
    method = LayerScoreMap(model, model.blocks[0])
    for count, times in ((1, 1), (1, 1), (2, 2), (2, 2)):
        method.attribute(images(count, 3, 16, 16), 1)
        assert len(asked) == times


class Mean(nn.Module):
    """The mean over rows."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def test_layers_that_are_no_maps_say_so() -> None:
    x = images(1, 3, 16, 16)
    queries, tokens, patches = filled(Queries(is_fused=False)), filled(Unrolled()), filled(Patches())
    cases = (
        (queries, queries.decoder[1], None),  # object queries
        (tokens, tokens.first, (8, 8)),  # tokens window by window
        (patches, patches.blocks[1].attend.weights, (4, 4)),  # weights of attention, by the queries that they are of
    )
    for model, layer, grid in cases:
        with pytest.warns(UserWarning, match=r"looks like a picture of the image, but is none"):
            LayerScoreMap(model, layer).attribute(x, 1)
        with pytest.warns(UserWarning, match=r"looks like a picture of the image, but is none"):
            LayerScoreMap(model, layer).attribute_targets(x, [1])
        form = linear_form(model, x, 1, layer)
        if grid is None:
            with pytest.raises(ValueError, match=r"got \(1, 16, 8\) at no positions of it"):
                form.plot()
            continue
        placed, _ = form._placed()
        assert placed.shape[2:] == grid
        assert_close(placed.sum((1, 2, 3)), form.sums, rtol=1e-10, atol=1e-12)
        fused = FusedScoreMap(model, layer).attribute(x, 1)
        assert fused.shape == (1, 1, 16, 16)
    LayerScoreMap(queries, queries.encoder).attribute(x, 1)  # a map: no warning
    LayerScoreMap(patches, patches.blocks[1]).attribute(x, 1)
    slots = nn.Sequential(nn.Conv2d(3, 77, 4, 4), nn.Flatten(2), nn.Linear(16, 30), Mean(), nn.Linear(30, 3))
    LayerScoreMap(filled(slots), slots[2]).attribute(x, 1)  # 77 rows of 30, which nobody lays out


def test_maps_that_are_sorted_each_have_an_order_of_their_own() -> None:
    x, (ahead, after), added = images(1, 1, 6, 6), images(2, 36), images(36) - 0.5

    def model(x: Tensor) -> Tensor:
        first, second = (torch.sort(one.flatten(1), 1)[0] + added for one in (2 * x, -x))
        return torch.stack([first @ ahead + second @ after, first @ after], 1)

    expected = torch.zeros(36, dtype=x.dtype)
    for one, weight in zip((2 * x.flatten(), -x.flatten()), (ahead, after), strict=True):
        ordered, places = one.sort()
        expected[places] += (ordered + added) * weight
    assert_close(CompleteScoreMap(model, "image").attribute(x, 0).flatten(), expected)


def test_sorted_cells_of_several_images_stand_where_those_of_each_alone_do() -> None:
    """Down to the last cell of the last image."""
    x, weight, added = images(3, 1, 4, 4), images(16), images(16) - 0.5

    def model(x: Tensor) -> Tensor:
        cells = torch.sort(x.flatten(1), 1)[0] + added
        return torch.stack([cells @ weight, cells.sum(1)], 1)

    together = CompleteScoreMap(model, "image").attribute(x, 0)
    alone = torch.cat([CompleteScoreMap(model, "image").attribute(one[None], 0) for one in x])
    assert_close(together, alone)


@pytest.mark.parametrize(
    "turn", [lambda tokens: tokens, lambda tokens: tokens.mT], ids=["channels first", "tokens first"]
)
def test_of_as_many_tokens_as_channels_those_are_channels_that_stand_closer_together(
    turn: Callable[[Tensor], Tensor],
) -> None:
    x, weight, added = images(1, 4, 8, 8), images(16, 16), images(16, 16) - 0.5

    def model(x: Tensor) -> Tensor:
        tokens = turn(F.pixel_unshuffle(x, 2).flatten(2))  # of each cell four pixels of four channels
        return torch.stack([((tokens + turn(added)) * turn(weight)).sum((1, 2)), tokens.sum((1, 2))], 1)

    own = (x * F.pixel_shuffle(weight.view(1, 16, 4, 4), 2)).sum(1, keepdim=True)
    constants = (added * weight).sum(0).view(1, 1, 4, 4)
    assert_close(CompleteScoreMap(model, "image").attribute(x, 0), own + resized(constants, (8, 8)))


def mirrored(x: Tensor) -> Tensor:
    return x.flip(3)


class Regional(nn.Module):
    """Windows of cells with a coarser cell of their own ahead, as in RegionViT (Chen et al. 2022)."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.fine, self.coarse = nn.Conv2d(2, 6, 2, 2), nn.Conv2d(2, 6, 2 * window, 2 * window)
        self.mix, self.head = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        size = self.window
        fine = self.fine(x).unfold(2, size, size).unfold(3, size, size)  # (N, C, rows, columns, size, size)
        fine = fine.permute(0, 2, 3, 4, 5, 1).reshape(-1, size * size, 6)
        tokens = torch.cat([self.coarse(x).permute(0, 2, 3, 1).reshape(-1, 1, 6), fine], 1)
        tokens = tokens + self.mix(tokens)
        scores: Tensor = self.head(tokens.relu().unflatten(0, (len(x), -1)).mean((1, 2)))
        return scores


@pytest.mark.parametrize("turn", [mirrored, lambda x: x.mT, lambda x: x.rot90(1, (2, 3))])
@pytest.mark.parametrize("window", [2, 3])
def test_a_coarse_cell_among_finer_ones_stands_on_all_around_its_center(
    window: int, turn: Callable[[Tensor], Tensor]
) -> None:
    model, x = filled(Regional(window)), images(2, 2, 4 * window, 4 * window)
    found = bias_maps(model, x, 1)
    assert {one.shape[2:] for name, one in found.maps.items() if "mix" in name} == {(2 * window, 2 * window)}
    turned = CompleteScoreMap(Turned(model, turn).eval(), "image").attribute(x, 1)
    assert_close(turn(turned), CompleteScoreMap(model, "image").attribute(turn(x), 1))


class Shifted(nn.Module):
    """Patches of the image and of four shifted ones, as those of a ViT for small data sets (Lee et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.mix, self.head = nn.Linear(160, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        shifts = ((1, -1, 0, 0), (-1, 1, 0, 0), (0, 0, 1, -1), (0, 0, -1, 1))
        x = torch.cat([x, *(F.pad(x, shift) for shift in shifts)], 1)
        tokens = self.patches(F.unfold(x, 4, stride=4).mT)
        tokens = self.mix(tokens.relu()).relu()
        scores: Tensor = self.head(tokens.mean(1))
        return scores


@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
def test_patches_of_shifted_images_stand_where_those_of_the_image_do(size: tuple[int, int]) -> None:
    model, x = filled(Shifted()), images(2, 2, *size)
    assert main_layers(model, x) == ["mix"]
    grid = size[0] // 4, size[1] // 4
    found = bias_maps(model, x, 1)
    assert {found.maps[name].shape[2:] for name in ("patches", "mix")} == {grid}
    assert [*found.placeless] == ["head"]
    form = linear_form(model, x, 1, model.mix)
    products = (form.coefficients * form.activations).sum(2).view(2, 1, *grid)
    assert_close(form._placed()[0], products)


class Outlook(nn.Module):
    """Weights of windows by what stands in the middle, as in VOLO (Yuan et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.values, self.weights = nn.Conv2d(2, 6, 2, 2), nn.Linear(6, 6), nn.Linear(6, 81)
        self.after, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        values = F.unfold(self.values(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), 3, padding=1, stride=2)
        values = values.unflatten(1, (6, 9)).permute(0, 3, 2, 1)  # (N, windows, 9, channels)
        weights = self.weights(F.avg_pool2d(x, 2, ceil_mode=True).flatten(2).mT).unflatten(2, (9, 9)).softmax(3)
        found = (weights @ values).permute(0, 3, 2, 1).flatten(1, 2)
        x = x + self.after(F.fold(found, x.shape[2:], 3, padding=1, stride=2).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        scores: Tensor = self.head(x.relu().mean((2, 3)))
        return scores


@pytest.mark.parametrize(
    "turn",
    [mirrored, lambda x: x.flip(2), lambda x: x.mT, lambda x: x.flip(2, 3)],
    ids=["mirrored", "upside down", "on its side", "half round"],
)
def test_sums_over_windows_stand_where_these_were_cut(turn: Callable[[Tensor], Tensor]) -> None:
    model, x = filled(Outlook()), images(2, 2, 16, 16)
    turned = CompleteScoreMap(Turned(model, turn).eval(), "image").attribute(x, 1)
    assert_close(turn(turned), CompleteScoreMap(model, "image").attribute(turn(x), 1))


def test_the_fused_map_of_a_mirrored_image_is_mirrored() -> None:
    """Its cells without a part in the score, of 5 pixels and 5/7, too."""
    model = filled(
        nn.Sequential(
            *(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 3), nn.Conv2d(2, 2, 3, 2, 1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(98, 3)),
        )
    )
    x = images(1, 2, 40, 40) - 0.5
    turned = FusedScoreMap(Turned(model, mirrored).eval()).attribute(x, 1)
    expected = FusedScoreMap(model).attribute(mirrored(x), 1)
    assert (expected == 0).any()
    assert_close(mirrored(turned), expected)


@pytest.mark.parametrize(
    "repeat",
    [nn.AdaptiveAvgPool2d(3), nn.AdaptiveMaxPool2d(3), nn.Upsample((3, 3)), nn.Upsample((3, 3), mode="bilinear")],
)
def test_copies_of_one_cell_stand_nowhere(repeat: nn.Module) -> None:
    model = filled(
        nn.Sequential(
            *(nn.Conv2d(2, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 4, 2, 2), nn.ReLU()),
            *(nn.AvgPool2d(4), repeat, nn.Flatten(), nn.Linear(36, 3)),
        )
    )
    x, turned = images(1, 2, 18, 18), Turned(model, mirrored).eval()
    assert main_layers(model, x) == ["1", "3"]
    assert_close(CompleteScoreMap(turned).attribute(x, 1).flip(3), CompleteScoreMap(model).attribute(x.flip(3), 1))


def test_patches_of_a_part_of_the_image_stand_in_that_part() -> None:
    x, weight, added = images(1, 1, 8, 8), images(8, 4), images(8, 1) - 0.5

    def model(x: Tensor) -> Tensor:
        patches = x[..., 4:].unfold(2, 2, 2).unfold(3, 2, 2).reshape(1, 8, 4)  # 4 rows of 2
        return torch.stack([((patches + added) * weight).sum((1, 2)), patches.sum((1, 2))], 1)

    constants = torch.zeros(1, 1, 4, 4, dtype=x.dtype)
    constants[..., 2:] = (added * weight).sum(1).view(4, 2)
    own = torch.zeros_like(x)
    own[..., 4:] = x[..., 4:] * weight.view(4, 2, 2, 2).transpose(1, 2).reshape(8, 4)
    assert_close(CompleteScoreMap(model, "image").attribute(x, 0), own + resized(constants, (8, 8)))


@pytest.mark.parametrize("name", ["channels", "grouped", "images"])
def test_quarters_of_the_image_one_beside_another_stand_where_they_were_cut(name: str) -> None:
    """A constant of one quarter stands in it, be the quarters channels or images, also behind a convolution of each."""
    weight, bias, rest = images(12, 1, 3, 3), torch.zeros(12).double(), images(12, 2)
    bias[3:6] = 1  # of the quarter at the top right

    def model(x: Tensor) -> Tensor:
        quarters = [x[..., :8, :8], x[..., :8, 8:], x[..., 8:, :8], x[..., 8:, 8:]]
        if name == "images":
            maps = F.conv2d(torch.cat(quarters), weight[:3], padding=1).view(1, 12, 8, 8) + bias.view(1, 12, 1, 1)
        elif name == "grouped":
            maps = F.conv2d(torch.cat(quarters, 1), weight, bias, padding=1, groups=4)
        else:
            maps = torch.cat(quarters, 1).repeat_interleave(3, 1) + bias.view(1, 12, 1, 1)
        return maps.sum((2, 3)) @ rest

    x = torch.zeros(1, 1, 16, 16, dtype=torch.float64)  # so that constants are all there is
    expected = torch.zeros_like(x)
    expected[..., :8, 8:] = rest[3:6, 1].sum()
    assert_close(CompleteScoreMap(model, "image").attribute(x, 1), expected)


def test_what_is_spread_over_channels_keeps_its_positions() -> None:
    weight, ramp = images(1, 4, 1, 1), images(1, 1, 1, 8)

    def model(x: Tensor) -> Tensor:
        mirrored = x.flip(3)[:, 0]  # (N, h, w), which meets (1, 4, 1, 1)
        return (mirrored * weight + ramp).sum((1, 2, 3))[:, None]

    x = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    expected = (4 * ramp.flip(3)).expand_as(x)
    assert_close(CompleteScoreMap(model, "image").attribute(x, 0), expected)


def around(x: Tensor, size: int) -> Tensor:
    return F.pad(x, (size,) * 4, mode="circular")


def joined_around(x: Tensor) -> Tensor:
    x = torch.cat([x[..., -1:], x, x[..., :1]], 3)
    return torch.cat([x[:, :, -1:], x, x[:, :, :1]], 2)


def by_center(mode: str) -> Callable[[Tensor], Tensor]:
    """A convolution that reads no padding, so that it is the same of a map that is shifted round."""
    weight = F.pad(weights(4, 4, 1, 1), (1, 1, 1, 1))
    return lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1), mode=mode), weight, weights(4))


def weights(*shape: int) -> Tensor:
    return images(*shape) - 0.5


# What is the same of a map shifted round by even numbers of rows and columns, also the map of half as many cells.
ROUND: dict[str, Callable[[Tensor], Tensor]] = {
    "interpolated": lambda x: F.avg_pool2d((F.interpolate(x, scale_factor=2) - 0.3).relu(), 2),
    "interpolated to thrice the size": lambda x: F.max_pool2d((F.interpolate(x, scale_factor=3) - 0.3).relu(), 3),
    "transposed": lambda x: F.conv2d(
        F.conv_transpose2d(x, weights(4, 4, 2, 2), weights(4), 2).relu(), weights(4, 4, 2, 2), stride=2
    ),
    "pooled by maxima": lambda x: F.interpolate((F.max_pool2d(x, 2) - 0.3).relu(), scale_factor=2),
    "pooled by means": lambda x: F.conv_transpose2d((F.avg_pool2d(x, 2) - 0.3).relu(), weights(4, 4, 2, 2), None, 2),
    "with a stride": lambda x: F.interpolate(
        F.conv2d(around(x, 1), weights(4, 4, 3, 3), weights(4), 2).relu(), scale_factor=2
    ),
    "circular": lambda x: F.conv2d(around(x, 1), weights(4, 4, 3, 3), weights(4)).relu(),
    "circular by two": lambda x: F.conv2d(around(x, 2), weights(4, 4, 5, 5), weights(4)).relu(),
    "circular, dilated": lambda x: F.conv2d(around(x, 2), weights(4, 4, 3, 3), weights(4), dilation=2).relu(),
    "circular, joined": lambda x: F.conv2d(joined_around(x), weights(4, 4, 3, 3), weights(4)).relu(),
    "circular, pooled": lambda x: (F.max_pool2d(around(x, 1), 3, 1) - 0.3).relu(),
    **{f"padded: {mode}": by_center(mode) for mode in ("constant", "reflect", "replicate", "circular")},
}

# Of each cell by itself, so that the order of cells is all the same.
ALONE = ("interpolated", "interpolated to thrice the size", "transposed")


class Undone(nn.Module):
    """A network that puts the cells of a map in another order, does something and puts them back."""

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        change: Callable[[Tensor], Tensor],
        undo: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.before, self.after = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.function, self.change, self.undo = function, change, undo

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.after(self.undo(self.function(self.change(self.before(x))))).sum((2, 3))
        return scores


def assert_undone(
    function: Callable[[Tensor], Tensor],
    change: Callable[[Tensor], Tensor],
    undo: Callable[[Tensor], Tensor],
    *size: int,
) -> None:
    """Complete maps are those of the network that leaves the cells in order."""
    x = images(*(size or (2, 3, 6, 8)))
    plain, changed = (filled(Undone(function, *both)) for both in ((nn.Identity(), nn.Identity()), (change, undo)))
    assert_close(changed(x), plain(x))
    for layer in (None, "image", "before"):
        found, expected = (
            CompleteScoreMap(model, model.before if layer == "before" else layer).attribute(x, 1)
            for model in (changed, plain)
        )
        assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ROUND)
@pytest.mark.parametrize(("shift", "size"), [((2, 4), (2, 3, 6, 8)), ((0, -2), (1, 3, 6, 8)), ((4, 6), (1, 3, 12, 12))])
def test_beside_a_seam_cells_stand_on_their_own_side_of_it(
    name: str, shift: tuple[int, int], size: tuple[int, ...]
) -> None:
    back = (-shift[0], -shift[1])
    assert_undone(ROUND[name], lambda x: x.roll(shift, (2, 3)), lambda x: x.roll(back, (2, 3)), *size)


@pytest.mark.parametrize("name", [*ALONE, *(name for name in ROUND if "circular" in name or "padded" in name)])
@pytest.mark.parametrize("shift", [(1, 3), (-1, 0), (0, 1)])
def test_shifts_by_odd_numbers_of_cells_leave_a_seam_as_well(name: str, shift: tuple[int, int]) -> None:
    """Down to a single row or column beyond the seam."""
    back = (-shift[0], -shift[1])
    assert_undone(ROUND[name], lambda x: x.roll(shift, (2, 3)), lambda x: x.roll(back, (2, 3)))


@pytest.mark.parametrize("name", [*ALONE, "pooled by maxima", *(name for name in ROUND if "padded" in name)])
@pytest.mark.parametrize("turn", ["mirrored", "on its side"])
def test_maps_may_be_turned_and_shifted_round(name: str, turn: str) -> None:
    def function(x: Tensor) -> Tensor:  # the same of what is turned
        return F.avg_pool2d(F.interpolate(x, scale_factor=2), 2) if name == "transposed" else ROUND[name](x)

    turned = mirrored if turn == "mirrored" else (lambda x: x.mT)
    assert_undone(function, lambda x: turned(x).roll((2, 2), (2, 3)), lambda x: turned(x.roll((-2, -2), (2, 3))))


ORDER = torch.tensor([5, 0, 3, 6, 1, 7, 2, 4])
BY_TWO, BY_THREE = (torch.cat([torch.arange(8)[at::step] for at in range(step)]) for step in (2, 3))


def written(x: Tensor) -> Tensor:
    whole = torch.zeros_like(x)
    whole[..., :4], whole[..., 4:] = x[..., ::2], x[..., 1::2]
    return whole


REORDERED: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "by an index": (lambda x: x[..., ORDER], ORDER),
    "every other one": (lambda x: torch.cat([x[..., ::2], x[..., 1::2]], 3), BY_TWO),
    "every third one": (lambda x: torch.cat([x[..., at::3] for at in range(3)], 3), BY_THREE),
    "written": (written, BY_TWO),
}


@pytest.mark.parametrize("name", REORDERED)
@pytest.mark.parametrize("function", ["none", *ALONE])
def test_columns_that_are_joined_in_another_order_are_as_narrow_as_before(name: str, function: str) -> None:
    change, order = REORDERED[name]
    assert_undone(ROUND.get(function, lambda x: (x - 0.3).relu()), change, lambda x: x[..., order.argsort()])


def test_every_other_column_and_the_rest_are_put_back_side_by_side() -> None:
    assert_undone(
        lambda x: (x - 0.3).relu(),
        REORDERED["every other one"][0],
        lambda x: torch.stack([x[..., :4], x[..., 4:]], 4).flatten(3),
    )


def test_of_a_map_that_is_shifted_round_and_interpolated_all_but_the_seam_is_as_it_was() -> None:
    """Linear interpolation mixes the cells on both sides of a seam, which the plain network does not."""

    def function(x: Tensor) -> Tensor:
        return F.avg_pool2d((F.interpolate(x, scale_factor=2, mode="bilinear") - 0.3).relu(), 2)

    x = images(2, 3, 6, 8)
    plain = filled(Undone(function, nn.Identity(), nn.Identity()))
    changed = filled(Undone(function, lambda x: x.roll(4, 3), lambda x: x.roll(-4, 3)))
    found, expected = (CompleteScoreMap(model, "image").attribute(x, 1) for model in (changed, plain))
    inside = [1, 2, 5, 6]
    assert_close(found[..., inside], expected[..., inside], rtol=1e-5, atol=1e-6)
