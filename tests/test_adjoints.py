"""Adjoints against matrices: the coefficients are those of the operation written out, whatever the memory's layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from captum_scoremap import LayerScoreMap, ScoreMap, bias_maps, bias_terms, freeze, linear_form
from captum_scoremap.rules import TANGENT, Rule, Tangent
from tests.between import EXACT, assert_as_plain, assert_exact, assert_is_gradient, between, some_images


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def batch_norm(channels: int, dims: int = 2) -> nn.Module:
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims](channels).double().eval()
    with torch.no_grad():
        norm.running_var.copy_(randn(channels).abs() + 0.5)
        norm.running_mean.copy_(randn(channels, seed=1))
        norm.weight.copy_(randn(channels, seed=2))
        norm.bias.copy_(randn(channels, seed=3))
    return norm


@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "strided", "expanded"])
@pytest.mark.parametrize("shape", [(1, 16, 4, 4), (2, 48, 14, 14), (2, 3, 32, 32)])
def test_batch_norm_before_tokens_scales(shape: tuple[int, ...], layout: str) -> None:
    norm, x = batch_norm(shape[1]), randn(*shape)
    if layout == "channels-last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        x = randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    elif layout == "expanded":
        x = randn(1, *shape[1:]).expand(shape)
    weights = randn(shape[0], math.prod(shape[2:]), shape[1], seed=5)
    form = linear_form(lambda y: (norm(y).flatten(2).transpose(1, 2) * weights).sum((1, 2)), x)
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()[:, None, None]
    assert_close(form.coefficients, weights.transpose(1, 2).reshape(shape) * scale, **EXACT)
    assert_close(form.sums + form.bias, form.score, **EXACT)


@pytest.mark.parametrize("dims", [1, 3])
def test_batch_norms_of_other_dimensions_scale(dims: int) -> None:
    norm, x = batch_norm(4, dims), randn(2, 4, *[5] * dims)
    weights = randn(2, 5**dims, 4, seed=5)
    form = linear_form(lambda y: (norm(y).flatten(2).transpose(1, 2) * weights).sum((1, 2)), x)
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().view(-1, *[1] * dims)
    assert_close(form.coefficients, weights.transpose(1, 2).reshape(x.shape) * scale, **EXACT)


@pytest.mark.parametrize("training", [False, True], ids=["running statistics", "the image's statistics"])
@pytest.mark.parametrize("rules", [TANGENT, {"batch_norm": Tangent()}], ids=["TANGENT", "Tangent()"])
@pytest.mark.parametrize("shape", [(1, 3, 1, 3), (1, 16, 4, 4)])
def test_tangents_of_batch_norms_are_derivatives(
    shape: tuple[int, ...], rules: dict[str, Rule], training: bool
) -> None:
    """Also where PyTorch's own backward pass is wrong: transposed, before or behind the norm."""
    statistics = (None, None) if training else (randn(shape[1]), randn(shape[1], seed=1).abs() + 0.5)
    x, change = randn(*shape), randn(*shape, seed=2)
    weights = randn(shape[0], math.prod(shape[2:]), shape[1], seed=5)

    def before(y: Tensor) -> Tensor:
        return (F.batch_norm(y, *statistics, training=training).flatten(2).transpose(1, 2) * weights).sum((1, 2))

    def behind(y: Tensor) -> Tensor:
        return before(y.transpose(1, -1).contiguous().transpose(1, -1))

    for function in (before, behind):
        form = linear_form(function, x, rules=rules)
        slope = (function(x + 1e-6 * change) - function(x - 1e-6 * change)) / 2e-6
        assert_close((form.coefficients * change).flatten(1).sum(1), slope, rtol=1e-6, atol=1e-6)
        assert_close(form.sums + form.bias, form.score, **EXACT)


W = randn(4, 4)
EINSUMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "operands": (lambda x: torch.einsum("oc,nchw->nohw", W, x), lambda x: F.conv2d(x, W[:, :, None, None])),
    "a list": (lambda x: torch.einsum("oc,nchw->nohw", [W, x]), lambda x: F.conv2d(x, W[:, :, None, None])),
    "a tuple": (lambda x: torch.einsum("nchw,oc->nohw", (x, W)), lambda x: F.conv2d(x, W[:, :, None, None])),
    "sublists": (
        lambda x: torch.einsum(x, [0, 1, 2, 3], W, [4, 1], [0, 4, 2, 3]),
        lambda x: F.conv2d(x, W[:, :, None, None]),
    ),
    "three": (
        lambda x: torch.einsum("oc,nchw,ho->nohw", [W, x, W]),
        lambda x: F.conv2d(x, W[:, :, None, None]) * W.t()[:, :, None],
    ),
    "stack of a list": (lambda x: torch.stack([x, x.relu()]).sum(0), lambda x: x + x.relu()),
    "block_diag": (lambda x: torch.block_diag(*[x[0, 0], x[1, 0]])[:4, :4] + x, lambda x: x[0, 0] + x),
    "a chain": (lambda x: torch.linalg.multi_dot([W, W, x[0, 0]]) + x, lambda x: W @ (W @ x[0, 0]) + x),
    "meshgrid": (
        lambda x: torch.meshgrid(x[0, 0, 0], x[0, 1, 0], indexing="ij")[0] + x,
        lambda x: x[0, 0, 0][:, None] + x,
    ),
    "tensordot": (lambda x: torch.tensordot(x, W, dims=([3], [1])), lambda x: x @ W.t()),
    "index_put": (
        lambda x: x.index_put((torch.tensor([0, 1]), torch.tensor([2, 3])), x[:, 0]),
        lambda x: torch.stack([
            torch.cat([x[i, :2], *((x[i, 0:1], x[i, 3:]) if i == 0 else (x[i, 2:3], x[i, 0:1]))]) for i in range(2)
        ]),
    ),
}


@pytest.mark.parametrize("name", [name for name in EINSUMS if name not in {"block_diag", "a chain", "meshgrid"}])
def test_operands_in_lists(name: str) -> None:
    assert_as_plain(*EINSUMS[name])


