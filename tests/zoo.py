"""Whole model zoos with random weights, and how exact S = A·Y + B is in each.

``python -m tests.zoo --out tests/zoo_table.md`` measures every classification model of torchvision, one of every
family of timm, and every image classifier of transformers with a small configuration, and writes the table. A row is
written as soon as it is known, and a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from captum_scoremap import LayerScoreMap, freeze, linear_form
from captum_scoremap.checks import UnsupportedOperationError
from captum_scoremap.layout import map_channel_dim
from captum_scoremap.linear import Subject, explain_completely, layer_shapes
from captum_scoremap.scores import logits_in
from tests import hugging_face
from tests.layers import called_once
from tests.tables import Table

MANY = 1_000_003  # random numbers; tensors with more repeat them
LARGEST_IMAGE = 500 * 500  # pixels that fit in memory in float64
PIXELS = 100_000  # values of the images that go in one batch
FILLING = frozenset((
    "normal_",
    "uniform_",
    "trunc_normal_",
    "kaiming_uniform_",
    "kaiming_normal_",
    "xavier_uniform_",
))

# --- random models -------------------------------------------------------------------------------------


def randomize(model: nn.Module, inputs: Tensor, generator: torch.Generator) -> nn.Module:
    """Random weights, biases and norm statistics of non-trivial size, in float64.

    Weights keep the size of activations (He et al. 2015). Batch norms take their statistics from the given
    images and are set off from them by a random part, so that activations neither vanish nor explode however
    deep the model is, yet no norm is trivial. Other parameters (class tokens, position embeddings, layer
    scales) get noise on top of what they are.
    """
    model.double().eval()

    def noise(tensor: Tensor) -> Tensor:
        few = torch.randn(min(tensor.numel(), MANY), generator=generator, dtype=tensor.dtype)
        return few.repeat(tensor.numel() // len(few) + 1)[: tensor.numel()].view(tensor.shape).to(tensor.device)

    def statistics(module: _BatchNorm, arguments: tuple[Tensor, ...]) -> None:
        channels = arguments[0].transpose(0, 1).flatten(1)
        mean, spread = channels.mean(1), channels.var(1, unbiased=False)
        assert module.running_mean is not None
        assert module.running_var is not None
        spread = spread + 0.1 * spread.mean() + 1e-3
        module.running_mean.copy_(mean + 0.3 * spread.sqrt() * noise(mean))
        module.running_var.copy_(spread * (0.7 + 0.6 * torch.rand(spread.shape, generator=generator).to(spread)))

    owners = {parameter: module for module in model.modules() for parameter in module.parameters(recurse=False)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            owner, is_weight = owners[parameter], parameter.dim() > 1 and name.endswith("weight")
            if is_weight and isinstance(owner, (nn.Linear, nn.MultiheadAttention, nn.modules.conv._ConvNd)):
                gain = math.sqrt(2) if isinstance(owner, nn.modules.conv._ConvNd) else 1.0
                parameter.copy_(gain * noise(parameter) / math.sqrt(parameter[0].numel()))
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise(parameter))
            elif name.endswith("weight") and parameter.dim() == 1:
                parameter.copy_(1 + 0.3 * noise(parameter))
            elif parameter.numel() > MANY:
                parameter.copy_(0.3 * noise(parameter))  # not filled before, see Unfilled
            else:
                parameter.add_(0.3 * noise(parameter))
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        handles = [norm.register_forward_pre_hook(statistics) for norm in norms]
        model(inputs.clone())
        for handle in handles:
            handle.remove()
    return model.requires_grad_(True)


class Unfilled(TorchFunctionMode):
    """Leave large tensors as they are made: `randomize` fills them anyway, which takes long enough once."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if getattr(function, "__name__", "") in FILLING and args and args[0].numel() > MANY:
            return args[0]
        return function(*args, **(kwargs or {}))


class PixelScore(nn.Module):
    """The scores of one pixel of a segmentation network, (N, K)."""

    def __init__(self, model: nn.Module, row: int, column: int) -> None:
        super().__init__()
        self.model = model
        self.row, self.column = row, column

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.model(x)["out"]
        return scores[:, :, self.row, self.column]


