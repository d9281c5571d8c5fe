"""The run that was: noise, counters and branches are those of the one run, and the model runs exactly once."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from captum_scoremap import LayerScoreMap, ScoreMap, bias_terms, freeze, linear_form
from captum_scoremap.linear import check_exactness
from tests.between import EXACT, Between, between, some_images

NOISE: dict[str, Callable[[Tensor], Tensor]] = {
    "randn_like": lambda x: x.relu() + torch.randn_like(x),
    "randn_like times": lambda x: x.relu() * torch.randn_like(x),
    "scaled by the image": lambda x: x + torch.randn_like(x) * (0.5 * x).exp(),
    "rand": lambda x: x.relu() + torch.rand(x.shape, dtype=x.dtype),
    "randn of the image's": lambda x: x.relu() * torch.randn(x.shape[1:], dtype=x.dtype),
    "rand_like": lambda x: x.relu() * torch.rand_like(x),
    "bernoulli": lambda x: x * torch.bernoulli(x.sigmoid()),
    "bernoulli in place": lambda x: x * torch.empty_like(x).bernoulli_(0.5),
    "normal": lambda x: x.relu() + torch.normal(0.0, 1.0, x.shape, dtype=x.dtype),
    "normal in place": lambda x: x.relu() + torch.zeros_like(x).normal_(),
    "uniform in place": lambda x: x.relu() * x.new_empty(x.shape).uniform_(0.5, 1),
    "exponential": lambda x: x.relu() * torch.empty_like(x).exponential_(),
    "dropout": lambda x: F.dropout(x, 0.5, training=True),
    "dropout of each image": lambda x: torch.vmap(lambda y: F.dropout(y, 0.5, True), randomness="different")(x),
    "the same dropout of each image": lambda x: torch.vmap(lambda y: F.dropout(y, 0.5, True), randomness="same")(x),
    "randn_like of each image": lambda x: torch.vmap(lambda y: y + torch.randn_like(y), randomness="different")(x),
    "dropout2d": lambda x: F.dropout2d(x.relu(), 0.5, training=True),
    "alpha dropout": lambda x: F.alpha_dropout(x.relu(), 0.3, training=True),
    "dropout in place": lambda x: F.dropout(x * 1, 0.5, training=True, inplace=True),
    "stochastic depth": lambda x: x + x.relu() * (torch.rand(len(x), 1, 1, 1, dtype=x.dtype) > 0.3),
    "gumbel softmax": lambda x: x * F.gumbel_softmax(x, dim=1),
    "gumbel softmax, hard": lambda x: x * F.gumbel_softmax(x, dim=1, hard=True),
    "multinomial": lambda x: x.flatten(1)[
        :, torch.multinomial(x.flatten(1)[0].softmax(0), 64, replacement=True)
    ].view_as(x),
    "randperm": lambda x: x.relu()[:, torch.randperm(4)],
    "randint": lambda x: x.relu()[:, torch.randint(4, (4,))],
    "Python's": lambda x: x.relu() * random.random(),
    "a distribution": lambda x: x + torch.distributions.Normal(x, x.sigmoid()).rsample(),
    "a sample": lambda x: x + torch.distributions.Normal(x, x.sigmoid()).sample(),
    "normal about it": lambda x: torch.normal(x, 0.5),
    "normal, as wide as it": lambda x: torch.normal(0.5, x.sigmoid()),
    "normal of both": lambda x: torch.normal(x[:, :1], x.sigmoid(), generator=torch.Generator().manual_seed(4)),
    "a gamma distribution": lambda x: x * torch.distributions.Gamma(x.exp(), 2.0).rsample(),
    "Dirichlet's": lambda x: x * torch.distributions.Dirichlet(x.exp()).rsample(),
    "a beta distribution": lambda x: x * torch.distributions.Beta(x.exp(), 2.0).rsample(),
    "a categorical": lambda x: x * torch.distributions.Categorical(logits=x.flatten(2)).sample()[..., None, None],
    "a generator": lambda x: x.relu() + torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(4)),
    "rrelu": lambda x: x + torch.rand_like(x) * F.leaky_relu(x, 0.2),
}

CALLS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "linear_form": lambda m, x: linear_form(m, x, 1),
    "linear_form of a layer": lambda m, x: linear_form(m, x, 1, m.conv),
    "bias_terms": lambda m, x: bias_terms(m, x, 1),
    "all labels": lambda m, x: LayerScoreMap(m, m.conv).attribute_targets(x),
    "delta": lambda m, x: LayerScoreMap(m, m.conv).attribute(x, 1, return_convergence_delta=True),
    "check_exactness": lambda m, x: check_exactness(m, x[:1], 1),
    "freeze": lambda m, x: freeze(m, x)(x),
}


def seeded() -> None:
    torch.manual_seed(5)
    random.seed(5)


@pytest.mark.parametrize("name", NOISE)
def test_noise_is_frozen(name: str) -> None:
    images, model = some_images(), between(NOISE[name])
    with torch.random.fork_rng():
        seeded()
        with torch.no_grad():
            expected = model(images)
        for site in (None, model.conv):
            seeded()
            form = linear_form(model, images, 1, site)
            assert_close(form.score, expected[:, 1], **EXACT)  # the noise of the plain run
            assert_close(form.sums + form.bias, form.score, **EXACT)
        seeded()
        assert_close(
            sum(bias_terms(model, images, 1).values(), torch.zeros(2).double()),
            linear_form_bias(model, images),
            **EXACT,
        )
        seeded()
        frozen = freeze(model, images)
        first = frozen(images)
        assert_close(first, expected, **EXACT)
        assert torch.equal(first, frozen(images))
        seeded()
        method = LayerScoreMap(model, model.conv)
        every = method.attribute_targets(images)
        seeded()
        assert_close(every[:, 1:2], method.attribute(images, 1), **EXACT)


def linear_form_bias(model: nn.Module, images: Tensor) -> Tensor:
    seeded()
    return linear_form(model, images, 1).bias


PIECEWISE = "randn_like|randn_like times|rand|rand_like|dropout|dropout2d|alpha dropout|stochastic depth|randperm|rrelu"


@pytest.mark.parametrize("name", PIECEWISE.split("|"))
def test_the_form_is_the_gradient_under_the_same_noise(name: str) -> None:
    images, model = some_images(), between(NOISE[name])
    with torch.random.fork_rng():
        seeded()
        leaf = images.clone().requires_grad_()
        model(leaf)[:, 1].sum().backward()
        seeded()
        found = linear_form(model, images, 1).coefficients
    assert_close(found, leaf.grad, **EXACT)


class Counter(nn.Module):
    """Runs differently every time, and remembers what it did."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        self.count += 1
        return x.relu() * self.count if self.runs % 2 else x.abs() * self.runs