@pytest.mark.parametrize("name", ["block_diag", "a chain", "meshgrid"])
def test_operands_in_lists_that_mix_images(name: str) -> None:
    function, plain = EINSUMS[name]
    images = some_images()
    total = lambda out: out[:, 1].sum()[None].expand(2) / 2  # noqa: E731
    one, other = (ScoreMap(between(f), multiply_by_inputs=False).attribute(images, total) for f in (function, plain))
    assert_close(one, other, **EXACT)
    assert one.abs().max() > 1e-3


NORMS: dict[str, Callable[[], nn.Module]] = {
    "instance": lambda: nn.InstanceNorm2d(4, affine=True),
    "instance, no weights": lambda: nn.InstanceNorm2d(4),
    "instance, running": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "group": lambda: nn.GroupNorm(2, 4),
    "batch": lambda: nn.BatchNorm2d(4),
    "layer": lambda: nn.LayerNorm([4, 4, 4]),
    "rms": lambda: nn.RMSNorm([4]),
    "local response": lambda: nn.LocalResponseNorm(2),
}

IN_PLACE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "leaky ReLU": (lambda y: F.leaky_relu(y, 0.1, inplace=True), lambda y: F.leaky_relu(y, 0.1)),
    "ReLU": (torch.relu_, torch.relu),
    "SiLU": (lambda y: F.silu(y, inplace=True), F.silu),
    "hardswish": (lambda y: F.hardswish(y, inplace=True), F.hardswish),
    "a slice": (lambda y: (y[:, :2].mul_(2), y)[1], lambda y: torch.cat([2 * y[:, :2], y[:, 2:]], 1)),
    "a sum": (lambda y: y.add_(1.0), lambda y: y + 1.0),
}


@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize("norm", NORMS)
def test_norms_before_a_change_in_place(norm: str, change: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = NORMS[norm]().double().eval()
    in_place, plain = IN_PLACE[change]
    images = some_images()
    one, other = between(lambda x: in_place(module(x))), between(lambda x: plain(module(x)))
    form, expected = linear_form(one, images, 1), linear_form(other, images, 1)
    assert_close(form.coefficients, expected.coefficients, **EXACT)
    assert_close(form.sums + form.bias, other(images)[:, 1].detach(), **EXACT)


def canvas(x: Tensor) -> Tensor:
    out = x.new_zeros(2, 4, 6, 6)
    for place, image in enumerate(x):
        out[place, :, :4, :4].copy_(image)
    return out[:, :, :4, :4]


def column(x: Tensor) -> Tensor:
    out = torch.zeros(2, 2, 64, dtype=x.dtype)
    view = out.view(2, 128)[:, 64:]
    view += x.flatten(1)
    return out[:, 1].view(2, 4, 4, 4)


def table(x: Tensor) -> Tensor:
    positions = torch.ones(4, 4, dtype=x.dtype)
    last = positions[:, 2:]
    last.mul_(3)
    out = x * positions
    last.zero_()  # too late
    return out


def rows(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for part in out.unbind(0):
        part.add_(x.sum() * 0 + x[0])
    return out.relu() + x


VIEWS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "a canvas": (lambda x: canvas(x).relu(), torch.relu),
    "a column": (lambda x: column(x).relu(), torch.relu),
    "a table": (table, lambda x: x * torch.tensor([1.0, 1.0, 3.0, 3.0], dtype=x.dtype)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_of_constants_that_change(name: str) -> None:
    assert_as_plain(*VIEWS[name])


# --- masks of minus infinity --------------------------------------------------------------------------


HIDDEN = torch.ones(4, 4, dtype=torch.bool).triu(1)
BIAS = torch.zeros(4, 4, dtype=torch.float64).masked_fill(HIDDEN, -math.inf)


def attention(
    scores: Callable[[Tensor], Tensor], softmax: Callable[[Tensor], Tensor] | None = None
) -> Callable[[Tensor], Tensor]:
    weigh = softmax or (lambda s: s.softmax(-1))
    return lambda x: weigh(scores(x @ x.transpose(2, 3) / 2)) @ x


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "added": attention(lambda s: s + BIAS),
    "masked_fill": attention(lambda s: s.masked_fill(HIDDEN, -math.inf)),
    "masked_fill in place": attention(lambda s: s.masked_fill_(HIDDEN, -math.inf)),
    "where": attention(lambda s: torch.where(HIDDEN, -math.inf, s)),
    "index": attention(lambda s: indexed(s)),
    "the lowest number": attention(lambda s: s + torch.finfo(s.dtype).min * HIDDEN.to(s.dtype)),
    "in another type": attention(lambda s: s + BIAS, lambda s: F.softmax(s, dim=-1, dtype=torch.float64).to(s.dtype)),
    "causal kernel": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "kernel with a mask": lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=~HIDDEN),
    "kernel with a bias": lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=BIAS),
    "kernel in math": lambda x: in_math(x),
}


def indexed(s: Tensor) -> Tensor:
    s = s * 1
    s[..., HIDDEN] = -math.inf
    return s


def in_math(x: Tensor) -> Tensor:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return F.scaled_dot_product_attention(x, x, x, attn_mask=~HIDDEN)


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_infinity_make_no_nan(name: str) -> None:
    images, model = some_images(), between(MASKS[name])
    shares = bias_terms(model, images, 1)
    assert all(share.isfinite().all() for share in shares.values())
    assert_exact(model, model.conv, images)
    plain = between(lambda x: MASKS["added"](x))
    assert_close(linear_form(model, images, 1).coefficients, linear_form(plain, images, 1).coefficients, **EXACT)


def test_maxima_and_logs_of_masked_scores_make_no_nan() -> None:
    for function in (
        lambda x: (x + BIAS).amax(-1, keepdim=True) + x,
        lambda x: (x + BIAS).logsumexp(-1, keepdim=True) + x,
        lambda x: (x + BIAS).topk(1, -1)[0] + x,
    ):
        images, model = some_images(), between(function)
        form = linear_form(model, images, 1)
        assert_close(form.sums + form.bias, form.score, **EXACT)
        assert form.coefficients.isfinite().all()


