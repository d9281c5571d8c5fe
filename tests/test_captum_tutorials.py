"""Four of Captum's own vision tutorials with our classes where theirs were, on random weights and small images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from captum import attr as captum
from captum.attr import visualization
from captum.attr._utils.lrp_rules import EpsilonRule
from captum.concept import TCAV, Concept
from captum.concept._utils.common import concepts_to_str
from captum.concept._utils.data_iterator import CustomIterableDataset, dataset_to_dataloader
from captum.metrics import sensitivity_max
from matplotlib.colors import LinearSegmentedColormap
from PIL import Image
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.testing import assert_close
from torchvision.transforms import functional as TF

from captum_scoremap import CompleteScoreMap, LayerScoreMap, ScoreMap
from tests.families import narrow
from tests.test_captum_tools import MeanDifference, drawn

EXACT = {"rtol": 1e-9, "atol": 1e-12}  # float64; sums in another order
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
SMOOTH_SQUARE = {"nt_type": "smoothgrad_sq", "nt_samples": 10}


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Weights, images and Captum's noise come from the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def initialized(model: nn.Module) -> nn.Module:
    """Weights with which scores neither fade nor grow through many layers, in float64."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    return model.double().eval()


def without_biases(model: nn.Module) -> nn.Module:
    """Doubling the image doubles the score, and methods that integrate or propagate agree with A·Y."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model


def pixels(attributions: Tensor) -> np.ndarray[Any, Any]:
    """What the tutorials hand to the visualization, which takes no gradient: rows, columns, channels."""
    return np.transpose(attributions.squeeze(0).cpu().detach().numpy(), (1, 2, 0))


def seeded(method: Any, *arguments: Any, **options: Any) -> Tensor:
    torch.manual_seed(1)
    return captum.NoiseTunnel(method).attribute(*arguments, **options).detach()


# --- CIFAR_TorchVision_Interpret: Saliency, Integrated Gradients, SmoothGrad, DeepLift ------------------------------


def lenet() -> nn.Module:
    convolutions = [nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2, 2), nn.Conv2d(6, 16, 5), nn.ReLU()]
    head = [nn.Linear(16 * 5 * 5, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)]
    return nn.Sequential(*convolutions, nn.MaxPool2d(2, 2), nn.Flatten(), *head)


@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks:UserWarning")  # Captum's DeepLift
def test_cifar() -> None:
    net, images = without_biases(initialized(lenet())), torch.rand(4, 3, 32, 32, dtype=torch.float64) * 2 - 1
    labels, index = torch.tensor([3, 8, 8, 0]), 3
    image = images[index].unsqueeze(0)
    image.requires_grad = True
    theirs = captum.IntegratedGradients(net)
    coefficients = ScoreMap(net, multiply_by_inputs=False).attribute(image, target=labels[index].item())
    assert_close(coefficients.abs(), captum.Saliency(net).attribute(image, target=labels[index].item()), **EXACT)

    found, delta = ScoreMap(net).attribute(image, target=labels[index], return_convergence_delta=True)
    assert_close(delta, torch.zeros(1, dtype=torch.float64), rtol=0, atol=1e-12)
    for method in (theirs, captum.DeepLift(net)):
        expected = method.attribute(image, target=labels[index], baselines=image * 0)
        assert_close(found, expected.detach(), **EXACT)

    options = {"target": labels[index], **SMOOTH_SQUARE, "stdevs": 0.2}
    smooth = [seeded(ScoreMap(net), image, **options), seeded(theirs, image, baselines=image * 0, **options)]
    assert_close(*smooth, rtol=1e-7, atol=1e-9)
    look = {"method": "blended_heat_map", "sign": "absolute_value", "outlier_perc": 10, "show_colorbar": True}
    overlays = [
        drawn(visualization.visualize_image_attr(pixels(one), pixels(image / 2 + 0.5), use_pyplot=False, **look)[1])
        for one in smooth
    ]
    assert overlays[0].max() > 0.9
    assert_close(*overlays, rtol=1e-6, atol=1e-6)


# --- TorchVision_Interpret: Integrated Gradients, SmoothGrad, Gradient SHAP, LRP --------------------------------------


@pytest.mark.parametrize("make", [ScoreMap, CompleteScoreMap])
def test_resnet(make: Callable[[nn.Module], Any]) -> None:
    model = torchvision.models.resnet18(weights=None).double().eval()
    photograph = torch.rand(3, 64, 64, dtype=torch.float64)
    image = TF.normalize(photograph, *IMAGENET).unsqueeze(0)
    label = torch.topk(torch.softmax(model(image), dim=1), 1)[1]
    label.squeeze_()
    method = make(model)
    found = method.attribute(image, target=label)
    assert found.shape == (1, 3 if make is ScoreMap else 1, 64, 64)
    if make is ScoreMap:
        expected = captum.InputXGradient(model).attribute(image.clone().requires_grad_(), target=label)
        assert_close(found, expected.detach(), **EXACT)
    else:
        _, placeless = method.attribute(image, target=label, return_placeless=True)
        assert_close(found.sum() + placeless, model(image)[:, label].detach(), **EXACT)

    smooth = seeded(method, image, target=label, **SMOOTH_SQUARE, stdevs=1e-7)
    assert_close(smooth, found.square(), rtol=1e-3, atol=float(found.square().max()) * 1e-4)

    colors = LinearSegmentedColormap.from_list("blue", [(0, "#ffffff"), (0.25, "#000000"), (1, "#000000")], N=256)
    _, axes = visualization.visualize_image_attr_multiple(
        pixels(found),
        pixels(photograph),
        ["original_image", "heat_map"],
        ["all", "positive"],
        cmap=colors,
        show_colorbar=True,
        use_pyplot=False,
    )
    assert drawn(axes[1]).max() == 1
    assert_close(drawn(axes[1]) > 0, found[0].sum(0) > 0)


class Vgg16(nn.Module):
    """With a head of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
        self.classifier = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


