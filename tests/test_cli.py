"""``captum-scoremap explain``: what it prints, draws and saves, and how it fails."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captum_scoremap import CompleteScoreMap, FusedScoreMap, LayerScoreMap, linear_form
from captum_scoremap.cli import app, main
from captum_scoremap.cli.options import check_writable, chosen_device
from captum_scoremap.models import load_model, read_image
from captum_scoremap.multiview import MultiView


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, as pictures go to the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(output: str) -> dict[str, list[str]]:
    """The lines of printed tables by their first cell."""
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in output.splitlines() if "│" in line]
    return {first: rest for first, *rest in cells}


def cat_score(label: str, dtype: torch.dtype = torch.float64) -> float:
    model = load_model(dtype=dtype)
    with torch.no_grad():
        scores = model.module(model.preprocessing(read_image("sample:chelsea"))[None].to(dtype))
    return float(scores[0, model.label_index(label)])


def test_main_job(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain"]) == 0
    output, errors = capsys.readouterr()
    assert errors == ""  # no progress bar where the output is no terminal
    assert re.search(r"^sample:chelsea: (tiger cat|Egyptian cat), S = [\d.]+ logits *$", output, re.MULTILINE)
    table = rows(output)
    assert list(table) == ["input", "bn1", "blocks.1", "blocks.2", "blocks.4", "bn2"]
    assert table["input"][0] == "3 × 224 × 224"
    for size, total, bias, score, residual in table.values():
        assert size.count("×") == 2
        assert float(total) + float(bias) == pytest.approx(float(score), abs=2e-4)
        assert float(residual) <= 1e-4
    assert "Picture: score_maps.png" in output
    with Image.open(folder / "score_maps.png") as picture:
        assert min(picture.size) >= 500


def test_numbers_are_those_of_the_linear_form(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--target", "Egyptian cat", "--layers", "input,blocks.4", "--dtype", "float64", "--no-prepare"]
    assert main(["explain", *arguments, "--save-maps", "maps.npz"]) == 0
    model = load_model(dtype=torch.float64)
    inputs = model.preprocessing(read_image("sample:chelsea"))[None].double()
    with np.load(folder / "maps.npz") as maps:
        assert list(maps["0/layers"]) == ["input", "blocks.4"]
        assert (str(maps["0/image"]), str(maps["0/label"]), int(maps["0/target"])) == (
            "sample:chelsea",
            "Egyptian cat",
            285,
        )
        for place, layer in enumerate([None, model.module.blocks[4]]):
            form = linear_form(model.module, inputs, 285, layer)
            found = maps[f"0/maps/{maps['0/layers'][place]}"]
            np.testing.assert_allclose(found, form.score_map()[0, 0].numpy(), rtol=1e-6, atol=1e-8)
            assert maps["0/totals"][place] == pytest.approx(float(form.sums), rel=1e-10)
            assert maps["0/biases"][place] == pytest.approx(float(form.bias), rel=1e-10)
            assert maps["0/score"] == pytest.approx(float(form.score), rel=1e-12)
            complete = maps[f"0/complete_maps/{maps['0/layers'][place]}"]
            np.testing.assert_allclose(complete, form.complete_map()[0, 0].numpy(), rtol=1e-6, atol=1e-8)
            assert complete.sum() + maps["0/placeless"][place] == pytest.approx(maps["0/score"], rel=1e-5)
        assert maps["0/complete_map"].shape == (224, 224)
        assert maps["0/residuals"].max() <= 1e-12


def test_the_prepared_model_gives_the_same(folder: Path) -> None:
    network = ["--model", "torchvision:shufflenet_v2_x0_5", "--weights", "none", "--layers", "stage2,conv5"]
    for name, option in (("fast.npz", "--prepare"), ("plain.npz", "--no-prepare")):
        assert main(["explain", *network, "--dtype", "float64", option, "--save-maps", name]) == 0
    with np.load(folder / "fast.npz") as fast, np.load(folder / "plain.npz") as plain:
        for name in plain.files:
            if plain[name].dtype.kind == "f" and "residuals" not in name:
                np.testing.assert_allclose(fast[name], plain[name], rtol=1e-5, atol=1e-7)


def test_contrast_is_the_difference_of_two_scores(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "-t", "Egyptian cat", "-c", "lynx", "-l", "bn2", "--dtype", "float64"]) == 0
    output = capsys.readouterr().out
    assert "Egyptian cat − lynx" in output
    _, total, bias, score, _ = rows(output)["bn2"]
    assert float(score) == pytest.approx(cat_score("Egyptian cat") - cat_score("lynx"), abs=1e-3)
    assert float(total) + float(bias) == pytest.approx(float(score), abs=2e-4)


def test_several_images_and_labels_give_several_pictures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read_image("sample:chelsea").save(folder / "my cat.png")
    assert main(["explain", "my cat.png", "sample:coffee", "--target", "top:2", "-l", "bn2", "-o", "maps.png"]) == 0
    pictures = sorted(path.name for path in folder.glob("maps*.png"))
    assert len(pictures) == 4
    assert [name.split("_")[1] for name in pictures] == ["1", "2", "3", "4"]
    assert pictures[0].startswith("maps_1_my_cat_")
    assert pictures[2] == "maps_3_coffee_espresso.png"
    output = capsys.readouterr().out
    assert output.count("Picture: maps_") == 4
    assert "sample:coffee: espresso, S = " in output


def test_multi_view_explains_the_whole_image(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--view", "multi", "-t", "285", "-l", "input,features.bn2"]) == 0
    table = rows(capsys.readouterr().out)
    assert table["input"][0] == "3 × 256 × 384"
    model = load_model()
    with torch.no_grad():
        scores = MultiView.from_classifier(model.module)(model.preprocessing.whole(read_image("sample:chelsea"))[None])
    assert float(table["input"][3]) == pytest.approx(float(scores[0, 285]), abs=1e-3)


def test_default_layers_of_multi_view_lie_below_the_sliding_layer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--view", "multi"]) == 0
    first, *others = rows(capsys.readouterr().out)
    assert first == "input"
    assert others
    assert all(name.startswith("features.") for name in others)


def test_a_model_of_the_user(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "zoo_in_this_folder.py").write_text(
        "from torch.nn import Conv2d, Flatten, Linear, ReLU, Sequential\n"
        "from captum_scoremap.models import LoadedModel, Preprocessing\n"
        "def build():\n"
        "    network = Sequential(Conv2d(3, 4, 3), ReLU(), Flatten(), Linear(4 * 30 * 30, 2))\n"
        "    return LoadedModel('', network, Preprocessing(32, 32), ('cat', 'dog'))\n"
    )
    try:
        assert main(["explain", "--model", "zoo_in_this_folder:build", "--target", "dog"]) == 0
    finally:
        sys.modules.pop("zoo_in_this_folder", None)
    output = capsys.readouterr().out
    assert "dog, S = " in output
    assert list(rows(output)) == ["input", "1"]


def test_a_score_of_the_user(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "cats_in_this_folder.py").write_text(
        "def cats(scores):\n    return scores[:, 281:286].mean(1)\n\ndef broken(scores):\n    return scores\n"
    )
    arguments = ["explain", "-l", "bn2", "--dtype", "float64", "--save-maps", "maps.npz"]
    try:
        assert main([*arguments, "--score", "cats_in_this_folder:cats"]) == 0
        output = capsys.readouterr().out
        assert "sample:chelsea: cats_in_this_folder:cats, S = " in output
        assert main([*arguments, "--score", "cats_in_this_folder:broken"]) == 2
        assert "must return one score for each image, (1,), got (1, 1000)" in capsys.readouterr().err
        for more in (["--target", "top:1"], ["--contrast", "lynx"]):
            assert main([*arguments, "--score", "cats_in_this_folder:cats", *more]) == 2
            assert f"{more[0]} must be left out with --score" in capsys.readouterr().err
    finally:
        sys.modules.pop("cats_in_this_folder", None)
    model = load_model(dtype=torch.float64)
    with torch.no_grad():
        scores = model.module(model.preprocessing(read_image("sample:chelsea"))[None].double())
    with np.load(folder / "maps.npz") as maps:
        assert maps["0/score"] == pytest.approx(float(scores[0, 281:286].mean()), rel=1e-5)
        assert int(maps["0/target"]) == -1


@pytest.mark.parametrize(
    "names", [["gone.png", "sample:coffee", "text.png"], ["sample:coffee", "gone.png", "text.png"]]
)
def test_what_is_done_of_several_images_is_kept_where_others_cannot_be_read(
    folder: Path, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "text.png").write_text("no picture")
    arguments = ["explain", *names, "sample:chelsea", "-l", "bn2", "--save-maps", "maps.npz"]
    reasons = [
        "image must be a readable file, got 'gone.png': no such file.",
        "image must be a readable file, got 'text.png': not an image file that Pillow knows.",
    ]
    for more, place in ([], folder), (["--bundle", "filed"], folder / "filed"):
        assert main([*arguments, *more]) == 2
        assert capsys.readouterr().err == "captum-scoremap: error: " + "\n".join(reasons) + "\n"
        with np.load(place / "maps.npz") as maps:
            assert [str(maps[f"{number}/image"]) for number in range(2)] == ["sample:coffee", "sample:chelsea"]
        assert len(list(place.glob("score_maps_*.png"))) == 2
    assert json.loads((folder / "filed" / "manifest.json").read_text())["left_out"] == reasons


def test_what_is_done_is_kept_where_the_next_image_ends_in_an_error(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "positive_in_this_folder.py").write_text(
        "def positive(scores):\n"
        "    if float(scores[0, 0]) < 0:  # of the second\n"
        "        raise ValueError('below zero')\n"
        "    return scores[:, 0]\n"
    )
    arguments = ["explain", "sample:coffee", "sample:chelsea", "-l", "bn2", "--save-maps", "maps.npz"]
    arguments += ["--score", "positive_in_this_folder:positive"]
    try:
        assert main(arguments) == 2
        assert main([*arguments, "--bundle", "filed"]) == 2
    finally:
        sys.modules.pop("positive_in_this_folder", None)
    with np.load(folder / "maps.npz") as maps:
        assert "0/score" in maps
        assert "1/score" not in maps
    assert not (folder / "filed").exists()
    assert "Maps: filed" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["pdf", "svg"])
def test_vector_formats(folder: Path, suffix: str) -> None:
    assert main(["explain", "-l", "bn2", "-o", f"maps.{suffix}"]) == 0
    assert (folder / f"maps.{suffix}").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.png"], "got 'missing.png': no such file"),
        (["coffee"], "Did you mean 'sample:coffee'?"),
        (["--model", "alexnet"], "Did you mean 'torchvision:alexnet'?"),
        (
            ["--layers", "blocks.9"],
            "layers must be input or names of modules of the model, got 'blocks.9'. Did you mean",
        ),
        (["--layers", "classifier"], "layers must give maps (N, C, h, w) or tokens (N, T, C), got classifier"),
        (["--target", "Egyptian cta"], "Did you mean 'Egyptian cat'"),
        (["--target", "1000"], "label must be less than 1000, got 1000"),
        (["--target", "top:0"], "target must be top:1 to top:1000, got 'top:0'"),
        (
            ["--target", "lynx", "--contrast", "Lynx"],
            "contrast must be another label than the target, got lynx for both",
        ),
        (["."], "got '.': a folder, not a file"),
        (["--contrast", "linx"], "Did you mean 'lynx'"),
        (["--model", "torchvision:squeezenet1_1", "--weights", "none", "--contrast", "1000"], "must be less than 1000"),
        (["--out", "no/such/folder.png"], "output must be a path that can be written, got 'no/such/folder.png'"),
        (["--out", "maps.jpg"], "--out must end in .png, .pdf, .svg, got 'maps.jpg'"),
        (["--save-maps", "maps.txt"], "--save-maps must end in .npz, got 'maps.txt'"),
        (["--save-maps", "no/maps.npz"], "output must be a path that can be written, got 'no/maps.npz'"),
        (["--device", "quantum"], "device must be one of this machine, got 'quantum'"),
        (["--weights", "missing.pt"], "got 'missing.pt': no such file"),
        (["--score", "no_such_module:age"], "score must be importable, got 'no_such_module:age': there is no module"),
        (["--score", "math:lgama"], "score must name a callable, got 'math:lgama'. Did you mean"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", *arguments]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("captum-scoremap: error: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "command",
    [
        ["explain", "photos/long.png"],
        ["explain", "sample:chelsea", "photos/long.png"],
        ["check", "-i", "photos/long.png"],
    ],
    ids=["explain", "second", "check"],
)
def test_an_image_that_does_not_fit_the_model_is_named(
    command: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "photos").mkdir()
    Image.new("RGB", (40000, 1)).save(folder / "photos" / "long.png")
    assert main([*command, "--model", "torchvision:squeezenet1_1", "--weights", "none"]) == 2
    wanted = "error: image must fit the model, got 'photos/long.png': 40000 x 1 pixels are too long and narrow"
    assert wanted in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    ["explain --bundle filed", "check", "patches . --layer 1", "bench", "export"],
    ids=lambda line: line.split()[0],
)
def test_a_program_that_is_stopped_says_so_and_leaves_nothing(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "stopping.py").write_text("def build():\n    raise KeyboardInterrupt\n")
    before = set(folder.iterdir())
    try:
        assert main([*command.split(), "--model", "stopping:build"]) == 130
    finally:
        sys.modules.pop("stopping", None)
    assert capsys.readouterr() == ("", "captum-scoremap: stopped.\n")
    assert {path for path in folder.iterdir() if path.name != "__pycache__"} == before


@pytest.mark.parametrize("names", ["a", "abc"])
@pytest.mark.parametrize("command", ["explain", "explain --target 0", "check", "audit photos", "patches photos -l 0"])
def test_names_of_labels_must_be_as_many_as_scores(
    command: str, names: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "photos").mkdir()
    Image.new("RGB", (32, 32)).save(folder / "photos" / "a.png")
    (folder / "misnamed.py").write_text(
        "from torch.nn import Conv2d, Flatten, Linear, ReLU, Sequential\n"
        "from captum_scoremap.models import LoadedModel, Preprocessing\n"
        "def build():\n"
        "    network = Sequential(Conv2d(3, 4, 3), ReLU(), Flatten(), Linear(4 * 30 * 30, 2))\n"
        f"    return LoadedModel('', network, Preprocessing(32, 32), tuple('{names}'))\n"
    )
    try:
        assert main([*command.split(), "--model", "misnamed:build"]) == 2
    finally:
        sys.modules.pop("misnamed", None)
    wanted = f"labels of misnamed:build must be as many as its scores, got {len(names)} names for 2 scores. Return"
    assert wanted in capsys.readouterr().err


def test_models_without_one_score_a_label_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "pixels_in_this_folder.py").write_text(
        "from torch.nn import Conv2d\ndef build():\n    return Conv2d(3, 2, 3)\n"
    )
    try:
        assert main(["explain", "--model", "pixels_in_this_folder:build"]) == 2
    finally:
        sys.modules.pop("pixels_in_this_folder", None)
    assert "model must give scores (N, K), one per label, got (1, 2, 222, 222)" in capsys.readouterr().err


SMALL = """
import torch
from torch import nn
from captum_scoremap.models import LoadedModel, Preprocessing

