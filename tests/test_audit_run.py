"""An audit ends with the same tables whatever happens on the way."""

import errno
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

from captum_scoremap.audit import TABLES, audit, open_source
from captum_scoremap.audit.explaining import map_layers
from captum_scoremap.audit.plan import Plan
from captum_scoremap.audit.progress import Progress
from captum_scoremap.audit.shards import Shards, write_whole
from captum_scoremap.audit.worker import Worker
from captum_scoremap.models import LoadedModel, read_image
from tests.audit_pictures import Digits, tiny_model, write_digits, write_odd_files
from tests.programs import needs_fork, resume, start

QUICK = {"progress": False, "batch_size": 4, "shard_size": 8}


def rows(folder: Path, table: str) -> list[dict]:
    """The rows of a table without the times, which differ from run to run."""
    found = Shards(folder).table(table)
    return found.drop_columns([name for name in ("seconds",) if name in found.column_names]).to_pylist()


def test_tables_have_the_documented_columns(tmp_path):
    write_digits(tmp_path / "in", 10, by_label=True)
    done = audit(tmp_path / "in", tiny_model(), out=tmp_path / "out", **QUICK)
    for name, schema in TABLES.items():
        assert Shards(done.folder).table(name).schema.equals(schema)
        for field in schema:
            assert field.metadata[b"description"]
    assert done.images.num_rows == 10
    assert done.layers.num_rows == 10 * len(done.settings["layers"])


