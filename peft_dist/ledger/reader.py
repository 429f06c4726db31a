"""Read a ledger: all of it as a stream, its newest events, or what is appended to it."""

from collections.abc import Iterator
from pathlib import Path

from peft_dist.common.errors import RunDirError
from peft_dist.ledger.events import LedgerEvent, StartEvent
from peft_dist.ledger.read_event import from_line

BLOCK_BYTES = 65_536
"""How much of a file's end is read at once: some hundred steps; of a thousand ranks, a few."""
NEWLINE = ord("\n")
TAIL_LIMIT_BYTES = 1 << 20
"""Most of a file's end that `tail` reads unless told otherwise."""


class LedgerReader:
    """The events of one ledger. A last line without its end is being written: it is left out."""

    def __init__(self, path: Path) -> None:
        """Name the file; it need not exist yet."""
        self._path = path
        self._read_bytes = self._read_lines = 0

    def all(self) -> Iterator[LedgerEvent]:
        """Yield every event in order, one line in memory at a time.

        Raises:
            RunDirError: Where the file cannot be read, or a line is no event; it names the line.
        """
        try:
            yield from LedgerReader(self._path)._new_events()
        except OSError as error:
            raise RunDirError(
                f"cannot be read: {error.strerror or error}",
                where=str(self._path),
                remedy="name the folder of a run that has begun to train",
            ) from error

    def follow(self) -> Iterator[LedgerEvent]:
        """Yield the events appended since the last call; a file that is not there has none.

        Raises:
            RunDirError: Where a line is no event; it names the line.
            OSError: Where the file cannot be read.
        """
        try:
            yield from self._new_events()
        except FileNotFoundError:
            return

    def tail(
        self,
        count: int,
        kind: type[LedgerEvent] | tuple[type[LedgerEvent], ...] = LedgerEvent,
        *,
        limit_bytes: int = TAIL_LIMIT_BYTES,
    ) -> list[LedgerEvent]:
        """Return the newest events, the oldest first, until `count` of a kind are among them.

        Reads the end of the file only. Lines that are no events are left out, and a file that
        cannot be read has none.

        Args:
            count: How many events of the kind are wanted.
            kind: Class or classes of the events that are counted.
            limit_bytes: Where to stop looking for them.
        """
        found: list[LedgerEvent] = []
        for line in self._lines_backwards(limit_bytes):
            try:
                event = from_line(line)
            except ValueError:
                continue
            found.append(event)
            count -= isinstance(event, kind)
            if count <= 0:
                break
        return found[::-1]

    def newest_start(self) -> tuple[StartEvent, LedgerEvent] | None:
        """Return the start of the newest attempt and the last event; None before any start.

        Raises:
            RunDirError: Where a line is no event; it names the line.
            OSError: Where the file cannot be read.
        """
        start = last = None
        for last in LedgerReader(self._path).follow():
            if isinstance(last, StartEvent):
                start = last
        return None if start is None or last is None else (start, last)

    def _new_events(self) -> Iterator[LedgerEvent]:
        read_bytes, read_lines = self._read_bytes, self._read_lines
        try:
            with self._path.open("rb") as file:
                file.seek(read_bytes)
                for line in file:
                    if line[-1] != NEWLINE:
                        return
                    read_bytes += len(line)
                    read_lines += 1
                    try:
                        event = from_line(line)
                    except ValueError as error:
                        raise RunDirError(
                            f"{line[:-1][:60].decode(errors='replace')!r} is no event: {error}",
                            where=f"{self._path}:{read_lines}",
                            remedy="remove this line",
                        ) from error
                    yield event
        finally:
            self._read_bytes, self._read_lines = read_bytes, read_lines

    def _lines_backwards(self, limit_bytes: int) -> Iterator[bytes]:
        """Yield the lines of the file's end, the newest first, without one that has no end."""
        try:
            with self._path.open("rb") as file:
                end = file.seek(0, 2)
                stop = max(0, end - limit_bytes)
                rest, at_end = b"", True
                while end > stop:
                    begin = max(stop, end - BLOCK_BYTES)
                    file.seek(begin)
                    rest, *lines = (file.read(end - begin) + rest).split(b"\n")
                    if lines and at_end:
                        lines.pop()  # empty, or being written
                        at_end = False
                    yield from reversed(lines)
                    end = begin
                if end == 0 and not at_end:
                    yield rest
        except OSError:
            return
