"""``captum-scoremap explain``: score maps of images, drawn and counted."""

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import closing
from enum import Enum
from itertools import chain, count
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from tqdm import tqdm

from captum_scoremap.attribution import CompleteScoreMap
from captum_scoremap.cli.bundle import Bundle
from captum_scoremap.cli.console import make_console
from captum_scoremap.cli.explanation import INPUT, Explanation, find_layers, layer_numbers
from captum_scoremap.cli.options import (
    PICTURE_FORMATS,
    DeviceOption,
    DType,
    DTypeOption,
    ImageSizeOption,
    ModelOption,
    PrepareOption,
    ScoreOption,
    WeightsOption,
    check_suffix,
    check_writable,
    chosen_device,
    names_in,
)
from captum_scoremap.cli.questions import Question, questions
from captum_scoremap.data.ahead import map_ahead
from captum_scoremap.data.pictures import SAMPLE_PREFIX, image_named
from captum_scoremap.linear import linear_form, main_layers
from captum_scoremap.models import DEFAULT_MODEL, SAMPLES, LoadedModel, load_model, prepare, read_image
from captum_scoremap.multiview import MultiView
from captum_scoremap.visualization import visualize_layer_score_maps

# Pixels of the longer side of a photograph in a picture.
_LARGEST_DRAWN = 640
# Bytes of what the name of one picture of several says of it; file systems take 255 for the whole.
_LONGEST_NAME = 120


class Maps(str, Enum):
    """What is drawn of each layer."""

    complete = "complete"
    score = "score"


class View(str, Enum):
    """How much of the image is explained."""

    single = "single"
    multi = "multi"


def explain(
    context: typer.Context,
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMAGE",
            help=f"Image files, or sample:NAME with one of {', '.join(SAMPLES)}. \\[default: sample:chelsea]",
            show_default=False,
        ),
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    weights: WeightsOption = "default",
    image_size: ImageSizeOption = None,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers",
            "-l",
            metavar="A,B,...",
            help="Names of layers, or input. \\[default: input and the last layer of each resolution]",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "-t",
            metavar="LABEL",
            help="Name or index of a label, or top:N for the best N. \\[default: top:1]",
            show_default=False,
        ),
    ] = None,
    contrast: Annotated[
        str | None,
        typer.Option("--contrast", "-c", metavar="LABEL", help="Explain why the target and not this label."),
    ] = None,
    score: ScoreOption = None,
    maps: Annotated[
        Maps,
        typer.Option(
            "--maps", help="complete: B is drawn, too, where it comes from, and maps add up to S; score: A·Y alone."
        ),
    ] = Maps.complete,
    view: Annotated[
        View,
        typer.Option("--view", help="single: the center of the image; multi: the mean over all views of it."),
    ] = View.single,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FILE", help="Picture, png, pdf or svg; of several, each is numbered."),
    ] = Path("score_maps.png"),
    save_maps: Annotated[
        Path | None,
        typer.Option("--save-maps", metavar="FILE.npz", help="Save maps and numbers as NumPy arrays, too."),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(
            "--bundle",
            metavar="FOLDER",
            help="File it all in a new folder: pictures, arrays, and a manifest with residuals, versions, the command.",
        ),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DTypeOption = DType.float32,
    prepare_model: PrepareOption = True,
) -> None:
    """Draw where in an image the score of a label comes from, at several layers.

    At every layer the score is an exact sum, S = A·Y + B. The score map shows A·Y place by place, in logits:
    red adds to the score, blue takes from it. B is the sum of all constants above the layer; the complete map
    adds each of them where it arises, and so adds up to S. Read its sums over regions: red and blue cancel.
    The table has A·Y, B, and the residual |S − (A·Y + B)| / (|S| + |A·Y|), which is rounding only.
    Images that cannot be read are named at the end; all others are explained.

    **Examples**

    * `captum-scoremap explain` (a photograph of a cat; nothing is downloaded)

    * `captum-scoremap explain photo.jpg --target top:3`

    * `captum-scoremap explain photo.jpg --target "tiger cat" --contrast lynx`

    * `captum-scoremap explain a.jpg b.jpg --model torchvision:resnet50 --layers layer3,layer4`

    * `captum-scoremap explain photo.jpg --model my_package.models:build --weights weights.pt`

    * `captum-scoremap explain photo.jpg --model my_package.models:build --score my_package.scores:age`
    """
    check_suffix("out", out, PICTURE_FORMATS)
    if save_maps:
        check_suffix("save-maps", save_maps, (".npz",))
    filed = None
    if bundle is not None:
        filed = context.with_resource(Bundle(bundle))
        out, save_maps = bundle / out.name, bundle / (save_maps.name if save_maps else "maps.npz")
    for path in filter(None, (out, save_maps)):
        check_writable(path)

    names = images or [f"{SAMPLE_PREFIX}{SAMPLES[0]}"]
    place = chosen_device(device)
    loaded = load_model(model, weights, place, dtype.torch, image_size)
    preprocess = loaded.preprocessing if view is View.single else loaded.preprocessing.whole
    console = make_console()

    def read(name: str) -> "Read | ValueError":
        try:
            picture = read_image(name)
            with image_named(name):
                inputs = preprocess(picture)[None]
        except ValueError as error:
            return error
        return name, inputs.to(place, dtype.torch), picture

    arrays: dict[str, Any] = {}

    def save() -> None:
        if save_maps and arrays:
            np.savez_compressed(save_maps, **arrays)
            console.print(f"Maps: {save_maps}", soft_wrap=True)

    left_out: list[ValueError] = []
    with closing(map_ahead(read, names, ahead=1)) as found_or_not:
        pictures = _taken(found_or_not, left_out)
        first = next(pictures, None)
        if first is None:
            raise _error(left_out)
        network = prepare(loaded.module, first[1]) if prepare_model else loaded.module
        if view is View.multi:
            network = MultiView.from_classifier(network, view_size=loaded.preprocessing.crop)
        found = find_layers(network, names_in(layers) or _default_layers(network, first[1]))
        asked = questions(score, target, contrast, loaded)
        total = len(names) * len(asked(network, first[1]))
        explanations: list[Explanation] = []
        numbers = count(1)
        try:
            with tqdm(total=total * len(found), delay=1.0, disable=None, unit="layer", leave=False) as progress:
                for name, inputs, picture in chain([first], pictures):
                    if view is View.multi:
                        _note_enlarged(console, name, picture.size, loaded.preprocessing.crop)
                    for question in asked(network, inputs):
                        explanation = _answer(network, name, inputs, question, found, progress)
                        number = next(numbers)
                        path = out if total == 1 else _numbered(out, number, explanation)
                        _draw(explanation, loaded, maps, picture if view is View.single else None, path)
                        explanations.append(explanation)
                        if save_maps:
                            arrays |= {f"{number - 1}/{key}": value for key, value in explanation.arrays().items()}
                        with tqdm.external_write_mode():
                            console.print(explanation.table())
                            console.print(explanation.where_it_is(), soft_wrap=True)
                            console.print(f"Picture: {path}", soft_wrap=True)
        except BaseException:
            if filed is None:  # a folder that is filed is whole, or not there
                save()
            raise
    save()
    if filed is not None:
        filed.write(context, loaded.module, explanations, left_out)
        console.print(f"Bundle: {bundle}", soft_wrap=True)
    if left_out:
        raise _error(left_out)


