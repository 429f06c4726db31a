"""The end of a log file, and what is added to it, as text that is safe to show.

Prints nothing; a file that cannot be read at the moment has nothing new.
"""

import os
import re
from pathlib import Path

from peft_dist.common import console

BLOCK_BYTES = 1 << 16
TAIL_BYTES = 1 << 23
"""No more of a file's end than this is searched for its last lines, or read at once."""

CONTROL = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # colours, cursor
    r"|\x1b\][^\n\x07\x1b]*(?:\x07|\x1b\\)"  # titles, links
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)


class Tail:
    """A log that grows: its last lines, then every whole line that comes."""

    def __init__(self, path: Path, lines: int | None) -> None:
        """Begin so many lines before the end, at least one, or at the start for None."""
        self.path = path
        self._at = 0 if lines is None else _begin_of_last(path, lines)
        self._half = b""
        self._file: tuple[int, int] | None = None

    def more(self) -> str:
        """Return the lines that have come."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                identity = (status.st_dev, status.st_ino)
                if self._file not in (None, identity) or status.st_size < self._at:
                    self._at, self._half = 0, b""  # it was begun anew
                self._file = identity
                file.seek(self._at)
                new = file.read(TAIL_BYTES)
        except OSError:
            return ""
        self._at += len(new)
        whole, newline, self._half = (self._half + new).rpartition(b"\n")
        if len(self._half) > BLOCK_BYTES:  # a progress bar ends its line some day
            self._half = self._half.rpartition(b"\r")[2][-BLOCK_BYTES:]
        return printable((whole + newline).decode(errors="replace"))

    def rest(self) -> str:
        """Return the line at the end that nobody has ended."""
        half, self._half = self._half, b""
        return printable(half.decode(errors="replace") + "\n") if half else ""


def printable(text: str) -> str:
    """Return a text without what steers a terminal; line ends and tabs stay.

    Colours, and what else programs write for terminals, are left out. Of a line that a progress bar
    wrote again and again, its last state is left.
    """
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return console.printable(CONTROL.sub("", "\n".join(lines)))


def _begin_of_last(path: Path, lines: int) -> int:
    """Return where the last lines of a file begin, in bytes."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            size = BLOCK_BYTES
            while True:
                begin = max(0, end - size)
                file.seek(begin)
                text = file.read(end - begin)
                # What ends the last line begins no other.
                ends = [at.start() for at in re.finditer(b"\n", text[:-1])]
                if len(ends) >= lines:
                    return begin + ends[-lines] + 1
                if begin == 0 or size >= TAIL_BYTES:
                    return begin
                size *= 8
    except OSError:
        return 0
