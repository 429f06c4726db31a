"""Pieces of a text to tokens: cut where what is trained begins and ends, so no token lies across.

The first piece of a text is encoded as inference encodes a prompt, every other as what follows.
Control tokens between `OPEN` and `CLOSE` are somebody's text and never become control tokens.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Ids = list[int]
OPEN, CLOSE = "\U000f0000", "\U000f0001"
"""Private-use characters around a control token that is meant as text."""


@dataclass(frozen=True, slots=True)
class TextPiece:
    """A part of a text, and what comes before it there."""

    text: str
    is_trained: bool = False
    after: str | None = None
    """None: nothing, it is the beginning. Else any text, or a control token that stands there."""


class PieceEncoder:
    """Encodes pieces with a fast tokenizer."""

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        """Find out whether the tokenizer puts a blank before every text, as SentencePiece does."""
        self._tokenizer = tokenizer
        self._ids_of = cache(lambda text: self.whole([text])[0])
        alone, after = self._ids_of("a"), self._ids_of("\na")
        break_ids = self._ids_of("\n")
        self._anchor = "\n" if after == break_ids + after[-1:] and alone != after[-1:] else ""
        self._literal_ids = cache(self._find_literal_ids)

    def whole(self, texts: list[str]) -> list[Ids]:
        """Return the tokens of whole texts, without the special ones that a tokenizer adds."""
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

    def encode(self, pieces: Sequence[TextPiece]) -> list[Ids]:
        """Return the tokens of each piece."""
        parts = [list(self._parts(piece)) for piece in pieces]
        flat = [part for of_piece in parts for part in of_piece if not part[2]]
        found = iter(self._following(flat))
        return [
            [
                token
                for text, _, is_literal in of_piece
                for token in (self._literal_ids(text) if is_literal else next(found))
            ]
            for of_piece in parts
        ]

    def is_hidden(self, token: str) -> bool:
        """Whether a control token can be encoded as text: whether its own id does not appear."""
        return self._tokenizer.convert_tokens_to_ids(token) not in self._literal_ids(token)

    def _parts(self, piece: TextPiece) -> Iterator[tuple[str, str | None, bool]]:
        """Yield text, what comes before it, and whether it is a control token meant as text."""
        after = piece.after
        for number, text in enumerate(re.split(f"{OPEN}(.*?){CLOSE}", piece.text)):
            if text:
                yield text, after, number % 2 == 1
                after = ""

    def _following(self, parts: Sequence[tuple[str, str | None, bool]]) -> list[Ids]:
        """Encode texts behind what comes before them, and take that away again."""
        anchors = ["" if after is None else after or self._anchor for _, after, _ in parts]
        texts = [anchor + text for anchor, (text, _, _) in zip(anchors, parts, strict=True)]
        done = []
        for anchor, (text, _, _), ids in zip(anchors, parts, self.whole(texts), strict=True):
            before = self._ids_of(anchor) if anchor else []
            if ids[: len(before)] != before:  # they became one token
                ids, before = self._ids_of(text), []
            done.append(ids[len(before) :])
        return done

    def _find_literal_ids(self, token: str) -> Ids:
        """Encode text without looking for added tokens, special or not."""
        before = self._plain(self._anchor)
        ids = self._plain(self._anchor + token)
        return ids[len(before) :] if ids[: len(before)] == before else self._plain(token)

    def _plain(self, text: str) -> Ids:
        backend = self._tokenizer.backend_tokenizer
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        words: Iterable[str] = [text]
        if backend.pre_tokenizer is not None:
            words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in backend.model.tokenize(word)]
