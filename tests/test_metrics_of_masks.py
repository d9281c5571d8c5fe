"""Drop and increase of confidence, ROAD and ARCC: against slow references, torch-cam and pytorch-grad-cam."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from captum_scoremap import metrics
from captum_scoremap.metrics import remove_and_debias
from captum_scoremap.metrics.remove_and_debias import impute

WEIGHTS = {(-1, -1): 1 / 12, (-1, 0): 1 / 6, (-1, 1): 1 / 12, (0, -1): 1 / 6}
WEIGHTS |= {(-row, -column): weight for (row, column), weight in WEIGHTS.items()}


@pytest.fixture
def model(generator: torch.Generator) -> nn.Module:
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 4)
    )
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return network.double().eval().requires_grad_(False)


@pytest.fixture
def inputs(generator: torch.Generator) -> Tensor:
    return torch.randn(3, 3, 6, 7, generator=generator, dtype=torch.float64)


@pytest.fixture
def maps(generator: torch.Generator) -> Tensor:
    """Maps between 0 and 1, each with both."""
    maps = torch.rand(3, 1, 6, 7, generator=generator, dtype=torch.float64)
    return (maps - maps.amin((2, 3), keepdim=True)) / (maps - maps.amin((2, 3), keepdim=True)).amax((2, 3), True)


@pytest.fixture
def target() -> Tensor:
    return torch.tensor([1, 3, 0])


def fixed(maps: Tensor) -> metrics.Attribution:
    return lambda inputs, target: maps


def probability(model: nn.Module, image: Tensor, label: int) -> float:
    return float(model(image[None]).softmax(1)[0, label])


# --- drop and increase ---


def test_masked_confidence_by_hand(model: nn.Module, inputs: Tensor, target: Tensor) -> None:
    signed = torch.linspace(-2, 3, 3 * 2 * 42, dtype=torch.float64).reshape(3, 2, 6, 7)
    found = metrics.masked_confidence(model, fixed(signed), inputs, target)
    for index, label in enumerate(target.tolist()):
        mask = signed[index].sum(0).clamp(min=0)
        before = probability(model, inputs[index], label)
        after = probability(model, inputs[index] * (mask / mask.max() if mask.max() > 0 else mask), label)
        assert float(found.drop[index]) == pytest.approx(max(0.0, before - after) / before, rel=1e-12)
        assert float(found.increase[index]) == (after > before)


def test_masked_confidence_of_a_negative_map_is_that_of_nothing(
    model: nn.Module, inputs: Tensor, target: Tensor
) -> None:
    found = metrics.masked_confidence(model, fixed(-torch.ones(3, 1, 2, 2)), inputs, target)
    nothing = metrics.masked_confidence(model, fixed(torch.zeros(3, 1, 6, 7)), inputs, target)
    torch.testing.assert_close(found.after, nothing.after, rtol=0, atol=0)
    everything = metrics.masked_confidence(model, fixed(torch.ones(3, 1, 6, 7)), inputs, target)
    assert everything.drop.tolist() == everything.increase.tolist() == [0.0] * 3


class Extractor:
    """What torch-cam's metrics ask of an extractor; its maps are given."""

    def __init__(self, model: nn.Module, maps: Tensor) -> None:
        self.model, self.maps = model, maps

    def __call__(self, *_: object) -> list[Tensor]:
        return [self.maps[:, 0]]

    def fuse_cams(self, cams: list[Tensor]) -> Tensor:
        return cams[0]

    def _hooks_off(self) -> nullcontext[None]:
        return nullcontext()


def test_drop_and_increase_agree_with_torch_cam(model: nn.Module, inputs: Tensor, target: Tensor, maps: Tensor) -> None:
    peer = pytest.importorskip("torchcam.metrics").ClassificationMetric(
        Extractor(model, maps), lambda scores: scores.softmax(-1)
    )
    peer.update(inputs, target.tolist())
    found = metrics.masked_confidence(model, fixed(maps), inputs, target)
    expected = peer.summary()
    assert float(found.drop.mean()) == pytest.approx(expected["avg_drop"], rel=1e-5)  # it adds 1e-7 below the line
    assert float(found.increase.mean()) == pytest.approx(expected["conf_increase"])