def test_numbers_are_those_of_the_model(tmp_path):
    write_digits(tmp_path / "in", 9, by_label=True)
    loaded = tiny_model()
    done = audit(tmp_path / "in", loaded, out=tmp_path / "out", layers=["1", "4"], **QUICK)
    maps = {(row["index"], row["layer"], row["role"]): row for row in rows(done.folder, "maps")}
    layers = {(row["index"], row["layer"]): row for row in rows(done.folder, "layers")}
    for row in done.images.to_pylist():
        scores = loaded.module(loaded.preprocessing(read_image(tmp_path / "in" / row["name"]))[None])[0]
        best = scores.topk(2).indices.tolist()
        assert [row["predicted"], row["runner_up"]] == best
        assert row["score"] == pytest.approx(scores[best[0]].item(), abs=1e-5)
        assert row["contrast"] == pytest.approx((scores[best[0]] - scores[best[1]]).item(), abs=1e-5)
        assert row["true_label"] == row["name"].partition("/")[0]
        assert row["correct"] == (row["true"] == row["predicted"])
        last = maps[row["index"], "4", "predicted"]
        ((x0, y0, x1, y1),) = row["crops"]
        cells = np.reshape(last["values"], (last["rows"], last["columns"]))
        step = 32 // last["rows"]
        assert cells[y0 // step : y1 // step, x0 // step : x1 // step].sum() >= cells.max() > 0
        for layer in ("1", "4"):
            numbers = layers[row["index"], layer]
            values = maps[row["index"], layer, "predicted"]["values"]
            assert sum(values) == pytest.approx(numbers["sub_scores"], abs=1e-4)
            assert numbers["sub_scores"] + numbers["bias"] == pytest.approx(row["score"], abs=1e-4)
            assert numbers["residual"] < 1e-4


def test_how_much_of_the_score_lies_in_a_given_box_or_mask(tmp_path):
    write_digits(tmp_path, 4)
    names = [f"{place:04d}.png" for place in range(4)]
    boxes = [(0, 0, 32, 32), (0, 0, 16, 8), (8, 8, 24, 32), (17, 3, 30, 29)]
    (tmp_path / "boxes.csv").write_text(
        "path,x0,y0,x1,y1\n"
        + "".join(f"{name},{','.join(map(str, box))}\n" for name, box in zip(names, boxes, strict=True))
    )
    (tmp_path / "masks").mkdir()
    for name, box in zip(names, boxes, strict=True):
        mask = Image.new("L", (32, 32))
        mask.paste(255, box)
        mask.save(tmp_path / "masks" / name)
    (tmp_path / "masks.csv").write_text("path,mask\n" + "".join(f"{name},masks/{name}\n" for name in names))
    found = {}
    for given in ("boxes", "masks"):
        done = audit(tmp_path / f"{given}.csv", tiny_model(), out=tmp_path / given / "out", layers=["1", "4"], **QUICK)
        found[given] = rows(done.folder, "layers")
    assert found["boxes"] == found["masks"]
    maps = {(row["index"], row["layer"], row["role"]): row for row in rows(done.folder, "maps")}
    for row in found["boxes"]:
        x0, y0, x1, y1 = boxes[row["index"]]
        map_ = maps[row["index"], row["layer"], "predicted"]
        positive = np.clip(np.reshape(map_["values"], (map_["rows"], map_["columns"])), 0, None)
        pixels = positive.repeat(32 // map_["rows"], 0).repeat(32 // map_["columns"], 1)
        assert row["region_share"] == pytest.approx(pixels[y0:y1, x0:x1].sum() / pixels.sum(), abs=1e-5)
        assert row["region_area"] == pytest.approx((x1 - x0) * (y1 - y0) / 32**2, abs=1e-6)
    assert found["boxes"][0]["region_share"] == pytest.approx(1)


def test_images_that_cannot_be_read_are_listed_and_the_rest_is_done(tmp_path):
    reasons = write_odd_files(tmp_path / "in")
    done = audit(tmp_path / "in", tiny_model(), out=tmp_path / "out", **QUICK)
    found = {row["name"]: row for row in done.images.to_pylist()}
    assert set(found) == set(reasons)
    for name, reason in reasons.items():
        if reason is None:
            assert found[name]["error"] is None
            assert found[name]["score"] is not None
        else:
            assert reason in found[name]["error"]
            assert found[name]["score"] is None
        assert str(tmp_path) not in str(found[name])


def test_inputs_of_many_sizes_in_one_batch(tmp_path):
    torch.manual_seed(0)
    data = [
        torch.rand(3, 32, 32),
        torch.rand(3, 32, 32),
        torch.rand(3, 32, 32) / 0,
        (torch.rand(3, 32, 32), 4),
    ]
    done = audit(data, tiny_model(), out=tmp_path / "out", **QUICK)
    assert [row["error"] for row in done.images.to_pylist()] == [
        None,
        None,
        "pixel values that are not finite",
        None,
    ]
    assert done.images["true"].to_pylist() == [None, None, None, 4]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_images_for_which_the_model_is_not_finite_are_named_and_the_rest_is_done(tmp_path, value):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

    class Poisoned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model.eval()

        def forward(self, image):
            bright = image.amax((1, 2, 3), keepdim=False)[:, None] > 0.5
            return torch.where(bright, value, self.model(image))

    data = [torch.full((3, 8, 8), 0.9 if place % 3 == 1 else 0.1 + place / 100) for place in range(10)]
    done = audit(data, Poisoned().eval(), out=tmp_path / "out", layers=["model.1"], **QUICK)
    bad = [1, 4, 7]
    assert [row["index"] for row in done.images.to_pylist() if row["error"]] == bad
    assert done.images["index"].to_pylist() == list(range(10))
    assert {row["error"] for row in done.images.to_pylist()} == {
        None,
        "the model gives scores or maps that are not finite numbers",
    }
    assert [failed["index"] for failed in done.analysis.summary["failed"]] == bad
    assert done.layers.num_rows == 7
    again = audit(data[:1] * 2, Poisoned().eval(), out=tmp_path / "good", layers=["model.1"], **QUICK)
    assert again.images["score"][0].as_py() == done.images["score"][0].as_py()


def test_a_model_that_is_never_finite_has_a_report(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    with torch.no_grad():
        model[3].bias.fill_(torch.nan)
    done = audit([torch.rand(3, 8, 8)] * 5, model, out=tmp_path / "out", **QUICK)
    assert done.analysis.summary["audited"] == 0
    assert len(done.analysis.summary["failed"]) == 5
    assert "not finite" in done.report.read_text(encoding="utf-8")


def test_complete_maps_add_up_to_the_score_but_for_what_has_no_place(tmp_path):
    write_digits(tmp_path / "in", 5)
    loaded = tiny_model()
    done = audit(tmp_path / "in", loaded, out=tmp_path / "out", layers=["1", "4"], maps="complete", **QUICK)
    kept = rows(done.folder, "maps")
    assert {row["role"] for row in kept} == {"predicted", "runner_up"}
    for row in kept:
        assert sum(row["values"]) == pytest.approx(row["sub_scores"], abs=1e-5)
        assert row["bias"] == pytest.approx(loaded.module[6].bias[row["label"]].item(), abs=1e-6)
        assert row["sub_scores"] + row["bias"] == pytest.approx(row["score"], abs=1e-5)
        assert row["residual"] < 1e-5


def test_a_source_without_a_readable_image_is_an_error(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"source must hold images that can be read, got 1 that cannot: a.png"):
        audit(tmp_path / "in", tiny_model(), out=tmp_path / "out", **QUICK)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"metrics": ["insertoin"]},
            "metrics must be of insertion, deletion, got 'insertoin'. Did you mean 'insertion'",
        ),
        ({"maps": "compleet"}, "maps must be of score, complete, got 'compleet'. Did you mean 'complete'"),
        ({"layers": ["9"]}, "layers must be named as in the model, got '9'"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_say_what_to_do(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        audit([torch.rand(3, 32, 32)], tiny_model(), out=tmp_path / "out", **{**QUICK, **arguments})
    assert not (tmp_path / "out").exists()


def test_labels_of_another_data_set_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="labels must be less than 10, the model's, got 12"):
        audit([(torch.rand(3, 32, 32), 12)], tiny_model(), out=tmp_path / "out", **QUICK)
    write_digits(tmp_path / "in", 2)
    with pytest.raises(ValueError, match=r"less than 10, the model's, got 12 for '0001\.png'"):  # before any work
        audit(tmp_path / "in", nameless(), out=tmp_path / "new", labels={"0001.png": 12, "0000.png": 1}, **QUICK)
    assert not (tmp_path / "new").exists()


def nameless() -> LoadedModel:
    return replace(tiny_model(), labels=())


@pytest.mark.parametrize("names", [{"layers": "0"}, {"metrics": "deletion"}, {"layers": [nn.ReLU()]}])
def test_names_are_a_list_of_texts(tmp_path, names):
    """A text of several letters would be as many names."""
    with pytest.raises(TypeError, match=r"(layers|metrics) must be (a list of names, got the text|names, got ReLU)"):
        audit([torch.rand(3, 32, 32)], tiny_model(), out=tmp_path / "out", **QUICK, **names)


def test_what_is_named_twice_is_done_once(tmp_path):
    layer = next(name for name, one in tiny_model().module.named_modules() if isinstance(one, nn.ReLU))
    names = {"layers": [layer] * 2, "metrics": ["deletion"] * 2}
    twice, once = (
        audit(
            [torch.full((3, 32, 32), 0.5)],
            tiny_model(),
            out=tmp_path / str(count),
            **QUICK,
            **{key: value[:count] for key, value in names.items()},
        )
        for count in (2, 1)
    )
    assert rows(twice.folder, "layers") == rows(once.folder, "layers")
    assert rows(twice.folder, "images") == rows(once.folder, "images")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_pictures_come_in_the_model_s_type(tmp_path, dtype):
    write_digits(tmp_path / "in", 3)
    model = tiny_model()
    plain = audit(tmp_path / "in", model, out=tmp_path / "plain", **QUICK)
    model.module.to(dtype)
    done = audit(tmp_path / "in", model, out=tmp_path / "out", **QUICK)
    for one, other in zip(done.images["score"], plain.images["score"], strict=True):
        assert one.as_py() == pytest.approx(other.as_py(), rel=1e-5 if dtype is torch.float64 else 0.05)


@pytest.mark.parametrize(
    "inputs", [torch.full((1, 32, 32), 2.0), torch.full((1, 32, 32), float("nan")), torch.zeros(1, 0, 32)]
)
def test_images_of_one_value_or_none(tmp_path, inputs):
    """The picture of an input has a range, or none."""
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    done = audit([torch.rand(1, 32, 32), inputs], module, out=tmp_path / "out", **QUICK)
    reasons = {2.0: None, 0.0: "no pixels"}
    expected = reasons.get(inputs.sum().item() / max(inputs.numel(), 1), "pixel values that are not finite")
    assert done.images["error"].to_pylist() == [None, expected]


def test_the_users_model_stays_as_it_is(tmp_path):
    module = tiny_model().module.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    audit([torch.rand(3, 32, 32)], module, out=tmp_path / "out", **QUICK)
    assert module.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in module.parameters())
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert not any(part._forward_hooks for part in module.modules())


def test_insertion_and_deletion_where_asked(tmp_path):
    write_digits(tmp_path / "in", 2)
    done = audit(tmp_path / "in", tiny_model(), out=tmp_path / "out", metrics=["deletion"], **QUICK)
    assert all(0 <= value <= 1 for value in done.images["deletion"].to_pylist())
    assert done.images["insertion"].to_pylist() == [None, None]


def test_out_must_be_empty_or_the_same_audit(tmp_path):
    data = Digits(0, 3).images.expand(-1, 3, -1, -1).repeat_interleave(4, 2).repeat_interleave(4, 3)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"out must be a new or empty folder, got .* with other files"):
        audit(list(data), tiny_model(), out=tmp_path / "full", **QUICK)
    with pytest.raises(ValueError, match="out must be a folder, got the file"):
        audit(list(data), tiny_model(), out=tmp_path / "full" / "thesis.tex", **QUICK)
    audit(list(data), tiny_model(), out=tmp_path / "out", **QUICK)
    with pytest.raises(ValueError, match=r"with an audit of 1 finished shards. Go on with resume"):
        audit(list(data), tiny_model(), out=tmp_path / "out", **QUICK)
    with pytest.raises(
        ValueError, match=r"resume must have the settings of the audit in .*, got other values of layers"
    ):
        audit(list(data), tiny_model(), out=tmp_path / "out", layers=["1"], resume=True, **QUICK)
    with pytest.raises(ValueError, match=r"got other values of model \(weights, code, labels\), layers"):
        audit(list(data), tiny_model(4), out=tmp_path / "out", layers=["1"], resume=True, **QUICK)
    with pytest.raises(ValueError, match=r"got other values of model \(prepared\)"):
        audit(list(data), tiny_model(), out=tmp_path / "out", prepare_model=False, resume=True, **QUICK)
    with pytest.raises(ValueError, match=r"got other values of source \(content or labels\)"):
        audit(list(1 - data), tiny_model(), out=tmp_path / "out", resume=True, **QUICK)
    again = audit(list(data), tiny_model(), out=tmp_path / "out", resume=True, **QUICK)
    assert again.images.num_rows == 3


