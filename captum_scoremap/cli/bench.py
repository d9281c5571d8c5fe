"""``captum-scoremap bench``: what explaining costs with your own model, beside a plain pass."""

import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

from captum_scoremap.attribution import LayerScoreMap, ScoreMap
from captum_scoremap.cli.console import make_console
from captum_scoremap.cli.explanation import find_layers
from captum_scoremap.cli.options import (
    CompileOption,
    DeviceOption,
    DType,
    DTypeOption,
    ImageSizeOption,
    ModelOption,
    ScoreOption,
    WeightsOption,
    chosen_device,
    names_in,
)
from captum_scoremap.cli.questions import example_target
from captum_scoremap.compiled import Mode, compile_map
from captum_scoremap.cost import Job, Spread, forward_backward, interleaved, peak_memory, setting
from captum_scoremap.layout import map_channel_dim
from captum_scoremap.linear import layer_shapes, main_layers
from captum_scoremap.models import DEFAULT_MODEL, load_model, prepare
from captum_scoremap.scores import Target, select_scores

LABEL = 0
ALL_LABELS = "all labels, last layer"
PLAIN = "forward and backward"
PREPARED = ", prepared"
COMPILED = ", compiled"


@dataclass(frozen=True)
class _Subject:
    """What is explained.

    Attributes:
        model: The network.
        inputs: Images, (N, C, H, W).
        layers: Name of each layer and the dimension of its channels.
        target: Whose score is explained.
    """

    model: nn.Module
    inputs: Tensor
    layers: dict[str, int]
    target: Target = LABEL


@dataclass(frozen=True)
class _Recipe:
    """How to load the subject, in any process.

    Attributes:
        model: Name of the model.
        weights: Its weights.
        image_size: Side of its images in pixels; None for its own.
        layers: Names of layers; none for the main ones.
        score: Function of the model's output that is explained; None for a label's score.
        batch: Number of images.
        device: Where to compute.
        dtype: In which type.
    """

    model: str
    weights: str
    image_size: int | None
    layers: tuple[str, ...]
    score: str | None
    batch: int
    device: str
    dtype: torch.dtype

    def subject(self) -> _Subject:
        loaded = load_model(self.model, self.weights, self.device, self.dtype, self.image_size)
        image = loaded.example().to(self.device, self.dtype)
        target = example_target(self.score, loaded.module, image, loaded.name)
        layers = layouts(loaded.module, image, self.layers)
        return _Subject(loaded.module, image.repeat(self.batch, 1, 1, 1), layers, target)


def _inference(subject: _Subject) -> Job:
    def job() -> object:
        with torch.no_grad():
            return subject.model(subject.inputs)

    return job


def _plain(subject: _Subject) -> Job:
    def scores(images: Tensor) -> Tensor:
        return select_scores(subject.model(images), subject.target, len(images))[:, None]

    return partial(forward_backward, scores, subject.inputs, 0)


def _input_map(subject: _Subject) -> Job:
    return partial(ScoreMap(subject.model).attribute, subject.inputs, subject.target)


def _methods(subject: _Subject) -> dict[int, LayerScoreMap]:
    """Return a method for each dimension of channels: one pass serves all layers whose channels lie in the same."""
    return {
        channel_dim: LayerScoreMap(
            subject.model,
            [subject.model.get_submodule(name) for name, own in subject.layers.items() if own == channel_dim],
        )
        for channel_dim in sorted(set(subject.layers.values()))
    }


def _layer_maps(subject: _Subject) -> Job:
    methods = _methods(subject)
    return lambda: [
        method.attribute(subject.inputs, subject.target, channel_dim=channel_dim)
        for channel_dim, method in methods.items()
    ]


def _all_labels(subject: _Subject) -> Job:
    name, channel_dim = list(subject.layers.items())[-1]
    method = LayerScoreMap(subject.model, subject.model.get_submodule(name))
    return partial(method.attribute_targets, subject.inputs, channel_dim=channel_dim)


def _mode(subject: _Subject) -> Mode:
    return "reduce-overhead" if subject.inputs.is_cuda else "default"


def _compiled_input_map(subject: _Subject) -> Job:
    compiled = compile_map(ScoreMap(subject.model), subject.inputs, subject.target, mode=_mode(subject))
    return partial(compiled, subject.inputs, subject.target)


def _compiled_layer_maps(subject: _Subject) -> Job:
    compiled = [
        compile_map(method, subject.inputs, subject.target, mode=_mode(subject), channel_dim=channel_dim)
        for channel_dim, method in _methods(subject).items()
    ]
    return lambda: [one(subject.inputs, subject.target) for one in compiled]


_EXPLAINING: dict[str, Callable[[_Subject], Job]] = {
    "one map at the input": _input_map,
    "maps of all layers": _layer_maps,
    ALL_LABELS: _all_labels,
}
_COMPILING: dict[str, Callable[[_Subject], Job]] = {
    f"one map at the input{COMPILED}": _compiled_input_map,
    f"maps of all layers{COMPILED}": _compiled_layer_maps,
}
_WORK = {"inference": _inference, PLAIN: _plain, **_EXPLAINING, **_COMPILING}


