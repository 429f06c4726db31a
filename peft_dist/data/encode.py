"""Rows to tokens: which tokens a row becomes and which of them are trained.

What is trained is decided by position, never by token id, because pad and end are one id in many
tokenizers. Nothing is cached or written here (see `tokenize.py`).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from peft_dist.common import paths
from peft_dist.common.errors import DataError, ModelError
from peft_dist.config.recipe import Recipe
from peft_dist.data.rows import BadRows, ChatRow, CompletionRow, LabelledRow, Row, Task, TextRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Ids = list[int]


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """The tokens of one row; `head` and `tail` of them survive any truncation."""

    line: int
    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    head: int = 0
    tail: int = 0
    label: str | None = None

    def cut(self, *, max_length: int, keep: str) -> "EncodedRow":
        """Return at most `max_length` tokens, from the `start` or the `end` of the row."""
        room = max_length - self.head - self.tail
        assert room >= 1, (max_length, self.head, self.tail)
        last = len(self.tokens) - self.tail
        body = (
            np.arange(self.head, self.head + room)
            if keep == "start"
            else last + np.arange(-room, 0)
        )
        at = np.concatenate((np.arange(self.head), body, np.arange(last, len(self.tokens))))
        return replace(self, tokens=self.tokens[at], trained=self.trained[at])


def load_tokenizer(recipe: Recipe) -> "PreTrainedTokenizerFast":
    """Load the tokenizer that belongs to the recipe's model.

    Raises:
        ModelError: It is missing or broken, or has no fast version (which alone can tell the
            characters of each token).
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import logging

    name = recipe.model.name
    folder = str(paths.staged(name) or name)
    remedy = "put tokenizer.json and tokenizer_config.json beside the model"
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        # Left out, trust_remote_code would be asked for on standard input.
        tokenizer = AutoTokenizer.from_pretrained(
            folder, revision=recipe.model.revision or "main", trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ModelError(
            f"tokenizer cannot be loaded: {error}", where=name, remedy=remedy
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError("the tokenizer has no fast version", where=name, remedy=remedy)
    return tokenizer


class Encoder:
    """Encodes rows with one tokenizer.

    Args:
        tokenizer: A fast tokenizer.
        task: The recipe's `model.task`.
        name: The model, for errors.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", *, task: Task, name: str) -> None:
        """Find out which special tokens the tokenizer itself puts around a text."""
        self._tokenizer = tokenizer
        self._name = name
        self._classify = task == "sequence-classification"
        self._head, self._tail = self._special_tokens()
        end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        if end is None and not self._classify:
            raise ModelError("the tokenizer has no end token", where=name, remedy="set eos_token")
        self.pad_id = int(pad if pad is not None else end or 0)
        self._end: Ids = [] if end is None else [end]
        if not self._classify:
            self._tail = []  # the end token below is the one a model is trained to stop with

    @classmethod
    def of(cls, recipe: Recipe) -> "Encoder":
        """Return the encoder of a recipe; loads its tokenizer.

        Raises:
            ModelError: The tokenizer cannot be used.
        """
        return cls(load_tokenizer(recipe), task=recipe.model.task, name=recipe.model.name)

    @property
    def least_length(self) -> int:
        """Smallest `data.max_length` that leaves room for one token of a row."""
        return len(self._head) + len(self._tail) + 1

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer can lay out a conversation."""
        return bool(self._tokenizer.chat_template)

    def fingerprint(self) -> str:
        """Return a hash of all that decides which tokens a row becomes."""
        tokenizer = self._tokenizer
        facts = [
            tokenizer.backend_tokenizer.to_str(),
            tokenizer.chat_template,
            tokenizer.special_tokens_map,
            [version(name) for name in ("tokenizers", "transformers", "jinja2")],
        ]
        text = json.dumps(facts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def encode(self, rows: Sequence[Row], bad: BadRows) -> list[EncodedRow]:
        """Encode a batch of rows in order; rows the chat template refuses go into `bad`."""
        plain: list[str] = []
        chats: dict[int, _Rendered] = {}
        for row in rows:
            match row:
                case TextRow() | LabelledRow():
                    plain.append(row.text)
                case CompletionRow():
                    plain += (row.prompt, row.completion)
                case ChatRow():
                    rendered = self._render(row, bad)
                    if rendered is not None:
                        chats[row.line] = rendered
        plain_ids = iter(self._ids(plain))
        chat_ids = self._ids_and_starts([chat.text for chat in chats.values()])
        encoded_chats = {
            line: self._chat(line, chat, ids, starts)
            for (line, chat), (ids, starts) in zip(chats.items(), chat_ids, strict=True)
        }
        done: list[EncodedRow] = []
        for row in rows:
            match row:
                case TextRow():
                    done.append(self._trained_after(row.line, [], next(plain_ids)))
                case LabelledRow():
                    done.append(self._labelled(row, next(plain_ids)))
                case CompletionRow():
                    prompt, completion = next(plain_ids), next(plain_ids)
                    done.append(self._trained_after(row.line, prompt, completion))
                case ChatRow():
                    if row.line in encoded_chats:
                        done.append(encoded_chats[row.line])
        return done

    def completions(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], ...]:
        """Return each text as the trained tokens it would be as a completion, end included."""
        ended = [self._with_end(ids) for ids in self._ids(list(texts))]
        return tuple(np.array(ids, dtype=np.int32) for ids in ended)

    def text(self, tokens: NDArray[np.int32]) -> str:
        """Return the text of tokens, special ones included."""
        return str(self._tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False))

    def _special_tokens(self) -> tuple[Ids, Ids]:
        """Return what the tokenizer puts before and after a text, seen on a probe."""
        body = self._tokenizer("a", add_special_tokens=False).input_ids
        whole = self._tokenizer("a").input_ids
        for at in range(len(whole) - len(body) + 1):
            if whole[at : at + len(body)] == body:
                return whole[:at], whole[at + len(body) :]
        raise ModelError(
            "the tokenizer changes a text when it adds special tokens", where=self._name
        )

    def _ids(self, texts: list[str]) -> list[Ids]:
        if not texts:
            return []
        ids: list[Ids] = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        ).input_ids
        return ids

    def _ids_and_starts(self, texts: list[str]) -> list[tuple[Ids, NDArray[np.int64]]]:
        """Return the tokens of each text and the character at which each token begins."""
        if not texts:
            return []
        found = self._tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return [
            (ids, np.array(offsets, dtype=np.int64).reshape(-1, 2)[:, 0])
            for ids, offsets in zip(found.input_ids, found.offset_mapping, strict=True)
        ]

    def _trained_after(self, line: int, prompt: Ids, completion: Ids) -> EncodedRow:
        ended = self._with_end(completion)
        head = self._missing_head(prompt or ended)
        tokens = np.array(head + prompt + ended, dtype=np.int32)
        trained = np.arange(len(tokens)) >= len(head) + len(prompt)
        return EncodedRow(line, tokens, trained, head=len(head))

    def _labelled(self, row: LabelledRow, ids: Ids) -> EncodedRow:
        tokens = np.array(self._head + ids + self._tail, dtype=np.int32)
        untrained = np.zeros(len(tokens), dtype=np.bool_)
        head, tail = len(self._head), len(self._tail)
        return EncodedRow(row.line, tokens, untrained, head=head, tail=tail, label=row.label)

    def _with_end(self, ids: Ids) -> Ids:
        return ids if ids[-1:] == self._end else ids + self._end

    def _missing_head(self, ids: Ids) -> Ids:
        # a text that was rendered by a chat template already begins with the begin token
        return [] if ids[: len(self._head)] == self._head else self._head

    def _chat(
        self, line: int, chat: "_Rendered", ids: Ids, starts: NDArray[np.int64]
    ) -> EncodedRow:
        trained = np.zeros(len(ids), dtype=np.bool_)
        for begin, stop in chat.spans:
            trained |= (begin <= starts) & (starts < stop)
        if chat.lacks_end:
            ids, trained = ids + self._end, np.append(trained, True)
        head = len(self._head) if ids[: len(self._head)] == self._head else 0
        return EncodedRow(line, np.array(ids, dtype=np.int32), trained, head=head)

    def _render(self, row: ChatRow, bad: BadRows) -> "_Rendered | None":
        """Render a conversation and find the assistant's part of each of its turns in it."""
        from jinja2 import TemplateError

        where = bad.source.where(row.line)
        if not self._tokenizer.chat_template:
            raise DataError(
                f"the row has messages, but the tokenizer of {self._name} has no chat template",
                where=where,
                remedy="name an instruct model, or write rows with prompt and completion",
            )
        try:
            text = self._template(row.messages)
            turns = [
                (
                    self._template(row.messages[:at], add_generation_prompt=True),
                    self._template(row.messages[: at + 1]),
                )
                for at, message in enumerate(row.messages)
                if message["role"] == "assistant"
            ]
        except TemplateError as error:
            bad.add(row.line, f"the chat template refuses the messages: {error}")
            return None
        if not all(text.startswith(after) and after.startswith(before) for before, after in turns):
            raise DataError(
                f"the chat template of {self._name} renders a turn otherwise once others follow,"
                " so the assistant's part cannot be found",
                where=where,
                remedy="write each assistant turn as a row with prompt and completion",
            )
        # what follows the end-of-turn token, such as a newline, belongs to the next turn
        spans = [(len(before), len(after.rstrip())) for before, after in turns]
        begin, stop = spans[-1]
        last = row.messages[-1]
        lacks_end = last["role"] == "assistant" and text[begin:stop].endswith(
            last["content"].rstrip()
        )
        return _Rendered(text[:stop] if lacks_end else text, spans, lacks_end)

    def _template(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = False
    ) -> str:
        text: Any = self._tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
        assert isinstance(text, str), type(text)
        return text


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A conversation as text, the character spans to train, and whether it lacks an end token."""

    text: str
    spans: list[tuple[int, int]]
    lacks_end: bool