class Person(nn.Module):
    def __init__(self, answer):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(4 * 15 * 15, 2)
        self.answer = answer

    def forward(self, x):
        return self.answer(self.head(self.features(x).flatten(1)))

def loaded(answer):
    return LoadedModel("", Person(answer), Preprocessing(32, 32), ("age", "height"))

def two():
    return loaded(lambda found: found)

def named():
    return loaded(lambda found: {"age": found[:, 0], "height": found[:, 1]})

def one():
    return loaded(lambda found: found[:, 0])

def scripted():
    return torch.jit.script(nn.Conv2d(3, 2, 3))

def compiled():
    return torch.compile(nn.Conv2d(3, 2, 3))

class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4 * 30 * 30, 2)

    def forward(self, x):
        y = self.norm(self.conv(x)).relu()
        return self.head(y.flatten(1)) if x.shape[2] < 100 else y

def untraceable():
    return LoadedModel("", Branching(), Preprocessing(32, 32), ("age", "height"))

class Padding(nn.Module):
    def __init__(self):
        super().__init__()
        self.features, self.head = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU()), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.features(nn.functional.pad(x, (0, 32, 0, 16))).mean((2, 3)))

def padding():
    return LoadedModel("", Padding(), Preprocessing(32, 32), ("age", "height"))