@dataclass(frozen=True)
class Entry:
    """A model of a zoo: how to build it, and the (C, *size) of a small image for it."""

    zoo: str
    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.zoo}:{self.name}"


def torchvision_entry(name: str) -> Entry:
    """A classification model of torchvision, for as small an image as it takes."""
    kwargs: dict[str, object] = {}
    size = 32
    if name.startswith("vit"):
        size = 28 if name.endswith("14") else 64
        kwargs = {"image_size": size}
    elif name.startswith("maxvit"):
        size = 224  # its windows leave no choice
    elif name.startswith(("efficientnet", "mobilenet_v3")):
        size = 64  # on fewer pixels rounding errors grow: scores move 1e4 times as much as the image
    elif name in {"alexnet", "inception_v3"}:
        size = 79
    elif name.startswith(("vgg", "squeezenet")):
        size = 36
    if name in {"googlenet", "inception_v3"}:
        kwargs = {"init_weights": False}
    return Entry(
        "torchvision",
        name,
        lambda: torchvision.models.get_model(name, weights=None, **kwargs),
        (3, size, size),
    )


def segmentation() -> nn.Module:
    return PixelScore(torchvision.models.get_model("fcn_resnet50", weights=None, weights_backbone=None), 20, 30)


def small_maxvit() -> nn.Module:
    return torchvision.models.MaxVit((64, 64), 16, 4, [16, 32], [1, 2], 8, 0.2, num_classes=10)


def small_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10)


EXTRA = {
    "fcn_resnet50": Entry("torchvision", "fcn_resnet50", segmentation, (3, 40, 40)),
    "small maxvit": Entry("torchvision", "small maxvit", small_maxvit, (3, 64, 64)),
    "small vit": Entry("torchvision", "small vit", small_vit, (3, 32, 32)),
    "r3d_18": Entry("torchvision", "r3d_18", lambda: torchvision.models.get_model("r3d_18"), (3, 3, 12, 12)),
}

PIECEWISE_LINEAR = (
    "alexnet",
    "vgg11",
    "vgg11_bn",
    "resnet18",
    "densenet121",
    "squeezenet1_1",
    "googlenet",
    "inception_v3",
    "shufflenet_v2_x1_0",
    "mnasnet1_0",
    "mobilenet_v2",
    "regnet_x_400mf",
    "fcn_resnet50",
    "r3d_18",
)
SMOOTH = (
    "convnext_tiny",
    "efficientnet_b0",
    "small maxvit",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "swin_t",
    "swin_v2_t",
    "small vit",
)


def entry(name: str) -> Entry:
    return EXTRA.get(name) or torchvision_entry(name)


def all_of_torchvision() -> list[Entry]:
    """Every classification model of torchvision, and one each for segmentation and video."""
    names = torchvision.models.list_models(module=torchvision.models)
    return [*map(torchvision_entry, names), EXTRA["fcn_resnet50"], EXTRA["r3d_18"]]


SMALL = ("atto", "femto", "pico", "nano", "xxs", "xxtiny", "_xs", "xtiny", "tiny", "mini", "small", "lite", "_s", "_t")


def families_of_timm(parts: Sequence[str] = ("",)) -> Iterator[Entry]:
    """A small model of every family (module) of timm, as its name tells.

    Args:
        parts: Only those whose own or family's name contains one of these.
    """
    import timm

    def size(name: str) -> tuple[int, int, str]:
        return next((i for i, word in enumerate(SMALL) if word in name), len(SMALL)), len(name), name

    for family in timm.list_modules():
        names = [name for name in timm.list_models(module=family) if not name.startswith("test_")]
        if not names:
            continue
        name = min(names, key=size)
        if any(part in f"{name} ({family})" for part in parts):
            yield timm_entry(name, family)  # this builds it


def all_of_transformers() -> list[Entry]:
    """Every image classifier of transformers, small."""
    return [Entry("transformers", name, *hugging_face.small(name)) for name in hugging_face.classifiers()]


def in_single_precision(entry: Entry) -> bool:
    """Whether the model casts to float32 inside: its residuals are those of float32."""
    return entry.name.endswith("(efficientvit_mit)") or entry.name in hugging_face.IN_SINGLE_PRECISION


