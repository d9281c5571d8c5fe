"""Backward passes of someone else's: custom autograd functions, and gradients that the forward takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from captum_scoremap import LayerScoreMap, ScoreMap, compile_map, freeze, linear_form
from captum_scoremap.linear import check_exactness
from tests.between import EXACT, assert_as_plain, assert_exact, assert_is_gradient, between, some_images

Function = Callable[[Tensor], Tensor]


class FrugalSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate = x.sigmoid()
        return gradient * gate * (1 + x * (1 - gate))


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * gradient, None


class Guided(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clamp(min=0) * (ctx.saved_tensors[0] > 0)


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.relu_()
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (ctx.saved_tensors[0] > 0)


class Two(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        mask = x > 0
        ctx.mark_non_differentiable(mask)
        return x * weight * mask, mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None]:
        raise AssertionError("no one's backward pass runs")


class NewStyle(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.abs()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].sign()


class ByNumpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(2 * x.detach().numpy())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


WEIGHT = torch.linspace(0.5, 2, 4, dtype=torch.float64)[:, None, None]

FUNCTIONS: dict[str, tuple[Function, Function]] = {
    "frugal SiLU": (FrugalSiLU.apply, lambda x: x * x.sigmoid()),
    "frugal SiLU, as the table has it": (FrugalSiLU.apply, F.silu),
    "gradient reversal": (lambda x: Reversal.apply(x, 0.5), lambda x: x * 1),
    "guided ReLU": (Guided.apply, torch.relu),
    "in place": (InPlace.apply, torch.relu),
    "in place, of a copy": (lambda x: InPlace.apply(x * 1) + x, lambda x: x.relu() + x),
    "two outputs": (lambda x: Two.apply(x, WEIGHT)[0], lambda x: x.relu() * WEIGHT),
    "of the new style": (NewStyle.apply, torch.abs),
    "of the new style, in vmap": (torch.vmap(NewStyle.apply), torch.abs),
    "one after another": (lambda x: Guided.apply(FrugalSiLU.apply(x)), lambda x: (x * x.sigmoid()).relu()),
    "straight through, plus itself": (lambda x: StraightThrough.apply(x) + x, lambda x: x.round() + x),
    "straight through by detach": (lambda x: x + (x.abs() - x).detach(), lambda x: x + (x.abs() - x)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_form_is_of_the_forward_that_ran(name: str) -> None:
    assert_as_plain(*FUNCTIONS[name])


@pytest.mark.filterwarnings("ignore:a map is zero everywhere")
@pytest.mark.parametrize("function", [StraightThrough.apply, torch.round, torch.sign])
def test_steps_are_constants(function: Function) -> None:
    images, model = some_images(), between(function)
    form = linear_form(model, images, 1)
    assert not form.coefficients.any()
    assert_close(form.bias, form.score, **EXACT)


def test_functions_that_leave_for_numpy_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="numpy"):
        linear_form(between(ByNumpy.apply), some_images(), 1)


# --- gradients taken in the forward -------------------------------------------------------------------


CONV = nn.Conv2d(4, 4, 3, padding=1).double()
LINEAR = nn.Linear(64, 64).double()


def quadratic(x: Tensor) -> Tensor:
    return (CONV(x) ** 2).sum()


def plain_quadratic(x: Tensor) -> Tensor:
    """The gradient of the quadratic."""
    return F.conv_transpose2d(2 * (CONV(x) - 0), CONV.weight, padding=1)


def by_autograd(energy: Function, **kwargs: Any) -> Function:
    def gradient(x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x if x.requires_grad else x.detach().requires_grad_()
            return torch.autograd.grad(energy(leaf).sum(), leaf, **kwargs)[0]

    return gradient


def by_backward(energy: Function) -> Function:
    def gradient(x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            energy(leaf).sum().backward()
        return leaf.grad

    return gradient


def by_func(energy: Function) -> Function:
    return torch.func.grad(lambda x: energy(x).sum())


def by_vjp(energy: Function) -> Function:
    def gradient(x: Tensor) -> Tensor:
        value, pull = torch.func.vjp(energy, x)
        return pull(torch.ones_like(value))[0]

    return gradient


WAYS: dict[str, Callable[[Function], Function]] = {
    "autograd.grad": by_autograd,
    "autograd.grad, create_graph": lambda energy: by_autograd(energy, create_graph=True),
    "backward": by_backward,
    "func.grad": by_func,
    "func.vjp": by_vjp,
}

# piecewise quadratic or linear: the gradient is piecewise linear
ENERGIES: dict[str, Function] = {
    "square": lambda x: (x**2).sum((1, 2, 3)),
    "squared convolution": lambda x: (CONV(x) ** 2).sum((1, 2, 3)),
    "squared ReLU": lambda x: (x.relu() ** 2).sum((1, 2, 3)),
    "ReLU of a convolution": lambda x: (CONV(x).relu() ** 2).sum((1, 2, 3)),
    "leaky ReLU": lambda x: (F.leaky_relu(x, 0.3) ** 2).sum((1, 2, 3)),
    "linear": lambda x: (LINEAR(x.flatten(1)) ** 2).sum(1),
    "average pool": lambda x: (F.avg_pool2d(x, 2) ** 2).sum((1, 2, 3)),
    "max-pool": lambda x: (F.max_pool2d(x, 2) ** 2).sum((1, 2, 3)),
    "sum, slices": lambda x: ((x[:, 1:] - x[:, :-1]) ** 2).sum((1, 2, 3)),
    "interpolated": lambda x: (F.interpolate(x, scale_factor=2, mode="bilinear") ** 2).sum((1, 2, 3)),
    "clamp": lambda x: (x.clamp(-0.5, 0.5) ** 2).sum((1, 2, 3)),
    "hardtanh": lambda x: (F.hardtanh(x, -0.5, 0.5) ** 2).sum((1, 2, 3)),
}

CURVED: dict[str, Function] = {
    "tanh": lambda x: x.tanh().sum((1, 2, 3)),
    "sigmoid": lambda x: (x.sigmoid() * x).sum((1, 2, 3)),
    "softmax": lambda x: (x.flatten(1).softmax(1) * x.flatten(1)).sum(1),
    "log_softmax": lambda x: x.flatten(1).log_softmax(1)[:, :3].sum(1),
    "gelu": lambda x: F.gelu(CONV(x)).sum((1, 2, 3)),
    "silu": lambda x: F.silu(x).sum((1, 2, 3)),
    "logsumexp": lambda x: x.flatten(1).logsumexp(1),
    "softplus": lambda x: F.softplus(x).sum((1, 2, 3)),
    "norm": lambda x: x.flatten(1).norm(dim=1),
    "exp": lambda x: x.exp().sum((1, 2, 3)),
    "layer norm": lambda x: (F.layer_norm(x, (4, 4)) ** 3).sum((1, 2, 3)),
    "cross-entropy": lambda x: F.cross_entropy(x.flatten(1), torch.zeros(len(x), dtype=torch.long), reduction="none"),
    "mean squared error": lambda x: F.mse_loss(x, x.detach().abs(), reduction="none").sum((1, 2, 3)),
    "Huber": lambda x: F.huber_loss(x, 0 * x, reduction="none").sum((1, 2, 3)),
    "smooth L1": lambda x: F.smooth_l1_loss(x, 0 * x, reduction="none").sum((1, 2, 3)),
    "binary cross-entropy": lambda x: F.binary_cross_entropy(x.sigmoid(), 0 * x, reduction="none").sum((1, 2, 3)),
    "logits": lambda x: F.binary_cross_entropy_with_logits(x, 0 * x + 1, reduction="none").sum((1, 2, 3)),
    "padding": lambda x: (F.pad(x, (1, 1, 1, 1), mode="reflect") ** 3).sum((1, 2, 3)),
    "prelu": lambda x: (F.prelu(x, 0.2 * x.new_ones(1)) ** 2).sum((1, 2, 3)),
    "softshrink": lambda x: (F.softshrink(x, 0.1) ** 2).sum((1, 2, 3)),
    "adaptive max-pool": lambda x: (F.adaptive_max_pool2d(x, 2) ** 2).sum((1, 2, 3)),
    "bicubic": lambda x: (F.interpolate(x, scale_factor=2, mode="bicubic") ** 2).sum((1, 2, 3)),
    "hardswish": lambda x: F.hardswish(x).sum((1, 2, 3)),
    "elu": lambda x: F.elu(x).sum((1, 2, 3)),
    "mish": lambda x: F.mish(x).sum((1, 2, 3)),
    "hardsigmoid": lambda x: F.hardsigmoid(x).sum((1, 2, 3)),
    "logsigmoid": lambda x: F.logsigmoid(x).sum((1, 2, 3)),
    "group norm": lambda x: (F.group_norm(x, 2) ** 3).sum((1, 2, 3)),
    "soft margin": lambda x: F.soft_margin_loss(x, torch.ones_like(x), reduction="none").sum((1, 2, 3)),
    "smaller": lambda x: (F.interpolate(x, size=3, mode="bilinear", antialias=True) ** 3).sum((1, 2, 3)),
    "diagonal": lambda x: (x.diagonal(dim1=2, dim2=3) ** 3).sum((1, 2)),
}


@pytest.mark.parametrize("energy", ENERGIES)
@pytest.mark.parametrize("way", ["autograd.grad, create_graph"])
def test_piecewise_linear_gradients_have_their_gradient(way: str, energy: str) -> None:
    images, model = some_images(), between(WAYS[way](ENERGIES[energy]))
    leaf = images.clone().requires_grad_()
    model(leaf)[:, 1].sum().backward()
    form = linear_form(model, images, 1)
    assert_close(form.score, model(images)[:, 1].detach(), **EXACT)
    assert_close(form.coefficients, leaf.grad, **EXACT)
    assert_close(form.sums + form.bias, form.score, **EXACT)


@pytest.fixture(autouse=True)
def _no_gradients_left() -> Iterator[None]:
    yield
    for parameter in (*CONV.parameters(), *LINEAR.parameters()):
        parameter.grad = None


@pytest.mark.parametrize("energy", ["squared convolution", "squared ReLU", "max-pool", "linear"])
@pytest.mark.parametrize("way", WAYS)
def test_all_ways_to_a_gradient_have_one_form(way: str, energy: str) -> None:
    images, expected = some_images(), between(WAYS["autograd.grad, create_graph"](ENERGIES[energy]))
    model = between(WAYS[way](ENERGIES[energy]))
    model.energy = nn.ModuleList([CONV, LINEAR])
    leaf = images.clone().requires_grad_()
    expected(leaf)[:, 1].sum().backward()
    form = linear_form(model, images, 1)
    assert_close(form.coefficients, leaf.grad, **EXACT)
    assert_close(form.sums + form.bias, expected(images)[:, 1].detach(), **EXACT)


@pytest.mark.parametrize("energy", CURVED)
@pytest.mark.parametrize("way", ["autograd.grad", "autograd.grad, create_graph", "func.grad"])
def test_curved_gradients_are_exact_or_refused(way: str, energy: str) -> None:
    images, model = some_images(), between(WAYS[way](CURVED[energy]))
    expected = model(images)[:, 1].detach()
    for site in (None, model.conv):
        form = linear_form(model, images, 1, site)
        assert_close(form.score, expected, **EXACT)
        assert_close(form.sums + form.bias, expected, **EXACT)


def by_jvp(function: Function, x: Tensor) -> Tensor:
    return torch.func.jvp(function, (x,), (x.flip(1),))[1]


def by_dual_numbers(function: Function, x: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x.flip(1))
        return torch.autograd.forward_ad.unpack_dual(function(dual)).tangent


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.parametrize("way", [by_jvp, by_dual_numbers])
@pytest.mark.parametrize(
    "function", [lambda x: 2 * x.relu(), F.silu, F.mish, F.hardsigmoid, torch.tanh, lambda x: x**3]
)
def test_derivatives_along_a_direction_are_seen(way: Callable[..., Tensor], function: Function) -> None:
    model = between(lambda x: way(function, x))
    assert_exact(model, model.conv, some_images())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_hessians_are_seen() -> None:
    curvature = torch.func.vmap(torch.func.hessian(lambda row: (row**3).sum()))
    model = between(lambda x: x * curvature(x.flatten(1)[:, :3]).sum((1, 2))[:, None, None, None])
    assert_exact(model, model.conv, some_images())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.parametrize(
    "function",
    [
        torch.relu,
        lambda x: F.hardtanh(x, -0.3, 0.3),
        lambda x: F.leaky_relu(x, 0.2),
        lambda x: F.hardshrink(x, 0.2),
        lambda x: F.softshrink(x, 0.2),
        lambda x: F.max_pool2d(x, 3, 1, 1),
    ],
)
def test_derivatives_along_constants_of_piecewise_linear_functions_are_constants(function: Function) -> None:
    """A mask does not move with the image, so that its product with the image is no half of each."""

    def product(x: Tensor) -> Tensor:
        return x * torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]

    assert_is_gradient(product)


def test_jvp_and_jacobians_in_the_forward() -> None:
    direction = torch.ones(2, 4, 4, 4, dtype=torch.float64)
    jvp = lambda x: torch.func.jvp(lambda y: CONV(y).relu() ** 2, (x,), (direction,))[1]  # noqa: E731
    plain = lambda x: 2 * CONV(x).relu() * (CONV(direction) - CONV(0 * direction))  # noqa: E731
    images = some_images()
    for function in (jvp, plain):
        model = between(function)
        form = linear_form(model, images, 1)
        assert_close(form.sums + form.bias, form.score, **EXACT)
        assert_close(form.score, between(plain)(images)[:, 1].detach(), **EXACT)


def test_a_step_down_an_energy() -> None:
    def denoise(x: Tensor) -> Tensor:
        return x - 0.1 * torch.func.grad(quadratic)(x)

    assert_is_gradient(denoise)
    assert_as_plain(denoise, lambda x: x - 0.1 * plain_quadratic(x))


def test_the_gradient_of_attentions_kernel_is_refused_by_name() -> None:
    energy = lambda x: F.scaled_dot_product_attention(x, x, x).sum((1, 2, 3))  # noqa: E731
    for way in ("func.grad", "autograd.grad"):
        with pytest.raises(NotImplementedError, match=r"scaled_dot_product_.*backward"):
            linear_form(between(WAYS[way](energy)), some_images(), 1)


# --- operators of a higher order ----------------------------------------------------------------------


def by_cond(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 1e9, torch.abs, torch.relu, (x,))


def by_while(x: Tensor) -> Tensor:
    from torch._higher_order_ops import while_loop

    return while_loop(lambda step, _: step < 3, lambda step, y: (step + 1, y.relu()), (torch.tensor(0), x))[1]


def by_flex(x: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(x, x, x)


@pytest.mark.parametrize(
    ("function", "plain"),
    [(by_cond, torch.relu), (by_while, torch.relu), (by_flex, lambda x: F.scaled_dot_product_attention(x, x, x))],
)
@pytest.mark.filterwarnings("ignore:.*flex_attention")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_operators_of_a_higher_order_are_what_they_run(function: Function, plain: Function) -> None:
    assert_as_plain(function, plain)


class VmappedLayer(nn.Module):
    """Two copies of a layer's weights, side by side, as an ensemble has them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.inner, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights = {name: torch.stack([one, -2 * one]) for name, one in self.inner.named_parameters()}
        both = torch.vmap(lambda own, y: torch.func.functional_call(self.inner, own, y), (0, None))
        return self.head(both(weights, self.conv(x)).relu().sum(0).flatten(1))


