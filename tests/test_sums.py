"""Tokens that gather over positions stand at none, however they gather; what mixes positions and keeps rows does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from captum_scoremap import CompleteScoreMap, bias_maps, linear_form, prepare
from captum_scoremap.linear import main_layers
from tests.test_positions import filled, images

ROW = 2  # of the 16 that the score is read from


class Reads(nn.Module):
    """A perceptron and a norm on what a function makes of 4 x 4 cells: 16 rows, whatever they are."""

    def __init__(self, mix: Callable[[Reads, Tensor], Tensor]) -> None:
        super().__init__()
        self.patches, self.queries = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.zeros(16, 8))
        self.weights, self.masks = nn.Linear(8, 16), nn.Conv2d(8, 16, 1)
        self.mlp, self.norm, self.head = nn.Sequential(nn.Linear(8, 8), nn.GELU()), nn.LayerNorm(8), nn.Linear(8, 3)
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        rows = self.mix(self, self.patches(x))
        return self.head(self.norm(rows + self.mlp(rows)))[:, ROW]


def tokens(cells: Tensor) -> Tensor:
    return cells.flatten(2).transpose(1, 2)


def by_queries(model: Reads, cells: Tensor) -> Tensor:
    """As PatchMerger (Renggli et al. 2022)."""
    return (model.queries @ tokens(cells).transpose(1, 2)).softmax(-1) @ tokens(cells)


def by_transposed_scores(model: Reads, cells: Tensor) -> Tensor:
    return (tokens(cells) @ model.queries.T).transpose(1, 2).softmax(-1) @ tokens(cells)


def by_an_equation(model: Reads, cells: Tensor) -> Tensor:
    return torch.einsum("bnq,bnd->bqd", model.weights(tokens(cells)).softmax(1), tokens(cells))


def by_slots(model: Reads, cells: Tensor) -> Tensor:
    """As slot attention (Locatello et al. 2020): slots compete for each cell."""
    weights = torch.einsum("qd,bnd->bqn", model.queries, tokens(cells)).softmax(1)
    return weights / weights.sum(-1, keepdim=True) @ tokens(cells)


def by_masks(model: Reads, cells: Tensor) -> Tensor:
    """As soft object regions (Yuan et al. 2020)."""
    return model.masks(cells).flatten(2).softmax(-1) @ tokens(cells)


def by_means(model: Reads, cells: Tensor) -> Tensor:
    """As TokenLearner (Ryoo et al. 2021)."""
    return (model.masks(cells).sigmoid()[:, :, None] * cells[:, None]).mean((3, 4))


def by_sums_of_tokens(model: Reads, cells: Tensor) -> Tensor:
    return (model.weights(tokens(cells)).softmax(1).unsqueeze(-1) * tokens(cells).unsqueeze(2)).sum(1)


def by_attention(model: Reads, cells: Tensor) -> Tensor:
    queries = model.queries.expand(len(cells), -1, -1)
    return F.scaled_dot_product_attention(queries, tokens(cells), tokens(cells))


def by_frequencies(_model: Reads, cells: Tensor) -> Tensor:
    return tokens(torch.fft.fft2(cells).real)


def by_frequencies_of_tokens(_model: Reads, cells: Tensor) -> Tensor:
    return torch.view_as_real(torch.fft.fft(tokens(cells), dim=1)).sum(-1)


GATHERING = [
    by_queries,
    by_transposed_scores,
    by_an_equation,
    by_slots,
    by_masks,
    by_means,
    by_sums_of_tokens,
    by_attention,
    by_frequencies,
    by_frequencies_of_tokens,
]


def among_tokens(_model: Reads, cells: Tensor) -> Tensor:
    rows = tokens(cells)
    return (rows @ rows.transpose(1, 2)).softmax(-1) @ rows


def among_cells(_model: Reads, cells: Tensor) -> Tensor:
    """As a non-local block with channels first: its weights have positions in rows and in columns."""
    columns = cells.flatten(2)
    return (columns @ (columns.transpose(1, 2) @ columns).softmax(-1)).transpose(1, 2)


def by_context(_model: Reads, cells: Tensor) -> Tensor:
    """As efficient attention (Shen et al. 2021): what is gathered is given back to the queries."""
    rows = tokens(cells)
    return rows.softmax(-1) @ (rows.softmax(1).transpose(1, 2) @ rows)


def among_channels(_model: Reads, cells: Tensor) -> Tensor:
    """As cross-covariance attention (El-Nouby et al. 2021)."""
    columns = cells.flatten(2)
    return ((columns @ columns.transpose(1, 2)).softmax(-1) @ columns).transpose(1, 2)


def given_back(model: Reads, cells: Tensor) -> Tensor:
    """As double attention (Chen et al. 2018): gathered by some weights, distributed by others."""
    gathered = cells.flatten(2) @ model.masks(cells).flatten(2).softmax(-1).transpose(1, 2)
    return (gathered @ model.masks(cells).flatten(2).softmax(1)).transpose(1, 2)


def filtered(_model: Reads, cells: Tensor) -> Tensor:
    """As a global filter (Rao et al. 2021): to frequencies, and back."""
    factors = torch.tensor([1.0, 0.9, 0.8], dtype=cells.dtype)
    return tokens(torch.fft.irfft2(torch.fft.rfft2(cells) * factors, s=cells.shape[2:]))


def by_low_frequencies(_model: Reads, cells: Tensor) -> Tensor:
    """As a Fourier neural operator (Li et al. 2021): those frequencies that are kept are written into zeros."""
    spectrum = torch.fft.rfft2(cells)
    kept = torch.zeros_like(spectrum)
    kept[:, :, :2, :2] = 0.5 * spectrum[:, :, :2, :2]
    kept[:, :, -1:, :2] = spectrum[:, :, -1:, :2]
    return tokens(torch.fft.irfft2(kept, s=cells.shape[2:]))


def by_activated_frequencies(_model: Reads, cells: Tensor) -> Tensor:
    """As an adaptive Fourier operator (Guibas et al. 2022): frequencies go through activations."""
    spectrum = torch.fft.fft2(cells)
    return tokens(torch.fft.ifft2(torch.complex(F.relu(spectrum.real), F.relu(spectrum.imag))).real)


KEEPING = [
    among_tokens,
    among_cells,
    by_context,
    among_channels,
    given_back,
    filtered,
    by_low_frequencies,
    by_activated_frequencies,
]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("mix", GATHERING, ids=lambda mix: mix.__name__)
def test_what_gathers_over_positions_stands_at_none(mix: Callable[[Reads, Tensor], Tensor], count: int) -> None:
    model, x = filled(Reads(mix)), images(count, 3, 16, 16)
    found = bias_maps(model, x, 1)
    assert {"mlp.0", "norm", "head"} <= set(found.placeless)
    assert {"mlp.0", "norm", "head"}.isdisjoint(found.maps)
    complete, placeless = CompleteScoreMap(model).attribute(x, 1, return_placeless=True)
    assert_close(complete.sum((1, 2, 3)) + placeless, model(x)[:, 1].detach(), rtol=1e-12, atol=1e-12)
    # parameters that are frozen are multiplied in another order
    assert_close(CompleteScoreMap(prepare(model)).attribute(x, 1), complete, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("mix", KEEPING, ids=lambda mix: mix.__name__)
def test_what_mixes_positions_and_keeps_rows_stands_there(mix: Callable[[Reads, Tensor], Tensor], count: int) -> None:
    model, x = filled(Reads(mix)), images(count, 3, 16, 16)
    found = bias_maps(model, x, 1)
    for name in ("mlp.0", "norm", "head"):
        assert name not in found.placeless
        elsewhere = found.maps[name].flatten(1)[:, [cell for cell in range(16) if cell != ROW]]
        assert not elsewhere.any()
        assert found.maps[name].flatten(1)[:, ROW].all()


def test_tokens_of_which_there_are_none_are_followed() -> None:
    """As registers that a model could have, but has not."""
    model, x = filled(Reads(lambda _, cells: torch.cat([tokens(cells)[:, :0], tokens(cells)], 1))), images(2, 3, 16, 16)
    assert bias_maps(model, x, 1).maps["mlp.0"].flatten(1)[:, ROW].all()


class Packed(nn.Module):
    """The patches of all images in one sequence, each attending to its own, as NaViT packs them."""

    def __init__(self, pack: Callable[[list[Tensor]], Tensor]) -> None:
        super().__init__()
        self.embed, self.mlp, self.head = nn.Linear(12, 8), nn.Sequential(nn.Linear(8, 8), nn.GELU()), nn.Linear(8, 3)
        self.pack = pack

    def forward(self, x: Tensor) -> Tensor:
        cut = [one.unflatten(2, (8, 2)).unflatten(1, (8, 2)).permute(1, 3, 2, 4, 0).reshape(64, 12) for one in x]
        rows = self.embed(self.pack(cut))
        rows = rows + self.mlp(rows)
        return self.head(rows.reshape(len(x), 64, 8).mean(1))


def written(parts: list[Tensor]) -> Tensor:
    """Into memory that was zero."""
    whole = parts[0].new_zeros(1, sum(map(len, parts)), parts[0].shape[1])
    whole[0] = torch.cat(parts)
    return whole


@pytest.mark.parametrize("pack", [lambda parts: torch.cat(parts)[None], written, torch.cat], ids=["cat", "write", "2d"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_images_in_one_sequence_have_their_own_maps(count: int, pack: Callable[[list[Tensor]], Tensor]) -> None:
    model, x = filled(Packed(pack)), images(count, 3, 16, 16)
    before = model.mlp[0](
        model.embed(pack([one.unfold(1, 2, 2).unfold(2, 2, 2).permute(1, 2, 3, 4, 0).reshape(64, 12) for one in x]))
    )
    shares = F.gelu(before) / before * model.mlp[0].bias @ model.head.weight[1] / 64
    expected = shares.detach().view(count, 8, 8)
    found = bias_maps(model, x, 1).maps["mlp.0"]
    cells = F.avg_pool2d(found, found.shape[2] // 8, divisor_override=1)[:, 0]
    assert_close(cells, expected, rtol=1e-10, atol=1e-12)


class Planes(nn.Module):
    """Convolutions over planes of channels and rows, or columns, which are as large as the map."""

    def __init__(self, order: tuple[int, int, int, int], convolution: nn.Module) -> None:
        super().__init__()
        self.stem, self.plane, self.after = nn.Conv2d(3, 8, 2, 2), convolution, nn.Conv2d(8, 8, 1)
        self.head, self.order = nn.Linear(8, 3), order

    def forward(self, x: Tensor) -> Tensor:
        turned = F.silu(self.plane(F.silu(self.stem(x)).permute(self.order)))  # each of these orders is its own inverse
        return self.head(F.silu(self.after(turned.permute(self.order)))[:, :, 3, 5])


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 3, 2, 1)])
@pytest.mark.parametrize("groups", [8, 1])
def test_planes_of_channels_are_no_maps(groups: int, order: tuple[int, int, int, int], count: int) -> None:
    """As DiCENet (Mehta et al. 2019) has them: the score reads one cell."""
    convolution = nn.Conv2d(8, 8, 3, padding=1, groups=8) if groups == 8 else nn.Conv2d(8, 8, 1)
    model, x = filled(Planes(order, convolution)), images(count, 3, 16, 16)
    found = bias_maps(model, x, 1).maps
    for name in ("plane", "after"):
        for one in found[name][:, 0]:
            assert one.nonzero().tolist() == [[3, 5]]


@pytest.mark.parametrize("tokens_before", [1, 4])
def test_default_layers_stand_before_the_last_reads_of_class_tokens(tokens_before: int) -> None:
    """A transformer without convolutions, whose blocks are pairs that it adds to its tokens by itself."""

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            part = nn.TransformerEncoderLayer
            self.layers = nn.ModuleList(part(8, 2, 16, batch_first=True, dropout=0.0) for _ in range(4))
            self.norm = nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x)
            return self.norm(x)

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.tokens = nn.Linear(48, 8), nn.Parameter(torch.zeros(1, tokens_before, 8))
            self.transformer, self.head = Transformer(), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            cut = x.unflatten(3, (4, 4)).unflatten(2, (4, 4)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
            x = torch.cat([self.tokens.expand(len(x), -1, -1), self.embed(cut)], 1)
            return self.head(self.transformer(x)[:, 0])

    model, x = filled(Classifier()), images(2, 3, 16, 16)
    found = main_layers(model, x)
    assert found[0] == "embed"
    assert "transformer" not in found
    assert found[-1] == "transformer.layers.2"
    complete, placeless = CompleteScoreMap(model).attribute(x, 1, return_placeless=True)
    assert_close(complete.sum((1, 2, 3)) + placeless, model(x)[:, 1].detach(), rtol=1e-12, atol=1e-12)
    assert bool((complete.abs().sum((1, 2, 3)) > 1e-3 * placeless.abs()).all())


class AlongWindows(nn.Module):
    """What tokens of windows read, (N, C, windows), in convolutions along one axis, as in SepViT (Li et al. 2022)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 8, 2, 2), nn.Parameter(torch.zeros(1, 8, 1))
        self.qkv, self.along, self.slopes = nn.Conv1d(8, 24, 1), nn.Conv1d(8, 16, 1), nn.PReLU(16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        cells = self.patches(x)
        n, channels, rows, columns = cells.shape
        windows = cells.reshape(n, channels, rows // 2, 2, columns // 2, 2).permute(0, 2, 4, 1, 3, 5)
        windows = windows.reshape(-1, channels, 4)
        windows = torch.cat([self.token.expand(len(windows), -1, -1), windows], 2)
        query, key, value = self.qkv(windows).mT.chunk(3, -1)
        read = ((query @ key.mT).softmax(-1) @ value)[:, 0].reshape(n, -1, channels)
        return self.head((self.slopes(self.along(read.mT)) + 1).sum(2))


def test_channels_are_no_tokens_where_windows_are_convolved_along_one_axis() -> None:
    """There are 16 windows and 16 channels; that of the bias stands at no cell by its channel."""
    model, x = filled(AlongWindows()), images(1, 3, 16, 16)
    found = bias_maps(model, x, 1)
    assert not {"along", "slopes", "add"} & {*found.maps}
    total = sum(one.sum() for one in (*found.maps.values(), *found.placeless.values()))
    assert_close(total, linear_form(model, x, 1).bias.sum(), rtol=1e-10, atol=1e-12)
