"""Figures: compared with stored pictures, and read back where a number can be read."""

from __future__ import annotations

import io
from collections.abc import Callable
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pytest
import torch
from captum.attr import LayerAttribution
from captum.attr import visualization as captum_visualization
from IPython.core.formatters import PNGFormatter
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from captum_scoremap.models import Preprocessing
from captum_scoremap.visualization import (
    MapStyle,
    visualize_crops,
    visualize_layer_score_maps,
    visualize_patches,
    visualize_score_map,
)
from captum_scoremap.visualization.checked import checked_picture
from captum_scoremap.visualization.drawing import share_text

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def compared(function: Callable[[], Figure]) -> Callable[[], Figure]:
    """Compare a figure with its baseline, where the same Matplotlib draws it: others set fonts and layout otherwise."""
    same = mpl.__version_info__[:2] == (3, 11)
    drawn = pytest.mark.mpl_image_compare(
        baseline_dir="baseline", remove_text=True, savefig_kwargs={"dpi": 60}, tolerance=3, style="default"
    )
    return pytest.mark.skipif(not same, reason="the baseline is drawn by Matplotlib 3.11")(drawn(function))


def bump(side: int, row: float, column: float) -> Tensor:
    """A smooth map, positive around (row, column) and negative around the opposite place; fractions of the side."""
    y, x = torch.meshgrid(*[(torch.arange(side) + 0.5) / side] * 2, indexing="ij")
    there = torch.exp(-12 * ((y - row) ** 2 + (x - column) ** 2))
    opposite = torch.exp(-12 * ((y - 1 + row) ** 2 + (x - 1 + column) ** 2))
    return (there - 0.6 * opposite)[None, None]


@pytest.fixture
def image() -> Tensor:
    """An image of stripes and a gradient, ``(3, 32, 48)``, in [0, 1]."""
    y, x = torch.meshgrid(torch.arange(32) / 31, torch.arange(48) / 47, indexing="ij")
    return torch.stack([x, y, (torch.sin(20 * x) + 1) / 2])


def patches(count: int) -> list[SimpleNamespace]:
    """Patches of different shapes and colors."""
    return [
        SimpleNamespace(
            pixels=torch.linspace(0, 1, 3)[:, None, None].roll(number, 0).expand(3, 10 + 3 * (number % 3), 14),
            value=3.5 - number,
        )
        for number in range(count)
    ]


def drawn(ax: Axes, layer: int = -1) -> np.ndarray:
    """The values of the map in an axes: what was drawn last."""
    return np.asarray(ax.images[layer].get_array())


@compared
def test_score_map_figure(image: Tensor) -> Figure:
    figure, _ = visualize_score_map(bump(8, 0.3, 0.3), image, fig_size=(3, 2))
    return figure


@compared
def test_score_map_without_image_figure() -> Figure:
    figure, _ = visualize_score_map(bump(8, 0.3, 0.3), fig_size=(3, 2))
    return figure


@compared
def test_layer_score_maps_figure(image: Tensor) -> Figure:
    maps = {"conv": bump(8, 0.2, 0.6), "pool": -bump(4, 0.4, 0.4), "zero": torch.zeros(2, 2)}
    figure, _ = visualize_layer_score_maps(maps, image, label="stripes", columns=2, fig_size=(5, 3))
    return figure


@compared
def test_crops_figure(image: Tensor) -> Figure:
    boxes = torch.tensor([[4, 2, 24, 18], [20, 10, 48, 32]])
    figure, _ = visualize_crops(image, bump(8, 0.3, 0.3), boxes, fig_size=(8, 2))
    return figure


@compared
def test_patches_figure() -> Figure:
    both = {"SMSM": patches(5), "GSM": patches(3)}
    figure, _ = visualize_patches({"conv": both, "pool": both}, fig_size=(4, 3))
    return figure


