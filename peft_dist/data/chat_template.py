"""The model's chat template: rendered within limits, on one date, and seen through by probes.

A template is code that comes with a model, so whatever it raises, and however long it takes, is a
fault of a row or of the template and never of the process.
"""

import re
import resource
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_dist.common.errors import ModelError
from peft_dist.data.bad_row import BadRow
from peft_dist.data.chat_rows import REASONING, ChatRow
from peft_dist.data.record import LONGEST_ROW
from peft_dist.data.template_file import TemplateFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RENDERING_LIMIT_S = 20.0
"""CPU seconds that one rendering may take; an ordinary one takes less than a millisecond."""
RENDERING_BYTES = 4 << 30
"""Memory that renderings may take beyond what the process has."""
_QUESTION, _ANSWER = "peftdist question", "peftdist answer"

Messages = Sequence[Mapping[str, Any]]


class _TooSlow(Exception):
    pass


@dataclass(frozen=True)
class EndOfTurn:
    """What a template writes after the last answer of a conversation."""

    tail: str
    kept: int
    """Characters of the tail that belong to the answer: all up to its stop tokens, and those."""
    has_stop: bool
    """Whether there is a stop token in it."""


class ChatTemplate:
    """Renders conversations with the chat template of a tokenizer.

    Args:
        tokenizer: With the template.
        name: The model, for errors.
        day: What the template takes for today.
        own: The template of a file, in place of the tokenizer's.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        *,
        name: str,
        day: date,
        own: TemplateFile | None = None,
    ) -> None:
        """Find out which tokens the template controls a conversation with."""
        self._tokenizer = tokenizer
        self._name = name if own is None else own.path
        self._day = day
        self._own = None if own is None else own.text
        template = self._own or tokenizer.chat_template
        self.source = "\0".join(template.values() if isinstance(template, dict) else [template])
        added = tokenizer.added_tokens_decoder.values()
        self.special = {token.content for token in added if token.special}
        self.special |= set(tokenizer.all_special_tokens)
        """Tokens that nobody's text may hold as such."""
        self.control = self.special | {
            token.content
            for token in added
            if token.content in self.source and not token.content.isspace()
        }
        """Those, and what else the template writes: in the assistant's own text they are tokens."""
        self._end: EndOfTurn | None = None
        self._known: dict[Any, str | None] = {}

    def render(
        self, messages: Messages, options: Mapping[str, Any], *, generation: bool = False
    ) -> str:
        """Return a conversation as text.

        Args:
            messages: At least one.
            options: What the template gets beside them.
            generation: Whether an answer of the assistant follows: exactly what inference sends.

        Raises:
            BadRow: The template refuses the messages, fails, or comes to no end.
        """
        try:
            text: Any = self._rendered(messages, options, generation)
        except Exception as error:  # any that code which came with a model may raise
            raise BadRow(f"the chat template refuses the messages: {_in_words(error)}") from error
        if not isinstance(text, str) or len(text) > LONGEST_ROW:
            raise BadRow(
                f"the chat template makes the messages longer than {LONGEST_ROW:,} characters"
            )
        return text

    def _rendered(self, messages: Messages, options: Mapping[str, Any], generation: bool) -> Any:
        with _timed():
            return self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self._own,
                tokenize=False,
                add_generation_prompt=generation,
                **options,
            )

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Keep renderings within `RENDERING_LIMIT_S` and `RENDERING_BYTES`, on the run's date.

        Only the main thread of a process can be interrupted; elsewhere there is no limit of time.
        """
        in_main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGVTALRM, _stop) if in_main else None
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        bounds = (soft, hard, _address_space() + RENDERING_BYTES)
        least = min(bound for bound in bounds if bound != resource.RLIM_INFINITY)
        try:
            resource.setrlimit(resource.RLIMIT_AS, (least, hard))
            self._set_date()
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
            if in_main:
                signal.signal(signal.SIGVTALRM, before)

    def _set_date(self) -> None:
        """Let the template's clock stand still: transformers has no argument for it."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import _compile_jinja_template

        if not self.prints_date:
            return
        for template in self.source.split("\0"):
            # What is wrong, or takes too long, the first rendering tells.
            with suppress(TemplateError, _TooSlow), _timed():
                _compile_jinja_template(template).globals["strftime_now"] = self._day.strftime

    @property
    def prints_date(self) -> bool:
        """Whether the template asks for the date."""
        return "strftime_now" in self.source

    def end_of_turn(self) -> EndOfTurn:
        """Return what ends an answer, seen on a conversation of our own.

        Raises:
            ModelError: The template cannot render the plainest conversation, so that no row is to
                blame.
        """
        if self._end is None:
            probe = [
                {"role": "user", "content": _QUESTION},
                {"role": "assistant", "content": _ANSWER},
            ]
            remedy = "fix its chat template, or write rows with prompt and completion"
            try:
                text = self.render(probe, {})
            except BadRow as error:
                raise ModelError(
                    f"{error} (one question and one answer)", where=self._name, remedy=remedy
                ) from error
            found = re.search(re.escape(_ANSWER), text, re.IGNORECASE)
            if found is None:
                raise ModelError(
                    "the chat template leaves out an answer that is plain text",
                    where=self._name,
                    remedy=remedy,
                )
            self._end = self._split_tail(text[found.end() :])
        return self._end

    def _split_tail(self, tail: str) -> EndOfTurn:
        tokens = sorted(map(re.escape, self.control), key=len, reverse=True)
        stop = re.match(rf"\s*(?:{'|'.join(tokens)})+", tail) if tokens else None
        return EndOfTurn(tail, stop.end() if stop else len(tail.rstrip()), stop is not None)

    def end_of_answer(self, text: str, messages: Messages) -> int:
        """Return where the last turn of a rendered conversation ends, its stop tokens included.

        Raises:
            BadRow: The template ends the turn with none, although it ends others with one.
        """
        end = self.end_of_turn()
        if text.endswith(end.tail):
            return len(text) - len(end.tail) + end.kept
        stripped = text.rstrip()
        # Calls of tools may end otherwise than answers do, as Llama 3.1's with <|eom_id|>.
        if end.has_stop and not stripped.endswith(tuple(self.special)):
            raise BadRow(
                f"the chat template of {self._name} ends messages[{len(messages) - 1}] without a"
                " stop token"
            )
        return len(stripped)

    def require_whole(self, row: ChatRow) -> None:
        """Refuse a conversation of which the template would leave something out.

        What is found of one holds for all of the same shape.

        Raises:
            BadRow: Naming the message or key that changes nothing in what is rendered.
        """
        shape = (
            tuple((message["role"], frozenset(message)) for message in row.messages),
            tuple(sorted(row.options)),
            tuple(row.trained),
        )
        if shape not in self._known:
            self._known[shape] = self._left_out(row)
        left_out = self._known[shape]
        if left_out is not None:
            raise BadRow(f"the chat template of {self._name} leaves out {left_out}")

    def _left_out(self, row: ChatRow) -> str | None:
        marks = {at: f"peftdist{at}mark" for at, m in enumerate(row.messages) if m.get("content")}
        marked = [
            {**message, "content": marks[at]} if at in marks else message
            for at, message in enumerate(row.messages)
        ]
        text = self.render(marked, row.options).casefold()
        if any(mark not in text for mark in marks.values()):
            # Mistral 0.3 writes the system's text into the newest question alone.
            prompts = (self.render(marked[:at], row.options, generation=True) for at in row.trained)
            text += "".join(prompts).casefold()
        for at, mark in marks.items():
            if mark not in text:
                return f"messages[{at}], of role {row.messages[at]['role']!r}"
        for key in row.options:
            if key not in ("tools", "documents"):
                if not re.search(rf"\b{re.escape(key)}\b", self.source):
                    return f"chat_template_kwargs.{key}, which it does not read"
            elif not self._differs(row.messages, row.options, without=key):
                return key
        for at, message in enumerate(row.messages):
            for keys in (REASONING, ("tool_calls",), ("name",)):
                given = [key for key in keys if key in message]
                # which tool has answered is told by the order too
                if not given or (message["role"] == "tool" and given == ["name"]):
                    continue
                bare = {key: value for key, value in message.items() if key not in keys}
                before = row.messages[:at]
                if self._same((*before, message), (*before, bare), row.options):
                    return f"messages[{at}].{given[0]}"
        return None

    def _differs(self, messages: Messages, options: Mapping[str, Any], *, without: str) -> bool:
        fewer = {key: value for key, value in options.items() if key != without}
        return self.render(messages, options) != self._text_or_none(messages, fewer)

    def _same(self, one: Messages, other: Messages, options: Mapping[str, Any]) -> bool:
        return self.render(one, options) == self._text_or_none(other, options)

    def _text_or_none(self, messages: Messages, options: Mapping[str, Any]) -> str | None:
        try:
            return self.render(messages, options)
        except BadRow:  # a template that refuses what it has been deprived of reads it
            return None


@contextmanager
def _timed() -> Iterator[None]:
    """Raise `_TooSlow` in what takes longer than a rendering may, within `limited`."""
    in_main = threading.current_thread() is threading.main_thread()
    try:
        if in_main:
            # Again and again: jinja2 swallows what is raised where it computes constants.
            again_s = RENDERING_LIMIT_S / 10
            signal.setitimer(signal.ITIMER_VIRTUAL, RENDERING_LIMIT_S, again_s)
        yield
    finally:
        if in_main:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)


def _stop(_signal: int, _frame: object) -> None:
    raise _TooSlow(f"not done within {RENDERING_LIMIT_S:g} s")


def _address_space() -> int:
    with Path("/proc/self/statm").open(encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _in_words(error: Exception) -> str:
    from jinja2 import TemplateError

    kind = "" if isinstance(error, TemplateError | _TooSlow) else f"{type(error).__name__}: "
    text = " ".join(f"{kind}{error}".split())
    return f"{text[:197]}..." if len(text) > 200 else text
