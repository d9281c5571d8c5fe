"""Operations that a recorder could miss: each is in the form as if written plainly, or is refused by name."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from captum_scoremap import (
    CompleteScoreMap,
    FusedScoreMap,
    LayerScoreMap,
    NeuronScoreMap,
    UnsupportedOperationError,
    freeze,
    linear_form,
)
from tests.between import EXACT, Wrapped, assert_as_plain, assert_exact, assert_refused, between, some_images

Function = Callable[[Tensor], Tensor]


# --- scripted -----------------------------------------------------------------------------------------


def quietly(make: Callable[..., Any], *args: Any) -> Any:
    """What a function of torch.jit's makes, without its warning that it is on its way out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*args)


def scripted(function: Any) -> Any:
    return quietly(torch.jit.script, function)


def traced(function: Any) -> Any:
    return quietly(torch.jit.trace, function, torch.randn(2, 4, 4, 4, dtype=torch.float64))


@scripted
def scripted_relu(x: Tensor) -> Tensor:
    return 0.5 * torch.relu(x)


@scripted
def scripted_gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / 1.41421))


@scripted
def scripted_loop(x: Tensor) -> Tensor:
    for step in range(3):
        if step % 2 == 0:  # noqa: SIM108  a script with a branch is what is meant
            x = x + 0.1 * torch.relu(x)
        else:
            x = F.leaky_relu(x, 0.2)
    return x


@scripted
def scripted_in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, :2] = torch.relu(y[:, :2])
    return y.mul_(2.0)


def in_place(x: Tensor) -> Tensor:
    return 2 * torch.cat([x[:, :2].relu(), x[:, 2:]], 1)


def loop(x: Tensor) -> Tensor:
    x = x + 0.1 * torch.relu(x)
    x = F.leaky_relu(x, 0.2)
    return x + 0.1 * torch.relu(x)


def block() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layers = [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.LeakyReLU(0.1)]
        return nn.Sequential(*layers).double().eval()


BLOCK = block()

SCRIPTED: dict[str, tuple[Function, Function]] = {
    "relu": (scripted_relu, lambda x: 0.5 * x.relu()),
    "gelu": (scripted_gelu, lambda x: x * 0.5 * (1.0 + torch.erf(x / 1.41421))),
    "loop": (scripted_loop, loop),
    "in place": (scripted_in_place, in_place),
    "module": (scripted(block()), BLOCK),
    "traced function": (traced(loop), loop),
    "traced module": (traced(block()), BLOCK),
}


@pytest.mark.parametrize("name", SCRIPTED)
def test_scripted_code_is_seen(name: str) -> None:
    function, plain = SCRIPTED[name]
    assert_as_plain(function, plain)


def scaled(x: Tensor) -> Tensor:
    return x * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)


def turned(x: Tensor) -> Tensor:
    return x.relu() @ torch.arange(16, dtype=torch.float64).view(4, 4)


def offset(x: Tensor) -> Tensor:
    return (x * x.new_tensor(2.0)).relu() + torch.linspace(-1, 1, 4, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("was_run", [False, True])
@pytest.mark.parametrize("function", [scaled, turned, offset])
def test_constants_in_traced_functions_are_constants(function: Function, was_run: bool) -> None:
    """No operation makes them, and they belong to no module."""
    trace = traced(function)
    for _ in range(3 * was_run):
        trace(torch.randn(2, 4, 4, 4, dtype=torch.float64))
    assert_as_plain(trace, function)
    assert_as_plain(lambda x: torch.vmap(trace)(x[None])[0], function)


def overlapping(x: Tensor) -> Tensor:
    return x * x[:, :1].expand(-1, 4, -1, -1).mul_(2.0)


def sparse(x: Tensor) -> Tensor:
    return x.to_sparse().to_dense()


def of_a_batch(x: Tensor) -> Tensor:
    return torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False)


def misshapen(x: Tensor) -> Tensor:
    return x.reshape(7, 3)


@pytest.mark.parametrize("function", [overlapping, sparse, of_a_batch, misshapen])
def test_errors_in_scripted_code_are_those_of_plain_code(function: Function) -> None:
    """TorchScript itself tells nothing of them but the line of the script."""
    script, images = scripted(function), some_images()
    with pytest.raises((RuntimeError, TypeError, ValueError)) as plain:
        linear_form(between(function), images, 1)
    with pytest.raises(plain.type) as found:
        linear_form(between(script), images, 1)
    assert str(found.value) == str(plain.value)
    assert str(found.value)


@pytest.fixture
def fusing() -> Iterator[None]:
    """Let TorchScript compile kernels on a CPU, too, as it does on CUDA devices."""
    was = torch._C._jit_can_fuse_on_cpu(), torch._C._jit_get_te_must_use_llvm_cpu(), torch._C._jit_texpr_fuser_enabled()
    torch._C._jit_override_can_fuse_on_cpu(True)
    torch._C._jit_set_te_must_use_llvm_cpu(False)
    torch._C._jit_set_texpr_fuser_enabled(True)
    yield
    torch._C._jit_override_can_fuse_on_cpu(was[0])
    torch._C._jit_set_te_must_use_llvm_cpu(was[1])
    torch._C._jit_set_texpr_fuser_enabled(was[2])


def gated(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x) * torch.tanh(x) + 0.3


def gated_too(x: Tensor) -> Tensor:  # TorchScript compiles a function once
    return x * torch.sigmoid(x) * torch.tanh(x) + 0.3


@pytest.mark.usefixtures("fusing")
def test_what_torchscript_fused_is_refused_and_the_advice_works() -> None:
    fused, plain = scripted(gated), scripted(gated_too)
    for _ in range(3):  # it looks twice before it compiles
        fused(torch.randn(2, 4, 4, 4, dtype=torch.float64))
    assert "TensorExpr" in str(quietly(torch.jit.last_executed_optimized_graph))
    assert_refused(fused, r"a compiled kernel(?s:.*)`torch.jit.optimized_execution\(False\)`, from its first run on")
    with torch.jit.optimized_execution(False):
        for _ in range(3):
            plain(torch.randn(2, 4, 4, 4, dtype=torch.float64))
        assert_as_plain(plain, gated)