def test_insertion_and_deletion_agree_with_torch_cam(
    model: nn.Module, inputs: Tensor, target: Tensor, maps: Tensor
) -> None:
    peer = pytest.importorskip("torchcam.metrics").DeletionInsertionMetric(
        Extractor(model, maps), lambda scores: scores.softmax(-1), steps=14
    )
    peer.update(inputs, target.tolist())
    options = {"steps": 14, "baseline": "zero"}  # 42 pixels: steps of three in both
    for name, metric in (("insertion_auc", metrics.insertion), ("deletion_auc", metrics.deletion)):
        area = metric(model, fixed(maps), inputs, target, **options).area
        assert float(area.mean()) == pytest.approx(peer.summary()[name], rel=1e-6)


# --- ROAD ---


def imputed_slowly(image: Tensor, hole: Tensor) -> Tensor:
    """One dense system, one equation a pixel."""
    height, width = hole.shape
    missing = [tuple(at) for at in hole.nonzero().tolist()]
    left = torch.zeros(len(missing), len(missing), dtype=torch.float64)
    right = torch.zeros(len(missing), len(image), dtype=torch.float64)
    for equation, (row, column) in enumerate(missing):
        for (down, across), weight in WEIGHTS.items():
            at = row + down, column + across
            if not (0 <= at[0] < height and 0 <= at[1] < width):
                continue
            left[equation, equation] += weight
            if at in missing:
                left[equation, missing.index(at)] -= weight
            else:
                right[equation] += weight * image[:, at[0], at[1]]
    filled = image.clone()
    for solution, (row, column) in zip(torch.linalg.solve(left, right), missing, strict=True):
        filled[:, row, column] = solution
    return filled