def _empty(path):
    path.write_bytes(b"")


def _half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _other(path):
    pq.write_table(pa.table({"index": [1]}), path)


def _swapped(path):
    path.write_bytes(path.with_name("00000.parquet").read_bytes())


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_empty, "is empty"),
        (_half, "cannot be read"),
        (_other, "has other columns"),
        (_swapped, "has other images"),
        (Path.unlink, "is missing"),
    ],
)
@pytest.mark.parametrize("table", ["views", "maps", "layers", "images"])
def test_damaged_shards_are_named_and_computed_anew(tmp_path, finished_audit, table, harm, said):
    source, whole = finished_audit
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    path = out / table / "00001.parquet"
    harm(path)
    if (table, harm) == ("images", Path.unlink):  # as if that shard had not been done
        audit(source, tiny_model(), out=out, layers=["1"], resume=True, **QUICK)
    else:
        if harm is not _swapped and harm is not _other:
            with pytest.raises(
                ValueError, match=rf"results must be whole, got {table}/00001.parquet in .*, which {said}"
            ):
                Shards(out).table(table)
        with pytest.warns(UserWarning, match=rf"are damaged, and computed anew: \w+/00001.parquet {said}"):
            audit(source, tiny_model(), out=out, layers=["1"], resume=True, **QUICK)
    for name in TABLES:
        assert rows(out, name) == rows(whole, name)


