"""Changes in place: a model that writes into its tensors gives the form of one that does not."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close

from captum_scoremap import LayerScoreMap, bias_terms, freeze, linear_form
from captum_scoremap.rules import Call, Gate, Tangent, with_rules
from captum_scoremap.tape import Recording
from captum_scoremap.tape.geometry import are_apart, fills, geometry, overlaps
from tests.between import assert_as_plain, assert_exact, assert_is_gradient, between, some_images
from tests.state import untouched

Function = Callable[[Tensor, Tensor], Tensor]
CHANGES: dict[str, Function] = {}
EXACT = {"rtol": 1e-12, "atol": 1e-13}


def change(function: Function) -> Function:
    """Register a function of features y (2, 4, 6, 6), live, and constants c of the same shape; it may change both."""
    CHANGES[function.__name__] = function
    return function


# --- whole tensors ------------------------------------------------------------------------------------


@change
def constants_beside_live_ones(y: Tensor, c: Tensor) -> Tensor:
    memory = c.clone()
    memory[:, :2].copy_(y[:, :2])
    memory[:, 2:].relu_()
    return memory


@change
def constants_that_were_beside_live_ones_before(y: Tensor, c: Tensor) -> Tensor:
    memory, rest = c.clone(), c[:, :1] + 1
    early = memory[:, 3:]
    memory[:, 1:3].add_(y[:, 1:3])
    first = 2 * memory
    early.mul_(rest)
    memory[:, :1] = rest
    early[:, :, ::2].fill_(0.5)
    return first + memory + memory.flip(1)


@change
def constants_that_were_read_before_all_of_their_memory_changed(y: Tensor, c: Tensor) -> Tensor:
    memory = c.clone()
    constant = memory[:, 2:]
    memory[:, :2].copy_(y[:, :2])
    read = torch.cat([constant, y[:, :2]], 1) + (y - constant[:, :1])
    memory.mul_(2.0)
    return read + memory


@change
def constants_of_all_the_memory(y: Tensor, c: Tensor) -> Tensor:
    memory = c.clone()
    memory[:, :2].copy_(y[:, :2])
    other = 3 * memory
    memory.copy_(c)
    memory[:, 2:].mul_(0.5)
    return other + memory + y


@change
def relu(y: Tensor, c: Tensor) -> Tensor:
    return y.relu_()


@change
def read_before(y: Tensor, c: Tensor) -> Tensor:
    other = 2 * y
    return y.relu_() + other


@change
def product_with_what_changes_later(y: Tensor, c: Tensor) -> Tensor:
    gate = y.sigmoid()
    other = y * gate
    gate.mul_(3.0)
    y.add_(c)
    return other + y * gate


@change
def several_versions(y: Tensor, c: Tensor) -> Tensor:
    versions = [y * 1]
    for step in range(4):
        y.add_(c, alpha=step).relu_().mul_(0.9)
        versions.append(y * (step + 1))
    return torch.stack(versions).sum(0) + y


@change
def clamped_after_reading(y: Tensor, c: Tensor) -> Tensor:
    y.relu_()
    other = y * 3
    return F.hardtanh_(y, 0.0, 0.1) + other


@change
def filled_with_a_constant(y: Tensor, c: Tensor) -> Tensor:
    other = y * 2
    y.fill_(0.5)
    return y * c + other


@change
def copied_onto_itself(y: Tensor, c: Tensor) -> Tensor:
    y[:, :] += c
    y.copy_(y)
    return y * 3


@change
def overwritten_by_constants(y: Tensor, c: Tensor) -> Tensor:
    other = y.clone()
    y.copy_(c)
    return y + other


@change
def copied_into_itself_flipped(y: Tensor, c: Tensor) -> Tensor:
    y.copy_(y.flip(2))
    return y.relu()


@change
def masked_fill(y: Tensor, c: Tensor) -> Tensor:
    return y.masked_fill_(c > 0, 0.25)


# --- views --------------------------------------------------------------------------------------------


@change
def through_a_slice(y: Tensor, c: Tensor) -> Tensor:
    y[:, 1:3].mul_(2.0).add_(c[:, 1:3])
    return y


@change
def through_overlapping_slices(y: Tensor, c: Tensor) -> Tensor:
    y[:, :3].relu_()
    y[:, 1:].sub_(c[:, 1:])
    y[..., ::2].mul_(-1.0)
    return y


@change
def through_a_transposed_view(y: Tensor, c: Tensor) -> Tensor:
    y.transpose(1, 3)[:, 2:5].add_(c.transpose(1, 3)[:, 2:5]).relu_()
    return y


@change
def through_a_permuted_view_of_all(y: Tensor, c: Tensor) -> Tensor:
    y.permute(2, 0, 3, 1).mul_(c.permute(2, 0, 3, 1))
    return y


@change
def through_a_strided_view(y: Tensor, c: Tensor) -> Tensor:
    y.as_strided((2, 3, 5), (144, 37, 7), 2).relu_().add_(1.0)
    return y


@change
def through_a_diagonal(y: Tensor, c: Tensor) -> Tensor:
    y.diagonal(0, 2, 3).copy_(c.diagonal(0, 2, 3) * y.amax(3))
    return y


@change
def through_a_reshaped_view(y: Tensor, c: Tensor) -> Tensor:
    pairs = y.view(2, 2, 2, 6, 6)
    pairs[:, 0].relu_()
    pairs[:, 1].mul_(pairs[:, 0].sigmoid())
    return y


@change
def through_unbound_parts(y: Tensor, c: Tensor) -> Tensor:
    with torch.no_grad():  # autograd forbids it, the model's numbers do not
        first, *_, last = y.unbind(1)
        first.add_(last)
        last.mul_(first)
    return y


@change
def views_read_after_their_base_changed(y: Tensor, c: Tensor) -> Tensor:
    part, turned, row = y[:, 1], y.transpose(2, 3), y.flatten(2)
    y.relu_()
    y[:, :2].add_(c[:, :2])
    return part.sum(1)[:, None, :, None] + turned * c + row.view_as(y)


@change
def a_view_read_after_another_changed(y: Tensor, c: Tensor) -> Tensor:
    left, right = y[:, :3], y[:, 1:]
    left.relu_()
    right.mul_(c[:, 1:])
    return left.repeat(1, 2, 1, 1)[:, :4] + y


@change
def a_view_of_a_view_of_what_changed(y: Tensor, c: Tensor) -> Tensor:
    y[:, 1:].relu_()
    view = y[:, 1:][:, :, 2:]
    view[..., 0].zero_()
    return torch.cat([view, c[:, :3, :2]], 2).sum(1, keepdim=True) + y


@change
def a_detached_view(y: Tensor, c: Tensor) -> Tensor:
    with torch.no_grad():
        y.detach()[:, 0].relu_()
    return y


@change
def expanded_rows_read_after_a_change(y: Tensor, c: Tensor) -> Tensor:
    row = y[:, :, :1]
    spread = row.expand(-1, -1, 6, -1)
    row.relu_()
    return spread * c + y


@change
def channels_last_in_place(y: Tensor, c: Tensor) -> Tensor:
    y = y.contiguous(memory_format=torch.channels_last)
    y[:, 1].relu_()
    y.add_(c)
    return y


@change
def elements_in_the_order_of_memory(y: Tensor, c: Tensor) -> Tensor:
    y = y.transpose(1, 3).relu()  # dense, but not in order
    y[0].mul_(2.0)
    return y.transpose(1, 3)


# --- indices, out=, constants -------------------------------------------------------------------------


@change
def index_put(y: Tensor, c: Tensor) -> Tensor:
    rows, columns = torch.tensor([0, 1, 1]), torch.tensor([3, 0, 2])
    y.index_put_((rows, columns), c[rows, columns] * y[columns % 2, rows])
    y.index_put_((rows, columns), y[rows, columns].relu(), accumulate=True)
    return y


@change
def index_add_and_copy(y: Tensor, c: Tensor) -> Tensor:
    index = torch.tensor([2, 0])
    y.index_add_(1, index, y[:, :2] * c[:, :2])
    y.index_copy_(2, index, c[:, :, :2])
    return y


@change
def masked_assignment(y: Tensor, c: Tensor) -> Tensor:
    y[y < 0] = 0
    y[c > 0.5] = -0.3
    return y


@change
def scattered_in_place(y: Tensor, c: Tensor) -> Tensor:
    index = torch.zeros(2, 4, 3, 6, dtype=torch.long)
    y.scatter_(2, index[:, :, :1] + 2, y[:, :, 4:5] * c[:, :, :1])
    return y.scatter_add_(2, index, y[:, :, :3].relu())


@change
def a_constant_becomes_live(y: Tensor, c: Tensor) -> Tensor:
    out = torch.zeros_like(c)
    before = out + c
    out[:, :, ::2] = y[:, :, ::2]
    out[:, :, 1::2] = y[:, :, 1::2].relu()
    return out * c + before


@change
def a_constant_becomes_live_whole(y: Tensor, c: Tensor) -> Tensor:
    out = torch.empty_like(y)
    view = out[:, 1:]
    out.copy_(y)
    view.relu_()
    return out


@change
def a_view_of_a_constant_taken_before_it_became_live(y: Tensor, c: Tensor) -> Tensor:
    out = c.clone()
    view = out[:, 2:]
    out.add_(y)
    return torch.cat([view, view.relu()], 1) + out


@change
def a_constant_changed_after_a_step_used_it(y: Tensor, c: Tensor) -> Tensor:
    weight = c.clone()
    first = y * weight
    weight.mul_(3.0)
    second = y * weight
    weight[:, 1].zero_()
    return first + second * weight


@change
def a_constant_in_a_list_changed_after_a_step_used_it(y: Tensor, c: Tensor) -> Tensor:
    other = c.clone()
    joined = torch.cat([y, other], 1)
    other.zero_()
    return joined[:, 2:6] + other


@change
def a_live_tensor_becomes_constant_in_part(y: Tensor, c: Tensor) -> Tensor:
    y[:, :2] = c[:, :2]
    y[:, 1:3].relu_()
    y[:, 3].zero_()
    return y


@change
def a_buffer_used_again(y: Tensor, c: Tensor) -> Tensor:
    buffer, total = torch.zeros_like(c[:, 0]), torch.zeros_like(c)
    for channel in range(4):
        buffer.copy_(y[:, channel])
        buffer.relu_()
        total[:, channel] = buffer * c[:, channel]
        buffer.zero_()
    return total + buffer[:, None]


@change
def running_sum(y: Tensor, c: Tensor) -> Tensor:
    total = y.new_zeros(())
    for channel in range(4):
        total = total + y[:, channel]
        total *= 0.5
    return total[:, None] * c


@change
def a_mask_of_what_changes(y: Tensor, c: Tensor) -> Tensor:
    mask = y > 0
    y.neg_()
    return torch.where(mask, y, c)


@change
def pooled_before_a_change(y: Tensor, c: Tensor) -> Tensor:
    most, where = F.max_pool2d(y, 2, return_indices=True)
    y.zero_()
    return F.max_unpool2d(most, where, 2) + y


@change
def a_frozen_scale_of_what_changes(y: Tensor, c: Tensor) -> Tensor:
    normed = F.layer_norm(y, (6, 6))
    gated = F.silu(y)
    scaled = y / y.square().mean((1, 2, 3), keepdim=True).sqrt()
    y.mul_(0.0)
    return normed + gated + scaled + y


@change
def a_gate_changed_in_place(y: Tensor, c: Tensor) -> Tensor:
    gate = y.mean((2, 3), keepdim=True).sigmoid()
    gate.mul_(2.0).clamp_(max=1.1)
    return y.mul_(gate)


# a gate, a scale or the other factor is frozen, or something is detached
NOT_FOR_AUTOGRAD = {
    "product_with_what_changes_later",
    "through_a_reshaped_view",
    "through_unbound_parts",
    "a_detached_view",
    "a_frozen_scale_of_what_changes",
    "a_gate_changed_in_place",
    # PyTorch's own derivative of as_strided_scatter is not that of finite differences
    "through_a_strided_view",
}


class Changing(nn.Module):
    """A convolution, a function of its output that changes things in place, and a weighted mean."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.function = function
        for name, shape in {"constants": (2, 4, 6, 6), "weights": (4, 6, 6)}.items():
            self.register_buffer(name, torch.randn(shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return (self.function(self.conv(x), self.constants) * self.weights).sum((2, 3))


def built(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = Changing(CHANGES[name]).double().eval()
    return model, torch.randn(2, 3, 6, 6, dtype=torch.float64)


def copied(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """What ``copy`` returns, in operations that autograd knows."""
    return source.expand(target.shape).clone()


def without_changes(model: nn.Module, image: Tensor) -> Callable[[Tensor], Tensor]:
    """The same computation without changes in place, as PyTorch itself writes it."""

    def function(x: Tensor, constants: Tensor, ones: Tensor) -> Tensor:
        # functionalize wraps what is made of its arguments only
        y = F.conv2d(x, model.conv.weight * ones, model.conv.bias * ones[:, 0, 0, 0], padding=1)
        return (model.function(y, constants) * model.weights).sum((2, 3))

    constants = model.constants, torch.ones_like(model.conv.weight)
    with torch.no_grad():
        graph = make_fx(torch.func.functionalize(function), {torch.ops.aten.copy.default: copied})(image, *constants)
    return lambda x: graph(x, *constants)


@pytest.mark.parametrize("name", CHANGES)
def test_changes_in_place_give_the_form_of_the_model_without_them(name: str) -> None:
    model, image = built(name)
    with torch.no_grad():
        scores, pure = model(image), without_changes(model, image)
        assert_close(pure(image), scores, **EXACT)
    with untouched(model, image):
        form = linear_form(model, image, 1)
        at_layer, score_map = linear_form(model, image, 1, model.conv), LayerScoreMap(model, model.conv)
        terms = bias_terms(model, image, 1)
        frozen = freeze(model, image)
        every = score_map.attribute_targets(image)
    expected = linear_form(pure, image, 1)
    assert_close(form.score, scores[:, 1], **EXACT)
    for field in ("coefficients", "bias", "sums"):
        assert_close(getattr(form, field), getattr(expected, field), **EXACT)
    for one in (form, at_layer):
        assert_close(one.residual, torch.zeros(2, dtype=torch.float64), **EXACT)
    with torch.no_grad():
        assert_close(at_layer.activations, model.conv(image), **EXACT)
        assert_close(frozen(image), scores, **EXACT)
        assert_close(frozen(torch.zeros_like(image))[:, 1], form.bias, **EXACT)
    assert_close(sum(terms.values()), form.bias, **EXACT)
    assert_close(score_map.attribute(image, 1), at_layer.score_map(), **EXACT)
    assert_close(every[:, 1:2], at_layer.score_map(), **EXACT)


@pytest.mark.parametrize("name", sorted(CHANGES.keys() - NOT_FOR_AUTOGRAD))
def test_piecewise_linear_changes_in_place_have_the_gradient(name: str) -> None:
    model, image = built(name)
    leaf = image.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(without_changes(model, image)(leaf)[:, 1].sum(), leaf)
    assert_close(linear_form(model, image, 1).coefficients, gradient, **EXACT)


def test_what_a_layer_gave_is_kept_as_it_was_before_the_change() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 3)).double().eval()
    image = torch.randn(1, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model[0](image)
    form = linear_form(model, image, 1, model[0])
    assert (expected < 0).any()
    assert_close(form.activations, expected, rtol=0, atol=0)


def test_output_written_where_the_caller_says() -> None:
    weight = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def function(x: Tensor) -> Tensor:
        out, total = torch.ones(len(x), 4, dtype=x.dtype), torch.zeros(len(x), 6, dtype=x.dtype)
        first = out * 2
        torch.matmul(x, weight.t(), out=out)
        torch.mul(out, 2.0, out=total[:, 1:5])
        torch.add(total[:, :4], out, out=out)
        return first + out + total[:, 2:]

    image = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    form = linear_form(function, image, 1)
    ones = torch.zeros(4, 4, dtype=torch.float64)
    # total = [0, 2 out, 0]: out + total[:, :4], and total[:, 2:]
    matrix = torch.eye(4, dtype=torch.float64) + 2 * (torch.diag_embed(torch.ones(3, dtype=torch.float64), -1) + ones)
    matrix = matrix + 2 * torch.diag_embed(torch.ones(3, dtype=torch.float64), 1)
    assert_close(form.coefficients, (matrix @ weight)[1].expand(2, 3), **EXACT)
    assert_close(form.bias, torch.full((2,), 2.0, dtype=torch.float64), **EXACT)
    assert_close(form.score, function(image)[:, 1], **EXACT)


def random_part(x: Tensor, fill: Callable[[Tensor], object]) -> Tensor:
    torch.manual_seed(0)
    changed = 1 * x
    fill(changed[:, :2])
    return changed + x


FILLS: dict[str, Callable[[Tensor], object]] = {
    "bernoulli_": lambda part: part.bernoulli_(0.5),
    "bernoulli_ by default": lambda part: part.bernoulli_(),
    "bernoulli_ of a tensor": lambda part: part.bernoulli_(torch.full((4, 4), 0.5)),
    "uniform_": lambda part: part.uniform_(-1, 1),
    "normal_": lambda part: part.normal_(),
    "exponential_": lambda part: part.exponential_(),
    "random_": lambda part: part.random_(3),
    "cauchy_": lambda part: part.cauchy_(),
    "log_normal_": lambda part: part.log_normal_(),
    "geometric_": lambda part: part.geometric_(0.5),
    "zero_": lambda part: part.zero_(),
    "fill_": lambda part: part.fill_(2.0),
}


@pytest.mark.parametrize("name", FILLS)
def test_what_fills_part_of_a_live_tensor_is_a_constant(name: str) -> None:
    """The numbers are those that the plain model draws."""
    assert_is_gradient(lambda x: random_part(x, FILLS[name]))


PAIRS: dict[str, Callable[..., object]] = {
    "max": lambda x, **out: torch.max(x, 1, keepdim=True, **out),
    "min": lambda x, **out: torch.min(x, 1, keepdim=True, **out),
    "sort": lambda x, **out: torch.sort(x, 1, **out),
    "topk": lambda x, **out: torch.topk(x, 2, 1, **out),
    "kthvalue": lambda x, **out: torch.kthvalue(x, 2, 1, keepdim=True, **out),
    "cummax": lambda x, **out: torch.cummax(x, 1, **out),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_outputs_are_written_where_the_caller_says(name: str) -> None:
    def function(x: Tensor) -> Tensor:
        values, indices = torch.empty(0, dtype=x.dtype), torch.empty(0, dtype=torch.long)
        PAIRS[name](x, out=(values, indices))
        return x + values.sum(1, keepdim=True) + x.gather(1, indices).mean(1, keepdim=True)

    def plain(x: Tensor) -> Tensor:
        values, indices = PAIRS[name](x)
        return x + values.sum(1, keepdim=True) + x.gather(1, indices).mean(1, keepdim=True)

    assert_as_plain(function, plain)


def test_pairs_of_outputs_may_be_parts_of_live_memory() -> None:
    def function(x: Tensor) -> Tensor:
        out, indices = 2 * x, torch.zeros(2, 4, 4, 4, dtype=torch.long)
        torch.topk(x, 2, 1, out=(out[:, 1:3], indices[:, :2]))
        return out + x.gather(1, indices)

    def plain(x: Tensor) -> Tensor:
        values, places = x.topk(2, 1)
        padded = torch.cat([places, torch.zeros_like(places)], 1)
        return torch.cat([2 * x[:, :1], values, 2 * x[:, 3:]], 1) + x.gather(1, padded)

    assert_as_plain(function, plain)


def test_constants_written_into_live_memory_cut_it() -> None:
    def function(x: Tensor) -> Tensor:
        out = 2 * x
        torch.mul(torch.ones(2, 2, 4, 4, dtype=x.dtype), 3.0, out=out[:, 1:3])
        return out

    kept = torch.tensor([1, 0, 0, 1], dtype=torch.float64)[:, None, None]
    assert_as_plain(function, lambda x: 2 * x * kept + 3 * (1 - kept))


def restrided(x: Tensor) -> Tensor:
    part = x[:, 1:3]
    part.as_strided_((2, 2, 4, 4), (64, 16, 4, 1), 0)  # of what lies before it
    part.mul_(3.0)
    return x


RESHAPED: dict[str, Callable[[Tensor], Tensor]] = {
    "as_strided_ of a part": restrided,
    "as_strided_": lambda x: x.as_strided_((2, 4, 4, 4), (64, 16, 1, 4)).mul_(x.relu()),
    "t_": lambda x: x.view(2, 64).t_().mul_(2.0).t_().view(2, 4, 4, 4),
    "transpose_ of a part": lambda x: (x[:, 1:].transpose_(2, 3)[:, :, 0].mul_(2.0), x)[1],
    "squeeze_, unsqueeze_": lambda x: (x[:1].squeeze_().unsqueeze_(1)[:, :, 0].mul_(2.0), x)[1],
    "detach_": lambda x: x.detach_().mul_(2.0),
}


@pytest.mark.parametrize("name", RESHAPED)
def test_tensors_that_change_their_shape_in_place_go_on_as_views(name: str) -> None:
    model, images = between(lambda x: RESHAPED[name](1 * x)), some_images()
    assert_exact(model, model.conv, images)


def test_a_strided_view_of_another_changes_what_both_are_of() -> None:
    """Which PyTorch's own derivative has otherwise."""
    chosen = torch.zeros(128, dtype=torch.bool)
    chosen[[1, 8, 15, 65, 72, 79]] = True

    def function(x: Tensor) -> Tensor:
        y = 1 * x
        y.as_strided((3, 4), (11, 5), 2).as_strided((2, 3), (64, 7), 1).relu_()
        return y

    assert_as_plain(function, lambda x: torch.where(chosen.view(2, 4, 4, 4), x.relu(), x))


def test_a_strided_view_of_a_tensor_with_gaps_changes_it() -> None:
    chosen = torch.zeros(2, 4, 4, 4)
    chosen[0, 0, :2, 1] = chosen[1, 0, :2, 1] = 1.0

    def function(x: Tensor) -> Tensor:
        y = torch.empty_strided((2, 4, 4, 4), (128, 32, 8, 1), dtype=x.dtype)
        y.copy_(x)
        part = y.as_strided((2, 2), (128, 8), 1)
        part.as_strided((2, 2), (8, 128), 1).mul_(3.0)
        return y * 1

    assert_as_plain(function, lambda x: x * (1 + 2 * chosen))


def squared_before(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A square of live values, whose factors then change their shape in place, and back."""

    def function(x: Tensor) -> Tensor:
        row = (1 * x).view(2, 1, 64)
        square = row * row
        return (square + change(row).reshape(2, 1, 64)).view(2, 4, 4, 4)

    return function


def copied_before(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A constant that live values are copied to, and that then changes its shape in place."""

    def function(x: Tensor) -> Tensor:
        row = torch.zeros(2, 1, 64, dtype=x.dtype)
        row.copy_(x.view(2, 1, 64))
        return 2 * change(row).reshape(2, 4, 4, 4)

    return function


IN_ANOTHER_SHAPE: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose_": lambda row: row.transpose_(1, 2),
    "squeeze_": lambda row: row.squeeze_(1),
    "unsqueeze_": lambda row: row.unsqueeze_(0),
    "swapaxes_": lambda row: row.swapaxes_(1, 2),
    "as_strided_": lambda row: row.as_strided_((2, 64), (64, 1)),
}


@pytest.mark.parametrize("before", [squared_before, copied_before])
@pytest.mark.parametrize("name", IN_ANOTHER_SHAPE)
def test_steps_refer_to_tensors_in_the_shape_that_they_had(
    name: str, before: Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]
) -> None:
    assert_as_plain(before(IN_ANOTHER_SHAPE[name]), before(lambda row: row))
    model, images = between(before(IN_ANOTHER_SHAPE[name])), some_images()
    assert_close(freeze(model, images)(images), model(images), **EXACT)


@pytest.mark.parametrize("name", ["squeeze_", "unsqueeze_"])
def test_a_layers_output_may_change_its_shape_in_place(name: str) -> None:
    function = IN_ANOTHER_SHAPE[name]
    model = nn.Sequential(nn.Conv2d(3, 1, 3), ChangesShape(function), nn.Flatten(), nn.Linear(16, 3)).double().eval()
    layer, images = model[0], some_images()
    one = LayerScoreMap(model, layer).attribute(images, 1)
    assert_close(LayerScoreMap(model, layer).attribute_targets(images)[:, 1:2], one, **EXACT)
    assert_close(linear_form(model, images, 1, layer).residual, torch.zeros(2, dtype=images.dtype), **EXACT)


class ChangesShape(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x).reshape(2, 16)


def test_an_operation_in_place_that_would_change_a_shape_is_refused() -> None:
    add = lambda x: torch.ones(1, dtype=x.dtype).addbmm_(x[:, 0], x[:, 1])  # noqa: E731
    model = between(lambda x: x + add(x).sum())
    with pytest.raises(ValueError, match=r"\(1,\) that becomes \(4, 4\) in addbmm_. Use torch.addbmm"):
        linear_form(model, some_images(), 1)


@pytest.mark.parametrize("change", [Tensor.relu_, Tensor.abs_, lambda one: one.clamp_(-0.5, 0.5), Tensor.tril_])
@pytest.mark.parametrize("window", [lambda x: x.unfold(1, 2, 1), lambda x: x.as_strided((2, 3, 2), (64, 1, 1))])
def test_changes_of_elements_that_overlap_are_refused(
    window: Callable[[Tensor], Tensor], change: Callable[[Tensor], Tensor]
) -> None:
    def function(x: Tensor) -> Tensor:
        y = 1 * x
        change(window(y))
        return y

    with pytest.raises(ValueError, match=r"elements that change in place must lie apart in memory.*x.clone\(\)"):
        linear_form(between(function), some_images(), 1)


@pytest.mark.parametrize(
    ("window", "is_overlapping"),
    [
        (lambda x: x, False),
        (lambda x: x.transpose(0, 2)[:, ::2], False),
        (lambda x: x.unfold(1, 2, 2), False),
        (lambda x: x.unfold(1, 2, 1), True),
        (lambda x: x.expand(3, 4, 4, 4), True),
        (lambda x: x[:1].expand(4, 4, 4), True),
        (lambda x: x[:0], False),
        (lambda x: x.view(-1).as_strided((3, 2), (2, 3)), False),  # 0 3, 2 5, 4 7: interleaved, and apart
        (lambda x: x.view(-1).as_strided((4, 2), (2, 3)), False),
        (lambda x: x.view(-1).as_strided((4, 2), (1, 3)), True),
    ],
)
def test_elements_that_overlap(window: Callable[[Tensor], Tensor], is_overlapping: bool) -> None:
    one = window(torch.zeros(4, 4, 4))
    assert overlaps(one) is is_overlapping
    assert is_overlapping is (len(set(places_of(one))) < one.numel())


def places_of(one: Tensor) -> list[int]:
    """Where the elements lie in memory, one by one."""
    indices = itertools.product(*map(range, one.shape))
    return [sum(map(operator.mul, index, one.stride())) for index in indices]


def with_lists(
    read: Callable[[Tensor, Tensor, Tensor], Tensor], change: Callable[[Tensor], object]
) -> Callable[[Tensor], Tensor]:
    """Read constants in a list, and change them afterwards."""

    def function(x: Tensor) -> Tensor:
        constant, index = torch.full((4, 4, 4), 0.5, dtype=x.dtype), torch.tensor([1, 0, 3, 2])
        found = torch.stack([read(one, constant.view(4, 4, 4), index) for one in x])
        change(constant)
        change(index)
        return found

    return function


# each image by itself, with what belongs to no image beside it
IN_LISTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cat": lambda x, c, i: torch.cat([x[:2], c[2:]]),
    "cat of the first": lambda x, c, i: torch.cat([c[:2], x[:2]]),
    "cat along": lambda x, c, i: torch.cat([x[:, :2], c[:, 2:]], 1),
    "stack": lambda x, c, i: torch.stack([x, c]).sum(0),
    "index": lambda x, c, i: x[i],
    "index_put": lambda x, c, i: torch.index_put(x, [i[:2], i[:2]], c[0, :2]),
    "index_put in place": lambda x, c, i: (1 * x).index_put_([i[:2]], c[:1]),
    "einsum": lambda x, c, i: torch.einsum("chw,chw->chw", [x, c]),
    "meshgrid": lambda x, c, i: x + torch.meshgrid([x[0, 0], c[0, 0]], indexing="ij")[1],
    "block_diag": lambda x, c, i: x + torch.block_diag(x[0, :2, :2], c[0, :2, :2]),
}


@pytest.mark.parametrize("change", [torch.Tensor.zero_, lambda one: one[1:].mul_(0)])
@pytest.mark.parametrize("name", IN_LISTS)
def test_constants_in_lists_are_those_that_were_read(name: str, change: Callable[[Tensor], object]) -> None:
    assert_as_plain(with_lists(IN_LISTS[name], change), with_lists(IN_LISTS[name], lambda _: None))


CONSTANT_TARGETS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "addcmul_": lambda c, x: c.addcmul_(x, x, value=0.5),
    "addcdiv_": lambda c, x: c.addcdiv_(x, x.abs() + 1),
    "clamp_": lambda c, x: c.clamp_(x - 1, x + 1),
    "lerp_": lambda c, x: c.lerp_(x, 0.3),
    "clamp_min_": lambda c, x: c.clamp_min_(x),
}


@pytest.mark.parametrize("name", CONSTANT_TARGETS)
def test_constants_changed_in_place_by_operations_made_of_smaller_ones(name: str) -> None:
    change, constant = CONSTANT_TARGETS[name], torch.full((2, 4, 4, 4), 0.1, dtype=torch.float64)
    model, images = between(lambda x: change(constant.clone(), x)), some_images()
    assert_exact(model, model.conv, images)


def test_constants_of_the_model_that_it_counts_up_are_those_of_the_run() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2)
            self.register_buffer("runs", torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            scores = self.head(x) * self.runs
            self.runs += 1
            return scores + x[:, :2] * self.runs

    model, image = Counting().double().eval(), torch.ones(1, 3, dtype=torch.float64)
    form = linear_form(model, image, 0)
    assert float(model.runs) == 2.0
    with torch.no_grad():
        expected = model.head.weight[0] + torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64)
        assert_close(form.coefficients[0], expected, **EXACT)
        assert_close(form.bias[0], model.head.bias[0], **EXACT)
    assert_close(form.residual, torch.zeros(1, dtype=torch.float64), **EXACT)


