"""What exports, and how equal the files are: one small model of each family of torchvision, untrained.

``python -m tests.exports --out tests/exports_table.md`` writes the score map at the input of each as ``.pt2`` and as
``.onnx``, runs both, the second in onnxruntime, and writes the table: with the weights that torchvision draws, and with
the zoo's. A row is written as soon as it is known, and a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from captum_scoremap import ScoreMap, UnsupportedOperationError, compile_map
from captum_scoremap.compiled.export import read_back
from tests.tables import Table
from tests.zoo import PIECEWISE_LINEAR, SMOOTH, Entry, entry, random_entry

LARGE = 1e-5
NAMES = ("scores", "map", "bias", "residual")


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def as_torchvision_draws_it(item: Entry) -> nn.Module:
    """The model before training; what is all zeros or ones there, as biases and norms are, is set off from it."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = item.build().float().eval()
        for parameter in model.parameters():
            if bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, statistic in model.named_buffers():
            if name.endswith("running_mean"):
                statistic.add_(0.1 * torch.randn_like(statistic))
            elif name.endswith("running_var"):
                statistic.mul_(0.7 + 0.6 * torch.rand_like(statistic))
    return model


def measure(name: str) -> Iterator[str]:
    """The cells of a row: with torchvision's weights, then with the zoo's."""
    item = entry(name)
    for model in (as_torchvision_draws_it(item), random_entry(item)[0].float()):
        yield from differences(model, item.shape)


def differences(model: nn.Module, shape: Sequence[int]) -> Iterator[str]:
    """For each format how far the map is from the eager one at another image and label, or why there is no file."""
    method = ScoreMap(model)
    # not the images that the norms' statistics are of: there a deep network magnifies rounding most
    inputs, other = torch.randn(2, 1, *shape, generator=torch.Generator().manual_seed(5))
    label = model(other).argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compiled = compile_map(method, inputs, 0, backend="graph")
        except (ValueError, UnsupportedOperationError) as error:
            yield from [str(error).splitlines()[0]] * 2
            return
        expected = method.attribute(other, label)
        exact = ScoreMap(copy.deepcopy(model).double()).attribute(other.double(), label)
        for suffix in (".pt2", ".onnx"):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    path = compiled.export(Path(folder) / f"map{suffix}").path
                except ValueError as error:
                    yield str(error)
                    continue
                found = dict(zip(NAMES, read_back(path, ["image", "target"], NAMES)(other, label), strict=True))
            yield cell(relative(found["map"], expected), relative(expected, exact))


def cell(difference: float, rounding: float) -> str:
    """A difference, and why it is no smaller where the eager map's own rounding is as large."""
    if difference <= LARGE or rounding < difference:
        return f"{difference:.0e}"
    return f"{difference:.0e}: rounding, for the eager map is itself {rounding:.0e} off that in float64"


HEADER = """\
# What exports, model by model

The score map at the input, float32, one image: the relative difference (norm of the difference over the norm) of what
the file computes from `method.attribute`, at an image and a label that the compiler never saw; `.pt2` run by PyTorch,
`.onnx` by onnxruntime. Where there is no file, or it is more than 1e-5 off, it says why.

First with weights as torchvision draws them before training, biases and norms set off from zeros and ones; then with
the weights of `tests/zoo_table.md`, drawn so that every part matters. There rounding may flip the mask of a unit that
holds a fortieth of a small network's map (ShuffleNet: scores 3e-6 apart, maps 2.5e-2), or is magnified a thousandfold
(RegNetY, FCN: the map in float32 is 1e-3 to 4e-2 off that in float64, without any file).

Written by `python -m tests.exports` with torch {torch}, onnxruntime {onnxruntime}.

| model | .pt2 | .onnx | zoo's weights: .pt2 | .onnx |
| --- | --- | --- | --- | --- |
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=(*PIECEWISE_LINEAR, *SMOOTH), help="models (default all)")
    parser.add_argument("--out", type=Path, default=None, help="where to write the table, else only printed")
    options = parser.parse_args(arguments)
    versions = {name: version(name).partition("+")[0] for name in ("torch", "onnxruntime")}
    table = Table(HEADER.format(**versions), options.out)
    for name in options.names:
        if not table.has(name):
            table.add(f"| {name} | {' | '.join(measure(name))} |")


if __name__ == "__main__":
    main()