def test_maxima_of_masked_scores_have_their_gradient() -> None:
    assert_is_gradient(lambda x: (x + BIAS).amax(-1, keepdim=True) + x)


# --- one operation, by hand ---------------------------------------------------------------------------

AS_PLAIN: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "a part of a split that nothing reads": (
        lambda x: torch.cat([x.split(3, 1)[0], x[:, :1]], 1),
        lambda x: torch.cat([x[:, :3], x[:, :1]], 1),
    ),
    "a subtraction from a number": (lambda x: torch.rsub(x, 3.0, alpha=2.0), lambda x: 3.0 - 2.0 * x),
    "a copied gate": (lambda x: torch.empty_like(x).copy_(x.sigmoid()) * x, lambda x: x.sigmoid() * x),
    "a copy that may come later": (
        lambda x: torch.empty_like(x).copy_(x, non_blocking=True).relu(),
        torch.relu,
    ),
    "a negated gate": (lambda x: -x.sigmoid() * x, lambda x: -(x.sigmoid() * x)),
    "a saturated hardsigmoid": (lambda x: F.hardsigmoid(8 * x), lambda x: (8 * x / 6 + 0.5).clamp(0, 1)),
    "a gradient of hardsigmoid": (
        lambda x: torch.ops.aten.hardsigmoid_backward(x, 8 * x),
        lambda x: x * ((8 * x).abs() < 3) * torch.tensor(1 / 6).item(),
    ),
    "pools of volumes": (
        lambda x: F.adaptive_max_pool3d(torch.stack([x, x.flip(1)], 1), 2).flatten(1).repeat(1, 4).view(x.shape),
        lambda x: F.max_pool3d(torch.stack([x, x.flip(1)], 1), 2).flatten(1).repeat(1, 4).view(x.shape),
    ),
}


@pytest.mark.parametrize("name", AS_PLAIN)
def test_operations_are_as_written_plainly(name: str) -> None:
    assert_as_plain(*AS_PLAIN[name])


def test_a_matrix_times_a_vector() -> None:
    matrix, x = randn(3, 4), randn(1, 4, seed=1)
    of_vector = linear_form(lambda x: matrix.mv(x[0])[None], x, 1)
    assert_close(of_vector.coefficients, matrix[1:2], **EXACT)
    images, vector = randn(1, 3, 4), randn(4, seed=1)
    of_matrix = linear_form(lambda x: x[0].mv(vector)[None], images, 1)
    assert_close(of_matrix.coefficients, torch.stack([0 * vector, vector, 0 * vector])[None], **EXACT)


def test_an_outer_product_beside_a_matrix() -> None:
    matrix, x, vector = randn(3, 2), randn(1, 3, seed=1), randn(2, seed=2)
    form = linear_form(lambda x: torch.addr(matrix, x[0], vector, beta=2.0, alpha=3.0)[:, 1][None], x, 2)
    assert_close(form.coefficients, 3.0 * torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64) * vector[1], **EXACT)
    assert_close(form.bias, 2.0 * matrix[2:, 1], **EXACT)


def test_each_of_several_exponents_goes_by_its_own_rule() -> None:
    exponents, x = torch.tensor([2.0, -1.0, 0.0, 0.5]).double(), torch.full((1, 4), 4.0).double()
    form = linear_form(lambda x: x**exponents, x, lambda powers: powers.sum(1))
    # gates x and 1/√x, the tangent's slope -1/x², a constant
    assert_close(form.coefficients, torch.tensor([[4.0, -1 / 16, 0.0, 0.5]]).double(), **EXACT)
    assert_close(form.bias, torch.tensor([0.5 + 1.0]).double(), **EXACT)


@pytest.mark.parametrize("exponent", [-0.5, torch.tensor(-0.5).double()], ids=["number", "tensor"])
def test_a_negative_power_is_a_scale(exponent: float | Tensor) -> None:
    x = torch.tensor([[2.0, -1.0]]).double()
    form = linear_form(lambda x: x * (x * x + 1).pow(exponent), x, 0)
    assert_close(form.coefficients, torch.tensor([[5.0**-0.5, 0.0]], dtype=torch.float64), **EXACT)
    assert_close(form.bias, torch.zeros(1).double(), **EXACT)


def test_the_first_power_is_the_identity_at_zero_too() -> None:
    x = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    assert_close(linear_form(lambda x: x.pow(1.0), x, 0).coefficients, torch.tensor([[1.0, 0.0]]).double(), **EXACT)


# --- what PyTorch's own backward pass is no transpose of ---------------------------------------------------


def assigned(x: Tensor) -> Tensor:
    out = 0.5 * x
    out[:, [1, 1, 0]] = x[:, 1:]
    return out


def unpooled(x: Tensor, dims: int) -> Tensor:
    pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[dims]
    unpool = {1: F.max_unpool1d, 2: F.max_unpool2d, 3: F.max_unpool3d}[dims]
    size = {1: (2, 4, 16), 2: (2, 4, 4, 4), 3: (2, 2, 2, 4, 4)}[dims]
    _, places = pool(RAISED.reshape(size), 3 if dims < 3 else 2, 1, return_indices=True)
    values = x.flatten(1)[:, : places[0].numel()].reshape(places.shape)  # several windows have one maximum
    return unpool(values, places, 3 if dims < 3 else 2, 1, output_size=size)


RAISED = randn(2, 4, 4, 4, seed=3)
AGAIN = torch.tensor([0, 0, 1, 1])
ROWS = torch.tensor([[0, 1, 1], [3, 1, 0]])

