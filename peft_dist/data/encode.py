"""Rows to tokens: which tokens a row becomes and which of them are trained.

What is trained is decided by position, never by token id, because pad and end are one id in many
tokenizers. How a conversation is rendered stands in `conversation.py`; nothing is cached or written
here (see `token_cache.py`).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, date, datetime
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from peft_dist.common import paths
from peft_dist.common.errors import DataError, ModelError
from peft_dist.config.recipe import Recipe
from peft_dist.data.bad_row import BadRow
from peft_dist.data.chat_rows import ChatRow
from peft_dist.data.chat_template import ChatTemplate
from peft_dist.data.conversation import Conversation, ConversationReader
from peft_dist.data.encoded_row import EncodedRow
from peft_dist.data.pieces import Ids, PieceEncoder, TextPiece
from peft_dist.data.rows import BadRows, CompletionRow, LabelledRow, Row, Task, TextRow
from peft_dist.data.template_file import TemplateFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


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
        day: What a chat template takes for today. Default: today, in UTC.
        template: What conversations are rendered with. Default: the tokenizer's own template.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        *,
        task: Task,
        name: str,
        day: date | None = None,
        template: TemplateFile | None = None,
    ) -> None:
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
        self._pieces = PieceEncoder(tokenizer)
        self._rendered_with = tokenizer.chat_template if template is None else template.text
        self._has_file = template is not None
        self._template: ChatTemplate | None = None
        if self._rendered_with:
            self._day = day or datetime.now(UTC).date()
            self._template = ChatTemplate(tokenizer, name=name, day=self._day, own=template)
            self._reader = ConversationReader(self._template, self._pieces.is_hidden)
        self.tally = Counter[str]()
        """What `notices` counts of the conversations encoded so far."""

    @classmethod
    def of(cls, recipe: Recipe, template: TemplateFile | None = None) -> "Encoder":
        """Return the encoder of a recipe; loads its tokenizer.

        Raises:
            ModelError: The tokenizer cannot be used.
        """
        return cls.of_all(recipe, [template])[template]

    @classmethod
    def of_all(
        cls, recipe: Recipe, templates: Iterable[TemplateFile | None]
    ) -> "dict[TemplateFile | None, Encoder]":
        """Return an encoder for each template, all with one tokenizer; see `of`."""
        tokenizer = load_tokenizer(recipe)
        task, name, day = recipe.model.task, recipe.model.name, recipe.data.date
        return {
            template: cls(tokenizer, task=task, name=name, day=day, template=template)
            for template in dict.fromkeys(templates)
        }

    @property
    def least_length(self) -> int:
        """Smallest `data.max_length` that leaves room for one token of a row."""
        return len(self._head) + len(self._tail) + 1

    @property
    def has_chat_template(self) -> bool:
        """Whether there is something to lay out a conversation with."""
        return bool(self._rendered_with)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that a trained turn may end with."""
        control = () if self._template is None else self._template.control
        ids = self._tokenizer.added_tokens_encoder
        return frozenset(self._end + [ids[token] for token in control if token in ids])

    def fingerprint(self) -> str:
        """Return a hash of all that decides which tokens a row becomes."""
        tokenizer = self._tokenizer
        facts = [
            tokenizer.backend_tokenizer.to_str(),
            self._rendered_with,
            tokenizer.special_tokens_map,
            [version(name) for name in ("tokenizers", "transformers", "jinja2")],
        ]
        if self._template is not None and self._template.prints_date:
            facts.append(self._day.isoformat())
        text = json.dumps(facts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def notices(self) -> list[str]:
        """Return what a person should know of the conversations that were encoded."""
        found = []
        template = self._template
        if self._has_file and not self.tally["turns"]:
            found.append("no row is a conversation, so the chat template that is set has no effect")
        if self.tally["turns"] and template is not None and not template.end_of_turn().has_stop:
            found.append(
                "the chat template ends an answer with no stop token;"
                f" {self._tokenizer.eos_token!r} is trained after each"
            )
        if self.tally["turns"] and self._reader.opening is not None:
            found.append(
                f"the prompt that inference sends begins an answer with {self._reader.opening!r},"
                " which finished turns do not show; they are trained right after it"
            )
        if self.tally["split"]:
            found.append(
                f"{self.tally['split']} conversations are trained as one row for each of their"
                f" {self.tally['split turns']} turns: in the whole, prompts are not what inference"
                " sends"
            )
        if self.tally["control texts"]:
            found.append(
                f"{self.tally['control texts']} conversations have control tokens in their"
                " messages; they are read as plain text"
            )
        return found

    def encode(self, rows: Sequence[Row], bad: BadRows) -> list[EncodedRow]:
        """Encode a batch of rows in order; rows the chat template refuses go into `bad`.

        A conversation becomes several rows where no one text holds all its prompts as inference
        sends them.
        """
        texts: list[list[TextPiece]] = []
        chats: dict[int, Conversation] = {}
        with self._template.limited() if self._template is not None else nullcontext():
            for number, row in enumerate(rows):
                match row:
                    case TextRow() | LabelledRow():
                        texts.append([TextPiece(row.text, is_trained=isinstance(row, TextRow))])
                    case CompletionRow():
                        after = "" if row.prompt else None
                        completion = TextPiece(row.completion, is_trained=True, after=after)
                        texts.append([TextPiece(row.prompt), completion])
                    case ChatRow():
                        conversation = self._read(row, bad)
                        if conversation is not None:
                            chats[number] = conversation
        plain = iter(self._encoded(texts))
        encoded_chats = self._encode_chats(chats)
        done: list[EncodedRow] = []
        for number, row in enumerate(rows):
            match row:
                case TextRow() | CompletionRow():
                    done.append(self._ended(row.line, next(plain)))
                case LabelledRow():
                    done.append(self._labelled(row, next(plain)))
                case ChatRow():
                    done += [
                        self._chat(row.line, pieces) for pieces in encoded_chats.get(number, ())
                    ]
        return done

    def completions(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], ...]:
        """Return each text as the trained tokens it would be as a completion, end included."""
        encoded = self._pieces.encode(
            [TextPiece(text, is_trained=True, after="") for text in texts]
        )
        return tuple(np.array(self._with_end(ids), dtype=np.int32) for ids in encoded)

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

    def _read(self, row: ChatRow, bad: BadRows) -> Conversation | None:
        if self._template is None:
            raise DataError(
                f"the row has messages, but the tokenizer of {self._name} has no chat template",
                where=bad.source.where(row.line),
                remedy="name an instruct model, set data.template, or write rows with prompt and "
                "completion",
            )
        try:
            conversation = self._reader.read(row)
        except BadRow as error:
            bad.add(row.line, str(error))
            return None
        self.tally["control texts"] += conversation.has_control_text
        return conversation

    def _encode_chats(self, chats: dict[int, Conversation]) -> dict[int, "list[_EncodedPieces]"]:
        """Encode conversations as a whole where every prompt in it has the tokens it has alone."""
        wholes = {number: chat for number, chat in chats.items() if chat.whole is not None}
        encoded = dict(
            zip(
                wholes,
                self._encoded([c.pieces_of_whole(self._reader.control) for c in wholes.values()]),
                strict=True,
            )
        )
        several = {number: str(c.whole) for number, c in wholes.items() if len(c.answers) > 1}
        at_once = self._pieces.whole(list(several.values()))
        for number, ids in zip(several, at_once, strict=True):
            if [token for _, found in encoded[number] for token in found] != ids:
                del encoded[number]
        done = {number: [pieces] for number, pieces in encoded.items()}
        apart = {number: chat for number, chat in chats.items() if number not in done}
        answers = iter(
            self._encoded([p for chat in apart.values() for p in chat.pieces_of_answers()])
        )
        for number, chat in apart.items():
            done[number] = [next(answers) for _ in chat.answers]
        several_rows = [len(pieces) for pieces in done.values() if len(pieces) > 1]
        self.tally["split"] += len(several_rows)
        self.tally["split turns"] += sum(several_rows)
        self.tally["turns"] += sum(len(chat.answers) for chat in chats.values())
        return done

    def _encoded(self, texts: Sequence[Sequence[TextPiece]]) -> "list[_EncodedPieces]":
        """Encode the pieces of several texts at once."""
        ids = iter(self._pieces.encode([piece for text in texts for piece in text]))
        return [[(piece, next(ids)) for piece in text] for text in texts]

    def _ended(self, line: int, pieces: "_EncodedPieces") -> EncodedRow:
        """Return a text, or a prompt and its completion, with begin and end token."""
        *before, (last, ids) = pieces
        pieces = [*before, (last, self._with_end(ids))]
        first = next(found for _, found in pieces if found)
        # a text that was rendered by a chat template already begins with the begin token
        head = [] if first[: len(self._head)] == self._head else self._head
        return replace(_joined(line, [(TextPiece(""), head), *pieces]), head=len(head))

    def _labelled(self, row: LabelledRow, pieces: "_EncodedPieces") -> EncodedRow:
        ids = [token for _, found in pieces for token in found]
        tokens = np.array(self._head + ids + self._tail, dtype=np.int32)
        untrained = np.zeros(len(tokens), dtype=np.bool_)
        head, tail = len(self._head), len(self._tail)
        return EncodedRow(row.line, tokens, untrained, head=head, tail=tail, label=row.label)

    def _with_end(self, ids: Ids) -> Ids:
        return ids if ids[-1:] == self._end else ids + self._end

    def _chat(self, line: int, pieces: "_EncodedPieces") -> EncodedRow:
        assert self._template is not None
        if not self._template.end_of_turn().has_stop:
            pieces = [(p, ids + self._end if p.is_trained else ids) for p, ids in pieces]
        row = _joined(line, pieces)
        head = len(self._head) if list(row.tokens[: len(self._head)]) == self._head else 0
        return replace(row, head=head)


_EncodedPieces = list[tuple[TextPiece, Ids]]


def _joined(line: int, pieces: _EncodedPieces) -> EncodedRow:
    tokens = np.array([token for _, ids in pieces for token in ids], dtype=np.int32)
    lengths = [len(ids) for _, ids in pieces]
    is_trained = [piece.is_trained for piece, _ in pieces]
    trained = np.repeat(np.array(is_trained, dtype=np.bool_), lengths)
    stops = np.cumsum(lengths)[is_trained] - 1
    return EncodedRow(line, tokens, trained, stops=stops.astype(np.int64))
