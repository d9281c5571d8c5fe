"""Where a function has no finite slope: it is level there, and so is its map, or the map is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, special
from torch.testing import assert_close

from captum_scoremap import LayerScoreMap, ScoreMap, bias_terms, linear_form
from captum_scoremap.rules import Frozen, Tangent
from captum_scoremap.rules.derivative import NoDerivativeError
from tests.between import EXACT, assert_as_plain, assert_exact, between, some_images

Function = Callable[[Tensor], Tensor]


def two(x: Tensor) -> Tensor:
    """A constant like x."""
    return torch.full_like(x, 2.0)


# ReLUs put half of the elements at zero
AT_ZERO: dict[str, Function] = {
    "sqrt": lambda x: x.relu().sqrt(),
    "sqrt in place": lambda x: x.relu().sqrt_(),
    "root of a complex number": lambda x: torch.complex(x.relu(), 0 * x).sqrt().real,
    "a root by a tensor": lambda x: x.relu() ** torch.full((4,), 0.5, dtype=x.dtype),
    "a root by a live exponent": lambda x: x.relu() ** x.sigmoid(),
    "x log x": lambda x: torch.xlogy(x.relu(), x.relu()),
    "entropy": lambda x: special.entr(x.relu()),
    "hypot": lambda x: torch.hypot(x.relu(), 2 * x.relu()),
    "sinc": lambda x: torch.sinc(x.relu()),
}
AT_OTHER_EDGES: dict[str, Function] = {
    "atan2": lambda x: torch.atan2(x.relu(), 2 * x.relu() * x.sigmoid()),
    "asin": lambda x: x.clamp(-1, 1).asin(),
    "acos": lambda x: x.clamp(-0.1, 0.1).mul(10).acos(),
    "acosh": lambda x: x.clamp(min=1).acosh(),
    "norm": lambda x: x + x.relu().norm(dim=1, keepdim=True),
    "norm of a power": lambda x: x + torch.linalg.vector_norm(x.relu(), 1.5, dim=1, keepdim=True),
    "standard deviation": lambda x: x + x.relu().std(1, keepdim=True),
    "standard deviation of a constant row": lambda x: x + x[:, :1].expand(-1, 4, -1, -1).std(1, keepdim=True),
    "distances": lambda x: x + torch.cdist(x, x),
    "distances by another norm": lambda x: x + torch.cdist(x, x, p=1.5),
    "distances of many rows": lambda x: (
        x + torch.cdist(rows := x.flatten(2).mT, rows.repeat(1, 2, 1)).mT[:, :4].view_as(x)
    ),
    "product": lambda x: x + x.relu().prod(1, keepdim=True),
}


@pytest.mark.parametrize("name", {**AT_ZERO, **AT_OTHER_EDGES})
def test_functions_are_exact_at_their_edges(name: str) -> None:
    model, images = between({**AT_ZERO, **AT_OTHER_EDGES}[name]), some_images()
    assert_exact(model, model.conv, images)
    differentiable = ScoreMap(model).attribute(images.requires_grad_(), 1, grad_kwargs={"create_graph": True})
    assert_close(differentiable.detach(), ScoreMap(model).attribute(images.detach(), 1), **EXACT)


@pytest.mark.parametrize("name", AT_ZERO)
def test_functions_are_level_where_their_slope_is_infinite(name: str) -> None:
    model, images = between(AT_ZERO[name]), some_images()
    form = linear_form(model, images, 1, model.conv)
    off = form.activations < 0
    assert off.any()
    assert not off.all()
    assert_close(form.coefficients[off], torch.zeros_like(form.coefficients[off]), rtol=0, atol=0)
    assert form.coefficients[~off].abs().min() > 0


# Operations of two arguments, and where one of them is at an edge, but not both.
BESIDE_EDGES = {
    "x log y, x at zero": (torch.xlogy, (0.0, 2.0)),
    "atan2, on one axis": (torch.atan2, (0.0, 2.0)),
    "atan2, on the other": (torch.atan2, (2.0, 0.0)),
    "hypot, on one axis": (torch.hypot, (0.0, -2.0)),
    "hypot, on the other": (torch.hypot, (2.0, 0.0)),
    "asin": (lambda x, y: x.asin() + y, (0.0, 1.0)),
    "acos": (lambda x, y: x.acos() + y, (0.5, 1.0)),
    "acosh": (lambda x, y: x.acosh() + y, (2.0, 1.0)),
    "sinc": (lambda x, y: x.sinc() + y, (1.0, 0.0)),
    "entropy": (lambda x, y: special.entr(x) + y, (1.0, 0.0)),
}


@pytest.mark.parametrize("name", BESIDE_EDGES)
def test_functions_are_level_at_their_edges_alone(name: str) -> None:
    function, point = BESIDE_EDGES[name]
    x = torch.tensor([point], dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(function(x[:, 0], x[:, 1]).sum(), x)
    form = linear_form(lambda x: function(x[:, 0], x[:, 1]), x.detach())
    assert_close(form.coefficients, slopes, **EXACT)
    assert_close(form.sums + form.bias, form.score, **EXACT)


def test_distances_of_many_rows_are_derived_as_those_of_few(generator: torch.Generator) -> None:
    x = torch.randn(1, 30, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(30, 30, generator=generator, dtype=torch.float64)

    def one_by_one(x: Tensor) -> Tensor:
        return (x[:, :, None] - (2 * x + 1)[:, None]).norm(dim=-1)

    (slopes,) = torch.autograd.grad((one_by_one(x) * weight).sum(), x)
    form = linear_form(lambda x: (torch.cdist(x, 2 * x + 1) * weight).sum((1, 2))[:, None], x.detach(), 0)
    assert_close(form.coefficients, slopes, **EXACT)


MASKED: dict[str, tuple[Function, Function]] = {
    "log": (lambda x: torch.where(x > 0, x.relu().log(), x), lambda x: torch.where(x > 0, x.clamp_min(1e-99).log(), x)),
    "reciprocal": (
        lambda x: x.relu().reciprocal().masked_fill(x < 0, 0.0),
        lambda x: x.abs().reciprocal().masked_fill(x < 0, 0.0),
    ),
    "sqrt": (
        lambda x: torch.where(x > 0, x.relu().sqrt(), 0.0),
        lambda x: torch.where(x > 0, x.clamp_min(1e-99).sqrt(), 0.0),
    ),
}


@pytest.mark.parametrize("name", MASKED)
def test_what_the_score_does_not_depend_on_may_be_infinite(name: str) -> None:
    """As a mask makes it; PyTorch's gradients are NaN there."""
    function, plain = MASKED[name]
    assert_as_plain(function, plain)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.where(x > 0, x / x.relu().detach(), x),
        lambda x: torch.where(x > 0, x * (1 / x.relu()), x),
        lambda x: x.sort(1)[0] + x.mul(0).norm(p=0.3, dim=1, keepdim=True).pow(0.1),
    ],
)
def test_maps_are_finite_or_refused(function: Function) -> None:
    model, images = between(function), some_images()
    assert model(images).isfinite().all()
    for call in (
        lambda: linear_form(model, images, 1),
        lambda: LayerScoreMap(model, model.conv).attribute(images, 1),
        lambda: LayerScoreMap(model, model.conv).attribute_targets(images),
        lambda: bias_terms(model, images, 1),
    ):
        try:
            found = call()
        except ValueError as error:
            assert "must be finite, got infinite or NaN ones in torch.float64" in str(error)  # noqa: PT017
        else:
            tensors = found.values() if isinstance(found, dict) else [getattr(found, "coefficients", found)]
            assert all(one.isfinite().all() for one in tensors)


