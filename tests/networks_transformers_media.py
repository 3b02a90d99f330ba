"""Models of transformers that hear, that see and read, or that forecast, built from their configurations alone."""

from __future__ import annotations

from typing import Any

import torch
from tests.networks_transformers import SMALL, row
from tests.networks_transformers_vision import VIT
from tests.zoo_row import images, tokens

_WAV: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 44,
    "conv_dim": (12, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "layerdrop": 0.0, "mask_time_prob": 0.0,
}  # fmt: skip


def wave(samples: int) -> Any:
    return lambda config: {"input_values": torch.randn(2, samples)}


def _heard(config: Any) -> dict[str, Any]:
    frames = 2 * config.max_source_positions
    return {
        "input_features": torch.randn(2, config.num_mel_bins, frames),
        "decoder_input_ids": tokens(config.vocab_size, 7),
    }


def _spectrum(config: Any) -> dict[str, Any]:
    return {
        "input_features": torch.randn(2, 40, config.input_feat_per_channel),
        "decoder_input_ids": tokens(config.vocab_size, 6),
    }


def _seen_and_read(config: Any) -> dict[str, Any]:
    text, vision = getattr(config, "text_config", config), getattr(config, "vision_config", config)
    return {"input_ids": tokens(text.vocab_size), "pixel_values": images(vision.image_size)}


def _asked(config: Any) -> dict[str, Any]:
    n = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    words = torch.cat([torch.full((2, n), config.image_token_id), tokens(90, 6)], 1)
    return {"input_ids": words, "pixel_values": images(config.vision_config.image_size), "use_cache": False}


_CLIP_TEXT = {**{k: v for k, v in SMALL.items() if not k.endswith("token_id")}, "max_position_embeddings": 20,
              "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip

TRANSFORMERS_MEDIA = (
    row(
        "speech",
        "whisper",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": 99,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 44,
            "decoder_ffn_dim": 48,
            "max_source_positions": 20,
            "max_target_positions": 20,
            "num_mel_bins": 8,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        {
            "d_model": 512,
            "encoder_layers": 6,
            "decoder_layers": 6,
            "encoder_attention_heads": 8,
            "decoder_attention_heads": 8,
            "encoder_ffn_dim": 2048,
            "decoder_ffn_dim": 2048,
        },
        inputs=_heard,
    ),
    row(
        "speech",
        "speech-to-text",
        "Speech2TextForConditionalGeneration",
        "Speech2TextConfig",
        {
            "vocab_size": 99,
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 44,
            "decoder_ffn_dim": 48,
            "max_source_positions": 60,
            "max_target_positions": 20,
            "input_feat_per_channel": 10,
            "conv_channels": 24,
        },
        {},
        inputs=_spectrum,
    ),
    row(
        "speech",
        "wav2vec2",
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        _WAV,
        {"mask_time_prob": 0.0, "layerdrop": 0.0},
        inputs=wave(16000),
        tiny_inputs=wave(800),
    ),
    row(
        "speech",
        "hubert",
        "HubertModel",
        "HubertConfig",
        _WAV,
        {"mask_time_prob": 0.0, "layerdrop": 0.0},
        inputs=wave(16000),
        tiny_inputs=wave(800),
    ),
    row(
        "speech",
        "wavlm",
        "WavLMModel",
        "WavLMConfig",
        {**_WAV, "num_buckets": 8, "max_bucket_distance": 20},
        {"mask_time_prob": 0.0, "layerdrop": 0.0},
        inputs=wave(16000),
        tiny_inputs=wave(800),
    ),
    row(
        "speech",
        "ast",
        "ASTModel",
        "ASTConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 44,
            "patch_size": 4,
            "max_length": 24,
            "num_mel_bins": 16,
            "frequency_stride": 4,
            "time_stride": 4,
        },
        {},
        inputs=lambda config: {"input_values": torch.randn(2, config.max_length, config.num_mel_bins)},
    ),
    row(
        "speech",
        "encodec",
        "EncodecModel",
        "EncodecConfig",
        {
            "hidden_size": 16,
            "num_filters": 4,
            "num_lstm_layers": 1,
            "upsampling_ratios": [4, 2],
            "codebook_size": 16,
            "codebook_dim": 16,
            "target_bandwidths": [48.0],
        },
        None,
        inputs=lambda config: {"input_values": torch.randn(2, 1, 320)},
    ),
    row(
        "image and text",
        "clip",
        "CLIPModel",
        "CLIPConfig",
        {"text_config": _CLIP_TEXT, "vision_config": VIT, "projection_dim": 20},
        {},
        inputs=_seen_and_read,
    ),
    row(
        "image and text",
        "siglip",
        "SiglipModel",
        "SiglipConfig",
        {"text_config": _CLIP_TEXT, "vision_config": VIT},
        {},
        inputs=lambda config: {
            "input_ids": tokens(config.text_config.vocab_size, config.text_config.max_position_embeddings),
            "pixel_values": images(config.vision_config.image_size),
        },
        tiny_inputs=_seen_and_read,
    ),
    row(
        "image and text",
        "vilt",
        "ViltModel",
        "ViltConfig",
        {**SMALL, **VIT, "max_image_length": 16},
        None,
        inputs=_seen_and_read,
    ),
    row(
        "image and text",
        "llava",
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **SMALL, "num_key_value_heads": 2},
            "vision_config": {"model_type": "clip_vision_model", **VIT},
            "image_token_id": 98,
            "vision_feature_select_strategy": "default",
        },
        None,
        inputs=_asked,
    ),
    row(
        "forecasting",
        "patchtst",
        "PatchTSTForPrediction",
        "PatchTSTConfig",
        {
            "num_input_channels": 2,
            "context_length": 24,
            "patch_length": 6,
            "patch_stride": 6,
            "d_model": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 28,
            "prediction_length": 5,
        },
        {
            "context_length": 512,
            "num_input_channels": 7,
            "patch_length": 16,
            "patch_stride": 16,
            "prediction_length": 96,
        },
        inputs=lambda config: {"past_values": torch.randn(2, config.context_length, config.num_input_channels)},
    ),
    row(
        "reinforcement learning",
        "decision-transformer",
        "DecisionTransformerModel",
        "DecisionTransformerConfig",
        {"state_dim": 5, "act_dim": 3, "hidden_size": 32, "n_layer": 2, "n_head": 4, "max_ep_len": 16},
        {},
        inputs=lambda config: {
            "states": torch.randn(2, 4, config.state_dim),
            "actions": torch.randn(2, 4, config.act_dim),
            "rewards": torch.randn(2, 4, 1),
            "returns_to_go": torch.randn(2, 4, 1),
            "timesteps": torch.arange(4).repeat(2, 1),
            "attention_mask": torch.ones(2, 4),
        },
    ),
)
