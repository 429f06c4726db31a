"""Rows of preferences: a chosen and a rejected answer to one prompt, or one answer with a verdict.

Each answer is read and encoded as an ordinary row; what makes it an answer is that nothing of the
prompt is trained, whoever speaks in it. Imports neither torch nor transformers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_dist.common.errors import DataError
from peft_dist.data.encode import EncodedRow, Encoder
from peft_dist.data.rows import BadRow, BadRows, Row, parse_row
from peft_dist.data.sources import Broken

KEYS = ("prompt", "chosen", "rejected", "completion", "label")
_VERDICTS = {"true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt with an answer, as a row, and how many of its last turns are the answer's."""

    row: Row
    turns: int
    """0 for texts, whose prompt is never trained."""


@dataclass(frozen=True, slots=True)
class PairRow:
    """Two answers to one prompt, of which the first is the better one."""

    line: int
    chosen: Answer
    rejected: Answer


@dataclass(frozen=True, slots=True)
class JudgedRow:
    """One answer, and whether it is desirable."""

    line: int
    answer: Answer
    desirable: bool


Group = tuple[EncodedRow, ...]
"""The rows of one example, which are trained or dropped together."""


def parse_pair(line: int, value: Any) -> PairRow:
    """Return the pair that a decoded record stands for.

    Raises:
        BadRow: Why the record is none.
    """
    record = _record(value, ("chosen", "rejected"))
    chosen, rejected = _answers(line, record, ("chosen", "rejected"))
    return PairRow(line, chosen, rejected)


def parse_judged(line: int, value: Any) -> JudgedRow:
    """Return the answer and the verdict that a decoded record stands for.

    Raises:
        BadRow: Why the record is none.
    """
    record = _record(value, ("prompt", "completion", "label"))
    verdict = _VERDICTS.get(str(record["label"]).lower())
    if verdict is None:
        raise BadRow(f"label is {record['label']!r}, not true or false")
    (answer,) = _answers(line, record, ("completion",))
    return JudgedRow(line, answer, verdict)


def _record(value: Any, needed: Sequence[str]) -> dict[str, Any]:
    if isinstance(value, Broken):
        raise BadRow(value.why)
    if not isinstance(value, dict):
        raise BadRow(f"the row is not an object with {', '.join(needed)}")
    for key in needed:
        if value.get(key) is None:
            keys = ", ".join(repr(name) for name in list(value)[:8]) or "none"
            raise BadRow(f"has no {key}; its keys: {keys}")
    return value


def _answers(line: int, value: dict[str, Any], names: Sequence[str]) -> list[Answer]:
    """Return the answers under these keys, with the prompt they share."""
    prompt, answers = value.get("prompt"), [value[name] for name in names]
    beside = {key: item for key, item in value.items() if key not in KEYS}  # such as tools

    def parsed(name: str, turns: int, **form: Any) -> Answer:
        try:
            return Answer(parse_row(line, {**beside, **form}, "causal-lm"), turns)
        except BadRow as error:
            raise BadRow(f"{name}: {error}") from error

    if all(isinstance(answer, str) for answer in answers) and not isinstance(prompt, list):
        if prompt is None:
            length = _shared_text(answers)
            prompt, answers = answers[0][:length], [answer[length:] for answer in answers]
        return [
            parsed(name, 0, prompt=prompt, completion=answer)
            for name, answer in zip(names, answers, strict=True)
        ]
    talks = [_turns(name, answer) for name, answer in zip(names, answers, strict=True)]
    before, talks = _shared_turns(prompt, talks)
    turns = [sum(_role(turn) == "assistant" for turn in talk) for talk in talks]
    if not all(turns):
        raise BadRow(f"{names[turns.index(0)]} has no turn of role assistant of its own")
    return [
        parsed(name, count, messages=before + talk)
        for name, count, talk in zip(names, turns, talks, strict=True)
    ]


def _turns(name: str, answer: Any) -> list[Any]:
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    if not isinstance(answer, list):
        raise BadRow(f"{name} is neither text nor a list of messages")
    return answer


def _role(turn: Any) -> Any:
    return turn.get("role") if isinstance(turn, dict) else None


