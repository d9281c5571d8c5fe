"""The benchmark of speed, end to end on a tiny network: its jobs do the same work, its tables say what was found."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.benchmarks import speed
from tests.benchmarks.speed import jobs
from tests.benchmarks.speed.cases import CASES, GOALS, TITLES, Case, Goal
from tests.benchmarks.speed.jobs import CALLS, KINDS, NEEDS, TINY, Subject, build


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    return Subject(TINY, 2, "cpu", tmp_path)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Warnings of peers are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def summed(maps: Tensor | list[Tensor]) -> list[Tensor]:
    return [one.sum(1).detach() for one in (maps if isinstance(maps, list) else [maps])]


@pytest.mark.parametrize("kind", ["input", "layer", "layers", "ten labels"])
def test_captum_and_we_do_the_same_work(kind: str, subject: Subject) -> None:
    ours, captums = summed(build(kind, "ours", subject)()), summed(build(kind, "captum", subject)())
    if kind == "ten labels":  # a tensor of ten maps, ten tensors
        assert len(captums) == 10
        ours = list(build(kind, "ours", subject)().unbind(1))
    assert len(ours) == len(captums)
    for one, other in zip(ours, captums, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_all_labels_begin_with_those_of_captum(subject: Subject) -> None:
    ours, captums = build("labels", "ours", subject)(), build("labels", "captum", subject)()
    assert ours.shape == (2, 1000, 4, 4)
    assert len(captums) == CALLS
    torch.testing.assert_close(ours[:, :CALLS], torch.stack([one.sum(1) for one in captums], 1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["input", "layer", "layers", "labels", "ten labels"])
def test_the_prepared_network_gives_the_same(kind: str, subject: Subject) -> None:
    ours, prepared = build(kind, "ours", subject)(), build(kind, "prepared", subject)()
    if kind == "layers":  # the map of a convolution is now that of the norm after it
        ours, prepared = ours[1:3], prepared[1:3]
    torch.testing.assert_close(prepared, ours, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_competitor_runs(kind: str, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind != "input":  # one job shows that Inductor is there; the others are the same graphs without it
        monkeypatch.setattr(jobs, "compile_map", partial(jobs.compile_map, backend="graph"))
    for who in KINDS[kind]:
        if (who not in NEEDS or find_spec(NEEDS[who])) and (who != "replayed" or torch.cuda.is_available()):
            build(kind, who, subject)()
    assert not list(subject.folder.glob("audit*"))


def test_cases_and_goals_fit_each_other() -> None:
    assert len({case.title for case in CASES}) == len(CASES)
    assert {case.kind for case in CASES} == set(KINDS) == set(TITLES)
    for case in CASES:
        assert {*case.who} <= {*KINDS[case.kind], "prepared"}
    for goal in GOALS:
        assert goal.case in CASES
        assert {goal.who, goal.against} <= {*goal.case.who}


@pytest.fixture
def tiny_case() -> Case:
    return Case("input", TINY, 2, ("plain", "prepared"))


def test_a_run_prints_two_tables_and_returns_their_figures(tiny_case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    importing = Case("import", "", 1, ("captum", "ours"))
    goals = [
        Goal(tiny_case, "prepared", "plain", 1e9),
        Goal(tiny_case, "prepared", "plain", 1e9, at_least=True),
        Goal(tiny_case, "prepared", "plain", 1e-9, memory=True),
        Goal(CASES[0], "ours", "plain", 1.0),  # not measured
    ]
    found = speed.run([tiny_case], goals, 2, "cpu", with_memory=True)
    assert json.loads(json.dumps(found)) == found
    (case,) = found["cases"]
    assert list(case["costs"]) == ["plain", "prepared"]
    for cost in case["costs"].values():
        assert len(cost["seconds"]) == 2
        assert min(cost["seconds"]) > 0
    printed = capsys.readouterr().out
    everything, reached = printed.split("| goal |")
    assert everything.count("one map at the input, tiny, 2 images") == 2
    has_memory = case["costs"]["plain"]["bytes"] is not None
    assert [goal["met"] for goal in found["goals"]] == [True, False, False][: 3 if has_memory else 2]
    assert reached.count("| yes |") == 1
    assert reached.count("| **no** |") == len(found["goals"]) - 1
    assert speed.memory(importing, "ours", "cpu", Path()) is None


def test_ratios_of_goals_are_those_of_the_costs(tiny_case: Case) -> None:
    costs = {
        "plain": {"seconds": [1.0, 2.0, 4.0], "bytes": 100},
        "ours": {"seconds": [2.0, 2.0, 2.0], "bytes": 50},
    }
    time = speed.judge(Goal(tiny_case, "ours", "plain", 1.0), costs)
    assert (time["ratio"], time["range"], time["met"]) == (1.0, [0.5, 2.0], True)
    memory = speed.judge(Goal(tiny_case, "ours", "plain", 0.4, memory=True), costs)
    assert (memory["ratio"], memory["met"]) == (0.5, False)
    rate = speed.judge(Goal(tiny_case, "plain", "ours", 1.1, at_least=True), costs)
    assert (rate["ratio"], rate["met"]) == (1.0, False)
    costs["ours"]["bytes"] = None
    assert speed.judge(Goal(tiny_case, "ours", "plain", 0.4, memory=True), costs) is None


def test_small_ratios_are_fractions() -> None:
    assert [speed.readable(ratio) for ratio in (1 / 400, 0.05, 1.25)] == ["1/400", "0.05", "1.25"]


def test_time_of_a_part_is_scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "interleaved", lambda jobs, *_: {who: [1.0] for who in jobs})
    costs = speed.measure(Case("labels", TINY, 1, ("plain", "captum", "ours")), 1, "cpu", False, tmp_path)
    assert {who: cost["seconds"] for who, cost in costs.items()} == {"plain": [1.0], "captum": [200.0], "ours": [1.0]}


def test_only_must_leave_a_case(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        speed.main(["--only", "nothing", "like", "this"])
    errors = capsys.readouterr().err
    assert "--only must leave a case, got 'nothing like this'" in errors
    assert "one map at the input, alexnet, 1 image" in errors


def test_options_choose_cases_and_write_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[list[Case]] = []

    def run(cases: list[Case], *_: object) -> dict[str, object]:
        chosen.append(cases)
        return {"cases": len(cases)}

    monkeypatch.setattr(speed, "run", run)
    speed.main(["--only", "input", "8 images", "--threads", str(torch.get_num_threads()), "--json", f"{tmp_path}/a"])
    assert [case.model.rpartition(":")[2] for case in chosen[0]] == ["alexnet", "vgg16", "resnet50", "mobilenet_v2"]
    assert json.loads((tmp_path / "a").read_text()) == {"cases": 4}