def test_constants_folded_into_scripted_code_are_constants_or_refused() -> None:
    folded = quietly(torch.jit.freeze, scripted(block()))
    try:
        assert_as_plain(folded, BLOCK)
    except UnsupportedOperationError as problem:
        assert "what made a tensor during the run" in str(problem)  # noqa: PT017


CALLED_BY_SCRIPT = nn.ReLU()


# without annotations, which TorchScript cannot read here
@torch.jit.ignore
def by_python(x):
    return CALLED_BY_SCRIPT(x)


@scripted
def through_python(x: Tensor) -> Tensor:
    return by_python(0.5 * x)


def test_neurons_of_layers_that_scripted_code_calls_in_python_have_maps() -> None:
    model, plain, images = between(through_python), between(lambda x: CALLED_BY_SCRIPT(0.5 * x)), some_images()
    model.inner = plain.inner = CALLED_BY_SCRIPT
    found, expected = (NeuronScoreMap(one, CALLED_BY_SCRIPT).attribute(images, (1, 2, 2)) for one in (model, plain))
    assert_close(found, expected, **EXACT)
    assert found.abs().max() > 1e-3


# --- function transforms ------------------------------------------------------------------------------

WEIGHTS = torch.randn(5, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def mixed(x: Tensor) -> Tensor:
    return torch.einsum("oc,nchw->nohw", WEIGHTS.mean(0), x.relu())


TRANSFORMED: dict[str, tuple[Function, Function]] = {
    "vmap over images": (torch.vmap(lambda x: x.relu() * 2), lambda x: x.relu() * 2),
    "vmap over channels": (torch.vmap(F.gelu, in_dims=1, out_dims=1), F.gelu),
    "vmap over weights": (
        lambda x: torch.vmap(lambda w: torch.einsum("oc,nchw->nohw", w, x.relu()))(WEIGHTS).mean(0),
        mixed,
    ),
    "vmap with a constant argument": (
        lambda x: torch.vmap(lambda w, y: torch.einsum("oc,nchw->nohw", w, y), in_dims=(0, None))(
            WEIGHTS, x.relu()
        ).mean(0),
        mixed,
    ),
    "vmap in vmap": (torch.vmap(torch.vmap(F.silu), in_dims=1, out_dims=1), F.silu),
    "vmap in chunks": (torch.vmap(lambda x: x.abs(), chunk_size=1), lambda x: x.abs()),
    "vmap of a convolution": (
        torch.vmap(lambda x: F.conv2d(x[None], WEIGHTS[0, :, :, None, None])[0]),
        lambda x: F.conv2d(x, WEIGHTS[0, :, :, None, None]),
    ),
    "functional_call": (
        lambda x: torch.func.functional_call(BLOCK, {n: p * 1 for n, p in BLOCK.named_parameters()}, (x,)),
        BLOCK,
    ),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_function_transforms_are_seen(name: str) -> None:
    assert_as_plain(*TRANSFORMED[name])


def test_ensembles_by_vmap_are_seen() -> None:
    members = [nn.Linear(64, 3).double() for _ in range(3)]
    params, buffers = torch.func.stack_module_state(members)
    skeleton = nn.Linear(64, 3, device="meta")

    def ensemble(x: Tensor) -> Tensor:
        call = lambda p, b: torch.func.functional_call(skeleton, (p, b), (x.flatten(1),))  # noqa: E731
        return torch.vmap(call)(params, buffers).mean(0)

    images = torch.randn(2, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_exact(nn.Sequential(nn.ReLU(), Wrapped(ensemble)), None, images)
    form = linear_form(Wrapped(ensemble), images, 1)
    weight = torch.stack([m.weight for m in members]).mean(0)[1]
    assert_close(form.coefficients.flatten(1), weight.expand(2, -1), **EXACT)


# --- checkpoints --------------------------------------------------------------------------------------

CHECKPOINTS: dict[str, tuple[Function, Function]] = {
    "re-entrant": (lambda x: checkpoint(BLOCK, x, use_reentrant=True), BLOCK),
    "not re-entrant": (lambda x: checkpoint(BLOCK, x, use_reentrant=False), BLOCK),
    "one in another": (
        lambda x: checkpoint(lambda y: checkpoint(BLOCK, y, use_reentrant=True).relu(), x, use_reentrant=False),
        lambda x: BLOCK(x).relu(),
    ),
    "of a sequence": (lambda x: checkpoint_sequential(BLOCK, 2, x, use_reentrant=True), BLOCK),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpoints_are_seen(name: str) -> None:
    assert_as_plain(*CHECKPOINTS[name])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_layers_in_a_checkpoint_have_maps(reentrant: bool) -> None:
    inner = block()
    images, model, plain = (
        some_images(),
        between(lambda x: checkpoint(inner, x, use_reentrant=reentrant)),
        between(inner),
    )
    model.inner = inner
    found = LayerScoreMap(model, inner[2]).attribute(images, 1)
    assert_close(found, LayerScoreMap(plain, inner[2]).attribute(images, 1), **EXACT)
    assert found.abs().max() > 1e-3


# --- compiled -----------------------------------------------------------------------------------------


def compiled_in_place() -> nn.Module:
    module = block()
    module.compile(backend="eager")
    return module


COMPILED: dict[str, tuple[Callable[[], Function], Function]] = {
    "function": (lambda: torch.compile(loop, backend="eager"), loop),
    "module in place": (compiled_in_place, BLOCK),
    "module": (lambda: torch.compile(block(), backend="eager"), BLOCK),
    "whole graph": (lambda: torch.compile(F.gelu, backend="eager", fullgraph=True), F.gelu),
    "by aot": (lambda: torch.compile(loop, backend="aot_eager"), loop),
}


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("was_run", [False, True])
def test_compiled_parts_are_seen(name: str, was_run: bool) -> None:
    make, plain = COMPILED[name]
    function = make()
    if was_run:
        with torch.no_grad():
            between(function)(some_images())
    assert_as_plain(function, plain)


def test_models_compiled_in_place_are_seen() -> None:
    images, model, plain = some_images(), between(loop), between(loop)
    model.compile(backend="eager")
    model(images)
    found = LayerScoreMap(model, model.conv).attribute(images, 1)
    assert_close(found, LayerScoreMap(plain, plain.conv).attribute(images, 1), **EXACT)
    assert_exact(model, model.conv, images)


class CompilesItself(nn.Module):
    """Compiles a layer the first time it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        if "_compiled_call_impl" not in vars(self.norm):
            self.norm.compile(backend="eager")
        return self.norm(self.conv(x)).relu().mean((2, 3))


def test_models_that_compile_their_layers_are_seen() -> None:
    images, model = some_images(), CompilesItself().double().eval()
    assert_exact(model, model.norm, images)
    assert vars(model.norm)["_compiled_call_impl"] is not None
    assert_exact(model, model.norm, images)
    model.norm.train()
    with pytest.raises(ValueError, match="got 'norm' \\(BatchNorm2d\\) in training mode"):
        LayerScoreMap(model, model.norm).attribute(images, 1)


# --- threads ------------------------------------------------------------------------------------------

POOL = ThreadPoolExecutor(1)
POOL.submit(int).result()


def by_thread(x: Tensor) -> Tensor:
    results: list[Tensor] = []
    thread = threading.Thread(target=lambda: results.append(torch.relu(x)))
    thread.start()
    thread.join()
    return results[0]


def by_new_pool(x: Tensor) -> Tensor:
    with ThreadPoolExecutor(2) as pool:
        return torch.cat(list(pool.map(torch.relu, x.split(1))))


def into_memory(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    POOL.submit(torch.mul, x, 2.0, out=out).result()
    return out


def into_zeros(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    POOL.submit(lambda: out.copy_(x.relu())).result()
    return out


def by_replicas(x: Tensor) -> Tensor:
    results: list[Tensor] = [x, x]

    def work(place: int, part: Tensor) -> None:
        with torch.no_grad():
            results[place] = nn.ReLU()(part)

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(x.split(1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return torch.cat(results)


THREADS: dict[str, Function] = {
    "Thread": by_thread,
    "pool made inside": by_new_pool,
    "pool made before": lambda x: POOL.submit(torch.relu, x).result(),
    "a thread's tensor, then a view": lambda x: POOL.submit(torch.relu, x).result().transpose(2, 3),
    "a thread that writes to new memory": into_memory,
    "a thread that writes to zeros": into_zeros,
    "one thread for each image": by_replicas,
}


@pytest.mark.parametrize("name", THREADS)
def test_other_threads_are_refused(name: str) -> None:
    assert_refused(THREADS[name], "thread")


def test_a_map_that_frozen_values_leave_empty_says_so() -> None:
    """A straight-through quantizer: the positions are frozen, and what goes past them cancels."""
    book = torch.rand(7, 4, dtype=torch.float64)

    def quantized(z: Tensor) -> Tensor:
        nearest = book[torch.cdist(z, book).argmin(1)]
        return (z + (nearest - z).detach()).sum(1)

    with pytest.warns(UserWarning, match="a map is zero everywhere: .* argmin"):
        form = linear_form(quantized, torch.rand(2, 4, dtype=torch.float64))
    assert not form.coefficients.any()
    assert_close(form.bias, form.score)


# --- memory -------------------------------------------------------------------------------------------


def copied_memory(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out.untyped_storage().copy_((2 * x).untyped_storage())
    return out


def copied_over_ones(x: Tensor) -> Tensor:
    doubled, out = 2 * x, torch.ones_like(x)
    out.untyped_storage().copy_(doubled.untyped_storage())
    return out


def filled_memory(x: Tensor) -> Tensor:
    out = 2 * x
    out.untyped_storage().fill_(0)
    return out


def cloned_memory(x: Tensor) -> Tensor:
    doubled = 2 * x
    return x.new_empty(0).set_(doubled.untyped_storage().clone(), 0, x.shape, x.stride())


def byte_by_byte(x: Tensor) -> Tensor:
    doubled, out = 2 * x, torch.ones_like(x)
    source, goal = doubled.untyped_storage(), out.untyped_storage()
    for place in range(8):
        goal[place] = source[place]
    return out


@pytest.mark.parametrize("function", [copied_memory, copied_over_ones, filled_memory, cloned_memory, byte_by_byte])
def test_what_passes_from_memory_to_memory_is_refused(function: Function) -> None:
    assert_refused(function, "UntypedStorage|filled a new tensor's memory")


def test_a_tensor_set_to_the_memory_of_another_is_that_one() -> None:
    def shared(x: Tensor) -> Tensor:
        doubled = 2 * x
        return x.new_empty(0).set_(doubled.untyped_storage(), 0, x.shape, x.stride()) + doubled

    assert_as_plain(shared, lambda x: 4 * x)


def test_the_memory_of_constants_is_their_own_affair() -> None:
    table = torch.ones(4, 4, dtype=torch.float64)

    def filled(x: Tensor) -> Tensor:
        own, other = torch.zeros_like(table), 1 * table
        own.untyped_storage().copy_(other.untyped_storage())
        return x * own

    assert_as_plain(filled, lambda x: x * table)


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda x: torch.stack(list(torch.nested.nested_tensor(list(x)).unbind())), "got a nested tensor from"),
        (lambda x: x.float().to_mkldnn().relu().to_dense().double(), "got one of layout torch._mkldnn from to_mkldnn"),
        (lambda x: (x.flatten(1).to_sparse() * 2).to_dense(), "got one of layout torch.sparse_coo from to_sparse"),
        (lambda x: (x * torch.ones_like(x).to_sparse()).to_dense(), "got one of layout torch.sparse_coo from mul"),
        (
            lambda x: (torch.eye(4).to(x).to_sparse() * x[0, 0]).to_dense() + x,
            "got one of layout torch.sparse_coo from mul",
        ),
    ],
    ids=["nested", "mkldnn", "sparse", "product with a sparse one", "product of a sparse one"],
)
def test_tensors_that_are_not_dense_are_refused(function: Function, match: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        with pytest.raises(TypeError, match=f"must be dense, {match}"):
            linear_form(between(function), some_images(), 1)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside the image"])
def test_memory_that_numpy_filled_is_found_in_lists(beside: bool) -> None:
    def filled(x: Tensor) -> Tensor:
        memory = torch.empty(2, 2, 4, 4, dtype=x.dtype)
        memory.numpy()[:] = x[:, :2].detach().numpy() ** 2
        return torch.cat([x[:, :2], memory], 1) if beside else x * torch.cat([memory, memory], 1)

    assert_refused(filled, "what filled a new tensor's memory")


def by_numpy(x: Tensor) -> Tensor:
    memory = torch.zeros_like(x)
    memory.numpy()[:] = x.detach().numpy() ** 2
    return memory


@pytest.mark.parametrize("function", [copy.deepcopy, by_numpy])
@pytest.mark.parametrize("target", [1, lambda scores: scores[:, 1]], ids=["label", "function"])
def test_scores_that_something_unseen_filled_are_refused(function: Function, target: Any) -> None:
    for scores in (lambda x: function(x * 2), lambda x: function(x * 2)[:, :3]):  # of which no operation reads a number
        with pytest.raises(UnsupportedOperationError, match="what filled a new tensor's memory"):
            linear_form(scores, torch.rand(1, 4, dtype=torch.float64), target)


def in_numpy_s(write: Callable[[Any], object]) -> Function:
    """A function that has NumPy write to the memory of a live tensor."""

    def written(x: Tensor) -> Tensor:
        copy = x.clone()
        write(copy.detach().numpy())
        return 2 * copy

    return written


def held_by_numpy(x: Tensor) -> Tensor:
    zeros = torch.zeros_like(x)
    held = zeros.numpy()
    zeros.add_(x)
    held *= 2
    return zeros + x


BUFFER = torch.ones(2, 4, 4, 4, dtype=torch.float64)


def in_a_buffer(x: Tensor) -> Tensor:
    BUFFER.numpy()[: len(x)] = abs(x.detach().numpy())  # what the run before left there
    return x * BUFFER[: len(x)]


def swapped(array: Any) -> None:
    array[:, [0, 1]] = array[:, [1, 0]]


@pytest.mark.parametrize(
    "function",
    [
        in_numpy_s(lambda array: array.clip(0, out=array)),
        in_numpy_s(lambda array: array[:, :2].__imul__(-1)),
        in_numpy_s(swapped),
        held_by_numpy,
        in_a_buffer,
    ],
    ids=["all", "a part", "swapped", "held across an operation", "a buffer"],
)
def test_what_numpy_wrote_to_memory_of_tensors_is_refused(function: Function) -> None:
    with torch.no_grad():
        function(between(function).conv(some_images()))
    assert_refused(function, r"what was written to a tensor's memory after Tensor.numpy\(\)")


def test_a_score_that_numpy_wrote_to_is_refused() -> None:
    with pytest.raises(UnsupportedOperationError, match="written to a tensor's memory"):
        linear_form(in_numpy_s(lambda array: array.clip(0, out=array)), torch.tensor([[0.5, -0.5]]), 1)


def test_numpy_may_read_what_it_likes_and_write_constants() -> None:
    def read(x: Tensor) -> Tensor:
        table = torch.ones(4, dtype=x.dtype)
        table.numpy()[:] *= 2
        out = x * table
        assert out.detach().numpy().max() > 0
        return out.relu_()

    assert_as_plain(read, lambda x: (2 * x).relu())


def test_numpy_may_read_the_model_s_weights() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            assert x.detach().numpy().size == self.weight.detach().numpy().size
            return x * self.weight

    model = Read().eval()
    assert linear_form(model, torch.rand(1, 3, dtype=torch.float64), 1).coefficients.tolist() == [[0.0, -2.0, 0.0]]


@pytest.mark.parametrize(
    "numbers",
    [lambda x: [x.mean().item(), x.amax().item()], lambda x: x.flatten()[:2].tolist()],
    ids=["item", "tolist"],
)
def test_a_list_of_two_numbers_that_left_is_refused(numbers: Callable[[Tensor], list[float]]) -> None:
    with pytest.raises(UnsupportedOperationError, match="what became of the numbers that left"):
        linear_form(lambda x: x[:, :2] * torch.tensor(numbers(x)), torch.rand(1, 4), 1)


def test_a_list_longer_than_the_numbers_that_left_is_one_of_constants() -> None:
    def scaled(x: Tensor) -> Tensor:
        assert x.mean().item()  # one number
        return x.flatten(1)[:, :2] * torch.tensor([1.0, 2.0], dtype=x.dtype)

    image = torch.rand(1, 4, dtype=torch.float64)
    assert linear_form(scaled, image, 1).coefficients.tolist() == [[0.0, 2.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.clone().apply_(lambda number: max(number, 0.0)),
        lambda x: x.clone().map_(x, lambda one, other: one * other),
        lambda x: torch.zeros_like(x).map2_(torch.ones_like(x), x, lambda _, one, other: one * other),
    ],
)
def test_functions_of_python_s_that_map_elements_are_refused(function: Function) -> None:
    assert_refused(function, r"what Tensor.(apply|map|map2)_\(\) made of each element")


def test_python_may_map_constants() -> None:
    assert_as_plain(lambda x: x * torch.ones(4, dtype=x.dtype).apply_(lambda one: one + 1), lambda x: 2 * x)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * torch.tensor([x.mean(), x.std(), x.amax(), x.amin()], dtype=x.dtype),
        lambda x: x * torch.as_tensor(list(x.mean((0, 2, 3)))),
        lambda x: x + torch.tensor([[x.mean()] * 4] * 4),
        lambda x: x + x.new_tensor((x.mean(), *range(3))),
        lambda x: x + torch.asarray([x.amax(), 1.0, 2.0, 3.0]),
    ],
    ids=["tensor", "as_tensor", "nested", "new_tensor", "asarray"],
)
def test_lists_of_live_tensors_are_refused(function: Function) -> None:
    before = torch.tensor
    assert_refused(function, r"made of a list of tensors, for which there is torch.stack\(\)")
    assert torch.tensor is before
    assert_as_plain(lambda x: x * torch.tensor([1.0, 2.0, *x.shape[1:3]], dtype=x.dtype), lambda x: x * FACTORS)


FACTORS = torch.tensor([1.0, 2.0, 4.0, 4.0], dtype=torch.float64)


@pytest.mark.parametrize(
    "function",
    [lambda x: x.clone().resize_(len(x), 64).view_as(x), lambda x: x.new_empty(0).set_(2 * x)],
    ids=["resize_", "set_"],
)
def test_memory_given_to_a_tensor_is_refused_without_advice_to_write_a_rule(function: Function) -> None:
    assert_refused(function, r"(resize|set)_\(\) did to a tensor's memory")


def each_in_place(x: Tensor) -> Tensor:
    parts = [part.clone() for part in x.unbind(1)]
    torch._foreach_mul_(parts, 3.0)
    torch._foreach_add_(parts, 1.0)
    torch._foreach_clamp_min_(parts, 0.0)
    return torch.stack(parts, 1)


def each_copied(x: Tensor) -> Tensor:
    out = [torch.zeros_like(part) for part in x.unbind(1)]
    torch._foreach_copy_(out, list(x.relu().unbind(1)))
    return torch.stack(out, 1)


def each(name: str, *arguments: Any) -> Function:
    return lambda x: torch.stack(getattr(torch, f"_foreach_{name}")(list(x.unbind(1)), *arguments), 1)


@pytest.mark.parametrize(
    ("function", "plain"),
    [
        (each("mul", 2.0), lambda x: 2 * x),
        (each("mul", [1.0, 2.0, 4.0, 4.0]), lambda x: x * FACTORS[:, None, None]),
        (each("maximum", 0.0), torch.relu),
        (each_in_place, lambda x: (3 * x + 1).relu()),
        (each_copied, torch.relu),
        (
            lambda x: torch.stack(torch._foreach_mul(list(x.unbind(1)), list(x.relu().unbind(1))), 1),
            lambda x: x * x.relu(),
        ),
    ],
)
def test_operations_on_lists_are_those_on_each(function: Function, plain: Function) -> None:
    assert_as_plain(function, plain)


@pytest.mark.parametrize("lift", [torch.ops.aten.lift, torch.ops.aten.lift_fresh])
def test_a_live_tensor_that_is_lifted_stays_live(lift: Function) -> None:
    assert_as_plain(lambda x: lift(2 * x) + x, lambda x: 3 * x)


# --- what hides in parameters, buffers and other threads' changes

PARAMETERS: dict[str, Function] = {
    "Parameter": nn.Parameter,
    "of what is detached": lambda x: nn.Parameter(x.detach()),
    "as_subclass": lambda x: x.as_subclass(nn.Parameter),
    "ParameterList": lambda x: nn.ParameterList([x])[0],
    "ParameterDict": lambda x: nn.ParameterDict({"one": x})["one"],
    "functional_call": lambda x: torch.func.functional_call(ADDS, {"one": nn.Parameter(x)}, (x * 0,)),
    "changed in place": lambda x: nn.Parameter(x.detach().clone()).mul_(1.0),
}


class Adds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.one


ADDS = Adds()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_made_of_live_tensors_are_live(name: str) -> None:
    assert_as_plain(lambda x: PARAMETERS[name](2 * x).relu(), lambda x: (2 * x).relu())


def test_weights_that_the_forward_makes_are_factors() -> None:
    """As a hypernetwork makes them: both factors share the product."""
    makes, layer, image = nn.Linear(4, 12), nn.Linear(4, 3), torch.rand(1, 4)

    def generated(x: Tensor) -> Tensor:
        layer.weight = nn.Parameter(makes(x).view(3, 4))
        return layer(x)

    found, plain = (
        linear_form(model, image, 1) for model in (generated, lambda x: F.linear(x, makes(x).view(3, 4), layer.bias))
    )
    assert_close(found.coefficients, plain.coefficients)
    assert_close(found.bias, plain.bias)
    assert float(found.coefficients.abs().max()) > 1e-3


def written_elsewhere(made: Function) -> Function:
    """A function that has other threads fill memory that is there already."""

    def function(x: Tensor) -> Tensor:
        found = made(x)
        list(POOL.map(lambda at: found[:, at].copy_(x[:, at].relu()), range(4)))
        return found + x

    return function


@pytest.mark.parametrize("made", [torch.zeros_like, torch.ones_like, torch.rand_like, torch.clone, lambda x: x[:] * 1])
def test_what_other_threads_write_to_memory_is_refused(made: Function) -> None:
    assert_refused(written_elsewhere(made), r"what changed a tensor in place \(another thread\)")


def test_what_this_thread_changes_is_no_other_thread_s() -> None:
    def changed(x: Tensor) -> Tensor:
        table = torch.ones_like(x)
        table[:, 0].add_(1)
        view = table.detach()[:, 1:]
        view.mul_(3)
        torch.add(table, 1, out=table)
        table.data.add_(1)
        return x * (table + view.sum() * 0)

    factors = torch.tensor([4.0, 5.0, 5.0, 5.0], dtype=torch.float64).view(4, 1, 1)
    assert_as_plain(changed, lambda x: x * factors)


def test_collections_of_garbage_hide_no_other_thread() -> None:
    def collected(x: Tensor) -> Tensor:
        found = POOL.submit(torch.relu, x).result()
        gc.collect()
        return found + x

    assert_refused(collected, r"what made a tensor during the run \(another thread")


def test_buffers_that_another_thread_made_are_refused() -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("found", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.found = POOL.submit(torch.relu, x).result()
            return self.found + x

    class Reads(Holds):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            return F.relu(self.get_buffer("found"))

    for model in (nn.Sequential(nn.ReLU(), Holds()), Reads()):
        with pytest.raises(
            UnsupportedOperationError, match=r"what made a (tensor|parameter or a buffer) during the run"
        ):
            linear_form(nn.Sequential(nn.Flatten(), model), torch.rand(1, 3), 1)


# --- what the model swallows


class Swallows(nn.Module):
    """Does something else where its layer fails, and the image passes."""

    def __init__(self, layer: nn.Module, kind: type[BaseException]) -> None:
        super().__init__()
        self.layer, self.kind = layer, kind

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.layer(x)
        except self.kind:
            return x + 1


class Tripled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        both = torch.complex(x, x)
        both.real.mul_(3)
        return both.real


class Hooked(nn.Identity):
    def __init__(self) -> None:
        super().__init__()
        self.register_full_backward_hook(lambda *_: None)


@pytest.mark.parametrize("kind", [Exception, BaseException])
@pytest.mark.parametrize(
    ("layer", "match"),
    [
        (lambda: nn.BatchNorm1d(4, track_running_stats=False).eval(), "must use running statistics"),
        (lambda: nn.BatchNorm1d(4).train(), "must be in evaluation mode"),
        (lambda: Wrapped(lambda x: F.rrelu(x, training=True)), "rrelu must run with training=False"),
        (Hooked, "must have no full backward hooks"),
        (Tripled, "complex numbers that change in place"),
        (lambda: Wrapped(lambda x: x.to_sparse().to_dense()), "must be dense"),
        (lambda: Wrapped(lambda x: torch.empty_like(x).set_(x.relu())), "could not be seen"),
    ],
    ids=["statistics", "training", "rrelu", "hooks", "complex", "sparse", "memory"],
)
def test_no_model_swallows_a_refusal(layer: Callable[[], nn.Module], match: str, kind: type[BaseException]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Swallows(layer(), kind))
    with pytest.raises((ValueError, TypeError, UnsupportedOperationError), match=match):
        linear_form(model, torch.rand(3, 4), 1)


def test_errors_of_operations_are_the_model_s_to_handle() -> None:
    def handled(x: Tensor) -> Tensor:
        try:
            return x @ torch.ones(5, 5, dtype=x.dtype)
        except RuntimeError:
            return 2 * x

    assert_as_plain(handled, lambda x: 2 * x)


def test_a_neuron_s_layer_in_a_bare_except_runs_once() -> None:
    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.layer(x)
            except:  # noqa: E722
                return self.layer(2 * x)

    model, image = Tries(), torch.rand(1, 4)
    assert_close(NeuronScoreMap(model, model.layer).attribute(image, 0).sum(1), model(image)[:, 0].detach())


def test_copies_of_a_layer_that_the_forward_makes_are_not_the_layer() -> None:
    class Copies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x) + copy.deepcopy(self.layer)(10 * x))

    model, image = Copies(), torch.rand(1, 4)
    form = linear_form(model, image, 1, model.layer)
    assert_close(form.activations, model.layer(image).detach())
    assert_close(form.coefficients, model.head.weight[1:].detach())
    assert_close(form.residual, torch.zeros(1), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:a Linear runs 2 times")
def test_layers_that_run_inside_of_derivatives_and_vmap_too() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
            self.net, self.is_mapped = nn.Sequential(*layers), False

        def forward(self, x: Tensor) -> Tensor:
            if self.is_mapped:
                return self.net(x) + torch.vmap(lambda one: self.net(one[None])[0])(x)
            return self.net(x + torch.func.grad(lambda y: self.net(y)[:, 0].sum())(x))

    model, images = Twice().double().eval(), some_images()
    for model.is_mapped in (False, True):
        assert_close(freeze(model, images)(images), model(images))
        form = linear_form(model, images, 1, model.net[3])
        assert_close(form.residual, torch.zeros(2).double(), rtol=0, atol=1e-9)
        complete, rest = CompleteScoreMap(model, "image").attribute(images, 1, return_placeless=True)
        assert_close(complete.sum((1, 2, 3)) + rest, model(images)[:, 1])
        with pytest.raises(ValueError, match="layers must be named for this model"):
            FusedScoreMap(model).attribute(images, 1)


# --- constants that change by something else than operations

WEIGHT = torch.tensor([0.3, -0.7, 0.5, 0.1], dtype=torch.float64)


def by_data(x: Tensor) -> Tensor:
    weight = nn.Parameter(WEIGHT.clone())
    kept = weight.data
    weight.data = kept.sign()
    found = x * weight.view(4, 1, 1)
    weight.data = kept
    return found


def by_swap(x: Tensor) -> Tensor:
    one, other = nn.Parameter(WEIGHT.sign()), nn.Parameter(WEIGHT.clone())
    found = x * one.view(4, 1, 1)
    torch.utils.swap_tensors(one, other)
    return found + 0 * one.sum()


def by_swap_of_what_is_read(x: Tensor) -> Tensor:
    one, other = nn.Parameter(WEIGHT.sign().view(4, 1, 1)), nn.Parameter(WEIGHT.clone().view(4, 1, 1))
    found = x * one
    torch.utils.swap_tensors(one, other)
    return found + 0 * one


def by_numpy(x: Tensor) -> Tensor:
    weight = WEIGHT.sign().view(4, 1, 1)
    found = x * weight
    weight.numpy()[:] = 7
    return found


def by_a_fused_optimizer(x: Tensor) -> Tensor:
    weight, gradient, momentum = torch.ones(4).double(), torch.ones(4).double(), WEIGHT.sign()
    found = x * momentum.view(4, 1, 1)
    settings = {"weight_decay": 0.0, "momentum": 0.5, "lr": 0.1, "dampening": 0.0, "nesterov": False}
    torch._fused_sgd_([weight], [gradient], [momentum], **settings, maximize=False, is_first_step=False)
    return found + 0 * weight.sum()


def by_resizing(x: Tensor) -> Tensor:
    weight = WEIGHT.sign().view(4, 1, 1)
    found = x * weight
    weight.untyped_storage().resize_(0)
    return found


@torch.library.custom_op("captum_scoremap_tests::change_both", mutates_args={"first", "second"})
def change_both(first: Tensor, second: Tensor) -> Tensor:
    first.mul_(3)
    second.mul_(2)
    return first + second


def by_a_library(x: Tensor) -> Tensor:
    one, other = torch.ones(4).double(), WEIGHT.sign()
    found = x * other.view(4, 1, 1)
    both = change_both(one, other)
    return found + 0 * both.sum()


@pytest.mark.parametrize(
    "function",
    [
        *(by_data, by_swap, by_swap_of_what_is_read, by_numpy),
        *(by_a_fused_optimizer, by_resizing, by_a_library),
    ],
)
def test_constants_stay_what_they_were_when_they_were_read(function: Function) -> None:
    assert_as_plain(function, lambda x: x * WEIGHT.sign().view(4, 1, 1))


def elsewhere(change: Callable[[], object]) -> None:
    POOL.submit(change).result()


def then_viewed(x: Tensor) -> Tensor:
    found = torch.ones_like(x)
    elsewhere(lambda: found.copy_(x.relu()))
    return found.view(x.shape) + x


def then_changed(x: Tensor) -> Tensor:
    found = torch.ones_like(x)
    elsewhere(lambda: found.copy_(x.relu()))
    return found.mul_(1.0) + x


def then_written_to(x: Tensor) -> Tensor:
    found = torch.ones_like(x)
    elsewhere(lambda: found.copy_(x.relu()))
    torch.add(found, 0.0, out=found)
    return found + x


def of_what_depends(x: Tensor) -> Tensor:
    found = x.clone()
    elsewhere(lambda: found.mul_(2))
    return found[:] * 1


@pytest.mark.parametrize("function", [then_viewed, then_changed, then_written_to, of_what_depends])
def test_what_another_thread_changed_is_refused_however_it_is_read(function: Function) -> None:
    assert_refused(function, r"what changed a tensor in place \(another thread\)")


@pytest.mark.parametrize("is_parameter", [False, True])
def test_what_another_thread_writes_to_the_model_s_state_is_refused(is_parameter: bool) -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            found = torch.zeros(2, 3)
            if is_parameter:
                self.found = nn.Parameter(found, requires_grad=False)
            else:
                self.register_buffer("found", found)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.found
            elsewhere(lambda: found[: len(x)].copy_(x.relu()))
            return found[: len(x)] + x

    for count in (1, 2):
        with pytest.raises(UnsupportedOperationError, match=r"what changed a tensor in place \(another thread\)"):
            linear_form(nn.Sequential(nn.Flatten(), Holds()), torch.rand(count, 3), 1)


def test_the_model_may_change_its_state() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            mean, weight = self.get_buffer("mean"), self.weight.detach()
            mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
            weight.data.add_(1)
            self.weight.data = 2 * self.weight.data
            return x * self.weight

    form = linear_form(Counts(), torch.rand(1, 4), 1)
    assert form.coefficients.tolist() == [[0.0, 4.0, 0.0, 0.0]]


def test_parameters_that_another_thread_made_are_refused() -> None:
    assert_refused(
        lambda x: POOL.submit(lambda: nn.Parameter(x.relu())).result() + x, "what made a parameter or a buffer during"
    )


class MarkedFirst(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2).add_(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * gradient


def trained(x: Tensor) -> Tensor:
    weight = nn.Parameter(torch.ones(4).double())
    optimizer = torch.optim.SGD([weight], 0.1, momentum=0.9, fused=True)
    with torch.enable_grad():
        weight.sum().backward()
    optimizer.step()
    return x * weight.view(4, 1, 1)


NORM = nn.BatchNorm2d(4).double().eval()


@pytest.mark.parametrize(
    ("function", "plain"),
    [
        (lambda x: MarkedFirst.apply(x * 1) + 0, lambda x: 2 * x + 1),
        (lambda x: copy.deepcopy(NORM)(x), NORM),
        (lambda x: nn.BatchNorm2d(4).double().eval()(x), NORM),
        (trained, lambda x: x * 0.9),
        (lambda x: torch.vmap(lambda one: one * nn.Parameter(one))(x), lambda x: x * x),
        (lambda x: nn.GRU(4, 4).double()(x[:, 0] * 0)[0][:, None] * 0 + x, lambda x: x),
    ],
    ids=["marked first", "a deep copy", "made anew", "a fused optimizer", "vmap", "cast"],
)
def test_what_one_thread_does_is_not_refused(function: Function, plain: Function) -> None:
    assert_as_plain(function, plain)


def test_a_refusal_outside_of_operations_is_not_swallowed() -> None:
    def swallows(x: Tensor) -> Tensor:
        both = torch.complex(x, x)
        real = both.real
        both.mul_(2)
        try:
            return nn.Parameter(real) * 1
        except BaseException:
            return x + 1

    with pytest.raises(TypeError, match="complex numbers that change in place"):
        linear_form(swallows, torch.rand(1, 3), 1)


def test_a_refused_run_leaves_no_tensors() -> None:
    seen: list[weakref.ref[Tensor]] = []

    def refused(x: Tensor) -> Tensor:
        found = 2 * x
        seen.append(weakref.ref(found))
        return F.rrelu(found, training=True)

    gc.disable()
    try:
        with contextlib.suppress(ValueError):
            linear_form(refused, torch.rand(1, 3), 1)
        assert seen[0]() is None
    finally:
        gc.enable()


# --- memory that is written while it is read --------------------------------------------------------------


def shifted(x: Tensor, change: Callable[[Tensor], object]) -> Tensor:
    change(y := x * 1)
    return y


# Of which PyTorch reads, batch by batch, what it has just written.
CROSSED: dict[str, Callable[[Tensor], object]] = {
    "a token shift": lambda y: y[:, 1:].copy_(y[:, :-1]),
    "differences": lambda y: y[:, 1:].sub_(y[:, :-1]),
    "relative to the first": lambda y: y.sub_(y[:, :1]),
    "along rows": lambda y: y[..., 1:].add_(y[..., :-1]),
    "transposed": lambda y: y[:, :3, :3].copy_(y[:, :3, :3].transpose(1, 2)),
    "transposed, two by two": lambda y: y[:, :2, :2].copy_(y[:, :2, :2].transpose(1, 2)),
    "lerp_": lambda y: y.lerp_(y[..., :1], 0.5),
    "addcmul_": lambda y: y.addcmul_(y[:, :1], torch.ones_like(y)),
    "clamp_": lambda y: y.clamp_(min=y[:, :1]),
    "out=": lambda y: torch.sub(y, y[:, :1], out=y),
    "out=, a part": lambda y: torch.mul(y[:, :-1], 2.0, out=y[:, 1:]),
    "out=, a product": lambda y: torch.bmm(y, torch.ones(len(y), 4, 4, dtype=y.dtype), out=y),
    "out=, a sum": lambda y: torch.sum(y, 2, out=y[:, :, 0]),
    "out=, a sum kept": lambda y: torch.sum(y, 1, keepdim=True, out=y[:, :1]),
    "masked_scatter_": lambda y: y.masked_scatter_(y > 0, y),
    "index_add_": lambda y: y.index_add_(1, torch.tensor([2, 1, 0]), y),
}


@pytest.mark.parametrize("name", CROSSED)
@pytest.mark.parametrize("count", [1, 2])
def test_memory_that_is_read_elsewhere_than_it_is_written_is_refused(name: str, count: int) -> None:
    images = torch.randn(count, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"must not be read from the same memory at other elements.*x\.clone\(\)"):
        linear_form(lambda x: shifted(x, CROSSED[name]).sum((1, 2)), images)


# The same of a copy, as the error says, and what lies apart or at the same elements.
NOT_CROSSED: dict[str, Callable[[Tensor], object]] = {
    "a copy": lambda y: y[:, 1:].copy_(y[:, :-1].clone()),
    "the first, copied": lambda y: y.sub_(y[:, :1].clone()),
    "itself": lambda y: y.mul_(y),
    "a view of itself": lambda y: y.mul_(y[:, :]),
    "broadcast alike": lambda y: y.add_(y[None][0]),
    "another row": lambda y: y[:, 0].add_(y[:, 1]),
    "others in turn": lambda y: y[..., ::2].add_(y[..., 1::2]),
    "halves": lambda y: y[..., :2].sub_(y[..., 2:]),
    "an index": lambda y: y[:, [0, 1]].copy_(y[:, [1, 0]]),
    "out= itself": lambda y: torch.mul(y, 2.0, out=y),
    "out= along itself": lambda y: torch.cumsum(y, 2, out=y),
    "out= apart": lambda y: torch.mul(y[:, :1], 2.0, out=y[:, 1:2]),
}


@pytest.mark.parametrize("name", NOT_CROSSED)
def test_memory_that_is_read_apart_or_where_it_is_written_is_seen(name: str) -> None:
    images = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def function(x: Tensor) -> Tensor:
        return (shifted(x, NOT_CROSSED[name]) * weights).sum((1, 2))

    form = linear_form(function, images)
    assert_close(form.score, function(images), **EXACT)
    assert_close(form.sums + form.bias, form.score, **EXACT)


WINDOWS: dict[str, Function] = {
    "around what is live": lambda x: padded(x)[:, :1].as_strided((len(x), 3, 4), (6, 1, 1)).sum(1),
    "from what is zero": lambda x: zeroed(x)[:, 0].as_strided((len(x), 4), (4, 1)),
}


def padded(x: Tensor) -> Tensor:
    buffer = x.new_zeros(len(x), 6)
    buffer[:, 1:5] = x
    return buffer


def zeroed(x: Tensor) -> Tensor:
    y = x * 1
    y[:, 0].zero_()
    return y


PLAINLY: dict[str, Function] = {
    "around what is live": lambda x: F.pad(x, (1, 1)).unfold(1, 4, 1).sum(1),
    "from what is zero": lambda x: x * torch.tensor([0.0, 1.0, 1.0, 1.0]).to(x),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_of_constants_reach_what_is_live_around_them(name: str) -> None:
    images = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    functions = WINDOWS[name], PLAINLY[name]
    form, plain = (linear_form(lambda x, of=one: (of(x) * weights).sum(1), images) for one in functions)
    assert_close(form.coefficients, plain.coefficients, **EXACT)
    assert_close(form.bias, plain.bias, **EXACT)


@pytest.mark.parametrize("module", [torch, torch.utils.dlpack], ids=["torch", "torch.utils.dlpack"])
def test_memory_that_is_handed_on_by_a_capsule_is_watched(module: Any) -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 1
        memory = np.from_dlpack(Capsule(module.to_dlpack(y)))
        ctypes.memset(memory.ctypes.data, 0, 4)
        return y.sum(1)

    with pytest.raises(UnsupportedOperationError, match="to_dlpack"):
        linear_form(function, torch.randn(2, 4))


class Capsule:
    """What NumPy wants of a tensor's memory."""

    def __init__(self, capsule: Any) -> None:
        self.capsule = capsule

    def __dlpack__(self, **_: Any) -> Any:
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # the CPU's memory


CASTS: dict[str, Function] = {
    "double": lambda memory: memory.double(),
    "type_as": lambda memory: memory.type_as(torch.ones(1, dtype=torch.float64)),
    "twice": lambda memory: memory.half().double(),
    "clone": lambda memory: memory.clone(),
}


@pytest.mark.parametrize("name", CASTS)
def test_memory_may_be_cast_before_it_is_filled(name: str) -> None:
    def function(x: Tensor) -> Tensor:
        (memory := CASTS[name](torch.Tensor(2, 4))).copy_(x)
        return memory.sum(1)

    form = linear_form(function, torch.randn(2, 4, dtype=torch.float64))
    assert_close(form.coefficients, torch.ones(2, 4, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("name", CASTS)
def test_memory_that_was_cast_and_that_something_unseen_filled_is_refused(name: str) -> None:
    images = torch.randn(2, 4, dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        memory = torch.empty(2, 4)
        memory.numpy()[:] = x.detach().numpy() ** 2
        return (x * CASTS[name](memory)).sum(1)

    with pytest.raises(UnsupportedOperationError, match="what filled a new tensor's memory"):
        linear_form(function, images)


def test_numbers_that_become_the_score_are_named() -> None:
    model = Wrapped(lambda x: torch.full((len(x), 2), x.sum().item()))
    with pytest.warns(UserWarning, match="the values of these operations are frozen, .*: item"):
        linear_form(model, torch.ones(1, 3, 2, 2), 0)
