"""The rows a recipe names, each checked: text, prompt and completion, messages, or text and label.

The form of a row follows from its keys; keys without a meaning are ignored (those of a conversation
are read in `chat_rows.py`). A row that cannot be used is reported with its file and line. Nothing
is tokenised here, and neither torch nor transformers is imported.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, assert_never

from peft_dist.common.errors import DataError
from peft_dist.data.bad_row import BadRow as BadRow
from peft_dist.data.bad_row import shown as _shown
from peft_dist.data.bad_row import text_of as _text
from peft_dist.data.chat_rows import ROW_OPTIONS, parse_chat
from peft_dist.data.chat_rows import ChatRow as ChatRow
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
class LabelledRow:
    """A text and the name of its class."""

    line: int
    text: str
    label: str


Row = TextRow | CompletionRow | ChatRow | LabelledRow


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
    line = 0
    for line, value in source.records():
        try:
            row = parse_row(line, value, task)
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
    _refuse_two_forms(value, whole)
    match (whole or partly)[0]:
        case ("messages",):
            return parse_chat(line, value)
        case ("text",):
            return TextRow(line, _text(value, "text"))
        case _:
            prompt = _text(value, "prompt", may_be_empty=True)
            return CompletionRow(line, prompt, _text(value, "completion"))


def _refuse_two_forms(value: dict[str, Any], whole: Sequence[tuple[str, ...]]) -> None:
    """Refuse a row of which a part would have to be left out."""
    has_chat = value.get("messages") is not None
    others = [key for form in FORMS[1:] for key in form if value.get(key) is not None]
    if has_chat and others:
        raise BadRow(f"has messages and also {' and '.join(others)}; keep one of them")
    if len(whole) > 1:
        raise BadRow(f"has {' and '.join(others)}; keep prompt and completion, or text")
    beside = [key for key in ROW_OPTIONS if not has_chat and value.get(key)]
    if beside:
        raise BadRow(f"has {beside[0]} but no messages, so there is nothing to render it in")


def _label(value: dict[str, Any]) -> str:
    label = value.get("label")
    if isinstance(label, bool | int):
        return str(label)
    return _text(value, "label")
