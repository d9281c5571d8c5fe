"""Models of Hugging Face's, small, that return more than labels: detectors, segmentation, masks by prompt, depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_scoremap.scores import Target, region_mean
from tests.hugging_face import STAGES, TINY, Called

from . import Case
from .transformers import SINGLE, of

transformers = pytest.importorskip("transformers")


def residual(*stages: int) -> Any:
    return transformers.ResNetConfig(
        embedding_size=8, layer_type="basic", out_features=[f"stage{stage}" for stage in stages], **STAGES
    )


def swin(*stages: int) -> Any:
    features = [f"stage{stage}" for stage in stages]
    heads = {"depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 2}
    return transformers.SwinConfig(image_size=64, patch_size=4, embed_dim=8, out_features=features, **heads)


def queries(*stages: int) -> dict[str, Any]:
    """Settings of encoders and decoders with object queries, on a ResNet."""
    return {
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "d_model": 32,
        "num_queries": 5,
        "num_labels": 3,
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
        "backbone_config": residual(*stages),
    }


def real_time(name: str, **settings: Any) -> Callable[[], tuple[nn.Module, Tensor]]:
    """RT-DETR and those that follow it."""
    return of(
        name,
        64,
        encoder_hidden_dim=16,
        encoder_in_channels=settings.pop("channels", [8, 16, 16]),
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        num_queries=5,
        decoder_in_channels=[16, 16, 16],
        d_model=16,
        decoder_ffn_dim=32,
        decoder_layers=2,
        decoder_attention_heads=2,
        num_labels=3,
        num_denoising=0,
        **settings,
    )


def rt_backbone() -> Any:
    return transformers.RTDetrResNetConfig(
        embedding_size=8, layer_type="basic", out_features=["stage2", "stage3", "stage4"], **STAGES
    )


def hg_backbone() -> Any:
    each: dict[str, Any] = {f"stage_{name}": [value] * 4 for name, value in [("num_blocks", 1), ("numb_of_layers", 1)]}
    return transformers.HGNetV2Config(
        embedding_size=8,
        hidden_sizes=[16, 16, 16, 16],
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 16, 16, 16],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[16, 16, 16, 16],
        stage_kernel_size=[3, 3, 3, 3],
        depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
        **each,
    )


def patches(name: str, side: int = 32, **settings: Any) -> Callable[[], tuple[nn.Module, Tensor]]:
    """A model on a ViT of four blocks."""
    return of(name, side, image_size=side, patch_size=8, **{**TINY, "num_hidden_layers": 4}, **settings)


DEPTH = {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16}


def zoe() -> tuple[nn.Module, Tensor]:
    backbone = transformers.BeitConfig(
        image_size=32,
        patch_size=8,
        use_relative_position_bias=True,
        reshape_hidden_states=False,
        out_indices=[1, 2, 3, 4],
        **{**TINY, "num_hidden_layers": 4},
    )
    return of(
        "ZoeDepthForDepthEstimation",
        backbone_config=backbone,
        bottleneck_features=16,
        num_relative_features=8,
        bin_embedding_dim=16,
        num_patch_transformer_layers=1,
        patch_transformer_hidden_size=16,
        patch_transformer_intermediate_size=32,
        patch_transformer_num_attention_heads=2,
        bin_configurations=[{"n_bins": 8, "min_depth": 0.001, "max_depth": 10.0, "name": "rooms"}],
        num_attractors=[4, 2, 2, 1],
        **DEPTH,
    )()


def depth_anything() -> tuple[nn.Module, Tensor]:
    backbone = transformers.Dinov2Config(
        image_size=28,
        patch_size=14,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )
    return of(
        "DepthAnythingForDepthEstimation",
        28,
        backbone_config=backbone,
        patch_size=14,
        reassemble_hidden_size=16,
        head_hidden_size=8,
        **DEPTH,
    )()


PROMPTED = {"mlp_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


class Prompted(nn.Module):
    """Segment Anything: the mask at a point."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        points = torch.tensor([[[[10.0, 12.0]]]] * len(x), dtype=x.dtype)
        labels = torch.ones(points.shape[:3], dtype=torch.int64)
        masks: Tensor = self.model(x, points, labels, multimask_output=False).pred_masks
        return masks[:, 0]


def segment_anything() -> tuple[nn.Module, Tensor]:
    vision = {
        **PROMPTED,
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 16,
        "output_channels": 16,
        "window_size": 2,
        "global_attn_indexes": [1],
        "num_pos_feats": 8,
    }
    prompt = {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}
    decoder = {**PROMPTED, "hidden_size": 16, "iou_head_hidden_dim": 16, "iou_head_depth": 2}
    config = transformers.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    return Prompted(transformers.SamModel(config)), torch.randn(2, 3, 32, 32, dtype=torch.float64)