@pytest.mark.parametrize("band", [0, remove_and_debias._BAND], ids=["sparse", "band"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_imputation_solves_the_dense_system(
    share: float, band: int, inputs: Tensor, maps: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remove_and_debias, "_BAND", band)
    for image, one in zip(inputs, maps[:, 0], strict=True):
        hole = one > one.flatten().quantile(1 - share)
        torch.testing.assert_close(impute(image, hole), imputed_slowly(image, hole), rtol=1e-10, atol=1e-10)


def test_imputation_continues_a_slope_and_leaves_the_rest(inputs: Tensor) -> None:
    slope = torch.arange(7.0, dtype=torch.float64).expand(1, 6, 7)
    hole = torch.zeros(6, 7, dtype=torch.bool)
    hole[2:4, 2:5] = True
    torch.testing.assert_close(impute(slope, hole), slope)
    filled = impute(inputs[0], hole)
    torch.testing.assert_close(filled[:, ~hole], inputs[0][:, ~hole], rtol=0, atol=0)
    assert bool((filled[:, hole] != inputs[0][:, hole]).all())


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_road_by_hand(model: nn.Module, inputs: Tensor, target: Tensor, maps: Tensor, batch_size: int) -> None:
    found = metrics.road(model, fixed(maps), inputs, target, (0.25, 0.5), noise=0.0, batch_size=batch_size)
    for index, label in enumerate(target.tolist()):
        order = maps[index, 0].flatten().argsort(descending=True)
        for step, count in enumerate((10, 21)):  # a quarter and a half of 42 pixels
            for which, probabilities in ((order[:count], found.most), (order[-count:], found.least)):
                hole = torch.zeros(42, dtype=torch.bool)
                hole[which] = True
                expected = probability(model, imputed_slowly(inputs[index], hole.view(6, 7)), label)
                assert float(probabilities[index, step]) == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(found.fractions, torch.tensor([10 / 42, 0.5], dtype=torch.float64))
    torch.testing.assert_close(found.combined, ((found.least - found.most) / 2).mean(1))


def test_noise_falls_into_the_hole_and_is_drawn_from_the_generator(
    model: nn.Module, inputs: Tensor, target: Tensor, maps: Tensor
) -> None:
    def run(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return metrics.road(model, fixed(maps), inputs, target, noise=0.5, generator=generator).most

    torch.testing.assert_close(run(0), run(0), rtol=0, atol=0)
    assert bool((run(0) != run(1)).all())


@pytest.fixture
def wide(generator: torch.Generator) -> Tensor:
    """Images of 40 pixels, so that pytorch-grad-cam's percentiles name whole pixels."""
    return torch.randn(3, 3, 5, 8, generator=generator)


@pytest.fixture
def wide_maps(generator: torch.Generator) -> Tensor:
    """Maps without equal values."""
    return torch.stack([torch.randperm(40, generator=generator) / 39 for _ in range(3)]).view(3, 1, 5, 8)


@pytest.mark.filterwarnings("ignore")
def test_road_and_arcc_agree_with_pytorch_grad_cam(
    model: nn.Module, wide: Tensor, target: Tensor, wide_maps: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = pytest.importorskip("pytorch_grad_cam.metrics.arcc")
    single = model.float()
    with_softmax = nn.Sequential(single, nn.Softmax(-1))
    outputs = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    targets = [outputs.ClassifierOutputTarget(label) for label in target.tolist()]
    fractions = (0.2, 0.4, 0.6, 0.8)
    percentiles = [round(100 * fraction) for fraction in fractions]

    def attribute(inputs: Tensor, target: Tensor) -> Tensor:
        """A map that depends on the image, without equal values."""
        return wide_maps if torch.equal(inputs, wide) else inputs.abs().sum(1, keepdim=True)

    def again(input_tensor: Tensor, targets: object) -> np.ndarray:
        maps = input_tensor.abs().sum(1)
        return (maps / maps.amax((1, 2), keepdim=True)).numpy()

    found = metrics.road(single, attribute, wide, target, fractions, noise=0.0)
    parts = metrics.arcc(single, attribute, wide, target, fractions, noise=0.0)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "randn_like", torch.zeros_like)  # its noise cannot be switched off
        cams = wide_maps[:, 0].numpy()
        expected = peer.ROADCombined(percentiles)(wide, cams, targets, with_softmax)
        score = peer.ARCC(again, percentiles)(wide, cams, targets, with_softmax)
    np.testing.assert_allclose(found.combined.numpy(), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        parts.coherency.numpy(), peer.Coherency()(wide, cams, targets, with_softmax, again), atol=1e-5
    )
    np.testing.assert_allclose(parts.complexity.numpy(), peer.Complexity()(cams), rtol=1e-5)
    np.testing.assert_allclose(parts.score.numpy(), score, rtol=0, atol=1e-4)


# --- ARCC ---


def test_arcc_of_a_map_that_does_not_change(model: nn.Module, inputs: Tensor, target: Tensor, maps: Tensor) -> None:
    parts = metrics.arcc(model, fixed(maps), inputs, target, noise=0.0)
    torch.testing.assert_close(parts.coherency, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(parts.complexity, maps.mean((1, 2, 3)))
    road = metrics.road(model, fixed(maps), inputs, target, noise=0.0).combined
    torch.testing.assert_close(parts.road, (2 * road).clamp(min=0))
    for index in range(3):
        three = [1.0, float(1 - parts.complexity[index]), float(parts.road[index])]
        expected = 3 / sum(1 / part for part in three) if min(three) > 0 else 0.0
        assert float(parts.score[index]) == pytest.approx(expected)


def test_arcc_of_nothing_and_of_everything(model: nn.Module, inputs: Tensor, target: Tensor) -> None:
    nothing = metrics.arcc(model, fixed(torch.zeros(3, 1, 6, 7)), inputs, target)
    everything = metrics.arcc(model, fixed(torch.ones(3, 1, 6, 7)), inputs, target)
    assert (
        nothing.coherency.tolist() == everything.coherency.tolist() == [0.5] * 3
    )  # a constant correlates with nothing
    assert everything.score.tolist() == [0.0] * 3


@pytest.mark.parametrize("metric", [metrics.road, metrics.arcc])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fractions": ()}, r"fractions must be between 0 and 1, and leave at least one of 42 pixels; got \(\)"),
        ({"fractions": (0.5, 1.0)}, r"fractions must be between 0 and 1.*got \(0\.5, 1\.0\)"),
        ({"fractions": (0.001,)}, r"fractions must be between 0 and 1"),
        ({"batch_size": 0}, r"batch_size must be at least 1, got 0"),
    ],
)
def test_wrong_options(
    metric: object, options: dict[str, object], message: str, model: nn.Module, inputs: Tensor, target: Tensor
) -> None:
    with pytest.raises(ValueError, match=message):
        metric(model, fixed(inputs), inputs, target, **options)  # type: ignore[operator]


@pytest.mark.parametrize("metric", [metrics.masked_confidence, metrics.road, metrics.arcc])
def test_images_need_labels(metric: object, model: nn.Module, inputs: Tensor, target: Tensor) -> None:
    with pytest.raises(ValueError, match=r"inputs must have the shape \(N, C, H, W\), got \(3, 6, 7\). Use inputs"):
        metric(model, fixed(inputs), inputs[0], target)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"target must hold one label per image, \(3,\), got \(2,\)"):
        metric(model, fixed(inputs), inputs, target[:2])  # type: ignore[operator]
