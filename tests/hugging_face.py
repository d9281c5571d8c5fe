"""Hugging Face's image classifiers, small: of each configuration what is large in it, made smaller."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
STAGES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
PATCHES = {"image_size": 32, "patch_size": 8, **TINY}

# What settings of any configuration become; with a number for each stage where the configuration has one.
PLAIN: Mapping[str, Any] = {**PATCHES, "num_labels": 3}
STAGED: Mapping[str, Any] = {
    **STAGES,
    "image_size": 64,
    "embed_dim": 8,
    "embed_dims": [8, 8, 16, 16],
    "embedding_size": 8,
    "num_attention_heads": [1, 1, 2, 2],
    "num_heads": [1, 1, 2, 2],
    "num_labels": 3,
}

WINDOWS = {"image_size": 32, "patch_size": 2, "depths": [1, 2], "num_heads": [2, 2], "window_size": 4}
LEVIT = {"hidden_sizes": [16, 16, 32], "num_attention_heads": [2, 2, 2], "key_dim": [4, 4, 4]}
LATENTS = {
    "num_latents": 4,
    "d_latents": 16,
    "num_self_attends_per_block": 1,
    "num_self_attention_heads": 2,
    "num_cross_attention_heads": 1,
}

# Settings of those that need others as well, by the name before ``ForImageClassification``.
OWN: Mapping[str, Mapping[str, Any]] = {
    "Bit": {"num_groups": 2},
    "Cvt": {"embed_dim": [8, 8, 16], "num_heads": [1, 2, 2], "depth": [1, 2, 3]},
    "DonutSwin": WINDOWS,
    "EfficientNet": {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320},
    "FocalNet": {
        "image_size": 32,
        "patch_size": 2,
        "depths": [1, 1],
        "hidden_sizes": [8, 16],
        "focal_levels": [2, 2],
        "focal_windows": [3, 3],
    },
    "HGNetV2": {
        "hidden_sizes": [16, 16, 16, 16],
        "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 16, 16, 16],
        "stage_mid_channels": [8, 8, 8, 8],
        "stage_out_channels": [16, 16, 16, 16],
        "stage_num_blocks": [1, 1, 1, 1],
        "stage_numb_of_layers": [1, 1, 1, 1],
    },
    "Hiera": {"depths": [1, 1, 1], "num_heads": [1, 1, 2], "masked_unit_size": [4, 4], "num_query_pool": 2},
    "ImageGPT": {"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 8},
    "Levit": LEVIT,
    "MobileNetV1": {"depth_multiplier": 0.25},
    "MobileNetV2": {"depth_multiplier": 0.25},
    "MobileViT": {"hidden_sizes": [8, 8, 16], "neck_hidden_sizes": [4, 8, 8, 8, 16, 16, 16]},
    "MobileViTV2": {
        "image_size": 64,
        "patch_size": 2,
        "width_multiplier": 0.25,
        "n_attn_blocks": [1, 1, 1],
        "base_attn_unit_dims": [16, 16, 16],
    },
    "Perceiver": LATENTS,
    "PPLCNet": {  # kernel, channels before and after, stride, squeezes
        "block_configs": [*[[[3, 8, 8, 1, False]]] * 2, *[[[3, 8, 8, 2, False], [5, 8, 8, 1, True]]] * 3],
        "stem_channels": 8,
        "class_expand": 32,
    },
    "RegNet": {"groups_width": 4},
    "ResNet": {"layer_type": "basic"},
    "ShieldGemma2": {
        "text_config": {**TINY, "vocab_size": 50, "num_key_value_heads": 1, "head_dim": 8},
        "mm_tokens_per_image": 4,
        "image_token_index": 40,
        "boi_token_index": 41,
        "eoi_token_index": 42,
        "yes_token_index": 7,
        "no_token_index": 8,
    },
    "Siglip2": {"vision_config": {**TINY, "num_patches": 16, "patch_size": 8}},
    "Swin": WINDOWS,
    "Swinv2": WINDOWS,
    "TextNet": {
        "stem_out_channels": 8,
        "hidden_sizes": [8, 8, 8, 16, 16],
        "conv_layer_kernel_sizes": [[[3, 3]], [[3, 1]], [[1, 3]], [[3, 3]]],
        "conv_layer_strides": [[1], [2], [2], [2]],
    },
    "TimmWrapper": {"architecture": "resnet18", "do_pooling": True},
}

# What computes a part in float32, whatever it is given: Gemma's norms.
IN_SINGLE_PRECISION = frozenset({"ShieldGemma2ForImageClassification"})
# What wants a package of kernels that is rarely there.
MISSING = frozenset() if find_spec("natten") else frozenset({"DinatForImageClassification"})


class Pixels(nn.Module):
    """A model of tokens, one for each pixel, from their embeddings on: an image of many channels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(inputs_embeds=x.flatten(2).transpose(1, 2).contiguous())


