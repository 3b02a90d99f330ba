"""Language models of transformers, built from their configurations alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.conftest import _declare_torchvision_operators
from tests.zoo_row import Built, Row, called, tokens

_SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

#: A small encoder or decoder, in the words that most configurations share.
SMALL: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 44,
    "max_position_embeddings": 64,
    **_SPECIAL,
}
_GROUPED = {**SMALL, "num_key_value_heads": 2}
#: The stacked experts as batched products: the grouped ones of the default run in bfloat16 alone on `meta`.
_MOE = {**_GROUPED, "num_experts_per_tok": 2, "experts_implementation": "batched_mm"}
#: The same in the words of the GPT-2 family, and of encoder-decoders after BART.
_GPT2: dict[str, Any] = {
    "vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_ctx": 64, **_SPECIAL
}  # fmt: skip
_BART: dict[str, Any] = {
    "vocab_size": 99,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 44,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 1,
    **_SPECIAL,
}
_T5: dict[str, Any] = {
    "vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 44, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip

Inputs = Callable[[Any], dict[str, Any]]


def words(config: Any) -> dict[str, Any]:
    return {"input_ids": tokens(config.vocab_size)}


def words_twice(config: Any) -> dict[str, Any]:
    return {"input_ids": tokens(config.vocab_size), "decoder_input_ids": tokens(config.vocab_size, 7)}


def row(
    family: str, name: str, model: str, config: str, tiny: dict[str, Any], real: dict[str, Any] | None, *,
    inputs: Inputs = words, tiny_inputs: Inputs | None = None, **options: Any,
) -> Row:  # fmt: skip
    """The row of a model class and its configuration; ``real=None`` where only the tiny size is built."""

    def built(arguments: dict[str, Any], inputs: Inputs) -> Built:
        # Without them, an installed torchvision that does not load takes every model of pictures with it.
        _declare_torchvision_operators()
        import transformers

        made = getattr(transformers, config)(**arguments)
        # With a cache in the outputs, every key and value would be one of them.
        if hasattr(made, "use_cache") and not options.get("causal"):
            made.use_cache = False
        return getattr(transformers, model)(made), called(**inputs(made))

    return Row(
        f"hf-{name}",
        family,
        "transformers",
        lambda: built(tiny, tiny_inputs or inputs),
        None if real is None else lambda: built(real, inputs),
        **options,
    )


def _causal(name: str, stem: str, tiny: dict[str, Any], real: dict[str, Any] | None = None, **options: Any) -> Row:
    """A language model that generates; ``real`` are the differences to the configuration's own defaults."""
    return row(
        "decoder",
        name,
        f"{stem}ForCausalLM",
        f"{stem}Config",
        tiny,
        real,
        inputs=lambda config: {**words(config), "use_cache": False},
        causal=True,
        **options,
    )


