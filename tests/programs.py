"""Programs that start at once: a server that has imported everything forks them."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import pytest

needs_fork = pytest.mark.skipif(os.name != "posix", reason="forks and signals of POSIX")

IMPORTED = """
    captum_scoremap.cli captum_scoremap.audit.run captum_scoremap.audit.report tests.audit_pictures
    tests.programs ipykernel.kernelapp matplotlib_inline.backend_inline skimage.data sklearn.datasets timm
""".split()


def start(target: Callable[..., None], *arguments: Any) -> Any:
    """A process that runs a function; where there is no fork it imports everything anew."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def resume(source: str, out: str) -> None:
    """Go on with an audit of the tiny model."""
    from captum_scoremap.audit import audit
    from tests.audit_pictures import tiny_model

    audit(source, tiny_model(), out=out, resume=True, batch_size=2, shard_size=4, progress=False)


def kernel(arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    """Be the kernel of a notebook."""
    from ipykernel.kernelapp import IPKernelApp

    os.chdir(folder)
    os.environ.update(environment)
    IPKernelApp.launch_instance(arguments)


class Program:
    """A module run as ``python -m`` does, as a program of its own, with its streams in pipes.

    Args:
        arguments: What is typed after its name.
        module: The module, the command line if not another one.
        closed: Which of its streams it starts without, 1 and 2.

    Attributes:
        process: Its process.
        output: What it prints, to be read.
        errors: Its error stream, to be read.
    """

    def __init__(self, *arguments: str, module: str = "captum_scoremap", closed: Sequence[int] = ()) -> None:
        pipes = [multiprocessing.Pipe(duplex=False) for _ in "oe"]
        self.process = start(_run, module, arguments, *(writes for _, writes in pipes), closed)
        for _, writes in pipes:
            writes.close()
        self.output, self.errors = (os.fdopen(os.dup(reads.fileno()), encoding="utf-8") for reads, _ in pipes)
        for reads, _ in pipes:
            reads.close()

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.process.pid, number)

    def ended(self) -> tuple[int, str, str]:
        """Wait for its end; returns its status, what it printed, and what it said on the error stream."""
        said, printed = (stream.read() if not stream.closed else "" for stream in (self.errors, self.output))
        self.process.join(300)
        for stream in (self.output, self.errors):
            stream.close()
        return self.process.exitcode, printed, said


def _run(
    module: str, arguments: tuple[str, ...], output: Connection, errors: Connection, closed: Sequence[int]
) -> None:
    sys.argv[1:] = arguments
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal; servers heed no Ctrl-C
    for pipe, stream in ((output, 1), (errors, 2)):
        os.dup2(pipe.fileno(), stream)
        pipe.close()
    # as a new interpreter opens pipes
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", closefd=False)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        if stream in closed:
            os.close(stream)
            setattr(sys, name, None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
