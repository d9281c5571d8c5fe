"""Metrics against straightforward references, and against Quantus where it has the same one."""

from __future__ import annotations

import copy
import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import InputXGradient, IntegratedGradients, Saliency
from scipy.stats import rankdata
from torch import Tensor, nn

from captum_scoremap import ScoreMap, metrics

LABELS = 5


@pytest.fixture
def model(generator: torch.Generator) -> nn.Module:
    """A small ReLU network with biases, in float64."""
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, LABELS),
    ).double()
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4
    return network.eval()


@pytest.fixture
def inputs(generator: torch.Generator) -> Tensor:
    return torch.randn(3, 3, 8, 8, generator=generator, dtype=torch.float64)


@pytest.fixture
def target() -> Tensor:
    return torch.tensor([1, 4, 0])


def noise(maps: Tensor) -> metrics.Attribution:
    """An attribution that returns the given maps, whatever it is asked."""
    return lambda inputs, target: maps


def saliency(model: nn.Module, inputs: Tensor, target: Tensor) -> Tensor:
    return Saliency(model).attribute(inputs.clone().requires_grad_(), target=target)


# --- input_sized ---


def test_input_sized_sums_channels_then_enlarges_bilinearly(generator: torch.Generator) -> None:
    attributions = torch.randn(2, 3, 2, 2, generator=generator)
    maps = metrics.input_sized(attributions, 4, 4)
    first_row = attributions.sum(1)[:, 0]  # bilinear without aligned corners: a quarter of the way in between
    torch.testing.assert_close(maps[:, 0, 0], first_row[:, 0])
    torch.testing.assert_close(maps[:, 0, 1], 0.75 * first_row[:, 0] + 0.25 * first_row[:, 1])


def test_input_sized_leaves_input_sized_attributions_as_they_are(inputs: Tensor) -> None:
    torch.testing.assert_close(metrics.input_sized(inputs, 8, 8), inputs.sum(1), rtol=0, atol=0)


def test_input_sized_rejects_maps_without_channels() -> None:
    with pytest.raises(ValueError, match=r"attributions must have the shape \(N, C, h, w\), got \(2, 4, 4\)"):
        metrics.input_sized(torch.ones(2, 4, 4), 8, 8)


# --- completeness ---


def test_completeness_of_integrated_gradients(model: nn.Module, inputs: Tensor, target: Tensor) -> None:
    method = IntegratedGradients(model)
    at_zero = model(torch.zeros_like(inputs)).gather(1, target[:, None])[:, 0].detach()
    attribute = lambda inputs, target: method.attribute(inputs, target=target, n_steps=500)  # noqa: E731
    residual = metrics.completeness(model, attribute, inputs, target, offset=at_zero)
    _, delta = method.attribute(inputs, target=target, n_steps=500, return_convergence_delta=True)
    torch.testing.assert_close(residual, -delta, rtol=0, atol=1e-10)
    assert residual.abs().max() < 1e-2


def test_completeness_is_the_bias_of_input_x_gradient(model: nn.Module, inputs: Tensor, target: Tensor) -> None:
    """For a piecewise-linear network what input x gradient leaves is B: the score of the affine piece at zero."""
    attribute = lambda inputs, target: InputXGradient(model).attribute(  # noqa: E731
        inputs.requires_grad_(), target=target
    )
    residual = metrics.completeness(model, attribute, inputs.clone(), target)
    for index, label in enumerate(target.tolist()):
        image = inputs[index : index + 1]
        jacobian = torch.autograd.functional.jacobian(lambda x, label=label: model(x)[0, label], image)
        piece_at_zero = model(image)[0, label] - (jacobian * image).sum()
        torch.testing.assert_close(residual[index], piece_at_zero.detach())


# --- insertion and deletion ---