def test_two_inputs_that_share_memory_are_two_values() -> None:
    both = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    form = linear_form(lambda x, y: (x.relu_() + 2 * y).sum(1), (both, both))
    assert_close(form.coefficients[0], (both > 0).double(), **EXACT)
    assert_close(form.coefficients[1], torch.full_like(both, 2.0), **EXACT)


def test_strides_are_those_of_the_memory_not_of_the_order_of_dimensions() -> None:
    image = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def function(x: Tensor) -> Tensor:
        y = x.contiguous(memory_format=torch.channels_last) * 2
        return y.as_strided((2, 3, 5), (144, 37, 7), 2).relu().sum((1, 2))

    leaf = image.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf).sum(), leaf)
    form = linear_form(function, image)
    assert_close(form.coefficients, gradient, **EXACT)
    assert_close(form.residual, torch.zeros(2, dtype=torch.float64), **EXACT)


# --- layers that return part of their memory ----------------------------------------------------------

PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "slice": lambda y: y[:, :2],
    "whole": lambda y: y,
    "chunk": lambda y: y.chunk(2, 1)[1],
    "unsafe chunk": lambda y: y.unsafe_chunk(2, 1)[1],
    "transposed": lambda y: y.transpose(2, 3),
    "every other column": lambda y: y[..., ::2],
}


