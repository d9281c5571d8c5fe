"""How much faster are all views of an image at once than one crop after the other, and how different?

    python -m tests.benchmarks multiview speed
    python -m tests.benchmarks multiview padding [--images DIR]

``speed`` measures random-weight AlexNet and VGG-16 on large images, all views at the stride of the last pooling layer.
Every repetition of every way is a process of its own, in turn. Printed are medians of the time that the process
computed (CPU time, which other programs on the machine hardly change), and of the peak of its memory above what it held
before; Linux only. ``padding`` compares the scores of views inside photographs with the scores of EfficientNet-Lite0 on
the same views cropped, where its padded convolutions see zeros at the border; it takes the photographs of scikit-image
and scikit-learn, or those of a folder.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision import models

from captum_scoremap import MultiView
from captum_scoremap.cost import PeakMemory, in_own_process, setting
from captum_scoremap.models import SAMPLES, load_model, read_image

SIZES = ((512, 512), (768, 1024))
MODELS = {"AlexNet": models.alexnet, "VGG-16": models.vgg16}
ONE_PASS = 0  # crops at a time; no crops
WAYS = {ONE_PASS: "all views in one pass", 1: "crop by crop", 16: "16 crops at a time"}


def score_crops(model: torch.nn.Module, crops: Sequence[Tensor], batch: int) -> Tensor:
    """Scores of crops by the plain model, so many at a time."""
    return torch.cat([model(torch.cat(crops[start : start + batch])) for start in range(0, len(crops), batch)])


def measure(name: str, height: int, width: int, batch: int, most: int) -> dict[str, float]:
    """CPU seconds, bytes and views of one repetition of one way, in this process."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    multi_view = MultiView.from_classifier(model)
    image = torch.randn(1, 3, height, width)
    boxes = multi_view.view_boxes(height, width).tolist()
    crops = [image[:, :, y0:y1, x0:x1] for x0, y0, x1, y1 in boxes[:most]]
    with torch.inference_mode():
        model(image[:, :, :224, :224])
        with PeakMemory() as peak:
            start = time.process_time()
            multi_view(image) if batch == ONE_PASS else score_crops(model, crops, batch)
            seconds = time.process_time() - start
    seconds *= 1 if batch == ONE_PASS else len(boxes) / len(crops)
    return {"seconds": seconds, "memory": math.nan if peak.bytes is None else peak.bytes, "views": len(boxes)}


def speed(repetitions: int, threads: int, only: Sequence[str], most: int) -> None:
    torch.set_num_threads(threads)
    where = ", ".join(f"{name}: {value}" for name, value in setting(packages=["torch"]).items())
    print(f"{where}; median of {repetitions}, times of {most} crops scaled to all\n")
    print("| network | image | views | way | CPU seconds | ratio | memory beyond the model, MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in only:
        for height, width in SIZES:
            found: dict[int, list[dict[str, float]]] = {batch: [] for batch in WAYS}
            for _ in range(repetitions):
                for batch, runs in found.items():
                    runs.append(in_own_process(measure, name, height, width, batch, most))
            one = statistics.median(run["seconds"] for run in found[ONE_PASS])
            for batch, runs in found.items():
                seconds = statistics.median(run["seconds"] for run in runs)
                grown = statistics.median(run["memory"] for run in runs) / 2**20
                views = int(runs[0]["views"])
                row = f"| {name} | {height} x {width} | {views} | {WAYS[batch]} | {seconds:.2f} | "
                print(f"{row}{seconds / one:.1f} | {grown:.0f} |", flush=True)


def padding(folder: Path | None) -> None:
    """Print how far the scores of views are from those of their crops."""
    loaded = load_model()
    multi_view = MultiView.from_classifier(loaded.module)
    names = [f"sample:{name}" for name in SAMPLES]
    files: Sequence[str | Path] = names if folder is None else sorted(p for p in folder.iterdir() if p.suffix != ".csv")
    views = agree = mean_agree = 0
    differences, spreads, shifts = [], [], []
    with torch.inference_mode():
        for file in files:
            image = loaded.preprocessing.whole(read_image(file))[None]
            inside = multi_view.view_scores(image)[0].flatten(1).T
            boxes = multi_view.view_boxes(*image.shape[2:]).tolist()
            alone = torch.cat([loaded.module(image[:, :, y0:y1, x0:x1]) for x0, y0, x1, y1 in boxes])
            views += len(alone)
            agree += int((inside.argmax(1) == alone.argmax(1)).sum())
            mean_agree += int(inside.mean(0).argmax() == alone.mean(0).argmax())
            differences.append(float((inside - alone).abs().mean()))
            spreads.append(float(alone.std(1).mean()))
            best = alone.mean(0).argmax()
            shifts.append(float((inside.mean(0) - alone.mean(0))[best].abs()))
    print(f"{len(files)} photographs, {views} views")
    print(f"mean |score of a view - score of its crop|: {statistics.mean(differences):.3f} logits")
    print(f"standard deviation of the scores of a crop over labels: {statistics.mean(spreads):.3f} logits")
    print(f"mean difference of S, the mean of all views, for the best label: {statistics.mean(shifts):.3f} logits")
    print(f"same best label: {agree / views:.1%} of views, {mean_agree / len(files):.1%} of photographs")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    timed = commands.add_parser("speed", help="time and memory, against cropping every view")
    timed.add_argument("--repetitions", type=int, default=3, metavar="N", help="default 3")
    timed.add_argument("--threads", type=int, default=1, metavar="N", help="default 1")
    timed.add_argument("--crops", type=int, default=64, metavar="N", help="compute so many, scale to all (default 64)")
    timed.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    padded = commands.add_parser("padding", help="scores of views inside an image, against those of their crops")
    padded.add_argument("--images", type=Path, metavar="DIR", help="photographs; default: those of scikit-image")
    options = parser.parse_args(arguments)
    if options.command == "speed":
        speed(options.repetitions, options.threads, options.models, options.crops)
    else:
        padding(options.images)


if __name__ == "__main__":
    main()
