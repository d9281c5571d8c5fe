"""A compiled audit: the same numbers but for rounding, whatever batches come; as it is where it cannot be compiled."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from captum_scoremap.audit import audit, compiling
from captum_scoremap.audit.compiling import Explainer
from captum_scoremap.audit.explaining import Explained, MapLayer, explain
from captum_scoremap.compiled import batches
from tests.audit_pictures import tiny_model, write_digits
from tests.test_audit_run import QUICK, rows


@pytest.fixture(autouse=True)
def _graphs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What compiles is tested elsewhere, and takes its time."""
    monkeypatch.setattr(compiling, "_BACKEND", "graph")


LAYERS = (MapLayer("1"), MapLayer("3"))


@pytest.fixture
def model(generator: torch.Generator) -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU6(), nn.Flatten(), nn.Linear(8 * 64, 5)
    )
    return network.double().eval()


def same(found: Explained, expected: Explained) -> None:
    assert_close(vars(found), vars(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["score", "complete"])
@pytest.mark.parametrize("labeled", [True, False])
def test_every_batch_has_the_numbers_it_has_without_compiling(
    model: nn.Module, kind: str, labeled: bool, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def batch(count: int, side: int = 12) -> tuple[Tensor, Tensor]:
        images = torch.randn(count, 3, side, side, generator=generator, dtype=torch.float64)
        labels = torch.randint(5 if labeled else 1, (count,), generator=generator)
        return images, labels if labeled else labels - 1

    calls = []
    monkeypatch.setattr(compiling, "explain", lambda *rest: calls.append(1) or explain(*rest))
    explainer = Explainer(model, LAYERS, LAYERS[:1], kind, 4)
    for count in (2, 4):  # not yet, and now
        images, labels = batch(count)
        same(explainer(images, labels), explain(model, LAYERS, images, labels, LAYERS[:1], kind))
    calls.clear()
    for count in (4, 1, 3, 4):
        images, labels = batch(count)
        same(explainer(images, labels), explain(model, LAYERS, images, labels, LAYERS[:1], kind))
        mixed = torch.where(torch.arange(count) % 2 == 0, labels, -1)
        same(explainer(images, mixed), explain(model, LAYERS, images, mixed, LAYERS[:1], kind))
    assert not calls
    images, _ = batch(2)
    labels = torch.tensor([1, -1])
    same(explainer(images, labels), explain(model, LAYERS, images, labels, LAYERS[:1], kind))
    assert len(calls) == (0 if labeled else 1)  # a role more than was compiled
    with pytest.raises(ValueError, match="labels must be less than 5"):
        explainer(images, torch.tensor([7, 0]))


def test_an_audit_says_that_it_compiles_and_gives_the_same_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_digits(tmp_path / "in", 22, by_label=True)
    options: dict[str, Any] = {**QUICK, "progress": True, "layers": ["1", "4"]}
    eager = audit(tmp_path / "in", tiny_model(), out=tmp_path / "eager", **options)
    assert "compiled" not in capsys.readouterr().err
    done = audit(tmp_path / "in", tiny_model(), out=tmp_path / "compiled", compile_maps=True, **options)
    assert (
        "maps are compiled first, which takes a minute or more; --no-compile leaves it out" in capsys.readouterr().err
    )
    assert (eager.settings["compiled"], done.settings["compiled"]) == (False, True)
    for table in ("images", "layers", "maps"):
        for one, other in zip(rows(done.folder, table), rows(eager.folder, table), strict=True):
            assert one.keys() == other.keys()
            for key, value in one.items():
                is_number = isinstance(value, float) or key == "values"
                assert value == (pytest.approx(other[key], rel=1e-4, abs=1e-5) if is_number else other[key])


def test_what_cannot_be_compiled_is_explained_as_it_is_with_one_sentence(generator: torch.Generator) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(8 * 16, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).relu()
            found: Tensor = self.linear((y * 2 if y.sum() > 0 else y).flatten(1))
            return found

    model = Branches().eval()
    images, labels = torch.randn(4, 3, 6, 6, generator=generator), torch.tensor([0, 1, 2, -1])
    explainer = Explainer(model, (MapLayer("conv"),), (), "score", 4)
    with pytest.warns(
        UserWarning, match="maps are computed without compiling them, which takes longer: the map must not"
    ):
        found = explainer(images, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = explainer(images, labels)
    for one in (found, again):
        same(one, explain(model, (MapLayer("conv"),), images, labels))


def test_only_large_audits_are_compiled_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_digits(tmp_path / "in", 9)
    traced = []
    monkeypatch.setattr(batches, "trace", lambda *rest, trace=batches.trace: traced.append(1) or trace(*rest))
    audit(tmp_path / "in", tiny_model(), out=tmp_path / "few", **QUICK)
    assert not traced
    monkeypatch.setattr("captum_scoremap.audit.run.ENOUGH", 9)
    audit(tmp_path / "in", tiny_model(), out=tmp_path / "many", **QUICK)
    assert traced == [1]
    audit(tmp_path / "in", tiny_model(), out=tmp_path / "not", compile_maps=False, **QUICK)
    assert traced == [1]


def test_a_single_score_is_compiled_whatever_the_labels(generator: torch.Generator) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 1)).double().eval()
    images = torch.randn(4, 3, 6, 6, generator=generator, dtype=torch.float64)
    explainer = Explainer(model, LAYERS[:1], (), "score", 4)
    for labels in (torch.tensor([0, 3, -1, 9]), torch.full((4,), -1)):
        for _ in range(2):
            same(explainer(images, labels), explain(model, LAYERS[:1], images, labels))
    assert explainer._batches is not None
