"""Semantic patches against a search over all cells, and the geometry against known preprocessing."""

from __future__ import annotations

import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision import transforms
from torchvision.ops import box_iou

from captum_scoremap import LayerScoreMap, NeuronScoreMap, receptive_field, semantic_patches
from captum_scoremap.cli import main
from captum_scoremap.models import LoadedModel, Preprocessing
from captum_scoremap.patches import Patch
from captum_scoremap.patches.geometry import geometry
from captum_scoremap.visualization import visualize_patches

SIDE = 24


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(800, 4),
    ).eval()


@pytest.fixture
def pictures(generator: torch.Generator) -> Tensor:
    return torch.rand(7, 3, SIDE, SIDE, generator=generator)


def ranked(maps: Tensor) -> list[tuple[float, int, int, int]]:
    """Value, image, row and column of all cells of (N, H, W), best first."""
    cells = [
        (float(maps[n, row, col]), n, row, col)
        for n in range(len(maps))
        for row in range(maps.shape[1])
        for col in range(maps.shape[2])
    ]
    return sorted(cells, reverse=True)


def reference(model: nn.Module, layer: nn.Module, inputs: Tensor, target: Any, by: str) -> Tensor:
    """What cells are ranked by, (N, H, W): for this piecewise-linear network, from plain autograd."""
    kept: list[Tensor] = []
    above = model[2]
    handles = [one.register_forward_hook(lambda _, __, output: kept.append(output)) for one in (layer, above)]
    scores = model(inputs)
    for handle in handles:
        handle.remove()
    score = scores[torch.arange(len(inputs)), torch.as_tensor(target)].sum()
    coefficients, above_it = torch.autograd.grad(score, kept)
    activations = kept[0].detach()
    return {
        "score_map": (coefficients * activations).sum(1),
        "complete_map": (coefficients * activations).sum(1)
        + torch.einsum("nchw,c->nhw", above_it, above.bias.detach()),
        "gradient": coefficients.abs().amax(1),
        "activation": activations.sum(1),
    }[by]


