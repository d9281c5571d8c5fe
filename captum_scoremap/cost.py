"""What work costs: its time beside that of its competitors, and its peak memory in a process of its own.

Two ways to do a job are compared fairly only on the same machine in the same state: here they take turns, so that
whatever else happens on the machine happens to all of them, and ratios are taken within each round.
"""

import ctypes
import gc
import math
import multiprocessing
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = [
    "Job",
    "PeakMemory",
    "Spread",
    "forward_backward",
    "in_own_process",
    "interleaved",
    "peak_memory",
    "setting",
]

Job = Callable[[], object]
Returned = TypeVar("Returned")

# The C library of Linux gives freed memory back at once: what a process holds is then what it uses.
_GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Spread:
    """A quantity measured several times.

    Attributes:
        median: Its median.
        low: The smallest value.
        high: The largest.

    Example:
        >>> spread = Spread.of([2.0, 1.0, 4.0])
        >>> f"{spread:.1f}"
        '2.0 (1.0-4.0)'
        >>> f"{Spread.ratio([2.0, 3.0], [4.0, 6.0]):.2f}"
        '0.50 (0.50-0.50)'
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return median and range of values."""
        return cls(statistics.median(values), min(values), max(values))

    @classmethod
    def ratio(cls, values: Sequence[float], against: Sequence[float]) -> "Spread":
        """Return median and range of the ratios of values that were measured in the same round."""
        return cls.of([value / base for value, base in zip(values, against, strict=True)])

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}}-{self.high:{spec}})"


def forward_backward(model: Callable[[Tensor], Tensor], inputs: Tensor, label: int) -> Tensor:
    """Run the plain pass that explanations are compared with: the score's gradient, of the model as it comes.

    Args:
        model: The model, (N, K) scores.
        inputs: Images, (N, C, H, W).
        label: The label whose score is differentiated.

    Returns:
        The gradient in the images, (N, C, H, W), in logits per unit of input.

    Example:
        >>> from torch import nn
        >>> forward_backward(nn.Linear(4, 2), torch.zeros(3, 4), 1).shape
        torch.Size([3, 4])
    """
    images = inputs.clone().requires_grad_()
    scores: Tensor = model(images)
    return torch.autograd.grad(scores[:, label].sum(), images)[0]