def curve_by_hand(model: nn.Module, maps: Tensor, before: Tensor, after: Tensor, label: int, steps: int) -> list[float]:
    """One image, one pixel at a time, with nothing batched."""
    height, width = maps.shape
    order = sorted(
        ((row, column) for row in range(height) for column in range(width)),
        key=lambda at: (-float(maps[at]), at),
    )
    image = before.clone()
    curve = [model(image[None]).softmax(1)[0, label].item()]
    done = 0
    for step in range(1, steps + 1):
        until = round(step * height * width / steps)
        for row, column in order[done:until]:
            image[:, row, column] = after[:, row, column]
        done = until
        curve.append(model(image[None]).softmax(1)[0, label].item())
    return curve


@pytest.mark.parametrize("steps", [1, 7, 64])
@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_insertion_and_deletion_match_one_pixel_at_a_time(
    model: nn.Module, inputs: Tensor, target: Tensor, generator: torch.Generator, steps: int, batch_size: int
) -> None:
    maps = torch.randn(3, 1, 8, 8, generator=generator, dtype=torch.float64)
    baseline = torch.randn(inputs.shape, generator=generator, dtype=torch.float64)
    options = {"baseline": baseline, "steps": steps, "batch_size": batch_size}
    inserted = metrics.insertion(model, noise(maps), inputs, target, **options)
    deleted = metrics.deletion(model, noise(maps), inputs, target, **options)
    for index, label in enumerate(target.tolist()):
        image, blank, image_map = inputs[index], baseline[index], maps[index, 0]
        for curve, before, after in ((inserted, blank, image), (deleted, image, blank)):
            expected = curve_by_hand(model, image_map, before, after, label, steps)
            np.testing.assert_allclose(curve.probabilities[index].numpy(), expected, rtol=1e-10)
            trapezoids = sum((one + two) / 2 for one, two in pairwise(expected)) / steps
            if steps != 7:  # equal steps: RISE's sum of trapezoids
                assert math.isclose(float(curve.area[index]), trapezoids, rel_tol=1e-10)


def test_deletion_agrees_with_pixel_flipping_of_quantus(
    model: nn.Module, inputs: Tensor, target: Tensor, generator: torch.Generator
) -> None:
    quantus = pytest.importorskip("quantus")
    # One value per pixel for all channels: Quantus ranks single values, so a one-channel image is compared.
    gray = nn.Sequential(_Repeat(), model).eval()
    images = inputs[:, :1].clone()
    maps = torch.randn(3, 1, 8, 8, generator=generator, dtype=torch.float64)
    pixel_flipping = quantus.PixelFlipping(
        features_in_step=4,
        normalise=False,
        perturb_baseline=0.0,
        disable_warnings=True,
        return_aggregate=False,
    )
    expected = pixel_flipping(
        model=gray,
        x_batch=images.numpy(),
        y_batch=target.numpy(),
        a_batch=maps.numpy(),
        softmax=True,
        device="cpu",
        channel_first=True,
    )
    curve = metrics.deletion(gray, noise(maps), images, target, baseline="zero", steps=16)
    np.testing.assert_allclose(curve.probabilities[:, 1:].numpy(), np.array(expected), rtol=1e-4)


class _Repeat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double().expand(-1, 3, -1, -1)


def test_insertion_and_deletion_start_and_end_at_the_whole_images(
    model: nn.Module, inputs: Tensor, target: Tensor
) -> None:
    probability = model(inputs).softmax(1).gather(1, target[:, None])[:, 0].detach()
    attribute = partial(saliency, model)
    inserted = metrics.insertion(model, attribute, inputs, target, baseline="mean")
    deleted = metrics.deletion(model, attribute, inputs, target, baseline="mean")
    torch.testing.assert_close(inserted.probabilities[:, -1], probability)
    torch.testing.assert_close(deleted.probabilities[:, 0], probability)
    torch.testing.assert_close(inserted.probabilities[:, 0], deleted.probabilities[:, -1])


