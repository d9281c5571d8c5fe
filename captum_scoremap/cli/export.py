"""``captum-scoremap export``: a model and its maps as one file, which runs without this package."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from torch import Tensor, nn

from captum_scoremap.attribution import CompleteScoreMap, FusedScoreMap, LayerScoreMap, ScoreMap
from captum_scoremap.cli.bench import layouts
from captum_scoremap.cli.console import make_console
from captum_scoremap.cli.explanation import INPUT, find_layers
from captum_scoremap.cli.options import (
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
from captum_scoremap.cli.questions import example_target
from captum_scoremap.compiled import Exported, compile_map
from captum_scoremap.compiled.export import FORMATS
from captum_scoremap.models import DEFAULT_MODEL, load_model, prepare

Method = ScoreMap | LayerScoreMap | CompleteScoreMap | FusedScoreMap


class ExportedMaps(str, Enum):
    """Which maps the file computes."""

    score = "score"
    complete = "complete"
    fused = "fused"


def export(
    model: ModelOption = DEFAULT_MODEL,
    weights: WeightsOption = "default",
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers",
            "-l",
            metavar="A,B,...",
            help="Names of layers, or input. \\[default: of score maps the last layer of each resolution]",
            show_default=False,
        ),
    ] = None,
    maps: Annotated[
        ExportedMaps,
        typer.Option(
            "--maps",
            help="score: A·Y of each layer, and B; complete: one map that adds up to S; fused: one map to look at.",
        ),
    ] = ExportedMaps.score,
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch",
            metavar="N",
            help="Images that the file takes at once. \\[default: any number of them]",
            min=1,
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FILE", help="What to write: .onnx (extra onnx), or .pt2 for PyTorch."),
    ] = Path("model_with_map.onnx"),
    image_size: ImageSizeOption = None,
    score: ScoreOption = None,
    device: DeviceOption = "auto",
    dtype: DTypeOption = DType.float32,
    prepare_model: PrepareOption = True,
) -> None:
    """Write a model together with its maps as one file, to be run in production.

    The file takes any number of images, preprocessed as for the model, and the label of each (none with --score); of a
    network that computes otherwise with several, one at a time, and a warning says so. It returns the scores, the maps
    and the other side of the sum: of score maps B and the residual S − (A·Y + B), of the complete map what has no place
    in the image. It needs no captum_scoremap; an .onnx file needs no PyTorch. What was written is run once more and
    compared.

    **Examples**

    * `captum-scoremap export --out model_with_map.onnx`

    * `captum-scoremap export --model torchvision:resnet18 --layers layer3,layer4 --out maps.pt2`

    * `captum-scoremap export --model my_package.models:build --score my_package.scores:age --out age.onnx`
    """
    check_suffix("out", out, FORMATS)
    check_writable(out)
    place = chosen_device(device)
    loaded = load_model(model, weights, place, dtype.torch, image_size)
    image = loaded.example().to(place, dtype.torch)
    inputs = image.repeat(batch or 1, 1, 1, 1)
    network = prepare(loaded.module, image) if prepare_model else loaded.module
    target = example_target(score, network, image, loaded.name)
    method, options = _method(network, inputs, maps, names_in(layers))
    compiled = compile_map(method, inputs, target, backend="graph", **options)
    exported = compiled.export(out, any_number=batch is None)
    size = out.stat().st_size / 2**20
    console = make_console()
    console.print(_table(exported))
    console.print(f"{out}: {loaded.name}, {size:.0f} MiB; run again, it gives the same maps.", soft_wrap=True)


def _method(network: nn.Module, inputs: Tensor, maps: ExportedMaps, names: list[str]) -> tuple[Method, dict[str, Any]]:
    """Return the method that the options ask for, and what else it takes."""
    if maps is ExportedMaps.score and names == [INPUT]:
        return ScoreMap(network), {}
    if maps is ExportedMaps.score:
        if INPUT in names:
            raise ValueError("layers must be input alone or layers of the network, got both. Export two files.")
        found = layouts(network, inputs[:1], names)
        if len(set(found.values())) > 1:
            raise ValueError(
                "layers must have their channels in one dimension, got "
                + ", ".join(f"{name} with {dim}" for name, dim in found.items())
                + ". Name those of one kind."
            )
        method = LayerScoreMap(network, [network.get_submodule(name) for name in found])
        return method, {"channel_dim": next(iter(found.values()))}
    modules = find_layers(network, names)
    if maps is ExportedMaps.complete:
        chosen = [module for module in modules.values() if module is not None]
        if len(chosen) < len(modules) > 1:
            raise ValueError("layers must be input alone or layers of the network, got both. Name one kind.")
        return CompleteScoreMap(network, (chosen or "image") if names else None), {}
    if None in modules.values():
        raise ValueError(
            "layers must be layers of the network for a fused map, which has the input as it is, got input."
        )
    return FusedScoreMap(network, [module for module in modules.values() if module is not None] or None), {}


def _table(exported: Exported) -> Table:
    table = Table()
    for heading in ("", "name", "shape", "type"):
        table.add_column(heading, overflow="fold")
    for verb, found in (("takes", exported.takes), ("returns", exported.returns)):
        for name, (shape, dtype) in found.items():
            table.add_row(verb, name, " × ".join(map(str, shape)), str(dtype).removeprefix("torch."))
    return table
