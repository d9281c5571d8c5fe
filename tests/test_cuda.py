"""On a CUDA device everything is as on the CPU, and kernels can be replayed as a CUDA graph."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from captum_scoremap import (
    CompleteScoreMap,
    FusedScoreMap,
    LayerScoreMap,
    ScoreMap,
    bias_terms,
    compile_map,
    freeze,
    linear_form,
    prepare,
)
from captum_scoremap.scores import select_scores
from tests.any_model import Case, default_dtype, layers_of_images
from tests.layers import called_once
from tests.networks import RandomNetwork
from tests.test_any_model import TABLES
from tests.test_random_networks import run
from tests.zoo import PIECEWISE_LINEAR, SMOOTH, entry, random_entry, randomize, relative_residual, spread

DEVICE = torch.device("cuda")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CLOSE = 1e-9  # of the largest coefficient: other kernels round otherwise
SINGLE = 1e-4  # with hard swishes and sigmoids, which multiply by a sixth in single precision there, whatever the type
CASES = [(table, name) for table, cases in TABLES.items() for name, case in cases.items() if not case.refused]


def there(model: nn.Module) -> Any:
    return copy.deepcopy(model).to(DEVICE)


def closeness(model: nn.Module) -> float:
    return SINGLE if {"hardswish", "hardsigmoid"} & set(re.findall(r"\w+", repr(model).lower())) else CLOSE


def assert_same(on_device: Any, on_cpu: Any, close: float = CLOSE) -> None:
    assert on_device.device.type == DEVICE.type
    size = float(on_cpu.abs().max())
    assert_close(on_device.cpu(), on_cpu, rtol=0, atol=close * max(size, 1e-300))


@needs_cuda
@pytest.mark.parametrize("name", [*PIECEWISE_LINEAR, *SMOOTH])
def test_maps_are_those_of_the_cpu(name: str) -> None:
    model, inputs = random_entry(entry(name))
    label = int(model(inputs)[0].argmax())
    names, close = spread(list(called_once(model, inputs)), 3), closeness(model)
    twin, images = there(model), inputs.to(DEVICE)
    for layer in (None, *names):
        here, elsewhere = (
            linear_form(one, x, label, None if layer is None else one.get_submodule(layer))
            for one, x in ((model, inputs), (twin, images))
        )
        assert_same(elsewhere.sub_scores, here.sub_scores, close)
        assert relative_residual(elsewhere.score, elsewhere.sums, elsewhere.bias) <= 1e-12
    if inputs.dim() == 4:
        for method in (CompleteScoreMap, FusedScoreMap):
            assert_same(method(twin).attribute(images, label), method(model).attribute(inputs, label), close)


def check_network(network: RandomNetwork) -> None:
    model, inputs = network.model, network.inputs
    twin, images = there(model), inputs.to(DEVICE)
    assert_same(linear_form(twin, images, 0).sub_scores, linear_form(model, inputs, 0).sub_scores, closeness(model))
    form = linear_form(twin, images, 0)
    assert relative_residual(form.score, form.sums, form.bias) <= 1e-10
    terms = bias_terms(twin, images, 0)
    shares = torch.stack([torch.zeros_like(form.bias), *terms.values()])
    assert ((shares.sum(0) - form.bias).abs() <= 1e-10 * (1 + shares.abs().sum(0))).all()


@needs_cuda
@pytest.mark.parametrize("smooth", [False, True])
def test_random_networks(smooth: bool) -> None:
    run(check_network, 60, smooth)


@needs_cuda
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # which some of transformers' modules still use
@pytest.mark.filterwarnings("ignore:Attempting to run cuFFT")  # before anything else ran on the device
@pytest.mark.parametrize(("table", "name"), CASES)
def test_what_people_hand_over(table: str, name: str) -> None:
    case: Case = TABLES[table][name]
    # what TorchScript fuses is refused
    with torch.random.fork_rng(), default_dtype(torch.float64), torch.jit.optimized_execution(False):
        torch.manual_seed(0)
        model, inputs = case.build()
        if not isinstance(model, nn.Module):
            pytest.skip("a function")
        model.double().eval()
        if case.random:
            randomize(model, inputs, torch.Generator().manual_seed(0))
        try:
            with torch.random.fork_rng():
                copy.deepcopy(model)(inputs.clone())
        except RuntimeError:  # as frozen TorchScript does unfused
            pytest.skip("the model itself does not run")
        names = layers_of_images(model, inputs) if case.layers is None else case.layers
        here = [form_at(model, inputs, case, layer) for layer in (None, *names)]
        reason = ""
        for made in (nullcontext(), DEVICE):  # as it is, or with the tensors that it makes there
            try:
                twin, images = there(model), inputs.to(DEVICE)
                with made, torch.no_grad():
                    score = select_scores(twin(images.clone()), case.target, len(images))
                break
            except Exception as error:  # holds tensors on the CPU, or has operations for the CPU alone
                reason = f"the model itself does not run there: {type(error).__name__}"
        else:
            pytest.skip(reason)
        if (score.cpu() - here[0].score).abs().max() > 1e-9 * here[0].score.abs().max():
            pytest.skip("the model itself gives another score there")
        for layer, expected in zip((None, *names), here, strict=True):
            with made:
                form = form_at(twin, images, case, layer)
            assert relative_residual(form.score, form.sums, form.bias) <= case.tolerance
            if case.tolerance <= 1e-9:
                assert_close(form.bias.cpu(), expected.bias, rtol=1e-7, atol=1e-7 * float(expected.score.abs().max()))


def form_at(model: nn.Module, inputs: Tensor, case: Case, layer: str | None) -> Any:
    return linear_form(model, inputs, case.target, None if layer is None else model.get_submodule(layer))


class Adaptive(nn.Module):
    """A norm whose weight and bias depend on the image, by running statistics or those of the image, and dropout."""

    def __init__(self, of_image: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4 * 36, 3)
        self.of_image, self.dropout = of_image, nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        weight, bias = x.mean((0, 2, 3)), x.amax((0, 2, 3))
        mean, variance = self.norm.running_mean, self.norm.running_var
        x = F.batch_norm(x, mean.clone(), variance.clone(), weight, bias, self.of_image)
        scores: Tensor = self.head(self.dropout(F.hardsigmoid(x)).flatten(1))
        return scores


@needs_cuda
@pytest.mark.parametrize("of_image", [False, True])
def test_norms_with_weights_of_the_image_and_dropout_that_draws(of_image: bool) -> None:
    torch.manual_seed(0)
    model = Adaptive(of_image).double().to(DEVICE).eval()
    model.dropout.train()
    inputs = torch.randn(1, 3, 8, 8, dtype=torch.float64, device=DEVICE)
    for layer in (None, model.conv):
        with pytest.warns(UserWarning, match="dropout is in training mode"):
            form = linear_form(model, inputs, 1, layer)
        assert relative_residual(form.score, form.sums, form.bias) <= 1e-10
    with pytest.warns(UserWarning, match="dropout is in training mode"):
        frozen = freeze(model, inputs)
    step = torch.randn_like(inputs)
    there_and_back = frozen(inputs + step) + frozen(inputs - step) - 2 * frozen(inputs)
    assert float(there_and_back.detach().abs().max()) <= 1e-10


METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "the image": ScoreMap,
    "two layers": lambda model: LayerScoreMap(model, [*model.children()][:4:3]),
    "complete": CompleteScoreMap,
    "fused": FusedScoreMap,
}


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.SiLU()]
    head = [nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)]
    return nn.Sequential(*layers, *head).double().eval()


@needs_cuda
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", ["graph", "inductor"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_maps(model: nn.Sequential, method: str, backend: Any, mode: Any) -> None:
    twin: Any = model.to(DEVICE)
    inputs = torch.randn(3, 3, 16, 16, dtype=torch.float64, device=DEVICE)
    one = METHODS[method](twin)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # it is compiled and recorded, not run some other way
        compiled = compile_map(one, inputs, 1, backend=backend, mode=mode)
    first = compiled(inputs, 1)
    kept = copy.deepcopy(first)
    for count, label in ((3, [0, 4, 2]), (1, 3), (7, 2)):
        images = torch.randn(count, 3, 16, 16, dtype=torch.float64, device=DEVICE)
        assert_close(compiled(images, label), one.attribute(images, label), rtol=1e-9, atol=1e-11)
    assert_close(first, kept, rtol=0, atol=0)  # a later call writes elsewhere
    with torch.no_grad():
        twin[3].weight.mul_(-0.5)  # in place
        twin[0].weight = nn.Parameter(twin[0].weight + 0.25)  # and put elsewhere
    assert_close(compiled(inputs, 1), one.attribute(inputs, 1), rtol=1e-9, atol=1e-11)


@needs_cuda
def test_what_cannot_be_recorded_runs_as_it_is(model: nn.Sequential) -> None:
    class FromTheCpu(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = model.to(DEVICE)
            self.register_buffer("scale", torch.full((5,), 2.0, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.network(x)
            scale: Tensor = self.get_buffer("scale").cpu()
            return scores * scale.to(scores.device)  # a wait for the device, which no recording can hold

    own = FromTheCpu().to(DEVICE).eval()
    inputs = torch.randn(2, 3, 16, 16, dtype=torch.float64, device=DEVICE)
    with pytest.warns(UserWarning, match="runs without CUDA graphs"):
        compiled = compile_map(ScoreMap(own), inputs, 1, backend="graph", mode="reduce-overhead")
    images = torch.randn_like(inputs)
    assert_close(compiled(images, [1, 4]), ScoreMap(own).attribute(images, [1, 4]), rtol=1e-9, atol=1e-11)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_low_precision(dtype: torch.dtype) -> None:
    """What is cast is part of the run that is recorded: S is the model's own, the rest near it."""
    model, inputs = random_entry(entry("resnet18"))
    twin, images = model.float().to(DEVICE), inputs.float().to(DEVICE)
    with torch.autocast(DEVICE.type, dtype):
        with torch.no_grad():
            score = twin(images)[:, 3]
        form = linear_form(twin, images, 3)
    assert_close(form.score.float(), score.float(), rtol=0, atol=0)
    residual = relative_residual(form.score.double(), form.sums.double(), form.bias.double())
    assert residual <= 21 * torch.finfo(dtype).eps  # each of 21 layers with weights rounds its output


