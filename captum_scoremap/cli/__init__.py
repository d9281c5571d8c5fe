"""The program ``captum-scoremap``: each sub-command in a file of its own, registered here."""

import io
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from captum_scoremap import __version__
from captum_scoremap.cli.audit import AuditCommand, audit
from captum_scoremap.cli.bench import bench
from captum_scoremap.cli.check import check
from captum_scoremap.cli.explain import explain
from captum_scoremap.cli.export import export
from captum_scoremap.cli.patches import patches


class _Commands(TyperGroup):
    """The commands, each of which says so when the user stops it; an audit says itself what it keeps."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was typed."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("captum-scoremap: stopped.", file=sys.stderr)
            sys.exit(130)


app = typer.Typer(
    cls=_Commands,
    name="captum-scoremap",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)
app.command()(explain)
app.command(cls=AuditCommand)(audit)
app.command()(check)
app.command()(patches)
app.command()(bench)
app.command()(export)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"captum-scoremap {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    with_traceback: Annotated[bool, typer.Option("--traceback", help="Show where in the code an error arose.")] = False,
    with_version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and stop."),
    ] = False,
) -> None:
    """Where in an image the score of a label comes from, as an exact sum: S = A·Y + B at every layer.

    Start with `captum-scoremap explain`: it explains the photograph of a cat and needs no download.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: The command line without the program's name; by default that of the process.

    Returns:
        Exit status: 0 for success, 2 for a wrong input, 130 when interrupted.

    Example:
        >>> main(["--version"])
        captum-scoremap ...
        0
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    # A model named module.path:callable may lie in the folder the user works in, as with python -m.
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        with _safe_streams(), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            # Deprecations within other packages do not concern the user of a program.
            warnings.simplefilter("ignore", DeprecationWarning)
            app(args=arguments, prog_name="captum-scoremap")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except Exception as error:  # a model or score of the user's may raise anything
        if "--traceback" in arguments:
            traceback.print_exc()
        print(f"captum-scoremap: error: {_said_by(error)}", file=sys.stderr)
        return 2
    return 0


def _said_by(error: Exception) -> str:
    """Return what an error says: its message, with kind and place where it was not meant to be read alone."""
    if isinstance(error, (TypeError, ValueError, RuntimeError, OSError, ImportError)):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"{type(error).__name__}: {error}, raised in {Path(place.filename).name}, line {place.lineno}. "
        "captum-scoremap --traceback ... shows where it comes from."
    )


@contextmanager
def _safe_streams() -> Iterator[None]:
    """Let nothing that is printed stop the program: letters the terminal does not know, streams that are closed."""
    closed = [name for name in ("stdout", "stderr") if getattr(sys, name) is None]
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        for name in closed:
            setattr(sys, name, nowhere)
        streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
        before = [stream.errors for stream in streams]
        for stream in streams:
            stream.reconfigure(errors="backslashreplace")
        try:
            yield
        finally:
            for stream, errors in zip(streams, before, strict=True):
                with suppress(OSError):  # what is left to write may have no reader any more
                    stream.reconfigure(errors=errors)
            for name in closed:
                setattr(sys, name, None)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning as one line of this program, without the line of code it came from."""
    print(f"captum-scoremap: warning: {message}", file=sys.stderr)