Read = tuple[str, Tensor, Image.Image]
"""An image: its name, what the network takes, the picture."""


def _taken(images: Iterable[Read | ValueError], left_out: list[ValueError]) -> Iterator[Read]:
    """Return the images that could be taken, and note why others could not."""
    for image in images:
        if isinstance(image, ValueError):
            left_out.append(image)
        else:
            yield image


def _error(left_out: list[ValueError]) -> ValueError:
    """Return the error that names all images that could not be taken."""
    return ValueError("\n".join(map(str, left_out)))


def _note_enlarged(console: Console, name: str, size: tuple[int, int], view_size: int | None) -> None:
    """Say so where an image is smaller than one view."""
    if view_size is not None and min(size) < view_size:
        pixels = " x ".join(map(str, size))
        console.print(f"{name}: {pixels} pixels are less than one view ({view_size}); enlarged.", soft_wrap=True)


def _default_layers(network: nn.Module, inputs: Tensor) -> list[str]:
    """Return the image and the main layers; of a multi-view network those below its sliding layer."""
    if isinstance(network, MultiView):
        return [INPUT, *(f"features.{name}" for name in main_layers(network.features, inputs))]
    return [INPUT, *main_layers(network, inputs)]


def _numbered(out: Path, number: int, explanation: Explanation) -> Path:
    """Return the path of one picture of several: it says what is on it."""
    image = Path(explanation.image.removeprefix(SAMPLE_PREFIX)).stem
    words = "_".join(re.findall(r"\w+", f"{image} {explanation.label}"))
    words = words.encode()[:_LONGEST_NAME].decode(errors="ignore")  # file systems count bytes
    return out.with_stem(f"{out.stem}_{number}_{words}")


def _answer(
    network: nn.Module,
    image: str,
    inputs: Tensor,
    question: Question,
    layers: dict[str, nn.Module | None],
    progress: "tqdm[Any]",
) -> Explanation:
    """Explain: the linear form at every layer, and the complete map."""
    forms = linear_form(network, inputs, question.score, list(layers.values()))
    numbers = [layer_numbers(form, name, inputs) for name, form in zip(layers, forms, strict=True)]
    progress.update(len(numbers))
    complete, placeless = CompleteScoreMap(network).attribute(inputs, question.score, return_placeless=True)
    return Explanation(
        image,
        question.label,
        question.target,
        question.contrast,
        float(forms[0].score),
        inputs[0],
        tuple(numbers),
        complete[0, 0],
        float(placeless),
    )


def _draw(
    explanation: Explanation, loaded: LoadedModel, maps: Maps, photograph: Image.Image | None, path: Path
) -> None:
    """Write the picture (Fig. 2 of the paper), on the photograph if there is one, else on what the network saw."""
    rows = explanation.layers
    if maps is Maps.complete:
        drawn = {"complete map": explanation.complete_map} | {row.layer: row.complete_map for row in rows}
        rest = {"complete map": explanation.placeless} | {row.layer: row.placeless for row in rows}
        sums: dict[str, Any] = {"placeless": rest}
    else:
        drawn = {row.layer: row.score_map for row in rows}
        sums = {"biases": {row.layer: row.bias for row in rows}}
    preprocessing = loaded.preprocessing
    if photograph is None:
        scene: dict[str, Any] = {
            "image": explanation.inputs.float().cpu(),
            "mean": preprocessing.mean,
            "std": preprocessing.std,
        }
    else:
        small = photograph.copy()
        small.thumbnail((_LARGEST_DRAWN, _LARGEST_DRAWN))
        scene = {"image": small, "box": preprocessing.box(small.size)}
    panels = 1 + len(drawn)
    figure, _ = visualize_layer_score_maps(
        {name: one.float().cpu() for name, one in drawn.items()},
        **scene,
        label=explanation.label,
        score=explanation.score,
        **sums,
        columns=math.ceil(panels / math.ceil(panels / 5)),
    )
    figure.canvas.print_figure(path, dpi=150)
