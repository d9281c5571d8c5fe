"""Attribution methods side by side: ours, Captum's, pytorch-grad-cam's and zennit's, each as its authors recommend."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import captum.attr
import pytorch_grad_cam
import torch
import zennit.canonizers
import zennit.composites
import zennit.layer
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from timm.models._efficientnet_blocks import InvertedResidual
from torch import Tensor, nn

from captum_scoremap import FusedScoreMap, LayerScoreMap, ScoreMap
from captum_scoremap.metrics import Attribution

Method = Callable[[nn.Module], Attribution]

LAST = "bn2"  # output of the last convolution, after its ReLU6


class _ReLU6(nn.ReLU):
    """ReLU6 that guided backpropagation, which looks for ReLU, knows."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(0, 6)


def _with_relus(model: nn.Module) -> nn.Module:
    guided = copy.deepcopy(model)
    for module in list(guided.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(module, name, _ReLU6())
    return guided


class _ResidualCanonizer(zennit.canonizers.AttributeCanonizer):
    """Let LRP split the relevance at the sum of a residual block, as zennit does for ResNet."""

    def __init__(self) -> None:
        super().__init__(self._attributes)

    @classmethod
    def _attributes(cls, name: str, module: nn.Module) -> dict[str, Any] | None:
        if not (isinstance(module, InvertedResidual) and module.has_skip):
            return None
        return {"forward": cls._forward.__get__(module), "canonizer_sum": zennit.layer.Sum()}

    @staticmethod
    def _forward(self: InvertedResidual, x: Tensor) -> Tensor:
        inner = self.bn1(self.conv_pw(x))
        inner = self.bn2(self.conv_dw(inner))
        inner = self.bn3(self.conv_pwl(inner))
        total: Tensor = self.canonizer_sum(torch.stack([x, inner], dim=-1))
        return total


def _lrp(model: nn.Module) -> Attribution:
    composite = zennit.composites.EpsilonPlusFlat(canonizers=[_ResidualCanonizer()])

    def attribute(inputs: Tensor, target: Tensor) -> Tensor:
        image = inputs.clone().requires_grad_()
        with composite.context(model) as canonized:
            scores = canonized(image)
            one_hot = nn.functional.one_hot(target, scores.shape[1]).to(scores)
            (relevance,) = torch.autograd.grad(scores, image, one_hot * scores.detach())
        return relevance

    return attribute


def _captum(build: Callable[[nn.Module], captum.attr.Attribution], **options: Any) -> Method:
    def method(model: nn.Module) -> Attribution:
        attribution = build(model)

        def attribute(inputs: Tensor, target: Tensor) -> Tensor:
            image = inputs.clone().requires_grad_()  # Captum warns where it has to set this itself
            found: Tensor = attribution.attribute(image, target=target, **options)
            return found.detach()

        return attribute

    return method


def _cam(kind: Any) -> Method:
    def method(model: nn.Module) -> Attribution:
        with_gradients = copy.deepcopy(model).requires_grad_()  # FullGrad reads gradients of biases
        cam = kind(model=with_gradients, target_layers=[with_gradients.get_submodule(LAST)])

        def attribute(inputs: Tensor, target: Tensor) -> Tensor:
            labels = [ClassifierOutputTarget(label) for label in target.tolist()]
            return torch.from_numpy(cam(input_tensor=inputs.clone(), targets=labels))[:, None]

        return attribute

    return method


def _layer(name: str) -> Method:
    return _captum(lambda model: LayerScoreMap(model, model.get_submodule(name)))


METHODS: dict[str, Method] = {
    "FusedScoreMap": _captum(FusedScoreMap),
    "LayerScoreMap, last": _layer(LAST),
    "LayerScoreMap, 1/16": _layer("blocks.4"),
    "LayerScoreMap, 1/8": _layer("blocks.2"),
    "ScoreMap": _captum(ScoreMap),
    "Grad-CAM (Captum)": _captum(
        lambda model: captum.attr.LayerGradCam(model, model.get_submodule(LAST)), relu_attributions=True
    ),
    "GradCAM": _cam(pytorch_grad_cam.GradCAM),
    "HiResCAM": _cam(pytorch_grad_cam.HiResCAM),
    "LayerCAM": _cam(pytorch_grad_cam.LayerCAM),
    "GradCAM++": _cam(pytorch_grad_cam.GradCAMPlusPlus),
    "FullGrad": _cam(pytorch_grad_cam.FullGrad),
    "EigenCAM": _cam(pytorch_grad_cam.EigenCAM),
    "LRP (zennit)": _lrp,
    "Saliency": _captum(captum.attr.Saliency),
    "InputXGradient": _captum(captum.attr.InputXGradient),
    "IntegratedGradients": _captum(captum.attr.IntegratedGradients, n_steps=50, internal_batch_size=10),
    "GuidedBackprop": _captum(lambda model: captum.attr.GuidedBackprop(_with_relus(model))),
}
"""Name to a function that builds the method on a model; ``attribute(inputs, target) -> (N, C or 1, h, w)``."""
