"""The shapes of a decoder's parameters, from the fields of its config.json.

A test counts them against transformers' own models. Types that are not listed are refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from peft_dist.common.errors import ModelError, nearest
from peft_dist.plan.shapes import Linear, ModelShape

Config = Mapping[str, Any]
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
    "n_embd",
    "n_layer",
    "n_head",
    "n_positions",
    "max_position_embeddings",
)
_SIZES_OR_NULL = ("num_key_value_heads", "head_dim", "n_inner", "ffn_dim", "word_embed_proj_dim")
_LARGEST = 10**9
"""No size of a model is larger, and products of all of them are still numbers."""


def read_shape(config: Config, *, where: str) -> ModelShape:
    """Return the shape of the model that a config describes.

    Args:
        config: What config.json holds.
        where: Its place, for errors.

    Raises:
        ModelError: For a type that is not known, or a field that is missing.
    """
    inner = config.get("text_config")
    if isinstance(inner, Mapping) and config.get("model_type") not in _SHAPES:
        tied = config.get("tie_word_embeddings", inner.get("tie_word_embeddings", True))
        config = {**inner, "tie_word_embeddings": tied}
    kind = str(config.get("model_type"))
    if kind not in _SHAPES:
        raise ModelError(
            f"no plan for architecture {kind!r}",
            where=where,
            remedy=nearest(kind, _SHAPES),
        )
    remedy = "take the model's own config"
    for name in (*_SIZES, *_SIZES_OR_NULL):
        size = config.get(name, 1)
        is_size = isinstance(size, int) and not isinstance(size, bool) and 1 <= size <= _LARGEST
        if not is_size and not (size is None and name in _SIZES_OR_NULL):
            raise ModelError(f"{name} is {str(size)[:40]}, no size", where=where, remedy=remedy)
    try:
        shape = _SHAPES[kind](config)
    except KeyError as error:
        raise ModelError(f"{error} is missing", where=where, remedy=remedy) from None
    if any(0 in (linear.out_features, linear.in_features) for linear in shape.linears):
        raise ModelError(
            f"{shape.heads} attention heads are too many for a width of {shape.hidden}",
            where=where,
            remedy=remedy,
        )
    return shape


def _llama(config: Config, **changes: Any) -> ModelShape:
    """Return the general decoder: rotary grouped attention, gated feed-forward, RMS norms."""
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    heads = int(config["num_attention_heads"])
    groups = int(config.get("num_key_value_heads") or heads)
    width = int(config.get("head_dim") or hidden // heads)
    query, key = heads * width, groups * width
    biased = bool(config.get("attention_bias", False))
    mlp_biased = bool(config.get("mlp_bias", False))
    shape = ModelShape(
        model_type=str(config["model_type"]),
        layers=int(config["num_hidden_layers"]),
        hidden=hidden,
        vocabulary=int(config["vocab_size"]),
        heads=heads,
        query_width=query,
        key_width=key,
        intermediate=inner,
        linears=(
            Linear("q_proj", query, hidden, biased),
            Linear("k_proj", key, hidden, biased),
            Linear("v_proj", key, hidden, biased),
            Linear("o_proj", hidden, query, biased),
            Linear("gate_proj", inner, hidden, mlp_biased),
            Linear("up_proj", inner, hidden, mlp_biased),
            Linear("down_proj", hidden, inner, mlp_biased),
        ),
        vector_parameters=2 * hidden,
        outer_parameters=hidden,
        tied=bool(config.get("tie_word_embeddings", False)),
    )
    return replace(shape, **changes)


def _qwen2(config: Config) -> ModelShape:
    shape = _llama(config)
    biased = tuple(
        replace(linear, bias=linear.name in ("q_proj", "k_proj", "v_proj"))
        for linear in shape.linears
    )
    return replace(shape, linears=biased)


def _head_norms(shape: ModelShape) -> ModelShape:
    vectors = shape.vector_parameters + 2 * shape.query_width // shape.heads
    return replace(shape, head_norms=True, vector_parameters=vectors)


def _experts(shape: ModelShape, config: Config, *, biased: bool) -> ModelShape:
    """Return a decoder with experts, and a router, in the place of its feed-forward."""
    hidden, inner = shape.hidden, shape.intermediate
    experts = int(config.get("num_experts") or config["num_local_experts"])
    attention = tuple(one for one in shape.linears if one.name[1:] == "_proj")
    router = experts * hidden + (experts if biased else 0)
    return replace(
        shape,
        linears=(
            *attention,
            Linear("gate_up_proj", 2 * inner, hidden, biased, copies=experts),
            Linear("down_proj", hidden, inner, biased, copies=experts),
        ),
        vector_parameters=shape.vector_parameters + router,
        experts=experts,
        experts_per_token=int(config["num_experts_per_tok"]),
    )


def _qwen3_moe(config: Config) -> ModelShape:
    width = {**config, "intermediate_size": config["moe_intermediate_size"]}
    shape = _head_norms(_llama(width))
    return _experts(shape, config, biased=False)


def _gpt_oss(config: Config) -> ModelShape:
    shape = _llama({"head_dim": 64, "attention_bias": True, **config})
    # Learned sinks; attention is transformers' eager one, whose scores stand in memory.
    vectors = shape.vector_parameters + shape.heads
    shape = replace(shape, vector_parameters=vectors, attention_scores=True)
    return _experts(shape, config, biased=True)


def _gemma(config: Config, *, head_norms: bool) -> ModelShape:
    tied = bool(config.get("tie_word_embeddings", True))
    hidden = int(config["hidden_size"])
    shape = _llama({"head_dim": 256, **config}, tied=tied, norms=4, vector_parameters=4 * hidden)
    if head_norms:
        return _head_norms(shape)
    return replace(
        shape,
        attention_softcap=config.get("attn_logit_softcapping", 50.0) is not None,
        head_softcap=config.get("final_logit_softcapping", 30.0) is not None,
    )


def _phi3(config: Config) -> ModelShape:
    shape = _llama(config)
    query, key, hidden, inner = (
        shape.query_width, shape.key_width, shape.hidden, shape.intermediate
    )  # fmt: skip
    linears = (
        Linear("qkv_proj", query + 2 * key, hidden),
        Linear("o_proj", hidden, query),
        Linear("gate_up_proj", 2 * inner, hidden),
        Linear("down_proj", hidden, inner),
    )
    return replace(shape, linears=linears, joined_qkv=True)


def _plain(
    config: Config,
    linears: Callable[[int, int], tuple[Linear, ...]],
    *,
    names: tuple[str, str, str, str],
    outer: int,
    tied: bool,
    rotary: bool,
    joined_qkv: bool,
) -> ModelShape:
    """Return a decoder with full attention, a plain feed-forward and layer norms with biases."""
    hidden, layers, heads = (int(config[name]) for name in names[:3])
    inner = int(config.get(names[3]) or 4 * hidden)
    return ModelShape(
        model_type=str(config["model_type"]),
        layers=layers,
        hidden=hidden,
        vocabulary=int(config["vocab_size"]),
        heads=heads,
        query_width=hidden,
        key_width=hidden,
        intermediate=inner,
        linears=linears(hidden, inner),
        vector_parameters=4 * hidden,
        outer_parameters=outer,
        tied=tied,
        gated=False,
        joined_qkv=joined_qkv,
        rotary=rotary,
        float32_norms=False,
    )


def _gpt2(config: Config) -> ModelShape:
    hidden = int(config["n_embd"])
    return _plain(
        config,
        lambda hidden, inner: (
            Linear("c_attn", 3 * hidden, hidden, True),
            Linear("c_proj", hidden, hidden, True),
            Linear("c_fc", inner, hidden, True),
            Linear("c_proj", hidden, inner, True),
        ),
        names=("n_embd", "n_layer", "n_head", "n_inner"),
        outer=int(config.get("n_positions", 1024)) * hidden + 2 * hidden,
        tied=bool(config.get("tie_word_embeddings", True)),
        rotary=False,
        joined_qkv=True,
    )


def _gpt_neox(config: Config) -> ModelShape:
    biased = bool(config.get("attention_bias", True))
    return _plain(
        config,
        lambda hidden, inner: (
            Linear("query_key_value", 3 * hidden, hidden, biased),
            Linear("dense", hidden, hidden, biased),
            Linear("dense_h_to_4h", inner, hidden, True),
            Linear("dense_4h_to_h", hidden, inner, True),
        ),
        names=("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
        outer=2 * int(config["hidden_size"]),
        tied=bool(config.get("tie_word_embeddings", False)),
        rotary=True,
        joined_qkv=True,
    )


def _opt(config: Config) -> ModelShape:
    hidden = int(config["hidden_size"])
    embedded = int(config.get("word_embed_proj_dim") or hidden)
    # Two positions more than rows can have, as in the model's own table.
    outer = (int(config["max_position_embeddings"]) + 2) * hidden + 2 * hidden
    if embedded != hidden:
        outer += 2 * embedded * hidden - int(config["vocab_size"]) * (hidden - embedded)
    biased = bool(config.get("enable_bias", True))
    return _plain(
        config,
        lambda hidden, inner: (
            Linear("k_proj", hidden, hidden, biased),
            Linear("v_proj", hidden, hidden, biased),
            Linear("q_proj", hidden, hidden, biased),
            Linear("out_proj", hidden, hidden, biased),
            Linear("fc1", inner, hidden, biased),
            Linear("fc2", hidden, inner, biased),
        ),
        names=("hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_dim"),
        outer=outer,
        tied=bool(config.get("tie_word_embeddings", True)),
        rotary=False,
        joined_qkv=False,
    )


_SHAPES: dict[str, Callable[[Config], ModelShape]] = {
    "gemma2": lambda config: _gemma(config, head_norms=False),
    "gemma3_text": lambda config: _gemma(config, head_norms=True),
    "gpt2": _gpt2,
    "gpt_oss": _gpt_oss,
    "gpt_neox": _gpt_neox,
    "llama": _llama,
    "mistral": _llama,
    "opt": _opt,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen3_moe": _qwen3_moe,
    "qwen3": lambda config: _head_norms(_llama({"head_dim": 128, **config})),
}