def interleaved(
    jobs: Mapping[str, Job],
    rounds: int,
    device: torch.device | str = "cpu",
    *,
    at_least: float = 0.2,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> dict[str, list[float]]:
    """Measure the seconds that each of several jobs takes, in turn.

    Every round does every job, in random order: what a job leaves in memory and caches slows the next one,
    which should not always be the same. The order is the same every time. A short job is repeated, a whole number of
    times that is the same in all rounds, until a reading takes long enough for the clock.

    Args:
        jobs: What to measure, by name. Each is done once or twice before, which does not count.
        rounds: Readings of each job.
        device: Where they compute; the clock waits for it.
        at_least: Seconds that a reading should take.
        progress: Wraps the loop over rounds, as ``tqdm`` does.

    Returns:
        For each job the seconds of one repetition, a value for each round.

    Raises:
        ValueError: ``rounds`` is less than 1.

    Example:
        >>> seconds = interleaved({"add": lambda: 1 + 1, "sleep": lambda: time.sleep(0.01)}, rounds=3, at_least=0.01)
        >>> [len(values) for values in seconds.values()], seconds["add"] < seconds["sleep"]
        ([3, 3], True)
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}.")
    place = torch.device(device)
    repetitions = {name: _repetitions(job, place, at_least) for name, job in jobs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    lot = random.Random(0)
    for _ in progress(range(rounds)):
        for name in lot.sample(list(jobs), len(jobs)):
            seconds[name].append(_seconds(jobs[name], repetitions[name], place))
    return seconds


def _repetitions(job: Job, device: torch.device, at_least: float) -> int:
    """Return how often a job is to be repeated within one reading."""
    taken = _seconds(job, 1, device)
    if taken < 10 * at_least:  # the first time loads libraries, too, which matters to a short job
        taken = _seconds(job, 1, device)
    return max(1, math.ceil(at_least / max(taken, 1e-9)))


def _seconds(job: Job, repetitions: int, device: torch.device) -> float:
    """Return the mean time of repetitions, in seconds."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(repetitions):
        job()
    _synchronize(device)
    return (time.perf_counter() - start) / repetitions


def _synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "mps":  # has one device, and says so in the signature
        torch.mps.synchronize()
    elif device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


class PeakMemory:
    """Peak of the memory that a ``with`` block takes beyond what was in use before it.

    On the CPU that is memory of this process, which only Linux tells; elsewhere that of the device's allocator.
    It counts what a whole process holds, so `peak_memory` gives each job one of its own.

    Args:
        device: Where the block computes.

    Attributes:
        bytes: After the block, the peak in bytes; None where it cannot be known.

    Example:
        >>> with PeakMemory() as peak:
        ...     zeros = torch.ones(2**22)
        >>> peak.bytes is None or peak.bytes > 2**23
        True
    """

    bytes: int | None = None

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._backend: Any = None if self._device.type == "cpu" else torch.get_device_module(self._device)
        self._is_known = _CLEAR_REFS.exists() if self._backend is None else hasattr(self._backend, "memory_allocated")

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if self._is_known and self._backend is None:
            _give_back()
            _CLEAR_REFS.write_text("5", encoding="ascii")  # the peak counts from here
            self._before = _resident("VmRSS")
        elif self._is_known:
            _synchronize(self._device)
            self._backend.reset_peak_memory_stats(self._device)
            self._before = self._backend.memory_allocated(self._device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_known:
            _synchronize(self._device)
            peak = _resident("VmHWM") if self._backend is None else self._backend.max_memory_allocated(self._device)
            self.bytes = peak - self._before


def _resident(field: str) -> int:
    """Return the bytes of this process that are in memory, now (VmRSS) or at the peak (VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def _give_back() -> None:
    """Let the C library return memory that nothing uses, as glibc can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_memory(build: Callable[[], Job], warm_up: Job, device: torch.device | str = "cpu") -> int | None:
    """Peak of the memory that a job takes beyond its model, measured in a process of its own.

    Args:
        build: Loads the model and all else that is to be there before, and returns the job. It is pickled: a
            function of a module, or `functools.partial` of one.
        warm_up: Done before the measurement, so that libraries which load when they are first used do not count:
            the same kind of job, on something small that is not kept. Pickled, too.
        device: Where they compute.

    Returns:
        Bytes; None where they cannot be known.

    Raises:
        RuntimeError: The process was ended, as by the system when memory runs out.

    Example:
        >>> from functools import partial
        >>> build = partial(partial, torch.ones, 2**22)  # builds a job that makes 16 MiB
        >>> found = peak_memory(build, torch.get_num_threads)
        >>> found is None or 2**24 <= found < 2**25
        True
    """
    return in_own_process(_peak, build, warm_up, str(device), environment=_GIVING_BACK)


def _peak(build: Callable[[], Job], warm_up: Job, device: str) -> int | None:
    job = build()
    warm_up()
    with PeakMemory(device) as peak:
        job()
    return peak.bytes


def in_own_process(
    function: Callable[..., Returned], *arguments: object, environment: Mapping[str, str] | None = None
) -> Returned:
    """Call a function in a fresh process, with as many threads of PyTorch as this one has.

    Args:
        function: A function of a module.
        arguments: What it takes; they are pickled.
        environment: Variables that the process gets, besides those of this one.

    Returns:
        What the function returns.

    Raises:
        RuntimeError: The process was ended from outside.

    Example:
        >>> in_own_process(os.getpid) == os.getpid()
        False
    """
    context = multiprocessing.get_context("spawn")
    threads = torch.get_num_threads()
    with (
        _environment(environment or {}),
        ProcessPoolExecutor(1, context, initializer=torch.set_num_threads, initargs=(threads,)) as pool,
    ):
        return pool.submit(function, *arguments).result()


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables of the environment, for processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def setting(
    device: torch.device | str = "cpu", packages: Sequence[str] = ("torch", "torchvision", "captum", "captum-scoremap")
) -> dict[str, str | int]:
    """Describe what a measurement was made on, to be reported with its numbers.

    Args:
        device: Where it computed.
        packages: Names of distributions whose versions matter.

    Returns:
        The machine, the device, threads, versions and the date.

    Example:
        >>> setting(packages=["torch"])["versions"] == f"torch {version('torch')}"
        True
    """
    place = torch.device(device)
    return {
        "machine": _processor(),
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
        "threads": torch.get_num_threads(),
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
        "date": date.today().isoformat(),
    }


def _processor() -> str:
    """Return the processor's name and how many cores of it there are."""
    known = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", known.read_text(encoding="utf-8")) if known.exists() else None
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"
