"""What exports, and how equal the files are: one small model of each family of torchvision, random weights.

``python -m tests.exports --out tests/exports_table.md`` writes the score map at the input of each as ``.pt2`` and as
``.onnx``, runs both, the second in onnxruntime, and writes the table. Minutes for all.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from captum_scoremap import ScoreMap, UnsupportedOperationError, compile_map
from captum_scoremap.compiled.export import read_back
from tests.zoo import PIECEWISE_LINEAR, SMOOTH, entry, random_entry

NAMES = ("scores", "map", "bias", "residual")


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def measure(name: str) -> Iterator[str]:
    """For each format how far the map is from the eager one at another image and label, or why there is no file."""
    model, inputs = random_entry(entry(name))
    model, inputs = model.float(), inputs[:1]
    method = ScoreMap(model)
    # not the images that the norms' statistics are of: there a deep network magnifies rounding most
    inputs, other = torch.randn(2, *inputs.shape, generator=torch.Generator().manual_seed(5))
    label = model(other).argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compiled = compile_map(method, inputs, 0, backend="graph")
        except (ValueError, UnsupportedOperationError) as error:
            yield from [str(error).splitlines()[0]] * 2
            return
        expected = method.attribute(other, label)
        for suffix in (".pt2", ".onnx"):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    path = compiled.export(Path(folder) / f"map{suffix}").path
                except ValueError as error:
                    yield str(error)
                    continue
                found = dict(zip(NAMES, read_back(path, ["image", "target"], NAMES)(other, label), strict=True))
            yield f"{relative(found['map'], expected):.0e}"


def table(names: Sequence[str]) -> str:
    lines = [
        "# What exports, model by model",
        "",
        "The score map at the input, float32, one image, random weights: the relative difference (norm of the",
        "difference over the norm) of what the file computes from `method.attribute`, at an image and a label that the",
        "compiler never saw; `.pt2` run by PyTorch, `.onnx` by onnxruntime. Where there is no file it says why.",
        "",
        f"Written by `python -m tests.exports` with torch {torch.__version__.split('+')[0]}.",
        "",
        "| model | .pt2 | .onnx |",
        "| --- | --- | --- |",
    ]
    for name in names:
        lines.append(f"| {name} | {' | '.join(measure(name))} |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=(*PIECEWISE_LINEAR, *SMOOTH))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    text = table(options.names)
    if options.out:
        options.out.write_text(text)
