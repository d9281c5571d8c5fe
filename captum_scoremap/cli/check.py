"""``captum-scoremap check``: is the linear form of a model exact, and what is it made of?"""

import json
import sys
from functools import partial
from typing import Annotated

import typer
from rich.table import Table
from tqdm import tqdm

from captum_scoremap.cli.console import make_console
from captum_scoremap.cli.options import (
    DeviceOption,
    DType,
    DTypeOption,
    ImageSizeOption,
    ModelOption,
    ScoreOption,
    WeightsOption,
    chosen_device,
)
from captum_scoremap.cli.questions import questions
from captum_scoremap.data.pictures import SAMPLE_PREFIX, image_named
from captum_scoremap.linear import Exactness, LayerExactness, check_exactness
from captum_scoremap.models import DEFAULT_MODEL, SAMPLES, load_model, read_image


def check(
    model: ModelOption = DEFAULT_MODEL,
    weights: WeightsOption = "default",
    image_size: ImageSizeOption = None,
    image: Annotated[
        str,
        typer.Option(
            "--image", "-i", metavar="IMAGE", help=f"Image file, or sample:NAME with one of {', '.join(SAMPLES)}."
        ),
    ] = f"{SAMPLE_PREFIX}{SAMPLES[0]}",
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "-t",
            metavar="LABEL",
            help="Name or index of a label.  \\[default: the predicted one]",
            show_default=False,
        ),
    ] = None,
    score: ScoreOption = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            metavar="X",
            help="Largest residual that counts as rounding.  \\[default: 1e-9, 1e-4, 5e-2 for 64, 32, 16 bits]",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
    device: DeviceOption = "auto",
    dtype: DTypeOption = DType.float32,
) -> None:
    """Check that S = A·Y + B holds for a model, at the image and at every layer.

    For each layer it prints what runs there, what is frozen of it by which kind of rule, the residual
    |S − (A·Y + B)| / (|S| + |A·Y|) at its output, and the share of its biases in B. Operations without a rule are
    listed.

    The exit status is 0 if everything is exact, else 1.

    **Examples**

    * `captum-scoremap check --model torchvision:vit_b_16 --weights none`

    * `captum-scoremap check --model my_package.models:build --dtype float64 --json`

    * `captum-scoremap check --model my_package.models:build --score my_package.scores:age`
    """
    place = chosen_device(device)
    loaded = load_model(model, weights, place, dtype.torch, image_size)
    with image_named(image):
        inputs = loaded.preprocessing(read_image(image))[None].to(place, dtype.torch)
    question, *more = questions(score, target, None, loaded)(loaded.module, inputs)
    if more:
        raise ValueError(f"--target must be one label, got {target!r}. Check them one by one.")
    progress = partial(tqdm, delay=1.0, disable=None, unit="layer", leave=False)
    found = check_exactness(loaded.module, inputs, question.score, tolerance=tolerance, progress=progress)
    if as_json:
        print(json.dumps(_as_json(found, loaded.name, question.label), indent=2))
    else:
        console = make_console()
        console.print(_table(found, f"{loaded.name}, {question.label}"))
        console.print(_verdict(found))
    if not found.is_exact:
        sys.exit(1)


def _table(found: Exactness, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("layer", overflow="fold")
    table.add_column("operations", overflow="fold")
    table.add_column("residual", justify="right", no_wrap=True)
    table.add_column("share of B", justify="right", no_wrap=True)
    for layer in found.layers:
        wrong = bool(layer.unsupported) or (layer.residual is not None and not layer.residual <= found.tolerance)
        table.add_row(
            layer.layer or "(model)",
            _operations(layer),
            "" if layer.residual is None else f"{layer.residual:.1e}",
            f"{layer.bias:+.4f}" if layer.bias else "",
            style="bold red" if wrong else None,
        )
    return table


def _operations(layer: LayerExactness) -> str:
    """``relu (mask), conv2d, add ×2``; unsupported ones first."""
    named = [f"{name} (no rule)" for name in layer.unsupported]
    for (name, kind), count in layer.operations.items():
        named.append(name + ("" if kind == "linear" else f" ({kind})") + (f" ×{count}" if count > 1 else ""))
    return ", ".join(named)


def _verdict(found: Exactness) -> str:
    if found.score is None or found.bias is None:
        names = sorted({name for layer in found.layers for name in layer.unsupported})
        return f"Not exact: no rule for {', '.join(names)}. Supply them from Python: rules={{{names[0]!r}: Tangent()}}."
    share = f"S = {found.score:.4f} logits, B at the image = {found.bias:.4f}."
    kind = "Exact" if found.is_exact else "Not exact"
    return f"{kind}: largest residual {found.worst:.1e}, tolerance {found.tolerance:.0e}. {share}"


def _as_json(found: Exactness, model: str, label: str) -> dict[str, object]:
    return {
        "model": model,
        "label": label,
        "exact": found.is_exact,
        "tolerance": found.tolerance,
        "worst_residual": None if found.score is None else found.worst,
        "score": found.score,
        "bias": found.bias,
        "layers": [
            {
                "layer": layer.layer,
                "operations": [
                    {"operation": name, "frozen": None if kind == "linear" else kind, "calls": count}
                    for (name, kind), count in layer.operations.items()
                ],
                "unsupported": list(layer.unsupported),
                "residual": layer.residual,
                "bias": layer.bias,
            }
            for layer in found.layers
        ],
    }
