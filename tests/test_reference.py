"""Every operation, frozen, against its dense matrix, Eq. (2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.testing import assert_close

from captum_scoremap import freeze
from tests import reference
from tests.reference import Affine, Array, Operation

NOISE = np.random.default_rng(0)


def noise(*shape: int) -> Array:
    return NOISE.standard_normal(shape)


def tensor(values: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


@dataclass(frozen=True)
class Case:
    """A function on one batched tensor and the dense map of one image that it must be, shape (C, *spatial)."""

    name: str
    shape: tuple[int, ...]
    function: Callable[[Tensor], Tensor]
    matrices: Operation


WEIGHT1, WEIGHT2, WEIGHT3 = noise(4, 1, 3), noise(4, 1, 3, 2), noise(2, 2, 2, 2, 2)
BIAS = noise(4)
TRANSPOSED = noise(2, 3, 3, 3)
MATRIX = noise(5, 6)
ROW = noise(6)
COLUMN = noise(4)
MEAN, VARIANCE, SCALE = noise(4), noise(4) ** 2 + 0.2, noise(4)
QUERY, KEY, VALUE = noise(6, 6), noise(6, 6), noise(4, 6)
IN_WEIGHT, IN_BIAS, OUT_WEIGHT, OUT_BIAS = noise(18, 6) / 2, noise(18), noise(6, 6), noise(6)
MASK = np.where(np.tri(4) > 0, 0.0, -np.inf)
LOCAL = noise(4, 4)
SQUEEZE = noise(4, 4)


def sigmoid(y: Array) -> Array:
    return 1 / (1 + np.exp(-y))


def of_gate(function: Callable[[Array], Array], limit: float) -> Operation:
    return lambda y: reference.gate(y, function(y), limit)


def of_tangent(function: Callable[[Array], Array], slope: Callable[[Array], Array]) -> Operation:
    return lambda y: reference.tangent(y, function(y), slope(y))


def gelu_tanh(y: Array) -> Array:
    return 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))


def linear(y: Array, weight: Array) -> Affine:
    return reference.linear(y, weight)


def multi_head(x: Tensor, need_weights: bool) -> Tensor:
    tokens = x.transpose(0, 1)
    output, _ = F.multi_head_attention_forward(
        tokens,
        tokens,
        tokens,
        6,
        2,
        tensor(IN_WEIGHT),
        tensor(IN_BIAS),
        None,
        None,
        False,
        0.0,
        tensor(OUT_WEIGHT),
        tensor(OUT_BIAS),
        training=False,
        need_weights=need_weights,
        attn_mask=tensor(MASK),
    )
    return output.transpose(0, 1)


def squeeze(x: Tensor) -> Tensor:
    return x * torch.sigmoid(F.linear(x.mean((2, 3)), tensor(SQUEEZE)))[:, :, None, None]


def squeeze_matrices(y: Array) -> Affine:
    gates = sigmoid(SQUEEZE @ y.mean((1, 2)))
    return reference.diagonal(np.broadcast_to(gates[:, None, None], y.shape))


def grouped_matrices(y: Array) -> Affine:
    return reference.group_norm(y, 2, COLUMN, BIAS, 1e-3)


CASES = [
    # affine
    Case(
        "conv1d",
        (4, 7),
        lambda x: F.conv1d(x, tensor(WEIGHT1), tensor(BIAS), 2, 1, 1, 4),
        lambda y: reference.convolution(y, WEIGHT1, BIAS, 2, 1, 1, 4),
    ),
    Case(
        "conv2d",
        (4, 6, 5),
        lambda x: F.conv2d(x, tensor(WEIGHT2), tensor(BIAS), 1, 1, 2, 4),
        lambda y: reference.convolution(y, WEIGHT2, BIAS, 1, 1, 2, 4),
    ),
    Case(
        "conv3d",
        (2, 3, 3, 4),
        lambda x: F.conv3d(x, tensor(WEIGHT3)),
        lambda y: reference.convolution(y, WEIGHT3),
    ),
    Case(
        "conv_transpose2d",
        (2, 3, 2),
        lambda x: F.conv_transpose2d(x, tensor(TRANSPOSED), tensor(BIAS[:3]), 2, 1, 1),
        lambda y: reference.transposed_convolution(y, TRANSPOSED, BIAS[:3], 2, 1, 1),
    ),
    Case(
        "linear",
        (3, 6),
        lambda x: F.linear(x, tensor(MATRIX), tensor(ROW[:5])),
        lambda y: reference.linear(y, MATRIX, ROW[:5]),
    ),
    Case(
        "batch_norm",
        (4, 3, 2),
        lambda x: F.batch_norm(x, *map(tensor, (MEAN, VARIANCE, SCALE, BIAS)), eps=1e-3),
        lambda y: reference.batch_norm(y, MEAN, VARIANCE, SCALE, BIAS, 1e-3),
    ),
    Case(
        "avg_pool2d",
        (2, 5, 4),
        lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
        lambda y: reference.average_pool(y, reference.windows(y, 3, 2, 1, ceil_mode=True), (3, 3)),
    ),
    Case(
        "adaptive_avg_pool2d",
        (2, 5, 4),
        lambda x: F.adaptive_avg_pool2d(x, (2, 3)),
        lambda y: reference.average_pool(y, reference.adaptive_windows(y, (2, 3)), (2, 3)),
    ),
    Case("mean", (2, 3, 4), lambda x: x.mean((2, 3), keepdim=True), lambda y: reference.mean(y, (1, 2))),
    *(
        Case(
            f"pad {mode}",
            (2, 3, 4),
            lambda x, mode=mode: F.pad(x, (1, 2, 2, 0), mode, *([0.5] if mode == "constant" else [])),
            lambda y, mode=mode: reference.pad(y, [(2, 0), (1, 2)], mode, 0.5),
        )
        for mode in ("constant", "reflect", "replicate", "circular")
    ),
    Case(
        "interpolate nearest",
        (2, 3, 4),
        lambda x: F.interpolate(x, (5, 3), mode="nearest"),
        lambda y: reference.interpolate(y, (5, 3), "nearest"),
    ),
    *(
        Case(
            f"interpolate {mode}, corners {align}",
            (2, 3, 4),
            lambda x, mode=mode, align=align: F.interpolate(x, (5, 3), mode=mode, align_corners=align),
            lambda y, mode=mode, align=align: reference.interpolate(y, (5, 3), mode.removeprefix("bi"), align),
        )
        for mode in ("bilinear", "bicubic")
        for align in (False, True)
    ),
    Case(
        "channel shuffle",
        (4, 2, 2),
        lambda x: F.channel_shuffle(x, 2),
        lambda y: reference.view(y, lambda i: i.reshape(2, 2, 2, 2).transpose(1, 0, 2, 3).reshape(4, 2, 2)),
    ),
    Case(
        "concat",
        (2, 2, 3),
        lambda x: torch.cat((x, 1 - x), 1),
        lambda y: reference.concat(reference.identity(y), reference.affine(y, np.array(-1.0), 1.0)),
    ),
    Case("addition", (2, 3), lambda x: x + x.flip(1), lambda y: reference.identity(y) + flipped(y)),
    Case("detach", (2, 3), lambda x: 2 * x.detach(), lambda y: reference.affine(y, np.array(2.0))),
    # masks and switches
    Case("relu", (3, 4), F.relu, reference.relu),
    Case("leaky_relu", (3, 4), lambda x: F.leaky_relu(x, 0.1), lambda y: reference.leaky_relu(y, 0.1)),
    Case(
        "prelu",
        (4, 3, 2),
        lambda x: F.prelu(x, tensor(SCALE)),
        lambda y: reference.leaky_relu(y, SCALE),
    ),
    Case("abs", (3, 4), torch.abs, lambda y: reference.leaky_relu(y, -1.0)),
    Case("relu6", (3, 4), lambda x: F.relu6(4 * x), lambda y: four_times(y, lambda z: reference.clamp(z, 0, 6))),
    Case("hardtanh", (3, 4), F.hardtanh, lambda y: reference.clamp(y, -1, 1)),
    Case("clamp", (3, 4), lambda x: x.clamp(min=-0.3), lambda y: reference.clamp(y, -0.3)),
    Case("threshold", (3, 4), lambda x: F.threshold(x, 0.2, -0.7), lambda y: reference.threshold(y, 0.2, -0.7)),
    Case(
        "max_pool2d",
        (2, 5, 6),
        lambda x: F.max_pool2d(x, 3, 2, 1),
        lambda y: reference.max_pool(y, reference.windows(y, 3, 2, 1), (3, 3)),
    ),
    Case(
        "max_pool1d, dilated",
        (2, 9),
        lambda x: F.max_pool1d(x, 2, 2, 1, 3, ceil_mode=True),
        lambda y: reference.max_pool(y, reference.windows(y, 2, 2, 1, 3, ceil_mode=True), (5,)),
    ),
    Case(
        "max_pool3d",
        (2, 3, 3, 4),
        lambda x: F.max_pool3d(x, 2, 1),
        lambda y: reference.max_pool(y, reference.windows(y, 2, 1), (2, 2, 3)),
    ),
    Case(
        "adaptive_max_pool2d",
        (2, 5, 4),
        lambda x: F.adaptive_max_pool2d(x, (2, 3)),
        lambda y: reference.max_pool(y, reference.adaptive_windows(y, (2, 3)), (2, 3)),
    ),
    Case("amax", (3, 4), lambda x: x.amax(1, keepdim=True), lambda y: reference.max_over(y, 0)),
    Case(
        "max",
        (3, 4),
        lambda x: x.max(-1, keepdim=True).values,
        lambda y: reference.max_over(y, 1),
    ),
    Case(
        "maxout",
        (4, 3),
        lambda x: x.unflatten(1, (2, 2)).amax(2),
        lambda y: maxout(y),
    ),
    Case(
        "maximum",
        (2, 3),
        lambda x: torch.maximum(x, x.flip(2)),
        lambda y: reference.maximum(y, reference.identity(y), flipped(y, 1)),
    ),
    # gates
    Case("silu", (3, 4), F.silu, of_gate(lambda y: y * sigmoid(y), 0.5)),
    Case("gelu tanh", (3, 4), lambda x: F.gelu(x, approximate="tanh"), of_gate(gelu_tanh, 0.5)),
    Case("mish", (3, 4), F.mish, of_gate(lambda y: y * np.tanh(np.log1p(np.exp(y))), 0.6)),
    Case("hardswish", (3, 4), F.hardswish, of_gate(lambda y: y * np.clip(y + 3, 0, 6) / 6, 0.5)),
    Case("tanh", (3, 4), torch.tanh, of_gate(np.tanh, 1.0)),
    Case("elu", (3, 4), lambda x: F.elu(x, 0.7), of_gate(lambda y: np.where(y > 0, y, 0.7 * np.expm1(y)), 1.0)),
    # tangents
    Case("softplus", (3, 4), F.softplus, of_tangent(lambda y: np.log1p(np.exp(y)), sigmoid)),
    Case("sigmoid", (3, 4), torch.sigmoid, of_tangent(sigmoid, lambda y: sigmoid(y) * (1 - sigmoid(y)))),
    Case("exp", (3, 4), torch.exp, of_tangent(np.exp, np.exp)),
    Case("softmax", (5,), lambda x: x.softmax(-1), reference.softmax_tangent),
    # scales
    Case(
        "layer_norm",
        (3, 6),
        lambda x: F.layer_norm(x, (6,), tensor(ROW), tensor(ROW[::-1]), 1e-3),
        lambda y: reference.layer_norm(y, ROW, ROW[::-1], 1e-3),
    ),
    Case(
        "rms_norm",
        (3, 6),
        lambda x: F.rms_norm(x, (6,), tensor(ROW), 1e-3),
        lambda y: reference.rms_norm(y, ROW, 1e-3),
    ),
    Case(
        "group_norm",
        (4, 3, 2),
        lambda x: F.group_norm(x, 2, tensor(COLUMN), tensor(BIAS), 1e-3),
        grouped_matrices,
    ),
    Case(
        "instance_norm",
        (4, 3, 2),
        lambda x: F.instance_norm(x, weight=tensor(COLUMN), bias=tensor(BIAS), eps=1e-3),
        lambda y: reference.group_norm(y, 4, COLUMN, BIAS, 1e-3),
    ),
    Case(
        "instance_norm by running statistics",
        (4, 3, 2),
        lambda x: F.instance_norm(x, *map(tensor, (MEAN, VARIANCE, SCALE, BIAS)), use_input_stats=False, eps=1e-3),
        lambda y: reference.batch_norm(y, MEAN, VARIANCE, SCALE, BIAS, 1e-3),
    ),
    Case("normalize", (4, 3), lambda x: F.normalize(x, dim=1), lambda y: reference.normalize(y, 0)),
    Case(
        "local_response_norm",
        (5, 2, 2),
        lambda x: F.local_response_norm(x, 3, 0.9, 0.6, 1.3),
        lambda y: reference.local_response_norm(y, 3, 0.9, 0.6, 1.3),
    ),
    # products and attention
    Case(
        "product",
        (3, 6),
        lambda x: x * torch.tanh(x.flip(2)),
        lambda y: reference.product(y, reference.identity(y), flipped_tanh(y)),
    ),
    Case(
        "matmul",
        (4, 4),
        lambda x: (tensor(LOCAL) @ x) @ x.transpose(1, 2),
        lambda y: reference.matrix_product(y, left_times(y), transposed(y)),
    ),
    Case("squeeze and excitation", (4, 2, 3), squeeze, squeeze_matrices),
    Case(
        "scaled_dot_product_attention",
        (4, 6),
        lambda x: F.scaled_dot_product_attention(
            F.linear(x, tensor(QUERY)), F.linear(x, tensor(KEY)), F.linear(x, tensor(VALUE)), tensor(MASK), scale=0.3
        ),
        lambda y: reference.attention(y, linear(y, QUERY), linear(y, KEY), linear(y, VALUE), 0.3, MASK),
    ),
    Case(
        "attention by hand",
        (4, 6),
        lambda x: (
            (F.linear(x, tensor(QUERY)) @ F.linear(x, tensor(KEY)).transpose(1, 2) / 6**0.5).softmax(-1)
            @ F.linear(x, tensor(VALUE))
        ),
        lambda y: reference.attention(y, linear(y, QUERY), linear(y, KEY), linear(y, VALUE)),
    ),
    *(
        Case(
            f"multi-head attention, weights {need_weights}",
            (4, 6),
            lambda x, need_weights=need_weights: multi_head(x, need_weights),
            lambda y: reference.multi_head_attention(y, 2, IN_WEIGHT, IN_BIAS, OUT_WEIGHT, OUT_BIAS, MASK),
        )
        for need_weights in (False, True)
    ),
]


def flipped(y: Array, axis: int = 0) -> Affine:
    return reference.view(y, lambda index: np.flip(index, axis))


def flipped_tanh(y: Array) -> Affine:
    return reference.chain([lambda z: flipped(z, 1), of_gate(np.tanh, 1.0)], y)


def transposed(y: Array) -> Affine:
    return reference.view(y, lambda index: index.T)


def left_times(y: Array) -> Affine:
    return reference.per_axis(y, {0: LOCAL})


def four_times(y: Array, operation: Operation) -> Affine:
    return reference.chain([lambda z: reference.affine(z, np.array(4.0)), operation], y)


def maxout(y: Array) -> Affine:
    pairs = reference.view(y, lambda index: index.reshape(2, 2, 3))
    return pairs.then(reference.max_over(pairs(y), 1)).then(
        reference.view(np.zeros((2, 1, 3)), lambda index: index.reshape(2, 3))
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_frozen_operation_is_its_dense_matrix(case: Case) -> None:
    y = np.random.default_rng(1).standard_normal(case.shape)
    expected = case.matrices(y)
    x = tensor(y)[None]
    frozen = freeze(case.function, x)
    with torch.no_grad():
        offset = frozen(torch.zeros_like(x))
        basis = torch.eye(y.size, dtype=torch.float64).view(y.size, 1, *case.shape)
        columns = [(frozen(e) - offset).flatten() for e in basis]
        value = case.function(x.clone())
    assert_close(tensor(expected(y)), value[0], rtol=1e-12, atol=1e-12)
    assert_close(frozen(x), value, rtol=1e-12, atol=1e-12)
    assert_close(torch.stack(columns, 1), tensor(expected.matrix), rtol=1e-12, atol=1e-12)
    assert_close(offset[0], tensor(expected.offset.reshape(expected.shape)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradient_of_a_frozen_operation_is_its_dense_matrix(case: Case) -> None:
    y = np.random.default_rng(1).standard_normal(case.shape)
    x = tensor(y)[None]
    frozen = freeze(case.function, x)
    for one in (x, torch.zeros_like(x)):  # the same anywhere
        jacobian = torch.autograd.functional.jacobian(frozen, one)
        assert_close(jacobian.reshape(-1, y.size), tensor(case.matrices(y).matrix), rtol=1e-12, atol=1e-12)
