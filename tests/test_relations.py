"""How score maps relate to other methods: where they are equal, and that they differ elsewhere.

Each row of the table "Relations to other methods" in README.md is a test here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum import attr as captum
from captum.attr._utils.lrp_rules import EpsilonRule, GammaRule
from torch import Tensor, nn
from torch.testing import assert_close

from captum_scoremap import LayerScoreMap, ScoreMap, bias_terms, linear_form

EXACT = {"rtol": 1e-10, "atol": 1e-10}  # float64, in logits of the order of one


def network(
    activation: Callable[[], nn.Module] = nn.ReLU,
    *,
    bias: bool = True,
    pool: Callable[[], nn.Module] = lambda: nn.MaxPool2d(2),
    head: bool = False,
) -> Any:
    """Two convolutions, a pooling and a linear layer; with ``head`` global average pooling before it."""
    generator = torch.Generator().manual_seed(0)
    top = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3, bias=bias)]
    flat = [nn.Flatten(), nn.Linear(24, 3, bias=bias)]
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=bias),
        activation(),
        pool(),
        nn.Conv2d(4, 6, 2, bias=bias),
        activation(),
        *(top if head else flat),
    ).double()
    for value in model.parameters():
        value.data = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        value.data /= value[0].numel() ** 0.5
    return model.eval()


class Standardize(nn.Module):
    """A norm."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[1:])


def images() -> Tensor:
    return torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def quietly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """Captum warns of the gradients and hooks that it sets."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs).detach()


def assert_differ(found: Tensor, other: Tensor) -> None:
    """By more than a fiftieth of the larger one's norm."""
    assert found.shape == other.shape
    assert (found - other).norm() > 0.02 * max(found.norm(), other.norm())


LABEL = 1
LAST = 4  # the activation below the head


# --- gradient times input or activation ------------------------------------------------------------------------------


KINDS = [(nn.ReLU, True), (lambda: nn.LeakyReLU(0.2), True), (nn.GELU, False), (Standardize, False)]


@pytest.mark.parametrize("layer", range(5))
def test_layer_gradient_x_activation(layer: int) -> None:
    """Equal for piecewise-linear networks; differs below what is not linear."""
    for activation, piecewise_linear in KINDS:
        equal = piecewise_linear or layer == LAST
        model = network(activation)
        sub_scores = LayerScoreMap(model, model[layer]).attribute(images(), LABEL, attr_dim_summation=False)
        peer = captum.LayerGradientXActivation(model, model[layer]).attribute(images(), LABEL).detach()
        if equal:
            assert_close(sub_scores, peer, **EXACT)
        else:
            assert_differ(sub_scores, peer)


def test_input_x_gradient() -> None:
    """Equal for piecewise-linear networks; for others only sub-scores and B add up to the score."""
    model = network()
    assert_close(ScoreMap(model).attribute(images(), LABEL), quietly(gradient_x_input, model), **EXACT)
    model = network(nn.GELU)
    form = linear_form(model, images(), LABEL)
    assert isinstance(form.sub_scores, Tensor)
    assert_differ(form.sub_scores, quietly(gradient_x_input, model))
    assert_close(form.residual, torch.zeros(2, dtype=torch.float64), **EXACT)


def gradient_x_input(model: nn.Module) -> Tensor:
    return captum.InputXGradient(model).attribute(images(), LABEL)


# --- class activation maps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU])
def test_grad_cam(activation: Callable[[], nn.Module]) -> None:
    """Equal where global average pooling and a linear layer follow: the coefficients of a channel are all the same."""
    model = network(activation, head=True)
    ours, peer = LayerScoreMap(model, model[LAST]), captum.LayerGradCam(model, model[LAST])
    assert_close(ours.attribute(images(), LABEL), peer.attribute(images(), LABEL).detach(), **EXACT)
    positive = peer.attribute(images(), LABEL, relu_attributions=True).detach()
    assert_close(ours.attribute(images(), LABEL, relu_attributions=True), positive, **EXACT)


@pytest.mark.parametrize(("head", "layer"), [(True, 1), (False, LAST)], ids=["lower layer", "flatten"])
def test_grad_cam_differs_elsewhere(head: bool, layer: int) -> None:
    model = network(head=head)
    peer = captum.LayerGradCam(model, model[layer]).attribute(images(), LABEL).detach()
    assert_differ(LayerScoreMap(model, model[layer]).attribute(images(), LABEL), peer)