@pytest.mark.parametrize("shape", [(7, 5), (1, 7, 5), (1, 1, 7, 5)])
def test_map_is_interpolated_to_the_image_as_captum_does(image: Tensor, shape: tuple[int, ...]) -> None:
    score_map = torch.linspace(-2, 1, 35).reshape(shape)
    _, ax = visualize_score_map(score_map, image)
    expected = LayerAttribution.interpolate(score_map.reshape(1, 1, 7, 5), (32, 48), "bilinear")
    assert_close(torch.from_numpy(drawn(ax)), expected[0, 0])
    _, ax = visualize_score_map(score_map, image, style=MapStyle(interpolate_mode="nearest"))
    expected = LayerAttribution.interpolate(score_map.reshape(1, 1, 7, 5), (32, 48), "nearest")
    assert_close(torch.from_numpy(drawn(ax)), expected[0, 0])


def test_map_without_image_is_drawn_cell_by_cell() -> None:
    score_map = torch.linspace(-2, 1, 35).reshape(7, 5)
    _, ax = visualize_score_map(score_map)
    assert_close(torch.from_numpy(drawn(ax)), score_map)


@pytest.mark.parametrize("batch", [True, False])
def test_image_is_denormalized(image: Tensor, batch: bool) -> None:
    inputs = (image - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    inputs = inputs[None] if batch else inputs
    before = inputs.clone()
    _, axes = visualize_layer_score_maps({"conv": torch.ones(2, 2)}, inputs, mean=MEAN, std=STD)
    assert_close(torch.from_numpy(drawn(axes[0])), image.permute(1, 2, 0))
    assert_close(inputs, before, rtol=0, atol=0)


def test_image_of_bytes_equals_image_of_fractions(image: Tensor) -> None:
    as_bytes = (image * 255).round().to(torch.uint8)
    _, axes = visualize_layer_score_maps({"conv": torch.ones(2, 2)}, as_bytes)
    assert_close(torch.from_numpy(drawn(axes[0])), as_bytes.permute(1, 2, 0) / 255)


def test_overshoot_of_resizing_is_clipped(image: Tensor) -> None:
    _, axes = visualize_layer_score_maps({"conv": torch.ones(2, 2)}, image * 1.4 - 0.2)
    assert drawn(axes[0]).min() == 0
    assert drawn(axes[0]).max() == 1


def test_grey_image_is_drawn_grey(image: Tensor) -> None:
    _, axes = visualize_layer_score_maps({"conv": torch.ones(2, 2)}, image[:1])
    assert_close(torch.from_numpy(drawn(axes[0])), image[:1].expand(3, -1, -1).permute(1, 2, 0))


@pytest.mark.parametrize("score_map", [torch.zeros(4, 4), -torch.ones(4, 4), torch.tensor([[-3.0, 1.0]])])
def test_zero_is_the_middle_of_the_colors(image: Tensor, score_map: Tensor) -> None:
    figure, ax = visualize_score_map(score_map, image)
    norm = ax.images[-1].norm
    assert norm.vmin == -norm.vmax
    assert norm.vmax == (float(score_map.abs().max()) or 1.0)
    red, green, blue, _ = ax.images[-1].cmap(norm(0.0))
    assert min(red, green, blue) > 0.96
    figure.savefig(io.BytesIO())


def test_positive_is_red_and_negative_blue() -> None:
    _, ax = visualize_score_map(torch.tensor([[-3.0, 3.0]]))
    low, high = ax.images[0].cmap(ax.images[0].norm(drawn(ax)[0]))
    assert low[2] > 2 * low[0]
    assert high[0] > 2 * high[2]


# Machado et al. 2009, Table 1, severity 1.0, for linear RGB.
DICHROMATS = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
}


def contrast(cmap: str, matrix: list[list[float]]) -> float:
    """Least distance between the colors of a value and its negative, as seen by a dichromat."""
    values = np.array([0.25, 0.5, 0.75, 1.0])
    seen = [
        (mpl.colormaps[cmap]((1 + signed) / 2)[:, :3] ** 2.2 @ np.array(matrix).T).clip(0, 1) ** (1 / 2.2)
        for signed in (-values, values)
    ]
    return float(np.linalg.norm(seen[1] - seen[0], axis=1).min())


@pytest.mark.parametrize("kind", DICHROMATS)
def test_sign_can_be_read_by_the_color_blind(kind: str) -> None:
    all_seen = np.eye(3).tolist()
    assert contrast("RdBu_r", DICHROMATS[kind]) > 0.6 * contrast("RdBu_r", all_seen)
    assert contrast("RdYlGn", DICHROMATS[kind]) < 0.4 * contrast("RdYlGn", all_seen)  # the test can tell
    assert MapStyle().cmap == "RdBu_r"


