"""The linear form as an object: shares of the bias, contrasts, regions and their boundaries, rules of one's own."""

from __future__ import annotations

import copy
import operator
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.ops import deform_conv2d

from captum_scoremap import LayerScoreMap, NeuronScoreMap, bias_terms, freeze, linear_form, token_grid
from captum_scoremap.layout import channel_dim_of
from captum_scoremap.rules import (
    TANGENT,
    BatchNorm,
    Choice,
    Comparison,
    Division,
    Extremum,
    FirstLinear,
    Frozen,
    Gate,
    GroupNorm,
    LayerNorm,
    Linear,
    MaxPool,
    Power,
    Product,
    Rule,
    Tangent,
)

EXACT = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture
def image(generator: torch.Generator) -> Tensor:
    return torch.randn(2, 3, 12, 12, dtype=torch.float64, generator=generator)


@pytest.fixture
def chain() -> nn.Sequential:
    """Layers one after the other, piecewise linear, every bias nonzero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU6(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3, bias=False),
            nn.LeakyReLU(),
            nn.AvgPool2d(3),
            nn.Flatten(),
            nn.Linear(6, 5),
        )
        nn.init.normal_(model[1].running_mean)
        nn.init.normal_(model[1].bias)
        nn.init.constant_(model[1].weight, 6.0)
    return model.double().eval()


def test_each_layer_of_a_chain_adds_its_share_of_the_bias(chain: nn.Sequential, image: Tensor) -> None:
    """Sum M_l - sum M_{l-1} is layer l's share: what the layer adds to A·Y is what B loses."""
    shares = bias_terms(chain, image, 1)
    below = linear_form(chain, image, 1).sums
    for name, layer in chain.named_children():
        sums = linear_form(chain, image, 1, layer).sums
        torch.testing.assert_close(sums - below, shares.get(name, torch.zeros_like(sums)), **EXACT)
        below = sums
    assert set(shares) == {"0", "1", "2", "8"}  # ReLU6 saturates somewhere


def test_two_routes_to_the_bias_agree(chain: nn.Sequential, image: Tensor) -> None:
    by_shares = sum(bias_terms(chain, image, 1).values())
    torch.testing.assert_close(by_shares, linear_form(chain, image, 1).bias, **EXACT)


def test_contrast_is_the_form_of_the_difference(chain: nn.Sequential, image: Tensor) -> None:
    contrast = linear_form(chain, image, 1, chain[3]) - linear_form(chain, image, 4, chain[3])
    difference = linear_form(lambda x: chain(x)[:, 1] - chain(x)[:, 4], image, None)
    with torch.no_grad():
        scores = chain(image)
    torch.testing.assert_close(contrast.score, scores[:, 1] - scores[:, 4], **EXACT)
    torch.testing.assert_close(contrast.residual, torch.zeros(2, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(difference.score, contrast.score, **EXACT)


def test_forms_of_different_layers_have_no_contrast(chain: nn.Sequential, image: Tensor) -> None:
    with pytest.raises(ValueError, match="same layer at the same image to be added or subtracted"):
        linear_form(chain, image, 1, chain[3]) - linear_form(chain, image, 1, chain[2])


@pytest.mark.parametrize("seed", range(5))
def test_the_named_switch_flips_at_the_boundary(chain: nn.Sequential, image: Tensor, seed: int) -> None:
    """Just before the boundary nothing has flipped; just past it exactly the named switch has, at one place."""
    one = image[:1]
    direction = torch.randn(one.shape, dtype=one.dtype, generator=torch.Generator().manual_seed(seed))
    frozen = freeze(chain, one)
    boundary = frozen.distance_to_boundary(direction)
    distance = float(boundary.distance)
    assert 0 < distance < 1
    before = freeze(chain, one + direction * distance * (1 - 1e-9))
    past = freeze(chain, one + direction * distance * (1 + 1e-9))
    assert frozen.same_region(before)
    assert frozen.flipped(past) == {boundary.switch[0]: 1}
    # up to there, and only there, the frozen model is the model
    at = one + direction * distance * 0.5
    torch.testing.assert_close(frozen(at), chain(at), **EXACT)


def test_a_masked_softmax_has_a_tangent(image: Tensor) -> None:
    tokens, mask = image[:, 0], torch.ones(12, 12).tril().bool()

    def function(x: Tensor) -> Tensor:
        return x.masked_fill(~mask, -torch.inf).softmax(-1)[:, 3, 2] + 0

    form = linear_form(function, tokens)
    leaf = tokens.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf).sum(), leaf)
    torch.testing.assert_close(form.coefficients, gradient, **EXACT)
    torch.testing.assert_close(form.residual, torch.zeros(2, dtype=torch.float64), **EXACT)