LINEAR: dict[str, Callable[[Tensor], Tensor]] = {
    "an assignment of one place twice": assigned,
    "index_put of one place twice": lambda x: torch.zeros_like(x).index_put((torch.tensor([[0], [1]]), AGAIN[None]), x),
    "index_put of one value": lambda x: x.index_put((torch.arange(2)[:, None], AGAIN[None]), x[:, :1, :1, :1]),
    "index_put that adds": lambda x: x.index_put((torch.tensor([[0], [1]]), AGAIN[None]), x.flip(1), accumulate=True),
    "scatter to one place": lambda x: x.scatter(1, torch.zeros(2, 3, 4, 4, dtype=torch.long), 2 * x),
    "scatter in place": lambda x: torch.zeros_like(x).scatter_(3, AGAIN.expand(2, 4, 4, 4), x),
    "index_copy of one place twice": lambda x: x.index_copy(1, torch.tensor([1, 1]), 3 * x[:, 2:]),
    "put of one place twice": lambda x: torch.stack([
        one.put(torch.tensor([5, 60, 5]), 2 * one[0, 0, :3]) for one in x
    ]),
    "overlapping windows unpooled": lambda x: unpooled(x, 2),
    "overlapping windows of a line unpooled": lambda x: unpooled(x, 1),
    "overlapping windows of a volume unpooled": lambda x: unpooled(x, 3),
    "rows of a live table, one of them padding": lambda x: torch.stack([F.embedding(ROWS, t[0], 1) for t in x]),
    "rows of a live table, by frequency": lambda x: torch.stack([
        F.embedding(ROWS, t[0], scale_grad_by_freq=True) for t in x
    ]),
    "sums of weights by number": lambda x: torch.stack([torch.bincount(torch.arange(64) % 5, t.flatten()) for t in x]),
    "a view by strides of a part": lambda x: (1 * x)[:, 1:].as_strided((2, 3, 4), (64, 16, 4), 16),
    "a view by strides beyond a part": lambda x: (1 * x)[..., ::2].as_strided((2, 3, 4), (64, 16, 1)),
    "a view by strides before a part": lambda x: (1 * x)[:, 2:].as_strided((2, 3, 4), (64, 16, 1), 0),
    "a sum of one number": lambda x: torch.stack([t.sum().sum(0) for t in x])[:, None],
    "a mean of one number": lambda x: torch.stack([t.sum().mean(-1) for t in x])[:, None],
    "a maximum of one number": lambda x: torch.stack([t.sum().amax(0) + t.sum().max(-1)[0] for t in x])[:, None],
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_functions_have_the_coefficients_that_differences_show(name: str) -> None:
    x, function = randn(2, 4, 4, 4), LINEAR[name]
    weights = randn(function(x).flatten(1).shape[1], seed=5)

    def score(x: Tensor) -> Tensor:
        return function(x).flatten(1) @ weights

    form = linear_form(score, x)
    units = torch.eye(64, dtype=x.dtype).reshape(64, 1, 4, 4, 4)
    differences = torch.stack([score(x + unit) - score(x) for unit in units], 1).reshape(x.shape)
    assert_close(form.coefficients, differences, rtol=1e-10, atol=1e-11)
    assert_close(form.sums + form.bias, form.score, **EXACT)
    assert_close(sum(bias_terms(score, x).values(), torch.zeros(2, dtype=x.dtype)), form.bias, **EXACT)


def out_of_nothing(x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.clamp(x, 0.0, out=torch.empty(0, dtype=x.dtype))


def given(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return function(*args, out=torch.empty(0, dtype=torch.float64), **kwargs)


def conjugated(z: Tensor) -> Tensor:
    return torch.zeros_like(z).copy_(z.conj())


FULL = torch.ones(4, 4, dtype=torch.bool)
FULL[1] = False
INFINITE = torch.tensor([math.inf, 0.0, -math.inf, 0.0], dtype=torch.float64)

EXACT_ONES: dict[str, Callable[[Tensor], Tensor]] = {
    "a bound for what is no number": lambda x: torch.nan_to_num(x.log(), nan=0.5),
    "a bound for what is infinite": lambda x: torch.nan_to_num(x + INFINITE, 0.3, 2.0, -2.0),
    "a sum of what is a number": lambda x: torch.where(x > 0, x, torch.nan).nansum(1, keepdim=True) + x,
    "a hardshrink": lambda x: F.hardshrink(x, 0.3),
    "a hardshrink of a negative bound": lambda x: F.hardshrink(x, -0.5),
    "a step of live values": lambda x: torch.heaviside(torch.zeros_like(x), x),
    "phases": lambda x: torch.fft.ifft(torch.sgn(torch.fft.fft(x))).real,
    "attention to nothing": lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=FULL),
    "attention to nothing, by a bias": lambda x: F.scaled_dot_product_attention(
        x, x, x, attn_mask=torch.zeros(4, 4, dtype=x.dtype).masked_fill(~FULL, -math.inf)
    ),
    "a complex constant over what is live": lambda x: ((1 + 2j) / (torch.fft.fft(x) + 5)).imag,
    "a complex constant less what is live": lambda x: ((1 + 2j) - 2j * torch.fft.fft(x)).imag,
    "a complex exponential": lambda x: torch.complex(x, x.flip(1)).exp().imag,
    "a given place of no shape": out_of_nothing,
    "a given place of rounded quotients": lambda x: x + given(torch.div, x, 0.3, rounding_mode="floor"),
    "a given place of truncated quotients": lambda x: x * given(torch.div, x, x.flip(1), rounding_mode="trunc"),
    "a given place of eigenvalues": lambda x: x + given(torch.linalg.eigvalsh, x @ x.mT)[..., None],
    "a given place of singular values": lambda x: x + given(torch.linalg.svdvals, x)[..., None],
    "a given place of a conjugate": lambda x: torch.view_as_real(conjugated(torch.complex(x, x.flip(1)))).sum(-1),
    "a square of complex numbers": lambda x: (torch.fft.fft(x) ** 2).real,
    "complex powers": lambda x: (torch.complex(x, x + 1) ** (1.5 - 0.5j)).real,
    "powers by tensors": lambda x: (torch.fft.fft(x) ** torch.arange(-1, 3)).imag,
    "powers by complex tensors": lambda x: ((x + 5j) ** torch.tensor([1 + 1j, -1, 2j, 0])).imag,
    "powers by what is live": lambda x: ((2 + 1j) ** torch.complex(x, 0 * x) + torch.fft.fft(x) ** (x + 1j)).imag,
    "parts of pairs": lambda x: torch.view_as_real(torch.complex(x, x.flip(1)))[..., 1:].sum(-1) + x,
    "statistics of complex numbers": lambda x: (
        x + sum(one.real for one in torch.var_mean(torch.fft.fft(x), 3, keepdim=True))
    ),
    "how many are not zero": lambda x: x * torch.linalg.vector_norm(x, 0) + torch.linalg.vector_norm(x, 0),
    "a power of two": lambda x: torch.ldexp(x, torch.arange(4)) + (1 * x).ldexp_(x),
    "a copy of a part": lambda x: torch.narrow_copy(x, 3, 1, 3).sum(3, keepdim=True) + x,
    "factors unpacked": lambda x: torch.lu_unpack(*torch.linalg.lu_factor(x + 4 * torch.eye(4)))[2],
    "several margins": lambda x: x + F.multilabel_margin_loss(x[0, 0], torch.arange(4).expand(4, 4)),
}


@pytest.mark.parametrize("name", EXACT_ONES)
def test_forms_that_nothing_may_be_missing_of(name: str) -> None:
    images, model = some_images(), between(EXACT_ONES[name])
    assert_exact(model, model.conv, images)
    form, books = linear_form(model, images, 1, model.conv), bias_maps(model, images, 1, model.conv)
    total = sum(one.flatten(1).sum(1) for one in books.maps.values()) + sum(books.placeless.values())
    assert_close(total, form.bias, rtol=1e-10, atol=1e-11)
    assert form.coefficients.abs().max() > 1e-3


def complex_of(x: Tensor) -> Tensor:
    return torch.complex(x, x.flip(1).cos() + 1)


DERIVED: dict[str, Callable[[Tensor], Tensor]] = {
    "polygamma in place": lambda x: x.abs().add(1).polygamma_(1),
    "polygamma of a part in place": lambda x: torch.cat([x.abs().add(1)[:, :2].polygamma_(2), x[:, 2:]], 1),
    "complex nuclear norms": lambda x: x + torch.linalg.matrix_norm(complex_of(x), "nuc", keepdim=True),
    "complex singular values": lambda x: x + torch.linalg.svdvals(complex_of(x))[..., None],
    "complex spectral norms": lambda x: x + torch.linalg.matrix_norm(complex_of(x), 2, keepdim=True),
    "complex pseudo-inverse": lambda x: torch.linalg.pinv(complex_of(x)).real,
    "complex pseudo-inverse of a rectangle": lambda x: F.pad(torch.pinverse(complex_of(x)[..., :3]).imag.mT, (0, 1)),
}


@pytest.mark.parametrize("name", DERIVED)
def test_functions_that_go_by_their_slope_alone(name: str) -> None:
    assert_is_gradient(DERIVED[name])


KERNELS_OF_NORMS: dict[str, bool | None] = {  # whether they take statistics of the image
    "_native_batch_norm_legit": None,
    "_batch_norm_no_update": False,
    "_batch_norm_with_update": True,
    "_batch_norm_with_update_functional": True,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", KERNELS_OF_NORMS)
def test_kernels_of_norms_that_have_a_name_of_their_own(name: str, training: bool) -> None:
    if KERNELS_OF_NORMS[name] not in {None, training}:
        return
    weight, bias, kernel = randn(4), randn(4, seed=1), getattr(torch.ops.aten, name)
    ways = (training,) if KERNELS_OF_NORMS[name] is None else ()

    def normed(x: Tensor) -> Tensor:
        return kernel(x, weight, bias, randn(4), randn(4).abs(), *ways, 0.1, 1e-5)[0]

    def plain(x: Tensor) -> Tensor:
        return F.batch_norm(x, randn(4), randn(4).abs(), weight, bias, training)

    form, expected = (linear_form(between(one), some_images(1), 1) for one in (normed, plain))
    assert_close(form.coefficients, expected.coefficients, **EXACT)
    assert_close(form.bias, expected.bias, **EXACT)
    if training:
        with pytest.raises(ValueError, match=r"a score is not a function of one image.* Call model\.eval\(\)"):
            linear_form(between(normed), some_images(2), 1)


def test_shares_of_a_score_that_is_constant_are_the_score() -> None:
    shares = bias_terms(lambda x: x.round().sum((1, 2, 3))[:, None], some_images(), 0)
    assert_close(shares["score"], some_images().round().sum((1, 2, 3)), **EXACT)


@pytest.mark.parametrize("name", ["mul_", "div_", "add_", "sub_"])
def test_wider_numbers_in_place_are_narrowed(name: str) -> None:
    weight, other = randn(3, 4, 2, 2).float(), randn(4, 1, 1).abs() + 0.5

    def model(x: Tensor) -> Tensor:
        return F.conv2d(getattr(1 * x, name)(other), weight).flatten(1)

    x = randn(2, 4, 4, 4).float()
    form = linear_form(model, x, 1)
    plain = linear_form(lambda x: F.conv2d(getattr(1 * x, name[:-1])(other.float()), weight).flatten(1), x, 1)
    assert_close(form.coefficients, plain.coefficients)
    assert_close(form.bias, plain.bias, rtol=1e-4, atol=1e-5)


TWO_ARGUMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "one twice": lambda x: torch.hypot(x, x),
    "one made of the other": lambda x: torch.logaddexp(x, 2 * x),
    "distances": lambda x: torch.cdist(x, 3 * x),
}


@pytest.mark.parametrize("name", TWO_ARGUMENTS)
def test_maps_that_can_be_derived_count_each_argument_once(name: str) -> None:
    images, method = some_images(), ScoreMap(between(TWO_ARGUMENTS[name]))
    differentiable = method.attribute(images.requires_grad_(), 1, grad_kwargs={"create_graph": True})
    assert_close(differentiable.detach(), method.attribute(images.detach(), 1), **EXACT)


def test_a_layer_may_be_named_twice() -> None:
    images, model = some_images(), between(torch.relu)
    first, second = LayerScoreMap(model, [model.conv, model.conv]).attribute(images, 1)
    assert_close(first, LayerScoreMap(model, model.conv).attribute(images, 1), rtol=0, atol=0)
    assert_close(second, first, rtol=0, atol=0)


def test_bounds_in_the_wrong_order_leave_the_upper_one() -> None:
    assert_is_gradient(lambda x: x.clamp(0.5, -0.2) + x)
    assert_is_gradient(lambda x: (1 * x).clamp_(0.5, -0.2) + x)


def test_a_power_of_zero_is_one_at_zero_too() -> None:
    assert_is_gradient(lambda x: x.relu() ** 0 * x)
    assert_is_gradient(lambda x: torch.pow(x.relu(), 0.0) + x)


def test_bounds_that_are_one_leave_a_constant() -> None:
    assert_is_gradient(lambda x: F.hardtanh(x, 0.0, 0.0) + x)
    assert_is_gradient(lambda x: F.hardtanh(x, 0.3, 0.3) + x)
    assert_is_gradient(lambda x: F.hardtanh_(1 * x, 0.3, 0.3) + x)


FIRST, SECOND = randn(2, 16, 8), randn(2, 8, 4, seed=1)
PRODUCTS_WITH_A_LIVE_TERM: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "addmm": (
        lambda x: torch.addmm(x, FIRST[0], SECOND[0], beta=2, alpha=3),
        lambda x: 2 * x + 3 * (FIRST[0] @ SECOND[0]),
    ),
    "addmm in place": (
        lambda x: (1 * x).addmm_(FIRST[0], SECOND[0], beta=2, alpha=3),
        lambda x: 2 * x + 3 * (FIRST[0] @ SECOND[0]),
    ),
    "baddbmm": (
        lambda x: torch.baddbmm(x[None], FIRST[:1], SECOND[:1], beta=2)[0],
        lambda x: 2 * x + FIRST[0] @ SECOND[0],
    ),
    "addbmm": (
        lambda x: torch.addbmm(x, FIRST, SECOND, beta=2, alpha=3),
        lambda x: 2 * x + 3 * (FIRST @ SECOND).sum(0),
    ),
    "addmv": (
        lambda x: torch.addmv(x[:, 0], FIRST[0], SECOND[0, :, 0], alpha=3)[:, None].expand(-1, 4),
        lambda x: (x[:, 0] + 3 * (FIRST[0] @ SECOND[0, :, 0]))[:, None].expand(-1, 4),
    ),
    "addr": (
        lambda x: torch.addr(x, FIRST[0, :, 0], SECOND[0, 0], beta=2, alpha=3),
        lambda x: 2 * x + 3 * FIRST[0, :, 0, None] * SECOND[0, 0],
    ),
    "a layer's live bias": (
        lambda x: F.linear(FIRST[0], SECOND[0].t(), x[0]) + x,
        lambda x: FIRST[0] @ SECOND[0] + x[0] + x,
    ),
    "addbmm of a constant term": (
        lambda x: torch.addbmm(FIRST[0, :, :4], x[None], SECOND[:1, :4], beta=2, alpha=3),
        lambda x: 2 * FIRST[0, :, :4] + 3 * (x @ SECOND[0, :4]),
    ),
    "addr of a constant term": (
        lambda x: torch.addr(FIRST[0, :, :4], x[:, 0], SECOND[0, 0], beta=2, alpha=3),
        lambda x: 2 * FIRST[0, :, :4] + 3 * x[:, :1] * SECOND[0, 0],
    ),
    "a term of NaN that does not count": (
        lambda x: torch.addmm(torch.full((4,), torch.nan).double(), x, SECOND[0, :4], beta=0),
        lambda x: x @ SECOND[0, :4],
    ),
}


@pytest.mark.parametrize("name", PRODUCTS_WITH_A_LIVE_TERM)
def test_terms_beside_a_product_and_products_beside_a_term(name: str) -> None:
    function, plain = PRODUCTS_WITH_A_LIVE_TERM[name]
    each = lambda body: lambda x: torch.stack([body(one.reshape(16, 4)) for one in x])  # noqa: E731
    assert_as_plain(each(function), each(plain))


VIEWS_AND_PRODUCTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "_neg_view": (torch._neg_view, torch.neg),
    "imaginary part of a conjugate": (lambda x: torch.complex(x, 2 * x).conj().imag, lambda x: -2 * x),
    "_unsafe_index": (
        lambda x: torch.ops.aten._unsafe_index(x, [None, torch.tensor([1, 0, 3, 3])]),
        lambda x: x[:, [1, 0, 3, 3]],
    ),
    "conj_physical": (lambda x: torch.conj_physical(torch.complex(x, 2 * x)).imag, lambda x: -2 * x),
    "degrees": (lambda x: torch.rad2deg(x) + torch.deg2rad(x), lambda x: x * (180 / math.pi + math.pi / 180)),
    "fmod": (lambda x: torch.fmod(x, 0.3), lambda x: x - 0.3 * (x / 0.3).trunc()),
    "remainder": (lambda x: torch.remainder(x, 0.3), lambda x: x - 0.3 * (x / 0.3).floor()),
    "frac": (torch.frac, lambda x: x - x.trunc()),
    "vdot": (
        lambda x: x * torch.stack([torch.vdot(one.flatten(), one.flip(0).flatten()) for one in x])[:, None, None, None],
        lambda x: x * torch.stack([torch.dot(one.flatten(), one.flip(0).flatten()) for one in x])[:, None, None, None],
    ),
}