def meta():
    return nn.Conv2d(3, 2, 3, device="meta")

def broken():
    return {}["no model"]

def age(output):
    return output["age"]

def wrong(output):
    return output["weight"]
"""


@pytest.fixture
def small(folder: Path) -> Iterator[str]:
    """A module of models and scores in the current folder."""
    (folder / "small_in_this_folder.py").write_text(SMALL)
    yield "small_in_this_folder"
    sys.modules.pop("small_in_this_folder", None)


def test_check_of_a_score_of_the_user(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for model, score in (("named", ["--score", f"{small}:age"]), ("one", []), ("two", ["--target", "age"])):
        assert main(["check", "--model", f"{small}:{model}", *score, "--json", "--dtype", "float64"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert [one["label"] for one in found] == [f"{small}:age", "score", "age"]
    assert found[0]["score"] == pytest.approx(found[2]["score"], rel=1e-12)
    assert found[1]["score"] == pytest.approx(found[2]["score"], rel=1e-12)
    assert main(["check", "--model", f"{small}:named"]) == 2
    assert "got dict from small_in_this_folder:named. Say by --score what of it is meant" in capsys.readouterr().err
    assert main(["check", "--model", f"{small}:two", "--target", "top:2"]) == 2
    assert "--target must be one label, got 'top:2'" in capsys.readouterr().err


def test_what_stands_on_padding_has_no_place(small: str, folder: Path) -> None:
    arguments = ["--model", f"{small}:padding", "--layers", "input,features", "--dtype", "float64"]
    assert main(["explain", *arguments, "--save-maps", "maps.npz"]) == 0
    with np.load(folder / "maps.npz") as maps:
        assert maps["0/complete_maps/features"].shape == (16, 16)  # of 24 x 32
        total = maps["0/complete_maps/features"].sum() + maps["0/placeless"][1]
        assert total == pytest.approx(float(maps["0/score"]), rel=1e-5)


def test_a_single_number_is_explained_without_asking(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--model", f"{small}:one", "--layers", "input, features.2"]) == 0
    assert "sample:chelsea: score, S = " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "score", "maps"),
    [
        ("named", ["--score", "small_in_this_folder:age"], "score"),
        ("one", [], "complete"),
        ("two", [], "fused"),
    ],
)
def test_export_of_a_score_of_the_user(
    model: str, score: list[str], maps: str, small: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", f"{small}:{model}", "--image-size", "32", "--maps", maps, "--out", "age.pt2"]
    assert main(["export", *arguments, *score]) == 0
    takes = re.findall(r"takes\W+(\w+)", capsys.readouterr().out)
    assert takes == (["image", "target"] if model == "two" else ["image"])
    image = torch.randn(1, 3, 32, 32)
    target = [torch.tensor([0])] if model == "two" else []
    found = torch.export.load("age.pt2").module()(image, *target)
    network = getattr(sys.modules[small], model)().module.eval()
    method = {"score": LayerScoreMap, "complete": CompleteScoreMap, "fused": FusedScoreMap}[maps]
    asked = {"named": sys.modules[small].age, "one": None, "two": 0}[model]
    layer = (network.features[2],) if maps == "score" else ()
    expected = method(network, *layer).attribute(image, asked)
    one = next(value for name, value in reversed(found.items()) if name.startswith("map"))
    torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-6)


def test_patches_of_a_score_of_the_user(folder: Path, small: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "photos").mkdir()
    for number in range(3):
        Image.new("RGB", (40, 40), (60 * number, 200, 40)).save(folder / "photos" / f"{number}.png")
    shown = []
    for model, score in (("named", ["--score", f"{small}:age"]), ("one", []), ("two", [])):
        assert main(["patches", "photos", "--layer", "features.2", "--model", f"{small}:{model}", *score]) == 0
        shown.append([line for line in capsys.readouterr().out.splitlines() if "SMSM" in line])
    assert len(shown[0]) == 3  # fewer images than the nine patches of a layer
    assert shown[0] == shown[1]
    assert main(["patches", "photos", "--layer", "conv", "--model", f"{small}:untraceable"]) == 0
    assert capsys.readouterr().err == ""  # no advice of the library's, which the program follows itself


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("scripted", "model must be a model whose operations can be seen, got a scripted one"),
        ("compiled", "model must be a model whose operations can be seen, got a compiled one"),
        ("meta", "model must have numbers in its tensors, got small_in_this_folder:meta on the meta device"),
        ("broken", "KeyError: 'no model', raised in small_in_this_folder.py, line 62"),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_models_that_cannot_be_explained(
    model: str, message: str, small: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("explain", "check", "bench", "export", "audit ."):
        assert main([*command.split(), "--model", f"{small}:{model}"]) == 2
        assert message in capsys.readouterr().err


def test_errors_in_the_user_s_score_say_where(small: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--model", f"{small}:named", "--score", f"{small}:wrong"]) == 2
    assert "KeyError: 'weight', raised in small_in_this_folder.py, line" in capsys.readouterr().err


def test_unknown_options_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--dtype", "int8"]) == 2
    assert main(["explane"]) == 2
    assert "explain" in capsys.readouterr().err


def test_traceback_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--traceback", "explain", "missing.png"]) == 2
    errors = capsys.readouterr().err
    assert "Traceback (most recent call last)" in errors
    assert errors.splitlines()[-1].startswith("captum-scoremap: error: ")


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    # The function explain hides the module of its name.
    monkeypatch.setattr(sys.modules["captum_scoremap.cli.explain"], "read_image", interrupted)
    assert main(["explain"]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.filterwarnings("default")
def test_warnings_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "softmax_in_this_folder.py").write_text(
        "from torch.nn import Conv2d, Flatten, Linear, ReLU, Sequential, Softmax\n"
        "def build():\n"
        "    return Sequential(Conv2d(3, 2, 9, 9), ReLU(), Flatten(), Linear(2 * 24 * 24, 2), Softmax(1))\n"
    )
    try:
        assert main(["explain", "--model", "softmax_in_this_folder:build"]) == 0
    finally:
        sys.modules.pop("softmax_in_this_folder", None)
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("captum-scoremap: warning: ") and "softmax" in line for line in lines)
    assert all(line.startswith("captum-scoremap: ") for line in lines)


def test_a_failing_run_leaves_the_former_picture(folder: Path) -> None:
    (folder / "score_maps.png").write_bytes(b"former")
    assert main(["explain", "--target", "nothing of the kind"]) == 2
    assert (folder / "score_maps.png").read_bytes() == b"former"


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        assert main([name, "--help"]) == 0
        assert "captum-scoremap" in capsys.readouterr().out


def test_help_of_explain_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--help"]) == 0
    text = capsys.readouterr().out
    options = "model weights layers target contrast view out save-maps device dtype no-prepare".split()
    assert all(f"--{option}" in text for option in options)


def test_program_as_a_module_starts_without_any_extra() -> None:
    program = (
        "import runpy, sys\n"
        "for name in ('jinja2', 'pandas', 'pyarrow', 'ray', 'skimage', 'sklearn', 'timm'):\n"
        "    sys.modules[name] = None  # importing it raises ModuleNotFoundError\n"
        "from captum_scoremap.cli import main\n"
        "main(['--help'])\n"
        "code = main(['explain', 'sample:chelsea', '--model', 'torchvision:alexnet', '--weights', 'none'])\n"
        "print('code', code)\n"
        "sys.argv[1:] = ['--version']\n"
        "runpy.run_module('captum_scoremap', run_name='__main__', alter_sys=True)\n"  # as python -m does
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "explain" in done.stdout
    assert re.search(r"^code 2\ncaptum-scoremap \d+\.\d+\.\d+\n\Z", done.stdout, re.MULTILINE)
    (error,) = done.stderr.splitlines()
    assert (
        error == 'captum-scoremap: error: skimage is not installed. Do python -m pip install "captum-scoremap[demo]".'
    )


def test_options_shared_by_commands(folder: Path) -> None:
    assert chosen_device("cpu") == torch.device("cpu")
    assert chosen_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    check_writable(folder / "new.png")
    assert not (folder / "new.png").exists()
    with pytest.raises(ValueError, match=r"output must be a path that can be written, got .*Is a directory"):
        check_writable(folder)


def test_multi_view_says_that_a_small_image_is_enlarged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = tmp_path / "small.png"
    Image.new("RGB", (90, 60), (200, 120, 40)).save(small)
    out = tmp_path / "maps.png"
    assert main(["explain", str(small), "--view", "multi", "--layers", "features.blocks.6", "--out", str(out)]) == 0
    assert "90 x 60 pixels are less than one view (224); enlarged." in capsys.readouterr().out
    assert out.stat().st_size > 0


def test_export_writes_a_file_and_says_what_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "maps.pt2"
    assert main(["export", "--model", "tests.test_cli_bench:small", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"takes\W+image\W+N × 3 × 16 × 16\W+float32", printed)
    assert re.search(r"returns\W+residual", printed)
    found = torch.export.load(out).module()(torch.randn(3, 3, 16, 16), torch.tensor([2, 0, 1]))
    assert {name.partition(".")[0] for name in found} == {"scores", "map", "bias", "residual"}
    assert main(["export", "--model", "tests.test_cli_bench:small", "--batch", "2", "--out", str(out)]) == 0
    assert re.search(r"takes\W+image\W+2 × 3 × 16 × 16\W+float32", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "maps.txt"], r"--out must end in \.pt2, \.onnx, got 'maps.txt'"),
        (["--layers", "input,features", "--out", "maps.pt2"], "layers must be input alone or layers of the network"),
        (["--maps", "fused", "--layers", "input", "--out", "maps.pt2"], "layers must be layers of the network"),
    ],
)
def test_export_says_what_must_be(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--model", "torchvision:squeezenet1_1", "--weights", "none", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())