def test_baselines(inputs: Tensor, target: Tensor) -> None:
    """The start of the insertion curve is the score of the baseline alone."""
    probe = nn.Flatten()  # scores are the pixels: the baseline itself is read off
    label = torch.full((3,), 27)  # an inner pixel of the first channel: row 3, column 3
    weights = torch.exp(-(torch.arange(-5, 6, dtype=torch.float64) ** 2) / 50)
    padded = F.pad(inputs[:, :1], [5] * 4, mode="reflect")
    blurred = F.conv2d(padded, (weights[:, None] * weights / weights.sum() ** 2)[None, None])
    everything = F.conv2d(
        F.pad(inputs, [5] * 4, mode="reflect").flatten(0, 1)[:, None],
        (weights[:, None] * weights / weights.sum() ** 2)[None, None],
    ).view_as(inputs)
    torch.testing.assert_close(everything[:, :1], blurred)
    for baseline, expected in (
        ("zero", torch.zeros_like(inputs)),
        ("mean", inputs.mean((2, 3), keepdim=True).expand_as(inputs)),
        ("blur", everything),
    ):
        curve = metrics.insertion(probe, noise(inputs), inputs, label, baseline=baseline, steps=2)
        torch.testing.assert_close(curve.probabilities[:, 0], expected.flatten(1).softmax(1)[:, 27])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, r"steps must be between 1 and the number of pixels, 64, got 0"),
        ({"steps": 65}, r"got 65"),
        ({"batch_size": 0}, r"batch_size must be at least 1, got 0"),
        ({"baseline": "grey"}, r'baseline must be "blur", "mean", "zero" or a tensor, got \'grey\''),
    ],
)
def test_insertion_rejects(
    model: nn.Module, inputs: Tensor, target: Tensor, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.insertion(model, noise(inputs), inputs, target, **options)


@pytest.mark.parametrize("measure", [metrics.insertion, metrics.deletion])
@pytest.mark.parametrize("squeezed", [False, True])
def test_one_score_an_image_has_no_softmax(model: nn.Module, inputs: Tensor, measure, squeezed: bool) -> None:
    def single(images: Tensor) -> Tensor:
        return model(images)[:, 0] if squeezed else model(images)[:, :1]

    def probability(output: Tensor) -> Tensor:
        return output.reshape(-1).sigmoid()

    maps = saliency(model, inputs, torch.zeros(len(inputs), dtype=torch.int64))
    with pytest.raises(ValueError, match=r"of at least two labels, \(N, K\), for a probability, got \(\d+(, 1|,)\)"):
        measure(single, noise(maps), inputs, torch.zeros(len(inputs), dtype=torch.int64))
    curve = measure(single, noise(maps), inputs, probability, steps=4)
    ends = curve.probabilities[:, -1 if measure is metrics.insertion else 0]
    torch.testing.assert_close(ends, probability(single(inputs)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_maps_must_be_finite(model: nn.Module, inputs: Tensor, target: Tensor, value: float) -> None:
    maps = torch.zeros(3, 1, 8, 8)
    maps[1, 0, 2, 2] = value
    for measure in (metrics.insertion, metrics.deletion, metrics.masked_confidence, metrics.road):
        with pytest.raises(ValueError, match="attributions must be finite"):
            measure(model, noise(maps), inputs, target)


def test_a_missing_batch_dimension_is_named(model: nn.Module, inputs: Tensor, target: Tensor) -> None:
    with pytest.raises(ValueError, match=r"inputs must have the shape \(N, C, H, W\), got \(3, 8, 8\)\. Use inputs"):
        metrics.insertion(model, noise(inputs), inputs[0], target)
    with pytest.raises(ValueError, match=r"target must hold one label per image, \(3,\), got \(2,\)"):
        metrics.completeness(model, noise(inputs), inputs, target[:2])


# --- pointing games ---


def test_mosaics_hold_the_images_of_different_labels(generator: torch.Generator) -> None:
    images = torch.arange(12, dtype=torch.float32).view(12, 1, 1, 1).expand(12, 3, 4, 4)
    target = torch.arange(12) // 2  # two images of each label
    pictures, labels = metrics.mosaics(images, target, n=2, count=30, generator=generator)
    assert pictures.shape == (30, 3, 8, 8)
    for picture, cell_labels in zip(pictures, labels, strict=True):
        assert len(set(cell_labels.tolist())) == 4
        for cell, label in enumerate(cell_labels.tolist()):
            row, column = 4 * (cell // 2), 4 * (cell % 2)
            content = picture[:, row : row + 4, column : column + 4].unique()
            assert len(content) == 1
            assert int(content) // 2 == label
    assert len(labels.unique()) == 6


def test_mosaics_need_enough_labels(inputs: Tensor, target: Tensor) -> None:
    with pytest.raises(ValueError, match=r"at least 4 different labels for 2 x 2 cells, got 3"):
        metrics.mosaics(inputs, target)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_grid_pointing_game_matches_sums_over_the_cells(n: int, generator: torch.Generator) -> None:
    pictures = torch.randn(2, 3, 4 * n, 4 * n, generator=generator, dtype=torch.float64)
    labels = torch.arange(n * n).repeat(2, 1)
    attribute = lambda inputs, target: inputs * (target.view(-1, 1, 1, 1) + 1).sin()  # noqa: E731
    shares = metrics.grid_pointing_game(attribute, pictures, labels)
    for index in range(2):
        for cell in range(n * n):
            single_map = (pictures[index] * math.sin(cell + 1)).sum(0).numpy()
            row, column = 4 * (cell // n), 4 * (cell % n)
            inside = np.maximum(single_map[row : row + 4, column : column + 4], 0).sum()
            assert math.isclose(float(shares[index, cell]), inside / np.maximum(single_map, 0).sum(), rel_tol=1e-12)


def test_grid_pointing_game_of_a_negative_map_is_zero() -> None:
    shares = metrics.grid_pointing_game(noise(-torch.ones(1, 1, 4, 4)), torch.ones(1, 3, 4, 4), torch.arange(4)[None])
    assert shares.tolist() == [[0.0] * 4]


def test_grid_pointing_game_rejects() -> None:
    with pytest.raises(ValueError, match=r"labels must have the shape \(N, n \* n\) with N = 1, got \(1, 3\)"):
        metrics.grid_pointing_game(noise(torch.ones(1)), torch.ones(1, 3, 4, 4), torch.arange(3)[None])
    with pytest.raises(ValueError, match=r"images must divide into 3 x 3 cells, got 4 x 4 pixels"):
        metrics.grid_pointing_game(noise(torch.ones(1)), torch.ones(1, 3, 4, 4), torch.arange(9)[None])


@pytest.fixture
def masks(generator: torch.Generator) -> Tensor:
    return torch.rand(3, 8, 8, generator=generator) > 0.6


def test_pointing_games_agree_with_quantus(
    model: nn.Module, inputs: Tensor, target: Tensor, masks: Tensor, generator: torch.Generator
) -> None:
    quantus = pytest.importorskip("quantus")
    maps = torch.randn(3, 1, 8, 8, generator=generator, dtype=torch.float64)
    options = {"normalise": False, "disable_warnings": True, "return_aggregate": False}
    data = {
        "model": model,
        "x_batch": inputs.numpy(),
        "y_batch": target.numpy(),
        "s_batch": masks[:, None].numpy(),
        "device": "cpu",
        "channel_first": True,
    }
    hits = quantus.PointingGame(abs=False, **options)(a_batch=maps.numpy(), **data)
    assert metrics.pointing_game(noise(maps), inputs, target, masks).tolist() == [bool(hit) for hit in hits]
    shares = quantus.RelevanceMassAccuracy(abs=False, **options)(a_batch=maps.clamp(min=0).numpy(), **data)
    energy = metrics.energy_pointing_game(noise(maps), inputs, target, masks)
    np.testing.assert_allclose(energy.numpy(), shares, rtol=1e-10)


@pytest.mark.parametrize("tolerance", [0, 1, 3])
def test_pointing_game_tolerance_matches_distance(
    inputs: Tensor, target: Tensor, generator: torch.Generator, tolerance: int
) -> None:
    maps = torch.randn(3, 1, 8, 8, generator=generator, dtype=torch.float64)
    masks = torch.rand(3, 8, 8, generator=generator) > 0.95
    hits = metrics.pointing_game(noise(maps), inputs, target, masks, tolerance=tolerance)
    for image_map, mask, hit in zip(maps[:, 0], masks, hits.tolist(), strict=True):
        row, column = divmod(int(image_map.argmax()), 8)
        near = [max(abs(row - int(r)), abs(column - int(c))) <= tolerance for r, c in mask.nonzero()]
        assert hit == any(near)


def test_energy_pointing_game_of_a_negative_map_is_zero(inputs: Tensor, target: Tensor, masks: Tensor) -> None:
    energy = metrics.energy_pointing_game(noise(-torch.ones(3, 1, 8, 8)), inputs, target, masks)
    assert energy.tolist() == [0.0] * 3


def test_masks_must_be_boolean(inputs: Tensor, target: Tensor, masks: Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"masks must be boolean of the shape \(3, 8, 8\), got torch.float32 \(3, 8, 8\)"
    ):
        metrics.pointing_game(noise(inputs), inputs, target, masks.float())


# --- patches ---


def test_patch_score_matches_one_patch_at_a_time(model: nn.Module, inputs: Tensor, target: Tensor) -> None:
    boxes = torch.tensor([
        [[0, 0, 4, 4], [2, 1, 8, 5]],
        [[4, 4, 8, 8], [0, 0, 8, 8]],
        [[1, 1, 3, 3], [5, 0, 6, 8]],
    ])
    scores = metrics.patch_score(model, inputs, target, boxes)
    for index, label in enumerate(target.tolist()):
        for k, (x0, y0, x1, y1) in enumerate(boxes[index].tolist()):
            patch = F.interpolate(inputs[index : index + 1, :, y0:y1, x0:x1], (8, 8), mode="bicubic", antialias=True)
            torch.testing.assert_close(scores[index, k], model(patch).softmax(1)[0, label].detach())
    torch.testing.assert_close(metrics.patch_score(model, inputs, target, boxes[:, 1]), scores[:, 1])


def test_patch_score_of_the_whole_image_is_the_probability(model: nn.Module, inputs: Tensor, target: Tensor) -> None:
    whole = torch.tensor([[0, 0, 8, 8]]).expand(3, 4)
    expected = model(inputs).softmax(1).gather(1, target[:, None])[:, 0].detach()
    torch.testing.assert_close(metrics.patch_score(model, inputs, target, whole), expected)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (
            torch.tensor([[0, 0, 4, 4]]),
            r"boxes must have the shape \(N, 4\) or \(N, k, 4\), N = 3, got \(1, 4\)",
        ),
        (torch.tensor([[0, 0, 4, 9]] * 3), r"boxes must be 0 <= x0 < x1 <= 8 and 0 <= y0 < y1 <= 8"),
        (torch.tensor([[4, 0, 4, 8]] * 3), r"got \[\[4, 0, 4, 8\]"),
    ],
)
def test_patch_score_rejects(model: nn.Module, inputs: Tensor, target: Tensor, boxes: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.patch_score(model, inputs, target, boxes)


@pytest.mark.parametrize("size", [1, 3, (2, 5), 8])
def test_strongest_window_matches_brute_force(generator: torch.Generator, size: int | tuple[int, int]) -> None:
    maps = torch.randn(4, 8, 8, generator=generator, dtype=torch.float64)
    rows, columns = (size, size) if isinstance(size, int) else size
    for single_map, (x0, y0, x1, y1) in zip(maps, metrics.strongest_window(maps, size).tolist(), strict=True):
        assert (x1 - x0, y1 - y0) == (columns, rows)
        sums = [
            single_map[top : top + rows, left : left + columns].sum()
            for top in range(9 - rows)
            for left in range(9 - columns)
        ]
        torch.testing.assert_close(single_map[y0:y1, x0:x1].sum(), torch.stack(sums).max())


def test_strongest_window_rejects_a_window_larger_than_the_map() -> None:
    with pytest.raises(ValueError, match=r"size must be between 1 and the map's \(8, 8\), got \(9, 9\)"):
        metrics.strongest_window(torch.ones(1, 8, 8), 9)


# --- parameter randomization ---


def test_randomization_cascades_from_the_top(model: nn.Module, inputs: Tensor, target: Tensor) -> None:
    before = copy.deepcopy(model.state_dict())
    correlations = metrics.parameter_randomization(model, saliency, inputs, target, seed=3)
    assert list(correlations) == ["7", "3", "0"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)

    reference = copy.deepcopy(model)
    trained = saliency(model, inputs, target).sum(1).flatten(1)
    torch.manual_seed(3)
    for name in ("7", "3", "0"):
        reference.get_submodule(name).reset_parameters()
        maps = saliency(reference, inputs, target).sum(1).flatten(1)
        for index in range(3):
            expected = np.corrcoef(rankdata(trained[index]), rankdata(maps[index]))[0, 1]
            assert math.isclose(float(correlations[name][index]), expected, rel_tol=1e-6)


def test_randomization_agrees_with_quantus_at_the_top(model: nn.Module, inputs: Tensor, target: Tensor) -> None:
    quantus = pytest.importorskip("quantus")

    def explain(model: nn.Module, inputs: np.ndarray, targets: np.ndarray, **_: object) -> np.ndarray:
        return saliency(model, torch.as_tensor(inputs).double(), torch.as_tensor(targets)).sum(1, keepdim=True).numpy()

    mprt = quantus.MPRT(layer_order="top_down", seed=42, abs=False, normalise=False, disable_warnings=True)
    expected = mprt(
        model=_Double(model),
        x_batch=inputs.numpy(),
        y_batch=target.numpy(),
        explain_func=explain,
        device="cpu",
        channel_first=True,
    )
    ours = metrics.parameter_randomization(model, saliency, inputs, target, seed=43)  # Quantus seeds with seed + 1
    np.testing.assert_allclose(ours["7"].numpy(), expected["model.7"], rtol=1e-6)


class _Double(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.double())


def test_randomization_compares_after_the_layers_asked_for(model: nn.Module, inputs: Tensor, target: Tensor) -> None:
    every = metrics.parameter_randomization(model, saliency, inputs, target)
    last = metrics.parameter_randomization(model, saliency, inputs, target, layers=["0"])
    assert list(last) == ["0"]
    torch.testing.assert_close(last["0"], every["0"], rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"layers must be names of modules that have reset_parameters, got \['1'\]"):
        metrics.parameter_randomization(model, saliency, inputs, target, layers=["1"])


def test_randomization_leaves_the_generator_of_torch_alone(model: nn.Module, inputs: Tensor, target: Tensor) -> None:
    state = torch.get_rng_state()
    metrics.parameter_randomization(model, saliency, inputs, target)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_constant_map_correlates_with_nothing(model: nn.Module, inputs: Tensor, target: Tensor) -> None:
    constant = lambda model, inputs, target: torch.ones_like(inputs)  # noqa: E731
    correlations = metrics.parameter_randomization(model, constant, inputs, target)
    assert all(value.tolist() == [0.0] * 3 for value in correlations.values())


# --- targets in every form -------------------------------------------------------------------------------------------


def measured(model: nn.Module, attribute: object, inputs: Tensor, target: object, name: str) -> list[Tensor]:
    """The numbers of one measure."""
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor([[1, 1, 5, 5]] * len(inputs))
    masks = torch.zeros(len(inputs), *inputs.shape[-2:], dtype=torch.bool)
    masks[:, :4] = True
    found = {
        "insertion": lambda: metrics.insertion(model, attribute, inputs, target).probabilities,
        "deletion": lambda: metrics.deletion(model, attribute, inputs, target).probabilities,
        "road": lambda: metrics.road(model, attribute, inputs, target, generator=generator),
        "arcc": lambda: metrics.arcc(model, attribute, inputs, target, generator=generator),
        "masked_confidence": lambda: metrics.masked_confidence(model, attribute, inputs, target),
        "completeness": lambda: metrics.completeness(model, attribute, inputs, target),
        "single_deletion": lambda: metrics.single_deletion(model, attribute, inputs, target, cells=2),
        "cause_game": lambda: metrics.cause_game(model, attribute, inputs, inputs + 1, target),
        "patch_score": lambda: metrics.patch_score(model, inputs, target, boxes),
        "pointing_game": lambda: metrics.pointing_game(attribute, inputs, target, masks),
        "energy_pointing_game": lambda: metrics.energy_pointing_game(attribute, inputs, target, masks),
    }[name]()
    return [found] if isinstance(found, Tensor) else [one for one in vars(found).values() if isinstance(one, Tensor)]


MEASURES = (
    "insertion deletion road arcc masked_confidence completeness single_deletion cause_game patch_score pointing_game "
    "energy_pointing_game"
).split()


@pytest.mark.parametrize("name", MEASURES)
def test_labels_in_every_form_are_the_same(model: nn.Module, inputs: Tensor, name: str) -> None:
    attribute = ScoreMap(model).attribute
    expected = measured(model, attribute, inputs, torch.tensor([1, 1, 1]), name)
    forms = [
        1,
        np.int64(1),
        torch.tensor(1),
        [1, 1, 1],
        np.array([1, 1, 1]),
        torch.tensor([1, 1, 1], dtype=torch.int32),
    ]
    for form in forms:
        for one, other in zip(measured(model, attribute, inputs, form, name), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize(
    ("target", "message"),
    [
        (1.0, r"target must be a label, labels \(N,\) or a function .*, got 1.0"),
        (True, "got True"),
        (None, "got None"),
        ("cat", "got 'cat'"),
        ((1, 1, 1), r"got \(1, 1, 1\). Of scores \(N, K, ...\) pass a function"),
        (torch.tensor([1.0, 1.0, 1.0]), "got torch.float32"),
        ([1, 1], r"target must hold one label per image, \(3,\), got \(2,\)"),
        ([[1], [1], [1]], r"got \(3, 1\)"),
    ],
)
def test_what_is_no_label_is_refused(model: nn.Module, inputs: Tensor, name: str, target: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        measured(model, ScoreMap(model).attribute, inputs, target, name)


@pytest.mark.parametrize("name", [name for name in MEASURES if name != "patch_score"])
def test_what_is_no_attribution_is_refused(model: nn.Module, inputs: Tensor, name: str) -> None:
    maps = torch.zeros_like(inputs)
    for attribute, message in (
        (maps, r"attribute must be a function of inputs and labels.* got Tensor. Of finished maps: lambda"),
        (lambda inputs, target: maps.numpy(), "attribute must return a tensor, got ndarray. Use torch.as_tensor"),
        (lambda inputs, target: maps[:1], r"attribute must return maps of each of the 3 images.* got \(1, "),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            measured(model, attribute, inputs, 1, name)


@pytest.mark.parametrize("name", "insertion deletion road arcc masked_confidence completeness single_deletion".split())
def test_images_are_one_tensor(model: nn.Module, inputs: Tensor, name: str) -> None:
    for odd in (list(inputs), inputs.numpy(), (inputs,)):
        with pytest.raises(TypeError, match=r"inputs must be one tensor \(N, C, H, W\), got (list|ndarray|tuple)"):
            getattr(metrics, name)(model, ScoreMap(model).attribute, odd, 1)