def contours(ax: Axes) -> list[tuple[float, str]]:
    """Level and line style of every contour."""
    return [
        (float(level), "solid" if dashes[1] is None else "dashed")
        for lines in ax.collections
        if isinstance(lines, ContourSet)
        for level, dashes in zip(lines.levels, lines.get_linestyles() * len(lines.levels), strict=False)
    ]


def test_sign_can_be_read_in_grey(image: Tensor) -> None:
    score_map = bump(8, 0.3, 0.3)
    _, ax = visualize_score_map(score_map, image, limit=1.0)
    assert contours(ax) == [(0.25, "solid"), (0.75, "solid"), (-0.25, "dashed")]
    _, ax = visualize_score_map(-score_map, image, limit=1.0)
    assert contours(ax) == [(0.25, "solid"), (-0.75, "dashed"), (-0.25, "dashed")]


def test_fine_maps_have_lines_around_what_adds_up() -> None:
    pixels = torch.ones(112, 112)
    pixels[::2] = -1.0  # by turns: nothing adds up
    _, ax = visualize_score_map(pixels)
    assert not contours(ax)
    pixels[:32] += 0.5
    _, ax = visualize_score_map(pixels)
    assert contours(ax) == [(0.125, "solid"), (0.375, "solid")]
    assert_close(torch.from_numpy(drawn(ax)), pixels)


def test_no_minus_zero(image: Tensor) -> None:
    _, axes = visualize_layer_score_maps({"conv": torch.tensor([[-0.001]])}, image)
    assert axes[1].get_title() == "conv\nΣ A·Y = 0.00"


def test_contours_can_be_left_out(image: Tensor) -> None:
    _, ax = visualize_score_map(bump(8, 0.3, 0.3), image, style=MapStyle(contours=()))
    assert not ax.collections


def test_scale_is_each_maps_own_or_shared_or_given(image: Tensor) -> None:
    maps = {"conv": torch.tensor([[1.0, -2.0]]), "pool": torch.tensor([[5.0, 0.0]])}
    for limit, expected in ((None, [2, 5]), ("shared", [5, 5]), (4.0, [4, 4])):
        _, axes = visualize_layer_score_maps(maps, image, limit=limit)
        assert [ax.images[-1].norm.vmax for ax in axes[1:]] == expected


def test_few_extreme_cells_lie_beyond_the_scale() -> None:
    score_map = torch.ones(10, 20)
    score_map[0, 0] = -50.0
    _, ax = visualize_score_map(score_map)
    assert ax.images[0].norm.vmax == 1
    assert ax.child_axes[0]._colorbar.extend == "min"
    _, ax = visualize_score_map(score_map, style=MapStyle(outlier_perc=0))
    assert ax.images[0].norm.vmax == 50


def test_map_of_few_nonzero_cells_is_not_all_outliers() -> None:
    score_map = torch.zeros(20, 20)
    score_map[3, 3] = 7.0
    _, ax = visualize_score_map(score_map)
    assert ax.images[0].norm.vmax == 7


def test_color_bar_has_unit_and_limits() -> None:
    _, ax = visualize_score_map(torch.tensor([[0.0, -0.125]]), style=MapStyle(unit="fraction of the score"))
    (bar,) = ax.child_axes
    assert bar.get_ylabel() == "fraction of the score"
    assert [label.get_text() for label in bar.get_yticklabels()] == ["−0.125", "0", "+0.125"]
    _, ax = visualize_score_map(torch.ones(2, 2), style=MapStyle(show_colorbar=False))
    assert not ax.child_axes


