"""What an audit says of the whole set: found where it was planted, and equal to a plain computation."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from captum_scoremap.audit import audit
from captum_scoremap.audit.analysis import analyze
from captum_scoremap.audit.concentration import border_share, peak, region_share, top_share
from captum_scoremap.audit.shards import Shards
from captum_scoremap.models import LoadedModel
from tests.audit_pictures import Digits

MARKED = 6


def train_on_digits(marked: int | None) -> nn.Module:
    """A small network that knows digits; where ``marked`` is given, it may know that label by its mark."""
    torch.manual_seed(0)
    data = Digits(0, 1200, marked)
    module = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(192, 10),
    )
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(module(data.images), data.labels).backward()
        optimizer.step()
    return module.eval()


@pytest.fixture(scope="module")
def shortcut_audit(tmp_path_factory):
    """Audit of a network that learned digits of which one label carries a mark in the corner."""
    model = LoadedModel("digits", train_on_digits(MARKED), labels=tuple(f"digit {label}" for label in range(10)))
    out = tmp_path_factory.mktemp("shortcut") / "out"
    return audit(Digits(1200, 1500, MARKED), model, out=out, layers=["1", "3", "4"], progress=False)


def test_a_planted_shortcut_ranks_first(shortcut_audit):
    first, second = shortcut_audit.analysis.labels[:2]
    assert first["label"] == MARKED
    assert first["shortcut"] > 1.25 * second["shortcut"]
    assert np.argmax(first["private_map"]) == 0  # the upper left corner
    assert first["private_map"][0] > 0.5 * first["private_share"]


def test_without_the_mark_that_label_is_one_of_many(tmp_path, shortcut_audit):
    model = LoadedModel("digits", train_on_digits(None))
    done = audit(Digits(1200, 1500), model, out=tmp_path, layers=["4"], progress=False)
    shortcut = {row["label"]: row["shortcut"] for row in done.analysis.labels}
    assert shortcut[MARKED] < 0.5 * shortcut_audit.analysis.labels[0]["shortcut"]


def test_numbers_of_labels_are_those_of_a_plain_computation(shortcut_audit):
    images = shortcut_audit.images.to_pylist()
    maps = {
        row["index"]: np.maximum(row["values"], 0)
        for row in Shards(shortcut_audit.folder).table("maps").to_pylist()
        if row["layer"] == "4" and row["role"] == "predicted"
    }
    units = {index: map_ / np.linalg.norm(map_) for index, map_ in maps.items()}
    cosines = np.array([[a @ b for b in units.values()] for a in units.values()])
    predicted = np.array([image["predicted"] for image in images])
    shares = np.array([map_ / map_.sum() for map_ in maps.values()])
    means = {label: shares[predicted == label].mean(0) for label in set(predicted)}
    for row in shortcut_audit.analysis.labels:
        mine = predicted == row["label"]
        within = cosines[np.ix_(mine, mine)]
        count = mine.sum()
        assert row["consistency"] == pytest.approx((within.sum() - count) / count / (count - 1))
        others = np.max([means[label] for label in means if label != row["label"]], axis=0)
        assert row["private_share"] == pytest.approx(np.maximum(means[row["label"]] - others, 0).sum())
        assert row["shortcut"] == pytest.approx(row["consistency"] * row["private_share"])
        true = [image for image in images if image["true"] == row["label"]]
        assert row["accuracy"] == pytest.approx(np.mean([image["correct"] for image in true]))
    for index, unusual in list(shortcut_audit.analysis.unusualness.items())[:20]:
        others = sum(units[i] for i in units if i != index and images[i]["predicted"] == images[index]["predicted"])
        cosine = units[index] @ others / np.linalg.norm(others)
        assert unusual == pytest.approx(1 - cosine, abs=1e-7)
    errors = sum(not image["correct"] for image in images)
    assert sum(pair["images"] for pair in shortcut_audit.analysis.pairs) == errors > 0
    assert shortcut_audit.analysis.summary["accuracy"] == pytest.approx(1 - errors / len(images))


def test_typical_and_unusual_are_the_ends_of_one_order(shortcut_audit):
    for row in shortcut_audit.analysis.labels:
        typical, unusual = (
            [shortcut_audit.analysis.unusualness[index] for index in row[name]] for name in ("typical", "unusual")
        )
        assert typical == sorted(typical)
        assert unusual == sorted(unusual, reverse=True)
        assert typical[0] <= unusual[0]


def test_analysis_is_on_disk(shortcut_audit):
    folder = shortcut_audit.folder / "analysis"
    labels = pq.read_table(folder / "labels.parquet").to_pylist()
    assert labels == list(shortcut_audit.analysis.labels)
    assert pq.read_table(folder / "unusualness.parquet").num_rows == len(shortcut_audit.analysis.unusualness)
    again = analyze(Shards(shortcut_audit.folder), shortcut_audit.settings["layers"])
    assert replace(again, findings=shortcut_audit.analysis.findings) == shortcut_audit.analysis


def test_maps_without_anything_positive_do_no_harm(tmp_path):
    module = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3))
    nn.init.zeros_(module[0].weight)
    nn.init.zeros_(module[0].bias)
    done = audit([image for image, _ in Digits(0, 5)], module.eval(), out=tmp_path, layers=["1"], progress=False)
    assert done.layers["border_share"].to_pylist() == [0.0] * 5
    assert done.analysis.unusualness == {}
    assert all(row["shortcut"] is None for row in done.analysis.labels)


@pytest.mark.parametrize("size", [(7, 7), (8, 5), (14, 14), (1, 1)])
def test_even_maps_have_the_shares_of_the_areas(size):
    maps = torch.ones(2, *size, dtype=torch.float64)
    torch.testing.assert_close(top_share(maps), torch.full((2,), 0.1, dtype=torch.float64))
    torch.testing.assert_close(border_share(maps), torch.full((2,), 0.36, dtype=torch.float64))
    region = torch.zeros(2, 40, 40)
    region[:, :, :10] = 1
    torch.testing.assert_close(region_share(maps, region), torch.full((2,), 0.25, dtype=torch.float64))


def test_shares_of_one_hot_cell():
    maps = torch.full((1, 10, 10), -5.0)
    maps[0, 0, 3] = 2
    assert top_share(maps).item() == pytest.approx(1)
    assert border_share(maps).item() == pytest.approx(1)
    assert [value.item() for value in peak(maps)] == pytest.approx([0.05, 0.35])
    assert border_share(-maps.abs()).item() == 0