def two_views(t: Tensor) -> Tensor:
    t[:, 0].tanh_()
    t[:, :, 1:].mul_(2)
    return t


def two_views_written_out(t: Tensor) -> Tensor:
    t = torch.cat([t[:, :1].tanh(), t[:, 1:]], 1)
    return torch.cat([t[:, :, :1], t[:, :, 1:] * 2], 2)


class PartChanged(nn.Module):
    """A layer that returns part of its memory, changed before and after it does."""

    def __init__(self, part: Callable[[Tensor], Tensor], first: bool, plainly: bool) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(3, 4, 3), Partly(part, first, plainly))
        self.change = two_views_written_out if plainly else two_views

    def forward(self, x: Tensor) -> Tensor:
        return self.change(self.layer(x)).flatten(1).cumsum(1)[:, -3:]


class Partly(nn.Module):
    def __init__(self, part: Callable[[Tensor], Tensor], first: bool, plainly: bool) -> None:
        super().__init__()
        self.part, self.first, self.plainly = part, first, plainly

    def forward(self, y: Tensor) -> Tensor:
        if self.first and self.plainly:
            y = torch.cat([y[:, :1], y[:, 1:].relu()], 1)
        elif self.first:
            y[:, 1:].relu_()
        return self.part(y)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", PARTS)
