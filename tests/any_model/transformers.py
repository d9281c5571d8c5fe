"""Models of Hugging Face's, small: classifiers of images, videos and sound, images with text, and text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_scoremap.scores import similarity

from . import Case

transformers = pytest.importorskip("transformers")

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
STAGES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
PATCHES = {"image_size": 32, "patch_size": 8, **TINY}

# Of what computes some of its parts in float32 whatever goes in.
SINGLE = 2e-6


def built(name: str, shape: tuple[int, ...], **settings: Any) -> Callable[[], tuple[nn.Module, Tensor]]:
    """A model by the name of its class, its configuration's by that of the family, and two inputs of a shape."""

    def build() -> tuple[nn.Module, Tensor]:
        kind = getattr(transformers, name)
        return kind(kind.config_class(**settings)), torch.randn(2, *shape, dtype=torch.float64)

    return build


def of(name: str, side: int = 32, **settings: Any) -> Callable[[], tuple[nn.Module, Tensor]]:
    return built(name, (3, side, side), **settings)


def labels(name: str, side: int = 32, **settings: Any) -> Case:
    """A classifier of images."""
    return Case(of(name, side, num_labels=3, **settings))


class Called(nn.Module):
    """Images, beside what else a model takes: one row for all of them, or as many rows as there are for none."""

    def __init__(self, model: nn.Module, **others: Tensor) -> None:
        super().__init__()
        self.model, self.others = model, others

    def forward(self, x: Tensor) -> Any:
        rows = {name: one.repeat(len(x), 1) if len(one) == 1 else one for name, one in self.others.items()}
        return self.model(pixel_values=x, **rows)