@pytest.mark.parametrize("name", VIEWS_AND_PRODUCTS)
def test_operations_that_others_are_made_of(name: str) -> None:
    assert_as_plain(*VIEWS_AND_PRODUCTS[name])


def test_running_statistics_that_depend_on_the_image_are_not_updated() -> None:
    norm = lambda x: F.instance_norm(x, x.mean((0, 2, 3)), x.var((0, 2, 3)))  # noqa: E731
    with pytest.raises(ValueError, match="running statistics that a norm updates must be constants"):
        linear_form(between(norm), some_images(1), 1)


def test_a_live_mask_of_attention_can_be_derived() -> None:
    attend = lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=x.tanh())  # noqa: E731
    images, method = some_images(), ScoreMap(between(attend))
    differentiable = method.attribute(images.requires_grad_(), 1, grad_kwargs={"create_graph": True})
    assert_close(differentiable.detach(), method.attribute(images.detach(), 1), **EXACT)


# -- weights that depend on the image, as in adaptive norms

MIXING = torch.rand(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
MAP = torch.randn(1, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
LIVE_WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "layer norm": lambda x, w: F.layer_norm(x.movedim(1, -1), (4,), w, 2 * w).movedim(-1, 1),
    "layer norm's bias": lambda x, w: F.layer_norm(x.movedim(1, -1), (4,), None, w).movedim(-1, 1),
    "group norm": lambda x, w: F.group_norm(x, 2, w, w.tanh()),
    "instance norm": lambda x, w: F.instance_norm(x, weight=w, bias=w),
    "batch norm": lambda x, w: F.batch_norm(x, MAP.mean((0, 2, 3)), MAP.var((0, 2, 3)), w, MAP[0, :, 0, 0]),
    "batch norm's statistics": lambda x, w: F.batch_norm(x, w, w.abs() + 1, MAP[0, :, 0, 0], w),
    "rms norm": lambda x, w: F.rms_norm(x.movedim(1, -1), (4,), w).movedim(-1, 1),
    "norm of a constant": lambda x, w: F.group_norm(MAP, 2, w),
    "prelu": lambda x, w: F.prelu(x, w),
    "prelu of one weight": lambda x, w: F.prelu(x, w[:1]),
    "prelu of a constant": lambda x, w: F.prelu(MAP, w),
}


@pytest.mark.parametrize("name", LIVE_WEIGHTS)
def test_weights_that_depend_on_the_image_are_factors_of_a_product(name: str) -> None:
    image = torch.randn(1, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7))

    def model(x: Tensor) -> Tensor:
        return LIVE_WEIGHTS[name](x, x.mean((0, 2, 3)) @ MIXING).mean((2, 3))

    form = linear_form(model, image, 1)
    at_zero = freeze(model, image)(torch.zeros_like(image))[:, 1]
    assert_close(form.score, model(image)[:, 1], rtol=1e-12, atol=1e-14)
    assert_close(form.sums + at_zero, form.score, rtol=1e-10, atol=1e-12)
    assert_close(form.bias, at_zero, rtol=1e-10, atol=1e-12)
    assert float(form.coefficients.abs().max()) > 0