def test_layers_that_return_part_of_memory_which_changes_through_views(name: str, first: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, plain = (PartChanged(PARTS[name], first, plainly).double() for plainly in (False, True))
        plain.load_state_dict(model.state_dict())
        image = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    found, expected = linear_form(model, image, 1, model.layer), linear_form(plain, image, 1, plain.layer)
    assert expected.coefficients.abs().max() > 0.1
    for field in ("coefficients", "activations", "bias"):
        assert_close(getattr(found, field), getattr(expected, field), **EXACT)


def test_parts_that_share_memory_though_no_schema_says_so() -> None:
    """``unsafe_chunk``, as cells of recurrent layers use it: a change of one part leaves the others live."""

    def changed(x: Tensor) -> Tensor:
        first, second = (3 * x).unsafe_chunk(2, 1)
        return first.sigmoid_() * second

    form = linear_form(changed, torch.randn(2, 4, dtype=torch.float64), 1)
    assert_close(form.coefficients[:, 3], 3 * form.score / (3 * form.activations[:, 3]), **EXACT)


@pytest.mark.parametrize("is_read", [False, True])
def test_memory_is_watched_only_where_another_tensor_reads_it(is_read: bool) -> None:
    """What is watched costs a look at every later read, and every network with ReLUs in place would have it."""

    def model(x: Tensor) -> Tensor:
        y = 2 * x
        before = y.view(-1) if is_read else None
        y.relu_()
        return y if before is None else before.view_as(x)

    recording = Recording(model, with_rules(None))
    recording.record((torch.ones(1, 3),))
    assert bool(recording.memory.changed) is is_read


def gates_in_place(x: Tensor) -> Tensor:
    """As PyTorch computes its own recurrent cells: chunks of one tensor, each changed in place, then multiplied."""
    first, second = (x @ WEIGHT).chunk(2, 1)
    return first.sigmoid_() * second.tanh_()


def gates(x: Tensor) -> Tensor:
    first, second = (x @ WEIGHT).chunk(2, 1)
    return first.sigmoid() * second.tanh()


def constant_gates_in_place(x: Tensor) -> Tensor:
    """Chunks of a constant, one of which comes to hold a gate; the other goes on being a constant."""
    first, second = WEIGHT[:2].clone().chunk(2, 1)
    return second * first.add_(x @ WEIGHT[:, :4]).sigmoid_()


def constant_gates(x: Tensor) -> Tensor:
    first, second = WEIGHT[:2].chunk(2, 1)
    return second * (first + x @ WEIGHT[:, :4]).sigmoid()


WEIGHT = torch.linspace(-1, 2, 5 * 8, dtype=torch.float64).cos().reshape(5, 8)


@pytest.mark.parametrize(("changing", "plain"), [(gates_in_place, gates), (constant_gates_in_place, constant_gates)])
def test_a_chunk_stays_what_it_is_while_others_of_its_memory_change(
    changing: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor]
) -> None:
    inputs = torch.linspace(-2, 1, 10, dtype=torch.float64).reshape(2, 5)
    expected, found = linear_form(plain, inputs, 1), linear_form(changing, inputs, 1)
    assert_close(found.coefficients, expected.coefficients, rtol=1e-12, atol=1e-14)
    assert_close(found.bias, expected.bias, rtol=1e-12, atol=1e-14)
    assert float(found.coefficients.abs().max()) > 0


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 6)), min_size=0, max_size=3), st.integers(0, 2))
def test_views_that_are_said_to_fill_memory_or_to_overlap_do(axes: list[tuple[int, int]], offset: int) -> None:
    """Views by any strides, of memory that is just as long as they reach."""
    length = offset + 1 + sum((size - 1) * step for size, step in axes)
    view = torch.zeros(length).as_strided([size for size, _ in axes], [step for _, step in axes], offset)
    places = torch.arange(length).as_strided(*geometry(view)).flatten()
    assert overlaps(view) is (len(places.unique()) < len(places))
    if not overlaps(view):  # else it is refused before
        assert fills(view, length) is (len(places) == length)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_places_that_are_said_to_be_apart_are(data: st.DataObject) -> None:
    """Two views of one tensor, by narrowing, selecting, transposing: no element of its memory is marked twice."""
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    memory = torch.zeros(sizes)

    def view() -> Tensor:
        found = memory
        for axis in range(memory.dim() - 1, -1, -1):
            start = data.draw(st.integers(0, sizes[axis] - 1))
            length = data.draw(st.integers(1, sizes[axis] - start))
            found = found.narrow(axis, start, length)
            if length == 1 and data.draw(st.booleans()):
                found = found.select(axis, 0)
        return found.movedim(0, -1) if found.dim() and data.draw(st.booleans()) else found

    one, other = view(), view()
    memory.zero_()
    one.add_(1)
    other.add_(1)
    is_apart = int(memory.max()) < 2
    assert are_apart(geometry(one), geometry(other)) == is_apart


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.zeros(8).unfold(0, 3, 1), torch.zeros(8)[7:]),  # overlaps itself
        (torch.zeros(12).as_strided((2, 2), (5, 3)), torch.zeros(12)[1:2]),  # strides that do not divide each other
        (torch.zeros(12).as_strided((2, 5), (4, 1)), torch.zeros(12)[11:]),  # a row that goes on in the next
    ],
)
def test_places_that_are_no_boxes_are_never_said_to_be_apart(one: Tensor, other: Tensor) -> None:
    assert not are_apart(geometry(one), geometry(other))