def test_without_a_switch_there_is_no_boundary(image: Tensor) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(432, 2)).double().eval()
    boundary = freeze(model, image).distance_to_boundary(torch.ones_like(image))
    assert torch.isinf(boundary.distance).all()
    assert boundary.switch == ("", "")


def test_tangent_is_the_gradient(image: Tensor) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(400, 3))
    model = model.double().eval()
    form = linear_form(model, image, 2, rules=TANGENT)
    x = image.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)[:, 2].sum(), x)
    torch.testing.assert_close(form.coefficients, gradient, **EXACT)
    torch.testing.assert_close(form.residual, torch.zeros(2, dtype=torch.float64), **EXACT)
    one_rule = linear_form(model, image, 2, rules={F.gelu: Tangent()})
    assert not torch.allclose(one_rule.bias, form.bias)
    assert not torch.allclose(one_rule.bias, linear_form(model, image, 2).bias)
    torch.testing.assert_close(one_rule.residual, torch.zeros(2, dtype=torch.float64), **EXACT)


WEIGHT = torch.linspace(-0.3, 0.5, 81, dtype=torch.float64).view(3, 3, 3, 3)


def offsets(x: Tensor, channels: int) -> Tensor:
    return F.conv2d(x, WEIGHT.repeat(6, 1, 1, 1)[:channels], padding=1).tanh()


def sampled(x: Tensor, mode: str = "bilinear") -> Tensor:
    return F.grid_sample(x, offsets(x, 2).permute(0, 2, 3, 1), mode, align_corners=False)


def turned(x: Tensor, *shape: int) -> Tensor:
    dims = len(shape) - 2
    matrix = torch.eye(dims, dims + 1, dtype=x.dtype) + 0.1 * x.flatten(1)[:, : dims * (dims + 1)].view(
        -1, dims, dims + 1
    )
    grid = F.affine_grid(matrix, [len(x), *shape[1:]], align_corners=False)
    return F.grid_sample(x.view(len(x), *shape[1:]), grid, align_corners=False)


def slope(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.func.grad(lambda image: function(F.conv2d(image, WEIGHT)).sum())(x)


@pytest.mark.parametrize(
    "function",
    [
        sampled,
        lambda x: sampled(x, "bicubic"),
        lambda x: F.grid_sample(
            WEIGHT[:1].expand(len(x), -1, -1, -1), offsets(x, 2).permute(0, 2, 3, 1), align_corners=True
        ),
        lambda x: turned(x, -1, *x.shape[1:]),
        lambda x: turned(x, -1, x.shape[1], 2, x.shape[2] // 2, x.shape[3]),
        lambda x: deform_conv2d(x, offsets(x, 18), WEIGHT, padding=1, mask=offsets(x, 9).sigmoid()),
        lambda x: x * slope(x, F.gelu),
        lambda x: slope(x, lambda y: y.tanh().square()),
        lambda x: slope(x, lambda y: y.relu().softmax(1).square()),
        lambda x: slope(x, lambda y: F.layer_norm(y, y.shape[1:]).relu().pow(3)),
        lambda x: slope(x, lambda y: F.group_norm(y, 3).relu().pow(3)),
        lambda x: slope(x, lambda y: F.instance_norm(y).relu().pow(3)),
        lambda x: slope(x, lambda y: F.batch_norm(y, *WEIGHT.view(3, 27).T[:2].abs(), eps=0.1).sin()),
    ],
    ids="grid cubic grid-alone turned solid offsets gelu tanh softmax layer group instance batch".split(),
)
def test_tangent_is_the_gradient_where_it_moves_what_is_frozen_otherwise(
    image: Tensor, function: Callable[[Tensor], Tensor]
) -> None:
    def model(x: Tensor) -> Tensor:
        return function(x).square().flatten(1).sum(1, keepdim=True)

    x = image.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).sum(), x)
    form = linear_form(model, image, 0, rules=TANGENT)
    torch.testing.assert_close(form.coefficients, gradient, **EXACT)
    torch.testing.assert_close(form.residual / model(image)[:, 0], torch.zeros(2, dtype=torch.float64), **EXACT)
    assert not torch.allclose(linear_form(model, image, 0).coefficients, gradient)


