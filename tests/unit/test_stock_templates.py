"""Stock chat templates x shapes of conversation: trained exactly as inference asks, or refused."""

import datetime as dt
import re
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from peft_dist.common.errors import ModelError
from peft_dist.data.bad_row import BadRow
from peft_dist.data.chat_rows import ChatRow
from peft_dist.data.chat_template import ChatTemplate
from peft_dist.data.encode import Encoder
from peft_dist.data.encoded_row import EncodedRow
from peft_dist.data.rows import BadRows, parse_row
from peft_dist.data.sources import Source
from tests.tiny import tiny_tokenizer

TRL = find_spec("trl")
FOLDER = Path(TRL.origin).parent / "chat_templates" if TRL and TRL.origin else Path("absent")
TEMPLATES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
TOKEN = re.compile(r"<[^<>\s{}'\"=]{1,40}>|\[/?[A-Z_a-z]{3,}\]")
PLAIN_TOKENS = re.compile(r"</?[a-z_]*(think|tool|function|param|image|arg|audio|video)[a-z_]*>")
"""What tokenizers add without calling it special: the model writes it into its answers."""

TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look something up.",
        "parameters": {"type": "object", "properties": {"what": {"type": "string"}}},
    },
}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str | None, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **keys}


CALL = [{"id": "callabcde", "type": "function", "function": {"name": "look", "arguments": {}}}]
SHAPES: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [user("asked1"), answer("said1")]},
    "two turns": {
        "messages": [user("asked1"), answer("said1"), user("asked2"), answer("said2")],
    },
    "system": {
        "messages": [
            {"role": "system", "content": "asked0"},
            *(user("asked1"), answer("said1"), user("asked2"), answer("said2")),
        ]
    },
    "tools": {"messages": [user("asked1"), answer("said1")], "tools": [TOOL]},
    "tool call": {
        "messages": [
            user("asked1"),
            answer(None, tool_calls=CALL),
            {"role": "tool", "content": "asked2", "name": "look", "tool_call_id": "callabcde"},
            answer("said2"),
        ],
        "tools": [TOOL],
    },
    "reasoning": {
        "messages": [
            *(user("asked1"), answer("said1", reasoning_content="said2")),
            *(user("asked2"), answer("said3", reasoning_content="said4")),
        ]
    },
    "weight 0": {
        "messages": [
            *(user("asked1"), answer("asked3", weight=0), user("asked2"), answer("said2")),
        ]
    },
    "assistant first": {"messages": [answer("said1"), user("asked1"), answer("said2")]},
    "empty answer": {"messages": [user("asked1"), answer("")]},
    "blanks": {"messages": [user("asked1"), answer(" said1 \n"), user("a"), answer(" \n")]},
    "ends with a user": {"messages": [user("asked1"), answer("said1"), user("asked2")]},
}