# --- what is held -------------------------------------------------------------------------------------


class Watch(nn.Module):
    """Passes a tensor on, and tells later whether its memory is still there."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = StorageWeakRef(x.untyped_storage())
        return x * 1

    @property
    def is_there(self) -> bool:
        return not self.seen.expired()


def test_what_the_model_is_done_with_is_freed_before_the_next_layer_runs() -> None:
    watch, found = Watch(), []
    layer = nn.Conv2d(1, 2, 3)
    model = nn.Sequential(layer, nn.ReLU(inplace=True), watch, nn.Sigmoid(), nn.Flatten(), nn.Linear(32, 2))
    model[3].register_forward_hook(lambda *_: found.append(watch.is_there))
    LayerScoreMap(model, [layer]).attribute(torch.rand(1, 1, 6, 6), 1)
    assert found == [False]


def test_activations_are_freed_once_their_map_is_made() -> None:
    found = []

    class Noting(Gate):
        def transpose(self, call: Call, state: Tensor, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
            found.append((early.is_there, late.is_there))
            return super().transpose(call, state, gradients)

    early, late = Watch(), Watch()
    layers = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3)
    model = nn.Sequential(layers[0], early, nn.Sigmoid(), layers[1], late, nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    rules = {"sigmoid": Noting(0.5)}
    LayerScoreMap(model.eval(), list(layers), rules=rules).attribute(torch.rand(1, 1, 6, 6), 1)
    assert found == [(True, False)]


def turned(x: Tensor) -> Tensor:
    return torch.complex(x, x.flip(1))


def through(view: Callable[[Tensor], Tensor], change: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    def changed(x: Tensor) -> Tensor:
        numbers = turned(x)
        change(view(numbers))
        return numbers.abs()

    return changed


def read_later(x: Tensor) -> Tensor:
    numbers = turned(x)
    conjugate = numbers.conj()
    numbers.mul_(1 + 2j)
    return conjugate.imag.abs()


OTHERWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "conjugate": through(torch.conj, lambda view: view.mul_(2j)),
    "part of a conjugate": through(lambda z: z.conj()[:, :2], lambda view: view.mul_(1 + 2j)),
    "adjoint": through(lambda z: z.mH, lambda view: view.mul_(1j)),
    "copy into a conjugate": through(torch.conj, lambda view: view.copy_(view * 2j)),
    "real part": through(torch.real, lambda view: view.relu_()),
    "numbers": through(torch.view_as_real, lambda view: view[..., 0].mul_(2)),
    "imaginary part of a conjugate": through(lambda z: z.conj().resolve_conj().imag, lambda view: view.mul_(2)),
    "conjugate read later": read_later,
    "conjugate in a product": through(torch.conj, lambda view: view.mul_(2j) * 3),
}


def as_another_type(
    live: torch.dtype, other: torch.dtype, later: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """The image's first two numbers at the start of a table, some of whose memory is read, or written, otherwise."""

    def function(x: Tensor) -> Tensor:
        table = torch.zeros(8, dtype=live)
        seen = table.view(other)
        table[:2].copy_(x.flatten()[:2])
        return later(table, seen).double()[None]

    return function