def test_a_live_weight_takes_half_of_its_product() -> None:
    """As in any product of two live factors: y = ½ (n̄ w + n w̄), with n the norm and w its weight."""
    image = torch.randn(1, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    both = [
        linear_form(lambda x, norm=norm: norm(x, x.mean((0, 2, 3)) @ MIXING).mean((2, 3)), image, 1)
        for norm in (
            lambda x, w: F.group_norm(x, 2, w),
            lambda x, w: F.group_norm(x, 2) * w[:, None, None],
        )
    ]
    assert_close(both[0].coefficients, both[1].coefficients, rtol=1e-10, atol=1e-12)


FEW_POSITIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(memory_format=torch.channels_last),
    "to": lambda x: x.to(memory_format=torch.channels_last),
    "to another type": lambda x: x.to(torch.float32, memory_format=torch.channels_last).double(),
    "clone": lambda x: x.clone(memory_format=torch.channels_last),
    "pairs": lambda x: torch.view_as_complex(
        x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).unfold(3, 2, 2)
    ).abs(),
    "derived once": lambda x: torch.stack([x.flatten(1).T, *[margins(x)] * 2]),
    "nothing": lambda x: x[:, :, :0],
}


def margins(x: Tensor) -> Tensor:
    labels = torch.zeros(x[0].numel(), dtype=torch.long)
    return F.multi_margin_loss(x.flatten(1).T, labels, reduction="none")[:, None].expand(-1, len(x))


