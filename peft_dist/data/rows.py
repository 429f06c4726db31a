"""The rows a recipe names, each checked: text, prompt and completion, messages, or text and label.

The form of a row follows from its keys (see `forms.py`); keys without a meaning are ignored (a
conversation's are read in `chat_rows.py`). A row that cannot be used is reported with its file and
line. Nothing is tokenised here, and neither torch nor transformers is imported.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, Self, TypeVar, assert_never

from peft_dist.common.errors import DataError
from peft_dist.config.data import Data
from peft_dist.data.bad_row import BadRow as BadRow
from peft_dist.data.bad_row import shown, text_of
from peft_dist.data.chat_rows import ROW_OPTIONS, parse_chat
from peft_dist.data.chat_rows import ChatRow as ChatRow
from peft_dist.data.forms import FORMS, keys_of, remedy_for, to_known_form
from peft_dist.data.record import Broken
from peft_dist.data.sources import Source

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
class LabelledRow:
    """A text and the name of its class."""

    line: int
    text: str
    label: str


Row = TextRow | CompletionRow | ChatRow | LabelledRow
Parsed = TypeVar("Parsed")


SHOWN_BAD_ROWS = 3
"""How many bad rows an error names besides the first."""


@dataclass
class BadRows:
    """The rows left out so far, and how many may be (`data.max_bad_rows`; None: any number)."""

    source: Source
    limit: int | None
    found: list[tuple[int, str]] = field(default_factory=list)
    remedy: str = ""
    """What to do about a row. Default: to fix it, or to allow more of such."""
    _remedies: dict[int, str] = field(default_factory=dict)

    @classmethod
    def as_allowed(cls, source: Source, data: Data) -> Self:
        """Take as many rows of a source as a recipe allows."""
        remedy = "fix the row; to leave such out, set data.streaming: false and data.max_bad_rows"
        return cls(source, data.max_bad_rows, remedy=remedy if data.streaming else "")

    def add(self, line: int, why: str, remedy: str = "") -> None:
        """Leave out one row."""
        self.found.append((line, why))
        if remedy:
            self._remedies[line] = remedy

    def take(self, other: "BadRows") -> None:
        """Add the rows that were left out elsewhere."""
        for line, why in other.found:
            self.add(line, why, other._remedies.get(line, ""))

    @property
    def are_too_many(self) -> bool:
        """Whether more rows are bad than may be."""
        return self.limit is not None and len(self.found) > self.limit

    def refuse_too_many(self) -> None:
        """Stop where more rows are bad than may be.

        Raises:
            DataError: With the first of them, how many there are, and the next few.
        """
        if not self.are_too_many:
            return
        (line, why), *others = sorted(self.found)  # rows are read ahead of being encoded
        if others:
            different = [f"line {at}: {reason}" for at, reason in others if reason != why]
            alike = len(others) - len(different)
            more = [f"{alike} more for the same reason"] if alike else []
            more += different[:SHOWN_BAD_ROWS] + ["..."] * (len(different) > SHOWN_BAD_ROWS)
            why += f" (first of {len(self.found)} bad rows; {'; '.join(more)})"
        remedy = (
            self._remedies.get(line)
            or self.remedy
            or (f"fix the row, or raise data.max_bad_rows above {self.limit} to leave such out")
        )
        raise DataError(why, where=self.source.where(line), remedy=remedy)

    def reports(self) -> tuple[str, ...]:
        """Return one `file:line: why` per row left out."""
        return tuple(f"{self.source.where(line)}: {why}" for line, why in sorted(self.found))


def read_rows(
    source: Source, *, task: Task, bad: BadRows, as_chat: bool = True, most: int | None = None
) -> Iterator[Row]:
    """Yield the good rows of a source in file order and put the others into `bad`.

    Args:
        source: Where they are.
        task: What is trained, which decides what a row must hold.
        bad: Takes the bad rows, also those that whoever encodes the rows finds.
        as_chat: Whether instructions become chats: whether the model has a chat template.
        most: Records to look at; None: all.

    Raises:
        DataError: The source cannot be read, has no rows, or has too many bad ones.
    """

    def parse(line: int, value: Any) -> Row:
        return parse_row(line, value, task, source.columns, as_chat=as_chat)

    return read_records(source, parse, bad, most=most)


def read_records(
    source: Source,
    parse: Callable[[int, Any], Parsed],
    bad: BadRows,
    *,
    most: int | None = None,
) -> Iterator[Parsed]:
    """Yield what `parse` makes of each record, in file order, and put those it refuses into `bad`.

    Once too many are bad, the rest is only looked at, so that the error knows them all.

    Args:
        source: Where they are.
        parse: Gets line and value; raises `BadRow`.
        bad: Takes the bad ones.
        most: Records to look at; None: all.

    Raises:
        DataError: As `read_rows`.
    """
    line = 0
    for line, value in islice(source.records(), most):
        try:
            row = parse(line, value)
        except BadRow as error:
            bad.add(line, str(error), error.remedy)
        else:
            if not bad.are_too_many:
                yield row
    if line == 0:
        raise DataError("has no rows", where=source.name, remedy="add some, or name another file")
    bad.refuse_too_many()


def parse_row(
    line: int,
    value: Any,
    task: Task,
    columns: Mapping[str, str] | None = None,
    *,
    as_chat: bool = True,
) -> Row:
    """Return the row that a decoded record stands for.

    Raises:
        BadRow: Why the record is no row.
    """
    if isinstance(value, Broken):
        raise BadRow(value.why)
    if not isinstance(value, dict):
        raise BadRow(f"the row is {shown(value)}, not an object with named texts")
    value = to_known_form(value, columns or {}, as_chat=as_chat)
    match task:
        case "sequence-classification":
            return LabelledRow(line, text_of(value, "text"), _label(value))
        case "causal-lm":
            return _language_row(line, value)
        case _:
            assert_never(task)


def _language_row(line: int, value: dict[str, Any]) -> Row:
    # columnar files hold null in the columns of the other forms, so null counts as absent first
    whole = [form for form in FORMS if all(value.get(key) is not None for key in form)]
    partly = [form for form in FORMS if any(key in value for key in form)]
    if not whole and not partly:
        why = f"the row is of no known form; its {keys_of(value)}"
        raise BadRow(why, remedy=remedy_for(value))
    _refuse_two_forms(value)
    form = (whole or partly)[0]
    absent = [key for key in form if key not in value]
    if absent and any(key not in form for key in value):
        raise BadRow(f"has no {absent[0]}; its {keys_of(value)}", remedy=remedy_for(value))
    match form:
        case ("messages",):
            return parse_chat(line, value)
        case ("text",):
            return TextRow(line, text_of(value, "text"))
        case _:
            prompt = text_of(value, "prompt", may_be_empty=True)
            return CompletionRow(line, prompt, text_of(value, "completion"))


def _refuse_two_forms(value: dict[str, Any]) -> None:
    """Refuse a conversation that stands beside another form, and options that stand alone."""
    has_chat = value.get("messages") is not None
    others = [key for form in FORMS[1:] for key in form if value.get(key) is not None]
    if has_chat and others:
        both = f"has messages and also {' and '.join(others)}; keep one of them"
        raise BadRow(f"{both}, or say which to read, as data.columns: {{messages: messages}}")
    beside = [key for key in ROW_OPTIONS if not has_chat and value.get(key)]
    if beside:
        raise BadRow(f"has {beside[0]} but no messages, so there is nothing to render it in")


def _label(value: dict[str, Any]) -> str:
    label = value.get("label")
    if isinstance(label, bool | int):
        return str(label)
    return text_of(value, "label")
