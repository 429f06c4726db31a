"""Rows of preferences to tokens, example by example.

See `preference_rows.py` for what they hold. Imports neither torch nor transformers.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from peft_dist.common.errors import DataError
from peft_dist.data.encode import Encoder
from peft_dist.data.encoded_row import EncodedRow
from peft_dist.data.preference_rows import JudgedRow, PairRow
from peft_dist.data.rows import BadRows, Row


class Example(NamedTuple):
    """Rows that are trained or dropped together."""

    rows: tuple[EncodedRow, ...]
    """One; a chosen and a rejected one; or an answer, and one that answers another prompt."""
    desirable: bool | None = None
    """The verdict on the first row, where there is one."""


def encode_pairs(encoder: Encoder, rows: Sequence[PairRow], bad: BadRows) -> list[Example]:
    """Return the chosen and the rejected row of each pair; the answers alone are trained."""
    chosen = _encoded(encoder, {row.line: row.chosen for row in rows}, bad)
    left = {row.line: row.rejected for row in rows if row.line in chosen}
    rejected = _encoded(encoder, left, bad)
    return [Example((chosen[line], rejected[line])) for line in rejected]


def encode_judged(encoder: Encoder, rows: Sequence[JudgedRow], bad: BadRows) -> list[Example]:
    """Return each answer, trained alone, with its verdict."""
    found = _encoded(encoder, {row.line: row.answer for row in rows}, bad)
    return [Example((found[row.line],), row.desirable) for row in rows if row.line in found]


def _encoded(encoder: Encoder, answers: dict[int, Row], bad: BadRows) -> dict[int, EncodedRow]:
    found: dict[int, EncodedRow] = {}
    several: set[int] = set()
    for row in encoder.encode(list(answers.values()), bad):
        if row.line in found:
            several.add(row.line)
        found[row.line] = row
    for line in several:
        del found[line]
        bad.add(
            line,
            "an answer of several turns, of which the chat template renders the earlier ones"
            " otherwise once others follow, cannot be compared as one",
        )
    return found


def with_mismatched(examples: Iterable[Example], where: str) -> Iterator[Example]:
    """Yield each answer together with its prompt before the answer to another prompt, and verdict.

    What the model makes of the second tells how far it is from its start on average, whatever the
    verdicts (the KL term of KTO). The other answer is the nearest one before with another prompt;
    the first examples have none before them and get the first after them.

    Args:
        examples: Answers and verdicts, in order.
        where: The source, for an error.

    Raises:
        DataError: Where all have one prompt.
    """
    waiting: list[Example] = []
    last: EncodedRow | None = None
    other: EncodedRow | None = None
    for example in examples:
        (own,) = example.rows
        if last is not None and _prompt(own) != _prompt(last):
            other = last
            yield from (_with(early, own) for early in waiting)
            waiting = []
        last = own
        if other is None:
            waiting.append(example)
        else:
            yield _with(example, other)
    if waiting:
        raise DataError(
            "all rows have one prompt", where=where, remedy="objective kto needs two or more"
        )


def _with(example: Example, other: EncodedRow) -> Example:
    (own,) = example.rows
    return Example((own, _crossed(own, other)), example.desirable)


def _prompt(row: EncodedRow) -> bytes:
    return row.tokens[: _answer_begins(row)].tobytes()


def _answer_begins(row: EncodedRow) -> int:
    return int(np.argmax(row.trained)) if row.trained.any() else len(row.trained)


def _crossed(row: EncodedRow, other: EncodedRow) -> EncodedRow:
    mine, theirs = _answer_begins(row), _answer_begins(other)

    def joined(one: NDArray[Any], two: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate((one[:mine], two[theirs:]))

    tokens, trained = joined(row.tokens, other.tokens), joined(row.trained, other.trained)
    stops = other.stops[other.stops >= theirs] - theirs + mine
    return replace(row, tokens=tokens, trained=trained, tail=0, stops=stops)
