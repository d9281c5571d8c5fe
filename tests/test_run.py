"""One run: the model's forward method runs once, whatever is asked; names, gates and what is left behind."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from captum_scoremap import (
    FusedScoreMap,
    LayerScoreMap,
    NeuronScoreMap,
    ScoreMap,
    bias_terms,
    freeze,
    linear_form,
)
from captum_scoremap.linear import check_exactness
from captum_scoremap.rules import with_rules
from captum_scoremap.tape import Recording, Step
from tests.state import untouched


class Counted(nn.Module):
    """A small network that counts how often it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.block = nn.Conv2d(4, 4, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.late = nn.Conv2d(4, 6, 3)
        self.head = nn.Linear(6, 5)
        self.runs: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.runs.append(len(x))
        x = self.stem(x)
        x = self.pool(torch.relu(x + self.block(x)))
        x = self.late(x)
        return self.head((x * x.mean((2, 3), keepdim=True).sigmoid()).mean((2, 3)))


@pytest.fixture
def model() -> Counted:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Counted().double().eval()


@pytest.fixture
def image(generator: torch.Generator) -> Tensor:
    return torch.randn(2, 3, 12, 12, dtype=torch.float64, generator=generator)


@pytest.fixture
def collector() -> Iterator[None]:
    """Whatever a test does to it, Python's collector is on afterwards."""
    yield
    gc.enable()


CALLS: dict[str, Callable[[Counted, Tensor], object]] = {
    "linear_form": lambda m, x: linear_form(m, x, 1),
    "linear_form of a layer": lambda m, x: linear_form(m, x, 1, m.late),
    "bias_terms": lambda m, x: bias_terms(m, x, 1),
    "check_exactness": lambda m, x: check_exactness(m, x[:1], 1),
    "freeze": lambda m, x: freeze(m, x)(torch.zeros_like(x)),
    "freeze, with a layer replaced": lambda m, x: freeze(m, x)(x, {m.pool: torch.zeros(len(x), 4, 6, 6).to(x)}),
    "switches": lambda m, x: freeze(m, x).switches,
    "distance to the boundary": lambda m, x: freeze(m, x).distance_to_boundary(torch.ones_like(x)),
    "ScoreMap": lambda m, x: ScoreMap(m).attribute(x, 1),
    "ScoreMap, with the delta": lambda m, x: ScoreMap(m).attribute(x, 1, return_convergence_delta=True),
    "LayerScoreMap": lambda m, x: LayerScoreMap(m, m.late).attribute(x, 1),
    "several layers, with the delta": lambda m, x: LayerScoreMap(m, [m.stem, m.pool, m.late]).attribute(
        x, 1, return_convergence_delta=True
    ),
    "labels, back": lambda m, x: LayerScoreMap(m, m.stem).attribute_targets(x),
    "labels, forward": lambda m, x: LayerScoreMap(m, m.head).attribute_targets(x, channel_dim=-1),
    "labels, both": lambda m, x: LayerScoreMap(m, [m.stem, m.late, m.head]).attribute_targets(x),
    "NeuronScoreMap": lambda m, x: NeuronScoreMap(m, m.late).attribute(x, (1, 2, 2), return_convergence_delta=True),
    "FusedScoreMap": lambda m, x: FusedScoreMap(m, [m.stem, m.late]).attribute(x, 1),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_model_runs_once(name: str, model: Counted, image: Tensor) -> None:
    with untouched(model, image):
        CALLS[name](model, image)
    assert len(model.runs) == 1


@pytest.mark.parametrize("name", CALLS)
def test_nothing_of_a_run_waits_for_the_collector(name: str, model: Counted, image: Tensor) -> None:
    CALLS[name](model, image)
    gc.collect()
    gc.disable()
    try:
        CALLS[name](model, image)
        assert not [one for one in gc.get_objects() if type(one) in (Recording, Step)]
    finally:
        gc.enable()


@pytest.mark.parametrize("was_enabled", [True, False])
def test_the_collector_rests_until_the_last_thread_is_done(
    was_enabled: bool, model: Counted, image: Tensor, collector: None
) -> None:
    in_forward, may_end = threading.Event(), threading.Event()
    states: list[bool] = []

    def waits(x: Tensor) -> Tensor:
        in_forward.set()
        assert may_end.wait(60)
        states.append(gc.isenabled())
        return model(x)

    (gc.enable if was_enabled else gc.disable)()
    thread = threading.Thread(target=ScoreMap(waits).attribute, args=(image, 1))
    thread.start()
    assert in_forward.wait(60)
    ScoreMap(model).attribute(image, 1)
    states.append(gc.isenabled())
    may_end.set()
    thread.join()
    assert [*states, gc.isenabled()] == [False, False, was_enabled]


def test_fused_maps_run_the_model_once_more_to_find_the_layers(model: Counted, image: Tensor) -> None:
    fused = FusedScoreMap(model)
    fused.attribute(image, 1)
    assert len(model.runs) == 2
    fused.attribute(image, 2)
    assert len(model.runs) == 3


def test_frozen_models_do_not_run_the_model(model: Counted, image: Tensor) -> None:
    frozen = freeze(model, image)
    expected = model(image)
    model.forward = None  # type: ignore[assignment]
    assert_close(frozen(image), expected, rtol=1e-12, atol=1e-13)


def test_steps_know_their_modules(model: Counted, image: Tensor) -> None:
    recording = Recording(model, with_rules(None))
    recording.record((image,))
    names = [recording.modules.name_of(step.module) for step in recording.tape.steps]
    order = list(dict.fromkeys(names))
    assert order == ["stem.0", "stem.1", "stem.2", "block", "", "pool", "late", "head"]
    assert list(freeze(model, image).switches) == ["stem.2", "relu", "pool"]


def test_names_are_those_of_the_module_that_is_called_where_a_function_is_explained(image: Tensor) -> None:
    inner = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU()).double().eval()
    frozen = freeze(lambda x: torch.relu(inner(x) - 0.1).mean((2, 3)), image)
    assert list(frozen.switches) == ["1", "relu"]


def gates(function: Callable[[Tensor], Any], image: Tensor) -> list[tuple[str, bool]]:
    """Names of the operations and whether their outputs are gates."""
    recording = Recording(function, with_rules(None))
    recording.record((image,))
    return [
        (step.operation.overloadpacket.__name__, step.outputs[0].gate) for step in recording.tape.steps if step.outputs
    ]


def test_gates_are_kept_by_views_and_sums_of_gates_alone(generator: torch.Generator) -> None:
    image = torch.randn(2, 4, dtype=torch.float64, generator=generator)

    def function(x: Tensor) -> Tensor:
        gate = x.sigmoid()
        moved = 1 - gate[:, None].transpose(1, 2).squeeze(-1)
        mixed = gate + x
        return moved * x + mixed

    found = gates(function, image)
    assert [gate for name, gate in found if name in {"sigmoid", "unsqueeze", "transpose", "squeeze", "rsub"}] == [
        True
    ] * 5
    assert [gate for name, gate in found if name in {"mul", "add"}] == [False] * 3


def test_a_gate_is_frozen_and_the_other_factor_is_not(generator: torch.Generator) -> None:
    image = torch.randn(2, 4, dtype=torch.float64, generator=generator)
    form = linear_form(lambda x: (x.sigmoid() * x).sum(1), image)
    assert_close(form.coefficients, image.sigmoid(), rtol=1e-14, atol=0)
    assert_close(form.bias, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-14)


def test_operations_without_a_rule_are_all_named_from_one_run(model: Counted, image: Tensor) -> None:
    def function(x: Tensor) -> Tensor:
        return model(torch.special.bessel_j0(x)) + torch.linalg.matrix_exp(x[:, :, :5, :5]).mean((1, 2))

    with pytest.raises(NotImplementedError, match=r"(?s)special_bessel_j0.*linalg_matrix_exp"):
        linear_form(function, image, 1)
    assert model.runs == [2]


def test_noise_is_that_of_the_run(image: Tensor) -> None:
    def function(x: Tensor) -> Tensor:
        return ((x + torch.randn_like(x)) * torch.rand_like(x)).relu().sum((1, 2, 3))

    torch.manual_seed(3)
    expected = function(image)
    torch.manual_seed(3)
    form = linear_form(function, image)
    assert_close(form.score, expected, rtol=0, atol=0)
    assert_close(form.residual, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-10)


def test_what_the_model_does_in_python_is_done_once(image: Tensor) -> None:
    seen = []

    def function(x: Tensor) -> Tensor:
        total = float(x.sum())
        seen.append(total)
        return (x * total if total > 0 else x).sum((1, 2, 3))

    form = linear_form(function, image)
    assert seen == [pytest.approx(float(image.sum()))]
    assert_close(form.residual, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-10)


def test_vmap_and_gradients_inside_the_model_are_seen(generator: torch.Generator) -> None:
    image = torch.randn(2, 4, dtype=torch.float64, generator=generator)
    weight = torch.randn(3, 4, dtype=torch.float64, generator=generator)

    def function(x: Tensor) -> Tensor:
        scores = torch.func.vmap(lambda one: weight @ one.relu())(x)
        slope = torch.func.grad(lambda y: (y.relu() * y).sum())(x)  # 2 relu(x)
        return scores[:, 0] + slope.sum(1)

    form = linear_form(function, image)
    expected = (weight[0] + 2) * (image > 0)
    assert_close(form.coefficients, expected, rtol=1e-12, atol=1e-13)
    assert_close(form.residual, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)


HOMES = (
    torch.Tensor,
    torch,
    torch.utils,
    torch.utils.dlpack,
    torch.UntypedStorage,
    torch.autograd.function.FunctionCtx,
)


@pytest.mark.parametrize("name", ["numpy", "tolist", "data_ptr", "as_subclass", "data", "__deepcopy__"])
def test_what_others_put_in_place_of_a_method_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A profiler's, say, be it put there before the run or by the model itself."""
    theirs = getattr(torch.Tensor, name)  # as good as any other
    theirs = theirs if name == "data" else lambda *args, of=theirs: of(*args)
    monkeypatch.setattr(torch.Tensor, name, theirs, raising=False)
    before = [dict(vars(home)) for home in HOMES]
    linear_form(nn.Flatten().eval(), torch.ones(1, 1, 2, 2), 0)
    assert [dict(vars(home)) for home in HOMES] == before
    assert vars(torch.Tensor)[name] is theirs


def test_what_the_model_puts_in_place_of_a_method_stays() -> None:
    def theirs(tensor: Tensor) -> object:
        return torch._C.TensorBase.tolist(tensor)

    def model(x: Tensor) -> Tensor:
        torch.Tensor.tolist = theirs
        return x.flatten(1)

    linear_form(model, torch.ones(1, 1, 2, 2), 0)
    assert vars(torch.Tensor)["tolist"] is theirs
    del torch.Tensor.tolist
