"""``captum-scoremap bench``: what it prints, and how it fails."""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from captum_scoremap.cli import main
from captum_scoremap.cost import Job
from captum_scoremap.models import LoadedModel, Preprocessing

AS_IT_IS = ["inference", "forward and backward", "one map at the input", "maps of all layers", "all labels, last layer"]
MODULE = sys.modules["captum_scoremap.cli.bench"]  # the function hides the module of its name
PREPARED = [f"{name}, prepared" for name in AS_IT_IS[2:]]


class Tokens(nn.Module):
    """Rows and columns of channels, as tokens, last."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


def small() -> LoadedModel:
    layers = OrderedDict(
        conv=nn.Conv2d(3, 4, 3, padding=1),
        norm=nn.BatchNorm2d(4),
        relu=nn.ReLU(),
        pool=nn.MaxPool2d(4),
        tokens=Tokens(),
        flatten=nn.Flatten(),
        fc=nn.Linear(4 * 16, 3),
    )
    return LoadedModel("", nn.Sequential(layers), Preprocessing(16, 16))


class Named(nn.Module):
    """Its score under a name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small().module

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"age": self.inner(x)[:, 0]}


def named() -> LoadedModel:
    return LoadedModel("", Named(), Preprocessing(16, 16))


def age(output: dict[str, Tensor]) -> Tensor:
    return output["age"]


def pixels() -> nn.Module:
    return nn.Conv2d(3, 2, 3)


COMPILED = [f"{name}, compiled" for name in AS_IT_IS[2:4]]
MODEL = ["--model", "tests.test_cli_bench:small", "--batch", "2", "--rounds", "1", "--device", "cpu"]


def here(build: Callable[[], Job], warm_up: Job, _: object) -> int:
    """Stands for what measures memory in a process of its own: does the same in this one, and tells a known figure."""
    warm_up()
    build()()
    return 2**20


def test_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "peak_memory", here)
    assert main(["bench", *MODEL, "--no-prepare", "--no-compile"]) == 0
    output, errors = capsys.readouterr()
    assert errors == ""  # no progress bar where the output is no terminal
    rows = [line.strip("│").split("│") for line in output.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in rows] == AS_IT_IS
    assert rows[1][2].strip() == "1.00 (1.00-1.00)"
    assert "layers: relu, pool" in output
    assert "images: 2 × 3 × 16 × 16" in output
    assert f"threads: {torch.get_num_threads()}" in output


def test_a_score_of_the_user(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "peak_memory", here)
    monkeypatch.setattr(MODULE, "compile_map", partial(MODULE.compile_map, backend="graph"))
    model = [*MODEL[:1], "tests.test_cli_bench:named", *MODEL[2:]]
    assert main(["bench", *model, "--json", "--score", "tests.test_cli_bench:age"]) == 0
    jobs = [job["job"] for job in json.loads(capsys.readouterr().out)["jobs"]]
    assert jobs == [*AS_IT_IS[:-1], *PREPARED[:-1], *(f"{name}, prepared" for name in COMPILED)]


def test_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "peak_memory", here)
    monkeypatch.setattr(MODULE, "compile_map", partial(MODULE.compile_map, backend="graph"))
    layers = ["--layers", "pool,tokens", "--dtype", "float64"]
    assert main(["bench", *MODEL, "--json", *layers, "--rounds", "3"]) == 0
    output, errors = capsys.readouterr()
    assert errors == "bench: maps are compiled first, which takes minutes; --no-compile leaves it out\n"
    found = json.loads(output)
    assert [job["job"] for job in found["jobs"]] == [*AS_IT_IS, *PREPARED, *(f"{name}, prepared" for name in COMPILED)]
    assert found["layers"] == ["pool", "tokens"]
    assert (found["dtype"], found["rounds"], found["model"]) == ("float64", 3, "tests.test_cli_bench:small")
    for job in found["jobs"]:
        assert len(job["seconds"]) == 3
        assert job["of_plain"]["low"] <= job["of_plain"]["median"] <= job["of_plain"]["high"]
        assert (job["peak_bytes"], job["peak_of_plain"]) == (2**20, 1.0)


def test_memory_that_is_not_known_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "peak_memory", lambda *_: None)
    assert main(["bench", *MODEL, "--no-prepare", "--no-compile"]) == 0
    assert capsys.readouterr().out.count("unknown") == len(AS_IT_IS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "pols"], "layers must be input or names of modules of the model, got 'pols'. Did you mean"),
        (["--layers", "fc"], "layers must give maps (N, C, h, w) or tokens (N, T, C), got fc, which gives (1, 3)"),
        (["--layers", "input,pool"], "layers must be modules that give maps, got input, pool"),
        (["--model", "tests.test_cli_bench:pixels"], "model must give scores (N, K), one per label, got (1, 2, 222"),
        (["--model", "alexnet"], "Did you mean 'torchvision:alexnet'?"),
        (["--device", "quantum"], "device must be one of this machine, got 'quantum'"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *MODEL, *arguments]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("captum-scoremap: error: ")
    assert errors.count("\n") == 1
    assert message in errors


@pytest.mark.parametrize("option", ["--batch", "--rounds"])
def test_numbers_start_at_one(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", option, "0"]) == 2
    assert option in capsys.readouterr().err


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    text = capsys.readouterr().out
    options = "model weights layers batch rounds json device dtype no-prepare no-compile".split()
    assert all(f"--{option}" in text for option in options)


def branches() -> nn.Module:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.LazyLinear(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).relu()
            found: Tensor = self.linear((y * 2 if y.sum() > 0 else y).flatten(1))
            return found

    model = Branches()
    model(torch.zeros(1, 3, 224, 224))
    return model


def test_what_cannot_be_compiled_is_left_out_with_the_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "peak_memory", lambda *_: None)
    monkeypatch.setattr(MODULE, "compile_map", partial(MODULE.compile_map, backend="graph"))
    options = ["--model", "tests.test_cli_bench:branches", "--batch", "1", "--rounds", "1", "--device", "cpu"]
    assert main(["bench", *options, "--no-prepare", "--layers", "conv", "--json"]) == 0
    output, errors = capsys.readouterr()
    assert [job["job"] for job in json.loads(output)["jobs"]] == AS_IT_IS
    assert "bench: maps are not compiled: the map must not branch on numbers of the image" in errors