@pytest.mark.parametrize("by", ["score_map", "complete_map", "gradient", "activation"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_best_cell_of_each_image(model: nn.Sequential, pictures: Tensor, by: Any, batch_size: int) -> None:
    target = [0, 1, 2, 3, 0, 1, 2]
    maps = reference(model, model[1], pictures, target, by)
    best: dict[int, tuple[float, int, int, int]] = {}
    for cell in ranked(maps):
        best.setdefault(cell[1], cell)
    expected = sorted(best.values(), reverse=True)[:4]
    found = semantic_patches(model, model[1], pictures, target, by, k=4, batch_size=batch_size)
    assert [patch.image for patch in found] == [cell[1] for cell in expected]
    torch.testing.assert_close([patch.value for patch in found], [cell[0] for cell in expected])
    assert [(patch.row, patch.col) for patch in found] == [cell[2:] for cell in expected]


def test_a_patch_is_what_its_cell_sees(model: nn.Sequential, pictures: Tensor) -> None:
    field = receptive_field(model, model[3], (SIDE, SIDE))
    for patch in semantic_patches(model, model[3], pictures, 1, k=7):
        x0, y0, x1, y1 = patch.box
        assert patch.box == field.box(patch.row, patch.col)
        assert isinstance(patch.image, int)
        torch.testing.assert_close(patch.pixels, pictures[patch.image, :, y0:y1, x0:x1], rtol=0, atol=0)
        assert patch.target == 1


def test_patches_of_one_image_do_not_overlap_and_none_better_is_passed_over(
    model: nn.Sequential, pictures: Tensor
) -> None:
    field = receptive_field(model, model[1], (SIDE, SIDE))
    (cells,) = reference(model, model[1], pictures[:1], [2], "score_map")
    found = semantic_patches(model, model[1], pictures[:1], 2, k=6, per_image=6)
    boxes = torch.tensor([patch.box for patch in found]).double()
    overlap = box_iou(boxes, boxes) > 0
    assert overlap.equal(torch.eye(6, dtype=torch.bool))
    for value, _, row, col in ranked(cells[None]):
        better = torch.tensor([patch.value >= value for patch in found])
        box = torch.tensor([field.box(row, col)]).double()
        assert value < found[-1].value or bool((box_iou(box, boxes)[0][better] > 0).any())


def test_patches_of_a_given_size_lie_around_their_cells(model: nn.Sequential, pictures: Tensor) -> None:
    field = receptive_field(model, model[3], (SIDE, SIDE))
    for patch in semantic_patches(model, model[3], pictures, 0, k=7, size=(6, 8)):
        x0, y0, x1, y1 = patch.box
        x, y = field.center(patch.row, patch.col)
        assert (x1 - x0, y1 - y0) == (8, 6)
        assert x0 == min(max(round(x - 4), 0), SIDE - 8)
        assert y0 == min(max(round(y - 3), 0), SIDE - 6)
        assert patch.pixels.shape == (3, 6, 8)


def test_a_single_channel(model: nn.Sequential, pictures: Tensor) -> None:
    sub_scores = LayerScoreMap(model, model[3]).attribute(pictures, 3, attr_dim_summation=False)
    (patch,) = semantic_patches(model, model[3], pictures, 3, k=1, channel=5)
    expected = sub_scores[:, 5]
    assert patch.value == pytest.approx(float(expected.max()))
    assert patch.value == pytest.approx(float(expected[patch.image, patch.row, patch.col]))


@pytest.mark.parametrize("by", ["score_map", "gradient"])
def test_a_single_neuron(model: nn.Sequential, pictures: Tensor, by: Any) -> None:
    method = NeuronScoreMap(model, model[3], multiply_by_inputs=by == "score_map")
    values = method.attribute(pictures, (2, 4, 4), to_layer=model[1])
    expected = values.sum(1) if by == "score_map" else values.abs().amax(1)
    (patch,) = semantic_patches(model, model[1], pictures, by=by, k=1, neuron=(model[3], (2, 4, 4)))
    assert patch.value == pytest.approx(float(expected.max()))
    assert patch.value == pytest.approx(float(expected[patch.image, patch.row, patch.col]))
    assert patch.target is None


def test_the_label_is_the_highest_where_none_is_given(model: nn.Sequential, pictures: Tensor) -> None:
    with torch.no_grad():
        highest = model(pictures).argmax(1).tolist()
    targets = [3, None, None, 0, None, 1, None]
    found = semantic_patches(model, model[3], pictures, targets, k=7)
    expected = {
        n: best if target is None else target for n, (target, best) in enumerate(zip(targets, highest, strict=True))
    }
    assert {patch.image: patch.target for patch in found} == expected


def test_channels_last_and_feature_layers(generator: torch.Generator) -> None:
    class Last(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.permute(0, 2, 3, 1)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), Last(), nn.LayerNorm(4), nn.Flatten(), nn.Linear(36, 2)).eval()
    images = torch.rand(3, 3, 12, 12, generator=generator)
    found = semantic_patches(model, model[2], images, 0, k=3, channel_dim=-1)
    assert {(patch.box[2] - patch.box[0], patch.box[3] - patch.box[1]) for patch in found} == {(4, 4)}
    (whole,) = semantic_patches(model, model[4], images, 0, k=1)
    assert (whole.row, whole.col, whole.box) == (0, 0, (0, 0, 12, 12))


def test_images_of_several_sizes(generator: torch.Generator) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    sizes = [(9, 9), (9, 9), (12, 7), (9, 9)]
    images = [torch.rand(3, *size, generator=generator) for size in sizes]
    found = semantic_patches(model, model[1], images, 0, k=4)
    assert sorted(int(patch.image) for patch in found) == [0, 1, 2, 3]  # type: ignore[arg-type]


def test_memory_does_not_grow_with_the_number_of_images(model: nn.Sequential, generator: torch.Generator) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def stream() -> Iterator[Tensor]:
        nonlocal most
        for _ in range(40):
            most = max(most, sum(reference() is not None for reference in alive))
            image = torch.rand(3, SIDE, SIDE, generator=generator)
            alive.append(weakref.ref(image))
            yield image

    found = semantic_patches(model, model[1], stream(), 0, k=5, batch_size=4)
    assert len(found) == 5
    assert most <= 13  # the batch in hand, the one that is gathered, the one that is read ahead, and one more


def preprocesses() -> dict[str, tuple[Callable[[Image.Image], Tensor], Callable[[float, float], tuple[float, float]]]]:
    """Preprocessing of a picture of 300 x 200 pixels, and where x and y of the input lie in it."""
    tensor = transforms.ToTensor()
    letterbox = transforms.Compose([transforms.Resize((64, 96)), transforms.Pad((0, 16)), tensor])
    return {
        "resize and crop": (Preprocessing(64, 56), lambda x, y: (50 + (4 + x) * 3.125, (4 + y) * 3.125)),
        "bicubic": (
            Preprocessing(100, 80, interpolation=transforms.InterpolationMode.BICUBIC),
            lambda x, y: (2 * (35 + x), 2 * (10 + y)),
        ),
        "nothing": (tensor, lambda x, y: (x, y)),
        "enlarge": (transforms.Compose([transforms.Resize(400), tensor]), lambda x, y: (x / 2, y / 2)),
        "letterbox": (letterbox, lambda x, y: (x * 3.125, (y - 16) * 3.125)),
        "mirror": (lambda image: tensor(ImageOps.mirror(image)), lambda x, y: (300 - x, y)),
        "negative": (lambda image: 1 - tensor(image), lambda x, y: (x, y)),
    }


@pytest.mark.parametrize("name", preprocesses())
def test_geometry_of_common_preprocessing(name: str) -> None:
    preprocess, where = preprocesses()[name]
    found = geometry(preprocess, Image.new("RGB", (300, 200)))
    for place in (20.0, 55.0):
        x, y = where(place, place)
        assert found.x[0] * place + found.x[1] == pytest.approx(x, abs=0.5)
        assert found.y[0] * place + found.y[1] == pytest.approx(y, abs=0.5)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA"])
def test_geometry_of_images_of_other_modes(mode: str) -> None:
    found = geometry(transforms.Compose([transforms.Resize(100), transforms.ToTensor()]), Image.new(mode, (300, 200)))
    assert found.to_original((10, 20, 30, 40)) == (20, 40, 60, 80)


@pytest.mark.parametrize(
    "preprocess",
    [
        lambda image: transforms.ToTensor()(image.rotate(20)),
        lambda image: transforms.ToTensor()(image.transpose(Image.Transpose.ROTATE_90)),
        lambda image: torch.zeros(3, 8, 8),
    ],
    ids=["rotated", "turned", "lost"],
)
def test_geometry_refuses_other_preprocessing(preprocess: Callable[[Image.Image], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"^preprocess must resize, crop, pad or mirror"):
        geometry(preprocess, Image.new("RGB", (60, 60)))


def test_boxes_of_the_original_are_inside_it_and_not_empty() -> None:
    found = geometry(transforms.Compose([transforms.Resize(64), transforms.ToTensor()]), Image.new("RGB", (4, 4)))
    assert found.to_original((0, 0, 3, 3)) == (0, 0, 1, 1)
    assert found.to_original((61, 61, 64, 64)) == (3, 3, 4, 4)
    column = geometry(transforms.Compose([transforms.Resize((8, 8)), transforms.ToTensor()]), Image.new("RGB", (1, 9)))
    assert column.to_original((2, 0, 5, 8)) == (0, 0, 1, 9)


def planted(corner: tuple[int, int]) -> Image.Image:
    """A gray picture of 96 x 64 pixels with a white square of 12."""
    image = Image.new("RGB", (96, 64), "gray")
    image.paste("white", (*corner, corner[0] + 12, corner[1] + 12))
    return image


@pytest.fixture
def bright() -> nn.Sequential:
    """The score is the sum of brightness over 128; images are halved and cropped to 32 x 32 before."""
    model = nn.Sequential(nn.Conv2d(3, 1, 4, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 1)).eval()
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[0].bias.fill_(-30)
        model[3].weight.fill_(1)
        model[3].bias.zero_()
    return model


halved = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32), transforms.ToTensor()])


