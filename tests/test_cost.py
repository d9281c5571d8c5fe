"""The measuring itself: turns, repetitions, ratios, peaks of memory, processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from captum_scoremap.cost import PeakMemory, Spread, in_own_process, interleaved, peak_memory, setting
from tests.programs import needs_fork

MIB = 2**20
needs_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak")


def test_jobs_take_turns_in_orders_drawn_by_lot() -> None:
    order: list[str] = []
    jobs = {name: partial(order.append, name) for name in "abc"}
    seconds = interleaved(jobs, 20, at_least=1e-12)
    assert list(seconds) == ["a", "b", "c"]
    assert all(len(values) == 20 and min(values) > 0 for values in seconds.values())
    assert len(order) == 3 * (1 + 20)  # each once before it counts
    rounds = ["".join(order[place : place + 3]) for place in range(3, len(order), 3)]
    assert {"".join(sorted(one)) for one in rounds} == {"abc"}
    assert len(set(rounds)) == 6
    first = list(order)
    order.clear()
    interleaved(jobs, 20, at_least=1e-12)
    assert order == first


def test_short_jobs_are_repeated_within_a_reading_and_long_ones_are_not() -> None:
    calls = {"short": 0, "long": 0}

    def job(name: str, seconds: float) -> None:
        calls[name] += 1
        time.sleep(seconds)

    found = interleaved({"short": partial(job, "short", 0.002), "long": partial(job, "long", 0.3)}, 2, at_least=0.02)
    assert calls["long"] == 1 + 2
    assert calls["short"] > 2 + 2 * 2
    assert 0.002 <= min(found["short"]) < 0.3 <= min(found["long"])


@pytest.mark.parametrize("rounds", [0, -1])
def test_no_rounds_are_refused(rounds: int) -> None:
    with pytest.raises(ValueError, match=f"rounds must be at least 1, got {rounds}"):
        interleaved({"a": int}, rounds)


def test_ratios_are_taken_within_rounds() -> None:
    # the machine was slow in the second round, for both
    assert Spread.ratio([1.0, 10.0, 3.0], [2.0, 20.0, 3.0]) == Spread(median=0.5, low=0.5, high=1.0)
    assert f"{Spread.of([3.0, 1.0, 2.0]):.1f}" == "2.0 (1.0-3.0)"
    with pytest.raises(ValueError, match="longer"):
        Spread.ratio([1.0], [1.0, 2.0])


def one_after_the_other() -> None:
    for _ in range(3):
        torch.ones(8 * MIB)  # 32 MiB, given back before the next


def all_at_once() -> None:
    [torch.ones(8 * MIB) for _ in range(3)]


def kept() -> list[torch.Tensor]:
    return [torch.ones(8 * MIB)]


def build(job: object) -> object:
    """A job that finds 64 MiB there already, which do not count."""
    before = torch.ones(16 * MIB)
    return partial(_call, job, before)


def _call(job: object, _: torch.Tensor) -> object:
    return job()


@needs_linux
@pytest.mark.parametrize(("job", "mebibytes"), [(one_after_the_other, 32), (all_at_once, 96), (kept, 32)])
def test_peaks_of_memory_are_those_of_the_job(job: object, mebibytes: int) -> None:
    found = peak_memory(partial(build, job), torch.get_num_threads)
    assert found is not None
    assert found / MIB == pytest.approx(mebibytes, abs=4)


@needs_linux
def test_a_peak_before_the_block_does_not_count() -> None:
    all_at_once()
    with PeakMemory() as peak:
        pass
    assert peak.bytes is not None
    assert peak.bytes < 4 * MIB


def test_memory_that_nobody_tells_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("captum_scoremap.cost._CLEAR_REFS", Path("no/such/file"))
    with PeakMemory() as peak:
        pass
    assert peak.bytes is None


def failing() -> None:
    raise ValueError("inputs must be something else")


def killed() -> None:
    os.kill(os.getpid(), 9)


def environment_and_threads() -> tuple[str | None, int]:
    return os.environ.get("CAPTUM_SCOREMAP_TEST"), torch.get_num_threads()


def test_processes_have_their_environment_and_our_threads() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = in_own_process(environment_and_threads, environment={"CAPTUM_SCOREMAP_TEST": "there"})
    finally:
        torch.set_num_threads(threads)
    assert found == ("there", 1)
    assert "CAPTUM_SCOREMAP_TEST" not in os.environ


@needs_fork
def test_errors_of_the_process_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    forked = multiprocessing.get_context("forkserver")  # errors come back the same, and sooner
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: forked)
    with pytest.raises(ValueError, match="inputs must be something else"):
        in_own_process(failing, environment={"PATH": os.environ["PATH"]})
    with pytest.raises(RuntimeError, match="terminated abruptly"):
        in_own_process(killed)


def test_setting_names_machine_and_versions() -> None:
    found = setting()
    assert found["threads"] == torch.get_num_threads()
    assert f"torch {torch.__version__}".split("+")[0] in found["versions"]
    assert f"{os.cpu_count()} cores" in found["machine"]
    json.dumps(found)
