"""``captum-scoremap audit``: a model over a whole data set, and a page with what it looks at."""

import os
import re
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from captum_scoremap.cli.options import (
    CompileOption,
    DeviceOption,
    ImageSizeOption,
    ModelOption,
    PrepareOption,
    WeightsOption,
    chosen_device,
    names_in,
)
from captum_scoremap.models import DEFAULT_MODEL, load_model
from captum_scoremap.models.loading import imported

if TYPE_CHECKING:
    from captum_scoremap.audit import Audit

_NAMED = 10  # images that are named for a condition
_CHANGES = 5  # labels that are named where runs are compared
_RAY = "--ray"
_ADDRESS = re.compile(r"local|auto|ray://.+|[\w.-]+:\d+")


class AuditCommand(TyperCommand):
    """The command, whose option ``--ray`` may stand without an address: Typer knows no optional values."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the address of a local cluster where there is none, also right before SOURCE."""
        args = [
            f"{_RAY}=local" if one == _RAY and not _ADDRESS.fullmatch(after) else one
            for one, after in pairwise([*args, ""])
        ]
        return super().parse_args(ctx, args)


def audit(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder of images, a list of them (.csv, .parquet), or torchvision:NAME/SPLIT:ROOT.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder for results and report.")] = Path(
        "audit"
    ),
    model: ModelOption = DEFAULT_MODEL,
    weights: WeightsOption = "default",
    image_size: ImageSizeOption = None,
    labels: Annotated[
        Path | None,
        typer.Option("--labels", metavar="FILE", help="True labels: a .csv or .parquet with columns path and label."),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers",
            "-l",
            metavar="A,B,...",
            help="Layers to map, from image to score. \\[default: the last of each of the three coarsest resolutions]",
            show_default=False,
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option("--metrics", metavar="A,B", help="Also insertion, deletion; each takes many passes an image."),
    ] = None,
    maps: Annotated[
        str,
        typer.Option(
            "--maps",
            metavar="KIND",
            help="score: A·Y of each layer, beside B; complete: also all of B that has a place in the image.",
        ),
    ] = "score",
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", help="Take N images, evenly spread over the source.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the audit in DIR.")] = False,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-on",
            metavar="CONDITION",
            help='Exit with 2 if it holds, and name the images: "residual>1e-3", "border_share>0.5", "accuracy<0.7". '
            "May be given several times.",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            _RAY,
            metavar="[ADDRESS]",
            help="Compute on a Ray cluster: local (without an address), auto, HOST:PORT or ray://HOST:PORT.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", metavar="N", help="Actors on the Ray cluster.", min=1)] = 2,
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", help="Images computed together.", min=1)] = 16,
    shard_size: Annotated[int, typer.Option("--shard-size", metavar="N", help="Images written together.", min=1)] = 128,
    device: DeviceOption = "auto",
    prepare_model: PrepareOption = True,
    compile_maps: CompileOption = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            "--compare",
            metavar="OTHER_RUN",
            help="Folder of another audit of the same model: which labels gained or lost since, and by what.",
        ),
    ] = None,
    show_paths: Annotated[
        bool, typer.Option("--show-paths", help="Name the files in the report by their full path on this machine.")
    ] = False,
    single_file: Annotated[
        bool, typer.Option("--single-file", help="Put all of the report in one file; for up to 500 images.")
    ] = False,
    score: Annotated[
        str | None,
        typer.Option(
            "--score",
            metavar="MODULE:FUNCTION",
            help="Audit what a function makes of the model's output: a score for each label, or one number an image.",
        ),
    ] = None,
) -> None:
    """Find out what a model looks at over a whole data set, and where it looks at the wrong thing.

    Every image is explained at several layers by the exact sum S = A·Y + B. DIR/report.html shows accuracy, how exact
    the explanation is, labels that may be recognized by a shortcut (a mark, a border), confused pairs, and every image
    with its score maps; it needs no server and no network. The numbers are Parquet files beside it. Folders named like
    the model's labels give the true labels.

    **Examples**

    * `captum-scoremap audit photos/`

    * `captum-scoremap audit photos/ --labels labels.csv --model torchvision:resnet50 --out audit-resnet50`

    * `captum-scoremap audit photos/ --out audit-resnet50 --resume` (after an interruption)

    * `captum-scoremap audit new-camera/ --out audit-new --compare audit-old` (what changed)

    * `captum-scoremap audit photos/ --model my_package.models:build --score my_package.scores:age` (any number)

    * `captum-scoremap audit photos/ --ray --workers 4` (in four processes of this machine)

    * `captum-scoremap audit test/ --fail-on "residual>1e-3" --fail-on "accuracy<0.7"` (in a build pipeline)
    """
    from captum_scoremap.audit import audit as run
    from captum_scoremap.audit.conditions import failures, parse_condition
    from captum_scoremap.audit.worker import METRICS

    conditions = [parse_condition(text) for text in fail_on or ()]
    measures = names_in(metrics)
    for condition in conditions:
        if condition.name in METRICS and condition.name not in measures:
            raise ValueError(f"--fail-on {condition} needs --metrics {','.join([*measures, condition.name])}.")
    with _stoppable(out):
        done = run(
            source,
            load_model(model, weights, image_size=image_size),
            out=out,
            labels=labels,
            layers=names_in(layers) or None,
            metrics=measures,
            maps=maps,
            limit=limit,
            resume=resume,
            ray=ray,
            workers=workers,
            batch_size=batch_size,
            shard_size=shard_size,
            device=chosen_device(device),
            prepare_model=prepare_model,
            compile_maps=compile_maps,
            show_paths=show_paths,
            single_file=single_file,
            compare_with=compare,
            score=None if score is None else imported("score", score),
        )
    _say(_said(done), out)
    failed_on = failures(conditions, done.images, done.layers, done.settings["layers"][-1])
    for failure in failed_on:
        about = "" if failure.value is None else f" ({len(failure.images)} images)"
        typer.echo(f"{failure}{about}", err=True)
        for line in _some(failure.images):
            typer.echo(line, err=True)
    if failed_on:
        sys.exit(2)