class ManyLabels(nn.Module):
    """A layer with fewer positions than there are labels, so that its maps are taken forward."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.layer, self.function = nn.Conv2d(3, 4, 5), nn.Identity(), function

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(self.layer(self.conv(x))).reshape(len(x), -1).sum(1, keepdim=True)
        return y * torch.linspace(-1, 1, 20, dtype=torch.float64) + 1


@pytest.mark.parametrize("name", FEW_POSITIONS)
def test_maps_of_all_labels_taken_forward_are_those_of_each(name: str) -> None:
    torch.manual_seed(0)
    model, images = ManyLabels(FEW_POSITIONS[name]).double().eval(), some_images(1)
    method = LayerScoreMap(model, model.layer)
    assert_close(method.attribute_targets(images)[:, 3:4], method.attribute(images, 3), rtol=1e-6, atol=1e-7)


def test_maps_of_all_labels_of_a_layer_without_elements_are_empty() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 5), nn.Identity()).double().eval()
    function = lambda x: model[1](model[0](x)[..., :0]).sum((1, 2, 3))[:, None] + x.mean((2, 3))  # noqa: E731
    assert LayerScoreMap(function, model[1]).attribute_targets(some_images()).shape == (2, 3, 2, 0)


@pytest.mark.parametrize("function", [torch.copysign, lambda x, _: torch.angle(x), lambda x, y: x * torch.angle(y)])
def test_arguments_without_a_slope_cost_no_pass_for_each_element(
    function: Callable[[Tensor, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("captum_scoremap.rules.derivative._pushed_one_by_one")
    model, images = between(lambda x: x + function(x, x.flip(1))), some_images()
    assert_exact(model, model.conv, images)


def test_the_number_after_another_is_that_but_for_one_rounding() -> None:
    form = linear_form(lambda x: torch.nextafter(x, 2 * x.flip(1)).square().sum(1), randn(2, 3))
    assert_close((form.coefficients * randn(2, 3)).sum(1) + form.bias, randn(2, 3).square().sum(1), **EXACT)
    assert_close(form.coefficients, randn(2, 3), **EXACT)  # one factor frozen


def test_norms_of_no_images_are_nothing() -> None:
    def model(x: Tensor) -> Tensor:
        empty = (1 * x).flatten()[:0].reshape(0, 4, 3)
        return F.group_norm(empty, 2).sum() + F.layer_norm(empty, (3,)).sum() + x.sum(1)

    assert_close(linear_form(model, randn(2, 3)).coefficients, torch.ones(2, 3, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize(
    "place",
    [
        lambda x: torch.index_put(x, [torch.tensor([0, 1, 1])], x[1:]),
        lambda x: x.index_copy(0, torch.tensor([2, 2]), x[:2]),
        lambda x: x.scatter(0, torch.tensor([[3, 0, 0], [3, 1, 1]]), x[1:3]),
        lambda x: F.max_unpool1d(x[None], torch.tensor([[[0, 0, 5]] * 4]), 2)[0],
        lambda x: x.put(torch.tensor([4, 4]), x[0, 1:]),
    ],
)
def test_gradients_of_frozen_models_count_the_value_that_stays(place: Callable[[Tensor], Tensor]) -> None:
    def model(x: Tensor) -> Tensor:
        placed = place(x[0]).flatten()
        return (placed * torch.arange(1.0, len(placed) + 1)).sum(0, keepdim=True)

    x = randn(1, 4, 3)
    leaf = torch.zeros_like(x, requires_grad=True)
    (found,) = torch.autograd.grad(freeze(model, x)(leaf), leaf)
    assert_close(found, linear_form(model, x).coefficients, **EXACT)


class Resampled(nn.Module):
    """``F.interpolate`` behind a layer, and a linear head."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.layer, self.how = nn.Identity(), how

    def forward(self, x: Tensor) -> Tensor:
        y = F.interpolate(self.layer(x), **self.how).flatten(1)
        return y @ randn(y.shape[1], 3).to(x.dtype)

    def matrix(self, x: Tensor) -> Tensor:
        """Return what the scores make of each element, (3, *sizes), one by one and in the image's layout."""
        columns = []
        for place in np.ndindex(*x.shape[1:]):
            unit = torch.zeros_like(x)
            unit[(0, *place)] = 1.0
            columns.append(self(unit)[0])
        return torch.stack(columns, -1).reshape(3, *x.shape[1:])


LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
SIZES: dict[str, tuple[list[tuple[int, ...]], list[Any]]] = {
    "nearest": ([(4,), (3, 4), (2, 3, 4)], [1.1, 1.5, 2.0, 2.1, 0.5]),
    "nearest-exact": ([(4,), (3, 4), (2, 3, 4)], [1.1, 2.1, 0.7]),
    "linear": ([(4,)], [1.1, 2.1]),
    "bilinear": ([(3, 4)], [1.1, 2.1]),
    "trilinear": ([(2, 3, 4)], [1.1, 2.1]),
    "bicubic": ([(4, 4), (3, 5)], [1.1, 1.2, (1.5, 1.1), 2.1]),
}
FACTORS = [
    (mode, shape, {"scale_factor": factor})
    for mode, (shapes, factors) in SIZES.items()
    for shape in shapes
    for factor in factors
]
ALIASED = [
    (mode, (5, 4), {"antialias": True, **how})
    for mode in ("bilinear", "bicubic")
    for how in (
        *(
            {"size": size, "align_corners": c}
            for size in ((3, 1), (7, 1), (1, 3), (1, 1), (3, 2))
            for c in (False, True)
        ),
        *({"scale_factor": factor} for factor in (1.1, (1.4, 1.1), (1.1, 0.5), 2.0)),
    )
]
BY_ROUNDING = [("nearest", (14,), {"size": 46}), ("nearest-exact", (2,), {"size": 41})]


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize(("mode", "sizes", "how"), FACTORS + ALIASED + BY_ROUNDING)
def test_resampling_is_transposed_as_it_runs(
    mode: str, sizes: tuple[int, ...], how: dict[str, Any], channels: int
) -> None:
    """Also where PyTorch's own backward pass is that of another resampling."""
    model, contiguous = Resampled(mode=mode, **how), randn(2, channels, *sizes)
    for x in (contiguous, contiguous.to(memory_format=LAST[contiguous.ndim])) if len(sizes) > 1 else (contiguous,):
        form = linear_form(model, x, 1)
        assert_close(form.coefficients, model.matrix(x)[1].expand_as(x), **EXACT)
        assert_close(form.sums + form.bias, form.score, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("sizes", "how"),
    [
        ((5, 4), {"mode": "bicubic", "antialias": True, "size": (3, 1)}),
        ((4, 4), {"mode": "bicubic", "scale_factor": 1.1}),
        ((4,), {"mode": "nearest", "scale_factor": 1.1}),
        ((2,), {"mode": "nearest-exact", "size": 41}),
        ((2, 3, 4), {"mode": "nearest", "scale_factor": (2.1, 1.1, 1.3)}),
    ],
)
def test_resampling_is_transposed_by_all_ways(sizes: tuple[int, ...], how: dict[str, Any], dtype: torch.dtype) -> None:
    close = EXACT if dtype is torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    model, x = Resampled(**how), randn(2, 3, *sizes).to(dtype).requires_grad_()
    matrix = model.matrix(x.detach())
    maps = LayerScoreMap(model, model.layer).attribute_targets(x.detach())
    assert_close(maps, (matrix * x.detach()[:, None]).sum(2), **close)
    again = LayerScoreMap(model, model.layer).attribute(x, 1, grad_kwargs={"create_graph": True})
    assert_close(torch.autograd.grad(again.sum(), x)[0], matrix[1].expand_as(x), **close)
    frozen = freeze(model, x.detach())
    assert_close(torch.autograd.grad(frozen(x)[:, 1].sum(), x)[0], matrix[1].expand_as(x), **close)