def test_titles_say_how_the_score_adds_up(image: Tensor) -> None:
    score = torch.tensor(4.5, requires_grad=True)
    maps = {"conv": torch.full((2, 2), 1.5), "pool": torch.full((1, 1), -1.25)}
    biases = {"conv": -1.5, "pool": torch.tensor(5.75)}
    _, axes = visualize_layer_score_maps(maps, image, label="cat", score=score, biases=biases)
    assert [ax.get_title() for ax in axes] == [
        "cat\nS = 4.50 logits",
        "conv\nΣ A·Y = 6.00, B = −1.50\n133% of S is here",
        "pool\nΣ A·Y = −1.25, B = 5.75\n|B| > |S|: most of S is in B",
    ]
    _, axes = visualize_layer_score_maps(maps, image, biases=biases)
    assert axes[1].get_title() == "conv\nΣ A·Y = 6.00, B = −1.50"
    placeless = {"conv": -1.5, "pool": torch.tensor(5.75)}
    _, axes = visualize_layer_score_maps(maps, image, score=score, placeless=placeless)
    assert [ax.get_title() for ax in axes[1:]] == [
        "conv\nΣ C = 6.00 (133% of S)\nplaceless: −1.50",
        "pool\nΣ C = −1.25 (−28% of S)\nplaceless: 5.75",
    ]
    assert "sums over regions" in axes[0].get_xlabel()
    _, axes = visualize_layer_score_maps(maps, image)
    assert [ax.get_title() for ax in axes] == ["", "conv\nΣ A·Y = 6.00", "pool\nΣ A·Y = −1.25"]


def test_long_names_break_after_dots(image: Tensor) -> None:
    name = "vit.embeddings.patch_embeddings.projection"
    _, axes = visualize_layer_score_maps({name: torch.zeros(2, 2)}, image)
    assert axes[1].get_title().splitlines()[:3] == ["vit.embeddings.", "patch_embeddings.", "projection"]


def test_crops_show_their_pixels(image: Tensor) -> None:
    boxes = torch.tensor([[4, 2, 24, 18], [0, 0, 48, 32]])
    _, axes = visualize_crops(image, torch.ones(2, 2), boxes, title="stripes")
    assert_close(torch.from_numpy(drawn(axes[2])), image[:, 2:18, 4:24].permute(1, 2, 0))
    assert_close(torch.from_numpy(drawn(axes[3])), image.permute(1, 2, 0))
    assert [ax.get_title() for ax in axes] == ["stripes", "score map", "1", "2"]
    for whole in axes[:2]:
        assert [frame.get_bbox().bounds for frame in whole.patches] == [
            (3.5, 1.5, 20, 16),
            (-0.5, -0.5, 48, 32),
        ]
    _, axes = visualize_crops(image, torch.ones(2, 2), boxes, captions=["eye", "all"])
    assert [ax.get_title() for ax in axes[2:]] == ["eye", "all"]


def test_patches_are_labeled_by_method_layer_and_value() -> None:
    both = {"SMSM": patches(4), "GSM": patches(2)}
    figure, axes = visualize_patches({"conv": both, "pool": both})
    assert [ax.get_title() for ax in axes] == ["SMSM", "GSM", "", ""]
    assert [ax.get_ylabel() for ax in axes] == ["conv", "", "pool", ""]
    assert [text.get_text() for text in axes[0].texts] == ["3.50", "2.50", "1.50", "0.50"]
    _, axes = visualize_patches({"conv": both}, show_values=False)
    assert not any(text.get_text() for ax in axes for text in ax.texts)
    figure.savefig(io.BytesIO())


def test_patches_keep_their_aspect() -> None:
    tall = SimpleNamespace(pixels=torch.zeros(3, 20, 5), value=0.0)
    _, (ax,) = visualize_patches({"conv": {"SMSM": [tall]}}, tile_size=40)
    dark = drawn(ax)[..., 0] < 0.5
    assert dark.any(axis=1).sum() == 40
    assert dark.any(axis=0).sum() == 10


def test_draws_into_axes_of_the_caller(image: Tensor) -> None:
    figure = Figure()
    ax = figure.subplots()
    assert visualize_score_map(torch.ones(2, 2), image, plt_fig_axis=(figure, ax)) == (figure, ax)
    upper, lower = Figure(layout="constrained").subfigures(2)
    given = upper.subplots(1, 2)
    figure, axes = visualize_layer_score_maps({"conv": torch.ones(2, 2)}, image, plt_fig_axis=(upper, given))
    assert figure is upper
    assert axes == list(given)
    given = lower.subplots(1, 3)
    boxes = torch.tensor([[0, 0, 8, 8]])
    assert visualize_crops(image, torch.ones(2, 2), boxes, plt_fig_axis=(lower, given))[1] == list(given)
    figure = Figure()
    given = figure.subplots(1, 2)
    both = {"SMSM": patches(1), "GSM": patches(1)}
    assert visualize_patches({"conv": both}, plt_fig_axis=(figure, given))[1] == list(given)