def test_vgg() -> None:
    """Without biases, relevance propagated by the epsilon rule is A·Y of the image as epsilon vanishes."""
    model, image, label = initialized(Vgg16()), torch.randn(1, 3, 32, 32, dtype=torch.float64), torch.tensor(7)
    method = CompleteScoreMap(model, "image")
    complete, placeless = method.attribute(image, target=label, return_placeless=True)
    assert_close(complete.sum() + placeless, model(image)[:, label].detach(), **EXACT)

    for module in without_biases(model).modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.MaxPool2d)):
            module.rule = EpsilonRule(epsilon=1e-14)
    expected = captum.LRP(model).attribute(image.requires_grad_(), target=label).detach()
    assert_close(method.attribute(image, target=label), expected.sum(1, keepdim=True), rtol=1e-7, atol=1e-10)


# --- Segmentation_Interpret: Grad-CAM of a layer, Feature Ablation ----------------------------------------------------


def test_segmentation() -> None:
    with narrow():
        fcn = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None).double().eval()
    photograph = torch.rand(3, 40, 56, dtype=torch.float64)
    image = TF.normalize(photograph, *IMAGENET).unsqueeze(0)
    image.requires_grad = True
    largest = torch.argmax(fcn(image)["out"], dim=1, keepdim=True)
    label, absent = int(largest.mode(dim=-1)[0].mode(dim=-1)[0]), next(k for k in range(21) if not (largest == k).any())

    def summed(inputs: Tensor) -> Tensor:
        """The scores of each class, over the pixels where it is the largest."""
        output = fcn(inputs)["out"]
        selected = torch.zeros_like(output[0:1]).scatter_(1, largest, 1)
        return (output * selected).sum(dim=(2, 3))

    layer = fcn.backbone.layer4[2].conv3
    method = LayerScoreMap(summed, layer)
    found, delta = method.attribute(image, target=label, return_convergence_delta=True)
    assert_close(delta, torch.zeros(1, dtype=torch.float64), rtol=0, atol=1e-9)
    activation = captum.LayerActivation(summed, layer).attribute(image)
    grad_cam = captum.LayerGradCam(summed, layer).attribute(image, target=label)
    assert found.shape == grad_cam.shape == (1, 1, *activation.shape[2:])
    expected = captum.LayerGradientXActivation(summed, layer).attribute(image, target=label).detach()
    assert_close(found, expected.sum(1, keepdim=True), **EXACT)
    assert not method.attribute(image, target=absent).any()  # no pixel is its own

    upsampled = captum.LayerAttribution.interpolate(found, image.shape[2:])
    _, axes = visualization.visualize_image_attr(found[0].permute(1, 2, 0).numpy(), sign="all", use_pyplot=False)
    assert drawn(axes).shape == found.shape[2:]
    _, axes = visualization.visualize_image_attr_multiple(
        upsampled[0].cpu().permute(1, 2, 0).detach().numpy(),
        original_image=photograph.permute(1, 2, 0).numpy(),
        signs=["all", "positive", "negative"],
        methods=["original_image", "blended_heat_map", "blended_heat_map"],
        use_pyplot=False,
    )
    assert not (drawn(axes[1]) * drawn(axes[2])).any()  # no cell is both

    def darker(inputs: Tensor) -> Tensor:
        return 0.9 * inputs

    moved = method.attribute(darker(image), target=label)
    expected = ((moved - found).norm() / found.norm()).reshape(1)
    assert_close(sensitivity_max(method.attribute, image, darker, n_perturb_samples=2, target=label), expected, **EXACT)

    complete, placeless = CompleteScoreMap(summed).attribute(image, target=label, return_placeless=True)
    assert_close(complete.sum() + placeless, summed(image)[:, label].detach(), **EXACT)