@pytest.mark.parametrize("table", TABLES)
def test_a_changed_byte_is_found_or_changes_nothing(tmp_path, finished_audit, table):
    _, whole = finished_audit
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    stamp = pq.read_schema(tmp_path / table / "00001.parquet").metadata[b"audit"].decode()
    shards, path, found = Shards(tmp_path, 3, stamp), tmp_path / table / "00001.parquet", 0
    expected, content, done = shards.read(table, 1), path.read_bytes(), (tmp_path / "images" / "00001.parquet")
    commit = done.read_bytes()
    for place in range(5, len(content), max(len(content) // 60, 1)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        if shards.mend(lambda shard: range(8 * shard, min(8 * shard + 8, 20))):
            assert not done.exists()
            found += 1
        else:
            assert shards.read(table, 1).equals(expected)
        done.write_bytes(commit)
        path.write_bytes(content)
    assert found > 20


@pytest.fixture(scope="module")
def finished_audit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    write_digits(folder / "in", 20)
    audit(folder / "in", tiny_model(), out=folder / "out", layers=["1"], **QUICK)
    return folder / "in", folder / "out"


def test_foreign_files_are_named_and_left_alone(tmp_path, finished_audit):
    source, whole = finished_audit
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    other = audit(source, tiny_model(5), out=tmp_path / "other", layers=["1"], **QUICK)
    shutil.copy(other.folder / "maps" / "00001.parquet", out / "maps" / "00001.parquet")
    shutil.copy(out / "images" / "00001.parquet", out / "images" / "00099.parquet")
    for name in ("notes.txt", "copy of 00001.parquet", ".DS_Store"):
        (out / "images" / name).write_bytes(b"mine")
    (out / "maps" / ".00002.parquet.4711").write_bytes(b"half")
    with pytest.warns(UserWarning, match="computed anew") as caught:
        done = audit(source, tiny_model(), out=out, layers=["1"], resume=True, **QUICK)
    (said,) = [str(warning.message) for warning in caught]
    assert "maps/00001.parquet is of another audit" in said
    for name in ("notes.txt", "copy of 00001.parquet", ".DS_Store", "00099.parquet"):
        assert f"images/{name} is no part of this audit and stays as it is" in said
        assert (out / "images" / name).exists()
    assert not (out / "maps" / ".00002.parquet.4711").exists()
    assert done.images.num_rows == 20
    (out / "images" / "00099.parquet").unlink()
    for name in TABLES:
        assert rows(out, name) == rows(whole, name)


@pytest.mark.parametrize("content", [b"", b'{"format": 2', b"[]", b"\xff\xfe", None])
def test_damaged_settings_are_written_anew_and_results_of_the_same_audit_kept(tmp_path, finished_audit, content):
    source, whole = finished_audit
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    if content is None:
        (out / "audit.json").unlink()
    else:
        (out / "audit.json").write_bytes(content)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet") if path.parent.name != "analysis"}
    with pytest.warns(UserWarning, match=r"are damaged, and computed anew: audit.json (is missing|cannot be read)"):
        audit(source, tiny_model(), out=out, layers=["1"], resume=True, **QUICK)
    assert (out / "audit.json").read_bytes() == (whole / "audit.json").read_bytes()
    assert {path: path.stat().st_mtime_ns for path in times} == times
    (out / "audit.json").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"audit.json cannot be read .*; views/00000.parquet is of"):
        audit(source, tiny_model(4), out=out, layers=["1"], resume=True, **QUICK)
    assert Shards(out).table("images")["predicted"].to_numpy().max() < 4


def test_resume_knows_that_pictures_changed(tmp_path):
    write_digits(tmp_path / "in", 10)
    audit(tmp_path / "in", tiny_model(), out=tmp_path / "out", **QUICK)
    path = tmp_path / "in" / "0003.png"
    Image.open(path).transpose(Image.Transpose.ROTATE_180).save(path)
    with pytest.raises(
        ValueError, match=r"resume must have the settings of the audit in .*, got other values of source"
    ):
        audit(tmp_path / "in", tiny_model(), out=tmp_path / "out", resume=True, **QUICK)
    data = [(torch.rand(3, 32, 32), 0) for _ in range(3)]
    audit(data, tiny_model(), out=tmp_path / "data", **QUICK)
    data[1] = (data[1][0], 1)
    with pytest.raises(ValueError, match="got other values of source"):
        audit(data, tiny_model(), out=tmp_path / "data", resume=True, **QUICK)


def test_two_writers_one_is_told(tmp_path):
    data = [torch.rand(3, 32, 32)] * 3
    shards = Shards(tmp_path / "out")
    with shards.locked(), pytest.raises(ValueError, match=r"no other audit writes to, got .*, where one is at work"):
        audit(data, tiny_model(), out=tmp_path / "out", **QUICK)
    assert list((tmp_path / "out").iterdir()) == []
    assert audit(data, tiny_model(), out=tmp_path / "out", **QUICK).images.num_rows == 3


@pytest.mark.filterwarnings("ignore:labels are not known:UserWarning")
@needs_fork
def test_killed_twenty_times_and_resumed_is_the_same(tmp_path):
    write_digits(tmp_path / "in", 280, by_label=True)
    write_odd_files(tmp_path / "in" / "odd")
    (tmp_path / "in" / "odd" / "bomb.png").unlink()
    audit(tmp_path / "in", tiny_model(), out=tmp_path / "whole", progress=False, batch_size=2, shard_size=4)
    shards = Shards(tmp_path / "out")
    folders = str(tmp_path / "in"), str(tmp_path / "out")
    generator = random.Random(0)
    for _ in range(20):
        before, process = len(shards.finished()), start(resume, *folders)
        while len(shards.finished()) == before:
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.03))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        for name in TABLES:
            for _, table in shards.each(name):
                assert table.schema.equals(TABLES[name])
    assert len(shards.finished()) < len(Shards(tmp_path / "whole").finished())
    process = start(resume, *folders)
    process.join()
    assert process.exitcode == 0
    for name in TABLES:
        assert rows(tmp_path / "out", name) == rows(tmp_path / "whole", name)
    assert [path.name for path in (tmp_path / "out").rglob(".*")] == []


