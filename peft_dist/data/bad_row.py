"""A row that cannot be used, and the values of a row as errors show them."""

from collections.abc import Mapping
from typing import Any

from peft_dist.data.record import LONGEST_ROW, TOO_LONG


class BadRow(Exception):
    """Why one row cannot be used, and what to do if it is not to fix the row.

    `BadRows` decides whether the run may go on.
    """

    def __init__(self, why: str, *, remedy: str = "") -> None:
        """Keep the remedy beside the reason."""
        super().__init__(why)
        self.remedy = remedy


def text_of(value: Mapping[str, Any], key: str, *, at: str = "", may_be_empty: bool = False) -> str:
    """Return the text under a key of a row.

    Args:
        value: The row, or a part of it.
        key: Where the text is.
        at: What stands before the key in an error, such as `messages[0].`.
        may_be_empty: Whether an empty text is one.

    Raises:
        BadRow: Where there is none, or it is not UTF-8.
    """
    named = f"{at}{key}"
    if key not in value:
        raise BadRow(f"has no {named}")
    text = value[key]
    if text is None:
        raise BadRow(f"{named} is null")
    if not isinstance(text, str):
        raise BadRow(f"{named} is {shown(text)}, not text")
    if not text and not may_be_empty:
        raise BadRow(f"{named} is empty")
    if len(text) > LONGEST_ROW:  # of files without lines
        raise BadRow(TOO_LONG)
    require_utf8(text, named)
    return text


def require_utf8(text: str, named: str) -> None:
    """Refuse lone surrogates, which escapes and undecodable CSV bytes leave.

    Raises:
        BadRow: Naming the first.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"{named} has broken UTF-8 at character {error.start + 1}") from error


def shown(value: Any) -> str:
    """Return a value for an error, cut where it is long."""
    if value is None:
        return "null"
    text = repr(value)
    return f"{text[:37]}..." if len(text) > 40 else text
