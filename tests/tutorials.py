"""Build the notebooks of ``tutorials/``: ``python -m tests.tutorials [NAME ...]``, all without a name.

``tutorials/NN_title.py`` (percent format) is what people write; ``tutorials/NN_title.ipynb`` is made from it, executed.
"""

import argparse
import copy
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.programs import kernel, start

FOLDER = Path(__file__).parent.parent / "tutorials"
SOURCES = sorted(FOLDER.glob("[0-9]*.py"))

SECONDS = 120
"""Time that a cell may take."""

OPTIONS = (
    "--matplotlib=inline",
    # Photographs are a fifth as large as in PNG; only stored notebooks have them so, a reader's own run is as usual.
    "--InlineBackend.figure_formats=jpeg",
    "--InlineBackend.print_figure_kwargs={'bbox_inches': 'tight', 'pil_kwargs': {'quality': 90}}",
    "--log-level=ERROR",
)


class RunningInterpreter(AsyncKernelManager):
    """Starts kernels of the Python that runs this, whatever is installed under the name python3."""

    def format_kernel_cmd(self, extra_arguments: list[str] | None = None) -> list[str]:
        return [sys.executable, "-m", "ipykernel_launcher", "-f", self.connection_file, *(extra_arguments or ())]


class ForkedKernel(AsyncKernelManager):
    """Starts kernels by a fork, which have imported already what most notebooks import."""

    async def _async_launch_kernel(self, kernel_cmd: list[str], *, cwd: str, env: dict[str, str], **_: Any) -> None:
        arguments = kernel_cmd[kernel_cmd.index("-f") :]
        self.provisioner.process = Process(start(kernel, arguments, cwd, env))


class Process:
    """A process of multiprocessing's with the methods of one of subprocess'."""

    stdin = stdout = stderr = None

    def __init__(self, process: Any) -> None:
        self._process = process
        self.kill, self.terminate = process.kill, process.terminate

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int:
        self._process.join()
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)


def notebook_from(source: Path) -> NotebookNode:
    """The notebook of a source, not executed; it has nothing that differs from one build to the next."""
    notebook = jupytext.read(source, fmt="py:percent")
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = NotebookNode(kernelspec=kernel, language_info={"name": "python"})
    notebook.nbformat, notebook.nbformat_minor = 4, 4  # the last format whose cells need no identifiers
    for cell in notebook.cells:
        cell.pop("id", None)
        cell.metadata = NotebookNode()
    return notebook


def source_from(notebook: NotebookNode) -> str:
    """The text of the source of a notebook."""
    bare = NotebookNode({**notebook, "metadata": NotebookNode(jupytext={"notebook_metadata_filter": "-all"})})
    return jupytext.writes(bare, fmt="py:percent")


def execute(notebook: NotebookNode, manager: type[AsyncKernelManager] = RunningInterpreter) -> None:
    """Run all cells in a kernel of its own and an empty folder, and keep what they print and draw."""
    metadata = copy.deepcopy(notebook.metadata)
    client = NotebookClient(
        notebook,
        kernel_manager_class=manager,
        extra_arguments=list(OPTIONS),
        timeout=SECONDS,
        record_timing=False,
        coalesce_streams=True,  # else a printed text is split wherever it was flushed
    )
    with tempfile.TemporaryDirectory() as folder:
        client.execute(cwd=folder)
    notebook.metadata = metadata
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "image/jpeg" in output.get("data", ()):
                output.data.pop("image/png", None)  # the same figure, as it shows itself


def noise(notebook: NotebookNode) -> Iterator[str]:
    """What no reader should be shown: warnings, progress bars and all else on the error stream."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "error":
                yield f"{output.ename}: {output.evalue}"
            elif output.get("name") == "stderr":
                yield output.text


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.tutorials", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="start of a file name, such as 01")
    names = parser.parse_args().names
    chosen = [source for source in SOURCES if not names or source.name.startswith(tuple(names))]
    if not chosen:
        parser.error(f"NAME must start one of {', '.join(source.stem for source in SOURCES)}, got {', '.join(names)}.")
    for source in chosen:
        notebook = notebook_from(source)
        execute(notebook)
        shown = list(noise(notebook))
        if shown:
            print(f"{source.name} writes to the error stream:", *shown, sep="\n")
            return 1
        path = source.with_suffix(".ipynb")
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