def test_tangent_of_attention_needs_no_kernel_that_can_be_derived_twice() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.attention(x, x, x, need_weights=False)[0]
            return self.head(nn.functional.scaled_dot_product_attention(x, x, x).mean(1))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, tokens = Tokens().eval(), torch.randn(2, 5, 8)
    form = linear_form(model, tokens, 2, rules=TANGENT)
    x = tokens.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)[:, 2].sum(), x)
    torch.testing.assert_close(form.coefficients, gradient)
    torch.testing.assert_close(form.residual, torch.zeros(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("tokens", "grid", "shape"), [(17, None, (4, 4)), (16, None, (4, 4)), (13, (3, 4), (3, 4))])
def test_tokens_are_laid_out_row_by_row(tokens: int, grid: tuple[int, int] | None, shape: tuple[int, int]) -> None:
    score_map = torch.arange(2.0 * tokens).reshape(2, tokens, 1)
    laid = token_grid(score_map, grid)
    assert laid.shape == (2, 1, *shape)
    first = tokens - shape[0] * shape[1]
    assert laid[0, 0].flatten().tolist() == list(range(first, tokens))


def test_a_grid_larger_than_the_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="grid must have at most 9 patches, one for each token, got 4 x 4"):
        token_grid(torch.zeros(1, 9, 1), (4, 4))
    with pytest.raises(ValueError, match=r"score_map must be \(N, tokens, K\) or \(N, h, w, K\), got \(3, 3\)"):
        token_grid(torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"got 99 tokens. Name the rows and columns of the patches: grid="):
        token_grid(torch.zeros(1, 99, 1))


def test_what_tokens_without_a_place_add_comes_along() -> None:
    score_map = torch.arange(2.0 * 19).reshape(2, 19, 1)
    patches, placeless = token_grid(score_map, return_placeless=True)
    torch.testing.assert_close(placeless, score_map[:, :3].sum(1))
    torch.testing.assert_close(patches.sum((2, 3)) + placeless, score_map.sum(1))
    patches, placeless = token_grid(torch.ones(2, 3, 3, 4), return_placeless=True)
    assert patches.shape == (2, 4, 3, 3)
    assert not placeless.any()


def test_a_layer_that_does_not_depend_on_the_image_can_be_replaced_in_a_frozen_model() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Linear(2, 4)
            self.position = nn.Parameter(torch.ones(1, 2))

        def forward(self, x: Tensor) -> Tensor:
            added = 0 * x
            added.copy_(torch.relu(self.table(self.position)))
            return x + added

    model, inputs = Positions().double().eval(), torch.ones(1, 4, dtype=torch.float64)
    nn.init.constant_(model.table.bias, 0.25)
    frozen = freeze(model, inputs)
    given = torch.tensor([[1.0, -2.0, 3.0, 0.0]], dtype=torch.float64)
    on = frozen.switches["relu"].to(given)
    torch.testing.assert_close(frozen(inputs), model(inputs), **EXACT)
    torch.testing.assert_close(frozen(inputs, {model.table: given}), inputs + on * given, **EXACT)
    torch.testing.assert_close(frozen(2 * inputs, {model.table: 0 * given}), 2 * inputs, **EXACT)
    form = linear_form(model, inputs, 0, model.table)
    torch.testing.assert_close(form.sums + form.bias, form.score)


def parametrized(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))


class Prototypes(nn.Module):
    """Scores are products with what a branch of constants gives, as of class names."""

    def __init__(self) -> None:
        super().__init__()
        self.names, self.text, self.image = nn.Parameter(torch.randn(3, 5)), nn.Linear(5, 8), nn.Linear(48, 8)

    def forward(self, x: Tensor) -> Tensor:
        text, image = self.text(self.names), self.image(x.flatten(1))
        return (image @ text.t()) * image.norm(dim=1, keepdim=True).reciprocal() / text.norm(dim=1)


CONSTANT_BRANCHES: dict[str, Callable[[], nn.Module]] = {
    "weight norm": lambda: parametrized(parametrizations.weight_norm(nn.Conv2d(3, 4, 3))),
    "spectral norm": lambda: parametrized(parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))),
    "orthogonal": lambda: parametrized(nn.Sequential(nn.Flatten(), parametrizations.orthogonal(nn.Linear(48, 8)))),
    "prototypes": Prototypes,
}


