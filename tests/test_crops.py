"""Every search equals the same search done slowly, one rectangle at a time."""

import re
from itertools import combinations, product

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.testing import assert_close

from captum_scoremap.crops import score_map_crops

# Whole numbers: sums are exact, whatever their order.
whole_maps = st.tuples(st.integers(1, 7), st.integers(1, 7)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.integers(-9, 9).map(float))
)


def crops(values: np.ndarray, k: int = 1, **options: object) -> list[list[int]]:
    """Boxes on the map's own cells."""
    score_map = torch.from_numpy(values)[None, None]
    boxes = score_map_crops(score_map, values.shape, k, interpolate_mode="nearest", **options)
    assert boxes.shape == (1, k, 4)
    return boxes[0].tolist()


def most_crops(values: np.ndarray, k: int, **options: object) -> list[list[int]]:
    """Up to k boxes: as many as the error says there are, if there are fewer."""
    try:
        return crops(values, k, **options)
    except ValueError as error:
        (count,) = re.findall(r"^k must be at most (\d+), got", str(error))
        return crops(values, int(count), **options) if int(count) else []


def total(values: np.ndarray, box: list[int]) -> float:
    x0, y0, x1, y1 = box
    return float(values[y0:y1, x0:x1].sum())


def all_boxes(height: int, width: int) -> list[list[int]]:
    rows, columns = combinations(range(height + 1), 2), list(combinations(range(width + 1), 2))
    return [[x0, y0, x1, y1] for (y0, y1), (x0, x1) in product(rows, columns)]


def overlap(one: list[int], other: list[int]) -> float:
    inside = max(0, min(one[2], other[2]) - max(one[0], other[0])) * max(
        0, min(one[3], other[3]) - max(one[1], other[1])
    )
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return inside / (areas - inside)


@settings(deadline=None)
@given(whole_maps, st.sampled_from([None, "positive", "all"]), st.data())
def test_window_equals_brute_force(values: np.ndarray, sign: str | None, data: st.DataObject) -> None:
    rows, columns = (data.draw(st.integers(1, side)) for side in values.shape)
    counted = values if sign == "all" else values.clip(min=0)
    windows = [b for b in all_boxes(*values.shape) if (b[3] - b[1], b[2] - b[0]) == (rows, columns)]
    best = max(total(counted, b) for b in windows)
    if best <= 0 and sign != "all":
        with pytest.raises(ValueError, match="k must be at most 0, got 1: image 0 has no more regions"):
            crops(values, size=(rows, columns), sign=sign)
    else:
        (box,) = crops(values, size=(rows, columns), sign=sign)
        assert box in windows
        assert total(counted, box) == best


def above(values: np.ndarray, threshold: float | None) -> np.ndarray:
    return values - (max(values.mean(), 0) if threshold is None else threshold * values.max())


@settings(deadline=None)
@given(whole_maps, st.sampled_from([None, 0.0, 0.5]))
def test_box_equals_brute_force(values: np.ndarray, threshold: float | None) -> None:
    counted = above(values, threshold)
    best = max(total(counted, box) for box in all_boxes(*values.shape))
    if best < 1e-9:
        with pytest.raises(ValueError, match=r"k must be at most 0, got 1: image 0 has no more regions"):
            crops(values, threshold=threshold)
    else:
        assert total(counted, crops(values, threshold=threshold)[0]) == pytest.approx(best, abs=1e-9)


@settings(deadline=None)
@given(whole_maps, st.sampled_from([0.5, 1.0, 1.6, 3.0]))
def test_box_of_one_aspect_equals_brute_force(values: np.ndarray, aspect: float) -> None:
    fitting = [box for box in all_boxes(*values.shape) if box[2] - box[0] == max(1, round((box[3] - box[1]) * aspect))]
    best = max((total(values, box) for box in fitting), default=0.0)
    if best <= 0:
        with pytest.raises(ValueError, match="k must be at most 0"):
            crops(values, aspect=aspect, threshold=0.0)
    else:
        (box,) = crops(values, aspect=aspect, threshold=0.0)
        assert box in fitting
        assert total(values, box) == best


@settings(deadline=None)
@given(whole_maps, st.integers(2, 4))
def test_further_boxes_are_the_best_disjoint_ones(values: np.ndarray, k: int) -> None:
    remaining = all_boxes(*values.shape)
    for box in most_crops(values, k, threshold=0.0):
        assert total(values, box) == max(total(values, other) for other in remaining)
        remaining = [other for other in remaining if overlap(box, other) == 0]
        k -= 1
    assert k == 0 or max((total(values, box) for box in remaining), default=0) <= 0


