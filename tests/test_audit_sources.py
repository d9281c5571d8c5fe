"""Every source yields the same samples in the same order, and says what is wrong with the rest."""

import csv
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from captum_scoremap.audit.plan import Plan
from captum_scoremap.data.files import printable
from captum_scoremap.data.labels import label_indices
from captum_scoremap.data.pictures import UnreadableError
from captum_scoremap.data.sources import DatasetSource, open_source
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
    with pytest.warns(UserWarning, match=r"in alphabetical order: digit 0 is other 0, .* and 7 more. Give labels"):
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
    said = r"labels are there for 2 of 3 images; none for 0001.png; 1 of their 3 names are no image's: elsewhere.png"
    with pytest.warns(UserWarning, match=said):
        source = open_source(tmp_path / "pictures", labels, NAMES)
    assert [source.read(index).label for index in range(3)] == [4, None, 7]
    with pytest.warns(UserWarning, match=r"for 2 of 3 images; none for 0001.png\.$"):
        same = open_source(tmp_path / "pictures", {"0000.png": 4, "0002.png": "digit 7"}, NAMES)
    assert same.fingerprint() == source.fingerprint()


def test_labels_name_images_from_the_source_the_table_or_the_root(tmp_path):
    write_digits(tmp_path / "all" / "a", 2)
    labels = tmp_path / "labels.csv"
    labels.write_text(f"file,label\nall/a/0000.png,4\n{tmp_path / 'all' / 'a' / '0001.png'},7\n")
    source = open_source(tmp_path / "all", labels, NAMES)
    assert [source.read(index).label for index in range(2)] == [4, 7]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("0000.png,4\n0001.png,1\n0000.png,5\n", "one label, got '4' and '5' for '0000.png'. Keep one row"),
        ("0000.png,4\n0001.png,1\n./0000.png,digit 5\n", "got '4' and 'digit 5' for '0000.png'"),
        ("0000.png,4\n0001.png,1\n0000.png,\n", "got '4' and None for '0000.png'"),
    ],
)
@pytest.mark.parametrize("beside", [True, False])
def test_labels_that_contradict_each_other_are_an_error(tmp_path, rows, message, beside):
    write_digits(tmp_path, 2)
    (tmp_path / "labels.csv").write_text("path,label\n" + rows)
    source = (tmp_path, tmp_path / "labels.csv") if beside else (tmp_path / "labels.csv", None)
    with pytest.raises(ValueError, match=message):
        open_source(*source, NAMES)
    (tmp_path / "labels.csv").write_text("path,label\n0000.png,4\n0001.png,1\n0000.png,digit 4\n")
    assert open_source(*source, NAMES).read(0).label == 4


def test_a_name_of_two_images_is_an_error(tmp_path):
    for below in ("a", "b"):
        write_digits(tmp_path / below, 1)
    with pytest.raises(ValueError, match=r"each image by its path, got '0000\.png' for a/0000\.png and b/0000\.png"):
        open_source(tmp_path, {"0000.png": 1}, NAMES)


def test_folders_of_which_the_model_knows_some(tmp_path):
    for below in ("digit 3", "DIGIT_4", "unsorted", "2"):
        write_digits(tmp_path / below, 1)
    with pytest.warns(UserWarning, match="not known of 2 of 4 images, in folders that are no label .*, 2, unsorted"):
        source = open_source(tmp_path, names=NAMES)
    assert [source.read(index).label for index in range(4)] == [None, 4, 3, None]


def test_folders_that_are_numbers_are_labels_with_a_word(tmp_path):
    for below in ("03", "7"):
        write_digits(tmp_path / below, 1)
    with pytest.warns(UserWarning, match="as the numbers of labels: 03 is digit 3, 7 is digit 7. Give labels"):
        source = open_source(tmp_path, names=NAMES)
    assert [source.read(index).label for index in range(2)] == [3, 7]
    assert [open_source(tmp_path).read(index).label for index in range(2)] == [3, 7]


def test_links_never_multiply_the_data(tmp_path):
    write_digits(tmp_path / "photos" / "z", 3)
    write_digits(tmp_path / "elsewhere", 2)
    photos = tmp_path / "photos"
    (photos / "z" / "up").symlink_to(photos)
    (photos / "a").symlink_to(photos / "z")
    (photos / "more").symlink_to(tmp_path / "elsewhere")
    (photos / "round").symlink_to(photos / "about")
    (photos / "about").symlink_to(photos / "round")
    (photos / "gone.png").symlink_to(photos / "nowhere.png")
    said = r"passed over: a: a link to a folder that is searched already, z, z/up: a link .* already, \.\."
    with pytest.warns(UserWarning, match=said):
        source = open_source(photos, names=NAMES)
    names = [source.name(index) for index in range(len(source))]
    assert names == ["gone.png", "more/0000.png", "more/0001.png", "z/0000.png", "z/0001.png", "z/0002.png"]
    with pytest.raises(UnreadableError, match="no such file"):
        source.read(0)


