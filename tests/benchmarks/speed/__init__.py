"""Time and memory of explaining an image, beside a plain forward and backward pass and the peers.

All competitors of a case get the same model, images and threads. They take turns in one process, whole rounds of all; a
ratio is the median of the ratios within rounds, and its range is given. Memory is the peak beyond the loaded model, of
each in a process of its own that returns at once what it frees. Two tables are printed: everything, and the goals.

"plain" is a hand-written forward and backward pass with respect to the input, of the model as it comes; "prepared" is
this package on the copy that ``prepare`` makes, "compiled" that copy's map by ``compile_map``, and "replayed", on CUDA
devices, the same as a CUDA graph: what it takes to compile stands apart, in the last column. All compute in full single
precision. Of the 1000 calls that Captum needs for all labels, 5 are measured and their time is scaled. The audit is
compared with plain passes over as many images that are decoded already.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypedDict

import torch

from captum_scoremap.cost import Spread, interleaved, peak_memory, setting
from tests.benchmarks.speed.cases import CASES, GOALS, Case, Goal
from tests.benchmarks.speed.jobs import NEEDS, SHARES, Subject, build, build_alone, warm_up


class Cost(TypedDict):
    """What a job of one competitor costs."""

    seconds: list[float]
    bytes: int | None
    ready: float


Costs = dict[str, Cost]


def measure(case: Case, rounds: int, device: str, with_memory: bool, folder: Path, chosen: Sequence[str] = ()) -> Costs:
    """What each competitor of a case takes, or the first and those chosen; those not installed are left out."""
    competitors = [who for who in case.who if who not in NEEDS or find_spec(NEEDS[who])]
    competitors = [who for who in competitors if not chosen or who in {case.who[0], *chosen}]
    if not device.startswith("cuda"):
        competitors = [who for who in competitors if who != "replayed"]
    subject = Subject(case.model, case.batch, device, folder)
    jobs, ready = {}, {}
    for who in competitors:
        start = time.perf_counter()
        jobs[who] = build(case.kind, who, subject)
        ready[who] = time.perf_counter() - start
    taken = interleaved(jobs, rounds, device)
    del jobs
    found = {}
    for who in competitors:
        share = SHARES.get((case.kind, who), 1)
        seconds = [value / share for value in taken[who]]
        peak = memory(case, who, device, folder) if with_memory else None
        found[who] = Cost(seconds=seconds, bytes=peak, ready=ready[who])
    return found


def memory(case: Case, who: str, device: str, folder: Path) -> int | None:
    """Bytes beyond the model at the peak of one competitor's job; of an import, none."""
    if not case.model:
        return None
    job = case.kind, who, Subject(case.model, case.batch, device, folder)  # a new subject: it holds no model yet
    return peak_memory(partial(build_alone, *job), partial(warm_up, *job), device)


def table(case: Case, costs: Costs) -> Iterator[str]:
    """Rows of the table of everything."""
    base = costs[case.who[0]]
    for who, cost in costs.items():
        calls = " (scaled)" if (case.kind, who) in SHARES else ""
        ratio = Spread.ratio(cost["seconds"], base["seconds"])
        cells = [case.title, who + calls, f"{Spread.of(cost['seconds']):.3f}", f"{ratio:.2f}"]
        has_memory = cost["bytes"] is not None and base["bytes"]
        cells += [f"{cost['bytes'] / 2**20:.0f}", f"{cost['bytes'] / base['bytes']:.2f}"] if has_memory else ["", ""]
        cells += [f"{cost['ready']:.0f}" if who == "compiled" else ""]
        yield f"| {' | '.join(cells)} |"


def judge(goal: Goal, costs: Costs) -> dict[str, Any] | None:
    """How far a goal was reached; None where it was not measured."""
    mine, other = costs[goal.who], costs[goal.against]
    if not goal.memory:
        ratio = Spread.ratio(mine["seconds"], other["seconds"])
    elif mine["bytes"] is None or not other["bytes"]:
        return None
    else:
        ratio = Spread.of([mine["bytes"] / other["bytes"]])
    return {
        "case": goal.label or goal.case.title,
        "who": goal.who,
        "against": goal.against,
        "of": "memory" if goal.memory else "time",
        "bound": goal.bound,
        "at_least": goal.at_least,
        "ratio": ratio.median,
        "range": [ratio.low, ratio.high],
        "met": ratio.median >= goal.bound if goal.at_least else ratio.median <= goal.bound,
    }


def goals_table(judged: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Every goal that was measured, and whether it was met."""
    yield "| goal | ratio of | to reach | measured | met |"
    yield "| --- | --- | --- | --- | --- |"
    for row in judged:
        sign = "≥" if row["at_least"] else "≤"
        what = f"{row['who']} / {row['against']}, {row['of']}"
        low, high = map(readable, row["range"])
        measured = readable(row["ratio"]) + ("" if row["of"] == "memory" else f" ({low}-{high})")
        met = "yes" if row["met"] else "**no**"
        yield f"| {row['case']} | {what} | {sign} {readable(row['bound'])} | {measured} | {met} |"


def readable(ratio: float) -> str:
    """A small ratio as a fraction."""
    return f"1/{1 / ratio:.0f}" if ratio < 0.02 else f"{ratio:.2f}"


def run(
    cases: Iterable[Case],
    goals: Sequence[Goal],
    rounds: int,
    device: str,
    with_memory: bool,
    chosen: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure and print; what is returned is what ``--json`` writes."""
    where = setting(device, ("torch", "torchvision", "captum", "captum-scoremap"))
    print(", ".join(f"{name}: {value}" for name, value in where.items()) + f", float32, {rounds} rounds\n")
    print("| case | who | seconds (range) | of the first (range) | MiB | of the first | ready after, s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    measured: dict[Case, Costs] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            measured[case] = measure(case, rounds, device, with_memory, Path(folder), chosen)
            print(*table(case, measured[case]), sep="\n", flush=True)
    judged = [
        judge(goal, measured[goal.case])
        for goal in goals
        if goal.case in measured and {goal.who, goal.against} <= measured[goal.case].keys()
    ]
    reached = [row for row in judged if row is not None]
    if reached:
        print("", *goals_table(reached), sep="\n")
    rows = [
        {"case": case.title, "kind": case.kind, "model": case.model, "batch": case.batch, "costs": costs}
        for case, costs in measured.items()
    ]
    return {"setting": where, "rounds": rounds, "cases": rows, "goals": reached}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", default=(), metavar="WORD", help="cases whose titles hold all these words")
    parser.add_argument(
        "--who",
        nargs="+",
        default=(),
        metavar="NAME",
        help="these competitors beside the first, in cases that have them",
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds that count (default 5)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="threads of PyTorch (default 2)")
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args(arguments)
    cases = [
        case for case in CASES if all(word in case.title for word in options.only) and {*options.who} <= {*case.who}
    ]
    if not cases:
        titles = "\n".join(case.title for case in CASES)
        parser.error(f"--only must leave a case, got {' '.join(options.only)!r}. The titles are:\n{titles}")
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.allow_tf32 = False  # complete maps would differ by more than ``compile_map`` allows
    found = run(cases, GOALS, options.rounds, options.device, not options.no_memory, options.who)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