def timm_entry(name: str, family: str) -> Entry:
    """A model of timm, at the smallest of a few image sizes that it takes."""
    import timm

    def build(**kwargs: int) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: nn.Module = timm.create_model(name, **kwargs).eval()
        return model

    usual = timm.get_pretrained_cfg_value(name, "input_size") or (3, 224, 224)
    for size in (64, 128, usual[-1]):
        for kwargs in ({"img_size": size}, {}):
            try:
                with torch.no_grad():
                    build(**kwargs)(torch.zeros(1, 3, size, size))
            except Exception:  # not of this size, or not told so
                continue
            return Entry("timm", f"{name} ({family})", partial(build, **kwargs), (3, size, size))
    return Entry("timm", f"{name} ({family})", build, tuple(usual))


# --- how exact -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What was measured of one model; residuals are |S - (A·Y + B)| / (|S| + |A·Y|).

    Attributes:
        entry: the model.
        at_input: residual at the image.
        at_layers: worst residual of the layers checked.
        worst: name of that layer.
        checked: number of layers checked.
        layers: number of layers there are.
        forward: relative difference of the frozen model's scores from the model's own.
        complete: worst |sum of C + placeless - S| / |S| at the image and the layers checked that are maps.
        bias_maps: worst |sum of the bias maps - B| / (|S| + |A·Y|), with B from the frozen model.
        problem: why there are no numbers.
    """

    entry: Entry
    at_input: float = math.nan
    at_layers: float = math.nan
    worst: str = ""
    checked: int = 0
    layers: int = 0
    forward: float = math.nan
    complete: float = math.nan
    bias_maps: float = math.nan
    problem: str = ""


def relative_residual(score: Tensor, product: Tensor, bias: Tensor) -> float:
    """The worst |S - (A·Y + B)| / (|S| + |A·Y|) of a batch; 0 where score and product are zero."""
    size = (score.abs() + product.abs()).clamp_min(torch.finfo(score.dtype).tiny)
    return float(((score - (product + bias)).abs() / size).max())


def measure(entry: Entry, model: nn.Module, inputs: Tensor, most: int | None = None) -> Row:
    """The residuals of a model's highest score at an image and at its layers.

    A·Y of all layers comes from one run of the package, S from the model itself, and B of each layer from the
    frozen model with that layer's output at zero: three numbers found in three ways.

    Args:
        entry: what is measured, for the row.
        model: the model in evaluation mode.
        inputs: one image, (1, C, H, W).
        most: number of layers to look at, spread over the model; None for all.
    """
    with torch.no_grad():
        scores = logits_in(model(inputs.clone()))
    label = int(scores[0].argmax())
    score = scores[:, label]
    form = linear_form(model, inputs, label)
    at_input = relative_residual(score, form.sub_scores.sum()[None], form.bias)

    with torch.no_grad():
        difference = (logits_in(freeze(model, inputs)(inputs)) - scores).abs().max() / scores.abs().max()
    layers = called_once(model, inputs)
    names = spread(list(layers), most or len(layers))
    chosen = {name: layers[name] for name in names}
    sub_scores = LayerScoreMap(model, list(chosen.values())).attribute(inputs, label, attr_dim_summation=False)
    biases = at_zero(model, inputs, label, chosen)
    complete, of_bias_maps = completeness(model, inputs, label, score, {"": form.bias} | biases, chosen)
    worst = (0.0, "")
    for (name, bias), products in zip(biases.items(), sub_scores, strict=True):
        worst = max(worst, (relative_residual(score, products.sum()[None], bias), name))
    return Row(entry, at_input, worst[0], worst[1], len(names), len(layers), float(difference), complete, of_bias_maps)


def completeness(
    model: nn.Module,
    inputs: Tensor,
    label: int,
    score: Tensor,
    biases: Mapping[str, Tensor],
    layers: Mapping[str, nn.Module],
) -> tuple[float, float]:
    """How well complete maps add up to S, and bias maps to B, at the image and at the layers that are maps.

    Args:
        model: the model in evaluation mode.
        inputs: one image, (1, C, H, W).
        label: index of the score.
        score: S of the model itself, (1,).
        biases: B by name of the layer, "" for the image, found without the bias maps.
        layers: name to module.

    Returns:
        The two worst residuals; NaN for what is no image (a video).
    """
    if inputs.dim() != 4:
        return math.nan, math.nan
    shapes = layer_shapes(model, inputs.clone())
    maps = [name for name in layers if map_channel_dim(shapes[name], tuple(inputs.shape)) is not None]
    sites = [None, *((layers[name], False) for name in maps)]
    books, _ = explain_completely(Subject(model, (inputs,)), label, sites)
    complete = of_bias_maps = 0.0
    for name, book in zip(["", *maps], books, strict=True):
        entries = [*book.maps.items(), *book.placeless.items()]
        own, above = (sum((one.sum() for key, one in entries if bool(key) == of), 0 * score) for of in (False, True))
        complete = max(complete, float((own + above - score).abs() / score.abs()))
        size = float(score.abs() + (score - biases[name]).abs())
        of_bias_maps = max(of_bias_maps, float((above - biases[name]).abs()) / size)
    return complete, of_bias_maps


def at_zero(model: nn.Module, inputs: Tensor, label: int, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """B of every layer, (1,): the score of the frozen model with that layer's output at zero.

    Many layers go together in one batch of copies of the image, each at zero in the copy of its own, and the last
    copy is left as it is: where its score changes, the model mixes the images of a batch (timm's csatv2 attends over
    them), and its layers go one by one. Ordinary forward hooks set them to zero, not the package: the frozen model
    shares the factors that they multiply by, which are changed past its watch over constants, by ``data``.

    Args:
        model: the model in evaluation mode.
        inputs: one image, (1, C, H, W).
        label: index of the score.
        layers: name to module.
    """
    together = min(max(PIXELS // inputs.numel(), 1), len(layers))
    count = together + 1
    copies = inputs.repeat(count, *[1] * (inputs.dim() - 1))
    keep = torch.ones(len(layers), count, dtype=inputs.dtype)

    alone = without_image(model, inputs, layers)

    def scaled_by(row: Tensor, name: str) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, _arguments: object, output: Tensor) -> Tensor:
            if len(output) % count:
                alone.add(name)  # no images, but a table of positions, say
                return output
            # windows and frames are batch-major; a view of the row, so that what is in it later counts, too
            images = output.unflatten(0, (count, len(output) // count))
            return (images * row.view(-1, *[1] * output.dim())).flatten(0, 1)

        return hook

    handles = [layer.register_forward_hook(scaled_by(keep[i], name)) for i, (name, layer) in enumerate(layers.items())]
    biases: list[Tensor] = []
    try:
        with torch.no_grad():
            frozen = freeze(model, copies)
            score = logits_in(frozen(copies))[-1, label]
            for first in range(0, len(layers), together):
                group = keep.data[first : first + together]
                group.fill_diagonal_(0)
                scores = logits_in(frozen(copies))[:, label]
                group.fill_(1)
                biases += scores[: len(group)].split(1)
                if not torch.isclose(scores[-1], score, rtol=1e-12, atol=1e-14):
                    alone.update(list(layers)[first : first + together])
    finally:
        for handle in handles:
            handle.remove()
    found = dict(zip(layers, biases, strict=True))
    return found | {name: linear_form(model, inputs, label, layers[name]).bias for name in alone}


def without_image(model: nn.Module, inputs: Tensor, layers: Mapping[str, nn.Module]) -> set[str]:
    """Names of layers that give the same at any image, such as a table of positions: constants of a frozen model."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in layers}

    def recorder(name: str) -> Callable[..., None]:
        return lambda _module, _arguments, output: outputs[name].append(output)

    handles = [layer.register_forward_hook(recorder(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            for image in (inputs, torch.randn(inputs.shape, generator=torch.Generator().manual_seed(1)).to(inputs)):
                model(image.clone())
    finally:
        for handle in handles:
            handle.remove()
    return {name for name, (one, other) in outputs.items() if torch.equal(one, other)}


def spread(names: Sequence[str], count: int) -> list[str]:
    """At most `count` of the names, evenly from the first to the last."""
    if count >= len(names):
        return list(names)
    return [names[i * (len(names) - 1) // max(count - 1, 1)] for i in range(count)]


def random_entry(entry: Entry, seed: int = 0, images: int = 1) -> tuple[nn.Module, Tensor]:
    """The entry's model, randomized, and images for it."""
    generator = torch.Generator().manual_seed(seed)
    with Unfilled():
        model = entry.build()
    calibration = torch.randn(max(images, 4), *entry.shape, generator=generator, dtype=torch.float64)
    return randomize(model, calibration, generator), calibration[:images].clone()


def measured(entries: Iterable[Entry], most: int | None = None) -> Iterator[Row]:
    """A row for each entry, whatever happens."""
    for item in entries:
        try:
            if math.prod(item.shape[1:]) > LARGEST_IMAGE:
                yield Row(item, problem="not measured, for its size")
                continue
            model, inputs = random_entry(item)
            yield measure(item, model, inputs, most)
        except UnsupportedOperationError as error:
            counts: dict[str, str] = {}
            for operation, module in error.operations:
                counts.setdefault(operation, module)
            named = ", ".join(f"{operation} (`{module}`)" for operation, module in counts.items())
            yield Row(item, problem=f"unsupported: {named}")
        except Exception as error:  # the table says what went wrong
            yield Row(item, problem=f"{type(error).__name__}: {shorten(str(error), 120, placeholder='...')}")
        gc.collect()


# --- table ---------------------------------------------------------------------------------------------

HEADER = """\
# How exact the linear form is, model by model

Random weights, biases and norm statistics in float64, one image, the highest score. A residual is
|S - (A·Y + B)| / (|S| + |A·Y|): S from the model, A·Y from the attribution, B from the frozen model with the
layer at zero. *Layers* are the modules that run once and give a float tensor, of which some, spread over the
model, were looked at. *Forward* is the relative difference of the frozen model's scores at the image from the
model's own. *Complete* is the worst |sum of C + placeless - S| / |S| of complete maps, and *bias maps* the worst
|sum of the bias maps - B| / (|S| + |A·Y|), at the image and at those of the layers that are maps. Models marked *
compute a part in float32, whatever they are given.

Written by `python -m tests.zoo{looked_at}` with {versions}.

| model | image | residual at the image | worst at a layer | layers | forward | complete | bias maps |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


def line(row: Row) -> str:
    size = "×".join(str(n) for n in row.entry.shape[1:])
    name = f"{row.entry}{'*' if in_single_precision(row.entry) else ''}"
    if row.problem:
        return f"| {name} | {size} | {row.problem} | | | | | |"
    return (
        f"| {name} | {size} | {row.at_input:.0e} | {row.at_layers:.0e} "
        f"| {row.checked} of {row.layers} | {row.forward:.0e} | {row.complete:.0e} | {row.bias_maps:.0e} |"
    )


def entries_of(zoo: str, parts: Sequence[str] = ("",)) -> Iterable[Entry]:
    """Those of a zoo whose name contains one of the parts."""
    if zoo == "timm":
        return families_of_timm(parts)  # which are built to be entries
    entries = all_of_torchvision() if zoo == "torchvision" else all_of_transformers()
    return (item for item in entries if any(part in item.name for part in parts))


def main(arguments: Sequence[str] | None = None) -> None:
    installed = [zoo for zoo in ("torchvision", "timm", "transformers") if importlib.util.find_spec(zoo)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--zoo", choices=installed, nargs="*", default=installed, help="where from (default %(default)s)"
    )
    parser.add_argument("--models", nargs="*", default=[""], help="only those whose name contains one of these")
    parser.add_argument("--layers", type=int, default=None, help="look at so many layers of each model (default all)")
    parser.add_argument("--out", type=Path, default=None, help="where to write the table, else only printed")
    options = parser.parse_args(arguments)
    entries = itertools.chain.from_iterable(entries_of(zoo, options.models) for zoo in options.zoo)
    packages = dict.fromkeys(("torch", "torchvision", *options.zoo))
    # the public version, without the build
    versions = ", ".join(f"{one} {metadata.version(one).partition('+')[0]}" for one in packages)
    looked_at = "" if options.layers is None else f" --layers {options.layers}"
    table = Table(HEADER.format(looked_at=looked_at, versions=versions), options.out)
    for row in measured((item for item in entries if not table.has(str(item))), options.layers):
        table.add(line(row))


if __name__ == "__main__":
    main()
