"""The rows a recipe names, each checked: text, prompt and completion, messages, or text and label.

The form of a row follows from its keys; other keys are ignored. A row that cannot be used is
reported with its file and line. Nothing is tokenised here, and neither torch nor transformers is
imported.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, assert_never

from peft_dist.common.errors import DataError
from peft_dist.data.sources import Broken, Source

Task = Literal["causal-lm", "sequence-classification"]


@dataclass(frozen=True, slots=True)
class TextRow:
    """Text of which every token is trained."""

    line: int
    text: str


@dataclass(frozen=True, slots=True)
class CompletionRow:
    """A prompt that is only read, and a completion that is trained."""

    line: int
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class ChatRow:
    """A conversation of which the assistant's turns are trained."""

    line: int
    messages: tuple[dict[str, str], ...]


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """A text and the name of its class."""

    line: int
    text: str
    label: str


Row = TextRow | CompletionRow | ChatRow | LabelledRow
Parsed = TypeVar("Parsed")


class BadRow(Exception):
    """Why one row cannot be used; `BadRows` decides whether the run may go on."""


@dataclass
class BadRows:
    """The rows left out so far, and how many may be (`data.max_bad_rows`)."""

    source: Source
    limit: int
    found: list[tuple[int, str]] = field(default_factory=list)

    def add(self, line: int, why: str) -> None:
        """Leave out one row, or stop where that is one too many."""
        self.found.append((line, why))
        if len(self.found) <= self.limit:
            return
        first_line, first_why = min(self.found)  # rows are read ahead of being encoded
        raise DataError(
            first_why if self.limit == 0 else f"{first_why} (first of {len(self.found)} bad rows)",
            where=self.source.where(first_line),
            remedy=f"fix the row, or raise data.max_bad_rows above {self.limit} to leave such out",
        )

    def reports(self) -> tuple[str, ...]:
        """Return one `file:line: why` per row left out."""
        return tuple(f"{self.source.where(line)}: {why}" for line, why in sorted(self.found))


def read_rows(source: Source, *, task: Task, bad: BadRows) -> Iterator[Row]:
    """Yield the good rows of a source in file order and put the others into `bad`.

    Raises:
        DataError: The source cannot be read, has no rows, or has too many bad ones.
    """
    return read_records(source, lambda line, value: parse_row(line, value, task), bad)


def read_records(
    source: Source, parse: Callable[[int, Any], Parsed], bad: BadRows
) -> Iterator[Parsed]:
    """Yield what `parse` makes of each record, in file order, and put those it refuses into `bad`.

    Raises:
        DataError: As `read_rows`.
    """
    line = 0
    for line, value in source.records():
        try:
            row = parse(line, value)
        except BadRow as error:
            bad.add(line, str(error))
        else:
            yield row
    if line == 0:
        raise DataError("has no rows", where=source.name, remedy="add some, or name another file")


def parse_row(line: int, value: Any, task: Task) -> Row:
    """Return the row that a decoded record stands for.

    Raises:
        BadRow: Why the record is no row.
    """
    if isinstance(value, Broken):
        raise BadRow(value.why)
    if not isinstance(value, dict):
        raise BadRow(f"the row is {_shown(value)}, not an object with named texts")
    match task:
        case "sequence-classification":
            return LabelledRow(line, _text(value, "text"), _label(value))
        case "causal-lm":
            return _language_row(line, value)
        case _:
            assert_never(task)


FORMS = (("messages",), ("prompt", "completion"), ("text",))


def _language_row(line: int, value: dict[str, Any]) -> Row:
    # columnar files hold null in the columns of the other forms, so null counts as absent first
    whole = [form for form in FORMS if all(value.get(key) is not None for key in form)]
    partly = [form for form in FORMS if any(key in value for key in form)]
    if not whole and not partly:
        keys = ", ".join(repr(key) for key in list(value)[:8]) or "none"
        raise BadRow(f"needs text, prompt and completion, or messages; its keys: {keys}")
    match (whole or partly)[0]:
        case ("messages",):
            return ChatRow(line, _messages(value))
        case ("text",):
            return TextRow(line, _text(value, "text"))
        case _:
            prompt = _text(value, "prompt", may_be_empty=True)
            return CompletionRow(line, prompt, _text(value, "completion"))


def _text(value: dict[str, Any], key: str, *, at: str = "", may_be_empty: bool = False) -> str:
    shown = f"{at}{key}"
    if key not in value:
        raise BadRow(f"has no {shown}")
    text = value[key]
    if text is None:
        raise BadRow(f"{shown} is null")
    if not isinstance(text, str):
        raise BadRow(f"{shown} is {_shown(text)}, not text")
    if not text and not may_be_empty:
        raise BadRow(f"{shown} is empty")
    try:
        text.encode("utf-8")  # lone surrogates, from \ud800 escapes or undecodable CSV bytes
    except UnicodeEncodeError as error:
        raise BadRow(f"{shown} has broken UTF-8 at character {error.start + 1}") from error
    return text


def _label(value: dict[str, Any]) -> str:
    label = value.get("label")
    if isinstance(label, bool | int):
        return str(label)
    return _text(value, "label")


def _messages(value: dict[str, Any]) -> tuple[dict[str, str], ...]:
    messages = value["messages"]
    if not isinstance(messages, list):
        raise BadRow(f"messages is {_shown(messages)}, not a list of role and content")
    if not messages:
        raise BadRow("messages is empty")
    turns = tuple(_message(message, f"messages[{at}]") for at, message in enumerate(messages))
    roles = [turn["role"] for turn in turns]
    if "assistant" not in roles:
        raise BadRow("messages has no turn of role assistant, so there is nothing to train")
    if roles[0] == "assistant":
        raise BadRow("messages[0] is the assistant's; begin with a system or user turn")
    return turns


def _message(message: Any, at: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise BadRow(f"{at} is {_shown(message)}, not an object with role and content")
    if message.get("tool_calls"):  # leaving them out would train on another conversation
        raise BadRow(f"{at}.tool_calls is not supported")
    role = _text(message, "role", at=f"{at}.")
    content = _text(message, "content", at=f"{at}.", may_be_empty=role != "assistant")
    return {"role": role, "content": content}


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    text = repr(value)
    return f"{text[:37]}..." if len(text) > 40 else text
