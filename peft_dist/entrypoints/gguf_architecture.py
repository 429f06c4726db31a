"""How models of a few types stand in a GGUF file: names, metadata, and what is turned around.

The facts are those of llama.cpp's graphs (`src/models/*.cpp`) and of its converter (`conversion/`).
A setting that its graph of a model does not know is refused.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

Refuse = Callable[[str], NoReturn]


class _Family(NamedTuple):
    """What tells the models of a type from those of others."""

    architecture: str
    """A member of `gguf.MODEL_ARCH`."""
    activation: str = "silu"
    permuted: bool = False
    """Whether rows of queries and keys are ordered for interleaved rotary embeddings."""
    norms_add_one: bool = False
    """Whether norms multiply by 1 + weight: llama.cpp's by the weight."""
    sliding_of: int = 0
    """One layer of so many attends to everything, the others through the window. 0: all do."""
    scaled_at: int = 0
    """Layers of the one model whose queries are scaled by hidden size over heads."""


GELU = "gelu_pytorch_tanh"
FAMILIES = {
    "gemma2": _Family("GEMMA2", GELU, norms_add_one=True, sliding_of=2, scaled_at=46),
    "gemma3_text": _Family("GEMMA3", GELU, norms_add_one=True, sliding_of=6, scaled_at=62),
    "llama": _Family("LLAMA", permuted=True),
    "mistral": _Family("LLAMA", permuted=True),
    "phi3": _Family("PHI3"),
    "qwen2": _Family("QWEN2"),
    "qwen3": _Family("QWEN3"),
}
"""By `model_type` of config.json."""


class Architecture:
    """One model as llama.cpp knows it."""

    def __init__(self, config: PreTrainedConfig, family: _Family) -> None:
        """Keep what the config says; `architecture_of` has checked it."""
        import gguf

        kind = getattr(gguf.MODEL_ARCH, family.architecture)
        self.name: str = gguf.MODEL_ARCH_NAMES[kind]
        self._config: Any = config
        self._family = family
        self._names = gguf.get_tensor_name_map(kind, self._config.num_hidden_layers)
        self._head_dim = _head_dim(config)
        self._rope = _rope(config)

    def leaves_out(self, key: str) -> bool:
        """Return whether a tensor of the files is not part of a GGUF file."""
        tied = self._config.tie_word_embeddings and key == "lm_head.weight"
        return tied or key.endswith(".rotary_emb.inv_freq")

    def name_of(self, key: str) -> str | None:
        """Return what GGUF calls a tensor of the files, or None."""
        found: str | None = self._names.get_name(key, try_suffixes=(".weight", ".bias"))
        return found

    def turned(self, key: str, values: torch.Tensor) -> torch.Tensor:
        """Return the values of a tensor as llama.cpp expects them."""
        if self._family.norms_add_one and key.endswith("norm.weight"):
            return values.float() + 1
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        count = heads.get(key.rsplit(".", 2)[-2])
        if not self._family.permuted or count is None:
            return values
        # Rotary pairs are (i, i + dim/2) of a head in transformers and (2 i, 2 i + 1) in GGUF.
        pairs: torch.Tensor = values.unflatten(0, (getattr(self._config, count), 2, -1))
        return pairs.transpose(1, 2).reshape(values.shape)

    def add_metadata(self, writer: Any) -> None:
        """Add what stands in config.json to a `gguf.GGUFWriter`."""
        config = self._config
        window = getattr(config, "sliding_window", None)
        length = config.max_position_embeddings
        if self._family.sliding_of:
            writer.add_sliding_window(window)
        elif self.name == "phi3":
            writer.add_sliding_window(0)  # it insists on a number
        if not self._family.sliding_of and window:
            length = min(length, window)  # there is no window: longer texts would differ
        writer.add_context_length(length)
        writer.add_vocab_size(config.vocab_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self._head_dim)
        writer.add_value_length(self._head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(self._rope["rope_theta"])
        rotated = int(self._head_dim * self._rope.get("partial_rotary_factor", 1.0))
        writer.add_rope_dimension_count(rotated)
        if self.name == "phi3":
            writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        for field in ("attn_logit_softcapping", "final_logit_softcapping"):
            if (cap := getattr(config, field, None)) is not None:
                getattr(writer, f"add_{field}")(cap)

    def extra_tensors(self) -> dict[str, Any]:
        """Return arrays that the file has besides the model's tensors, by name."""
        if self._rope["rope_type"] != "llama3":
            return {}
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](self._config, torch.device("cpu"))
        steps = torch.arange(0, self._head_dim, 2, dtype=torch.float32) / self._head_dim
        factors = self._rope["rope_theta"] ** -steps / scaled.float()
        return {"rope_freqs.weight": factors.numpy()}


def architecture_of(config: PreTrainedConfig, refuse: Refuse) -> Architecture:
    """Return how a model stands in GGUF; call `refuse` with what is not known of it."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        refuse(f"models of type {config.model_type} are not written here")
    facts: Any = config
    if (activation := _activation(config)) != family.activation:
        refuse(f"llama.cpp has no {config.model_type} with the activation {activation}")
    every, layers = family.sliding_of, facts.num_hidden_layers
    kinds = getattr(facts, "layer_types", None) or ["full_attention"] * layers
    full = [not every or number % every == every - 1 for number in range(layers)]
    if family.architecture != "LLAMA" and [kind == "full_attention" for kind in kinds] != full:
        refuse(f"llama.cpp has no {config.model_type} with these layer_types")
    if every and facts.query_pre_attn_scalar != (
        facts.hidden_size // facts.num_attention_heads
        if layers == family.scaled_at
        else _head_dim(config)
    ):
        refuse(f"llama.cpp scales queries otherwise than by {facts.query_pre_attn_scalar}")
    allowed = ("default", "llama3") if family.architecture == "LLAMA" else ("default",)
    if (kind := _rope(config)["rope_type"]) not in allowed:
        refuse(f"{kind} rotary embeddings of {config.model_type} are not written here")
    return Architecture(config, family)


def _activation(config: Any) -> str:
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def _head_dim(config: Any) -> int:
    found = getattr(config, "head_dim", None)
    return int(found or config.hidden_size // config.num_attention_heads)


def _rope(config: Any) -> dict[str, Any]:
    """Return the rotary settings of layers that attend to everything."""
    found: dict[str, Any] = config.rope_parameters
    return dict(found.get("full_attention", found))