class Switch(nn.Module):
    """A branch that the image decides."""

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            return x.relu()
        return x.abs() if bool((x[:, 0] > 0).any()) else x


class Loop(nn.Module):
    """As many steps as the image asks for, with one module in all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Conv2d(4, 4, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        steps = 0
        while x.norm() > 3 and steps < 5:
            x = self.step(x).relu() * 0.5
            steps += 1
        return x


class Routed(nn.Module):
    """A mixture of experts: each image goes to one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 3).double(), nn.ModuleList(nn.Conv2d(4, 4, 1).double() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x.mean((2, 3))).softmax(1).topk(2, 1)
        out = torch.zeros_like(x)
        for label, expert in enumerate(self.experts):
            rows, places = torch.where(chosen == label)
            if len(rows):
                out[rows] += weights[rows, places][:, None, None, None] * expert(x[rows])
        return out


class Running(nn.Module):
    """A state that each run moves on: a moving average of what passed."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(4, 1, 1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.average.mul_(0.9).add_(x.detach().mean((0, 2, 3))[:, None, None], alpha=0.1)
        return (x - self.average).relu()


STATEFUL: dict[str, Callable[[], nn.Module]] = {
    "counter": Counter,
    "branch": Switch,
    "loop": Loop,
    "routed": Routed,
    "shared": lambda: nn.Sequential(*[nn.LeakyReLU(0.3)] * 3),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_what_differs_between_runs_is_that_of_the_run(name: str) -> None:
    images = some_images()
    for site in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(2)
            model = between(STATEFUL[name]())
            torch.manual_seed(2)
            plain = between(STATEFUL[name]())
        with torch.no_grad():
            expected = plain(images)
        form = linear_form(model, images, 1, model.conv if site else None)
        assert_close(form.score, expected[:, 1], **EXACT)
        assert_close(form.sums + form.bias, form.score, **EXACT)


def test_state_that_a_run_moves_on_counts_in_the_run() -> None:
    images, model = some_images(1), between(Running())
    for _ in range(3):
        form = linear_form(model, images, 1)
        assert_close(form.sums + form.bias, form.score, **EXACT)


@pytest.mark.parametrize("name", CALLS)
def test_models_run_once(name: str) -> None:
    model = between(Counter())
    CALLS[name](model, some_images())
    assert model.function.runs == 1
    assert int(model.function.count) == 1


def test_layers_that_run_several_times_have_the_last_calls_map() -> None:
    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.act(x - 0.1) - 0.2) + x

    images, model = some_images(), between(Reused())
    with pytest.warns(UserWarning, match="runs 2 times"):
        form = linear_form(model, images, 1, model.function.act)
    assert_close(form.sums + form.bias, form.score, **EXACT)
    weight = model.head.weight[1].view(4, 4, 4)
    assert_close(form.coefficients, weight.expand_as(form.coefficients), **EXACT)


@pytest.mark.parametrize("name", ["randn_like", "dropout", "gumbel softmax", "bernoulli"])
def test_frozen_models_are_functions(name: str) -> None:
    images, model = some_images(), between(NOISE[name])
    with torch.random.fork_rng():
        frozen = freeze(model, images)
        other = torch.randn_like(images)
        assert torch.equal(frozen(other), frozen(other))
        middle = (frozen(images) + frozen(other)) / 2  # and affine ones
        assert_close(frozen((images + other) / 2), middle, **EXACT)


def test_maps_of_noise_draw_anew_with_every_call() -> None:
    images, model = some_images(), Between(lambda x: x * torch.randn_like(x)).double().eval()
    assert not torch.equal(ScoreMap(model).attribute(images, 1), ScoreMap(model).attribute(images, 1))


def test_noise_about_the_image_moves_with_it() -> None:
    """PyTorch's own derivative of torch.normal is zero."""
    image = torch.rand(1, 4, dtype=torch.float64)
    for noisy, slope in ((lambda x: torch.normal(x, 0.5), 1.0), (lambda x: torch.normal(3 * x, x), None)):
        form = linear_form(noisy, image, 2)
        slope = form.score / image[0, 2] if slope is None else slope
        assert_close(form.coefficients, torch.tensor([[0.0, 0.0, float(slope), 0.0]], dtype=torch.float64))


@pytest.mark.parametrize(
    "distribution",
    [
        torch.distributions.Dirichlet,
        lambda x: torch.distributions.Beta(x, 2 * x),
        lambda x: torch.distributions.Gamma(x, 2.0),
    ],
    ids=["Dirichlet", "beta", "gamma"],
)
def test_draws_move_with_their_parameters_as_for_autograd(
    distribution: Callable[[Tensor], torch.distributions.Distribution],
) -> None:
    image = torch.tensor([[0.7, 1.5, 2.0, 0.9]], dtype=torch.float64)

    def drawn(x: Tensor) -> Tensor:
        torch.manual_seed(6)
        return distribution(x).rsample()

    with torch.random.fork_rng():
        leaf = image.clone().requires_grad_()
        (expected,) = torch.autograd.grad(drawn(leaf)[:, 2].sum(), leaf)
        form = linear_form(drawn, image, 2)
    assert_close(form.coefficients, expected)
    assert_close(form.sums + form.bias, form.score)