TRANSFORMERS = (
    row("BERT family", "bert", "BertForSequenceClassification", "BertConfig", SMALL, {}),
    row("BERT family", "bert-mlm", "BertForMaskedLM", "BertConfig", SMALL, {}),
    row("BERT family", "roberta", "RobertaForMaskedLM", "RobertaConfig", SMALL, {}),
    row(
        "BERT family",
        "distilbert",
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 44, "max_position_embeddings": 64},
        {},
    ),
    row("BERT family", "albert", "AlbertModel", "AlbertConfig", {**SMALL, "embedding_size": 16}, {}),
    row("BERT family", "electra", "ElectraForPreTraining", "ElectraConfig", {**SMALL, "embedding_size": 16}, {}),
    row(
        "BERT family",
        "deberta",
        "DebertaModel",
        "DebertaConfig",
        {**SMALL, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    row(
        "BERT family",
        "deberta-v2",
        "DebertaV2Model",
        "DebertaV2Config",
        {**SMALL, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
        {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 256},
    ),
    row(
        "BERT family",
        "mobilebert",
        "MobileBertModel",
        "MobileBertConfig",
        {**SMALL, "embedding_size": 16, "intra_bottleneck_size": 24, "num_feedforward_networks": 2},
        {},
    ),
    row("BERT family", "mpnet", "MPNetModel", "MPNetConfig", SMALL, {}),
    row("BERT family", "convbert", "ConvBertModel", "ConvBertConfig", {**SMALL, "embedding_size": 16}, {}),
    row(
        "BERT family",
        "squeezebert",
        "SqueezeBertModel",
        "SqueezeBertConfig",
        {
            **SMALL,
            "embedding_size": 32,
            "q_groups": 2,
            "k_groups": 2,
            "v_groups": 2,
            "post_attention_groups": 1,
            "intermediate_groups": 2,
            "output_groups": 2,
        },
        {},
    ),
    row("BERT family", "fnet", "FNetModel", "FNetConfig", SMALL, {}),
    row("BERT family", "roformer", "RoFormerModel", "RoFormerConfig", {**SMALL, "embedding_size": 32}, {}),
    row(
        "BERT family",
        "modernbert",
        "ModernBertModel",
        "ModernBertConfig",
        {**SMALL, "global_attn_every_n_layers": 2},
        {},
    ),
    row(
        "BERT family",
        "xlnet",
        "XLNetModel",
        "XLNetConfig",
        {"vocab_size": 99, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 44, **_SPECIAL},
        {},
    ),
    row("BERT family", "longformer", "LongformerModel", "LongformerConfig", {**SMALL, "attention_window": 4}, None),
    row(
        "encoder-decoder",
        "t5",
        "T5ForConditionalGeneration",
        "T5Config",
        _T5,
        {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "decoder_start_token_id": 0},
        inputs=words_twice,
    ),
    row(
        "encoder-decoder",
        "t5-gated",
        "MT5ForConditionalGeneration",
        "MT5Config",
        {**_T5, "feed_forward_proj": "gated-gelu"},
        {"decoder_start_token_id": 0},
        inputs=words_twice,
    ),
    row("encoder-decoder", "bart", "BartForConditionalGeneration", "BartConfig", _BART, {}, inputs=words_twice),
    row("encoder-decoder", "marian", "MarianMTModel", "MarianConfig", _BART, {"pad_token_id": 0}, inputs=words_twice),
    row("encoder-decoder", "pegasus", "PegasusModel", "PegasusConfig", _BART, {}, inputs=words_twice),
    row(
        "decoder",
        "gpt2",
        "GPT2LMHeadModel",
        "GPT2Config",
        _GPT2,
        {},
        causal=True,
        quick=True,
        inputs=lambda config: {**words(config), "use_cache": False},
    ),
    row(
        "decoder",
        "gpt-bigcode",
        "GPTBigCodeForCausalLM",
        "GPTBigCodeConfig",
        _GPT2,
        {},
        causal=True,
        inputs=lambda config: {**words(config), "use_cache": False},
    ),
    _causal(
        "gpt-neo",
        "GPTNeo",
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "intermediate_size": 44,
            "max_position_embeddings": 64,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 5,
            **_SPECIAL,
        },
        {},
    ),
    _causal("gptj", "GPTJ", {**_GPT2, "rotary_dim": 4}, {}),
    _causal("codegen", "CodeGen", {**_GPT2, "n_ctx": 64, "rotary_dim": 4}, {}),
    _causal("gpt-neox", "GPTNeoX", SMALL, {"num_hidden_layers": 44}),
    _causal(
        "opt",
        "OPT",
        {
            "vocab_size": 99,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 44,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
            **_SPECIAL,
        },
        {},
    ),
    _causal(
        "bloom",
        "Bloom",
        {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4, **_SPECIAL},
        {"hidden_size": 1024, "n_layer": 24, "n_head": 16},
    ),
    _causal("falcon", "Falcon", SMALL, {}),
    _causal(
        "mpt",
        "Mpt",
        {
            "vocab_size": 99,
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 4,
            "max_seq_len": 64,
            "expansion_ratio": 2,
            **_SPECIAL,
        },
        {"d_model": 4096, "n_heads": 32, "n_layers": 32},
    ),
    _causal("llama", "Llama", _GROUPED, {}, quick=True),
    _causal("mistral", "Mistral", {**_GROUPED, "sliding_window": 6}, {}),
    _causal("qwen2", "Qwen2", _GROUPED, {}),
    _causal("qwen3", "Qwen3", {**_GROUPED, "head_dim": 8}, {}),
    _causal("gemma", "Gemma", {**_GROUPED, "head_dim": 8}, {}),
    _causal("gemma2", "Gemma2", {**_GROUPED, "head_dim": 8, "sliding_window": 6}, {}),
    _causal("phi", "Phi", SMALL, {}),
    _causal("phi3", "Phi3", _GROUPED, {}),
    _causal("stablelm", "StableLm", _GROUPED, {}),
    _causal("olmo2", "Olmo2", _GROUPED, {}),
    _causal("cohere", "Cohere", _GROUPED, {"num_hidden_layers": 8}),
    _causal("granite", "Granite", _GROUPED, {}),
    _causal("starcoder2", "Starcoder2", _GROUPED, {}),
    _causal("mixtral", "Mixtral", {**_MOE, "num_local_experts": 4}, {"experts_implementation": "batched_mm"}),
    row(
        "decoder",
        "mixtral-grouped",
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_GROUPED, "num_local_experts": 4, "experts_implementation": "grouped_mm"},
        None,
        inputs=lambda config: {**words(config), "use_cache": False},
        uncounted="the counter leaves out grouped products",
    ),
    _causal(
        "qwen2-moe",
        "Qwen2Moe",
        {**_MOE, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 28, "num_experts": 4},
        {"experts_implementation": "batched_mm"},
    ),
    _causal(
        "deepseek-v3",
        "DeepseekV3",
        {
            **_MOE,
            "num_key_value_heads": 4,
            "q_lora_rank": 12,
            "kv_lora_rank": 10,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 6,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 20,
            "first_k_dense_replace": 1,
        },
        None,
    ),
    _causal(
        "mamba",
        "Mamba",
        {"vocab_size": 99, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 4, **_SPECIAL},
        None,
    ),
    _causal(
        "mamba2",
        "Mamba2",
        {
            "vocab_size": 99,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "state_size": 4,
            "num_heads": 4,
            "head_dim": 8,
            "n_groups": 2,
            "chunk_size": 8,
            **_SPECIAL,
        },
        None,
    ),
    row(
        "recurrent",
        "rwkv",
        "RwkvForCausalLM",
        "RwkvConfig",
        {"vocab_size": 99, "hidden_size": 24, "num_hidden_layers": 2, "attention_hidden_size": 24, **_SPECIAL},
        None,
    ),
)
