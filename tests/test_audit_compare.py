"""Two audits side by side: the label that gained, by how much, and where."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from captum_scoremap.audit import audit
from captum_scoremap.audit.shards import Shards
from captum_scoremap.models import LoadedModel

GAINER = 2


def network() -> nn.Module:
    """Label 2 counts bright 2 x 2 squares; the others are noise."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(8), nn.Flatten())
    head = nn.Linear(8 * 64, 6)
    with torch.no_grad():
        module[0].weight[0] = 0
        module[0].weight[0, :, :2, :2] = 1
        module[0].bias[0] = -3
        head.weight.mul_(0.1)
        head.weight[:, :64] = 0
        head.weight[GAINER, :64] = 5
    return nn.Sequential(*module, head).eval()


def images(marked: bool) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    found = [0.5 * torch.rand(1, 16, 16, generator=rng) for _ in range(20)]
    if marked:
        for image in found:
            image[:, 10:12, 3:5] = 1
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    model = LoadedModel("squares", network(), labels=tuple("abcdef"))
    before = audit(images(False), model, out=folder / "before", layers=["1"], progress=False)
    after = audit(
        images(True), model, out=folder / "after", layers=["1"], progress=False, compare_with=folder / "before"
    )
    return model, before, after


def test_the_label_that_gained_comes_first(runs):
    model, _, after = runs
    first = after.analysis.changes[0]
    assert (first["label"], first["name"], first["confident"]) == (GAINER, "c", True)
    with torch.no_grad():
        plain, marked = (model.module(torch.stack(images(some))).double().mean(0) for some in (False, True))
    for one in after.analysis.changes:
        assert one["change"] == pytest.approx(float((marked - plain)[one["label"]]), abs=1e-5)
        assert one["before"] == pytest.approx(float(plain[one["label"]]), abs=1e-5)
    changes = [one["change"] for one in after.analysis.changes]
    assert changes == sorted(changes, reverse=True)
    assert len(changes) == 6


def test_patches_show_what_did_it(runs):
    first = runs[2].analysis.changes[0]
    assert len(first["patches"]) == 8
    for patch in first["patches"]:
        assert abs(patch["row"] - 11.5 / 16) < 0.1
        assert abs(patch["column"] - 4.5 / 16) < 0.1
    assert first["channels"][0]["channel"] == 0


def test_scores_of_all_labels_are_kept_and_changes_are_on_disk_and_page(runs):
    model, before, after = runs
    table = Shards(before.folder).table("scores")
    with torch.no_grad():
        expected = model.module(torch.stack(images(False)))
    np.testing.assert_allclose(np.stack(table["scores"].to_pylist()), expected.numpy(), rtol=1e-4, atol=1e-5)
    kept = json.loads((after.folder / "analysis" / "changes.json").read_text(encoding="utf-8"))
    assert kept == {"other": "before", "changes": after.analysis.changes}
    assert "Changes against the other run" in after.report.read_text(encoding="utf-8")
    assert "Changes against the other run" not in before.report.read_text(encoding="utf-8")


def test_the_same_images_have_not_changed(runs, tmp_path):
    model, before, _ = runs
    again = audit(images(False), model, out=tmp_path / "a", layers=["1"], progress=False, compare_with=before.folder)
    assert not any(one["confident"] or abs(one["change"]) > 1e-9 for one in again.analysis.changes)


def test_what_cannot_be_compared_is_refused_before_any_work(runs, tmp_path):
    model, before, _ = runs
    with pytest.raises(ValueError, match="compare must be the folder of another audit"):
        audit(images(False), model, out=tmp_path / "a", progress=False, compare_with=tmp_path)
    torch.manual_seed(5)
    other = LoadedModel("other", nn.Sequential(*network()[:-1], nn.Linear(512, 6)).eval())
    with pytest.raises(ValueError, match="audit of the same model"):
        audit(images(False), other, out=tmp_path / "b", progress=False, compare_with=before.folder)
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda run: (run / "audit.json").write_text("{"),
            "of a whole audit, got '.*before', whose audit.json cannot be",
        ),
        (lambda run: (run / "audit.json").write_text(""), "whose audit.json cannot be read"),
        (lambda run: (run / "audit.json").write_text("[1]"), "whose audit.json cannot be read"),
        (lambda run: (run / "audit.json").write_bytes(b"\xff"), "whose audit.json cannot be read"),
        (lambda run: (run / "scores" / "00000.parquet").write_bytes(b"PAR1"), "got scores/00000.parquet in '.*before'"),
        (lambda run: (run / "scores" / "00000.parquet").unlink(), "in '.*before', which is missing. Go on with that"),
        (lambda run: (run / "images" / "00000.parquet").unlink(), "must be an audit of some images, got '.*before'"),
    ],
)
def test_a_damaged_run_is_refused_before_any_work_and_resume_mends_it(runs, tmp_path, harm, message):
    model, before, _ = runs
    other = tmp_path / "before"
    shutil.copytree(before.folder, other)
    harm(other)
    same = {"layers": ["1"], "progress": False}
    with pytest.raises(ValueError, match=message):
        audit(images(True), model, out=tmp_path / "after", compare_with=other, **same)
    assert not (tmp_path / "after").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of what was damaged
        audit(images(False), model, out=other, resume=True, **same)
    done = audit(images(True), model, out=tmp_path / "after", compare_with=other, **same)
    assert done.analysis.changes[0]["label"] == GAINER