class Embedded(nn.Module):
    """A text model from the embeddings of its tokens on; of a language model, the scores of the next token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        found = self.model(inputs_embeds=x)
        return found.logits[:, -1] if found.logits.dim() == 3 else found


def images_with_text(kind: str) -> tuple[nn.Module, Tensor]:
    text = {**TINY, "vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 5, "projection_size": 16}
    model = getattr(transformers, f"{kind}Model")
    texts = torch.tensor([[1, 2, 3, 5], [4, 3, 2, 5], [6, 2, 2, 5]])
    built = model(model.config_class(text_config=text, vision_config=PATCHES))
    return Called(built, input_ids=texts), torch.randn(2, 3, 32, 32, dtype=torch.float64)


def answers() -> tuple[nn.Module, Tensor]:
    config = transformers.ViltConfig(vocab_size=50, max_position_embeddings=8, num_labels=3, **PATCHES)
    question = torch.tensor([[1, 2, 5]])
    model = transformers.ViltForQuestionAnswering(config)
    return Called(model, input_ids=question), torch.randn(2, 3, 32, 32, dtype=torch.float64)


def matches() -> tuple[nn.Module, Tensor]:
    text = {**TINY, "vocab_size": 50, "max_position_embeddings": 8, "encoder_hidden_size": 16}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "sep_token_id": 2}
    config = transformers.BlipConfig(
        text_config=text, vision_config=PATCHES, projection_dim=16, image_text_hidden_size=16
    )
    words = torch.tensor([[1, 3, 4]])
    model = transformers.BlipForImageTextRetrieval(config)
    return Called(model, input_ids=words), torch.randn(2, 3, 32, 32, dtype=torch.float64)


LLAMA = {**TINY, "num_key_value_heads": 1}


def tells() -> tuple[nn.Module, Tensor]:
    """LLaVA: an image among tokens."""
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**PATCHES),
        text_config=transformers.LlamaConfig(vocab_size=50, **LLAMA),
        image_token_index=40,
        image_seq_length=16,
    )
    words = torch.tensor([[1, *[40] * 16, 3, 4]])
    model = transformers.LlavaForConditionalGeneration(config)
    return Called(model, input_ids=words), torch.randn(2, 3, 32, 32, dtype=torch.float64)


def text(kind: str, **settings: Any) -> Callable[[], tuple[nn.Module, Tensor]]:
    def build() -> tuple[nn.Module, Tensor]:
        model = getattr(transformers, kind)
        built = model(model.config_class(vocab_size=50, pad_token_id=0, num_labels=3, **settings))
        return Embedded(built), torch.randn(2, 5, 16, dtype=torch.float64)

    return build


def video(name: str, **settings: Any) -> Case:
    return Case(built(name, (4, 3, 32, 32), num_labels=3, **settings))


SOUND = {
    **TINY,
    "conv_dim": [8, 8, 8],
    "conv_stride": [5, 2, 2],
    "conv_kernel": [10, 3, 3],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "num_labels": 3,
    "vocab_size": 10,
}
DINO = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WINDOWS = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "num_heads": [2, 2], "window_size": 4}
PYRAMID = {**STAGES, "num_attention_heads": [1, 1, 2, 2], "image_size": 64}

IMAGES = {
    "ViT": labels("ViTForImageClassification", **PATCHES),
    "ViT MSN": labels("ViTMSNForImageClassification", **PATCHES),
    "DeiT": labels("DeiTForImageClassification", **PATCHES),
    "BEiT": labels("BeitForImageClassification", **PATCHES),
    "Data2Vec": labels("Data2VecVisionForImageClassification", **PATCHES),
    "DINOv2": labels("Dinov2ForImageClassification", **DINO),
    "DINOv2 with registers": labels("Dinov2WithRegistersForImageClassification", **DINO),
    "DINOv3, a feature": Case(
        of("DINOv3ViTModel", num_register_tokens=2, **PATCHES), lambda output: output["pooler_output"][:, 1]
    ),
    "Swin": labels("SwinForImageClassification", depths=[1, 2], **WINDOWS),
    "Swin v2": labels("Swinv2ForImageClassification", depths=[1, 1], **WINDOWS),
    "ConvNeXt": labels("ConvNextForImageClassification", **STAGES),
    "ConvNeXt v2": labels("ConvNextV2ForImageClassification", **STAGES),
    "ResNet": labels("ResNetForImageClassification", embedding_size=8, layer_type="basic", **STAGES),
    "RegNet": labels("RegNetForImageClassification", 64, embedding_size=8, groups_width=4, **STAGES),
    "BiT": labels("BitForImageClassification", 64, embedding_size=8, num_groups=2, **STAGES),
    "CvT": labels("CvtForImageClassification", 64, embed_dim=[8, 8, 16], num_heads=[1, 2, 2], depth=[1, 2, 3]),
    "PVT": labels("PvtForImageClassification", 64, **PYRAMID),
    "PVT v2": labels("PvtV2ForImageClassification", 64, **PYRAMID),
    "LeViT": labels(
        "LevitForImageClassification",
        64,
        image_size=64,
        hidden_sizes=[16, 16, 32],
        num_attention_heads=[2, 2, 2],
        depths=[1, 1, 1],
        key_dim=[4, 4, 4],
    ),
    "MobileViT": labels(
        "MobileViTForImageClassification",
        64,
        image_size=64,
        hidden_sizes=[8, 8, 16],
        neck_hidden_sizes=[4, 8, 8, 8, 16, 16, 16],
        num_attention_heads=2,
    ),
    "MobileViT v2": labels(
        "MobileViTV2ForImageClassification",
        64,
        image_size=64,
        width_multiplier=0.25,
        n_attn_blocks=[1, 1, 1],
        base_attn_unit_dims=[16, 16, 16],
    ),
    "MobileNet v1": labels("MobileNetV1ForImageClassification", depth_multiplier=0.25),
    "MobileNet v2": labels("MobileNetV2ForImageClassification", depth_multiplier=0.25),
    "PoolFormer": labels("PoolFormerForImageClassification", 64, **STAGES),
    "FocalNet": labels(
        "FocalNetForImageClassification",
        image_size=32,
        patch_size=2,
        embed_dim=8,
        depths=[1, 1],
        hidden_sizes=[8, 16],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
    ),
    "SwiftFormer": labels(
        "SwiftFormerForImageClassification", 64, image_size=64, depths=[1, 1, 1, 1], embed_dims=[8, 8, 16, 16]
    ),
    "Hiera": labels(
        "HieraForImageClassification",
        64,
        image_size=[64, 64],
        embed_dim=8,
        depths=[1, 1, 1],
        num_heads=[1, 1, 2],
        masked_unit_size=[4, 4],
        num_query_pool=2,
    ),
    "Perceiver": labels(
        "PerceiverForImageClassificationConvProcessing",
        num_latents=4,
        d_latents=16,
        num_self_attends_per_block=1,
        num_blocks=1,
        num_self_attention_heads=2,
        num_cross_attention_heads=2,
        image_size=32,
    ),
    "a model of timm's": labels("TimmWrapperForImageClassification", 64, architecture="resnet18", do_pooling=True),
}

CASES = {
    **IMAGES,
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
    "CLIP, similarity with an embedding": Case(
        of("CLIPVisionModelWithProjection", projection_dim=16, **PATCHES),
        similarity(torch.linspace(-1, 1, 16, dtype=torch.float64)),
    ),
    "ViLT, an answer": Case(answers),
    "BLIP, a match": Case(matches, lambda output: output["itm_score"][:, 1]),
    "LLaVA, the next token": Case(tells, (-1, 7), tolerance=SINGLE),
    "VideoMAE": video("VideoMAEForVideoClassification", num_frames=4, tubelet_size=2, **PATCHES),
    "TimeSformer": video("TimesformerForVideoClassification", num_frames=4, **PATCHES),
    "ViViT": video("VivitForVideoClassification", image_size=32, num_frames=4, tubelet_size=[2, 8, 8], **TINY),
    "V-JEPA 2": video(
        "VJEPA2ForVideoClassification",
        crop_size=32,
        patch_size=8,
        frames_per_clip=4,
        tubelet_size=2,
        hidden_size=24,
        num_attention_heads=2,
        num_hidden_layers=2,
        mlp_ratio=2,
        pred_hidden_size=24,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=2,
        num_pooler_layers=1,
    ),
    "Wav2Vec2": Case(built("Wav2Vec2ForSequenceClassification", (800,), **SOUND)),
    "Wav2Vec2, a step": Case(built("Wav2Vec2ForCTC", (800,), **SOUND), (3, 2)),
    "HuBERT": Case(built("HubertForSequenceClassification", (800,), **SOUND)),
    "WavLM": Case(built("WavLMForSequenceClassification", (800,), **SOUND)),
    "SEW": Case(built("SEWForSequenceClassification", (800,), squeeze_factor=2, **SOUND)),
    "AST": Case(
        built(
            "ASTForAudioClassification",
            (32, 16),
            max_length=32,
            num_mel_bins=16,
            patch_size=8,
            time_stride=8,
            frequency_stride=8,
            num_labels=3,
            **TINY,
        )
    ),
    "Whisper": Case(
        built(
            "WhisperForAudioClassification",
            (16, 40),
            num_mel_bins=16,
            d_model=16,
            encoder_layers=2,
            encoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_layers=1,
            max_source_positions=20,
            vocab_size=50,
            pad_token_id=1,
            num_labels=3,
            classifier_proj_size=8,
        )
    ),
    "BERT from its embeddings": Case(text("BertForSequenceClassification", **TINY)),
    "DeBERTa from its embeddings": Case(
        text(
            "DebertaV2ForSequenceClassification",
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=4,
            max_relative_positions=8,
            **TINY,
        )
    ),
    "GPT-2 from its embeddings": Case(text("GPT2LMHeadModel", n_embd=16, n_layer=2, n_head=2), 7),
    # norms in float32 whatever goes in
    "Llama from its embeddings": Case(text("LlamaForCausalLM", **LLAMA), 7, tolerance=SINGLE),
    "Gemma 2 from its embeddings": Case(text("Gemma2ForCausalLM", head_dim=8, **LLAMA), 7, tolerance=SINGLE),
    "Mixtral from its embeddings": Case(
        text("MixtralForCausalLM", num_local_experts=4, experts_implementation="eager", **LLAMA), 7, tolerance=SINGLE
    ),
    "RecurrentGemma from its embeddings": Case(
        text("RecurrentGemmaForCausalLM", lru_width=16, **{**TINY, "num_hidden_layers": 3}), 7, tolerance=SINGLE
    ),
    "Mamba from its embeddings": Case(
        text("MambaForCausalLM", hidden_size=16, num_hidden_layers=2, state_size=4), 7, tolerance=SINGLE
    ),
    "Mamba 2 from its embeddings": Case(
        text(
            "Mamba2ForCausalLM",
            hidden_size=16,
            num_hidden_layers=2,
            state_size=4,
            num_heads=4,
            head_dim=8,
            n_groups=1,
            chunk_size=4,
        ),
        7,
        tolerance=SINGLE,
    ),
    # writes its state in place, which autograd refuses
    "RWKV from its embeddings": Case(
        text("RwkvForCausalLM", hidden_size=16, num_hidden_layers=2, attention_hidden_size=16),
        7,
        tolerance=SINGLE,
        gradient="differences",
    ),
}
