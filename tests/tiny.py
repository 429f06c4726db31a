"""Small real things to test with: tokenizers, row files and the recipes that name them."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from peft_dist.config.recipe import Recipe
from peft_dist.data.tokenize import TokenizedRows, tokenize_rows

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
    raw: dict[str, Any] = {"model": {"name": str(model)}, "data": {"train": str(train)}}
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section} if isinstance(section, dict) else section
    return Recipe.model_validate(raw)


def tokenised(
    folder: Path, rows: Iterable[Any], which: Literal["train", "eval"] = "train", **sections: Any
) -> TokenizedRows:
    """Write rows into `folder` and tokenise them with its `model`, cached in its `cache`."""
    path = write_jsonl(folder / f"{which}.jsonl", rows)
    return tokenize_rows(tiny_recipe(folder / "model", path, **sections), which, folder / "cache")
