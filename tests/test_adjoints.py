"""Adjoints against matrices: the coefficients are those of the operation written out, whatever the memory's layout."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from captum_scoremap import ScoreMap, bias_terms, linear_form
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


def test_the_first_power_is_the_identity_at_zero_too() -> None:
    x = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    assert_close(linear_form(lambda x: x.pow(1.0), x, 0).coefficients, torch.tensor([[1.0, 0.0]]).double(), **EXACT)
