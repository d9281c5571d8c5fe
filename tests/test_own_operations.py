"""Operations of torch.library: seen, refused by name, or under a rule of the user's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from captum_scoremap import ScoreMap, UnsupportedOperationError, linear_form
from captum_scoremap.rules import Frozen, Gate, Rule, Tangent, with_rules
from tests.between import EXACT, assert_as_plain, assert_exact, assert_is_gradient, assert_refused, between, some_images

LIBRARY = torch.library.Library("scoremap_tests", "FRAGMENT")
LIBRARY.define("swish(Tensor x) -> Tensor")
LIBRARY.impl("swish", lambda x: x * torch.sigmoid(x), "CompositeImplicitAutograd")
LIBRARY.define("opaque(Tensor x) -> Tensor")
LIBRARY.impl("opaque", lambda x: torch.from_numpy(np.maximum(x.numpy(), 0)), "CPU")


@torch.library.custom_op("scoremap_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return torch.from_numpy(2 * x.detach().numpy() ** 2)


doubled.register_autograd(
    lambda ctx, gradient: 4 * ctx.saved_tensors[0] * gradient,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@torch.library.custom_op("scoremap_tests::without_formula", mutates_args=())
def without_formula(x: Tensor) -> Tensor:
    return x.clone().relu_() * 2


class Doubled(Rule):
    """2 x² with one factor frozen."""

    def freeze(self, call: Any) -> Tensor:
        return 2 * call.input

    def apply(self, call: Any, state: Tensor) -> Tensor:
        return state * call.input


def _named_as(name: str) -> Any:
    """A cube, an operation of one's own, by the name of one of PyTorch's, which does something else."""

    @torch.library.custom_op(f"scoremap_names::{name}", mutates_args=())
    def operation(x: Tensor) -> Tensor:
        return x**3

    operation.register_autograd(
        lambda ctx, gradient: 3 * ctx.saved_tensors[0] ** 2 * gradient,
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    return operation


NAMES = ("relu", "round", "mean", "sort", "silu", "view", "clone", "linear", "native_relu", "softmax", "batch_norm")
NAMED = {name: _named_as(name) for name in (*NAMES, "relu_copy")}


@pytest.mark.parametrize("name", NAMED)
def test_operations_of_a_library_are_not_those_of_pytorch_by_the_same_name(name: str) -> None:
    full = name if name == "relu_copy" else f"scoremap_names::{name}"
    assert_refused(NAMED[name], rf'(?s){full} .*rules={{"{full}": Tangent')
    for key in (full, NAMED[name], getattr(torch.ops.scoremap_names, name)):
        assert_is_gradient(NAMED[name], rules={key: Tangent()})


def test_rules_for_operations_of_pytorch_are_not_for_those_of_others_by_the_same_name() -> None:
    for key in ("relu", torch.relu, torch.ops.aten.relu):
        with pytest.raises(UnsupportedOperationError, match="scoremap_names::relu"):
            linear_form(NAMED["relu"], torch.ones(1, 2), 0, rules={key: Tangent()})
    for key in ("scoremap_names::relu", "scoremap_names::relu.default"):
        assert_is_gradient(NAMED["relu"], rules={key: Tangent()})
        assert_as_plain(torch.relu, torch.relu, rules={key: Frozen()})


NOBODYS = [
    f"{namespace}::{name}"
    for namespace in ("scoremap_names", "nobody", "torchvision", "prims", "quantized")
    for name in ("nothing", "abs", "abs_", "abs.default", "abs.out")
    if (namespace, name) not in {("prims", "abs"), ("prims", "abs.default")}  # which there are
]


@pytest.mark.parametrize("name", NOBODYS)
def test_a_name_of_another_library_that_has_none_such_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"got '{name}', which is none"):
        with_rules({name: Frozen()})


@pytest.mark.parametrize("name", ["sum", "amax", "transpose", "where", "var", "add"])
def test_prims_are_what_they_stand_for(name: str) -> None:
    prims = torch.ops.prims
    calls: dict[str, tuple[Any, Any]] = {
        "sum": (lambda x: prims.sum(x, [1])[:, None], lambda x: x.sum(1, keepdim=True)),
        "amax": (lambda x: prims.amax(x, [1])[:, None], lambda x: x.amax(1, keepdim=True)),
        "transpose": (lambda x: prims.transpose(x, [0, 1, 3, 2]), lambda x: x.transpose(2, 3)),
        "where": (lambda x: prims.where(x > 0, x, 2 * x), lambda x: torch.where(x > 0, x, 2 * x)),
        "var": (lambda x: prims.var(x, [1], 1.0)[:, None], lambda x: x.var(1, keepdim=True)),
        "add": (lambda x: prims.add(x, 2 * x), lambda x: x + 2 * x),
    }
    function, plain = calls[name]
    assert_as_plain(lambda x: x + function(x), lambda x: x + plain(x))


def test_operations_of_a_library_made_of_pytorchs_are_seen() -> None:
    assert_as_plain(torch.ops.scoremap_tests.swish, lambda x: x * x.sigmoid())


@pytest.mark.parametrize("name", ["doubled", "without_formula", "opaque"])
def test_operations_of_a_library_are_refused_by_name(name: str) -> None:
    assert_refused(getattr(torch.ops.scoremap_tests, name), rf"{name} in 'function'|{name} \(outside|{name}")


@pytest.mark.parametrize(
    "key",
    [
        "doubled",
        doubled,
        "scoremap_tests::doubled",
        "scoremap_tests::doubled.default",
        torch.ops.scoremap_tests.doubled,
        torch.ops.scoremap_tests.doubled.default,
    ],
)
def test_operations_of_a_library_go_by_the_tangent_or_a_rule(key: Any) -> None:
    plain = lambda x: 2 * x**2  # noqa: E731
    assert_is_gradient(doubled, rules={key: Tangent()})
    images, own, other = some_images(), between(doubled), between(plain)
    expected = ScoreMap(other).attribute(images, 1)
    assert_close(ScoreMap(own, rules={key: Doubled()}).attribute(images, 1), expected, **EXACT)
    assert_exact(own, own.conv, images, rules={key: Doubled()})


def test_operations_that_are_registered_late_may_be_named() -> None:
    with pytest.raises(ValueError, match="got 'scoremap_tests::late', which is none"):
        with_rules({"scoremap_tests::late": Doubled()})

    @torch.library.custom_op("scoremap_tests::late", mutates_args=())
    def late(x: Tensor) -> Tensor:
        return torch.from_numpy(2 * x.detach().numpy() ** 2)

    plain = lambda x: 2 * x**2  # noqa: E731
    for key in ("scoremap_tests::late", late):
        found = ScoreMap(between(late), rules={key: Doubled()}).attribute(some_images(), 1)
        assert_close(found, ScoreMap(between(plain)).attribute(some_images(), 1), **EXACT)


def test_operations_of_a_library_without_a_formula_take_a_gate_or_a_rule() -> None:
    class Twice(Rule):
        def freeze(self, call: Any) -> Tensor:
            return 2.0 * (call.input > 0)

        def apply(self, call: Any, state: Tensor) -> Tensor:
            return state * call.input

    expected = ScoreMap(between(lambda x: 2 * x.relu())).attribute(some_images(), 1)
    for rule in (Twice(), Gate(0.0)):
        model = between(without_formula)
        assert_close(ScoreMap(model, rules={"without_formula": rule}).attribute(some_images(), 1), expected, **EXACT)
        assert_exact(model, model.conv, some_images(), rules={"without_formula": rule})


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered:UserWarning")
@pytest.mark.parametrize("name", ["opaque", "without_formula"])
def test_the_tangent_of_an_operation_without_a_formula_is_refused(name: str) -> None:
    """Rather than taken for zero, with all of the score in B."""
    model = between(getattr(torch.ops.scoremap_tests, name))
    with pytest.raises(ValueError, match=f"rule for '{name}' .* must have a derivative to take, got .*Use Frozen"):
        ScoreMap(model, rules={name: Tangent()}).attribute(some_images(), 1)


def test_a_formula_that_can_be_derived_twice_takes_one_pass() -> None:
    passes = []

    @torch.library.custom_op("scoremap_tests::cubed", mutates_args=())
    def cubed(x: Tensor) -> Tensor:
        return x**3

    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        passes.append(gradient)
        return 3 * ctx.saved_tensors[0] ** 2 * gradient

    cubed.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
    assert_is_gradient(cubed, rules={"cubed": Tangent()})
    assert 0 < len(passes) < 40


class Slope(Rule):
    """The value at the image, and a slope of three."""

    def freeze(self, call: Any) -> tuple[Tensor, Tensor]:
        return call.input, call.output

    def apply(self, call: Any, state: tuple[Tensor, Tensor]) -> Tensor:
        return state[1] + 3 * (call.input - state[0])


class Nothing(Slope):
    """NaN everywhere, also where the operation has a value."""

    def apply(self, call: Any, state: tuple[Tensor, Tensor]) -> Tensor:
        return call.input * torch.nan


@pytest.mark.parametrize("rule", [Tangent(), Slope()])
def test_a_rule_may_return_nan_where_the_operation_does(rule: Rule) -> None:
    x = torch.tensor([[0.1, 0.75, 0.3, 1.0]], dtype=torch.float64)
    log = lambda x: torch.where(x > 0.5, (x - 0.5).log(), x)  # noqa: E731  NaN, but masked, below
    form = linear_form(lambda x: log(x).sum(1)[:, None], x, 0, rules={"log": rule})
    slopes = [1.0, 3.0, 1.0, 3.0] if isinstance(rule, Slope) else [1.0, 4.0, 1.0, 2.0]
    assert_close(form.coefficients, torch.tensor([slopes], dtype=torch.float64), **EXACT)
    assert_close(form.sums + form.bias, log(x).sum(1), **EXACT)
    with pytest.raises(ValueError, match=r"rule for 'log' .* got a relative difference of nan"):
        linear_form(lambda x: log(x).sum(1)[:, None], x, 0, rules={"log": Nothing()})