def test_full_disk_is_a_clear_error_and_what_is_done_stays(tmp_path, monkeypatch):
    write_digits(tmp_path / "in", 20)
    real = pq.write_table

    def full(table, file, **options):
        if "00001" in file.name:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(table, file, **options)

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(
        OSError, match=r"out must be a folder with space to write; 00001.parquet could not be written"
    ) as error:
        audit(tmp_path / "in", tiny_model(), out=tmp_path / "out", **QUICK)
    assert error.value.errno == errno.ENOSPC
    assert len(rows(tmp_path / "out", "images")) == 8
    assert not list((tmp_path / "out").rglob(".*"))
    monkeypatch.setattr(pq, "write_table", real)
    assert audit(tmp_path / "in", tiny_model(), out=tmp_path / "out", resume=True, **QUICK).images.num_rows == 20


def test_unwritable_folder_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"out must be a folder with space to write; audit.json could not be written"):
        audit([torch.rand(3, 32, 32)], tiny_model(), out=tmp_path / "file" / "out", **QUICK)


def test_half_written_files_never_stand_under_their_name(tmp_path):
    path = tmp_path / "a.json"
    write_whole(path, "old")

    class Stop(BaseException):
        pass

    class Torn(str):
        def encode(self):
            raise Stop

    with pytest.raises(Stop):
        write_whole(path, Torn("new"))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