def test_leaves_pyplot_alone(image: Tensor) -> None:
    settings, figures = dict(mpl.rcParams), plt.get_fignums()
    visualize_score_map(torch.ones(2, 2), image)
    visualize_layer_score_maps({"conv": torch.ones(2, 2)}, image)
    visualize_crops(image, torch.ones(2, 2), torch.tensor([[0, 0, 8, 8]]))
    visualize_patches({"conv": {"SMSM": patches(1)}})
    assert plt.get_fignums() == figures
    assert dict(mpl.rcParams) == settings


def test_notebooks_show_figures_as_they_are(image: Tensor) -> None:
    figure, _ = visualize_score_map(bump(7, 0.3, 0.3), image)
    png = PNGFormatter()(figure)
    assert png.startswith(b"\x89PNG")
    assert plt.get_fignums() == []


@pytest.mark.parametrize("method", ["heat_map", "blended_heat_map", "masked_image", "alpha_scaling"])
def test_captums_figure_of_a_score_map(image: Tensor, method: str) -> None:
    score_map = LayerAttribution.interpolate(bump(8, 0.3, 0.3), (32, 48), "bilinear")
    _, ax = captum_visualization.visualize_image_attr(
        score_map[0].permute(1, 2, 0).numpy(),
        image.permute(1, 2, 0).numpy(),
        method=method,
        sign="all" if "heat_map" in method else "positive",
        use_pyplot=False,
    )
    assert drawn(ax).shape[:2] == (32, 48)
    if method == "heat_map":
        assert drawn(ax).flat[int(score_map.argmax())] == drawn(ax).max() == 1
        assert drawn(ax).flat[int(score_map.argmin())] < 0


