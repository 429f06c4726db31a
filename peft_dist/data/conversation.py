"""A conversation as the texts that are trained: each prompt as inference sends it, then the answer.

Where no turn changes once others follow, one text holds them all. Templates that write earlier
turns otherwise, as reasoning models' do, give one text for each trained turn.
"""

import os.path
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peft_dist.data.bad_row import BadRow
from peft_dist.data.chat_rows import ChatRow
from peft_dist.data.chat_template import ChatTemplate
from peft_dist.data.pieces import CLOSE, OPEN, TextPiece

_TAG = re.compile(r"</?\w+>")


@dataclass(frozen=True, slots=True)
class Answer:
    """A trained turn: the prompt that inference sends, and what follows it."""

    prompt: str
    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """A rendered conversation, and each of its trained turns."""

    whole: str | None
    """All of it, where every prompt with its answer is a part of it from its beginning."""
    answers: tuple[Answer, ...]
    has_control_text: bool
    """Whether somebody's text holds control tokens."""

    def pieces_of_whole(self, control: re.Pattern[str]) -> list[TextPiece]:
        """Return the pieces of `whole`."""
        assert self.whole is not None
        pieces: list[TextPiece] = []
        end, after = 0, None
        for answer in self.answers:
            pieces.append(TextPiece(self.whole[end : len(answer.prompt)], after=after))
            pieces.append(TextPiece(answer.text, is_trained=True, after=""))
            end = len(answer.prompt) + len(answer.text)
            stops = control.findall(answer.text)
            after = stops[-1] if stops and answer.text.endswith(stops[-1]) else ""
        return [*pieces, TextPiece(self.whole[end:], after=after)]

    def pieces_of_answers(self) -> list[list[TextPiece]]:
        """Return the pieces of each prompt with its answer."""
        return [
            [TextPiece(answer.prompt), TextPiece(answer.text, is_trained=True, after="")]
            for answer in self.answers
        ]