def _shared_text(texts: Sequence[str]) -> int:
    """Return the length of what the texts begin with alike; the space before an answer is its."""
    pairs = enumerate(zip(*texts, strict=False))
    first = next((at for at, letters in pairs if len(set(letters)) > 1), min(map(len, texts)))
    return first - 1 if first and texts[0][first - 1] == " " else first


def _shared_turns(prompt: Any, talks: list[list[Any]]) -> tuple[list[Any], list[list[Any]]]:
    """Return the turns before the answers, and the answers' own.

    An answer that begins with another's turn, or repeats a prompt of turns, is a conversation from
    its start: its answer is what follows the turns that all have.
    """
    if isinstance(prompt, list) and any(talk[: len(prompt)] != prompt for talk in talks):
        return prompt, talks
    if isinstance(prompt, str) and all(_role(talk[0]) == "assistant" for talk in talks if talk):
        return [{"role": "user", "content": prompt}], talks
    if isinstance(prompt, list):
        shared = len(prompt)
    else:
        alike = zip(*talks, strict=False)
        shared = next(
            (at for at, turns in enumerate(alike) if any(turn != turns[0] for turn in turns)),
            min(map(len, talks)),
        )
    return talks[0][:shared], [talk[shared:] for talk in talks]


def encode_pairs(encoder: Encoder, rows: Sequence[PairRow], bad: BadRows) -> list[Group]:
    """Return the chosen and the rejected row of each pair; the answers alone are trained."""
    chosen = _encoded(encoder, {row.line: row.chosen for row in rows}, bad)
    left = {row.line: row.rejected for row in rows if row.line in chosen}
    rejected = _encoded(encoder, left, bad)
    return [(chosen[line], rejected[line]) for line in rejected]


def encode_judged(
    encoder: Encoder, rows: Sequence[JudgedRow], bad: BadRows
) -> list[tuple[EncodedRow, bool]]:
    """Return each answer, trained alone, and whether it is desirable."""
    found = _encoded(encoder, {row.line: row.answer for row in rows}, bad)
    return [(found[row.line], row.desirable) for row in rows if row.line in found]


def _encoded(encoder: Encoder, answers: dict[int, Answer], bad: BadRows) -> dict[int, EncodedRow]:
    rows = encoder.encode([answer.row for answer in answers.values()], bad)
    return {row.line: _answer_only(row, answers[row.line].turns) for row in rows}


def _answer_only(row: EncodedRow, turns: int) -> EncodedRow:
    """Leave the last `turns` trained parts of a row trained, and no other."""
    begins = np.flatnonzero(row.trained & ~np.concatenate(([False], row.trained[:-1])))
    if not turns or len(begins) <= turns:
        return row
    later = np.arange(len(row.trained)) >= begins[-turns]
    return replace(row, trained=row.trained & later)


def with_mismatched(
    examples: Iterable[tuple[EncodedRow, bool]], where: str
) -> Iterator[tuple[Group, bool]]:
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
    waiting: list[tuple[EncodedRow, bool]] = []
    last: EncodedRow | None = None
    other: EncodedRow | None = None
    for own, verdict in examples:
        if last is not None and _prompt(own) != _prompt(last):
            other = last
            yield from (((row, _crossed(row, own)), its) for row, its in waiting)
            waiting = []
        last = own
        if other is None:
            waiting.append((own, verdict))
        else:
            yield (own, _crossed(own, other)), verdict
    if waiting:
        raise DataError(
            "all rows have one prompt", where=where, remedy="objective kto needs two or more"
        )


def _prompt(row: EncodedRow) -> bytes:
    return row.tokens[: _answer_begins(row)].tobytes()


def _answer_begins(row: EncodedRow) -> int:
    return int(np.argmax(row.trained)) if row.trained.any() else len(row.trained)


def _crossed(row: EncodedRow, other: EncodedRow) -> EncodedRow:
    mine, theirs = _answer_begins(row), _answer_begins(other)

    def joined(one: NDArray[Any], two: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate((one[:mine], two[theirs:]))

    tokens, trained = joined(row.tokens, other.tokens), joined(row.trained, other.trained)
    return replace(row, tokens=tokens, trained=trained, tail=0)


Parse = Callable[[int, Any], Any]
PARSE: dict[str, Parse] = {"pair": parse_pair, "judged": parse_judged}
"""How a record is read, by the form of row that an objective wants."""
