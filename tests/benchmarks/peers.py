"""Attribution methods side by side: ours and those of other packages, each as its authors recommend.

CAMs of one layer read the last one; those of several layers the last of each of the three coarsest resolutions, as
their papers do. Integrated gradients start from zero in 50 steps, Expected Gradients from 50 baselines drawn from
photographs that are not explained (Captum's ``GradientShap`` without noise). LRP is zennit's epsilon-plus-flat. zennit
1.0 asks for Python 3.11.11 or newer; on an older one pip installs 0.5.1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import captum.attr
import numpy
import pytorch_grad_cam
import torch
import torchcam.methods
import zennit.canonizers
import zennit.composites
import zennit.layer
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from timm.models._efficientnet_blocks import InvertedResidual
from torch import Tensor, nn

from captum_scoremap import CompleteScoreMap, FusedScoreMap, LayerScoreMap, ScoreMap
from captum_scoremap.layout import token_grid
from captum_scoremap.metrics import Attribution
from captum_scoremap.rules import TANGENT
from tests.benchmarks import transformers
from tests.benchmarks.subjects import Subject

Build = Callable[[Subject], Attribution]


@dataclass(frozen=True)
class Method:
    """An attribution method.

    Attributes:
        build: From a subject to ``attribute(inputs, target) -> (N, C or 1, h, w)``.
        in_logits: Whether sums of its signed map mean logits; others have no unit.
        passes: About how many forward and backward passes a map takes; slow methods see fewer images.
    """

    build: Build
    in_logits: bool = False
    passes: int = 1


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


def _lrp(subject: Subject) -> Attribution:
    model = subject.module
    composite = zennit.composites.EpsilonPlusFlat(canonizers=[_ResidualCanonizer()])

    def attribute(inputs: Tensor, target: Tensor) -> Tensor:
        image = inputs.clone().requires_grad_()
        with composite.context(model) as canonized:
            scores = canonized(image)
            one_hot = nn.functional.one_hot(target, scores.shape[1]).to(scores)
            (relevance,) = torch.autograd.grad(scores, image, one_hot * scores.detach())
        return relevance

    return attribute


def _captum(build: Callable[[Subject], captum.attr.Attribution], **options: Any) -> Build:
    def method(subject: Subject) -> Attribution:
        attribution = build(subject)

        def attribute(inputs: Tensor, target: Tensor) -> Tensor:
            image = inputs.clone().requires_grad_()  # Captum warns where it has to set this itself
            found: Tensor = attribution.attribute(image, target=target, **options)
            return found.detach()

        return attribute

    return method


def _of_model(kind: Callable[[nn.Module], captum.attr.Attribution], **options: Any) -> Build:
    return _captum(lambda subject: kind(subject.module), **options)


def _layer(place: int | None, **options: Any) -> Build:
    """Score map of the last layer of a resolution, or of the middle one of all layers, on its grid."""

    def build(subject: Subject) -> Attribution:
        name = subject.layers[len(subject.layers) // 2 if place is None else place]
        attribution = LayerScoreMap(subject.module, subject.module.get_submodule(name), **options)

        def attribute(inputs: Tensor, target: Tensor) -> Tensor:
            score_map = attribution.attribute(inputs, target, channel_dim=-1 if subject.tokens else 1)
            return token_grid(score_map) if subject.tokens else score_map

        return attribute

    return build


def _expected_gradients(subject: Subject, samples: int = 50, at_once: int = 10) -> Attribution:
    attribution = captum.attr.GradientShap(subject.module)

    def attribute(inputs: Tensor, target: Tensor) -> Tensor:
        baselines = nn.functional.interpolate(subject.others, inputs.shape[-2:], mode="bilinear")  # mosaics are larger
        with torch.random.fork_rng():
            torch.manual_seed(0)
            numpy.random.seed(0)  # noqa: NPY002  # Captum draws from this one
            parts = [
                attribution.attribute(inputs, baselines, n_samples=at_once, stdevs=0.0, target=target).detach()
                for _ in range(samples // at_once)
            ]
        return torch.stack(parts).mean(0)

    return attribute


def _cam(kind: Any, layers: slice = slice(-1, None)) -> Build:
    """A class of pytorch-grad-cam, on the last layer or some."""

    def build(subject: Subject) -> Attribution:
        model = copy.deepcopy(subject.module).requires_grad_()  # FullGrad reads gradients of biases
        cam = kind(model=model, target_layers=[model.get_submodule(name) for name in subject.layers[layers]])

        def attribute(inputs: Tensor, target: Tensor) -> Tensor:
            labels = [ClassifierOutputTarget(label) for label in target.tolist()]
            return torch.from_numpy(cam(input_tensor=inputs.clone(), targets=labels))[:, None]

        return attribute

    return build


def _finer_cam(subject: Subject) -> Attribution:
    model = copy.deepcopy(subject.module).requires_grad_()
    cam = pytorch_grad_cam.FinerCAM(model, [model.get_submodule(subject.layers[-1])])

    def attribute(inputs: Tensor, target: Tensor) -> Tensor:
        """The three labels of the most similar scores are compared with, which depends on the image: one at a time."""
        maps = [cam(image[None], target_idx=label) for image, label in zip(inputs, target.tolist(), strict=True)]
        return torch.from_numpy(numpy.concatenate(maps))[:, None]

    return attribute


def _torch_cam(kind: Any) -> Build:
    """A class of torch-cam, on the last layer of each resolution."""

    def build(subject: Subject) -> Attribution:
        model = copy.deepcopy(subject.module).requires_grad_()
        extractor = kind(model, list(subject.layers), enable_hooks=False)

        def attribute(inputs: Tensor, target: Tensor) -> Tensor:
            extractor.enable_hooks()
            try:
                with torch.enable_grad():
                    cams = extractor(target.tolist(), model(inputs))
            finally:
                extractor.disable_hooks()
            fused: Tensor = extractor.fuse_cams(cams).detach()
            return fused[:, None]

        return attribute

    return build


_OURS = {
    "CompleteScoreMap": Method(_of_model(CompleteScoreMap), in_logits=True),
    "FusedScoreMap": Method(_of_model(FusedScoreMap), passes=2),
    "LayerScoreMap, last": Method(_layer(-1), in_logits=True),
}
_PIXELS = {
    "ScoreMap": Method(_of_model(ScoreMap), in_logits=True),
    "InputXGradient": Method(_of_model(captum.attr.InputXGradient), in_logits=True),
    "IntegratedGradients": Method(
        _of_model(captum.attr.IntegratedGradients, n_steps=50, internal_batch_size=10), in_logits=True, passes=50
    ),
    "Expected Gradients": Method(_expected_gradients, in_logits=True, passes=50),
    "Saliency": Method(_of_model(captum.attr.Saliency)),
}
CONVOLUTIONAL: dict[str, Method] = {
    **_OURS,
    "LayerScoreMap, 1/16": Method(_layer(-2), in_logits=True),
    "LayerScoreMap, 1/8": Method(_layer(-3), in_logits=True),
    "Grad-CAM": Method(_cam(pytorch_grad_cam.GradCAM)),
    "Grad-CAM, signed (Captum)": Method(
        _captum(
            lambda subject: captum.attr.LayerGradCam(subject.module, subject.module.get_submodule(subject.layers[-1]))
        ),
        in_logits=True,
    ),
    "HiResCAM": Method(_cam(pytorch_grad_cam.HiResCAM)),
    "Grad-CAM++": Method(_cam(pytorch_grad_cam.GradCAMPlusPlus)),
    "EigenCAM": Method(_cam(pytorch_grad_cam.EigenCAM)),
    "LayerCAM": Method(_cam(pytorch_grad_cam.LayerCAM)),
    "LayerCAM, 3 layers": Method(_torch_cam(torchcam.methods.LayerCAM)),
    "RefineCAM": Method(_cam(pytorch_grad_cam.RefineCAM, slice(None)), passes=3),
    "Finer-CAM": Method(_finer_cam),
    "FullGrad": Method(_cam(pytorch_grad_cam.FullGrad)),
    "LRP (zennit)": Method(_lrp),  # biases keep what they take: its sum is 0.0004 of the score
    **_PIXELS,
    "GuidedBackprop": Method(_captum(lambda subject: captum.attr.GuidedBackprop(_with_relus(subject.module)))),
}
TRANSFORMER: dict[str, Method] = {
    "CompleteScoreMap": Method(_of_model(CompleteScoreMap), in_logits=True),
    "CompleteScoreMap, tangent": Method(
        _captum(lambda subject: CompleteScoreMap(subject.module, rules=TANGENT)), in_logits=True
    ),
    "FusedScoreMap": Method(_of_model(FusedScoreMap), passes=2),
    "LayerScoreMap, last": Method(_layer(-1), in_logits=True),
    "LayerScoreMap, middle": Method(_layer(None), in_logits=True),
    "LayerScoreMap, middle, tangent": Method(_layer(None, rules=TANGENT), in_logits=True),
    "AttnLRP (LXT)": Method(transformers.attention_lrp, in_logits=True),
    "LeGrad": Method(transformers.legrad),
    "Attention rollout": Method(transformers.rollout),
    **_PIXELS,
}


def methods(subject: Subject) -> dict[str, Method]:
    """Name to method, of those that such a network takes."""
    every = TRANSFORMER if subject.tokens else CONVOLUTIONAL
    return {name: one for name, one in every.items() if name != "LeGrad" or hasattr(subject.module, "classify")}
