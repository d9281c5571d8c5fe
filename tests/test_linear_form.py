"""The linear form as an object: shares of the bias, contrasts, regions and their boundaries, rules of one's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from captum_scoremap import bias_terms, freeze, linear_form, token_grid
from captum_scoremap.rules import TANGENT, Tangent

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
    with pytest.raises(ValueError, match="same layer at the same image to be subtracted"):
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
    one_rule = linear_form(model, image, 2, rules={nn.functional.gelu: Tangent()})
    assert not torch.allclose(one_rule.bias, form.bias)
    assert not torch.allclose(one_rule.bias, linear_form(model, image, 2).bias)
    torch.testing.assert_close(one_rule.residual, torch.zeros(2, dtype=torch.float64), **EXACT)


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


def test_a_layer_that_does_not_depend_on_the_image_can_be_replaced_in_a_frozen_model() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Linear(2, 4)
            self.position = nn.Parameter(torch.ones(1, 2))

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.relu(self.table(self.position))

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
