"""The forms of rows that people have, turned into the ones that are trained.

Alpaca (`instruction`, `input`, `output`), ShareGPT (`conversations` of `from` and `value`) and
columns of any other name become `messages`, `prompt` and `completion`, or `text`. Whether those
hold what they must is for `rows.py`.
"""

from collections.abc import Mapping
from typing import Any

from peft_dist.data.bad_row import BadRow, shown
from peft_dist.data.chat_rows import REFUSED_IN_ROW, ROW_OPTIONS

FORMS = (("messages",), ("prompt", "completion"), ("text",))
"""The keys of each form that is trained; where a row has several, the first counts."""
FORM_KEYS = (
    *(key for form in FORMS for key in form),
    "conversations",
    "instruction",
    "input",
    "output",
    "history",
)
"""The keys of all forms, those of preferences left out."""
COLUMNS = (*FORM_KEYS, "chosen", "rejected", "label", "system", *ROW_OPTIONS, *REFUSED_IN_ROW)
"""The columns that are read of files that have many."""
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""Role of each name under `from` in ShareGPT's form."""
_GUESSES = {
    "messages": ("dialog", "dialogue", "chat", "turns"),
    "prompt": ("question", "query", "instruction", "input", "problem", "source"),
    "completion": ("answer", "response", "output", "solution", "target"),
    "text": ("content", "document", "sentence", "txt"),
}
"""Names that columns often have; only ever proposed."""
ALPACA = (
    "Below is an instruction that describes a task{with_input}. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n{input}"
    "### Response:\n"
)
"""The prompt of Stanford Alpaca, for models without a chat template."""


def to_known_form(
    value: Mapping[str, Any], columns: Mapping[str, str], *, as_chat: bool
) -> dict[str, Any]:
    """Return a record with the keys of a form that is trained, where it has those of another.

    Args:
        value: The record.
        columns: Which key holds what, where its name is not ours.
        as_chat: Whether an instruction becomes a chat, or the text of Alpaca's prompt.

    Raises:
        BadRow: A key of `columns` is missing, or a value is of another type.
    """
    row = renamed(value, columns) if columns else dict(value)
    if row.get("messages") is None and row.get("conversations") is not None:
        row["messages"] = row.pop("conversations")
    if isinstance(row.get("messages"), list):
        turns = [to_known_turn(turn, f"messages[{at}]") for at, turn in enumerate(row["messages"])]
        system = row.pop("system", None)
        row["messages"] = _with_system(turns, system)
    elif _is_alpaca(row):
        _read_alpaca(row, as_chat=as_chat)
    return row


def remedy_for(keys: Mapping[str, Any]) -> str:
    """Say how a row with these keys can be read: by the names that are known to be likely."""
    only = next(iter(keys)) if len(keys) == 1 else ""
    for separator, named in ((";", "';'"), ("\t", "tabs")):
        if separator in only:
            return f"write the columns with commas between them, where this file has {named}"
    found = {
        ours: next((name for name in (ours, *names) if name in keys), None)
        for ours, names in _GUESSES.items()
    }
    for form in FORMS:
        if all(found[ours] is not None for ours in form):
            mapped = [f"{ours}: {found[ours]}" for ours in form if found[ours] != ours]
            return f"say which keys to read, as data.columns: {{{', '.join(mapped)}}}"
    return "say which keys to read, as data.columns: {prompt: KEY, completion: KEY} or {text: KEY}"


def keys_of(value: Mapping[str, Any]) -> str:
    """Return the first keys of a record, for an error."""
    return f"keys: {', '.join(repr(key) for key in list(value)[:8]) or 'none'}"


def renamed(value: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Put what `columns` names in its place; other forms that the row may have do not count."""
    for ours, theirs in columns.items():
        if theirs not in value:
            raise BadRow(
                f"has no {theirs!r}, which data.columns names for {ours}; its {keys_of(value)}",
                remedy="fix data.columns, or the row",
            )
    meant = {key for form in FORMS if any(key in columns for key in form) for key in form}
    other_forms = {*FORM_KEYS} - meant if meant else set()
    kept = {
        key: item
        for key, item in value.items()
        if key not in columns.values() and key not in other_forms
    }
    return kept | {ours: value[theirs] for ours, theirs in columns.items()}


def to_known_turn(turn: Any, at: str) -> Any:
    """Return a turn of ShareGPT's form as one with `role` and `content`; others as they are."""
    if not isinstance(turn, dict) or "role" in turn or turn.get("from") is None:
        return turn
    speaker = turn["from"]
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise BadRow(f"{at}.from is {shown(speaker)}; known: {', '.join(ROLES)}")
    if "value" not in turn:
        raise BadRow(f"has no {at}.value")
    others = {key: item for key, item in turn.items() if key not in ("from", "value")}
    return {"role": ROLES[speaker], "content": turn["value"], **others}


def _with_system(turns: list[Any], system: Any) -> list[Any]:
    begins_with_one = turns and isinstance(turns[0], dict) and turns[0].get("role") == "system"
    if not system or begins_with_one:
        return turns
    return [{"role": "system", "content": system}, *turns]


def _is_alpaca(row: Mapping[str, Any]) -> bool:
    is_whole = any(all(row.get(key) is not None for key in form) for form in FORMS[:2])
    # Stanford's own file holds the whole prompt a second time, under `text`.
    return not is_whole and row.get("instruction") is not None and row.get("output") is not None


def _read_alpaca(row: dict[str, Any], *, as_chat: bool) -> None:
    """Replace the keys of Alpaca's form: by messages, or by a prompt and its completion."""
    text = {key: row.pop(key, None) or "" for key in ("instruction", "input", "output", "system")}
    history = row.pop("history", None) or []
    for key, value in text.items():
        if not isinstance(value, str):
            raise BadRow(f"{key} is {shown(value)}, not text")
    if not text["instruction"]:
        raise BadRow("instruction is empty")
    if not isinstance(history, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in history
    ):
        raise BadRow(f"history is {shown(history)}, not a list of pairs")
    row.pop("text", None)
    asked = "\n\n".join(part for part in (text["instruction"], text["input"]) if part)
    if as_chat or history:
        pairs = [*history, (asked, text["output"])]
        turns = [
            {"role": role, "content": content}
            for pair in pairs
            for role, content in zip(("user", "assistant"), pair, strict=True)
        ]
        row["messages"] = _with_system(turns, text["system"])
        return
    given = text["input"]
    prompt = ALPACA.format(
        instruction=text["instruction"],
        input=f"### Input:\n{given}\n\n" if given else "",
        with_input=", paired with an input that provides further context" if given else "",
    )
    system = f"{text['system']}\n\n" if text["system"] else ""
    row |= {"prompt": system + prompt, "completion": text["output"]}