POWERS = [0.5, 1.0, 2.0, 2.5]


@pytest.mark.parametrize("power", [*POWERS, 0.0, -1.0])
def test_a_power_is_the_same_by_a_number_and_by_a_tensor(power: float) -> None:
    exponent = torch.tensor(power, dtype=torch.float64)
    base: Function = torch.relu if power >= 0 else lambda x: x.abs() + 0.1
    plain = lambda x: base(x) ** power + x  # noqa: E731
    assert_as_plain(lambda x: base(x) ** exponent + x, plain)
    assert_as_plain(lambda x: base(x) ** exponent.expand(4) + x, plain)
    assert_as_plain(lambda x: torch.pow(base(x), exponent[None, None, None]) + x, plain)


def test_powers_of_several_exponents_are_those_of_each() -> None:
    powers = [0.0, *POWERS[:2], -1.0]
    exponents = torch.tensor(powers, dtype=torch.float64)
    with_one_each = lambda x: torch.stack([x[..., at].abs() ** powers[at] for at in range(4)], -1)  # noqa: E731
    assert_as_plain(lambda x: x.abs() ** exponents, with_one_each)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("binary_cross_entropy", lambda x: F.binary_cross_entropy(0 * x + 0.3, two(x) / 4, x.abs(), reduction="none")),
        ("linalg_pinv", lambda x: x + torch.linalg.pinv(x.detach() * 1, rtol=x.abs().amax((2, 3)) * 1e-3)),
    ],
)
@pytest.mark.filterwarnings("ignore:a map is zero everywhere")  # what has no derivative is frozen
def test_what_autograd_does_not_derive_is_refused_with_advice_that_works(name: str, function: Function) -> None:
    model, images = between(function), some_images()
    with pytest.raises(NoDerivativeError, match=rf"{name} must have a derivative to take, got .*Use Frozen\(\)"):
        linear_form(model, images, 1)
    with pytest.raises(NoDerivativeError, match=f"rule for '{name}'") as problem:
        linear_form(model, images, 1, rules={name: Tangent()})
    assert str(problem.value).count("must have a derivative") == 1  # and then what PyTorch says of it
    assert_exact(model, model.conv, images, rules={name: Frozen()})


