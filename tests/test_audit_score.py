"""An audit of what a function makes of a model's output: scores of labels, or one number an image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from captum_scoremap import linear_form
from captum_scoremap.audit import audit
from captum_scoremap.audit.shards import Shards
from captum_scoremap.cli import main
from captum_scoremap.models import LoadedModel
from tests.audit_pictures import write_digits

QUICK = {"progress": False, "batch_size": 4, "shard_size": 8}


class TwoHeads(nn.Module):
    """Returns logits of four labels and an age by name, or as a pair."""

    def __init__(self, *, named: bool = True) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        self.label, self.age = nn.Linear(432, 4), nn.Linear(432, 1)
        self.named = named

    def forward(self, x: Tensor) -> object:
        y = self.features(x)
        return {"label": self.label(y), "age": self.age(y)} if self.named else (self.label(y), self.age(y))


class Labels(TwoHeads):
    """The logits alone."""

    def forward(self, x: Tensor) -> Tensor:
        return self.label(self.features(x))


def age(output: dict[str, Tensor]) -> Tensor:
    return output["age"][:, 0]


def label(output: dict[str, Tensor]) -> Tensor:
    return output["label"]


def build() -> TwoHeads:
    torch.manual_seed(0)
    return TwoHeads().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(12, 3, 14, 14, generator=torch.Generator().manual_seed(1))


def of_all(folder, table):
    found = Shards(folder).table(table)
    return found.drop_columns([name for name in ("seconds",) if name in found.column_names]).to_pylist()


@pytest.mark.parametrize("prepare_model", [True, False])
@pytest.mark.parametrize("maps", ["score", "complete"])
def test_one_number_an_image_is_explained_exactly(tmp_path, images, maps, prepare_model):
    model = build()
    done = audit(
        [(image, 1) for image in images], model, out=tmp_path / "out", score=age, maps=maps,
        prepare_model=prepare_model, **QUICK,
    )  # fmt: skip
    with torch.no_grad():
        expected = model(images)["age"][:, 0].tolist()
    rows = done.images.to_pylist()
    assert [row["score"] for row in rows] == pytest.approx(expected, abs=1e-5)
    assert {(row["predicted"], row["predicted_label"]) for row in rows} == {(0, "age")}
    for name in ("runner_up", "probability", "contrast", "true", "correct"):
        assert {row[name] for row in rows} == {None}
    assert {row["role"] for row in of_all(done.folder, "maps")} == {"predicted"}
    layer = done.settings["layers"][-1]
    form = linear_form(model, images, age, model.get_submodule(layer))
    if maps == "score":
        values = torch.tensor([row["values"] for row in of_all(done.folder, "maps") if row["layer"] == layer])
        torch.testing.assert_close(values, form.score_map().flatten(1).detach(), rtol=1e-3, atol=1e-5)
    assert max(row["residual"] for row in done.layers.to_pylist()) < 1e-5
    assert done.analysis.findings == []
    assert done.report.is_file()
    assert model(images)["age"].shape == (12, 1)  # the user's model is as before


def test_one_number_an_image_has_no_probability_to_be_measured(tmp_path, images):
    with pytest.raises(ValueError, match=r"metrics must be left out of an audit of one score.* got insertion"):
        audit(images, build(), out=tmp_path / "out", score=age, metrics=["insertion"], **QUICK)
    assert not (tmp_path / "out").exists()


def test_scores_of_labels_are_audited_as_those_of_a_plain_model(tmp_path, images):
    torch.manual_seed(0)
    plain = Labels().eval()
    data = [(image, place % 4) for place, image in enumerate(images)]
    names = ("a", "b", "c", "d")
    done = audit(data, LoadedModel("m", build(), labels=names), out=tmp_path / "scored", score=label, **QUICK)
    other = audit(data, LoadedModel("m", plain, labels=names), out=tmp_path / "plain", **QUICK)
    for table in ("images", "layers", "maps", "scores"):
        assert of_all(done.folder, table) == of_all(other.folder, table)


class Number(nn.Module):
    """One number an image, under no name."""

    def __init__(self):
        super().__init__()
        self.inner = build()

    def forward(self, x):
        return self.inner(x)["age"][:, 0]


def test_a_model_of_one_number_needs_no_function(tmp_path, images):
    done = audit(list(images), Number(), out=tmp_path, **QUICK)
    with torch.no_grad():
        expected = Number()(images).tolist()
    rows = done.images.to_pylist()
    assert [row["score"] for row in rows] == pytest.approx(expected, abs=1e-5)
    assert {(row["predicted_label"], row["probability"]) for row in rows} == {("score", None)}


def test_runs_of_one_number_are_compared(tmp_path, images):
    audit(list(images), build(), out=tmp_path / "before", score=age, **QUICK)
    done = audit(list(images + 1), build(), out=tmp_path / "now", score=age, compare_with=tmp_path / "before", **QUICK)
    (change,) = done.analysis.changes
    with torch.no_grad():
        expected = (build()(images + 1)["age"] - build()(images)["age"]).mean().item()
    assert change["name"] == "age"
    assert change["change"] == pytest.approx(expected, abs=1e-5)


def test_another_score_is_another_audit(tmp_path, images):
    audit(list(images), build(), out=tmp_path, score=age, **QUICK)
    audit(list(images), build(), out=tmp_path, score=age, resume=True, **QUICK)
    with pytest.raises(ValueError, match=r"other values of model \(labels\), score \(name, code\)"):
        audit(list(images), build(), out=tmp_path, score=label, resume=True, **QUICK)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(ValueError, match="another score"):
        audit(list(images), build(), out=tmp_path / "elsewhere", score=label, compare_with=tmp_path, **QUICK)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda output: output["age"].sum(), r"score must return .* \(N, K\) or \(N,\), got \(\)"),
        (lambda output: output, "got dict"),
        (lambda output: output["label"].argmax(1), "got .* of torch.int64"),
        (None, "Name a score"),
    ],
)
def test_what_is_no_score_is_an_error(tmp_path, images, score, message):
    with pytest.raises(ValueError, match=message):
        audit(list(images), build(), out=tmp_path, score=score, **QUICK)


def test_the_command_line_takes_a_function(tmp_path, capsys):
    write_digits(tmp_path / "in", 8)
    arguments = ["audit", str(tmp_path / "in"), "--model", "tests.test_audit_score:build", "--image-size", "14"]
    arguments += ["--out", str(tmp_path / "out"), "--score", "tests.test_audit_score:age"]
    assert main(arguments) in {0, None}
    assert "8 images audited, 0 not." in capsys.readouterr().out
    assert {row["predicted_label"] for row in of_all(tmp_path / "out", "images")} == {"age"}
