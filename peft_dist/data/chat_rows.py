"""A row that holds a conversation: messages, what is rendered beside them, which turns are trained.

Every key with a meaning in the chat formats in use is either handed on to the chat template, read
as the weight of a turn, or refused; none is dropped. Keys without one, such as `id`, may be there.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft_dist.data.bad_row import BadRow, require_utf8, shown, text_of

ROW_OPTIONS = ("tools", "documents", "chat_template_kwargs")
"""Keys of a row that go to the chat template beside the messages."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names of what a turn thinks before it answers; chat templates read the first."""
WEIGHTS = ("weight", "train", "trainable", "training", "loss", "loss_mask")
"""Keys of a message that say whether a turn is trained; they are never rendered."""
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
REFUSED_IN_ROW = ("functions", "function_call", "weight", "loss_mask", *_MEDIA)
REFUSED_IN_MESSAGE = ("function_call", "refusal", *_MEDIA)
"""Keys that would change the conversation, and that nothing here can honour."""
_RESERVED = (
    *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt"),
    *("continue_final_message", "tokenize", "tokenizer_kwargs", "sanitize_control_tokens"),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "strftime_now"),
)


@dataclass(frozen=True, slots=True)
class ChatRow:
    """A conversation of which turns of the assistant are trained."""

    line: int
    messages: tuple[dict[str, Any], ...]
    trained: tuple[int, ...]
    """Which of the messages are trained."""
    options: dict[str, Any] = field(default_factory=dict)
    """What the chat template gets beside the messages, such as `tools`."""


def parse_chat(line: int, value: Mapping[str, Any]) -> ChatRow:
    """Return the conversation of a decoded record.

    Raises:
        BadRow: Why it cannot be trained as it is written.
    """
    messages = value["messages"]
    if not isinstance(messages, list):
        raise BadRow(f"messages is {shown(messages)}, not a list of role and content")
    if not messages:
        raise BadRow("messages is empty")
    _refuse(value, REFUSED_IN_ROW, "")
    turns = [_message(message, f"messages[{at}]") for at, message in enumerate(messages)]
    roles = [turn["role"] for turn, _ in turns]
    if "assistant" not in roles:
        raise BadRow("messages has no turn of role assistant, so there is nothing to train")
    if roles[0] == "assistant":
        raise BadRow("messages[0] is the assistant's; begin with a system or user turn")
    trained = tuple(at for at, (_, is_trained) in enumerate(turns) if is_trained)
    if not trained:
        raise BadRow("every turn of the assistant has the weight 0, so there is nothing to train")
    return ChatRow(line, tuple(turn for turn, _ in turns), trained, _options(value))


def _is_absent(value: Any) -> bool:
    return value is None or value in ("", [], {})


def _refuse(value: Mapping[str, Any], keys: tuple[str, ...], at: str) -> None:
    for key in keys:
        if not _is_absent(value.get(key)):
            raise BadRow(f"{at}{key} is not supported; it would be left out of the conversation")


def _message(message: Any, at: str) -> tuple[dict[str, Any], bool]:
    """Return a message as the chat template gets it, and whether it is trained."""
    if not isinstance(message, dict):
        raise BadRow(f"{at} is {shown(message)}, not an object with role and content")
    role = text_of(message, "role", at=f"{at}.")
    _refuse(message, REFUSED_IN_MESSAGE, f"{at}.")
    extras = {
        key: value
        for key, value in message.items()
        if key not in ("role", "content", *WEIGHTS) and not _is_absent(value)
    }
    turn: dict[str, Any] = {"role": role}
    content = message.get("content")
    if isinstance(content, list):
        content = _joined(content, f"{at}.content")
    says_more = any(key in extras for key in ("tool_calls", *REASONING))
    if not (content is None and says_more):
        turn["content"] = text_of(
            message if content is None else {"content": content},
            "content",
            at=f"{at}.",
            may_be_empty=role != "assistant" or says_more,
        )
    if "tool_calls" in extras:
        extras["tool_calls"] = _calls(extras["tool_calls"], f"{at}.tool_calls")
    if extras:
        _require_plain(extras, at)
    return turn | extras, _is_trained(message, role, at)


def _joined(parts: list[Any], at: str) -> str:
    """Return the text of content parts; several are joined by a newline, as vLLM does."""
    texts = []
    for number, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            what = f"of type {kind}" if isinstance(kind, str) else shown(part)
            raise BadRow(f"{at}[{number}] is {what}; only text is supported")
        texts.append(text_of(part, "text", at=f"{at}[{number}].", may_be_empty=True))
    return "\n".join(texts)


def _calls(calls: Any, at: str) -> list[Any]:
    """Return tool calls with their arguments as objects, which is how servers render them."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRow(f"{at} is {shown(calls)}, not a list of objects")
    return [_call(call, f"{at}[{number}]") for number, call in enumerate(calls)]


def _call(call: dict[str, Any], at: str) -> dict[str, Any]:
    inner = call.get("function")
    if isinstance(inner, dict):
        return {**call, "function": _call(inner, f"{at}.function")}
    if isinstance(call.get("arguments"), str):
        return {**call, "arguments": _decoded(call["arguments"], f"{at}.arguments")}
    return call


def _decoded(value: Any, named: str) -> Any:
    """Return a value that columnar files hold as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{named} is {shown(value)}, which is not JSON") from error


def _is_trained(message: Mapping[str, Any], role: str, at: str) -> bool:
    given = {key: message[key] for key in WEIGHTS if message.get(key) is not None}
    for key, weight in given.items():
        if not isinstance(weight, int | float) or weight not in (0, 1):
            raise BadRow(f"{at}.{key} is {shown(weight)}; only 0 (not trained) and 1 are supported")
        if weight and role != "assistant":
            raise BadRow(f"{at}.{key} is 1, but only turns of role assistant are trained")
    if len({bool(weight) for weight in given.values()}) > 1:
        raise BadRow(f"{at} has {' and '.join(given)}, which differ")
    return role == "assistant" and all(given.values())


def _options(value: Mapping[str, Any]) -> dict[str, Any]:
    found = {
        key: _decoded(value[key], key) for key in ROW_OPTIONS if not _is_absent(value.get(key))
    }
    for key in ("tools", "documents"):
        items = found.get(key, [])
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise BadRow(f"{key} is {shown(items)}, not a list of objects")
    variables = found.pop("chat_template_kwargs", {})
    if not isinstance(variables, dict):
        raise BadRow(f"chat_template_kwargs is {shown(variables)}, not an object")
    for key in variables:
        if key in _RESERVED:
            raise BadRow(f"chat_template_kwargs.{key} is not a variable of the chat template")
    options = {key: item for key, item in found.items() if item} | variables
    if options:
        _require_plain(options, "")
    return options


def _require_plain(value: Any, at: str) -> None:
    named = at or "the row"
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, TypeError, RecursionError) as error:
        raise BadRow(f"{named} cannot be written as JSON: {error}") from error
    require_utf8(text, named)