@settings(deadline=None)
@given(whole_maps, st.integers(1, 4), st.sampled_from([0.0, 0.2, 0.5]))
def test_further_windows_are_the_best_that_overlap_little(values: np.ndarray, k: int, max_overlap: float) -> None:
    size = tuple((side + 1) // 2 for side in values.shape)
    counted = values.clip(min=0)
    remaining = [b for b in all_boxes(*values.shape) if (b[3] - b[1], b[2] - b[0]) == size]
    for box in most_crops(values, k, size=size, max_overlap=max_overlap):
        assert total(counted, box) == max(total(counted, other) for other in remaining)
        remaining = [other for other in remaining if overlap(box, other) <= max_overlap]
        k -= 1
    assert k == 0 or max((total(counted, box) for box in remaining), default=0) <= 0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16))
def test_interpolated_float_maps_equal_brute_force(seed: int) -> None:
    score_map = torch.randn(3, 1, 3, 4, generator=torch.Generator().manual_seed(seed))
    maps = torch.nn.functional.interpolate(score_map.double(), (9, 7), mode="bilinear")[:, 0].numpy()
    assume(bool((maps.max((1, 2)) > 0).all()))  # there is a crop
    boxes = score_map_crops(score_map, (9, 7), threshold=0.0)[:, 0].tolist()
    windows = score_map_crops(score_map, (9, 7), size=(4, 3))[:, 0].tolist()
    for values, box, window in zip(maps, boxes, windows, strict=True):
        every = all_boxes(9, 7)
        assert total(values, box) == pytest.approx(max(total(values, b) for b in every), abs=1e-12)
        fitting = [b for b in every if (b[3] - b[1], b[2] - b[0]) == (4, 3)]
        best = max(total(values.clip(0), b) for b in fitting)
        assert total(values.clip(0), window) == pytest.approx(best, abs=1e-12)


# Two regions above a fifth of the maximum; the larger is the weaker one. Between 0.15 and 0.2 they touch.
REGIONS = np.array([
    [10.0, 9.0, 1.7, 3.0, 3.0],
    [0.0, 0.0, 0.0, 3.0, 3.0],
    [-4.0, 0.0, 0.0, 0.0, 3.0],
])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 0, 5, 3]),  # Grad-CAM: more than 1.5
        ({"threshold": 0.2}, [3, 0, 5, 3]),  # CAM: more than 2
        ({"quantile": 0.8}, [0, 0, 2, 1]),  # more than 3: the fourth largest of 15 values
    ],
)
def test_component_is_the_largest_region_above_the_threshold(options: dict[str, float], expected: list[int]) -> None:
    assert crops(REGIONS, rule="component", **options) == [expected]


def test_components_are_returned_by_area() -> None:
    assert crops(REGIONS, 2, rule="component", threshold=0.2) == [[3, 0, 5, 3], [0, 0, 2, 1]]


def test_components_whose_frames_overlap_give_way() -> None:
    frame_and_dot = np.ones((5, 5))
    frame_and_dot[1:4, 1:4] = 0
    frame_and_dot[2, 2] = 1
    with pytest.raises(ValueError, match="k must be at most 1, got 2: image 0 has no more regions"):
        crops(frame_and_dot, 2, rule="component")
    assert crops(frame_and_dot, 2, rule="component", max_overlap=0.1) == [[0, 0, 5, 5], [2, 2, 3, 3]]


def test_window_may_count_what_takes_from_the_score() -> None:
    values = np.array([[5.0, -9.0, 2.0, 1.0]])
    assert crops(values, size=(1, 2)) == [[0, 0, 2, 1]]
    assert crops(values, size=(1, 2), sign="all") == [[2, 0, 4, 1]]


def test_threshold_makes_a_box_tighter() -> None:
    values = np.array([[1.0, 1.0, 10.0, 1.0]])
    assert crops(values, threshold=0.0) == [[0, 0, 4, 1]]
    assert crops(values) == [[2, 0, 3, 1]]
    assert crops(values, threshold=0.2) == [[2, 0, 3, 1]]
    assert crops(values, quantile=0.5) == [[2, 0, 3, 1]]


@pytest.mark.parametrize("options", [{"size": 3}, {}, {"aspect": 1.0}, {"rule": "component"}])
def test_a_batch_equals_its_images(options: dict[str, object]) -> None:
    score_map = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = score_map_crops(score_map, (13, 17), **options)
    parts = [score_map_crops(one[None], (13, 17), **options) for one in score_map]
    assert whole.dtype == torch.long
    assert_close(whole, torch.cat(parts))


def test_scale_does_not_matter() -> None:
    score_map = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for options in ({"size": 3}, {}, {"aspect": 1.0}, {"rule": "component"}):
        boxes = [score_map_crops(score_map * scale, (8, 8), **options) for scale in (1.0, 2.0**-60, 2.0**60)]
        assert_close(boxes[1], boxes[0])
        assert_close(boxes[2], boxes[0])