def test_patches_of_files_show_the_original_resolution(bright: nn.Sequential, tmp_path: Path) -> None:
    corners = {"a.png": (24, 8), "b.png": (48, 40)}
    for name, corner in corners.items():
        planted(corner).save(tmp_path / name)
    (tmp_path / "c.png").write_bytes(b"no picture")
    left_out: dict[Path, ValueError] = {}
    found = semantic_patches(
        bright,
        bright[1],
        [tmp_path / name for name in ("a.png", "c.png", "b.png")],
        0,
        k=2,
        preprocess=halved,
        on_unreadable=left_out.__setitem__,
    )
    assert list(left_out) == [tmp_path / "c.png"]
    for patch in found:
        assert isinstance(patch.image, Path)
        x0, y0, x1, y1 = patch.box
        assert (x1 - x0, y1 - y0) == (8, 8)
        left, top = corners[patch.image.name]
        assert left <= x0 < x1 <= left + 12
        assert top <= y0 < y1 <= top + 12
        assert patch.pixels.dtype == torch.uint8
        assert bool((patch.pixels == 255).all())


def test_pictures_can_be_drawn(bright: nn.Sequential) -> None:
    found = semantic_patches(bright, bright[1], [planted((24, 8)), planted((40, 20))], 0, k=2, preprocess=halved)
    assert sorted(int(patch.image) for patch in found) == [0, 1]  # type: ignore[arg-type]
    figure, axes = visualize_patches({"1": {"SMSM": found}})
    assert len(axes) == 1
    figure.clear()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"by": "score"}, r"^by must be one of score_map, complete_map, gradient, activation, got 'score'\.$"),
        ({"k": 0}, r"^k must be at least 1, got 0\.$"),
        ({"per_image": 0}, r"^per_image must be at least 1, got 0\.$"),
        ({"k": 15, "per_image": 2}, r"^k must be at most 14, per_image of each of the 7 images, got 15\. Lower k"),
        ({"targets": [0, 1]}, r"^targets must be one label for each of the 7 images, got 2\.$"),
        ({"targets": iter([0, 1])}, r"^targets must be one label for each image, got 2, and more images\.$"),
        ({"targets": iter([0] * 8)}, r"^targets must be one label for each of the 7 images, got more\.$"),
        ({"size": 25}, r"^size must be from 1 to the input's 24 x 24 pixels, got 25 x 25\.$"),
        ({"size": (4, 0)}, r"^size must be from 1 to the input's 24 x 24 pixels, got 4 x 0\.$"),
        ({"channel": 8}, r"^channel must be from 0 to 7, got 8\.$"),
        ({"channel": 1, "by": "complete_map"}, r"^channel must be left out by complete_map"),
        ({"neuron": (nn.ReLU(), 0), "by": "complete_map"}, r"^neuron must come without targets"),
        ({"neuron": (nn.ReLU(), 0), "targets": 1}, r"^neuron must come without targets"),
        ({"images": ["a.png"] * 9}, r"^preprocess must be given for files and PIL images, got None\."),
        ({"images": ["a.png"] * 9, "preprocess": halved}, r"^image must be a readable file, got 'a.png'"),
        ({"images": [torch.rand(1, 3, 24, 24)] * 9}, r"^an image must be a tensor \(C, H, W\), got \(1, 3, 24, 24\)"),
    ],
)
def test_bad_input(model: nn.Sequential, pictures: Tensor, options: dict[str, Any], text: str) -> None:
    arguments = {"images": pictures, "k": 3, **options}
    with pytest.raises(ValueError, match=text):
        semantic_patches(model, model[3], **arguments)


