"""Models of transformers that see, built from their configurations alone."""

from __future__ import annotations

from typing import Any

import torch
from tests.networks_transformers import row
from tests.zoo_row import images

VIT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 44, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
_FOUR: dict[str, Any] = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1]}


def picture(config: Any) -> dict[str, Any]:
    size = getattr(config, "image_size", 224)
    return {"pixel_values": images(size if isinstance(size, int) else size[0])}


def pictures(size: int) -> Any:
    return lambda config: {"pixel_values": images(size)}


TRANSFORMERS_VISION = (
    row("ViT", "vit", "ViTForImageClassification", "ViTConfig", VIT, {}, inputs=picture),
    row("ViT", "deit", "DeiTForImageClassification", "DeiTConfig", VIT, {}, inputs=picture),
    row(
        "ViT",
        "beit",
        "BeitModel",
        "BeitConfig",
        {**VIT, "use_relative_position_bias": True},
        {"use_relative_position_bias": True, "use_mask_token": True},
        inputs=picture,
    ),
    row(
        "ViT",
        "dinov2",
        "Dinov2Model",
        "Dinov2Config",
        {**{k: v for k, v in VIT.items() if k != "intermediate_size"}, "mlp_ratio": 2},
        {},
        inputs=picture,
    ),
    row(
        "ViT",
        "yolos",
        "YolosForObjectDetection",
        "YolosConfig",
        {**VIT, "image_size": [16, 16], "num_detection_tokens": 5},
        {},
        inputs=picture,
    ),
    row(
        "Swin",
        "swin",
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        {},
        inputs=picture,
    ),
    row(
        "Swin",
        "swinv2",
        "Swinv2Model",
        "Swinv2Config",
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        {"image_size": 256, "window_size": 8},
        inputs=picture,
    ),
    row(
        "ConvNeXt",
        "convnext",
        "ConvNextForImageClassification",
        "ConvNextConfig",
        _FOUR,
        {},
        inputs=pictures(224),
        tiny_inputs=pictures(32),
    ),
    row(
        "ConvNeXt",
        "convnextv2",
        "ConvNextV2ForImageClassification",
        "ConvNextV2Config",
        _FOUR,
        {},
        inputs=pictures(224),
        tiny_inputs=pictures(32),
    ),
    row(
        "residual CNN",
        "resnet",
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 2]},
        {},
        inputs=pictures(224),
        tiny_inputs=pictures(32),
        quick=True,
    ),
    row(
        "residual CNN",
        "bit",
        "BitModel",
        "BitConfig",
        {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 1], "num_groups": 4},
        {},
        inputs=pictures(224),
        tiny_inputs=pictures(32),
    ),
    row(
        "MobileNet",
        "mobilenet-v1",
        "MobileNetV1Model",
        "MobileNetV1Config",
        {"depth_multiplier": 0.25, "min_depth": 4},
        {},
        inputs=pictures(192),
        tiny_inputs=pictures(64),
    ),
    row(
        "MobileNet",
        "mobilenet-v2",
        "MobileNetV2Model",
        "MobileNetV2Config",
        {"depth_multiplier": 0.25, "min_depth": 4, "image_size": 64},
        {},
        inputs=pictures(224),
        tiny_inputs=pictures(64),
    ),
    row(
        "hybrid",
        "mobilevit",
        "MobileViTModel",
        "MobileViTConfig",
        {
            "image_size": 64,
            "hidden_sizes": [16, 20, 24],
            "neck_hidden_sizes": [8, 8, 12, 12, 16, 16, 20],
            "num_attention_heads": 4,
            "aspp_out_channels": 16,
        },
        {},
        inputs=pictures(256),
        tiny_inputs=pictures(64),
    ),
    row(
        "hybrid",
        "levit",
        "LevitModel",
        "LevitConfig",
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        {},
        inputs=picture,
    ),
    row(
        "hybrid",
        "cvt",
        "CvtModel",
        "CvtConfig",
        {"embed_dim": [8, 16, 24], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
        {},
        inputs=pictures(224),
        tiny_inputs=pictures(32),
    ),
    row(
        "MetaFormer",
        "poolformer",
        "PoolFormerModel",
        "PoolFormerConfig",
        _FOUR,
        {},
        inputs=pictures(224),
        tiny_inputs=pictures(32),
    ),
    row(
        "hierarchical ViT",
        "segformer",
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {
            "hidden_sizes": [8, 16, 24, 32],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 4],
            "decoder_hidden_size": 20,
        },
        {},
        inputs=pictures(224),
        tiny_inputs=pictures(32),
    ),
    row(
        "hierarchical ViT",
        "pvt",
        "PvtModel",
        "PvtConfig",
        {
            "image_size": 32,
            "hidden_sizes": [8, 16, 24, 32],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 2, 4],
        },
        {},
        inputs=picture,
    ),
    row(
        "detection",
        "detr",
        "DetrForObjectDetection",
        "DetrConfig",
        {
            "backbone_config": {
                "model_type": "resnet",
                "embedding_size": 8,
                "hidden_sizes": [12, 16],
                "depths": [1, 1],
                "out_features": ["stage2"],
            },
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 44,
            "decoder_ffn_dim": 48,
            "num_queries": 5,
        },
        None,
        inputs=pictures(32),
    ),
    row(
        "dense prediction",
        "dpt",
        "DPTForDepthEstimation",
        "DPTConfig",
        {
            **VIT,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 12, 16, 20],
            "fusion_hidden_size": 12,
            "image_size": 32,
            "patch_size": 8,
        },
        {},
        inputs=picture,
    ),
    row(
        "video",
        "videomae",
        "VideoMAEModel",
        "VideoMAEConfig",
        {**VIT, "num_frames": 4},
        {},
        inputs=lambda config: {
            "pixel_values": torch.randn(2, config.num_frames, 3, config.image_size, config.image_size)
        },
    ),
)