def test_leaves_the_score_map_as_it_was() -> None:
    score_map = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    before = score_map.detach().clone()
    score_map_crops(score_map, (4, 4), 2, interpolate_mode="nearest")
    assert_close(score_map.detach(), before, rtol=0, atol=0)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_map_that_adds_nothing_has_regions_of_both_signs_only(value: float) -> None:
    score_map = torch.full((1, 1, 7, 7), value)
    assert score_map_crops(score_map, (64, 64), size=32, sign="all").shape == (1, 1, 4)
    for options in ({}, {"aspect": 1.0}, {"rule": "component", "threshold": 0.0}, {"size": 32}):
        with pytest.raises(ValueError, match=r"k must be at most 0, got 1: image 0 .* Use sign='all'"):
            score_map_crops(score_map, (64, 64), **options)


def test_rounding_errors_are_no_box() -> None:
    score_map = torch.zeros(1, 1, 7, 7)
    score_map[0, 0, 2, 3] = 1 / 3
    for options in ({"threshold": 0.0}, {"size": 32}):
        with pytest.raises(ValueError, match="k must be at most 1, got 2"):
            score_map_crops(score_map, (96, 96), 2, **options)
    with pytest.raises(ValueError, match=r"k must be at most 0, got 1: .* a lower threshold"):
        score_map_crops(torch.full((1, 1, 7, 7), 1 / 3), (96, 96))  # nowhere more than on average


@pytest.mark.parametrize(
    ("score_map", "error", "message"),
    [
        (np.zeros((1, 1, 4, 4)), TypeError, r"score_map must be a tensor, got ndarray"),
        (torch.zeros(4, 4), ValueError, r"score_map must be one map an image, \(N, 1, h, w\), got \(4, 4\)"),
        (torch.zeros(1, 3, 4, 4), ValueError, r"got \(1, 3, 4, 4\)\. Sum the channels"),
        (torch.zeros(0, 1, 4, 4), ValueError, r"got \(0, 1, 4, 4\)"),
        (torch.full((1, 1, 4, 4), torch.nan), ValueError, r"score_map must be finite, got NaN"),
        (torch.full((1, 1, 4, 4), torch.inf), ValueError, r"score_map must be finite, got NaN or infinite"),
    ],
)
def test_bad_score_map(score_map: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        score_map_crops(score_map, (8, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 9}, r"size must be from 1 to the image's \(8, 8\), got \(9, 9\)"),
        ({"size": (4, 0)}, r"got \(4, 0\)"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"k": 5, "size": 4}, "k must be at most [1-4], got 5: .* sign='all' or a larger max_overlap"),
        ({"rule": "best"}, "rule must be one of 'window', 'box', 'component', got 'best'"),
        ({"rule": "window"}, "size must be given for rule 'window'"),
        ({"size": 4, "sign": "negative"}, "sign must be 'positive' or 'all', got 'negative'"),
        ({"rule": "box", "sign": "all"}, "sign must be left out for rule 'box'"),
        ({"rule": "box", "size": 4}, "size must be left out for rule 'box'"),
        ({"size": 4, "aspect": 1.0}, "aspect must be left out for rule 'window'"),
        ({"size": 4, "threshold": 0.1}, "threshold must be left out for rule 'window'"),
        ({"rule": "component", "aspect": 1.0}, "aspect must be left out for rule 'component'"),
        ({"aspect": 0.0}, "aspect must be a positive number, got 0.0"),
        ({"threshold": 1.0}, "threshold must be a fraction of the maximum, 0 to 1, got 1.0"),
        ({"threshold": -0.1}, "threshold must be a fraction of the maximum"),
        ({"quantile": 1.5}, "quantile must be from 0 to 1, got 1.5"),
        ({"threshold": 0.1, "quantile": 0.5}, "threshold must be left out where quantile is given"),
        ({"max_overlap": 1.0, "size": 4}, "max_overlap must be an intersection over union, 0 to 1, got 1.0"),
        ({"max_overlap": 0.5}, "max_overlap must be 0 for rule 'box'"),
        ({"image_size": (8, 0)}, r"image_size must be rows and columns in pixels, got \(8, 0\)"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    score_map = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=message):
        score_map_crops(score_map, **{"image_size": (8, 8), **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 3.5}, "size must be rows and columns in whole pixels, got 3.5"),
        ({"size": (3, 4, 5)}, r"size must be rows and columns in whole pixels, got \(3, 4, 5\)"),
        ({"interpolate_mode": "cubic"}, "interpolate_mode must be one of bilinear, .*, got 'cubic'"),
    ],
)
def test_sizes_and_modes_that_are_none(options: dict[str, object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        score_map_crops(torch.rand(1, 1, 4, 4), (16, 16), **options)


def test_sizes_in_every_form() -> None:
    maps = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = score_map_crops(maps, (16, 16), size=(8, 8))
    for image_size, size in ((16, 8), (torch.Size([16, 16]), np.int64(8)), (np.array([16, 16]), torch.tensor(8))):
        assert score_map_crops(maps, image_size, size=size).equal(expected)
