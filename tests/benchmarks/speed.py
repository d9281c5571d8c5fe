"""Time and memory of explaining an image, beside a plain forward and backward pass and the peers.

Times are taken interleaved in one process, whole rounds of all competitors, medians over rounds; memory in a process of
its own for each competitor, as the peak above the model. Everything is printed as ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torchvision
from captum.attr import InputXGradient, LayerGradientXActivation
from torch import Tensor, nn

from captum_scoremap import LayerScoreMap, ScoreMap, prepare

Job = Callable[[], object]
LABEL = 281


def leaf_layers(model: nn.Module) -> list[nn.Module]:
    """Layers with outputs of rows and columns, as the all-layers cases take them: those that do the work."""
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d)
    return [module for module in model.modules() if isinstance(module, kinds)]


def plain(model: nn.Module, inputs: Tensor) -> Job:
    """A hand-written forward and backward pass with respect to the input; parameters as the model comes."""

    def job() -> Tensor:
        x = inputs.clone().requires_grad_()
        return torch.autograd.grad(model(x)[:, LABEL].sum(), x)[0]

    return job


def inference(model: nn.Module, inputs: Tensor) -> Job:
    def job() -> Tensor:
        with torch.no_grad():
            return model(inputs)

    return job


def build(case: str, competitor: str, name: str, batch: int) -> Job:
    """The work of one competitor in one case."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None).eval()
    inputs = torch.randn(batch, 3, 224, 224)
    if competitor == "plain":
        return plain(model, inputs)
    if competitor == "inference":
        return inference(model, inputs)
    if competitor.endswith("prepared"):
        model = prepare(model)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    ours = competitor.startswith("ours")
    if case == "input":
        if ours:
            return lambda: ScoreMap(model).attribute(inputs, LABEL)
        return lambda: InputXGradient(model).attribute(inputs.clone().requires_grad_(), LABEL)
    if case == "layers":
        layers = leaf_layers(model)
        if ours:
            return lambda: LayerScoreMap(model, layers).attribute(inputs, LABEL)
        return lambda: LayerGradientXActivation(model, layers).attribute(inputs, LABEL)
    if case == "labels":
        last = model.features[12] if name == "alexnet" else model.layer4
        if ours:
            return lambda: LayerScoreMap(model, last).attribute_targets(inputs)
        # one of its thousand calls
        return lambda: LayerGradientXActivation(model, last).attribute(inputs, LABEL)
    if case == "ten labels":
        labels, first = list(range(LABEL, LABEL + 10)), model.conv1
        if ours:
            return lambda: LayerScoreMap(model, first).attribute_targets(inputs, labels, attribute_to_layer_input=True)
        return lambda: [InputXGradient(model).attribute(inputs.clone().requires_grad_(), label) for label in labels]
    raise ValueError(f"case must be input, layers or labels, got {case!r}.")


CASES: list[tuple[str, str, int, tuple[str, ...]]] = [
    *(
        ("input", name, batch, ("plain", "inference", "captum", "ours"))
        for name in ("alexnet", "vgg16", "resnet50")
        for batch in (1, 8)
    ),
    *(("input", name, 8, ("plain", "ours prepared")) for name in ("resnet50", "mobilenet_v2", "vgg16")),
    *(("input", name, 1, ("plain", "captum", "ours")) for name in ("vit_b_16", "swin_t", "convnext_tiny")),
    *(("layers", name, 8, ("plain", "captum", "ours")) for name in ("resnet50", "vgg16")),
    ("layers", "resnet50", 8, ("plain", "ours prepared")),
    ("labels", "alexnet", 1, ("plain", "captum", "ours")),
    ("labels", "resnet50", 1, ("plain", "captum", "ours")),
    ("ten labels", "resnet50", 1, ("plain", "captum", "ours", "ours prepared")),
]


def seconds(jobs: dict[str, Job], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round, after one that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if number:
                taken[name].append(time.perf_counter() - start)
    return taken


def peak_memory(case: str, competitor: str, name: str, batch: int) -> int:
    """Bytes at the peak above those with the model loaded, in this process."""
    job = build(case, competitor, name, batch)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: the peak counts from here
    before = resident("VmRSS")
    job()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Bytes of this process that are in memory, now (VmRSS) or at the peak (VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024


def memory_of(case: str, competitor: str, name: str, batch: int) -> int:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks", "speed", "--memory-of", case, competitor, name, str(batch)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks speed", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch (default 2)")
    parser.add_argument("--only", default="", help="run cases whose name holds this, such as 'input resnet50'")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory out")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    parser.add_argument("--memory-of", nargs=4, metavar=("CASE", "WHO", "MODEL", "BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.memory_of:
        case, competitor, name, batch = options.memory_of
        print(peak_memory(case, competitor, name, int(batch)))
        return

    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "captum"))
    print(f"{platform.machine()}, {options.threads} threads, float32, {packages}; medians of {options.rounds} rounds\n")
    print("| case | batch | who | seconds (min-max) | of plain | MB | of plain |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for case, name, batch, competitors in CASES:
        if options.only and options.only not in f"{case} {name}":
            continue
        taken = seconds({who: build(case, who, name, batch) for who in competitors}, options.rounds)
        memory = {} if options.no_memory else {who: memory_of(case, who, name, batch) for who in competitors}
        base = statistics.median(taken["plain"])
        for who, times in taken.items():
            middle = statistics.median(times)
            megabytes = memory[who] / 2**20 if memory else float("nan")
            share = memory[who] / memory["plain"] if memory else float("nan")
            print(
                f"| {case}, {name} | {batch} | {who} | {middle:.3f} ({min(times):.3f}-{max(times):.3f}) | "
                f"{middle / base:.2f} | {megabytes:.0f} | {share:.2f} |",
                flush=True,
            )
            rows.append({
                "case": case,
                "model": name,
                "batch": batch,
                "who": who,
                "seconds": times,
                "bytes": memory.get(who),
            })
    if options.json:
        found = {"packages": packages, "threads": options.threads, "rows": rows}
        Path(options.json).write_text(json.dumps(found, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
