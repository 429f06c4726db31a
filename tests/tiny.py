"""Small real things to test with: models, tokenizers, row files and the recipes that name them."""

import json
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from peft_dist.checkpoint.adapter_file import replace_adapter, write_partial
from peft_dist.config.recipe import Recipe
from peft_dist.data.token_cache import TokenizedRows, tokenize_rows
from peft_dist.methods import Method

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
CORPUS = (
    "the cat sat on the mat and the dog sat on the log",
    "Definition: any of various large diving ducks\nCategory: animal plant food person place",
)
VOCABULARY = 320
"""Tokens of every tiny tokenizer: 256 bytes, the special tokens and a few merges."""

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_GROUPED = {"num_key_value_heads": 2}
# Windows and caps are small enough to matter within a row.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gemma2": _SIZES
    | _GROUPED
    | {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": _SIZES
    | _GROUPED
    | {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt2": {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "gpt_neox": _SIZES | {"attention_dropout": 0.0, "hidden_dropout": 0.0},
    "llama": _SIZES | _GROUPED | {"tie_word_embeddings": False},
    "mistral": _SIZES | _GROUPED | {"sliding_window": 8},
    "opt": {
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "phi3": _SIZES | _GROUPED | {"resid_pdrop": 0.0},
    "qwen2": _SIZES | _GROUPED | {"tie_word_embeddings": True},
    "qwen3": _SIZES | _GROUPED | {"head_dim": 16, "tie_word_embeddings": True},
    "bert": _SIZES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
"""Every supported architecture, a few thousand parameters of it, without dropout."""


def tiny_model(
    folder: Path,
    architecture: str,
    *,
    max_shard_size: str | None = None,
    trunk_only: bool = False,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> PreTrainedModel:
    """Save a random model of an architecture with a tokenizer, and return it.

    Args:
        folder: Where to save it.
        architecture: One of `ARCHITECTURES`.
        max_shard_size: Most bytes of one safetensors file, such as "50KB". Off: one file.
        trunk_only: Save it without its head, and so without the prefix of the trunk's names.
        dtype: What it is stored in.
        changes: Values of config.json.
    """
    classify = architecture == "bert"
    facts = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "vocab_size": VOCABULARY}
    config = AutoConfig.for_model(architecture, **facts | ARCHITECTURES[architecture] | changes)
    auto_class = AutoModelForSequenceClassification if classify else AutoModelForCausalLM
    torch.manual_seed(0)
    model: PreTrainedModel = auto_class.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Released models have no zero biases and no norms of exactly one; a mix-up must show.
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.to(dtype)
    limit = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    (model.base_model if trunk_only else model).save_pretrained(folder, **limit)
    (tiny_encoder_tokenizer if classify else tiny_tokenizer)(folder)
    return model.eval()


def completion_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Return rows of different lengths, whose completion is the animal that the prompt names."""
    source = random.Random(seed)
    rows = []
    for _ in range(count):
        animal = source.choice(("cat", "dog"))
        words = " ".join(source.choices(("the", "mat", "log", "and", "on"), k=source.randint(1, 9)))
        rows.append({"prompt": f"{words} {animal}:", "completion": f" {animal}"})
    return rows


def preference_rows(count: int, form: str, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows that prefer the animal which the prompt names to the other one.

    Args:
        count: How many prompts.
        form: `pair` for pairs of answers; `judged` for two answers with verdicts to each prompt.
        seed: Of the prompts.
    """
    rows: list[dict[str, Any]] = []
    for row in completion_rows(count, seed):
        wrong = " dog" if row["completion"] == " cat" else " cat and the log"
        if form == "pair":
            rows.append({"prompt": row["prompt"], "chosen": row["completion"], "rejected": wrong})
            continue
        rows.append({**row, "label": True})
        rows.append({"prompt": row["prompt"], "completion": wrong, "label": False})
    return rows


def labelled_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Return rows of different lengths whose label is one of three, and clear from the text."""
    labels = {"animal": "cat dog", "place": "log mat", "plant": "and the"}
    source = random.Random(seed)
    rows = []
    for _ in range(count):
        label = source.choice(sorted(labels))
        words = source.choices(labels[label].split(), k=source.randint(1, 9))
        rows.append({"text": " ".join(words), "label": label})
    return rows


def tiny_tokenizer(
    folder: Path, *, begin: bool = False, chat_template: str | None = CHAT_TEMPLATE
) -> PreTrainedTokenizerFast:
    """Save a byte-level BPE tokenizer whose pad token is its end token, as in many real ones.

    Args:
        folder: Where to save it.
        begin: Put `<|begin|>` before every text.
        chat_template: Template of a conversation; None for a tokenizer that has none.
    """
    special = ["<|end|>", "<|start|>", "<|begin|>"]
    tokenizer = _trained(special)
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 2)]
        )
    fast = _wrapped(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|end|>",
        bos_token="<|begin|>" if begin else None,
        chat_template=chat_template,
    )
    fast.save_pretrained(folder)
    return fast


def tiny_encoder_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Save a tokenizer that puts [CLS] before and [SEP] after every text, as BERT's does."""
    tokenizer = _trained(["[PAD]", "[CLS]", "[SEP]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    fast = _wrapped(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    fast.save_pretrained(folder)
    return fast


# transformers leaves its own signature untyped
_wrapped: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast


def _trained(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return tokenizer


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """Write one JSON value per line and return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_recipe(model: Path, train: Path, /, **sections: Any) -> Recipe:
    """Return a recipe for a model folder and a row file; `sections` are merged into it."""
    raw: dict[str, Any] = {
        "model": {"name": str(model), "dtype": "float32"},  # the same bits on every processor
        "data": {"train": str(train)},
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section} if isinstance(section, dict) else section
    return Recipe.model_validate(raw)


def tokenised(
    folder: Path, rows: Iterable[Any], which: Literal["train", "eval"] = "train", **sections: Any
) -> TokenizedRows:
    """Write rows into `folder` and tokenise them with its `model`, cached in its `cache`."""
    path = write_jsonl(folder / f"{which}.jsonl", rows)
    return tokenize_rows(tiny_recipe(folder / "model", path, **sections), which, folder / "cache")


def save_adapter(
    folder: Path, method: Method[Any], peft: PeftModel, state: Mapping[str, torch.Tensor]
) -> None:
    """Write an adapter folder, unchecked."""
    tensors, config = method.saved(peft, state), method.saved_config(peft)
    replace_adapter(write_partial(folder, tensors, config), folder)