def gradients(model: nn.Module, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Activations of a layer and the score's gradient in them, by autograd alone."""
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda *call: kept.append(call[2]))
    try:
        score = model(images().requires_grad_())[:, LABEL].sum()
    finally:
        handle.remove()
    return kept[0].detach(), torch.autograd.grad(score, kept[0])[0]


@pytest.mark.parametrize("layer", range(5))
def test_hires_cam(layer: int) -> None:
    """sum_k g_k · Y_k (Draelos and Carin 2020, Eq. 4): equal for piecewise-linear networks."""
    for activation, piecewise_linear in KINDS:
        equal = piecewise_linear or layer == LAST
        model = network(activation)
        activations, gradient = gradients(model, model[layer])
        score_map = LayerScoreMap(model, model[layer]).attribute(images(), LABEL)
        check = assert_close if equal else assert_differ
        check(score_map, (gradient * activations).sum(1, keepdim=True), **(EXACT if equal else {}))


def test_pytorch_grad_cam() -> None:
    """Its maps are score maps, rectified and scaled, where theory says so; its layer has the image's size here."""
    cams = pytest.importorskip("pytorch_grad_cam")
    targets = [pytest.importorskip("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget(LABEL)] * 2
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    ).eval()
    for value in model.parameters():
        value.data = torch.randn(value.shape, generator=generator)
    score_map = LayerScoreMap(model, model[1]).attribute(images().float(), LABEL, relu_attributions=True)
    scaled = score_map - score_map.amin((1, 2, 3), keepdim=True)
    scaled /= scaled.amax((1, 2, 3), keepdim=True)
    for cls in (cams.GradCAM, cams.HiResCAM):
        with cls(model, [model[1]]) as method:
            found = torch.from_numpy(method(images().float(), targets))
        assert_close(scaled[:, 0], found, rtol=0, atol=1e-5)


def test_layer_cam() -> None:
    """sum_k relu(g_k) · Y_k (Jiang et al. 2021, Eq. 4-5): leaves out the channels that speak against the label."""
    model = network()
    activations, gradient = gradients(model, model[LAST])
    layer_cam = (gradient.relu() * activations).sum(1, keepdim=True)
    form = linear_form(model, images(), LABEL, model[LAST])
    assert isinstance(form.coefficients, Tensor)
    assert isinstance(form.activations, Tensor)
    assert_differ(form.score_map(), layer_cam)  # type: ignore[arg-type]
    for_label = form.coefficients.clamp(min=0) * form.activations
    assert_close(for_label.sum(1, keepdim=True), layer_cam, **EXACT)
    against = (form.coefficients.clamp(max=0) * form.activations).sum(1, keepdim=True)
    assert_close(form.score_map(), layer_cam + against, **EXACT)


def test_layer_cam_is_equal_where_nothing_speaks_against() -> None:
    model = network()
    model[-1].weight.data.abs_()
    activations, gradient = gradients(model, model[LAST])
    score_map = LayerScoreMap(model, model[LAST]).attribute(images(), LABEL)
    assert_close(score_map, (gradient.relu() * activations).sum(1, keepdim=True), **EXACT)


# --- propagation -----------------------------------------------------------------------------------------------------


def relevance(model: nn.Sequential, rule: Callable[[], Any]) -> Tensor:
    """Captum's LRP with one rule for all layers that have weights; the others only pass relevance on."""
    for module in model:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.rule = rule()
        elif isinstance(module, nn.Flatten):
            module.rule = EpsilonRule(1e-14)
    return quietly(captum.LRP(model).attribute, images(), LABEL)


@pytest.mark.parametrize("bias", [False, True])
def test_lrp_0(bias: bool) -> None:
    """Equal for ReLU networks: LRP-0 (epsilon 0) multiplies and divides by the same pre-activations."""
    sub_scores = ScoreMap(network(bias=bias)).attribute(images(), LABEL)
    assert_close(relevance(network(bias=bias), lambda: EpsilonRule(1e-14)), sub_scores, rtol=1e-8, atol=1e-8)
    score = network(bias=bias)(images())[:, LABEL].detach()
    if bias:
        assert_differ(sub_scores.flatten(1).sum(1), score)  # the biases' share is in B
    else:
        assert_close(sub_scores.flatten(1).sum(1), score, **EXACT)


def test_lrp_0_of_zennit() -> None:
    attribution = pytest.importorskip("zennit.attribution")
    core, rules = pytest.importorskip("zennit.core"), pytest.importorskip("zennit.rules")
    model = network()

    def rule_of(_context: Any, _name: str, module: nn.Module) -> Any:
        return rules.Epsilon(1e-14) if isinstance(module, (nn.Conv2d, nn.Linear)) else None

    with attribution.Gradient(model, core.Composite(rule_of)) as method:
        _, found = method(images(), lambda output: torch.eye(3)[LABEL].to(output) * output)
    assert_close(ScoreMap(model).attribute(images(), LABEL), found, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rule", [lambda: EpsilonRule(0.25), lambda: GammaRule(0.25)], ids=["epsilon", "gamma"])
def test_other_lrp_rules_differ(rule: Callable[[], Any]) -> None:
    assert_differ(ScoreMap(network()).attribute(images(), LABEL), relevance(network(), rule))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.ELU])