@pytest.mark.parametrize("name", CONSTANT_BRANCHES)
def test_layers_that_make_weights_leave_the_frozen_model_what_the_form_is(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, images = CONSTANT_BRANCHES[name](), torch.randn(2, 3, 4, 4)
        model.eval()(images)
    model, images = model.double().eval(), images.double()
    form, frozen = linear_form(model, images, 1), freeze(model, images)
    torch.testing.assert_close(frozen(images), model(images), **EXACT)
    torch.testing.assert_close(frozen(torch.zeros_like(images))[:, 1], form.bias, **EXACT)
    assert form.bias.abs().max() > 1e-3 or name == "prototypes"


# --- forms as objects -------------------------------------------------------------------------------------------------


@pytest.fixture
def small() -> tuple[nn.Sequential, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).double().eval()
        return model, torch.randn(2, 3, 6, 6, dtype=torch.float64)


def test_forms_add_up_as_scores_do(small: tuple[nn.Sequential, Tensor]) -> None:
    model, x = small
    first, second = (linear_form(model, x, label, model[1]) for label in (1, 2))

    def mixed(output: Tensor) -> Tensor:
        return 3 * output[:, 1] - output[:, 2] / 2

    expected = linear_form(model, x, mixed, model[1])
    found = 3 * first + -second / 2
    for name in ("coefficients", "bias", "score", "sums"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), **EXACT)
    torch.testing.assert_close(found.residual, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    assert sum([first, second]) == first + second
    assert first - second == first + -1 * second
    torch.testing.assert_close(found.score_map(), expected.score_map(), **EXACT)
    with pytest.raises(ValueError, match=r"of the same layer at the same image to be added or subtracted"):
        first + linear_form(model, x, 1, model[0])
    for wrong in (lambda: first + 1, lambda: first * first, lambda: "a" * first, lambda: sum([first], start=2)):
        with pytest.raises(TypeError):
            wrong()


def test_forms_are_compared_number_by_number(small: tuple[nn.Sequential, Tensor]) -> None:
    model, x = small
    form, again, other = (linear_form(model, x, label, model[1]) for label in (1, 1, 2))
    assert form == again
    assert hash(form) == hash(again)
    assert form != other
    assert form != linear_form(model, x, 1)
    assert form != linear_form(model.float(), x.float(), 1, model[1])
    assert form != 3
    assert other not in [form, again]


def test_several_layers_make_a_table(small: tuple[nn.Sequential, Tensor]) -> None:
    model, x = small
    layers = [None, model[0], model[3]]
    forms = linear_form(model, x, 1, layers)
    assert isinstance(forms, list)
    assert forms == [linear_form(model, x, 1, layer) for layer in layers]
    assert linear_form(model, x, 1, tuple(layers)) == forms
    text, html = repr(forms), forms._repr_html_()
    assert text.splitlines()[0].split() == ["layer", "image", "size", "Σ", "A·Y", "B", "S", "residual"]
    assert [line.split()[:2] for line in text.splitlines()[1:]] == [[n, i] for n in ("input", "0", "3") for i in "01"]
    assert f"{float(forms[1].score[0]):.4f}" in text
    assert "3 × 6 × 6" in text
    assert len(set(map(len, text.splitlines()))) == 1
    assert html.count("<tr>") == 7
    assert html.count("<td>") == 6 * 7
    one = linear_form(model, x[:1], 1, [model[1]])
    assert len(repr(one).splitlines()) == 2
    inside = nn.Sequential(OrderedDict(a_name_longer_than_its_size=model))
    named = repr(linear_form(inside, x[:1], 1, [None, model[0]])).splitlines()
    assert len(set(map(len, named))) == 1
    assert "image" not in repr(one)
    with pytest.raises(ValueError, match=r"layer must name at least one module, got none"):
        linear_form(model, x, 1, [])
    with pytest.raises(TypeError, match=r"layer must be a module, got the name 'conv'"):
        linear_form(model, x, 1, "conv")


def test_a_form_says_what_it_is_in_a_line(small: tuple[nn.Sequential, Tensor]) -> None:
    model, x = small
    form = linear_form(model, x[:1], 1, model[1])
    assert repr(form) == (
        f"LinearForm(1 (1, 4, 4, 4): S = A·Y + B = {float(form.score):.4f} = {float(form.sums):.4f} + "
        f"{float(form.bias):.4f})"
    )
    assert len(repr(linear_form(model, x.repeat(50, 1, 1, 1), 1, model[1]))) < 200
    assert form._repr_html_().startswith("<table>")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_frozen_models_say_which_type_they_take(small: tuple[nn.Sequential, Tensor], dtype: torch.dtype) -> None:
    model, image = small
    frozen = freeze(model.double(), image.double())
    for use in (frozen, frozen.distance_to_boundary):
        with pytest.raises(ValueError, match=rf"of torch.float64 on cpu; got {dtype} on cpu\. Convert them first"):
            use(image.to(dtype))


def test_frozen_models_are_their_own_copies_and_are_not_pickled(small: tuple[nn.Sequential, Tensor]) -> None:
    frozen = freeze(*small)
    assert copy.deepcopy(frozen) is copy.copy(frozen) is frozen
    with pytest.raises(TypeError, match="frozen model must stay in its process"):
        pickle.dumps(frozen)


def test_forms_draw_themselves(small: tuple[nn.Sequential, Tensor]) -> None:
    model, x = small
    form = linear_form(model, x[:1], 1, model[1])
    _, axes = form.plot(x[0].sigmoid())
    assert axes.get_title() == (
        f"1\nS = Σ A·Y + B\n{float(form.score):.2f} = {float(form.sums):.2f} + {float(form.bias):.2f}"
    )
    assert (2 * form).plot(title="twice")[1].get_title() == "twice"
    with pytest.raises(ValueError, match=r"the layer must have a place in the image to be drawn.* got \(1, 5\)"):
        linear_form(model, x[:1], 1, model[3]).plot()


class Constant(nn.Module):
    """A layer is given a table in which live numbers were; the table changes afterwards, and so does its output."""

    def __init__(self, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.change = nn.Identity(), change

    def forward(self, x: Tensor) -> Tensor:
        table = torch.ones(x.shape, dtype=x.dtype)
        table[:, :2].copy_(x[:, :2])
        given = self.change(table, x)
        y = self.layer(given)
        table[:, 0] = 5.0
        z = y * 3 + x[:, : y.shape[1]]
        y[:, 0].mul_(2)
        return (z * y).sum((1, 2, 3)) + table.sum((1, 2, 3))


@pytest.mark.parametrize(
    "change",
    [
        lambda table, _: table.zero_(),
        lambda table, _: table.index_fill_(1, torch.tensor([0, 1]), 3.0),
        lambda table, _: table[:, 2:],
        lambda table, _: table,
        lambda table, x: table.copy_(x),
    ],
    ids=["emptied", "filled", "beside", "in part", "live"],
)
def test_layers_that_are_given_memory_in_which_live_numbers_were(
    change: Callable[[Tensor, Tensor], Tensor], small: tuple[nn.Sequential, Tensor]
) -> None:
    model, x = Constant(change), small[1]
    forms = linear_form(model, x, None, [None, model.layer])
    for form in forms:
        torch.testing.assert_close(form.sums + form.bias, form.score, **EXACT)
    leaf = x.clone().requires_grad_()
    zeros = torch.zeros_like(forms[1].activations)
    torch.testing.assert_close(freeze(model, x)(x, {model.layer: zeros}), forms[1].bias, **EXACT)
    torch.testing.assert_close(freeze(model, x)(x), model(leaf).detach(), **EXACT)


def attended(x: Tensor, queries: Tensor, values: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(queries, queries, values).sum((1, 2)) + 0 * x.sum((1, 2))


def test_what_attention_attends_to_may_be_constant_or_what_attends() -> None:
    x, table = torch.randn(2, 4, 6, dtype=torch.float64), torch.randn(2, 4, 6, dtype=torch.float64)
    form = linear_form(lambda x: attended(x, x, table), x)
    torch.testing.assert_close(form.coefficients, torch.zeros_like(x), rtol=0, atol=0)
    torch.testing.assert_close(form.bias, form.score, **EXACT)
    form = linear_form(lambda x: attended(x, table, x), x)
    torch.testing.assert_close(form.sums, form.score, **EXACT)


def test_a_layer_may_return_one_tensor_twice() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            doubled = 2 * x
            return doubled, doubled

    layer, x = Twice(), torch.randn(2, 3, dtype=torch.float64)
    form = linear_form(nn.Sequential(layer, Multiplied()), x, 1, layer)
    torch.testing.assert_close(form.sums, form.score, **EXACT)
    torch.testing.assert_close(form.score, 4 * x[:, 1] ** 2, **EXACT)


class Multiplied(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0] * pair[1]


def test_where_images_come_first_nothing_is_run_to_find_them(
    small: tuple[nn.Sequential, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = small
    monkeypatch.setattr("captum_scoremap.linear.explanation.image_axis", None)
    forms = linear_form(model, x, 1, [None, model[0], model[3]])
    for form in forms:
        torch.testing.assert_close(form.sums, form.score - form.bias, **EXACT)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, 2 * x


class WithClassToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.tokens, self.pair, self.head = nn.Conv2d(3, 4, 4, 4), nn.Identity(), Pair(), nn.Linear(4, 5)
        self.token = nn.Parameter(torch.ones(1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        one, other = self.pair(self.tokens(torch.cat([self.token.expand(len(x), -1, -1), tokens], 1)))
        return self.head((one + other).mean(1))


def test_what_is_drawn_of_tokens_and_of_several_images() -> None:
    model, x = WithClassToken().eval(), torch.rand(2, 3, 12, 12)
    form = linear_form(model, x[:1], 1, model.tokens)
    _, axes = form.plot()
    alone = float(form.sub_scores[0, 0].sum())
    assert axes.get_title().splitlines()[-1] == f"{alone:.2f} without a place"
    _, axes = linear_form(model, x, 1, model.tokens).plot()
    assert len(axes) == 2
    assert all("S =" not in one.get_title() for one in axes)
    with pytest.raises(ValueError, match=r"the layer must give one tensor to be drawn, got 2"):
        linear_form(model, x, 1, model.pair).plot()
    with pytest.raises(ValueError, match=r"must have a place in the image to be drawn, .* got \(1, 3\) at no"):
        linear_form(nn.Linear(3, 2), torch.rand(1, 3), 0).plot()


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda frozen, model, x: frozen(x[:1]), r"inputs must be shaped like those the model was frozen at, \[\(2, 3"),
        (lambda frozen, model, x: frozen((x, x)), r"inputs must be shaped like those .*; got \[\(2, .*, \(2, "),
        (lambda frozen, model, x: frozen(x, {nn.ReLU(): x}), r"outputs must name layers that ran, got a ReLU that did"),
        (lambda frozen, model, x: frozen.distance_to_boundary(x[:, :1]), r"direction must be shaped like the inputs, "),
        (lambda frozen, model, x: frozen.flipped(freeze(model, x[:1])), r"other must be the same model, .* same shape"),
        (lambda frozen, model, x: frozen.same_region(freeze(model[:1], x)), r"other must be the same model"),
    ],
)
def test_what_a_frozen_model_refuses(refused: Any, message: str, small: tuple[nn.Sequential, Tensor]) -> None:
    model, x = small
    with pytest.raises(ValueError, match=message):
        refused(freeze(model, x), model, x)


OUTPUT = r"outputs must hold tensors shaped like those that the Conv2d returned"


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (lambda y: (y, y), ValueError, rf"{OUTPUT}, \[(.*)\]; got \[\1, \1\]"),
        (lambda y: (), ValueError, rf"{OUTPUT}, .*; got \[\]"),
        (lambda y: None, TypeError, rf"{OUTPUT}, got NoneType. Pass tensors"),
        (lambda y: 0.0, TypeError, rf"{OUTPUT}, got float. Pass tensors"),
        (lambda y: [y.tolist()], TypeError, rf"{OUTPUT}, got list"),
        (lambda y: y[:1], ValueError, rf"{OUTPUT}, .*; got \[\(1, "),
        (lambda y: y[:, :, :1, :1], ValueError, rf"{OUTPUT}, .*; got \[\(2, .*, 1, 1\)\]"),
        (lambda y: y.half(), ValueError, rf"{OUTPUT}, of .*; got torch.float16 on .*Convert"),
    ],
)
def test_tensors_in_place_of_a_layers_outputs_are_like_them(
    given: Any, kind: type[Exception], message: str, small: tuple[nn.Sequential, Tensor]
) -> None:
    model, x = small
    frozen, y = freeze(model, x), model[0](x).detach()
    with pytest.raises(kind, match=message):
        frozen(x, {model[0]: given(y)})
    for fits in (y, (y,), [y]):
        torch.testing.assert_close(frozen(x, {model[0]: fits}), model(x))


def test_what_is_no_tensor_and_no_frozen_model_is_named(small: tuple[nn.Sequential, Tensor]) -> None:
    model, x = small
    frozen = freeze(model, x)
    for use, name in ((frozen, "inputs"), (frozen.distance_to_boundary, "direction")):
        for odd in ("a", [[1.0]], 3):
            with pytest.raises(TypeError, match=rf"{name} must be shaped like .*, got (str|list|int). Pass tensors"):
                use(odd)  # type: ignore[operator]
    for compare in (frozen.flipped, frozen.same_region):
        for other in (3, model, x):
            with pytest.raises(TypeError, match=rf"other must be a frozen model, got {type(other).__name__}\. Freeze"):
                compare(other)  # type: ignore[arg-type]


OURS: dict[str, tuple[Rule, Callable[[Tensor], Tensor]]] = {
    "mul": (Product(keeps_gates=True), lambda x: x * 2 + x * x),
    "addmm": (Product((1, 2), term=0), lambda x: torch.addmm(x[0, 0, :, :1], x[0, 1], x[1, 1], beta=0.5, alpha=3.0)),
    "div": (Division(), lambda x: 1 / (x + 9) + x / 3 + x / (x + 9)),
    "pow": (Power(), lambda x: x**2 + (x + 9) ** -0.5),
    "native_batch_norm": (
        BatchNorm(),
        lambda x: F.batch_norm(x, x.new_ones(3), x.new_ones(3)) + F.instance_norm(x[:1]),
    ),
    "native_layer_norm": (LayerNorm(), lambda x: F.layer_norm(x, (12,))),
    "native_group_norm": (GroupNorm(), lambda x: F.group_norm(x, 3)),
    "grid_sampler_2d": (
        FirstLinear(),
        lambda x: (
            F.grid_sample(x, torch.zeros(2, 4, 4, 2).to(x), align_corners=False).mean()
            + F.grid_sample(x, x[:, :2].movedim(1, -1).tanh(), align_corners=False).mean()
            + F.grid_sample(torch.ones_like(x), x[:, :2].movedim(1, -1).tanh(), align_corners=False).mean()
        ),
    ),
    "max_pool2d_with_indices": (MaxPool(2), lambda x: F.max_pool2d(x, 2) + F.max_pool2d(x, (2,), stride=(2, 2))),
    "maximum": (Choice(operator.ge), lambda x: torch.maximum(x, x.flip(1))),
    "amax": (Extremum(torch.argmax), lambda x: x.amax(1)),
    "where": (Linear(), lambda x: torch.where(x > 0, x, 2 * x)),
    "gt": (Comparison(), lambda x: x * (x > 0)),
    "round": (Frozen(), lambda x: x * x.round()),
    "silu": (Gate(0.5), F.silu),
    "exp": (Tangent(gate=True), lambda x: x.exp()),
}


@pytest.mark.parametrize("name", OURS)
def test_a_rule_of_ours_that_is_handed_over_gives_what_the_table_does(name: str, generator: torch.Generator) -> None:
    rule, function = OURS[name]
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64, generator=generator)

    def score(x: Tensor) -> Tensor:
        return function(x).sum()[None]

    form, expected = (linear_form(lambda x: score(x[0]), x[None], rules=rules) for rules in ({name: rule}, None))
    assert form == expected
    torch.testing.assert_close(form.residual, torch.zeros_like(form.residual), rtol=0, atol=1e-9)
    given, table = (bias_terms(lambda x: score(x[0]), x[None], rules=rules) for rules in ({name: rule}, None))
    assert given == table


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "inputs", "channel_dim"),
    [
        ((2, 8, 5, 7), (2, 3, 20, 28), 1),
        ((2, 5, 7, 8), (2, 3, 20, 28), -1),
        ((2, 4, 3, 2), (2, 3, 16, 12), 1),  # channels first, unless that cannot be
        ((2, 35, 8), (2, 3, 20, 28), -1),  # tokens
        ((36, 2, 8), (2, 3, 20, 28), -1),  # tokens first
        ((2, 600, 35), (2, 3, 20, 28), 1),  # a flattened map
        ((2, 8, 2, 5, 7), (2, 3, 4, 20, 28), 1),  # a video
        ((2, 2, 5, 7, 8), (2, 3, 4, 20, 28), -1),
        ((2, 8, 50), (2, 3, 50), 1),  # a signal
        ((2, 50, 8), (2, 50, 3), -1),  # a sequence
        ((2, 50, 8), (2, 50), -1),  # words
        ((2, 8), (2, 3, 20, 28), 1),
        ((2, 8, 1, 1), (2, 3, 20, 28), 1),
    ],
)
def test_channels_are_found(shape: tuple[int, ...], inputs: tuple[int, ...], channel_dim: int) -> None:
    assert channel_dim_of(shape, inputs) == channel_dim