def end_written(table: Tensor, seen: Tensor) -> Tensor:
    seen[-1:] = 3
    return table[:2].sum()


def start_written(table: Tensor, seen: Tensor) -> Tensor:
    seen[:1].copy_(table[1])
    return seen.sum() + table[:2].sum()


def both_read(table: Tensor, seen: Tensor) -> Tensor:
    return seen.sum() + table.sum()


def in_a_product(table: Tensor, seen: Tensor) -> Tensor:
    return (2 * seen).sum() + (table + seen[:1]).sum()


def emptied(table: Tensor, seen: Tensor) -> Tensor:
    kept = table[:2] * 2
    table.zero_()
    seen[-1:] = 3
    return kept.sum() + table[:4].sum() + seen.sum()


OTHER_TYPES = {
    f"{live} as {other}, {later.__name__}": as_another_type(live, other, later)
    for live, other in itertools.permutations((torch.float64, torch.float32, torch.int32, torch.uint8, torch.half), 2)
    if live.is_floating_point
    for later in (end_written, start_written, both_read, in_a_product, emptied)
}


@pytest.mark.parametrize("name", OTHER_TYPES)
def test_memory_that_is_read_as_another_type_than_written_is_right_or_refused(name: str) -> None:
    images = some_images()
    try:
        form = linear_form(OTHER_TYPES[name], images[:1])
    except TypeError as error:
        assert "must be read and changed as numbers of one type" in str(error)  # noqa: PT017
        return
    torch.testing.assert_close(form.residual, torch.zeros_like(form.residual), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", OTHERWISE)
def test_complex_memory_that_is_read_otherwise_than_written_is_right_or_refused(name: str) -> None:
    model, images = between(OTHERWISE[name]), some_images()
    try:
        form = linear_form(model, images, 1)
    except TypeError as error:
        assert "complex numbers that change in place" in str(error)  # noqa: PT017
    else:
        assert_close(form.score, model(images)[:, 1].detach(), **EXACT)
        assert_close(form.sums + form.bias, form.score, **EXACT)


# -- constants that pass a layer


def two_parts(site: nn.Module, y: Tensor, c: Tensor) -> Tensor:
    passed = site(c)
    part = passed[:, :, 2:]
    c[:, :, :1].fill_(0.5)
    part.index_fill_(1, torch.tensor([0]), 0.1)
    return c + part.sum((1, 2, 3), keepdim=True) + passed + y


AT_A_LAYER: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "the constant changes": lambda site, y, c: (lambda a: (c.mul_(2.0), 3 * a + c)[1])(site(c)) + y,
    "the constant becomes live": lambda site, y, c: (lambda a: (c.sub_(a * 1), 3 * a + c)[1])(site(c)) + y,
    "by the image": lambda site, y, c: (lambda a: (c.add_(y), 3 * a + c)[1])(site(c)),
    "a part of it": lambda site, y, c: (lambda a: (c[:, 1:].mul_(2.0), 3 * a + c)[1])(site(c)) + y,
    "what the layer gave changes": lambda site, y, c: (lambda a: (a.sub_(y), 3 * a + c)[1])(site(c)),
    "a part of what it gave": lambda site, y, c: (lambda a: (a[:, :2].mul_(2.0), 3 * a + c)[1])(site(c)) + y,
    "parts of it, of which one changes before": two_parts,
    "a layer of a part": lambda site, y, c: (lambda a: (a.mul_(2.0), c.add_(1.0), 3 * c)[2])(site(c[:, 1:])) + y,
    "what it gave is multiplied by it": lambda site, y, c: (lambda a: (a.mul_(c), 3 * a + c)[1])(site(c)) + y,
    "divided by it": lambda site, y, c: (lambda a: (a.div_(c + 2), a.div_(c), 3 * a)[2])(site(c)) + y,
    "a part of it multiplied by a part": lambda site, y, c: (
        (lambda a: (a[:, 1:].mul_(c[:, 1:]), 3 * a + c)[1])(site(c)) + y
    ),
    "read in a list before": lambda site, y, c: (
        (lambda a: (lambda both: (a.sub_(a * 1), both[:2] + c)[1])(torch.cat([c, a])))(site(c)) + y
    ),
}


