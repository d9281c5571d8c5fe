"""Models of Hugging Face's, small: classifiers, detectors, segmentation, images with text, text and sound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from . import Case

transformers = pytest.importorskip("transformers")

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
STAGES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}


def of(name: str, side: int = 32, **settings: Any) -> Callable[[], tuple[nn.Module, Tensor]]:
    """A model by the name of its class, its configuration's by that of the family."""

    def build() -> tuple[nn.Module, Tensor]:
        kind = getattr(transformers, name)
        return kind(kind.config_class(**settings)), torch.randn(2, 3, side, side, dtype=torch.float64)

    return build


class Images(nn.Module):
    """CLIP's and SigLIP's similarities of images with fixed texts."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(input_ids=torch.tensor([[1, 2, 3, 5], [4, 3, 2, 5], [6, 2, 2, 5]]), pixel_values=x)


class Embedded(nn.Module):
    """A text model from the embeddings of its tokens on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(inputs_embeds=x)


def images_with_text(kind: str) -> tuple[nn.Module, Tensor]:
    text = {**TINY, "vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 5, "projection_size": 16}
    vision = {**TINY, "image_size": 32, "patch_size": 8}
    model = getattr(transformers, f"{kind}Model")
    config = model.config_class(text_config=text, vision_config=vision)
    return Images(model(config)), torch.randn(2, 3, 32, 32, dtype=torch.float64)


def text(kind: str, **settings: Any) -> Callable[[], tuple[nn.Module, Tensor]]:
    def build() -> tuple[nn.Module, Tensor]:
        model = getattr(transformers, kind)
        built = model(model.config_class(vocab_size=50, pad_token_id=0, num_labels=3, **settings))
        return Embedded(built), torch.randn(1, 5, 16, dtype=torch.float64)

    return build


CASES = {
    "ViT": Case(of("ViTForImageClassification", image_size=32, patch_size=8, num_labels=3, **TINY)),
    "DeiT": Case(of("DeiTForImageClassification", image_size=32, patch_size=8, num_labels=3, **TINY)),
    "BEiT": Case(of("BeitForImageClassification", image_size=32, patch_size=8, num_labels=3, **TINY)),
    "DINOv2": Case(
        of(
            "Dinov2ForImageClassification",
            image_size=32,
            patch_size=8,
            num_labels=3,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    ),
    "Swin v2": Case(
        of(
            "Swinv2ForImageClassification",
            image_size=32,
            patch_size=2,
            embed_dim=8,
            depths=[1, 1],
            num_heads=[2, 2],
            window_size=4,
            num_labels=3,
        )
    ),
    "ConvNeXt v2": Case(of("ConvNextV2ForImageClassification", num_labels=3, **STAGES)),
    "ResNet": Case(of("ResNetForImageClassification", embedding_size=8, layer_type="basic", num_labels=3, **STAGES)),
    "SegFormer, a pixel": Case(
        of(
            "SegformerForSemanticSegmentation",
            64,
            num_labels=3,
            depths=[1, 1, 1, 1],
            hidden_sizes=[8, 8, 16, 16],
            num_attention_heads=[1, 1, 2, 2],
            decoder_hidden_size=16,
        ),
        target=(1, 4, 4),
    ),
    "CLIP": Case(lambda: images_with_text("CLIP")),
    "SigLIP": Case(lambda: images_with_text("Siglip")),
    "BERT from its embeddings": Case(text("BertForSequenceClassification", **TINY)),
    "GPT-2 from its embeddings": Case(text("GPT2LMHeadModel", n_embd=16, n_layer=2, n_head=2), target=(4, 7)),
}