@pytest.mark.parametrize("layout", ["images", "last", "tokens", "first"])
def test_maps_of_any_layout_without_a_word(layout: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.layer, self.head = nn.Conv2d(3, 8, 4, 4), nn.Identity(), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)  # (N, 8, 5, 5)
            x = {
                "images": lambda: self.layer(x.relu()),
                "last": lambda: self.layer(x.relu().movedim(1, -1)).movedim(-1, 1),
                "tokens": lambda: self.layer(x.relu().flatten(2).mT).mT.unflatten(2, (5, 5)),
                "first": lambda: self.layer(x.relu().flatten(2).permute(2, 0, 1)).permute(1, 2, 0).unflatten(2, (5, 5)),
            }[layout]()
            return self.head(x.mean((2, 3)))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Model().double().eval(), torch.randn(3, 3, 20, 20, dtype=torch.float64)
    expected = LayerScoreMap(model, model.conv).attribute(x, 1)
    method = LayerScoreMap(model, model.layer)
    score_map, delta = method.attribute(x, 1, return_convergence_delta=True)
    shapes = {"images": (3, 1, 5, 5), "last": (3, 5, 5, 1), "tokens": (3, 25, 1), "first": (25, 3, 1)}
    assert score_map.shape == shapes[layout]
    torch.testing.assert_close(delta, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(LayerScoreMap.interpolate(score_map, (5, 5)), expected, **EXACT)
    assert LayerScoreMap.interpolate(score_map, (20, 20)).shape == (3, 1, 20, 20)
    torch.testing.assert_close(linear_form(model, x, 1, model.layer).score_map(), score_map, **EXACT)
    several = method.attribute_targets(x, [1, 2])
    torch.testing.assert_close(several.select(1 if layout == "images" else -1, 0), score_map.squeeze(), **EXACT)
    neuron = NeuronScoreMap(model, model.head).attribute(x, 1, to_layer=model.layer, attr_dim_summation=True)
    torch.testing.assert_close(neuron, score_map, **EXACT)


def test_the_model_itself_goes_by_its_type(small: tuple[nn.Sequential, Tensor]) -> None:
    model, images = small
    assert "Sequential" in str(linear_form(model, images, 1, model))


def test_indices_have_a_form_from_a_layer_on() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 2)).double()
    indices = torch.tensor([[0, 4, 2], [1, 1, 3]])
    form = linear_form(model, indices, 1, model[0])
    torch.testing.assert_close(form.coefficients, model[2].weight[1].view(1, 3, 4).expand(2, 3, 4).detach())
    with pytest.raises(TypeError, match="inputs must"):
        linear_form(model, indices, 1)