def test_deep_lift(activation: Callable[[], nn.Module]) -> None:
    """Equal with a zero baseline and no biases: then f(x)/x is the ratio of differences, for gates too."""
    model = network(activation, bias=False)
    sub_scores = ScoreMap(model).attribute(images(), LABEL)
    assert_close(sub_scores, quietly(captum.DeepLift(model).attribute, images(), target=LABEL), **EXACT)


@pytest.mark.parametrize(
    ("bias", "baseline"), [(True, 0.0), (False, 0.5)], ids=["with biases", "with another baseline"]
)
def test_deep_lift_differs(bias: bool, baseline: float) -> None:
    model = network(bias=bias)
    peer = quietly(captum.DeepLift(model).attribute, images(), torch.full_like(images(), baseline), LABEL)
    assert_differ(ScoreMap(model).attribute(images(), LABEL), peer)


def test_integrated_gradients() -> None:
    """Equal with a zero baseline for piecewise-linear networks without biases: the whole ray lies in one region."""
    model = network(bias=False)
    peer = quietly(captum.IntegratedGradients(model).attribute, images(), 0, LABEL, n_steps=3)
    # Captum's quadrature weights are float32
    assert_close(ScoreMap(model).attribute(images(), LABEL), peer, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("activation", "bias", "baseline"),
    [(nn.ReLU, True, 0.0), (nn.ReLU, False, 0.5), (nn.Tanh, False, 0.0)],
    ids=["with biases", "with another baseline", "with a gate"],
)
def test_integrated_gradients_differ(activation: Callable[[], nn.Module], bias: bool, baseline: float) -> None:
    model = network(activation, bias=bias)
    peer = quietly(captum.IntegratedGradients(model).attribute, images(), baseline, LABEL, n_steps=50)
    assert_differ(ScoreMap(model).attribute(images(), LABEL), peer)


# --- FullGrad --------------------------------------------------------------------------------------------------------


def test_full_grad_splits_the_score_alike() -> None:
    """The gradient times x, and times every bias (Srinivas and Fleuret 2019, Prop. 1): for piecewise-linear ones."""
    model = network()
    score = model(images())[:, LABEL]
    terms = bias_terms(model, images(), LABEL)
    total = ScoreMap(model).attribute(images(), LABEL).flatten(1).sum(1)
    for name in ("0", "3", "6"):
        bias = model[int(name)].bias
        each = [torch.autograd.grad(one, bias, retain_graph=True)[0] @ bias.detach() for one in score]
        assert_close(terms[name], torch.stack(each), **EXACT)
        total = total + terms[name]
    assert_close(total, score.detach(), **EXACT)


def test_full_grad_saliency_is_another_map() -> None:
    """Its saliency adds absolute, rescaled values of all layers (Eq. 5), so it does not add up to the score."""
    model = network()
    parts = [(images(), torch.autograd.grad(score_of(model, x := images().requires_grad_()), x)[0])]
    for layer in (0, 3):
        _, gradient = gradients(model, model[layer])
        parts.append((model[layer].bias.detach()[:, None, None], gradient))
    saliency = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    for value, gradient in parts:
        product = (value * gradient).abs()
        low, high = product.amin((1, 2, 3), keepdim=True), product.amax((1, 2, 3), keepdim=True)
        scaled = nn.functional.interpolate((product - low) / (high - low), (8, 8), mode="bilinear")
        saliency += scaled.sum(1, keepdim=True)
    assert (saliency >= 0).all()
    assert_differ(ScoreMap(model).attribute(images(), LABEL).sum(1, keepdim=True), saliency)


def score_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)[:, LABEL].sum()