@pytest.mark.parametrize("name", AT_A_LAYER)
def test_constants_that_pass_a_layer_and_change_afterwards(name: str) -> None:
    class Passing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.site, self.head = nn.Conv2d(3, 4, 3), nn.Identity(), nn.Linear(64, 3)

        def forward(self, x: Tensor) -> Tensor:
            constant = torch.linspace(-1, 1, 128, dtype=x.dtype).view(2, 4, 4, 4)
            return self.head(AT_A_LAYER[name](self.site, self.conv(x), constant).flatten(1))

    model, images = Passing().double().eval(), some_images()
    with torch.no_grad():
        score = model(images)
    for site in (None, model.conv, model.site):
        form = linear_form(model, images, 1, site)
        assert_close(form.score, score[:, 1], **EXACT)
        assert_close(form.sums + form.bias, score[:, 1], **EXACT)
    assert_close(freeze(model, images)(images), score, **EXACT)


def test_the_rest_of_a_constant_that_passed_a_layer_is_still_what_the_layer_gave() -> None:
    class Passing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.site = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            passed = self.site(torch.linspace(1, 2, 4, dtype=x.dtype)[None].clone())
            passed[:, :2].mul_(3.0)
            return x + passed

    model, inputs = Passing().eval(), torch.ones(1, 4, dtype=torch.float64)
    form = linear_form(model, inputs, lambda output: output.sum(1), model.site)
    assert_close(form.coefficients, torch.tensor([[3.0, 3.0, 1.0, 1.0]], dtype=torch.float64))
    assert_close(form.bias, inputs.sum(1))


# -- what passed a layer stands where others do not change it


def through_another(change: Callable[[Tensor], object]) -> Callable[[nn.Module, Tensor], Tensor]:
    def passing(site: nn.Module, y: Tensor) -> Tensor:
        other = y[:, 1:3]
        passed = site(y)
        change(other)
        return passed

    return passing


def in_two_turns(site: nn.Module, y: Tensor) -> Tensor:
    passed = site(y)
    y[:, :1].mul_(3.0)
    first = passed * 2
    y[:, 1:2].mul_(3.0)
    return first + passed


def its_part(site: nn.Module, y: Tensor) -> Tensor:
    part = site(y)[:, 1:]
    y[:, 2:3].add_(1.0)
    return part * 5


def its_own_part_after_another(site: nn.Module, y: Tensor) -> Tensor:
    passed = site(y)
    part = passed[:, 3:]
    y[:, :1].mul_(3.0)
    part.mul_(7.0)
    return passed


def its_own_part_before_another(site: nn.Module, y: Tensor) -> Tensor:
    passed = site(y)
    passed[:, 3:].mul_(7.0)
    y[:, :1].mul_(3.0)
    return passed


def by_strides(site: nn.Module, y: Tensor) -> Tensor:
    part = site(y)[:, 1:]
    y[:, :1].mul_(3.0)
    return part.as_strided((1, 4), (4, 1), 0)


def another_after_its_own_part(site: nn.Module, y: Tensor) -> Tensor:
    other = y[:, :3]
    site(y)[:, :1].mul_(7.0)
    return other * 2


STANDING: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], list[float]]] = {
    "by its slope": (through_another(lambda one: one.relu_()), [1, 0, 0, 1]),
    "by constants": (through_another(lambda one: one.fill_(0.5)), [1, 0, 0, 1]),
    "by numbers of the image": (through_another(lambda one: one.copy_(one.flip(1))), [1, 0, 0, 1]),
    "in two turns": (in_two_turns, [0, 2, 3, 3]),
    "a part of what passed": (its_part, [0, 5, 0, 5]),
    "then a part of what passed": (its_own_part_after_another, [0, 1, 1, 7]),
    "after a part of what passed": (its_own_part_before_another, [0, 1, 1, 7]),
    "read by strides": (by_strides, [0, 1, 1, 1]),
    "which reads its own": (another_after_its_own_part, [14, 0, 0, 0]),
}


@pytest.mark.parametrize("kind", [nn.Identity, lambda: nn.LeakyReLU(0.5, inplace=True), nn.Flatten])
@pytest.mark.parametrize("is_constant", [False, True])
@pytest.mark.parametrize("name", STANDING)
def test_what_passed_a_layer_stands_where_others_do_not_change_it(
    name: str, is_constant: bool, kind: Callable[[], nn.Module]
) -> None:
    passing, expected = STANDING[name]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.site = kind()

        def forward(self, x: Tensor) -> Tensor:
            y = torch.linspace(-1, 1, 4, dtype=x.dtype)[None].clone() if is_constant else 2 * x
            return passing(self.site, y) + 0 * x[:, :1]

    model, inputs = Model().eval(), torch.tensor([[1.0, -2.0, 3.0, -4.0]], dtype=torch.float64)
    form = linear_form(model, inputs, lambda output: output.sum(1), model.site)
    assert_close(form.coefficients, torch.tensor([expected], dtype=torch.float64))
    assert_close(form.sums + form.bias, model(inputs).sum(1), **EXACT)
    frozen = freeze(model, inputs)(inputs, {model.site: torch.zeros_like(form.activations)})
    assert_close(frozen.sum(1), form.bias, **EXACT)


WRITTEN_OVER: dict[str, Callable[[Tensor], Tensor]] = {
    "a number": lambda part: part.fill_(0.4),
    "a table": lambda part: part.copy_(torch.full_like(part, 0.4)),
    "a table by index": lambda part: part.__setitem__(slice(None), torch.full_like(part, 0.4)) or part,
    "noise": lambda part: part.uniform_(0.4, 0.4 + 1e-12),
    "a part of it": lambda part: part.fill_(0.4)[:, :2],
    "through another view": lambda part: (part.detach().copy_(torch.full_like(part, 0.4)), part)[1],
    "column by column": lambda part: ([column.fill_(0.4) for column in part.unbind(1)], part)[1],
    "by a slice": lambda part: part.__setitem__((slice(None), slice(0, 2)), 0.4) or part,
    "and changed after it is read": lambda part: (part.detach().fill_(0.2), 2 * part, part.detach().fill_(7.0))[1],
}


@pytest.mark.parametrize("name", WRITTEN_OVER)
def test_a_factor_that_constants_were_written_over_is_a_constant(name: str) -> None:
    def model(x: Tensor) -> Tensor:
        memory = x.clone()
        factor = WRITTEN_OVER[name](memory[:, :2])
        return x[:, 1:3] * factor + memory[:, 2:]

    form = linear_form(model, torch.rand(1, 4, dtype=torch.float64) + 1, lambda output: output.sum(1))
    assert_close(form.coefficients, torch.tensor([[0.0, 0.4, 1.4, 1.0]], dtype=torch.float64))


