"""The table of rules: whole kernels of any device take their arguments where their rules look for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from captum_scoremap import linear_form
from captum_scoremap.rules import DEFAULT, TANGENT, Call, Frozen, Linear, Rule, display_name, with_rules
from captum_scoremap.rules.attention import Attention
from captum_scoremap.rules.products import Product

# Position of an argument that a rule reads, to a part of its name.
KERNELS = {
    "native_batch_norm": {3: "running_mean", 4: "running_var", 5: "training", 7: "eps"},
    "cudnn_batch_norm": {1: "weight", 2: "bias", 3: "running_mean", 4: "running_var", 5: "training", 7: "epsilon"},
    "miopen_batch_norm": {1: "weight", 2: "bias", 3: "running_mean", 4: "running_var", 5: "training", 7: "epsilon"},
    "_native_batch_norm_legit_no_training": {1: "weight", 2: "bias", 3: "running_mean", 4: "running_var", 6: "eps"},
    "native_layer_norm": {1: "normalized_shape", 2: "weight", 3: "bias", 4: "eps"},
    "native_group_norm": {1: "weight", 2: "bias", 3: "N", 6: "group"},
    "convolution": {0: "input", 1: "weight", 2: "bias"},
    "_scaled_dot_product_flash_attention_for_cpu": {2: "value", 3: "dropout_p", 4: "is_causal"},
    "_scaled_dot_product_flash_attention": {2: "value", 3: "dropout_p", 4: "is_causal"},
    "_scaled_dot_product_efficient_attention": {2: "value", 3: "attn_bias", 5: "dropout_p", 6: "is_causal"},
    "_scaled_dot_product_cudnn_attention": {2: "value", 3: "attn_bias", 5: "dropout_p", 6: "is_causal"},
    "_scaled_dot_product_fused_attention_overrideable": {2: "value", 3: "attn_bias", 4: "dropout_p", 5: "is_causal"},
}


@pytest.mark.parametrize("name", KERNELS)
def test_rules_look_where_the_arguments_are(name: str) -> None:
    arguments = getattr(torch.ops.aten, name).default._schema.arguments
    for position, argument in KERNELS[name].items():
        assert arguments[position].name == argument
    assert name in DEFAULT


def test_every_row_is_a_rule_of_an_operation_that_exists() -> None:
    for table in (DEFAULT, TANGENT):
        assert all(isinstance(rule, Rule) for rule in table.values())
    assert set(TANGENT) <= set(DEFAULT)


def test_names_are_those_that_users_know() -> None:
    aten = torch.ops.aten
    assert display_name(aten._softmax.default) == "softmax"
    assert display_name(aten.max_pool2d_with_indices.default) == "max_pool2d"
    assert display_name(aten._scaled_dot_product_flash_attention.default) == "scaled_dot_product_attention"


@pytest.mark.parametrize("name", [name for name, rule in DEFAULT.items() if isinstance(rule, Attention)])
def test_attention_finds_its_options(name: str) -> None:
    operation = getattr(torch.ops.aten, name).default
    query, mask = torch.rand(1, 2, 4, 3), torch.zeros(1, 1, 4, 4)
    named = {"query": query, "key": query, "value": query, "attn_mask": mask, "attn_bias": mask, "scale": 2.0}
    options = {"dropout_p": 0.5, "is_causal": True}
    arguments = [one.name for one in operation._schema.arguments if not one.kwarg_only]
    call = Call(operation, tuple((named | options).get(name, False) for name in arguments), {}, (), ())
    assert [call.argument(option) for option in options] == [0.5, True]
    with pytest.raises(ValueError, match=r"must have no dropout, got 0\.5"):
        DEFAULT[name].freeze(call)


def test_arguments_go_by_their_names() -> None:
    x = torch.rand(2, 3)
    sums = torch.ops.aten.sum.dim_IntList
    for args, named in (((x, [1], True), {}), ((x,), {"dim": [1], "keepdim": True}), ((x, [1]), {"keepdim": True})):
        call = Call(sums, args, named, (x,), ())
        assert (call.argument("dim"), call.argument("keepdim")) == ([1], True)
    call = Call(sums, (x, [1]), {}, (x,), ())
    assert (call.argument("keepdim"), call.argument("dtype")) == (False, None)
    assert (call.argument("axis", "dim"), call.argument("axis", default=5)) == ([1], 5)


@pytest.mark.parametrize("name", [name for name, rule in DEFAULT.items() if type(rule) is Product])
def test_products_are_of_tensors(name: str) -> None:
    rule, packet = DEFAULT[name], getattr(torch.ops.aten, name)
    assert isinstance(rule, Product)
    arguments = getattr(packet, packet.overloads()[0])._schema.arguments
    assert all("Tensor" in str(arguments[factor].type) for factor in rule.factors)
    assert rule.term is None or arguments[rule.term].name in {"self", "bias"}


def keys_of(name: str) -> set[object]:
    """What users may call an operation, given the dispatcher's name for it."""
    namespace, _, overloaded = name.partition("::")
    plain = overloaded.partition(".")[0]
    packet = getattr(getattr(torch.ops, namespace), plain, None)
    if packet is None:  # of a library that is only there in part
        return set()
    overloads = {getattr(packet, overload) for overload in packet.overloads()}
    return {name, overloaded, plain, f"{namespace}::{plain}", display_name(plain), packet, *overloads}


def test_all_operations_may_be_named() -> None:
    rule = Linear()
    for name in torch._C._dispatch_get_all_op_names():
        for key in keys_of(name):
            assert rule in with_rules({key: rule}).values()


@pytest.mark.parametrize("name", [name for name in DEFAULT if name not in {"linear", "relu6"}])  # below
def test_names_of_the_table_name_its_rows_alone(name: str) -> None:
    rule = Linear()
    assert {key for key, one in with_rules({name: rule}).items() if one is rule} == {name}


@pytest.mark.parametrize(
    "key",
    [
        *("gelu", "aten::gelu", "gelu_", "gelu.default", "aten::gelu.out", F.gelu, torch.ops.aten.gelu),
        *(getattr(torch.ops.aten.gelu, overload) for overload in torch.ops.aten.gelu.overloads()),
        *(torch.ops.aten.gelu_, torch.ops.aten.gelu_.default),
    ],
)
def test_all_forms_of_an_operation_are_one(key: object) -> None:
    x, rule = torch.rand(1, 3, dtype=torch.float64), TANGENT["gelu"]
    for function in (F.gelu, lambda x: torch.ops.aten.gelu_(x.clone())):
        form = linear_form(function, x, 1, rules={key: rule})
        torch.testing.assert_close(form.coefficients, linear_form(function, x, 1, rules=TANGENT).coefficients)


@pytest.mark.parametrize("key", ["relu6", F.relu6, "hardtanh", F.hardtanh, "linear", F.linear])
def test_functions_stand_for_the_operations_that_they_arrive_as(key: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU6(), nn.Linear(8, 3))
    with pytest.warns(UserWarning, match="a map is zero everywhere"):
        form = linear_form(model, torch.rand(1, 4), 1, rules={key: Frozen()})
    assert_close(form.bias, form.score)