def test_layers_inside_of_vmap_are_refused_and_in_no_ones_way() -> None:
    torch.manual_seed(0)
    model, images = VmappedLayer().double().eval(), some_images()
    assert_exact(model, model.conv, images)
    frozen = freeze(model, images)
    assert_close(frozen(images), model(images), **EXACT)
    assert check_exactness(model, images[:1], 1).is_exact
    calls: list[Callable[[], object]] = [
        lambda: linear_form(model, images, 1, model.inner),
        lambda: LayerScoreMap(model, model.inner).attribute(images, 1),
        lambda: LayerScoreMap(model, model.inner).attribute_targets(images),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"layer must run outside of torch.vmap, got a Conv2d .* around it"):
            call()


MATRIX = torch.tensor([
    [0.0, 0.0, 1.5, -1.0],
    [0.0, 0.0, 0.5, 2.0],
    [1.0, 0.0, 0.0, 0.0],
    [0.5, 2.0, 0.0, 0.0],
]).double()

SPARSE: dict[str, Callable[[], Tensor]] = {
    "coordinates": MATRIX.to_sparse,
    "rows": MATRIX.to_sparse_csr,
    "columns": MATRIX.to_sparse_csc,
    "blocks by rows": lambda: MATRIX.to_sparse_bsr((2, 2)),
}