class Watched(torch.utils.data.Dataset):
    """Images that count how often they are read."""

    def __init__(self, length: int) -> None:
        self.length, self.read = length, []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        self.read.append(index)
        return torch.full((3, 32, 32), index / self.length)


def test_images_are_read_two_batches_ahead_also_over_the_end_of_a_shard():
    data, loaded = Watched(40), tiny_model()
    layers = map_layers(loaded.module, ["1"], torch.zeros(1, 3, 32, 32))
    worker = Worker(open_source(data), Plan(40, None, batch_size=4, shard_size=8), loaded, layers)
    finished = []

    def done(count):
        finished.append(count)
        ahead = min(sum(finished) + 8, 40)
        end = time.monotonic() + 60
        while len(data.read) < ahead and time.monotonic() < end:  # by itself, while this batch is in hand
            time.sleep(0.001)
        assert len(data.read) == ahead

    shards = [number for number, _ in worker.results(worker.plan.shards, done)]
    assert shards == [0, 1, 2, 3, 4]
    assert finished == [4] * 10
    assert data.read == list(range(40))


def test_progress_is_told_after_every_batch(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("captum_scoremap.audit.progress._EVERY", 0.0)
    data = [torch.rand(3, 32, 32)] * 12
    audit(data, tiny_model(), out=tmp_path, layers=["1"], batch_size=4, shard_size=8)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" images")[0] for line in lines] == [f"audit: {done} of 12" for done in (4, 8, 12)]


def test_progress_says_rate_and_time_left(capsys):
    now = iter([0.0, 10.0, 31.0, 31.0, 31.0, 40.0, 40.0])
    progress = Progress(100, done=20, clock=lambda: next(now))
    progress.advance(10)
    assert capsys.readouterr().err == ""
    progress.advance(21)
    assert capsys.readouterr().err == "audit: 51 of 100 images, 1.0 images/s, 49 s left\n"
