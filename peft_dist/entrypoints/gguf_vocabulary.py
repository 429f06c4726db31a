"""The tokenizer of a model folder as GGUF holds it: two kinds, byte-level BPE and SentencePiece's.

llama.cpp splits text by rules that it knows under names, so a tokenizer is written where its own
rules, as tokenizer.json has them, are those of a known name.
"""

import json
import re
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig

from peft_dist.entrypoints.gguf_architecture import Refuse

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITTERS = {
    ("digits", False): "smollm",
    ("bytes", False): "gpt-2",
    (_WORDS % "{1,3}", True): "llama-bpe",
    (_WORDS % "{1,3}", False): "dbrx",
    (_WORDS % "", False): "qwen2",
    (_CASES, True): "tekken",
}
"""llama.cpp's name of a way to split text, by expression (or "digits": each of its own, or "bytes":
GPT-2's) and `ignore_merges`."""


def add_vocabulary(writer: Any, folder: Path, config: PreTrainedConfig, refuse: Refuse) -> None:
    """Add the tokenizer and chat template of a folder to a `gguf.GGUFWriter`.

    Args:
        writer: Where to.
        folder: With tokenizer.json.
        config: Its number of tokens is that of the embedding.
        refuse: Called with what llama.cpp, or this file, does not know.
    """
    import gguf

    file = folder / "tokenizer.json"
    if not file.is_file():
        refuse("only tokenizers with a tokenizer.json are written here")
    facts = json.loads(file.read_text(encoding="utf-8"))
    model = facts["model"]
    if model["type"] != "BPE":
        refuse(f"{model['type']} tokenizers are not written here")
    pieces = bool(model.get("byte_fallback"))
    tokens, types = _tokens(facts, config, pieces=pieces)
    if pieces:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_prefixes_space(facts, refuse))
        writer.add_token_scores(_scores(tokens, model["merges"]))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splitter(facts, refuse))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(folder, load_merges=not pieces, n_vocab=len(tokens))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    plain, whole = (tokenizer.encode("a", add_special_tokens=on) for on in (False, True))
    # As the tokenizer does, not as files of several ages say.
    special.add_special_token = {
        "bos": whole[: -len(plain)] == [tokenizer.bos_token_id],
        "eos": whole[len(plain) :] == [tokenizer.eos_token_id],
    }
    if len(whole) - len(plain) != sum(special.add_special_token.values()):
        refuse("the tokenizer adds other tokens to a text than one at its begin and one at its end")
    special.add_to_gguf(writer, quiet=True)


def _tokens(
    facts: dict[str, Any], config: PreTrainedConfig, *, pieces: bool
) -> tuple[list[str], list[int]]:
    """Return text and `gguf.TokenType` of every row of the embedding."""
    from gguf import TokenType

    count: int = config.vocab_size
    tokens, types = [f"[PAD{number}]" for number in range(count)], [TokenType.UNUSED] * count
    for text, number in facts["model"]["vocab"].items():
        tokens[number], types[number] = text, TokenType.NORMAL
        if pieces and re.fullmatch("<0x[0-9A-F]{2}>", text):
            types[number] = TokenType.BYTE
    for added in facts["added_tokens"]:
        # What people write themselves is found in the text as it is, with spaces.
        text, special = added["content"], added["special"]
        tokens[added["id"]] = text if special else text.replace("\u2581", " ")
        types[added["id"]] = TokenType.CONTROL if special else TokenType.USER_DEFINED
    unknown = facts["model"].get("unk_token")
    if pieces and unknown in facts["model"]["vocab"]:
        types[facts["model"]["vocab"][unknown]] = TokenType.UNKNOWN
    return tokens, [int(kind) for kind in types]


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """Return what llama.cpp merges by, the highest first: the rank of the merge into each token.

    A tokenizer.json that was made of a SentencePiece model has the order of its scores alone.
    """
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _splitter(facts: dict[str, Any], refuse: Refuse) -> str:
    normalizer = facts["normalizer"]
    parts = facts["pre_tokenizer"] or {}
    parts = parts.get("pretokenizers", [parts])
    rule = None
    if parts == [_BYTES]:
        rule = "bytes"
    elif parts == [{"type": "Digits", "individual_digits": True}, _BYTES]:
        rule = "digits"
    elif [part.get("type") for part in parts] == ["Split", "ByteLevel"]:
        split, level = parts
        whole = split["behavior"] == "Isolated" and not split["invert"]
        if whole and not level["use_regex"] and not level["add_prefix_space"]:
            rule = split["pattern"].get("Regex")
    found = SPLITTERS.get((str(rule), bool(facts["model"].get("ignore_merges"))))
    if found is None or normalizer not in (None, {"type": "NFC"}):
        refuse("its tokenizer splits text in a way that is not known here")
    return found


def _prefixes_space(facts: dict[str, Any], refuse: Refuse) -> bool:
    """Return whether a SentencePiece tokenizer puts a space in front of a text."""
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    normalizer, splitter = facts["normalizer"] or {}, facts["pre_tokenizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    if splitter.get("type") == "Metaspace" and not normalizer:
        return bool(splitter["prepend_scheme"] != "never")
    if steps == [{"type": "Prepend", "prepend": "\u2581"}, spaces] and not splitter:
        return True
    # Gemma's: after spaces have become something else, its splitter finds none.
    if steps != [spaces] or splitter.get("pattern", {"String": " "}) != {"String": " "}:
        refuse("its tokenizer treats spaces in a way that is not known here")
    return False