def segment_anything_2() -> tuple[nn.Module, Tensor]:
    backbone = transformers.Sam2HieraDetConfig(
        hidden_size=8,
        num_attention_heads=1,
        image_size=[64, 64],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 2, 2],
        window_size_per_stage=[4, 4, 4, 4],
        global_attention_blocks=[3],
        window_positional_embedding_background_size=[4, 4],
    )
    vision = transformers.Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[64, 32, 16, 8],
        fpn_hidden_size=16,
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
    )
    prompt = {"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 4}
    decoder = {**PROMPTED, "hidden_size": 16, "iou_head_hidden_dim": 16, "iou_head_depth": 2}
    config = transformers.Sam2Config(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    return Prompted(transformers.Sam2Model(config)), torch.randn(2, 3, 64, 64, dtype=torch.float64)


def with_words(kind: str, words: list[int], config: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Any:
    """A model that looks for what fixed words say."""

    def build() -> tuple[nn.Module, Tensor]:
        text = {**TINY, "vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 5}
        vision = {**TINY, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
        model = getattr(transformers, kind)(config(text, vision))
        return Called(model, input_ids=torch.tensor([words])), torch.randn(2, 3, 32, 32, dtype=torch.float64)

    return build


def grounding() -> tuple[nn.Module, Tensor]:
    config = transformers.GroundingDinoConfig(
        text_config=transformers.BertConfig(vocab_size=50, **TINY),
        num_feature_levels=3,
        max_text_len=4,
        **{**queries(4), "backbone_config": swin(2, 3, 4), "use_pretrained_backbone": None},
    )
    model = transformers.GroundingDinoForObjectDetection(config)
    return Called(model, input_ids=torch.tensor([[1, 3, 4]])), torch.randn(2, 3, 64, 64, dtype=torch.float64)


def mean_of(name: str, *index: int) -> Target:
    """The mean of a square of what the model returns by a name."""
    return lambda output: output[name][(slice(None), *index)][:, 2:4, 2:4].mean((1, 2))


BOX = (2, 1)  # the third box, the second label

CASES = {
    "DETR": Case(of("DetrForObjectDetection", 64, **queries(4)), BOX),
    "DETR, the edge of a box": Case(
        of("DetrForObjectDetection", 64, **queries(4)), lambda output: output["pred_boxes"][:, 2, 0]
    ),
    "Conditional DETR": Case(of("ConditionalDetrForObjectDetection", 64, **queries(4)), BOX),
    "Deformable DETR": Case(of("DeformableDetrForObjectDetection", 64, num_feature_levels=3, **queries(2, 3, 4)), BOX),
    # boxes embedded in float32 whatever goes in, here and in DAB-DETR
    "Deformable DETR, boxes refined in two stages": Case(
        of(
            "DeformableDetrForObjectDetection",
            64,
            num_feature_levels=3,
            two_stage=True,
            with_box_refine=True,
            two_stage_num_proposals=5,
            **queries(2, 3, 4),
        ),
        BOX,
        tolerance=SINGLE,
        gradient="differences",
    ),
    "DAB-DETR": Case(
        of("DabDetrForObjectDetection", 64, hidden_size=32, **queries(4)), BOX, tolerance=SINGLE, gradient="differences"
    ),
    "Table Transformer": Case(of("TableTransformerForObjectDetection", 64, **queries(4)), BOX),
    "RT-DETR": Case(real_time("RTDetrForObjectDetection", backbone_config=rt_backbone()), BOX, gradient="differences"),
    "RT-DETR v2": Case(
        real_time("RTDetrV2ForObjectDetection", backbone_config=rt_backbone()), BOX, gradient="differences"
    ),
    "D-FINE": Case(
        real_time(
            "DFineForObjectDetection",
            backbone_config=hg_backbone(),
            channels=[16, 16, 16],
            depth_mult=0.3,
            hidden_expansion=0.5,
        ),
        BOX,
        gradient="differences",
    ),
    "YOLOS": Case(
        of("YolosForObjectDetection", image_size=[32, 32], patch_size=8, num_detection_tokens=4, num_labels=3, **TINY),
        BOX,
    ),
    # its scores are float32 whatever goes in
    "OWL-ViT": Case(
        with_words(
            "OwlViTForObjectDetection",
            [1, 2, 3],
            lambda text, vision: transformers.OwlViTConfig(text_config=text, vision_config=vision, projection_dim=16),
        ),
        (3, 0),
        tolerance=SINGLE,
    ),
    "OWLv2": Case(
        with_words(
            "Owlv2ForObjectDetection",
            [1, 2, 3],
            lambda text, vision: transformers.Owlv2Config(
                text_config={**text, "bos_token_id": 1}, vision_config=vision, projection_dim=16
            ),
        ),
        (3, 0),
        tolerance=SINGLE,
    ),
    "Grounding DINO": Case(grounding, BOX, gradient="differences"),
    "MaskFormer, a label": Case(
        of(
            "MaskFormerForInstanceSegmentation",
            64,
            backbone_config=residual(1, 2, 3, 4),
            decoder_config=transformers.DetrConfig(**queries(2, 3, 4)),
            fpn_feature_size=32,
            mask_feature_size=32,
            num_labels=3,
        ),
        lambda output: output["class_queries_logits"][:, 2, 1],
    ),
    "Mask2Former, a mask": Case(
        of(
            "Mask2FormerForUniversalSegmentation",
            64,
            backbone_config=swin(1, 2, 3, 4),
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=32,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=2,
            dim_feedforward=32,
            num_queries=5,
            num_labels=3,
        ),
        mean_of("masks_queries_logits", 2),
    ),
    "UperNet, a pixel": Case(
        of(
            "UperNetForSemanticSegmentation",
            64,
            backbone_config=transformers.ConvNextConfig(
                out_features=["stage1", "stage2", "stage3", "stage4"], **STAGES
            ),
            hidden_size=16,
            auxiliary_in_channels=16,
            auxiliary_channels=8,
            num_labels=3,
            pool_scales=[1, 2],
        ),
        (1, 4, 4),
    ),
    "MobileViT, a pixel": Case(
        of(
            "MobileViTForSemanticSegmentation",
            64,
            image_size=64,
            num_labels=3,
            hidden_sizes=[8, 8, 16],
            neck_hidden_sizes=[4, 8, 8, 8, 16, 16, 16],
            num_attention_heads=2,
            aspp_out_channels=8,
        ),
        (1, 1, 1),
    ),
    "BEiT, a pixel": Case(
        patches(
            "BeitForSemanticSegmentation",
            out_indices=[0, 1, 2, 3],
            pool_scales=[1, 2],
            auxiliary_channels=8,
            num_labels=3,
        ),
        (1, 1, 1),
    ),
    "DPT, a pixel": Case(
        patches(
            "DPTForSemanticSegmentation", backbone_out_indices=[0, 1, 2, 3], is_hybrid=False, num_labels=3, **DEPTH
        ),
        (1, 4, 4),
    ),
    # the mask that it makes for its queries is float32, which the kernel misreads
    "EoMT": Case(
        patches(
            "EomtForUniversalSegmentation", num_blocks=2, num_queries=4, num_labels=3, num_upscale_blocks=1, mlp_ratio=2
        ),
        mean_of("masks_queries_logits", 2),
        refused="attn_mask of the queries' type, got torch.float32 beside torch.float64",
    ),
    "CLIPSeg": Case(
        with_words(
            "CLIPSegForImageSegmentation",
            [1, 2, 5],
            lambda text, vision: transformers.CLIPSegConfig(
                text_config=text,
                vision_config=vision,
                projection_dim=16,
                extract_layers=[0, 1, 2],
                reduce_dim=16,
                decoder_num_attention_heads=2,
                decoder_intermediate_size=32,
            ),
        ),
        mean_of("logits"),
        gradient="differences",
    ),
    "Segment Anything": Case(segment_anything, region_mean(torch.ones(8, 8), 0)),
    # softmax in float32 whatever goes in
    "Segment Anything 2": Case(
        segment_anything_2,
        region_mean(torch.ones(8, 8), 0),
        ("model.vision_encoder.backbone.blocks.1", "model.mask_decoder.upscale_conv1"),
        tolerance=SINGLE,
    ),
    "DPT, depth": Case(
        patches("DPTForDepthEstimation", backbone_out_indices=[0, 1, 2, 3], is_hybrid=False, **DEPTH),
        mean_of("predicted_depth"),
    ),
    "Depth Anything": Case(depth_anything, mean_of("predicted_depth")),
    "ZoeDepth": Case(zoe, mean_of("predicted_depth")),
    "GLPN, depth": Case(
        of(
            "GLPNForDepthEstimation",
            64,
            depths=[1, 1, 1, 1],
            hidden_sizes=[8, 8, 16, 16],
            num_attention_heads=[1, 1, 2, 2],
            decoder_hidden_size=16,
        ),
        mean_of("predicted_depth"),
    ),
    "SuperPoint": Case(
        of(
            "SuperPointForKeypointDetection",
            64,
            encoder_hidden_sizes=[8, 8, 16, 16],
            decoder_hidden_size=16,
            descriptor_decoder_dim=16,
        ),
        lambda output: output["scores"][:, 0],
    ),
    "ViTPose": Case(
        of(
            "VitPoseForPoseEstimation",
            backbone_config=transformers.VitPoseBackboneConfig(
                image_size=[32, 32],
                patch_size=[8, 8],
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                out_indices=[2],
            ),
            num_labels=3,
        ),
        mean_of("heatmaps", 1),
    ),
    "Swin2SR": Case(
        of(
            "Swin2SRForImageSuperResolution",
            16,
            image_size=16,
            embed_dim=12,
            depths=[1, 1],
            num_heads=[2, 2],
            window_size=4,
            upscale=2,
        ),
        mean_of("reconstruction", 1),
    ),
}
