"""Rows of preferences: a chosen and a rejected answer to one prompt, or one answer with a verdict.

Each answer is read as an ordinary row of which nothing but the answer is trained. Imports neither
torch nor transformers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peft_dist.config.recipe import Recipe
from peft_dist.data.bad_row import BadRow, shown
from peft_dist.data.forms import FORM_KEYS, keys_of, renamed, to_known_turn
from peft_dist.data.record import Broken
from peft_dist.data.rows import BadRows, ChatRow, Row, parse_row, read_records, read_rows
from peft_dist.data.sources import Source

_KEYS = (*FORM_KEYS, "chosen", "rejected", "label")
_VERDICTS = {"true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True, slots=True)
class PairRow:
    """Two answers to one prompt, of which the first is the better one."""

    line: int
    chosen: Row
    rejected: Row


@dataclass(frozen=True, slots=True)
class JudgedRow:
    """One answer, and whether it is desirable."""

    line: int
    answer: Row
    desirable: bool


AnyRow = Row | PairRow | JudgedRow


def read_examples(
    recipe: Recipe,
    source: Source,
    bad: BadRows,
    *,
    as_chat: bool = True,
    most: int | None = None,
) -> Iterator[AnyRow]:
    """Yield the rows of a source in the form that the recipe's objective reads; see `read_rows`.

    Raises:
        DataError: As `read_rows`.
    """
    form = recipe.objective.rows
    if form == "single":
        task = recipe.model.task
        yield from read_rows(source, task=task, bad=bad, as_chat=as_chat, most=most)
        return
    parse: Callable[[int, Any, Mapping[str, str]], AnyRow]
    parse = parse_pair if form == "pair" else parse_judged
    yield from read_records(
        source, lambda line, value: parse(line, value, source.columns), bad, most=most
    )


def parse_pair(line: int, value: Any, columns: Mapping[str, str] | None = None) -> PairRow:
    """Return the pair that a decoded record stands for.

    Raises:
        BadRow: Why the record is none.
    """
    record = _record(value, ("chosen", "rejected"), columns or {})
    chosen, rejected = _answers(line, record, ("chosen", "rejected"))
    return PairRow(line, chosen, rejected)


def parse_judged(line: int, value: Any, columns: Mapping[str, str] | None = None) -> JudgedRow:
    """Return the answer and the verdict that a decoded record stands for.

    Raises:
        BadRow: Why the record is none.
    """
    record = _record(value, ("prompt", "completion", "label"), columns or {})
    verdict = _VERDICTS.get(str(record["label"]).lower())
    if verdict is None:
        raise BadRow(f"label is {shown(record['label'])}, not true or false")
    (answer,) = _answers(line, record, ("completion",))
    return JudgedRow(line, answer, verdict)


def _record(value: Any, needed: Sequence[str], columns: Mapping[str, str]) -> dict[str, Any]:
    if isinstance(value, Broken):
        raise BadRow(value.why)
    if not isinstance(value, dict):
        raise BadRow(f"the row is {shown(value)}, not an object with {', '.join(needed)}")
    record: dict[str, Any] = renamed(value, columns) if columns else value
    for key in needed:
        if record.get(key) is None:
            raise BadRow(
                f"has no {key}; its {keys_of(record)}",
                remedy=f"this objective needs rows of {', '.join(needed)}: say which keys to read "
                "with data.columns, or set objective: sft",
            )
    return record


def _answers(line: int, value: dict[str, Any], names: Sequence[str]) -> list[Row]:
    """Return the answers under these keys, with the prompt they share."""
    prompt, answers = value.get("prompt"), [value[name] for name in names]
    beside = {key: item for key, item in value.items() if key not in _KEYS}  # such as tools

    def parsed(name: str, **form: Any) -> Row:
        try:
            return parse_row(line, {**beside, **form}, "causal-lm")
        except BadRow as error:
            raise BadRow(f"{name}: {error}", remedy=error.remedy) from error

    if all(isinstance(answer, str) for answer in answers) and not isinstance(prompt, list):
        if prompt is None:
            length = _shared_text(answers)
            prompt, answers = answers[0][:length], [answer[length:] for answer in answers]
        return [
            parsed(name, prompt=prompt, completion=answer)
            for name, answer in zip(names, answers, strict=True)
        ]
    if isinstance(prompt, list):
        prompt = [to_known_turn(turn, f"prompt[{at}]") for at, turn in enumerate(prompt)]
    talks = [_turns(name, answer) for name, answer in zip(names, answers, strict=True)]
    before, talks = _shared_turns(prompt, talks)
    return [
        _answer_alone(name, parsed(name, messages=before + talk), turns=len(talk))
        for name, talk in zip(names, talks, strict=True)
    ]


def _answer_alone(name: str, row: Row, *, turns: int) -> Row:
    """Return a conversation of which the assistant's among the last turns are trained alone."""
    assert isinstance(row, ChatRow), row
    own = range(len(row.messages) - turns, len(row.messages))
    answer = [at for at in own if row.messages[at]["role"] == "assistant"]
    if not answer:
        raise BadRow(f"{name} has no turn of role assistant of its own")
    if not set(answer) <= set(row.trained):
        raise BadRow(f"a turn of {name} has the weight 0, but is what is compared")
    return replace(row, trained=tuple(answer))


def _turns(name: str, answer: Any) -> list[Any]:
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    if not isinstance(answer, list):
        raise BadRow(f"{name} is neither text nor a list of messages")
    return [to_known_turn(turn, f"{name}[{at}]") for at, turn in enumerate(answer)]


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
