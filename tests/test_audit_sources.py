"""Every source yields the same samples in the same order, and says what is wrong with the rest."""

import csv

import pytest
import torch
from PIL import Image

from captum_scoremap.audit.plan import Plan
from captum_scoremap.data.pictures import UnreadableError
from captum_scoremap.data.sources import DatasetSource, label_indices, open_source, printable
from tests.audit_pictures import Digits, write_digits

NAMES = tuple(f"digit {label}" for label in range(10))


def test_folder_layout_gives_labels_by_name(tmp_path):
    write_digits(tmp_path, 20, by_label=True)
    source = open_source(tmp_path, names=NAMES)
    assert len(source) == 20
    for index in range(20):
        folder, _, _ = source.name(index).partition("/")
        assert source.read(index).label == NAMES.index(folder)


def test_folders_as_many_as_labels_are_labels_in_order(tmp_path):
    write_digits(tmp_path, 20, by_label=True)
    source = open_source(tmp_path, names=[f"other {label}" for label in range(10)])
    assert {source.read(index).label for index in range(20)} == set(range(10))


def test_folders_that_are_no_labels_give_none(tmp_path):
    write_digits(tmp_path / "2024" / "05", 3)
    write_digits(tmp_path, 2)
    source = open_source(tmp_path, names=NAMES)
    assert [source.read(index).label for index in range(5)] == [None] * 5
    assert source.name(4) == "2024/05/0002.png"


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_list_with_labels_and_boxes(tmp_path, suffix):
    write_digits(tmp_path / "pictures", 3)
    rows = [
        {"file": "pictures/0000.png", "label": "digit 0", "x0": 0, "y0": 0, "x1": 16, "y1": 32},
        {"file": "pictures/0001.png", "label": "1", "x0": None, "y0": None, "x1": None, "y1": None},
        {"file": "pictures/missing.png", "label": None, "x0": None, "y0": None, "x1": None, "y1": None},
    ]
    path = tmp_path / f"list{suffix}"
    if suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pa = pytest.importorskip("pyarrow")
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    source = open_source(path, names=NAMES)
    first = source.read(0)
    assert (source.name(0), first.label) == ("0000.png", 0)
    assert first.region is not None
    assert first.region.getbbox() == (0, 0, 16, 32)
    assert (source.read(1).label, source.read(1).region) == (1, None)
    with pytest.raises(UnreadableError, match="no such file"):
        source.read(2)


def test_labels_beside_a_folder(tmp_path):
    write_digits(tmp_path / "pictures", 3)
    labels = tmp_path / "labels.csv"
    labels.write_text("file,label\n0000.png,digit 4\n0002.png,7\nelsewhere.png,1\n")
    source = open_source(tmp_path / "pictures", labels, NAMES)
    assert [source.read(index).label for index in range(3)] == [4, None, 7]
    same = open_source(tmp_path / "pictures", {"0000.png": 4, "0002.png": "digit 7"}, NAMES)
    assert same.fingerprint() == source.fingerprint()


def test_torchvision_data_set_by_name(tmp_path):
    with pytest.raises(ValueError, match="source must be a data set that is there"):
        open_source(f"torchvision:CIFAR10/test:{tmp_path}")
    with pytest.raises(ValueError, match=r"torchvision:NAME\[/SPLIT\]:ROOT.*Did you mean 'CIFAR10'"):
        open_source(f"torchvision:CIFAR11:{tmp_path}")
    for name in ("FakeData", "CocoDetection"):
        with pytest.raises(ValueError, match=r"opened by its folder alone.*Open it in Python"):
            open_source(f"torchvision:{name}:{tmp_path}")