SPARSE_PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "from the left": lambda w, x: (w @ x.reshape(-1, 4).t()).t().reshape(x.shape),
    "linear": lambda w, x: F.linear(x.reshape(-1, 4), w).reshape(x.shape),
    "added": lambda w, x: torch.addmm(x.reshape(-1, 4).t(), w, x.reshape(-1, 4).t()).t().reshape(x.shape),
    "row by row": lambda w, x: torch.stack([w @ row for row in x.reshape(-1, 4)]).reshape(x.shape),
}


@pytest.mark.filterwarnings("ignore:.*Sparse")
@pytest.mark.parametrize("name", SPARSE_PRODUCTS)
@pytest.mark.parametrize("layout", SPARSE)
def test_sparse_weights_are_as_dense_ones(layout: str, name: str) -> None:
    weight, images, product = SPARSE[layout](), some_images(), SPARSE_PRODUCTS[name]
    model = between(lambda x: product(weight, x))
    assert_as_plain(lambda x: product(weight, x), lambda x: product(MATRIX, x))
    leaf = images.clone().requires_grad_()
    (found,) = torch.autograd.grad(freeze(model, images)(leaf)[:, 1].sum(), leaf)
    assert_close(found, linear_form(model, images, 1).coefficients, **EXACT)
    if layout != "coordinates":
        with pytest.raises(ValueError, match=r"dense tensors to be compiled, got one of layout Sparse .*to_dense\(\)"):
            compile_map(ScoreMap(model), images, 1, backend="graph")