@needs_cuda
def test_prepared_models_and_memory() -> None:
    """The map takes no more memory than a plain forward and backward pass, and leaves none behind."""
    model, _ = random_entry(entry("resnet18"))
    twin, images = model.float().to(DEVICE), torch.randn(8, 3, 128, 128, device=DEVICE)
    own = prepare(twin)

    def peak(job: Callable[[], object]) -> int:
        job()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        assert torch.cuda.memory_allocated() <= before
        return torch.cuda.max_memory_allocated() - before

    def plain() -> None:
        x = images.clone().requires_grad_()
        torch.autograd.grad(twin(x)[:, 1].sum(), x)

    def ours(network: nn.Module) -> Callable[[], None]:
        def job() -> None:
            ScoreMap(network).attribute(images, 1)

        return job

    assert peak(ours(twin)) <= peak(plain)
    assert peak(ours(own)) <= peak(plain)


def test_modes_are_checked(model: nn.Module) -> None:
    inputs = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match='mode must be "default" or "reduce-overhead", got \'fast\''):
        compile_map(ScoreMap(model), inputs, 1, backend="graph", mode="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"inputs must be on a CUDA device, got cpu\. Use mode=\"default\""):
        compile_map(ScoreMap(model), inputs, 1, backend="graph", mode="reduce-overhead")
