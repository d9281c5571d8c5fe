"""Layers that do not depend on the image: constants, which change nothing of what is found at the others."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

from captum_scoremap import LayerScoreMap, freeze, linear_form
from captum_scoremap.linear import check_exactness
from captum_scoremap.rules import TANGENT
from tests.between import EXACT, some_images

WORDS = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


class Encoders(nn.Module):
    """Scores as products of an image's features and those of texts, as CLIP has them; the texts are the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.image = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(64, 6))
        self.text = nn.Sequential(nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, 6))

    def forward(self, x: Tensor, words: Tensor = WORDS) -> Tensor:
        return self.image(self.conv(x)) @ self.text(words).T


class Scaled(nn.Module):
    """The numbers that something is combined with are a layer's."""

    def __init__(self, combined: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.text, self.combined = nn.Conv2d(3, 4, 3), nn.Embedding(4, 4), combined
        self.head = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.text(torch.arange(4)).abs() + 0.5
        return self.head(self.combined(self.conv(x), weights))


class Doubled(nn.Module):
    """Makes a weight of another one."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Masked(nn.Module):
    """A mask that a layer makes of the image, which is frozen."""

    class Mask(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x > 0).to(x)

    def __init__(self, *, is_added: bool = False) -> None:
        super().__init__()
        self.conv, self.text, self.is_added = nn.Conv2d(3, 4, 3), self.Mask(), is_added
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        mirrored = x.flip(3)
        return self.head(mirrored + self.text(mirrored) if self.is_added else x * self.text(x))


def written_over() -> nn.Module:
    def combined(x: Tensor, weights: Tensor) -> Tensor:
        x[:, 1:2] = weights
        return x

    return Scaled(combined)


def weighed() -> nn.Module:
    model = Scaled(lambda x, _: x)
    parametrize.register_parametrization(model.conv, "weight", Doubled())
    parametrize.register_parametrization(model.head[2], "weight", Doubled())
    model.text = model.conv.parametrizations.weight[0]
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "encoders": Encoders,
    "weights": weighed,
    "mask": Masked,
    "mask of a mirrored map": lambda: Masked(is_added=True),
    "product": lambda: Scaled(lambda x, w: x * w),
    "product in place": lambda: Scaled(lambda x, w: x.mul_(w)),
    "quotient": lambda: Scaled(lambda x, w: w / x.abs()),
    "matrix product": lambda: Scaled(lambda x, w: x @ w),
    "changed afterwards": lambda: Scaled(lambda x, w: (x * w) + w.mul_(3.0)),
    "changed by the image": lambda: Scaled(lambda x, w: x * w.expand(4, 4, 4).contiguous().mul_(x[:1].sum((0, 1)))),
    "interpolated": lambda: Scaled(lambda x, w: torch.lerp(x, w, x.sigmoid())),
    "attention": lambda: Scaled(lambda x, w: torch.softmax(x @ w, -1) @ w),
    "sum": lambda: Scaled(lambda x, w: x + w),
    "sum of a turned map": lambda: Scaled(lambda x, w: x.flip(3) + (w + x.flip(3).round())),
    "written over a part": written_over,
    "written over all but what is added": lambda: Scaled(lambda x, w: x + x.clone().copy_(w.expand_as(x))),
    "beside it": lambda: Scaled(lambda x, w: torch.cat([x[:, :2], w.expand_as(x)[:, 2:]], 1)),
}


def made(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[name]().double().eval()


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_explained_as_each_alone(name: str) -> None:
    """The linear form at a layer is the same whichever others are asked for, and that of the frozen model."""
    model, image = made(name), some_images(1)
    layers = [None, model.conv, *([] if name == "weights" else [model.text])]
    together = linear_form(model, image, 1, layers)
    frozen = freeze(model, image)
    for layer, form in zip(layers, together, strict=True):
        assert_close(form.sums + form.bias, form.score, **EXACT)
        if layer is not model.text:
            alone = linear_form(model, image, 1, layer)
            assert_close(form.coefficients, alone.coefficients, **EXACT)
            assert alone.coefficients.abs().max() > 1e-3
            assert_close(form.complete_map(), alone.complete_map(), **EXACT)
            assert_close(form.placeless, alone.placeless, **EXACT)
        if layer is not None:
            assert_close(frozen(image, {layer: torch.zeros_like(form.activations)})[:, 1], form.bias, **EXACT)
    assert_close(frozen(0 * image)[:, 1], together[0].bias, **EXACT)


@pytest.mark.parametrize("name", MODELS)
def test_the_table_of_all_layers_has_no_residual(name: str) -> None:
    assert check_exactness(made(name), some_images(1), 1, tolerance=1e-12).is_exact


def test_a_layer_that_makes_a_weight_may_stand_among_all_layers() -> None:
    model, image = made("weights"), some_images(1)
    weight = model.head[2].parametrizations.weight[0]
    one, none = LayerScoreMap(model, [model.conv, weight]).attribute(image, 1)
    assert_close(one, LayerScoreMap(model, model.conv).attribute(image, 1), **EXACT)
    assert not none.any()


@pytest.mark.parametrize("name", ["encoders", "product", "matrix product"])
def test_all_of_the_score_is_in_b_of_a_layer_that_is_but_a_factor(name: str) -> None:
    model, image = made(name), some_images(1)
    form = linear_form(model, image, 1, model.text)
    assert not form.coefficients.any()
    assert_close(form.bias, form.score)
    assert not LayerScoreMap(model, model.text).attribute(image, 1).any()


def test_a_factor_of_additional_arguments_is_warned_of_with_advice_that_works() -> None:
    model, image = made("encoders"), some_images(1)
    with pytest.warns(UserWarning, match="does not depend on the image, and is a constant factor"):
        assert not linear_form(model, image, 1, model.text, WORDS).coefficients.any()
    swapped = linear_form(lambda words, x: model(x, words).T, WORDS, 0, model.text, image)
    assert_close(swapped.sums + swapped.bias, model(image, WORDS)[0])
    assert swapped.coefficients.abs().max() > 1e-3
    both = linear_form(model, image, 1, [model.conv, model.text], WORDS)  # one of them is of the image
    assert both[0].coefficients.abs().max() > 1e-3


class Answers(nn.Module):
    """Scores of an image and a question in whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.words = nn.Conv2d(3, 4, 3), nn.Embedding(9, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor, question: Tensor) -> Tensor:
        features = self.conv(x).relu().mean((2, 3))
        return self.head(features * self.words(question).mean(1))


def test_a_question_among_the_inputs_is_a_constant_factor_as_among_additional_arguments() -> None:
    model, image, question = Answers().double().eval(), some_images(1), torch.tensor([[1, 5, 7]])
    alone = LayerScoreMap(model, model.conv).attribute(image, 1, question)
    one, none = LayerScoreMap(model, [model.conv, model.words]).attribute((image, question), 1)
    assert_close(one, alone, **EXACT)
    assert not none.any()
    with pytest.warns(UserWarning, match="make what it depends on the input, and the image an additional argument"):
        LayerScoreMap(model, model.words).attribute((image, question), 1)
    swapped = LayerScoreMap(lambda question, x: model(x, question), model.words)
    words, delta = swapped.attribute(question, 1, image, return_convergence_delta=True)
    assert words.abs().max() > 1e-3
    assert_close(delta, torch.zeros_like(delta), **EXACT)


def test_tangents_are_those_of_constant_layers_too() -> None:
    """Under `TANGENT` A is the gradient, at a layer that does not depend on the image as well."""
    model, image = made("encoders"), some_images(1)
    form = linear_form(model, image, 1, [model.conv, model.text], rules=TANGENT)
    seen: dict[nn.Module, Tensor] = {}
    for layer in (model.conv, model.text):
        layer.register_forward_hook(lambda module, _, output: seen.update({module: output}))
    gradients = torch.autograd.grad(model(image)[0, 1], list(map(seen.get, (model.conv, model.text))))
    for one, gradient in zip(form, gradients, strict=True):
        assert_close(one.coefficients, gradient, **EXACT)
        assert gradient.abs().max() > 1e-3
