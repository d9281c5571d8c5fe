"""A small network of each family of torchvision's: every kind of layer that it has, joined as there, few and narrow.

What a network is made of decides whether its maps are right, not how much of it there is. So the check looks at every
layer of these, and the sweep at the networks that people use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from typing import Any
from unittest.mock import patch

from torch import nn
from torchvision import models
from torchvision.models import convnext, densenet, efficientnet, mobilenetv3, regnet, resnet, swin_transformer
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation import FCN
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.models.video import resnet as video

from tests.zoo import Entry, PixelScore, entry

LABELS = 10
SIZED = (nn.Conv2d, nn.Conv3d, nn.Linear, nn.BatchNorm2d, nn.BatchNorm3d)
SIZES = {"in_channels", "out_channels", "in_features", "out_features", "num_features", "groups"}


@contextmanager
def narrow(divisor: int = 8) -> Iterator[None]:
    """Layers made meanwhile have so many times fewer channels; numbers that it does not divide stay as they are."""

    def narrowed(build: Callable[..., None]) -> Callable[..., None]:
        def made(*args: Any, **kwargs: Any) -> None:
            asked = signature(build).bind(*args, **kwargs)
            for name in SIZES & asked.arguments.keys():
                quotient, rest = divmod(asked.arguments[name], divisor)
                asked.arguments[name] = asked.arguments[name] if rest else quotient
            build(*asked.args, **asked.kwargs)

        return made

    with ExitStack() as stack:
        for kind in SIZED:
            stack.enter_context(patch.object(kind, "__init__", narrowed(kind.__init__)))
        yield


def narrowed(build: Callable[[], nn.Module]) -> nn.Module:
    with narrow():
        return build()


def small_densenet() -> nn.Module:
    return densenet.DenseNet(8, (2, 2, 1, 2), 16, bn_size=2, num_classes=LABELS)


def small_shufflenet() -> nn.Module:
    return models.ShuffleNetV2([2, 2, 2], [8, 16, 32, 64, 64], num_classes=LABELS)


def small_mobilenet_v2() -> nn.Module:
    settings = [[1, 8, 1, 1], [6, 8, 2, 2], [6, 16, 2, 2]]
    return models.MobileNetV2(LABELS, width_mult=0.5, inverted_residual_setting=settings)


def small_mobilenet_v3() -> nn.Module:
    block = mobilenetv3.InvertedResidualConfig
    settings = [
        block(16, 3, 16, 16, True, "RE", 2, 1, 1.0),
        block(16, 3, 32, 24, False, "RE", 2, 1, 1.0),
        block(24, 5, 32, 24, True, "HS", 1, 1, 1.0),
        block(24, 5, 48, 32, True, "HS", 1, 2, 1.0),  # dilated
    ]
    return models.MobileNetV3(settings, 64, LABELS)


def small_efficientnet() -> nn.Module:
    block = efficientnet.MBConvConfig
    settings = [block(1, 3, 1, 16, 8, 1), block(6, 3, 2, 8, 16, 2), block(6, 5, 2, 16, 24, 2)]
    return models.EfficientNet(settings, 0.2, num_classes=LABELS)


def small_regnet(se_ratio: float | None) -> nn.Module:
    return models.RegNet(regnet.BlockParams([1, 2], [16, 32], [8, 8], [1.0, 1.0], [2, 2], se_ratio), LABELS)


def small_convnext() -> nn.Module:
    block = convnext.CNBlockConfig
    return models.ConvNeXt([block(16, 32, 2), block(32, 48, 1), block(48, None, 1)], num_classes=LABELS)


def small_swin(version: int, labels: int = LABELS) -> nn.Module:
    """Windows that do not divide the map: it is padded, and shifted in every other block."""
    kinds: dict[str, Any] = {}
    if version == 2:
        kinds["block"] = swin_transformer.SwinTransformerBlockV2
        kinds["downsample_layer"] = swin_transformer.PatchMergingV2
    return models.SwinTransformer([4, 4], 12, [2, 2, 1], [1, 2, 3], [3, 3], num_classes=labels, **kinds)


def small_resnet(labels: int = LABELS) -> nn.Module:
    with narrow():
        return resnet.ResNet(resnet.BasicBlock, [2, 1, 1, 1], num_classes=labels)


def small_segmentation() -> nn.Module:
    backbone = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], replace_stride_with_dilation=[False, True, True])
    features = IntermediateLayerGetter(backbone, {"layer4": "out"})
    return PixelScore(FCN(features, FCNHead(2048, LABELS), None), 20, 30)


def small_video_network() -> nn.Module:
    return video.VideoResNet(video.BasicBlock, [video.Conv3DSimple] * 4, [1, 1, 1, 1], video.BasicStem, LABELS)


def with_fewer_channels(name: str) -> Entry:
    whole = entry(name)
    return Entry(whole.zoo, f"narrow {name}", partial(narrowed, whole.build), whole.shape)


def small(name: str, build: Callable[[], nn.Module], *shape: int) -> Entry:
    return Entry("torchvision", f"small {name}", build, (3, *shape))


PIECEWISE_LINEAR = (
    with_fewer_channels("alexnet"),
    with_fewer_channels("vgg11_bn"),
    entry("resnet18"),
    small("densenet", small_densenet, 32, 32),
    with_fewer_channels("squeezenet1_1"),
    with_fewer_channels("googlenet"),
    with_fewer_channels("inception_v3"),
    small("shufflenet", small_shufflenet, 32, 32),
    with_fewer_channels("mnasnet1_0"),
    small("mobilenet_v2", small_mobilenet_v2, 32, 32),
    small("regnet_x", partial(small_regnet, None), 32, 32),
    small("fcn_resnet", partial(narrowed, small_segmentation), 40, 40),
    small("r3d", partial(narrowed, small_video_network), 3, 12, 12),
)
SMOOTH = (
    small("convnext", small_convnext, 32, 32),
    small("efficientnet", small_efficientnet, 64, 64),
    entry("small maxvit"),
    small("mobilenet_v3", small_mobilenet_v3, 64, 64),
    small("regnet_y", partial(small_regnet, 0.25), 32, 32),
    small("swin", partial(small_swin, 1), 32, 32),
    small("swin_v2", partial(small_swin, 2), 32, 32),
    entry("small vit"),
)