@pytest.mark.parametrize("is_written_later", [False, True])
def test_a_margin_around_live_numbers_is_a_constant(is_written_later: bool) -> None:
    """As of an image that is copied into a canvas: what it lies in is not all of the image."""

    def model(x: Tensor) -> Tensor:
        canvas = torch.full((1, 6), 0.4, dtype=x.dtype)
        canvas[:, 1:5] = x
        product = x * canvas[:, :1] + x[:, :1] * canvas[:, 5:]
        if is_written_later:
            canvas[:, :] = 7.0
        return product + canvas[:, 1:5]

    inputs = torch.rand(1, 4, dtype=torch.float64) + 1
    form = linear_form(model, inputs, lambda output: output.sum(1))
    own = 0.0 if is_written_later else 1.0
    assert_close(form.coefficients, torch.tensor([[2.0, 0.4, 0.4, 0.4]], dtype=torch.float64) + own)
    assert_close(form.sums + form.bias, form.score, **EXACT)


@pytest.mark.parametrize("operation", ["mul", "sub", "maximum", "addcmul"])
@pytest.mark.parametrize("change", [Tensor.zero_, lambda one: one[:, 1:].mul_(2.0), lambda one: one.copy_(one + 1)])
def test_rules_of_the_users_are_held_to_constants_as_they_were(
    operation: str, change: Callable[[Tensor], object]
) -> None:
    def model(x: Tensor) -> Tensor:
        constant = torch.linspace(1, 2, 4, dtype=x.dtype)[None].clone()
        arguments = (x, constant, constant) if operation == "addcmul" else (x, constant)
        output: Tensor = getattr(torch, operation)(*arguments)
        change(constant)
        return output + constant

    inputs = torch.rand(1, 4, dtype=torch.float64)
    form = linear_form(model, inputs, 1, rules={operation: Tangent()})
    assert_close(form.sums + form.bias, model(inputs)[:, 1], **EXACT)


# -- sites within sites


class Within(nn.Module):
    """Layers that pass on a part of what another passed on, which changes in place after that."""

    def __init__(self, change: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.conv, self.outer, self.inner = nn.Conv2d(3, 4, 3), nn.Identity(), nn.Identity()
        self.head, self.change = nn.Linear(64, 3), change

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        outer = self.outer(y[:, 1:])
        self.change(self.inner(outer[:, :, 1:3]))
        return self.head((y + torch.cat([y[:, :1], outer], 1)).flatten(1))


@pytest.mark.parametrize("change", [Tensor.relu_, lambda part: part.mul_(2.0), lambda part: part[:, 0].fill_(0.5)])
def test_layers_within_layers_of_one_memory(change: Callable[[Tensor], object]) -> None:
    model, images = Within(change).double().eval(), some_images()
    leaf = images.clone().requires_grad_()
    score = model(leaf)
    (gradient,) = torch.autograd.grad(score[:, 1].sum(), leaf)
    form, frozen = linear_form(model, images, 1), freeze(model, images)
    assert_close(form.coefficients, gradient, **EXACT)
    assert_close(frozen(images), score.detach(), **EXACT)
    assert_close(frozen(0 * images)[:, 1], form.bias, **EXACT)
    forms = linear_form(model, images, 1, [model.conv, model.outer, model.inner])
    for one in (*forms, *(linear_form(model, images, 1, layer) for layer in (model.conv, model.outer, model.inner))):
        assert_close(one.sums + one.bias, score[:, 1].detach(), **EXACT)


class Again(Within):
    """The same in memory that had changed before, and changes again, through a view, once all layers have passed it."""

    def __init__(self, change: Callable[[Tensor], object], again: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(change)
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y[:, :1].fill_(0.7)
        outer = self.outer(y)
        inner = self.inner(outer[:, 1:])
        self.change(inner)
        return self.head((outer + self.again(y, outer)).flatten(1))


AGAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "not": lambda y, outer: 2 * y,
    "all of it": lambda y, outer: y.add_(1.0),
    "a part of the input": lambda y, outer: (y[:, :2].mul_(3.0), y)[1],
    "a part of what passed": lambda y, outer: (outer[:, :, 2:].mul_(3.0), y)[1],
}


@pytest.mark.parametrize("again", AGAIN)
@pytest.mark.parametrize("change", [lambda part: part.mul_(2.0), lambda part: part[:, 0].fill_(0.5)])
def test_layers_within_layers_of_memory_that_had_changed_before(change: Callable[[Tensor], object], again: str) -> None:
    model, images = Again(change, AGAIN[again]).double().eval(), some_images()
    layers = [model.conv, model.outer, model.inner]
    frozen, together = freeze(model, images), linear_form(model, images, 1, layers)
    for layer, beside_others in zip(layers, together, strict=True):
        form = linear_form(model, images, 1, layer)
        assert_close(form.sums + form.bias, model(images)[:, 1].detach(), **EXACT)
        assert_close(beside_others.coefficients, form.coefficients, **EXACT)
        assert_close(frozen(images, {layer: torch.zeros_like(form.activations)})[:, 1], form.bias, **EXACT)


def test_what_new_memory_held_before_it_was_filled_does_not_count(generator: torch.Generator) -> None:
    convolutions = [nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular").double() for _ in range(2)]
    model = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.AvgPool2d(6), nn.Flatten()).eval()
    image = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=generator)
    expected = linear_form(model, image, 1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills it with NaN
    try:
        assert torch.empty(2).isnan().all()
        form, terms = linear_form(model, image, 1), bias_terms(model, image, 1)
        frozen = freeze(model, image)(torch.zeros_like(image))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(form.coefficients, expected.coefficients, rtol=1e-12, atol=1e-13)
    for bias in (form.bias, torch.stack(list(terms.values())).sum(0), frozen[:, 1]):
        assert_close(bias, expected.bias, rtol=1e-12, atol=1e-13)


class Table(nn.Module):
    """What does not depend on the image, a layer's or not, changed by the image."""

    def __init__(self, layer: nn.Module | None, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(1, 3, 4, 4))
        self.layer, self.head, self.change = layer, nn.Linear(48, 4), change

    def forward(self, x: Tensor) -> Tensor:
        made = (self.table + 0 if self.layer is None else self.layer(self.table + 0)).expand_as(x).contiguous()
        return self.head(self.change(made, x.relu()).flatten(1))


BY_THE_IMAGE: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "multiplied": (lambda c, x: c.mul_(x), lambda c, x: c * x),
    "a part of it": (
        lambda c, x: (c[:, :2].mul_(x[:, :2]), c)[1],
        lambda c, x: torch.cat([c[:, :2] * x[:, :2], c[:, 2:]], 1),
    ),
    "divided": (lambda c, x: c.div_(1 + x), lambda c, x: c / (1 + x)),
    "by itself, too": (lambda c, x: c.addcmul_(c, x), lambda c, x: c + c * x),
    "as an output": (lambda c, x: torch.mul(c, x, out=c), lambda c, x: c * x),
    "the larger": (lambda c, x: torch.maximum(c, x, out=c), torch.maximum),
    "twice": (lambda c, x: c.mul_(x).mul_(2.0).add_(x), lambda c, x: 2 * c * x + x),
}


@pytest.mark.parametrize("case", BY_THE_IMAGE)
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("layer", [nn.ReLU(), nn.ReLU(inplace=True), nn.Identity(), None])
def test_a_frozen_model_keeps_a_layers_constants_that_the_image_changes_in_place(
    case: str, images: int, layer: nn.Module | None, generator: torch.Generator
) -> None:
    """At another image it is the model that makes a new tensor, frozen."""
    in_place, apart = (Table(layer, change).double().eval() for change in BY_THE_IMAGE[case])
    apart.load_state_dict(in_place.state_dict())
    here, there = torch.randn(2, images, 3, 4, 4, dtype=torch.float64, generator=generator)
    assert_close(freeze(in_place, here)(here), in_place(here), **EXACT)
    assert_close(freeze(in_place, here)(there), freeze(apart, here)(there), **EXACT)
    assert_close(linear_form(in_place, here, 1).coefficients, linear_form(apart, here, 1).coefficients, **EXACT)