def test_results_of_an_audit_are_no_source(tmp_path):
    write_digits(tmp_path, 2)
    write_digits(tmp_path / "audit" / "report", 2)
    (tmp_path / "audit" / "audit.json").write_text("{}")
    with pytest.warns(UserWarning, match="passed over: audit: the results of an audit"):
        assert len(open_source(tmp_path)) == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_sockets_and_devices_are_named_and_never_opened(tmp_path):
    write_digits(tmp_path, 1)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    source = open_source(tmp_path)
    assert [source.name(index) for index in range(3)] == ["0000.png", "pipe.png", "zero.png"]
    assert source.fingerprint() == source.fingerprint()
    for index, reason in ((1, "a named pipe, not a file"), (2, "a device, not a file")):
        with pytest.raises(UnreadableError, match=reason):
            source.read(index)


@pytest.mark.parametrize("name", ["a.heic", "b.HEIF", "c.svg", "d.jxl", "e.nef"])
def test_pictures_that_pillow_cannot_read_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"anything")
    source = open_source(tmp_path)
    assert source.name(0) == name
    with pytest.raises(UnreadableError, match=rf"Pillow cannot read {name[1:].lower()} files; convert it to PNG"):
        source.read(0)


def test_fingerprints_know_contents(tmp_path):
    write_digits(tmp_path / "in", 3)
    (tmp_path / "list.csv").write_text("path,mask\nin/0000.png,in/0001.png\n")
    picture, mask = tmp_path / "in" / "0000.png", tmp_path / "in" / "0001.png"

    def prints():
        return open_source(tmp_path / "in").fingerprint(), open_source(tmp_path / "list.csv").fingerprint()

    for path in (picture, mask):
        before, state, content = prints(), path.stat(), path.read_bytes()
        assert prints() == before
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # same size, same time
        assert not set(prints()) & set(before)
        path.write_bytes(content)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert prints() == before
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
        assert not set(prints()) & set(before)


def test_fingerprints_of_data_sets_know_items():
    data = [(torch.rand(1, 4, 4), 0), (torch.rand(1, 4, 4), 1), Image.new("RGB", (4, 4)), "damaged"]
    before = DatasetSource(data).fingerprint()
    assert DatasetSource([(image.clone(), label) for image, label in data[:2]] + data[2:]).fingerprint() == before
    for changed in (
        [(data[0][0] + 1e-6, 0), *data[1:]],
        [(data[0][0], 1), *data[1:]],
        [*data[:2], Image.new("RGB", (4, 4), "red"), "damaged"],
        data[:3],
    ):
        assert DatasetSource(changed).fingerprint() != before


def test_a_data_set_that_draws_its_items_says_so():
    class Drawn(Digits):
        def __getitem__(self, index):
            return torch.rand(1, 4, 4), 0

    with pytest.warns(UserWarning, match="items that differ .random augmentation.*resume cannot tell"):
        assert DatasetSource(Drawn(0, 5)).fingerprint() == DatasetSource(Drawn(0, 5)).fingerprint()


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
        (picture, "cat"),
        (picture, 0.5),
        (picture, torch.tensor([0, 1])),
    ])
    assert source.read(0).image.mode == "RGB"
    assert source.read(1).label == 2
    assert source.read(2).image.shape == (1, 4, 4)
    for index, reason in (
        (3, "str is neither"),
        (4, "NoneType is neither"),
        (5, r"a tensor \(4,\)"),
        (6, "a label that is no index, 'cat'"),
        (7, "a label that is no index, 0.5"),
        (8, r"a label that is no index, tensor\(\[0, 1\]\)"),
    ):
        with pytest.raises(UnreadableError, match=reason):
            source.read(index)


