"""A configuration of any model type with a few thousand parameters, to try the type with."""

from typing import Any

from transformers import AutoConfig, PretrainedConfig

VOCABULARY = 320

_SMALL: dict[str, tuple[str, ...]] = {
    "64": ("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim")
    + ("input_embedding_size", "output_embedding_size", "attention_hidden_size", "lru_width")
    + ("embedding_dim", "emb_dim", "backbone_hidden_size"),
    "128": ("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim")
    + ("ffn_hidden_size", "intermediate_size_mlp", "dense_intermediate_size", "dim_ff", "dff")
    + ("d_inner", "feed_forward_size", "mamba_d_ssm"),
    "64 ": ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size")
    + ("shared_intermediate_size", "shared_experts_intermediate_size")
    + ("moe_shared_expert_intermediate_size",),
    "4": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
    + ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
    + ("decoder_attention_heads", "encoder_attention_heads", "num_decoder_attention_heads")
    + ("num_encoder_attention_heads", "swa_num_attention_heads", "index_topk")
    + ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    + ("linear_num_value_heads", "linear_num_heads", "mamba_num_heads", "mamba_n_heads")
    + ("n_mamba_heads", "time_step_rank", "mamba_dt_rank", "num_layers_per_stack"),
    "2": ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads")
    + ("decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers")
    + ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k")
    + ("linear_num_key_heads", "full_attention_interval", "attn_layer_period")
    + ("sliding_window_pattern", "_sliding_window_pattern")
    + ("zero_expert_num", "moe_layer_end_index", "no_rope_layer_interval"),
    "1": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "n_group")
    + ("topk_group", "num_expert_group", "first_k_dense_replace", "num_dense_layers")
    + ("attn_layer_offset", "n_groups", "mamba_n_groups", "mamba_ngroups", "o_groups"),
    "16": ("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    + ("swa_head_dim", "index_head_dim", "linear_key_head_dim", "linear_value_head_dim")
    + ("linear_head_dim", "dim_head", "d_head", "attention_head_size", "kv_channels")
    + ("mamba_d_head", "mamba_head_dim", "rotary_dim", "query_pre_attn_scalar", "global_head_dim")
    + ("attention_head_dim", "hidden_size_per_layer_input", "o_lora_rank", "laurel_rank")
    + ("index_n_heads",),  # of fewer all scores of a token may be 0, and which is first is chance
    "32": ("kv_lora_rank", "q_lora_rank", "qk_head_dim", "mamba_headdim"),
    "8": ("sliding_window", "state_size", "mamba_d_state", "ssm_state_size", "attention_chunk_size")
    + ("window_size", "attention_window_size", "sliding_window_size", "local_attention")
    + ("chunk_size", "mamba_chunk_size", "block_size"),
    "256": ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "context_length")
    + ("max_target_positions",),
    str(VOCABULARY): ("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size")
    + ("unpadded_vocab_size",),
    "0": ("num_kv_shared_layers",)
    + ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id")
    + ("decoder_start_token_id", "forced_eos_token_id", "eod_token_id"),
}
"""Values by which a model becomes tiny, and the names that take them."""
_DROPOUT = ("dropout", "pdrop", "_drop", "layerdrop")
_OF_TYPE: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16, "attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25},
    "distilbert": {"dim": 64, "hidden_dim": 128},
    "falcon": {"alibi": True, "num_kv_heads": 4},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128},
    "gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 8},
    "granite": {"logits_scaling": 8.0},
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "layer_types": ["mamba", "attention"] * 2,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 64,
        "split_ngram_parts": 2,
        "ple_layer_ids": [2],
    },
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 16]},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"chunk_size": 64},
    "zamba": {"attn_layer_offset": 0, "attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "layer_types": ["mamba", "hybrid"] * 2,
        "mamba_ngroups": 1,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "n_mamba_heads": 4,
        "mamba_headdim": 32,
    },
    "zaya": {"num_experts_per_tok": 1},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 16},
}


def tiny_config(model_type: str, *, as_decoder: bool = True) -> PretrainedConfig:
    """Return a configuration without dropout; raises whatever the type's own class raises.

    Args:
        model_type: As transformers has it.
        as_decoder: Let an encoder, of which there is a decoder too, be one.
    """
    given = AutoConfig.for_model(model_type)
    changes = _changes(given)
    if as_decoder and getattr(given, "is_decoder", None) is False:
        changes["is_decoder"] = True
    config: PretrainedConfig = AutoConfig.for_model(model_type, **changes)
    return config


def _changes(config: PretrainedConfig) -> dict[str, Any]:
    """Return the values by which a configuration becomes tiny, its parts by their own types."""
    given = config.to_dict()
    changes: dict[str, Any] = {}
    for value, names in _SMALL.items():
        for name in names:
            if name in given and isinstance(given[name], int | None):
                changes[name] = int(value)
    for name, value in given.items():
        if isinstance(value, float) and any(part in name for part in _DROPOUT):
            changes[name] = 0.0
        part = config.__dict__.get(name)
        if isinstance(part, PretrainedConfig):
            changes[name] = _changes(part)
    if "kv_lora_rank" in given and "num_key_value_heads" in given:
        changes["num_key_value_heads"] = 4  # latent attention has as many as there are heads
    for name in ("n_inner", "sliding_window"):
        if name in given and given[name] is None:
            changes.pop(name, None)
    return changes | _OF_TYPE.get(config.model_type, {})
