"""Models of Hugging Face's, small: classifiers of images, videos and sound, images with text, and text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_scoremap.scores import similarity
from tests.hugging_face import IN_SINGLE_PRECISION, MISSING, PATCHES, TINY, Called, classifiers, small

from . import Case

transformers = pytest.importorskip("transformers")


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


class Patched(nn.Module):
    """SigLIP 2, which is given patches, and how many rows and columns of them are the image's."""

    def __init__(self) -> None:
        super().__init__()
        text = {**TINY, "vocab_size": 50, "max_position_embeddings": 8, "projection_size": 16}
        vision = {**TINY, "patch_size": 8, "num_patches": 16}
        self.model = transformers.Siglip2Model(transformers.Siglip2Config(text_config=text, vision_config=vision))

    def forward(self, x: Tensor) -> Any:
        patches = torch.nn.functional.unfold(x, 8, stride=8).transpose(1, 2)
        words = torch.tensor([[1, 2, 3, 5], [4, 3, 2, 5]])
        mask = torch.ones(patches.shape[:2], dtype=torch.int32)
        return self.model(words, patches, mask, torch.tensor([[4, 4]] * len(x)))


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


def classifier(name: str) -> Case:
    """An image classifier that the library chooses from, see :mod:`tests.hugging_face`."""

    def build() -> tuple[nn.Module, Tensor]:
        build, shape = small(name)
        return build(), torch.randn(2, *shape, dtype=torch.float64)

    return Case(
        build,
        tolerance=SINGLE if name in IN_SINGLE_PRECISION else 1e-9,
        # PyTorch's derivative of hardsigmoid has 1/6 in float32
        gradient="differences" if name == "PPLCNetForImageClassification" else "autograd",
    )


CASES = {
    **{name: classifier(name) for name in classifiers() if name not in MISSING},
    "DINOv3, a feature": Case(
        of("DINOv3ViTModel", num_register_tokens=2, **PATCHES), lambda output: output["pooler_output"][:, 1]
    ),
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
    "SigLIP 2": Case(lambda: (Patched(), torch.randn(2, 3, 32, 32, dtype=torch.float64))),
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