@pytest.mark.parametrize("name", ["i1", "i1e"])
def test_a_type_that_a_derivative_has_no_kernel_for_is_said_and_the_advice_works(name: str) -> None:
    model, images = between(getattr(special, name)).bfloat16(), some_images().bfloat16()
    with pytest.raises(
        NoDerivativeError, match=rf"special_{name} must have a derivative .*Explain model\.float\(\)\.$"
    ):
        linear_form(model, images, 1)
    form = linear_form(model.float(), images.float(), 1)
    assert_close(form.sums + form.bias, form.score, rtol=1e-5, atol=1e-5)


MASKED_OFF: dict[str, tuple[Function, Function]] = {
    "relu": (lambda x: x.masked_fill(x < 0, -torch.inf).relu(), torch.relu),
    "relu6": (lambda x: F.relu6(x.masked_fill(x < 0, -torch.inf)), F.relu6),
    "clamp": (lambda x: x.masked_fill(x < 0, -torch.inf).clamp(0, 3), lambda x: x.clamp(0, 3)),
    "hardtanh": (lambda x: F.hardtanh(x.masked_fill(x < 0, torch.inf), -3, 0) + x, lambda x: x),
}


@pytest.mark.parametrize("name", MASKED_OFF)
def test_infinities_of_a_mask_are_off_behind_a_mask(name: str) -> None:
    assert_as_plain(*MASKED_OFF[name])


@pytest.mark.parametrize("last", [lambda x: x.softmax(1), torch.sigmoid, lambda x: (2 * x).softmax(1)])
def test_probabilities_are_warned_of_be_they_all_that_there_is(last: Function) -> None:
    with pytest.warns(UserWarning, match="the model ends in a softmax or sigmoid"):
        linear_form(last, torch.ones(1, 3), 0)