# --- TCAV_Image: Integrated Gradients of three layers as TCAV's method ------------------------------------------------


def read(path: str) -> Tensor:
    return TF.normalize(TF.to_tensor(Image.open(path).convert("RGB")), *IMAGENET)


def concept(folder: Path, number: int, name: str) -> Concept:
    """Eight image files of noise, in a range of the concept's own."""
    (folder / name).mkdir()
    for i in range(8):
        noise = torch.randint(20 * number, 20 * number + 120, (64, 64, 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / name / f"{i}.jpg")
    dataset = CustomIterableDataset(read, f"{folder / name}/")
    return Concept(id=number, name=name, data_iter=dataset_to_dataloader(dataset))


def slopes(model: nn.Module, layer: str, direction: Tensor, images: Tensor, label: int) -> Tensor:
    """The change of each image's score as the layer moves, by forward-mode differentiation."""
    with forward_ad.dual_level():

        def moved(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            return forward_ad.make_dual(output.detach(), direction.reshape(output[:1].shape).expand_as(output))

        handle = model.get_submodule(layer).register_forward_hook(moved)
        try:
            tangent = forward_ad.unpack_dual(model(images)[:, label]).tangent
        finally:
            handle.remove()
    assert tangent is not None
    return tangent.detach()


@pytest.mark.filterwarnings("ignore:You are using .torch.load. with .weights_only=False.:FutureWarning")  # PyTorch 2.5
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # PyTorch's own, in forward mode
def test_tcav(tmp_path: Path) -> None:
    """The share of images whose score rises as the layer moves toward a concept, for pairs of concepts and three."""
    layers = ["inception4c", "inception4d", "inception4e"]
    with narrow():
        model = torchvision.models.googlenet(weights=None, aux_logits=False, init_weights=False).eval()
    names = ["striped", "zigzagged", "dotted", "random_0", "random_1"]
    striped, zigzagged, dotted, first, second = (concept(tmp_path, number, name) for number, name in enumerate(names))
    method = LayerScoreMap(model, None, multiply_by_inputs=False)
    tcav = TCAV(model, layers, classifier=MeanDifference(), layer_attr_method=method, save_path=str(tmp_path))
    images, label = torch.randn(6, 3, 64, 64), 34
    for sets in ([[striped, first], [striped, second]], [[striped, zigzagged, dotted]]):
        scores = tcav.interpret(inputs=images, experimental_sets=sets, target=label, attr_dim_summation=False)
        for key, layer in ((concepts_to_str(concepts), layer) for concepts in sets for layer in layers):
            directions = tcav.cavs[key][layer].stats["weights"]
            expected = torch.stack([slopes(model, layer, one, images, label) for one in directions])
            assert_close(scores[key][layer]["sign_count"], (expected > 0).float().mean(1))
            assert_close(scores[key][layer]["magnitude"], expected.mean(1), rtol=1e-3, atol=1e-11)