def test_data_set_items_of_many_kinds():
    picture = Image.new("L", (5, 4), 255)
    source = DatasetSource([
        picture,
        (picture, torch.tensor(2)),
        torch.zeros(1, 4, 4),
        "text",
        None,
        torch.zeros(4),
    ])
    assert source.read(0).image.mode == "RGB"
    assert source.read(1).label == 2
    assert source.read(2).image.shape == (1, 4, 4)
    for index, reason in ((3, "str is neither"), (4, "NoneType is neither"), (5, r"a tensor \(4,\)")):
        with pytest.raises(UnreadableError, match=reason):
            source.read(index)


def test_what_a_data_set_raises_is_the_reason():
    class Broken(Digits):
        def __getitem__(self, index):
            raise OSError("tape torn")

    with pytest.raises(UnreadableError, match="the data set raised OSError: tape torn"):
        DatasetSource(Broken(0, 3)).read(1)


@pytest.mark.parametrize(
    ("source", "labels", "message"),
    [
        ("nowhere", None, "source must be a folder or a list of images, got .* which does not exist"),
        ("empty", None, "source must hold images, got the folder 'empty' without any"),
        ("list.csv", None, "list.csv must have a column path or file or .*, got a, b"),
        ("rows.csv", None, "source must hold images, got the list 'rows.csv' without a row"),
        ("latin.csv", None, "a list must be UTF-8"),
        ("list.txt", None, "a list must be a .csv or .parquet file"),
        ("full", "list.csv", "list.csv must have a column path"),
        (
            "full",
            "strangers.csv",
            "labels must name images of the source, got 1 names of which none is there",
        ),
        ("full", "wrong.csv", "label must be one of the model's, got 'digit 11'. Did you mean 'digit 1'"),
        ("full", "large.csv", "label must be one of the model's 10 labels from 0, got 99"),
        ("full", "nowhere.csv", "labels must be a list, .csv or .parquet, got .*, which is no file"),
    ],
)
def test_wrong_sources_say_what_to_do(tmp_path, source, labels, message):
    (tmp_path / "empty").mkdir()
    write_digits(tmp_path / "full", 1)
    for name, text in {
        "list.csv": "a,b\n1,2\n",
        "rows.csv": "path,label\n",
        "list.txt": "0000.png\n",
        "strangers.csv": "path,label\nx.png,1\n",
        "wrong.csv": "path,label\n0000.png,digit 11\n",
        "large.csv": "path,label\n0000.png,99\n",
    }.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.csv").write_bytes("path,label\nnaïve.png,1\n".encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / source, labels and tmp_path / labels, NAMES)


def test_wrong_kinds_are_type_errors():
    with pytest.raises(TypeError, match="source must be a folder, a list, or a data set, got int"):
        open_source(3)
    with pytest.raises(TypeError, match="a data set with a length and items by position, got dict_keys"):
        DatasetSource({}.keys())


def test_label_names_may_be_ambiguous_only_where_they_are_not_used():
    assert label_indices(["dog"], ["crane", "crane", "dog"]) == [2]
    with pytest.raises(ValueError, match=r"got 'crane', the name of labels \[0, 1\]. Give an index"):
        label_indices(["crane"], ["crane", "crane", "dog"])


def test_names_that_are_no_unicode_are_escaped():
    assert printable(b"caf\xe9.png".decode("utf-8", "surrogateescape")) == r"caf\xe9.png"


@pytest.mark.parametrize("length", [1, 7, 8, 9, 100])
@pytest.mark.parametrize("limit", [None, 1, 7, 1000])
def test_plan_takes_every_image_once(length, limit):
    plan = Plan(length, limit, batch_size=3, shard_size=8)
    taken = [index for shard in plan.shards for batch in plan.batches(shard) for index in batch]
    assert len(taken) == plan.count == min(length, limit or length)
    assert taken == sorted(set(taken))
    assert all(len(batch) <= 3 for shard in plan.shards for batch in plan.batches(shard))


@pytest.mark.parametrize(("name", "value"), [("limit", 0), ("batch_size", 0), ("shard_size", -1)])
def test_plan_sizes_must_be_positive(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {value}"):
        Plan(10, **{name: value})