def test_pictures_that_a_data_set_has_opened_but_not_read(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    deep = Image.fromarray(np.full((4, 4), -7, np.int32))
    with Image.open(tmp_path / "half.jpg") as half:
        source = DatasetSource([half, (deep, 1)])
        for index, reason in enumerate(("raised OSError: .*truncated", "values of a 'I' image must lie in 0")):
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


def test_numbers_are_indices_and_text_is_a_name_first():
    names = ["0", "1", "10", "2"]  # folders in alphabetical order
    assert label_indices(["10", "2", 2, np.int64(3), 1.0, "3", None], names) == [2, 3, 2, 3, 1, 3, None]
    for wrong in (2.5, float("nan"), float("inf"), 4):
        with pytest.raises(ValueError, match="label must be one of the model's"):
            label_indices([wrong], names)


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


def test_a_row_without_an_image_is_named(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    (tmp_path / "list.csv").write_text("path,label\n0.png,1\n,2\n")
    with pytest.raises(ValueError, match=r"list.csv must name an image in every row, got none in row 2"):
        open_source(tmp_path / "list.csv")
    with pytest.raises(ValueError, match=r"list.csv must name an image in every row, got none in row 2"):
        open_source(tmp_path, tmp_path / "list.csv")


@pytest.mark.parametrize(
    "text",
    [
        "path,label\n0000.png,digit 4\nsub/ü.png,7\n",
        "\ufeffpath;label\r\n0000.png;digit 4\r\nsub/ü.png;7\r\n",
        '"path";"label"\n"0000.png";"digit 4"\n"sub/ü.png";"7"\n',
        "path\tlabel\n0000.png\tdigit 4\nsub/ü.png\t7\n",
        "Path, Label\n0000.png, digit 4\nsub/ü.png, 7\n",
        " FILE ,Class,\n0000.png,Digit_4,\n\nsub/ü.png,7,\n\n",
        "path,label\n0000.png,4.0\nsub/ü.png,7.0\n",
        "path,label\n0000.png,digit 4\nsub\\ü.png,7\n",
        "path,label\n0000.png,digit 4\n.\\sub\\ü.png,7\n",
        "path,label\n0000.png,digit 4\nsub/u\u0308.png,7\n",
    ],
)
@pytest.mark.parametrize("beside", [True, False])
def test_lists_as_spreadsheets_and_other_systems_write_them(tmp_path, text, beside):
    write_digits(tmp_path, 1)
    (tmp_path / "sub").mkdir()
    shutil.copy(tmp_path / "0000.png", tmp_path / "sub" / "ü.png")
    path = tmp_path / "labels.csv"
    path.write_text(text, encoding="utf-8")
    source = open_source(tmp_path, path, NAMES) if beside else open_source(path, names=NAMES)
    assert source.labels == (4, 7)
    if beside or "u\u0308" not in text:  # a list names files, and this one has another name
        assert source.read(1).label == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\n0000.png,4,5\n", r"a cell for each of path, label, got \['0000.png', '4', '5'\] in line 2"),
        ("path,label\n0000.png,digit 4, the even one\n", "Put text with ',' in it between quotes"),
        ("path,label,Label\n0000.png,4,5\n", "labels.csv must have one column label, got 2. Rename one"),
        ("0000.png,4\n0000.png,4\n", "must have a column path .* Rename one, or add a first row of names"),
        ('path,label\n"0000.png,4\n', "must be comma-separated values, got 'labels.csv': unexpected end of data"),
        (f"path,label\n{'a' * 200_000},4\n", "must be comma-separated values, got 'labels.csv': field larger"),
        ("path,label\n0000.png,4.5\n", "label must be one of the model's, got '4.5'"),
    ],
)
@pytest.mark.parametrize("beside", [True, False])
def test_lists_whose_cells_do_not_fit_are_errors(tmp_path, text, message, beside):
    write_digits(tmp_path, 1)
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        open_source(*((tmp_path, path) if beside else (path, None)), NAMES)


@pytest.mark.parametrize("box", ["0,0,,4", "0,0,wide,4", "0,0,nan,4", ",,,4", "0,0,inf,4"])
def test_a_box_is_four_numbers_or_none(tmp_path, box):
    write_digits(tmp_path, 2)
    (tmp_path / "list.csv").write_text(f"path,x0,y0,x1,y1\n0000.png,,,,\n0001.png,{box}\n")
    with pytest.raises(ValueError, match=r"list.csv must give a box as four numbers, x0, y0, .* got .* in row 2"):
        open_source(tmp_path / "list.csv")


def test_labels_of_a_data_set_may_be_names_and_come_with_it_alone(tmp_path):
    image = torch.zeros(1, 4, 4)
    source = open_source([(image, "digit 4"), (image, "DIGIT_7"), (image, "7"), (image, "cat")], names=NAMES)
    assert [source.read(index).label for index in range(3)] == [4, 7, 7]
    with pytest.raises(UnreadableError, match="a label that is no index, 'cat'"):
        source.read(3)
    for data in ([(image, 1)], source, f"torchvision:MNIST:{tmp_path}"):
        with pytest.raises(ValueError, match="labels must be left out when source is a data set"):
            open_source(data, {"0": 1}, NAMES)


@pytest.mark.parametrize("label", [[1], [0.0, 1.0], {"digit": 1}])
def test_several_labels_of_an_image_are_an_error(tmp_path, label):
    write_digits(tmp_path, 1)
    with pytest.raises(ValueError, match=r"label must be one of the model's, got .* Give an index or a name"):
        open_source(tmp_path, {"0000.png": label}, NAMES)
    with pytest.raises(TypeError, match=r"labels must be a list, \.csv or \.parquet, or a mapping .* got list"):
        open_source(tmp_path, [1], NAMES)