NAN = torch.full((4, 4), torch.nan)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"score_map": [[1.0]]}, TypeError, "score_map must be a tensor or an array, got list. Use torch.as_te"),
        ({"score_map": NAN}, ValueError, "score_map must be finite, got NaN or infinite values"),
        ({"score_map": torch.ones(4)}, ValueError, r"score_map must be one map, .* got \(4,\)"),
        ({"score_map": torch.ones(1, 3, 4, 4)}, ValueError, r"got \(1, 3, 4, 4\)\. .* sum the channels"),
        ({"score_map": torch.ones(0, 4)}, ValueError, r"got \(0, 4\)"),
        ({"image": [[1.0]]}, TypeError, "image must be a tensor or an array, got list"),
        (
            {"image": torch.ones(4, 4)},
            ValueError,
            r"image must be \(C, H, W\) with 1, 3 or 4 \(RGBA\) channels, got \(4, 4\)",
        ),
        ({"image": torch.ones(2, 3, 4, 4)}, ValueError, r"got \(2, 3, 4, 4\)"),
        ({"image": NAN[None]}, ValueError, "image must be finite"),
        ({"image": torch.full((3, 4, 4), 2.5)}, ValueError, "values from 2.50 to 2.50. Pass the mean and std"),
        ({"mean": 0.5}, ValueError, "mean and std must be given together"),
        ({"mean": (0.5, 0.5), "std": 1}, ValueError, r"mean must be one number or one per channel \(3\)"),
        ({"limit": 0.0}, ValueError, "limit must be a positive number of logits, got 0.0"),
        ({"limit": float("nan")}, ValueError, "limit must be a positive number of logits, got nan"),
    ],
)
def test_bad_input(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    valid = {"score_map": torch.ones(4, 4), "image": torch.ones(3, 8, 8)}
    with pytest.raises(error, match=message):
        visualize_score_map(**{**valid, **arguments})


def test_bad_layers(image: Tensor) -> None:
    with pytest.raises(ValueError, match="score_maps must have at least one layer, got none"):
        visualize_layer_score_maps({}, image)
    with pytest.raises(ValueError, match=r"biases must name layers of score_maps \(conv\), got fc, pool"):
        visualize_layer_score_maps({"conv": torch.ones(2, 2)}, image, biases={"pool": 1.0, "fc": 1.0})
    with pytest.raises(ValueError, match=r"score_maps\['conv'\] must be finite"):
        visualize_layer_score_maps({"conv": NAN}, image)
    figure = Figure()
    with pytest.raises(ValueError, match="plt_fig_axis must hold 2 axes, got 1"):
        visualize_layer_score_maps({"conv": torch.ones(2, 2)}, image, plt_fig_axis=(figure, figure.subplots()))


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[[0, 0, 8, 8]]], r"boxes must be \(k, 4\), k > 0, got \(1, 1, 4\)\. Choose the image: boxes\[0\]"),
        ([[0, 0, 49, 8]], r"within the image, got \(0, 0, 49, 8\) in 32 rows and 48 columns"),
        ([[4, 4, 4, 8]], r"boxes must be x0 < x1, y0 < y1"),
    ],
)
def test_bad_boxes(image: Tensor, boxes: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        visualize_crops(image, torch.ones(2, 2), torch.tensor(boxes))


def test_bad_captions(image: Tensor) -> None:
    with pytest.raises(ValueError, match="captions must be as many as boxes, 1, got 2"):
        visualize_crops(image, torch.ones(2, 2), torch.tensor([[0, 0, 8, 8]]), captions=["one", "two"])


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({}, "patches must hold at least one patch, got none"),
        ({"conv": {"SMSM": []}}, "patches must hold at least one patch, got none"),
        ({"conv": {"SMSM": []}, "pool": {}}, "the methods SMSM for every layer, got none for 'pool'"),
    ],
)
def test_bad_patches(chosen: dict[str, dict[str, list[SimpleNamespace]]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        visualize_patches(chosen)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"interpolate_mode": "cubic"}, "interpolate_mode must be 'bilinear' or 'nearest', got 'cubic'"),
        ({"alpha_overlay": 1.5}, "alpha_overlay must be from 0 to 1, got 1.5"),
        ({"contours": (0.5, 1.0)}, r"contours must be fractions between 0 and 1, got \(0.5, 1.0\)"),
        ({"outlier_perc": 100}, "outlier_perc must be from 0 to 100, got 100"),
    ],
)
def test_bad_style(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MapStyle(**setting)


def test_a_batch_is_drawn_image_by_image() -> None:
    maps, images = torch.randn(3, 1, 4, 4), torch.rand(3, 3, 8, 8)
    _, axes = visualize_score_map(maps, images, title="first")
    assert [ax.get_title() for ax in axes] == ["first", "", ""]
    assert_close(torch.from_numpy(drawn(axes[1], 0)), images[1].permute(1, 2, 0) @ torch.tensor([0.299, 0.587, 0.114]))
    with pytest.raises(ValueError, match="one for each of the 3, got 2"):
        visualize_score_map(maps, images[:2])


def test_arrays_and_photographs_are_taken_as_captum_and_pil_have_them() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3)).astype(np.uint8)
    pixels.flags.writeable = False
    score_map = np.ones((4, 6))
    shown = [
        drawn(visualize_score_map(score_map, picture)[1], 0)
        for picture in (pixels, Image.fromarray(pixels), torch.from_numpy(pixels.copy()).permute(2, 0, 1))
    ]
    for one in shown[1:]:
        np.testing.assert_array_equal(one, shown[0])


def test_a_map_lies_where_the_network_saw_the_photograph() -> None:
    photograph = Image.new("RGB", (640, 480))
    box = Preprocessing(256, 224).box(photograph.size)
    _, ax = visualize_score_map(torch.ones(7, 7), photograph, box=box)
    assert ax.images[-1].get_extent() == [109.5, 529.5, 449.5, 29.5]
    assert ax.get_xlim() == (-0.5, 639.5)
    with pytest.raises(ValueError, match="within the image"):
        visualize_score_map(torch.ones(7, 7), photograph, box=(0, 0, 641, 480))
    with pytest.raises(ValueError, match="must come with the image"):
        visualize_score_map(torch.ones(7, 7), box=box)


