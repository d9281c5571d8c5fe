"""``captum-scoremap patches``: the image regions behind the highest values of layers, as a picture."""

import sys
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from torch import nn

from captum_scoremap.cli.console import make_console
from captum_scoremap.cli.explanation import find_layers
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
)
from captum_scoremap.cli.questions import questions, score_function
from captum_scoremap.data.sources import FileSource, open_source
from captum_scoremap.models import DEFAULT_MODEL, LoadedModel, load_model, prepare
from captum_scoremap.patches import By, Patch, semantic_patches
from captum_scoremap.visualization import visualize_patches


class Ranking(str, Enum):
    """What the positions of a layer are ranked by."""

    score_map = "score_map"
    complete_map = "complete_map"
    gradient = "gradient"
    both = "both"


def patches(
    folder: Annotated[
        str,
        typer.Argument(metavar="FOLDER", help="Images in a folder, to any depth; or a list of them, .csv or .parquet."),
    ],
    layers: Annotated[
        list[str],
        typer.Option("--layer", "-l", metavar="NAME", help="Name of a layer; repeat the option for several."),
    ],
    labels: Annotated[
        Path | None,
        typer.Option(
            "--labels",
            metavar="CSV",
            help="List with the columns file and label, a name or an index. \\[default: the names of the uppermost "
            "folders, or for each image the label that scores highest]",
            show_default=False,
        ),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option("--label", metavar="LABEL", help="Take images of this label only; its name or index."),
    ] = None,
    by: Annotated[
        Ranking,
        typer.Option(
            "--by",
            help="Rank by score_map (SMSM), complete_map, gradient (GSM, Simonyan et al. 2013), or both SMSM and GSM.",
        ),
    ] = Ranking.both,
    k: Annotated[
        int | None,
        typer.Option(
            "--k",
            "-k",
            metavar="N",
            help="Patches of each layer. \\[default: 9, or as many as the images have]",
            show_default=False,
        ),
    ] = None,
    per_image: Annotated[int, typer.Option("--per-image", help="How many may come from one image.")] = 1,
    size: Annotated[
        int | None,
        typer.Option(
            "--size",
            metavar="PIXELS",
            help="Side of a patch in pixels of the network's input. \\[default: the receptive field]",
            show_default=False,
        ),
    ] = None,
    channel: Annotated[
        int | None, typer.Option("--channel", metavar="N", help="Use this channel of the layers alone.")
    ] = None,
    score: ScoreOption = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Picture, png, pdf or svg.")] = Path(
        "patches.png"
    ),
    model: ModelOption = DEFAULT_MODEL,
    weights: WeightsOption = "default",
    image_size: ImageSizeOption = None,
    device: DeviceOption = "auto",
    dtype: DTypeOption = DType.float32,
    prepare_model: PrepareOption = True,
) -> None:
    """Draw the image regions that the highest values of a layer come from (Fig. 4 of the paper).

    SMSM ranks the positions of a layer by what they add to the score of the image's label, in logits; GSM by the
    gradient alone. Files that cannot be read are left out and listed at the end.

    **Examples**

    * `captum-scoremap patches photos --layer blocks.2 --layer blocks.4`

    * `captum-scoremap patches photos --layer blocks.4 --label "tiger cat" --size 96 --per-image 3`

    * `captum-scoremap patches photos --layer layer3 --model torchvision:resnet50 --labels labels.csv`

    * `captum-scoremap patches photos --layer 4 --model my_package.models:build --score my_package.scores:age`
    """
    _check_picture(out)
    place = chosen_device(device)
    loaded = load_model(model, weights, place, dtype.torch, image_size)
    example = loaded.example().to(place, dtype.torch)
    network = prepare(loaded.module, example) if prepare_model else loaded.module
    modules = _modules(network, layers)
    questions(score, None, None, loaded)(network, example)  # says if there is no score, or no name for each
    files, targets = _files(folder, labels, label, loaded)

    function = score_function(score)
    left_out: dict[Path, ValueError] = {}

    def ranked(layer: nn.Module, ranking: By) -> list[Patch]:
        return semantic_patches(
            network,
            layer,
            files,
            function or targets,
            ranking,
            k,
            per_image=per_image,
            size=size,
            channel=channel,
            preprocess=lambda image: loaded.preprocessing(image).to(dtype.torch),
            on_unreadable=left_out.__setitem__,
        )

    titles: dict[By, str] = {"score_map": "SMSM", "complete_map": "complete map", "gradient": "GSM"}
    rankings = [one for one in titles if by.value == one or (by is Ranking.both and one != "complete_map")]
    found = {name: {titles[one]: ranked(layer, one) for one in rankings} for name, layer in modules.items()}
    if len(left_out) < len(files):
        figure, _ = visualize_patches(found, show_values=False)  # they stand in the table
        figure.canvas.print_figure(out, dpi=150)
        console = make_console()
        console.print(_table(found, loaded))
        console.print(f"Picture: {out}", soft_wrap=True)
    _report(left_out, files)


def _check_picture(path: Path) -> None:
    """Raise unless a picture can be written there."""
    check_suffix("out", path, PICTURE_FORMATS)
    check_writable(path)


def _report(left_out: Mapping[Path, ValueError], files: Sequence[Path]) -> None:
    """List the files that could not be read, and raise if nothing was left."""
    for reason in left_out.values():
        print(f"captum-scoremap: left out: {reason}", file=sys.stderr)
    if len(left_out) == len(files):
        raise ValueError(f"FOLDER must hold an image that can be read, got {len(files)} files of which none can.")


def _modules(network: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Return the layers that the user named."""
    found = find_layers(network, names)
    modules = {name: module for name, module in found.items() if module is not None}
    if len(modules) < len(found):
        raise ValueError("--layer must name modules of the model, got the image itself. Choose a layer.")
    return modules


def _files(
    folder: str, labels: Path | None, label: str | None, loaded: LoadedModel
) -> tuple[list[Path], list[int | None]]:
    """Return image files and their labels, None where not known; of one label only, if the user named one."""
    source = open_source(folder, labels, loaded.labels or None)
    if not isinstance(source, FileSource):
        raise ValueError(f"FOLDER must be a folder or a list of image files, got {folder!r}.")
    pairs = [(source.path(index), target) for index, target in enumerate(source.labels)]
    if label is not None:
        wanted = loaded.label_index(label)
        pairs = [(path, target) for path, target in pairs if target == wanted]
        if not pairs:
            raise ValueError(
                f"--label must be that of an image, got {label!r}, which none has. Name another, or --labels."
            )
    return [path for path, _ in pairs], [target for _, target in pairs]


def _table(found: Mapping[str, Mapping[str, Sequence[Patch]]], loaded: LoadedModel) -> Table:
    """Return all patches, where they come from and what they were chosen by."""
    table = Table()
    for heading in ("layer", "by", "image", "label"):
        table.add_column(heading, overflow="fold")
    for heading in ("x0, y0, x1, y1", "value"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer, by_ranking in found.items():
        for ranking, some in by_ranking.items():
            for patch in some:
                name = patch.image.name if isinstance(patch.image, Path) else str(patch.image)
                label = "" if patch.target is None else loaded.label_name(patch.target)
                table.add_row(layer, ranking, name, label, ", ".join(map(str, patch.box)), f"{patch.value:.4g}")
            table.add_section()
    return table