def trained(model: nn.Module, image: Tensor) -> None:
    """A step of training."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(image).square().sum().backward()
    optimizer.step()


def loaded_again(model: nn.Module, image: Tensor) -> None:
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()})


def shifted(model: nn.Module, image: Tensor) -> None:
    with torch.no_grad():
        model[0].bias.add_(1)


def other_data(model: nn.Module, image: Tensor) -> None:
    model[0].weight.data = 2 * model[0].weight.data


def converted(model: nn.Module, image: Tensor) -> None:
    kind = image.dtype
    model.half()
    model.to(kind)


@pytest.mark.parametrize("change", [trained, loaded_again, shifted, other_data, converted])
def test_what_shares_weights_says_that_they_changed(
    small: tuple[nn.Sequential, Tensor], change: Callable[[nn.Module, Tensor], None]
) -> None:
    model, image = small
    early, late, frozen = linear_form(model, image, 1), linear_form(model, image, 1), freeze(model, image)
    before = early.complete_map()
    frozen(image)
    change(model, image)
    torch.testing.assert_close(early.complete_map(), before, rtol=0, atol=0)  # numbers that are there stay
    for use in (late.complete_map, lambda: late.placeless, lambda: pickle.dumps(late)):
        with pytest.raises(RuntimeError, match=r"weights must be as they were when the linear form was made, got \d"):
            use()
    for use in (lambda: frozen(image), lambda: frozen.distance_to_boundary(image)):
        with pytest.raises(RuntimeError, match=r"when the frozen model was made, got .*\. Freeze the model again"):
            use()
    assert freeze(model, image)(image).shape == model(image).shape
    form = linear_form(model, image, 1)
    torch.testing.assert_close(form.complete_map().sum((1, 2, 3)) + form.placeless, form.score)


def test_a_run_of_the_model_changes_nothing_for_a_frozen_one(small: tuple[nn.Sequential, Tensor]) -> None:
    model, image = small
    frozen, form = freeze(model, image), linear_form(model, image, 1)
    model(torch.rand_like(image)).sum().backward()
    model.requires_grad_(False)
    torch.testing.assert_close(frozen(image), model(image))
    torch.testing.assert_close(form.complete_map().sum((1, 2, 3)) + form.placeless, form.score)


def test_forms_are_pickled_and_copied_with_their_complete_map(small: tuple[nn.Sequential, Tensor]) -> None:
    model, image = small
    forms = linear_form(model, image, 1, layer=[None, model[0]])
    for copied in (pickle.loads(pickle.dumps(forms)), copy.deepcopy(forms)):
        assert copied == forms
        for one, other in zip(copied, forms, strict=True):
            torch.testing.assert_close(one.complete_map(), other.complete_map(), rtol=0, atol=0)
    contrast = pickle.loads(pickle.dumps(forms[0] - forms[0]))
    assert contrast == forms[0] - forms[0]
    with pytest.raises(ValueError, match="complete maps are those of a form of one layer"):
        contrast.complete_map()


@pytest.mark.parametrize("several", [tuple, iter, dict.fromkeys, lambda layers: dict(enumerate(layers)).values()])
def test_layers_may_come_in_anything_that_holds_them(
    several: Callable[[Any], Any], small: tuple[nn.Sequential, Tensor]
) -> None:
    model, image = small
    layers = list(model[:2])
    assert linear_form(model, image, 1, layer=several(layers)) == linear_form(model, image, 1, layer=layers)
    method = LayerScoreMap(model, several(layers))
    for maps in (method.attribute(image, 1), method.attribute(image, 1)):  # of an iterator, too, as often as one likes
        torch.testing.assert_close(maps, LayerScoreMap(model, layers).attribute(image, 1), rtol=0, atol=0)


def test_several_inputs_of_a_frozen_model_are_one_tuple() -> None:
    one, other = torch.rand(1, 3), torch.rand(1, 3)
    frozen = freeze(lambda x, y: x * y, (one, other))
    torch.testing.assert_close(frozen((one, other)), one * other)
    with pytest.raises(TypeError, match=r"outputs must map layers to tensors, got Tensor. Pass several inputs as one"):
        frozen(one, other)
