"""Configs of models that no test has weights of: real sizes, and small ones that compute fast."""

import json
from pathlib import Path
from typing import Any

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


def _decoder(
    kind: str, hidden: int, inner: int, layers: int, heads: int, groups: int, words: int
) -> dict[str, Any]:
    return LLAMA | {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": words,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _decoder("llama", 4096, 14336, 32, 32, 8, 128256),
    "llama-3.3-70b": _decoder("llama", 8192, 28672, 80, 64, 8, 128256),
    "llama-3.1-405b": _decoder("llama", 16384, 53248, 126, 128, 8, 128256),
    "llama-2-7b": _decoder("llama", 4096, 11008, 32, 32, 32, 32000),
    "mistral-small-24b": _decoder("mistral", 5120, 32768, 40, 32, 8, 131072) | {"head_dim": 128},
    "phi-4": _decoder("phi3", 5120, 17920, 40, 40, 10, 100352),
    "qwen3-32b": _decoder("qwen3", 5120, 25600, 64, 64, 8, 151936) | {"head_dim": 128},
    "gemma-2-27b": _decoder("gemma2", 4608, 36864, 46, 32, 16, 256000)
    | {
        "head_dim": 128,
        "tie_word_embeddings": True,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma-3-27b": _decoder("gemma3_text", 5376, 21504, 62, 32, 16, 262208)
    | {"head_dim": 128, "tie_word_embeddings": True},
    "qwen3-30b-a3b": _decoder("qwen3_moe", 2048, 6144, 48, 32, 4, 151936)
    | {
        "head_dim": 128,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
    "qwen3-235b-a22b": _decoder("qwen3_moe", 4096, 12288, 94, 64, 4, 151936)
    | {
        "head_dim": 128,
        "moe_intermediate_size": 1536,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
    "gpt-oss-20b": _decoder("gpt_oss", 2880, 2880, 24, 64, 8, 201088)
    | {"head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4},
    "gpt-oss-120b": _decoder("gpt_oss", 2880, 2880, 36, 64, 8, 201088)
    | {"head_dim": 64, "num_local_experts": 128, "num_experts_per_tok": 4},
    # As wide as a small real model, and shallow: a simulation of it takes a second.
    "shallow": LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 3,
        "num_attention_heads": 32,
    },
    "shallow-few-words": LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 3,
        "num_attention_heads": 32,
        "vocab_size": 1024,
    },
}


def model_folder(folder: Path, name: str, **changes: Any) -> Path:
    """Write the config.json of a model, and nothing else, into a folder and return that."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name] | changes), encoding="utf-8")
    return folder
