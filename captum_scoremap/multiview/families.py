"""How the classifiers of torchvision and timm divide into features and head."""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from captum_scoremap.multiview.geometry import Pair

Parts = tuple[nn.Module, nn.Module]
_Named = tuple[str, nn.Module]


def divide(model: nn.Module) -> Parts:
    """Divide a classifier of a known family into features and head, made of its own layers.

    Args:
        model: A classifier of torchvision or timm.

    Returns:
        Features, from images to maps ``(N, C, h, w)``; and head, from a map of the size it was trained on to
        scores ``(N, K)``.

    Raises:
        unknown_family: A ValueError.
    """
    if hasattr(model, "forward_head"):
        parts = _divide_timm(model)
        if parts is not None:
            return parts
    else:
        for name in (base.__name__ for base in type(model).__mro__):
            if name in _FAMILIES:
                with suppress(AttributeError):  # of other layers, as another library's of that name
                    return _FAMILIES[name](model)
    raise unknown_family(model, "of a known family")


def native_size(model: nn.Module) -> Pair:
    """Return height and width of the images a classifier was trained on, in pixels."""
    configuration = getattr(model, "pretrained_cfg", None) or {}  # of timm
    usual = 299 if type(model).__name__ == "Inception3" else 224
    _, height, width = configuration.get("input_size") or (3, usual, usual)
    return height, width


def unknown_family(model: nn.Module, expected: str) -> ValueError:
    """Return the error that tells how to build a `MultiView` by hand."""
    return ValueError(
        f"model must be a convolutional classifier {expected} ({', '.join(_FAMILIES)}, or timm's with global "
        f"average pooling), got {type(model).__name__}. Build MultiView(features, head, window) by hand: "
        f"features turn images of any size into maps (N, C, h, w), head turns a window (N, C, *window) of a "
        f"map into scores (N, K). A network with a fixed grid of tokens, as ViT, has no such features: score "
        f"crops of the image."
    )


def _chain(layers: Iterable[_Named]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def _children(model: nn.Module) -> list[_Named]:
    """Return all layers of a module, also those that it holds twice."""
    return [(name, layer) for name, layer in model._modules.items() if layer is not None]


def _layers(model: nn.Module, name: str) -> list[_Named]:
    """Return the layers of a sequence, or the one layer that a user has put in its place."""
    layer = model.get_submodule(name)
    return _children(layer) if isinstance(layer, nn.Sequential) else [(name, layer)]


def _pooled(pooling: nn.Module, *layers: _Named) -> nn.Sequential:
    return _chain([("avgpool", pooling), ("flatten", nn.Flatten()), *layers])


def _resized(model: Any) -> Parts:
    """Pool to the size that the classifier takes."""
    return model.features, _pooled(model.avgpool, *_layers(model, "classifier"))


def _averaged(features: str) -> Callable[[Any], Parts]:
    """Average the map of one sequence."""

    def parts(model: Any) -> Parts:
        return getattr(model, features), _pooled(nn.AdaptiveAvgPool2d(1), *_layers(model, "classifier"))

    return parts


def _staged(stages: str) -> Callable[[Any], Parts]:
    """Call the stages in turn, average the map, end with the layer ``fc``."""

    def parts(model: Any) -> Parts:
        features = [(name, getattr(model, name)) for name in stages.split()]
        if getattr(model, "transform_input", False):
            features.insert(0, ("transform_input", _Function(model._transform_input)))
        return _chain(features), _pooled(nn.AdaptiveAvgPool2d(1), *_layers(model, "fc"))

    return parts


def _densenet(model: Any) -> Parts:
    """As `_averaged`, with a ReLU that ``forward`` calls as a function."""
    features = _chain([*_children(model.features), ("relu", nn.ReLU())])
    return features, _pooled(nn.AdaptiveAvgPool2d(1), *_layers(model, "classifier"))


def _convnext(model: Any) -> Parts:
    """Divide a ConvNeXt, whose classifier flattens by itself."""
    return model.features, _chain([("avgpool", model.avgpool), *_layers(model, "classifier")])


def _squeezenet(model: Any) -> Parts:
    """Score every cell, then average: the scores of cells are part of the features."""
    features = _chain([("features", model.features), ("classifier", model.classifier[:-1])])
    return features, _pooled(model.classifier[-1])


_GOOGLENET = """
    conv1 maxpool1 conv2 conv3 maxpool2 inception3a inception3b maxpool3 inception4a inception4b inception4c
    inception4d inception4e maxpool4 inception5a inception5b
"""
_INCEPTION = """
    Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 maxpool1 Conv2d_3b_1x1 Conv2d_4a_3x3 maxpool2
    Mixed_5b Mixed_5c Mixed_5d Mixed_6a Mixed_6b Mixed_6c Mixed_6d Mixed_6e Mixed_7a Mixed_7b Mixed_7c
"""
_FAMILIES: dict[str, Callable[[Any], Parts]] = {
    "AlexNet": _resized,
    "VGG": _resized,
    "SqueezeNet": _squeezenet,
    "ResNet": _staged("conv1 bn1 relu maxpool layer1 layer2 layer3 layer4"),
    "DenseNet": _densenet,
    "GoogLeNet": _staged(_GOOGLENET),
    "Inception3": _staged(_INCEPTION),
    "ShuffleNetV2": _staged("conv1 maxpool stage2 stage3 stage4 conv5"),
    "RegNet": _staged("stem trunk_output"),
    "MobileNetV2": _averaged("features"),
    "MobileNetV3": _averaged("features"),
    "EfficientNet": _averaged("features"),
    "MNASNet": _averaged("layers"),
    "ConvNeXt": _convnext,
}


class _Function(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


class _ForwardFeatures(_Function):
    """The features of a timm model: its ``forward_features``, with its layers under their own names."""

    def __init__(self, model: Any, head: set[str]) -> None:
        super().__init__(model.forward_features)
        for name, layer in _children(model):
            if name not in head:
                self.add_module(name, layer)


def _divide_timm(model: Any) -> Parts | None:
    """Divide a timm model at its one global average pooling: what stands behind it, in order, is the head."""
    poolings = [name for name, _ in model.named_modules() if name.rpartition(".")[2] == "global_pool"]
    owner = poolings[0].rpartition(".")[0] if len(poolings) == 1 else "."
    if "." in owner:
        return None
    pooling = model.get_submodule(poolings[0])
    if getattr(pooling, "pool_type", None) not in {"avg", "fast", "fastavg"}:
        return None
    layers = _children(model.get_submodule(owner))
    behind = layers[[name for name, _ in layers].index("global_pool") + 1 :]
    flattens = any(isinstance(part, nn.Flatten) or getattr(part, "flatten", None) is True for part in pooling.modules())
    head = [
        ("global_pool", nn.AdaptiveAvgPool2d(1)),
        *([("flat", nn.Flatten())] if flattens else []),
        *behind,
    ]
    before = {owner} if owner else {"global_pool", *dict(behind)}
    features: nn.Module = _ForwardFeatures(model, {*before, "pre_logits"})
    if isinstance(getattr(model, "pre_logits", None), nn.Module):  # VGG's fully-connected part, as convolutions
        features = _chain([("features", features), ("pre_logits", model.pre_logits)])
    return features, _chain(head)