class ConversationReader:
    """Renders the conversations of rows with one chat template.

    Args:
        template: The template.
        is_hidden: Whether a control token can be encoded as text.
    """

    def __init__(self, template: ChatTemplate, is_hidden: Callable[[str], bool]) -> None:
        """Prepare to look for control tokens in texts."""
        self._template, self._is_hidden = template, is_hidden
        self.opening: str | None = None
        """What the prompt begins of an answer although finished turns do not show it."""
        self.control = _any_of(template.control)
        self._special = _any_of(template.special)

    def read(self, row: ChatRow) -> Conversation:
        """Return the conversation of a row.

        Raises:
            BadRow: The template refuses it or leaves something out, or no prompt leads to a turn.
        """
        template = self._template
        end = template.end_of_turn()
        template.require_whole(row)
        marked = self._with_marks(row)
        messages, options = marked.messages, marked.options
        whole = template.render(messages, options)
        if marked is not row:
            self._require_unread(whole, template.render(row.messages, row.options))
        answers: list[Answer] = []
        are_parts = end.has_stop
        for at in row.trained:
            prompt = template.render(messages[:at], options, generation=True)
            upto = messages[: at + 1]
            text = whole if at + 1 == len(messages) else template.render(upto, options)
            ended = text[: template.end_of_answer(text, upto)]
            is_part = ended.startswith(prompt)
            answer = (
                ended[len(prompt) :] if is_part else self._continued(prompt, ended, upto, options)
            )
            if not self._shows(answer, messages[at]):
                raise BadRow(f"the chat template leaves out a part of messages[{at}].content")
            answers.append(Answer(prompt, answer))
            are_parts = are_parts and is_part and whole.startswith(ended)
        # Only what one encoding of a whole text confirms may hold several answers.
        are_parts = are_parts and (marked is row or len(answers) == 1)
        return Conversation(whole if are_parts else None, tuple(answers), marked is not row)

    def _continued(
        self, prompt: str, ended: str, messages: Sequence[dict[str, Any]], options: dict[str, Any]
    ) -> str:
        """Return an answer as it follows a prompt that begins more than the rendered answer shows.

        DeepSeek-R1 asks with `<think>`, and leaves that and the reasoning out of a finished turn.

        Raises:
            BadRow: The prompt is no beginning of the turn at all.
        """
        *before, message = messages
        content = message.get("content", "")
        other = {**message, "content": "\ue000"} if content else message  # begins as nothing does
        common = _common(prompt, self._template.render([*before, other], options))
        asked = _common(prompt, self._template.render(before, options))
        if len(common) < len(asked) or not ended.startswith(common):
            found = self._after_question(prompt, ended, messages, options)
            if found is not None:
                return found
            raise BadRow(
                f"the chat template renders messages[{len(before)}] otherwise than its own prompt"
                " begins it, so no prompt leads to that turn"
            )
        self.opening = opening = prompt[len(common) :]
        shown = ended[len(common) :]
        if "tool_calls" in message or self._shows(shown, message):
            return shown
        end = self._template.end_of_turn()
        text = content.lstrip().removeprefix(opening.strip()).lstrip("\n")
        return str(text) + end.tail[: end.kept]

    def _after_question(
        self, prompt: str, ended: str, messages: Sequence[dict[str, Any]], options: dict[str, Any]
    ) -> str | None:
        """Return what follows the last question in a finished turn, asked as the prompt asks.

        Mistral 0.3 leaves the system's text out of a question that is answered. None where what
        comes between question and answer is not what the prompt ends with.
        """
        *before, message = messages
        question = before[-1].get("content", "").strip() if before else ""
        content = message.get("content", "")
        if not question or not content or question not in prompt:
            return None
        end = prompt[prompt.rindex(question) :]
        other = self._template.render([*before, {**message, "content": "\ue000"}], options)
        at = _common(ended, other).rfind(end)
        return None if at < 0 else ended[at + len(end) :]

    def _shows(self, text: str, message: dict[str, Any]) -> bool:
        """Whether a text has all of a message's content, whatever is put around its parts."""
        content = message.get("content", "").strip()
        return content in text or self._squeezed(content) in self._squeezed(text)

    def _squeezed(self, text: str) -> str:
        """Return a text without blanks, control tokens and tags, such as those of a thought."""
        bare = _TAG.sub("", self.control.sub("", _unmarked(text)))
        return "".join(bare.split()).casefold()

    def _require_unread(self, marked: str, unmarked: str) -> None:
        """Refuse a text of which the template has read the control tokens as its own.

        Raises:
            BadRow: They are no longer where they were written, or change what is around them.
        """
        left = re.sub(f"{OPEN}(?:{self.control.pattern}){CLOSE}", "", marked)
        if OPEN in left or CLOSE in left or _unmarked(marked) != unmarked:
            raise BadRow("the chat template reads control tokens that the texts of messages hold")

    def _with_marks(self, row: ChatRow) -> ChatRow:
        """Return a row with marks around the control tokens in its texts; itself if it has none.

        What the template writes but is no special token, such as `<think>`, is the assistant's to
        write too.
        """
        own = [self._special if m["role"] == "assistant" else self.control for m in row.messages]
        parts = [*zip(row.messages, own, strict=True), (row.options, self.control)]
        if not any(_holds(part, control) for part, control in parts):
            return row
        for message in row.messages:
            if self.control.search(message["role"]):
                raise BadRow(f"a role is {message['role']!r}, which holds a control token")
        *messages, options = [self._marked(part, control) for part, control in parts]
        return replace(row, messages=tuple(messages), options=options)

    def _marked(self, value: Any, control: re.Pattern[str]) -> Any:
        if isinstance(value, dict):
            for key in value:
                if control.search(key):
                    raise BadRow(f"a key is {key!r}, which holds a control token")
            return {key: self._marked(item, control) for key, item in value.items()}
        if isinstance(value, list):
            return [self._marked(item, control) for item in value]
        if not isinstance(value, str):
            return value
        if OPEN in value or CLOSE in value:
            raise BadRow("a text holds control tokens and also U+F0000 or U+F0001")
        for token in set(control.findall(value)):
            if not self._is_hidden(token):
                raise BadRow(f"a text holds the control token {token!r}, which has no other form")
        return control.sub(rf"{OPEN}\g<0>{CLOSE}", value)


def _holds(value: Any, control: re.Pattern[str]) -> bool:
    """Whether a control token is in any text of a value, or key."""
    match value:
        case str():
            return control.search(value) is not None
        case dict():
            return any(_holds(key, control) or _holds(item, control) for key, item in value.items())
        case list():
            return any(_holds(item, control) for item in value)
        case _:
            return False


def _any_of(tokens: Collection[str]) -> re.Pattern[str]:
    """Return what matches any of some tokens; a longer one before those that it begins with."""
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _common(one: str, other: str) -> str:
    return os.path.commonprefix([one, other])


def _unmarked(text: str) -> str:
    return text.replace(OPEN, "").replace(CLOSE, "")
