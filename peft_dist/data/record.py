"""One record of a source, before anybody knows whether it is a row."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

LONGEST_ROW = 20_000_000
"""Bytes that a record may have as text, and characters that a conversation may be rendered to: more
is a fault of the file, and would take memory without a limit."""
TOO_LONG = f"the row is longer than {LONGEST_ROW:,} bytes"


@dataclass(frozen=True)
class Broken:
    """A record that could not be decoded, and why."""

    why: str


Record = tuple[int, Any]
"""Line (or row, where a format has no lines) counted from 1, and the value or a `Broken`; in a
later file of several, `in_file` has counted it on."""
_LINES = 1 << 40
"""More than any file has."""


def in_file(file: int, line: int) -> int:
    """Return one number for a line of one of several files, in their order."""
    return file * _LINES + line


def file_and_line(number: int) -> tuple[int, int]:
    """Return what `in_file` was given."""
    return divmod(number, _LINES)


def lines(file: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """Yield each line of a file with its number from 1; None for one that is too long to read."""
    line = 0
    while raw := file.readline(LONGEST_ROW + 1):
        line += 1
        is_whole = raw.endswith(b"\n") or len(raw) <= LONGEST_ROW
        while not is_whole:
            rest = file.readline(1 << 20)
            is_whole = not rest or rest.endswith(b"\n")
            raw = b""
        yield line, raw or None