def bench(
    model: ModelOption = DEFAULT_MODEL,
    weights: WeightsOption = "default",
    image_size: ImageSizeOption = None,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers",
            "-l",
            metavar="A,B,...",
            help="Names of layers, from image to score. \\[default: the last layer of each resolution]",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", metavar="N", help="Images computed together.", min=1)] = 8,
    rounds: Annotated[
        int, typer.Option("--rounds", metavar="N", help="Readings of each job, which take turns.", min=1)
    ] = 5,
    score: ScoreOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
    device: DeviceOption = "auto",
    dtype: DTypeOption = DType.float32,
    prepare_model: Annotated[
        bool,
        typer.Option(
            "--prepare/--no-prepare",
            help="Measure a faster copy of the model, too, its batch norms folded; or the model as it is alone.",
        ),
    ] = True,
    compile_maps: CompileOption = None,
) -> None:
    """Measure what explaining costs with a model, beside a plain forward and backward pass.

    Time: all jobs take turns, and ratios are taken within each round; printed are medians and, in brackets, the range.
    Memory: the peak beyond the loaded model, of each job in a process of its own. The images are noise. On a CUDA
    device compiled maps are replayed as CUDA graphs.

    **Examples**

    * `captum-scoremap bench --model torchvision:resnet50 --weights none`

    * `captum-scoremap bench --model my_package.models:build --batch 1 --rounds 20 --json`
    """
    place = chosen_device(device)
    names = tuple(names_in(layers))
    recipe = _Recipe(model, weights, image_size, names, score, batch, str(place), dtype.torch)
    subject = recipe.subject()
    explaining = {name: work for name, work in _EXPLAINING.items() if name != ALL_LABELS or subject.target == LABEL}
    plain = {name: work for name, work in _WORK.items() if name not in _EXPLAINING and name not in _COMPILING}
    jobs = {name: work(subject) for name, work in (plain | explaining).items()}
    fastest = _prepared(subject) if prepare_model else subject
    if prepare_model:
        jobs |= {name + PREPARED: work(fastest) for name, work in explaining.items()}
    if compile_maps is not False:
        jobs |= _compiled(fastest, PREPARED if prepare_model else "")
    bar = partial(tqdm, delay=1.0, disable=None, leave=False)
    seconds = interleaved(jobs, rounds, place, progress=partial(bar, unit="round"))
    jobs.clear()  # they hold what they have made
    peaks = {
        name: peak_memory(partial(_alone, name, recipe), partial(_warm_up, name, str(place), dtype.torch), place)
        for name in bar(seconds, unit="process")
    }
    about = {
        "model": model,
        "images": " × ".join(map(str, subject.inputs.shape)),
        "dtype": dtype.value,
        "rounds": rounds,
        "layers": list(subject.layers),
        **setting(place),
    }
    rows = [_row(name, seconds, peaks) for name in seconds]
    if as_json:
        print(json.dumps({**about, "jobs": rows}, indent=2))
        return
    console = make_console()
    console.print(_table(rows))
    for name, value in about.items():
        console.print(f"{name}: {', '.join(value) if isinstance(value, list) else value}", soft_wrap=True)


def layouts(model: nn.Module, image: Tensor, names: Sequence[str]) -> dict[str, int]:
    """Return the layers to explain, and the dimension of their channels."""
    found = find_layers(model, names or main_layers(model, image))
    if not found or None in found.values():
        raise ValueError(f"layers must be modules that give maps, got {', '.join(found) or 'none'}. Name some.")
    shapes = layer_shapes(model, image)
    channel_dims = {}
    for name in found:
        channel_dim = map_channel_dim(shapes.get(name, ()), tuple(image.shape))
        if channel_dim is None:
            got = shapes.get(name, "no tensor, or several")
            raise ValueError(f"layers must give maps (N, C, h, w) or tokens (N, T, C), got {name}, which gives {got}.")
        channel_dims[name] = channel_dim
    return channel_dims


def _compiled(subject: _Subject, suffix: str) -> dict[str, Job]:
    """Return the jobs that are compiled; none, with the reason, where they cannot be."""
    print("bench: maps are compiled first, which takes minutes; --no-compile leaves it out", file=sys.stderr)
    try:
        return {name + suffix: work(subject) for name, work in _COMPILING.items()}
    except ValueError as error:
        print(f"bench: maps are not compiled: {str(error).partition(chr(10))[0]}", file=sys.stderr)
        return {}


def _prepared(subject: _Subject) -> _Subject:
    return replace(subject, model=prepare(subject.model, subject.inputs[:1]))


def _named(name: str, subject: _Subject) -> Job:
    """Return the job of this name."""
    if name.endswith(PREPARED):
        return _WORK[name.removesuffix(PREPARED)](_prepared(subject))
    return _WORK[name](subject)


def _alone(name: str, recipe: _Recipe) -> Job:
    """Return the job in a process of its own, in which the model has run before, so that its libraries are loaded."""
    warnings.simplefilter("ignore")  # they have been shown
    return _named(name, recipe.subject())


def _warm_up(name: str, device: str, dtype: torch.dtype) -> None:
    """Do the job once on a small network, so that what it imports is there."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 2)).to(device, dtype)
    _named(name, _Subject(network.eval(), torch.zeros(1, 3, 8, 8, device=device, dtype=dtype), {"1": 1}))()


def _row(name: str, seconds: Mapping[str, list[float]], peaks: Mapping[str, int | None]) -> dict[str, Any]:
    """Return the cost of one job, as JSON has it."""
    peak, plain = peaks[name], peaks[PLAIN]
    return {
        "job": name,
        "seconds": seconds[name],
        "of_plain": asdict(Spread.ratio(seconds[name], seconds[PLAIN])),
        "peak_bytes": peak,
        "peak_of_plain": peak / plain if peak is not None and plain else None,
    }


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table()
    table.add_column("job", overflow="fold")
    for heading in ("ms", "of plain", "peak, MiB", "of plain"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["job"],
            f"{Spread.of([1000 * value for value in row['seconds']]):.1f}",
            f"{Spread(**row['of_plain']):.2f}",
            "unknown" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}",
            "" if row["peak_of_plain"] is None else f"{row['peak_of_plain']:.2f}",
        )
    return table
