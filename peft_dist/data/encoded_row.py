"""The tokens of one row, and the parts of it that fit a length."""

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """The tokens of one row; `head` and `tail` of them survive any truncation."""

    line: int
    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    head: int = 0
    tail: int = 0
    label: str | None = None
    stops: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """[n_trained_turns] where the last stop token of each trained turn is."""

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
        return self._with(body)

    def pieces(self, max_length: int) -> "list[EncodedRow]":
        """Return the row in equal parts of at most `max_length` tokens, each with head and tail."""
        room = max_length - self.head - self.tail
        assert room >= 1, (max_length, self.head, self.tail)
        body = np.arange(self.head, len(self.tokens) - self.tail)
        return [self._with(part) for part in np.array_split(body, -(-len(body) // room))]

    def _with(self, body: NDArray[np.int64]) -> "EncodedRow":
        last = len(self.tokens) - self.tail
        at = np.concatenate((np.arange(self.head), body, np.arange(last, len(self.tokens))))
        stops = np.flatnonzero(np.isin(at, self.stops))
        return replace(self, tokens=self.tokens[at], trained=self.trained[at], stops=stops)