@pytest.mark.parametrize("size", [(640, 480), (300, 451), (256, 256), (200, 2000)])
def test_the_box_is_what_the_preprocessing_cuts_out(size: tuple[int, int]) -> None:
    rows, columns = torch.meshgrid(torch.arange(size[1]), torch.arange(size[0]), indexing="ij")
    ramps = torch.stack([columns * 255 / size[0], rows * 255 / size[1], torch.zeros(size[1], size[0])], -1)
    seen = Preprocessing(256, 224, (0, 0, 0), (1, 1, 1))(Image.fromarray(ramps.byte().numpy()))
    x0, y0, x1, y1 = Preprocessing(256, 224).box(size)
    for channel, start, end, length in ((0, x0, x1, size[0]), (1, y0, y1, size[1])):
        assert float(seen[channel].min()) == pytest.approx(start / length, abs=0.02)
        assert float(seen[channel].max()) == pytest.approx(end / length, abs=0.02)


@pytest.mark.parametrize(
    ("part", "score", "text"),
    [
        (1.0, 2.0, "50% of S"),
        (-3.0, 2.0, "−150% of S"),
        (-19.98, 2.0, "−999% of S"),
        (165.3, -1.0, "−165 times S"),
        (0.0, 0.0, "all of S"),
    ],
)
def test_a_share_of_a_score_near_zero_is_no_percentage(part: float, score: float, text: str) -> None:
    assert share_text(part, score) == text


def test_pictures_of_every_type_are_the_same() -> None:
    whole = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    fractions = whole / 255
    expected = checked_picture(fractions, None, None)
    opaque = np.concatenate([whole, np.full((6, 5, 1), 255, np.uint8)], 2)
    for one in (
        whole, whole.astype(np.int64), whole.astype(np.uint16) * 257, fractions.astype(np.float32), opaque,
        np.concatenate([fractions, np.ones((6, 5, 1))], 2), torch.from_numpy(opaque).permute(2, 0, 1),
        Image.fromarray(opaque), Image.fromarray(whole),
    ):  # fmt: skip
        np.testing.assert_allclose(checked_picture(one, None, None), expected, atol=1e-6)
    hidden = opaque.copy()
    hidden[..., 3] = 0
    np.testing.assert_allclose(checked_picture(hidden, None, None), 1.0)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((4, 4, 3), 300), "image of whole numbers must lie in 0 to 255, got values from 300 to 300"),
        (np.full((4, 4, 3), 200.0), r"image must lie in \[0, 1\], got values from 200.00 to 200.00. Divide it by 255"),
        (np.full((4, 4, 3), -2.0), "Pass the mean and std"),
    ],
)
def test_pictures_out_of_range_say_what_to_do(image: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_picture(image, None, None)


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("cat", ["cat"]),
        ("model.backbone.model.embedder.embedder", ["model.backbone.model.", "embedder.embedder"]),
        ("black-and-tan coonhound − Walker hound", ["black-and-tan coonhound", "− Walker hound"]),
        ("a" * 60, ["a" * 24, "a" * 24, "a" * 12]),
        ("b" * 200, ["b" * 24, "b" * 24, "b" * 23 + "…"]),
    ],
)
def test_long_names_stay_above_their_own_map(name: str, lines: list[str]) -> None:
    maps = {name: torch.randn(1, 1, 7, 7), "other": torch.randn(1, 1, 7, 7)}
    figure, axes = visualize_layer_score_maps(maps, torch.rand(3, 48, 64), label=name, score=1.0)
    figure.canvas.draw()
    for ax in axes[:2]:
        assert ax.get_title().splitlines()[: len(lines)] == lines
        box = ax.title.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.width


@pytest.mark.parametrize(
    ("height", "width"), [(1, 3000), (200, 1600), (100, 250), (100, 100), (250, 100), (1601, 7), (3000, 1)]
)
def test_strips_and_columns_keep_their_titles_and_a_size_to_look_at(height: int, width: int) -> None:
    photograph, values = torch.rand(3, height, width), torch.randn(1, 1, min(height, 9), min(width, 9))
    figures = [
        visualize_layer_score_maps({"first": values, "last": values}, photograph)[0],
        visualize_score_map(values, photograph, title="one\ntwo")[0],
        visualize_crops(photograph, values, torch.tensor([[0, 0, 1, 1]]))[0],
    ]
    for figure in figures:
        figure.savefig(io.BytesIO(), dpi=50)  # a layout without room for titles is a warning, and so an error here
        assert max(figure.get_size_inches()) < 16
        for ax in figure.axes:
            assert ax.title.get_window_extent().y1 <= figure.bbox.y1 + 1