class _Terminated(BaseException):
    """The system asked the program to end."""


@contextmanager
def _stoppable(out: Path) -> Iterator[None]:
    """Say what is kept and how to go on where the user or the system ends an audit."""
    try:
        with _signals_raised():
            yield
    except (KeyboardInterrupt, _Terminated) as end:
        from captum_scoremap.audit.shards import Shards

        kept = Shards(out).count_images()
        how = (
            f"{kept} images are kept in {out}. Go on with the same command and --resume" if kept else "Nothing is kept"
        )
        print(f"captum-scoremap: stopped. {how}.", file=sys.stderr)
        sys.exit(130 if isinstance(end, KeyboardInterrupt) else 143)


@contextmanager
def _signals_raised() -> Iterator[None]:
    """Raise where the program is asked to end, again and again: what is raised inside a destructor is lost."""
    asked: list[int] = []
    has_timer = hasattr(signal, "setitimer")

    def stop(number: int, _: object) -> None:
        asked.append(number)
        if has_timer:
            signal.setitimer(signal.ITIMER_REAL, 0.5)
        raise KeyboardInterrupt if asked[0] == signal.SIGINT else _Terminated

    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        wanted = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGALRM") if hasattr(signal, name)]
        before = {one: signal.signal(one, stop) for one in wanted if signal.getsignal(one) is not signal.SIG_IGN}
    try:
        yield
    finally:
        if asked and has_timer:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for one, handler in before.items():
            signal.signal(one, handler)


def _say(lines: Iterable[str], out: Path) -> None:
    """Print lines; a reader who has gone away does no harm."""
    try:
        for line in lines:
            typer.echo(line)
    except BrokenPipeError:
        with Path(os.devnull).open("w") as nowhere:  # what is still to be written at the end goes there
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        print(f"captum-scoremap: standard output is closed. Results and report are in {out}.", file=sys.stderr)


def _said(done: "Audit") -> Iterator[str]:
    """What the program says at the end."""
    from captum_scoremap.audit.analysis import INEXACT

    summary = done.analysis.summary
    yield f"{summary['audited']} images audited, {len(summary['failed'])} not."
    yield from _some([f"{failed['name']}: {failed['error']}" for failed in summary["failed"]])
    if summary["accuracy"] is not None:
        unknown = summary["audited"] - summary["labeled"]
        more = f"; {unknown} have no true label" if unknown else ""
        yield f"Accuracy: {summary['accuracy']:.1%} of {summary['labeled']} labeled images{more}."
    for layer in summary["layers"]:
        if layer["residual_max"] is not None:
            yield f"Layer {layer['layer']}: largest residual {layer['residual_max']:.1e} logits."
    for finding in (one for one in done.analysis.findings if one["confident"]):
        effect = finding["effect"]
        pair = f", which {finding['true_name']} is taken for" if finding["kind"] == "confused pair" else ""
        yield (
            f"Finding: {finding['name']}{pair}, {finding['kind']}, {len(finding['images'])} images: without it S falls "
            f"by {effect['score_fall']:.1f} of {effect['score']:.1f} logits (control: "
            f"{effect['control_score_fall']:.1f})."
        )
    for change in [one for one in done.analysis.changes if one["confident"] and one["change"] > 0][:_CHANGES]:
        before, now = f"{change['predicted_before']:.1%}", f"{change['predicted']:.1%}"
        yield f"Gained: {change['name']}, {change['change']:+.2f} logits; predicted for {now}, before {before}."
    if done.prepared is not None:
        yield f"Explained is a prepared copy, {done.prepared}."
    yield f"Report: {done.report}"
    inexact = [layer["layer"] for layer in summary["layers"] if layer["inexact"]]
    if inexact:
        yield (
            f"Not exact: the residual of {summary['inexact']} images is above {INEXACT:g} of their score |S|, at "
            f"{', '.join(inexact)}. Do not rely on their maps."
        )


def _some(names: Sequence[str]) -> Iterator[str]:
    """The first names, a line each, and how many there are besides."""
    for name in names[:_NAMED]:
        yield f"  {name}"
    if len(names) > _NAMED:
        yield f"  and {len(names) - _NAMED} more; see the report"