class Unfolded(nn.Module):
    """A model of patches that are cut out beforehand, of images of any proportions."""

    def __init__(self, model: nn.Module, side: int) -> None:
        super().__init__()
        self.model, self.side = model, side

    def forward(self, x: Tensor) -> Any:
        rows, columns = (size // self.side for size in x.shape[2:])
        patches = F.unfold(x, self.side, stride=self.side).unflatten(1, (3, self.side**2))
        mask = torch.ones(len(x), rows * columns, dtype=torch.int64)
        shapes = torch.tensor([[rows, columns]] * len(x))
        return self.model(patches.permute(0, 3, 2, 1).flatten(2), mask, shapes)  # color after color, pixel by pixel


class Called(nn.Module):
    """Images, beside what else a model takes: one row for all of them, or as many rows as there are for none."""

    def __init__(self, model: nn.Module, **others: Tensor) -> None:
        super().__init__()
        self.model, self.others = model, others

    def forward(self, x: Tensor) -> Any:
        rows = {name: one.repeat(len(x), 1) if len(one) == 1 else one for name, one in self.others.items()}
        return self.model(pixel_values=x, **rows)


def classifiers() -> list[str]:
    """Names of all image classifiers that the library chooses from by itself."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    names = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values()
    return [name for each in names for name in ([each] if isinstance(each, str) else each)]


def small(name: str) -> tuple[Callable[[], nn.Module], tuple[int, ...]]:
    """How to build a small one of a name, and the (C, H, W) of its images."""
    import transformers

    kind = getattr(transformers, name)
    family = name.partition("ForImageClassification")[0]
    settings = {**smaller(kind.config_class), **OWN.get(family, {})}

    def build() -> nn.Module:
        model: nn.Module = kind(kind.config_class(**settings))
        if family == "ImageGPT":
            return Pixels(model)
        if family == "Siglip2":
            return Unfolded(model, settings["vision_config"]["patch_size"])
        if family == "ShieldGemma2":
            return Called(model, input_ids=torch.tensor([[1, 41, 40, 40, 40, 40, 42, 3]]))
        return model

    if family == "ImageGPT":
        return build, (settings["n_embd"], 4, 4)
    size = settings.get("image_size") or settings.get("vision_config", {}).get("image_size") or 64
    return build, (3, *(size if isinstance(size, list) else [size, size]))


def smaller(kind: Any) -> dict[str, Any]:
    """Settings of a kind of configuration, and of those in it, that make it small."""
    usual = kind()
    names = set(inspect.signature(kind.__init__).parameters)
    sizes = STAGED if names & {"depths", "depth", "hidden_sizes"} else PLAIN
    found = {name: like(getattr(usual, name), size) for name, size in sizes.items() if hasattr(usual, name)}
    parts = {name: smaller(type(getattr(usual, name))) for name in kind.sub_configs if name in names}
    return {name: size for name, size in found.items() if name in names | {"num_labels"}} | parts


def like(usual: object, size: Any) -> Any:
    """A size, for each stage where the usual one is for each, else for all of them."""
    if isinstance(usual, Sequence):
        return [*size, *size[-1:] * len(usual)][: len(usual)] if isinstance(size, list) else [size] * len(usual)
    return size[-1] if isinstance(size, list) else size