def test_images_of_no_known_kind(model: nn.Sequential) -> None:
    with pytest.raises(TypeError, match=r"^an image must be a path, a PIL image or a tensor \(C, H, W\), got int\.$"):
        semantic_patches(model, model[3], [1, 2, 3], k=1)  # type: ignore[list-item]


def test_fewer_patches_than_asked_for_are_a_warning(model: nn.Sequential, pictures: Tensor) -> None:
    with pytest.warns(UserWarning, match=r"^the images gave 7 patches, fewer than k = 9\. Pass more images"):
        found = semantic_patches(model, model[3], iter(pictures), 0, k=9)
    assert len(found) == 7


def small_model() -> LoadedModel:
    """What the command line loads in these tests."""
    model = nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2))
    return LoadedModel("small", model, Preprocessing(32, 32), ("cat", "dog"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        planted((10 * number, 10)).save(folder / f"{number}.png")
    (folder / "broken.jpg").write_bytes(b"")
    (tmp_path / "labels.csv").write_text("file,label\n0.png,cat\n1.png,dog\n2.png,cat\nbroken.jpg,cat\n")
    return folder


MODEL = ["--model", "tests.test_patches:small_model"]


def test_images_that_do_not_fit_the_model_are_left_out_by_name(bright: nn.Sequential, tmp_path: Path) -> None:
    planted((24, 8)).save(tmp_path / "a.png")
    long = Image.new("RGB", (100_000, 1))
    long.save(tmp_path / "long.png")
    left_out: dict[Path, ValueError] = {}

    def patches_of(images: list[Any], **options: Any) -> list[Patch]:
        return semantic_patches(bright, bright[1], images, 0, k=1, preprocess=Preprocessing(32, 32), **options)

    files: list[Any] = [tmp_path / "long.png", tmp_path / "a.png"]
    assert [patch.image for patch in patches_of(files, on_unreadable=left_out.__setitem__)] == files[1:]
    reason = r"long\.png': 100000 x 1 pixels are too long and narrow"
    assert list(left_out) == files[:1]
    assert re.search(reason, str(left_out[files[0]]))
    with pytest.raises(ValueError, match=rf"image must fit the model, got '.*{reason}"):
        patches_of(files)
    with pytest.raises(ValueError, match="100000 x 1 pixels are too long and narrow"):
        patches_of([long], on_unreadable=left_out.__setitem__)


def test_command_draws_and_lists(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.png"
    options = ["--layer", "0", "--layer", "1", "--k", "2", "--labels", str(tmp_path / "labels.csv"), "--out", str(out)]
    assert main(["patches", str(folder), *options, *MODEL]) == 0
    said = capsys.readouterr()
    with Image.open(out) as picture:
        assert min(picture.size) > 100
    assert said.out.count("SMSM") == said.out.count("GSM") == 4
    assert said.err.count("left out: image must be a readable file") == 1
    assert "the file is empty" in said.err


def test_command_needs_nothing_of_the_audit(folder: Path, tmp_path: Path) -> None:
    arguments = ["patches", str(folder), "--layer", "1", "--k", "2", "--out", str(tmp_path / "out.png"), *MODEL]
    program = (
        "import sys\n"
        "for name in ('jinja2', 'pyarrow', 'ray'):\n"
        "    sys.modules[name] = None  # importing it raises ModuleNotFoundError\n"
        "from captum_scoremap.cli import main\n"
        f"status = main({arguments!r})\n"
        f"sys.exit(status or main(['patches', {str(folder / 'list.parquet')!r}, *{arguments[2:]!r}]))\n"
    )
    (folder / "list.parquet").touch()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (tmp_path / "out.png").exists()
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        'captum-scoremap: error: pyarrow is not installed. Do python -m pip install "captum-scoremap[audit]".'
    )


def test_command_takes_one_ranking_of_one_label(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--layer", "1", "--k", "2", "--by", "gradient", "--labels", str(tmp_path / "labels.csv")]
    options += ["--label", "cat", "--size", "8", "--out", str(tmp_path / "out.png")]
    assert main(["patches", str(folder), *options, *MODEL]) == 0
    said = capsys.readouterr().out
    assert "SMSM" not in said
    assert said.count("cat") == 2
    assert "dog" not in said
    assert main(["patches", str(folder), *options, "--by", "complete_map", *MODEL]) == 0
    assert capsys.readouterr().out.count("complete map") == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--layer", "input"], "--layer must name modules of the model, got the image itself"),
        (["--layer", "nose"], "layers must be input or names of modules of the model, got 'nose'"),
        (["--layer", "1", "--out", "out.txt"], "--out must end in .png, .pdf, .svg, got 'out.txt'"),
        (["--layer", "1", "--label", "dog"], "--label must be that of an image, got 'dog', which none has"),
        (["--layer", "1", "--k", "5"], "k must be at most 4"),
    ],
)
def test_command_refuses(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], text: str
) -> None:
    out = ["--out", str(tmp_path / "out.png")]
    assert main(["patches", str(folder), *out, *options, *MODEL]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:the images gave 0 patches")
def test_command_fails_if_nothing_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.png").write_bytes(b"")
    out = tmp_path / "out.png"
    assert main(["patches", str(tmp_path), "--layer", "1", "--k", "1", "--out", str(out), *MODEL]) == 2
    said = capsys.readouterr().err
    assert "left out: image must be a readable file" in said
    assert "FOLDER must hold an image that can be read, got 1 files of which none can" in said
    assert not out.exists()


def test_fewer_images_than_nine_give_what_they_have(model: nn.Module, pictures: Tensor) -> None:
    assert len(semantic_patches(model, model[1], pictures[:2], 0, progress=False)) == 2
    assert len(semantic_patches(model, model[1], pictures[:2], 0, per_image=6, progress=False)) == 9
    with pytest.raises(ValueError, match="images must hold at least one, got none"):
        semantic_patches(model, model[1], pictures[:0], 0)


def test_a_model_of_one_score_needs_no_target(model: nn.Module, pictures: Tensor) -> None:
    single = Single(model)
    for by in ("score_map", "complete_map", "gradient"):
        found = semantic_patches(single.eval(), model[1], pictures, by=by, k=3, progress=False)
        other = semantic_patches(model, model[1], pictures, 1, by=by, k=3, progress=False)
        assert [(one.image, one.box, one.value) for one in found] == [(one.image, one.box, one.value) for one in other]
        assert {one.target for one in found} == {None}


class Single(nn.Module):
    """One label's score, (N,)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[:, 1]


@pytest.mark.parametrize(
    ("layer", "kind", "message"),
    [
        ("0", TypeError, r"layer must be a module, got .*'0'.*get_submodule\("),
        (None, TypeError, "layer must be a module, got None"),
        (torch.relu, TypeError, "layer must be a module, got "),
        (nn.ReLU(), ValueError, "layer must "),
    ],
)
def test_a_layer_is_a_module_of_the_model(layer: Any, kind: type[Exception], message: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)).eval()
    with pytest.raises(kind, match=message):
        semantic_patches(model, layer, torch.rand(2, 3, 8, 8), k=1, progress=False)
    with pytest.raises(kind, match=message):
        receptive_field(model, layer, (8, 8))
