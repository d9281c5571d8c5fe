"""The equations of the paper as dense matrices: slow, plain numpy, no autograd, no code of the package.

One operation at one image is an affine map of the flattened tensor. Eq. (2) of the paper writes a layer as

    Y_l = R_l (F_l Y_{l-1} + b_l)

with F_l the dense matrix of a convolution and R_l the diagonal (or, for pooling, the selection) that the
image chose. Here every operation, linear or frozen, is one `Affine` map  y -> G y + g; a chain of them gives

    S_c = A_{c,l} · Y_l + B_{c,l},   A_{c,l} = e_c^T G_L ... G_{l+1},                          (3)
    M_{c,l}(x, y) = sum_h A_{c,l}(x, y, h) Y_l(x, y, h)                                       (4)

with B_{c,l} the chain applied to Y_l = 0. Tensors are one image without a batch axis: (C, *spatial) for
images, (L, D) for tokens. Every operation takes the value `y` at which it is frozen first; affine ones use
its shape only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class Affine:
    """The map y -> G y + g of flattened tensors.

    Attributes:
        matrix: G, (outputs, inputs).
        offset: g, (outputs,).
        shape: shape of the output.
    """

    matrix: Array
    offset: Array
    shape: tuple[int, ...]

    def __call__(self, y: Array) -> Array:
        return (self.matrix @ y.ravel() + self.offset).reshape(self.shape)

    def then(self, after: Affine) -> Affine:
        """This map, and `after` applied to its output."""
        return Affine(after.matrix @ self.matrix, after.matrix @ self.offset + after.offset, after.shape)

    def __add__(self, other: Affine) -> Affine:
        return Affine(self.matrix + other.matrix, self.offset + other.offset, self.shape)


Operation: TypeAlias = Callable[[Array], Affine]


@dataclass(frozen=True)
class Form:
    """S = A·Y + B at one layer, Eq. (3), and the score map M, Eq. (4).

    Attributes:
        coefficients: A, shaped like the activations.
        activations: Y.
        bias: B.
        score: S.
    """

    coefficients: Array
    activations: Array
    bias: float
    score: float

    @property
    def sub_scores(self) -> Array:
        return self.coefficients * self.activations

    @property
    def score_map(self) -> Array:
        return self.sub_scores.sum(0, keepdims=True)


def forms(operations: Sequence[Operation], image: Array, label: int) -> list[Form]:
    """Eq. (3) at the image (l = 0) and behind every operation of a chain.

    Args:
        operations: the layers from the image to the scores.
        image: Y_0, (C, *spatial).
        label: index c into the flattened output of the last operation.
    """
    activations, maps = [image], []
    for operation in operations:
        maps.append(operation(activations[-1]))
        activations.append(maps[-1](activations[-1]))
    score = float(activations[-1].ravel()[label])
    row, bias = np.eye(activations[-1].size)[label], 0.0
    result = [Form(row.reshape(activations[-1].shape), activations[-1], bias, score)]
    for layer, y in zip(reversed(maps), reversed(activations[:-1]), strict=True):
        bias += float(row @ layer.offset)
        row = row @ layer.matrix
        result.append(Form(row.reshape(y.shape), y, bias, score))
    return result[::-1]


def chain(operations: Iterable[Operation], y: Array) -> Affine:
    """The operations one after the other, as one map of `y`."""
    result = identity(y)
    for operation in operations:
        result = result.then(operation(result(y)))
    return result


def concat(*branches: Affine) -> Affine:
    """Branches of the same tensor, one after the other along the first axis."""
    first = branches[0].shape
    shape = (sum(branch.shape[0] for branch in branches), *first[1:])
    return Affine(np.vstack([b.matrix for b in branches]), np.hstack([b.offset for b in branches]), shape)


# --- maps from their parts ----------------------------------------------------------------------------------


def identity(y: Array) -> Affine:
    return Affine(np.eye(y.size), np.zeros(y.size), y.shape)


def diagonal(factor: Array, offset: Array | float = 0.0) -> Affine:
    """Every element with a factor (and offset) of its own: R_l of Eq. (2)."""
    return Affine(np.diag(factor.ravel()), np.broadcast_to(offset, factor.shape).ravel().astype(float), factor.shape)


def select(y: Array, sources: Indices, fill: float = 0.0) -> Affine:
    """Output element i is input element ``sources[i]``, or the constant `fill` where that is -1."""
    matrix = np.zeros((sources.size, y.size))
    offset = np.zeros(sources.size)
    for i, source in enumerate(sources.ravel()):
        if source < 0:
            offset[i] = fill
        else:
            matrix[i, source] = 1.0
    return Affine(matrix, offset, sources.shape)


def per_axis(y: Array, matrices: dict[int, Array]) -> Affine:
    """One matrix for each axis named, the identity for the others: their Kronecker product."""
    matrix, shape = np.eye(1), []
    for axis, size in enumerate(y.shape):
        factor = matrices.get(axis, np.eye(size))
        matrix = np.kron(matrix, factor)
        shape.append(len(factor))
    return Affine(matrix, np.zeros(len(matrix)), tuple(shape))


def view(y: Array, rearrange: Callable[[Indices], Indices]) -> Affine:
    """Any rearrangement: transposing, reshaping, slicing, shuffling, flipping."""
    return select(y, rearrange(np.arange(y.size).reshape(y.shape)))


def pad(y: Array, widths: Sequence[tuple[int, int]], mode: str = "constant", value: float = 0.0) -> Affine:
    """Padding of the spatial axes; `mode` as in torch: constant, reflect, replicate, circular."""
    sources = np.arange(y.size).reshape(y.shape)
    widths = [(0, 0), *widths]
    if mode == "constant":
        return select(y, np.pad(sources, widths, constant_values=-1), value)
    names = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    return select(y, np.pad(sources, widths, mode=names[mode]))  # type: ignore[call-overload]


# --- affine layers ------------------------------------------------------------------------------------------


def linear(y: Array, weight: Array, bias: Array | None = None) -> Affine:
    """F = weight on the last axis, (..., in) -> (..., out)."""
    lead = y.shape[:-1]
    matrix = np.kron(np.eye(math.prod(lead)), weight)
    offset = np.zeros(len(weight)) if bias is None else bias
    return Affine(matrix, np.tile(offset, math.prod(lead)), (*lead, len(weight)))


def convolution(
    y: Array,
    weight: Array,
    bias: Array | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> Affine:
    """F_l of a convolution over any number of axes; weight (out, in / groups, *kernel)."""
    outputs, kernel = len(weight), weight.shape[2:]
    inside = y.shape[1:]
    size = [(n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n, k in zip(inside, kernel, strict=True)]
    shape = (outputs, *size)
    matrix = np.zeros((math.prod(shape), y.size))
    for row, (out, *at) in enumerate(np.ndindex(*shape)):
        group = out // (outputs // groups)
        for channel, *tap in np.ndindex(*weight.shape[1:]):
            position = [a * stride - padding + t * dilation for a, t in zip(at, tap, strict=True)]
            if all(0 <= p < n for p, n in zip(position, inside, strict=True)):
                source = (group * weight.shape[1] + channel, *position)
                matrix[row, np.ravel_multi_index(source, y.shape)] += weight[(out, channel, *tap)]
    offset = np.zeros(outputs) if bias is None else bias
    return Affine(matrix, np.repeat(offset, math.prod(size)), shape)


def transposed_convolution(
    y: Array,
    weight: Array,
    bias: Array | None = None,
    stride: int = 1,
    padding: int = 0,
    output_padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> Affine:
    """A convolution that writes its window instead of reading it; weight (in, out / groups, *kernel)."""
    kernel = weight.shape[2:]
    size = [
        (n - 1) * stride - 2 * padding + dilation * (k - 1) + output_padding + 1
        for n, k in zip(y.shape[1:], kernel, strict=True)
    ]
    shape = (weight.shape[1] * groups, *size)
    matrix = np.zeros((math.prod(shape), y.size))
    for column, (channel, *at) in enumerate(np.ndindex(*y.shape)):
        group = channel // (y.shape[0] // groups)
        for out, *tap in np.ndindex(*weight.shape[1:]):
            position = [a * stride - padding + t * dilation for a, t in zip(at, tap, strict=True)]
            if all(0 <= p < n for p, n in zip(position, size, strict=True)):
                target = (group * weight.shape[1] + out, *position)
                matrix[np.ravel_multi_index(target, shape), column] += weight[(channel, out, *tap)]
    offset = np.zeros(shape[0]) if bias is None else bias
    return Affine(matrix, np.repeat(offset, math.prod(size)), shape)


def batch_norm(y: Array, mean: Array, variance: Array, weight: Array, bias: Array, eps: float = 1e-5) -> Affine:
    """In evaluation mode, channel by channel: weight (y - mean) / sqrt(variance + eps) + bias."""
    column = (-1, *[1] * (y.ndim - 1))
    scale = weight / np.sqrt(variance + eps)
    shift = bias - scale * mean
    return diagonal(np.broadcast_to(scale.reshape(column), y.shape), np.broadcast_to(shift.reshape(column), y.shape))


def windows(
    y: Array, kernel: int, stride: int, padding: int = 0, dilation: int = 1, ceil_mode: bool = False
) -> Iterator[tuple[list[int], int]]:
    """Of every pooling window, row-major: its flat positions inside the image; its size with padding."""
    size = []
    for n in y.shape[1:]:
        steps = (n + 2 * padding - dilation * (kernel - 1) - 1) / stride
        count = (math.ceil(steps) if ceil_mode else math.floor(steps)) + 1
        size.append(count - 1 if ceil_mode and (count - 1) * stride >= n + padding else count)
    for channel, *at in np.ndindex(y.shape[0], *size):
        axes, padded = [], 1
        for a, n in zip(at, y.shape[1:], strict=True):
            taps = [a * stride - padding + t * dilation for t in range(kernel)]
            axes.append([t for t in taps if 0 <= t < n])
            padded *= sum(t < n + padding for t in taps)
        yield [int(np.ravel_multi_index((channel, *p), y.shape)) for p in itertools.product(*axes)], padded


def adaptive_windows(y: Array, size: Sequence[int]) -> Iterator[tuple[list[int], int]]:
    """Windows from floor(i n / size) to ceil((i + 1) n / size) along every axis."""
    for channel, *at in np.ndindex(y.shape[0], *size):
        axes = [range(a * n // s, -((a + 1) * n // -s)) for a, n, s in zip(at, y.shape[1:], size, strict=True)]
        inside = [int(np.ravel_multi_index((channel, *p), y.shape)) for p in itertools.product(*axes)]
        yield inside, len(inside)


def average_pool(y: Array, pooled: Iterable[tuple[list[int], int]], shape: Sequence[int]) -> Affine:
    """The mean of every window (padding counts as zeros)."""
    rows = []
    for inside, count in pooled:
        row = np.zeros(y.size)
        row[inside] = 1 / count
        rows.append(row)
    return Affine(np.array(rows), np.zeros(len(rows)), (y.shape[0], *shape))


def mean(y: Array, axes: Sequence[int]) -> Affine:
    """The mean over some axes, which stay with length 1."""
    return per_axis(y, {axis: np.full((1, y.shape[axis]), 1 / y.shape[axis]) for axis in axes})


def resize_axis(n: int, size: int, mode: str, align_corners: bool = False) -> Array:
    """The (size, n) matrix of interpolation along one axis: nearest, linear or cubic (a = -0.75)."""
    matrix = np.zeros((size, n))
    for i in range(size):
        if mode == "nearest":
            matrix[i, i * n // size] = 1.0
            continue
        at = i * (n - 1) / max(size - 1, 1) if align_corners else (i + 0.5) * n / size - 0.5
        if mode == "linear":
            at = max(at, 0.0)
            low = min(math.floor(at), n - 1)
            matrix[i, low] += 1 - (at - low)
            matrix[i, min(low + 1, n - 1)] += at - low
            continue
        low, a = math.floor(at), -0.75
        for tap in range(-1, 3):
            d = abs(at - (low + tap))
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[i, min(max(low + tap, 0), n - 1)] += near if d <= 1 else far if d < 2 else 0.0
    return matrix


def interpolate(y: Array, size: Sequence[int], mode: str, align_corners: bool = False) -> Affine:
    """Separable interpolation of the spatial axes."""
    return per_axis(y, {axis: resize_axis(y.shape[axis], s, mode, align_corners) for axis, s in enumerate(size, 1)})


# --- frozen at the image: masks and switches ----------------------------------------------------------------


def relu(y: Array) -> Affine:
    """R_l: 1 where the ReLU is open."""
    return diagonal((y > 0).astype(float))


def leaky_relu(y: Array, slope: Array | float) -> Affine:
    """Slope 1 above zero, `slope` (a number, or one a channel) below: leaky_relu, prelu; abs by -1."""
    column = np.reshape(slope, (-1, *[1] * (y.ndim - 1))) if np.ndim(slope) else slope
    return diagonal(np.where(y > 0, 1.0, column))


def clamp(y: Array, low: float = -math.inf, high: float = math.inf) -> Affine:
    """Slope 1 inside; the bound itself, as an offset, outside: relu6, hardtanh, clamp."""
    inside = (y > low) & (y < high)
    return diagonal(inside.astype(float), np.where(inside, 0.0, np.clip(y, low, high)))


def threshold(y: Array, limit: float, value: float) -> Affine:
    """Slope 1 above the limit, the constant `value` elsewhere."""
    return diagonal((y > limit).astype(float), np.where(y > limit, 0.0, value))


def max_pool(y: Array, pooled: Iterable[tuple[list[int], int]], shape: Sequence[int]) -> Affine:
    """R_l of max-pooling: every window selects the (first) position of its maximum, the switch."""
    flat = y.ravel()
    sources = [inside[int(np.argmax(flat[inside]))] for inside, _ in pooled]
    return select(y, np.array(sources).reshape(y.shape[0], *shape))


def max_over(y: Array, axis: int) -> Affine:
    """The maximum over one axis (max, amax, maxout), which stays with length 1."""
    sources = np.arange(y.size).reshape(y.shape)
    return select(y, np.take_along_axis(sources, y.argmax(axis, keepdims=True), axis))


def maximum(y: Array, first: Affine, second: Affine) -> Affine:
    """The larger of two branches of `y`, element by element."""
    takes_first = (first(y) > second(y)).astype(float)
    return first.then(diagonal(takes_first)) + second.then(diagonal(1 - takes_first))


# --- frozen at the image: gates, tangents, scales -----------------------------------------------------------


def gate(y: Array, value: Array, limit: float) -> Affine:
    """The gate f(y) / y of a function with f(0) = 0; `limit` is f'(0), the gate's limit at 0."""
    safe = np.where(y == 0, 1.0, y)
    return diagonal(np.where(y == 0, limit, value / safe))


def tangent(y: Array, value: Array, slope: Array) -> Affine:
    """The tangent of f at y: f'(y) x + (f(y) - f'(y) y)."""
    return diagonal(slope, value - slope * y)


def softmax(y: Array, axis: int = -1) -> Array:
    """The value of softmax (no map)."""
    powers = np.exp(y - y.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def softmax_tangent(y: Array) -> Affine:
    """Softmax over all of a one-dimensional y by its tangent: J = diag(p) - p p^T, offset p - J y."""
    p = softmax(y)
    jacobian = np.diag(p) - np.outer(p, p)
    return Affine(jacobian, p - jacobian @ y, y.shape)


def _group_matrix(y: Array, groups: Indices) -> Array:
    """The projection that replaces every element by the mean over its group."""
    same = groups.ravel()[:, None] == groups.ravel()[None, :]
    return same / same.sum(1, keepdims=True)


def normalization(y: Array, groups: Indices, eps: float, center: bool = True) -> Affine:
    """Scale 1 / std (or 1 / root mean square) frozen, group by group: x -> scale (x - mean(x)).

    Args:
        y: the value at which the scale is frozen.
        groups: the number of the group of each element of y: groups of channels for group_norm, single
            channels for instance_norm, tokens for layer_norm and rms_norm.
        eps: added to the variance (or mean square).
        center: whether the mean is taken away (not for rms_norm).
    """
    average = _group_matrix(y, groups)
    flat = y.ravel()
    centered = np.eye(y.size) - average if center else np.eye(y.size)
    variance = average @ (centered @ flat) ** 2
    return Affine(centered / np.sqrt(variance + eps)[:, None], np.zeros(y.size), y.shape)


def affine(y: Array, weight: Array, bias: Array | float = 0.0) -> Affine:
    """Element-wise weight and bias, broadcast to y."""
    return diagonal(np.broadcast_to(weight, y.shape).astype(float), np.broadcast_to(bias, y.shape))


def layer_norm(y: Array, weight: Array, bias: Array, eps: float = 1e-5) -> Affine:
    """Over the last axis."""
    groups = np.broadcast_to(np.arange(y[..., 0].size).reshape(*y.shape[:-1], 1), y.shape)
    return normalization(y, groups, eps).then(affine(y, weight, bias))


def rms_norm(y: Array, weight: Array, eps: float) -> Affine:
    """Over the last axis, about zero."""
    groups = np.broadcast_to(np.arange(y[..., 0].size).reshape(*y.shape[:-1], 1), y.shape)
    return normalization(y, groups, eps, center=False).then(affine(y, weight))


def group_norm(y: Array, groups: int, weight: Array, bias: Array, eps: float = 1e-5) -> Affine:
    """Over groups of channels; instance_norm is one group a channel."""
    column = (-1, *[1] * (y.ndim - 1))
    index = np.broadcast_to((np.arange(len(y)) // (len(y) // groups)).reshape(column), y.shape)
    return normalization(y, index, eps).then(affine(y, weight.reshape(column), bias.reshape(column)))


def normalize(y: Array, axis: int, eps: float = 1e-12) -> Affine:
    """Division by max(|y|, eps) along one axis, the norm frozen."""
    norm = np.maximum(np.sqrt((y**2).sum(axis, keepdims=True)), eps)
    return diagonal(np.broadcast_to(1 / norm, y.shape))


def local_response_norm(y: Array, size: int, alpha: float, beta: float, k: float) -> Affine:
    """Division by (k + alpha / size * sum of squares over `size` channels nearby)^beta, frozen."""
    total = np.zeros_like(y)
    for channel in range(len(y)):
        near = range(max(channel - size // 2, 0), min(channel + (size - 1) // 2 + 1, len(y)))
        total[channel] = sum(y[c] ** 2 for c in near)
    return diagonal((k + alpha * total / size) ** -beta)


# --- frozen at the image: products and attention ------------------------------------------------------------


def product(y: Array, first: Affine, second: Affine) -> Affine:
    """Two branches multiplied, half and half: ½(b̄ a(y) + ā b(y))."""
    half = diagonal(second(y) / 2), diagonal(first(y) / 2)
    return first.then(half[0]) + second.then(half[1])


def matrix_product(y: Array, first: Affine, second: Affine) -> Affine:
    """Two branches (I, J) and (J, K) as matrices multiplied, half and half."""
    left, right = first(y), second(y)
    shape = (left.shape[0], right.shape[1])
    of_first = Affine(np.kron(np.eye(shape[0]), right.T) / 2, np.zeros(math.prod(shape)), shape)
    of_second = Affine(np.kron(left, np.eye(shape[1])) / 2, np.zeros(math.prod(shape)), shape)
    return first.then(of_first) + second.then(of_second)


def weighted(weights: Array, values: Affine) -> Affine:
    """Frozen attention weights (L, T) times values (T, D)."""
    shape = (len(weights), values.shape[1])
    return values.then(
        Affine(np.kron(weights, np.eye(shape[1])), np.zeros(math.prod(shape)), shape)  # the weights are constants
    )


def attention(
    y: Array, query: Affine, key: Affine, value: Affine, scale: float | None = None, mask: Array | float = 0.0
) -> Affine:
    """softmax(scale q k^T + mask) v with the weights frozen; branches (L, D), (T, D), (T, E) of y."""
    q, k = query(y), key(y)
    scale = 1 / math.sqrt(q.shape[1]) if scale is None else scale
    return weighted(softmax(scale * q @ k.T + mask), value)


def multi_head_attention(
    y: Array,
    heads: int,
    in_weight: Array,
    in_bias: Array,
    out_weight: Array,
    out_bias: Array,
    mask: Array | float = 0.0,
) -> Affine:
    """Self-attention of tokens (L, D): projection, an attention per head on D / heads columns, projection."""
    length, width = y.shape
    projected = linear(y, in_weight, in_bias)
    each = width // heads

    def columns(start: int) -> Affine:
        return projected.then(view(projected(y), lambda index: index[:, start : start + each]))

    parts = [
        attention(y, columns(h * each), columns(width + h * each), columns(2 * width + h * each), mask=mask)
        for h in range(heads)
    ]
    stacked = concat(*parts)  # heads one below the other, (heads * L, D / heads)
    order = np.arange(stacked.matrix.shape[0]).reshape(heads, length, each).transpose(1, 0, 2).reshape(length, width)
    merged = stacked.then(select(stacked(y), order))
    return merged.then(linear(merged(y), out_weight, out_bias))