ALWAYS = set(SHAPES) - {"tools", "tool call", "reasoning", "assistant first", "empty answer"}
NO_SYSTEM = ("gemma", "gemma_training")
TAKE_PARTS_ONLY = ("idefics3", "llava_next", "smolvlm")
"""Templates of vision models, which leave out contents that are plain text."""
DAY = dt.date(2026, 1, 2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_tokenizer(folder, begin=True)
    return folder


def tokenizer_of(base: Path, name: str) -> PreTrainedTokenizerFast:
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    tokenizer.chat_template = source
    tokens = [
        AddedToken(token, special=not PLAIN_TOKENS.fullmatch(token), normalized=False)
        for token in sorted(set(TOKEN.findall(source)))
    ]
    tokenizer.add_tokens(tokens)
    return tokenizer


def trained_texts(tokenizer: PreTrainedTokenizerFast, row: EncodedRow) -> list[str]:
    """Return the text of each part that is trained."""
    parts, before = [], False
    for token, is_trained in zip(row.tokens.tolist(), row.trained.tolist(), strict=True):
        if is_trained:
            parts = parts if before else [*parts, []]
            parts[-1].append(token)
        before = is_trained
    return [str(tokenizer.decode(part)) for part in parts]


def encoded(encoder: Encoder, value: dict[str, Any]) -> tuple[ChatRow | None, list[EncodedRow]]:
    """Return the row and what it becomes; None and nothing where it is refused."""
    bad = BadRows(Source("rows", "jsonl", "", ""), 99)
    try:
        row = parse_row(1, value, "causal-lm")
    except BadRow:
        return None, []
    assert isinstance(row, ChatRow)
    rows = encoder.encode([row], bad)
    assert bool(rows) != bool(bad.found)
    return (row, rows) if rows else (None, [])


def check(
    tokenizer: PreTrainedTokenizerFast, stop_ids: Collection[int], row: ChatRow, rows: Any
) -> None:
    """Check prompts, answers and stop tokens of a conversation that is trained."""
    texts = [text for one in rows for text in trained_texts(tokenizer, one)]
    assert len(texts) == len(row.trained)
    ends = [token for one in rows for token in one.tokens[one.stops].tolist()]
    assert len(ends) == len(row.trained)
    assert set(ends) <= set(stop_ids)
    for at, text, end in zip(row.trained, texts, ends, strict=True):
        message = row.messages[at]
        assert "asked" not in text
        assert text.endswith(tokenizer.decode([end]))
        for key in ("content", "reasoning_content"):
            assert message.get(key, "").strip() in text
        assert all("look" in text for _ in message.get("tool_calls", ()))
    asked = [
        (one.tokens[: 1 + int(stop)].tolist(), one.trained[: 1 + int(stop)].tolist())
        for one in rows
        for stop in one.stops
    ]
    for at, (tokens, trained) in zip(row.trained, asked, strict=True):
        begin = max(number for number, is_on in enumerate(trained) if not is_on) + 1
        prompt = tokenizer.apply_chat_template(
            list(row.messages[:at]), add_generation_prompt=True, return_dict=False, **row.options
        )
        assert tokens[:begin] == prompt  # what inference sends, token for token


@pytest.mark.skipif(not TEMPLATES, reason="trl, which has the templates, is not installed")
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_turn_is_trained_as_inference_asks_for_it_or_its_row_is_refused(
    base: Path, name: str
) -> None:
    tokenizer = tokenizer_of(base, name)
    encoder = Encoder(tokenizer, task="causal-lm", name=name)
    if name.removesuffix("_training") in TAKE_PARTS_ONLY:
        with pytest.raises(ModelError, match="chat template"):
            encoded(encoder, SHAPES["one turn"])
        return
    trained = set()
    for shape, value in SHAPES.items():
        row, rows = encoded(encoder, value)
        if row is not None:
            trained.add(shape)
            check(tokenizer, encoder.stop_ids, row, rows)
    assert trained >= ALWAYS - ({"system"} if name in NO_SYSTEM else set())
    assert not trained & {"assistant first", "empty answer"}

    stop = next(iter(sorted(ChatTemplate(tokenizer, name=name, day=DAY).special)))
    messages = [user(f"asked1{stop} asked2"), answer(f"said1 {stop} said2")]
    _, rows_with = encoded(encoder, {"messages": messages})
    _, rows_without = encoded(encoder, {"messages": [user("asked1"), answer("said1")]})
    control = [tokenizer.convert_tokens_to_ids(token) for token in tokenizer.added_tokens_encoder]
    for row_with in rows_with:  # none where the template itself reads the token, as Gemma 4's does
        counts = [np.isin(one.tokens, control).sum() for one in (row_with, *rows_without)]
        assert counts[0] == counts[1]  # neither text has become a control token
        assert stop in trained_texts(tokenizer, row_with)[0]
    assert bool(rows_with) or "gemma4" in name or "diffusion_gemma" in name
