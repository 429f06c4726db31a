"""Append the events of a run to its ledger, and the protocol of everything that takes events."""

import errno
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from peft_dist.common.atomic import sync_folder
from peft_dist.common.errors import TrainingError
from peft_dist.common.sharing import file_mode
from peft_dist.ledger.events import LedgerEvent

log = logging.getLogger(__name__)

MAX_PENDING = 10_000
"""Lines kept in memory while the disk takes none; one more ends the run."""
TAIL_BYTES = 65_536
"""How much of a file's end is read at once in search of its last newline."""


class Tracker(Protocol):
    """A view of the run."""

    def write(self, event: LedgerEvent) -> None:
        """Take one event."""

    def close(self) -> None:
        """Show or write what still waits."""


class LedgerWriter:
    """Writes `ledger.jsonl`: each event is a complete line as soon as it is written.

    A full disk does not end training: lines wait in memory and are tried again, in order, with
    every later one. May be used from several threads.
    """

    def __init__(
        self,
        path: Path,
        *,
        attempt: int = 1,
        clock_zero: float | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        """Open the file for appending, and cut the half line that a kill may have left at its end.

        Args:
            path: The file; made private if it is new.
            attempt: Which start of the run this is, counted from 1.
            clock_zero: `time.monotonic()` at the start of this process; now by default.
            check: Called before every write; raises where the run is no longer this attempt's,
                and then nothing is written.

        Raises:
            TrainingError: Where it cannot be written.
        """
        self._path, self._attempt, self._check = path, attempt, check
        self._clock_zero = time.monotonic() if clock_zero is None else clock_zero
        self._lock = threading.Lock()
        self._pending: deque[bytes] = deque()
        self._half: tuple[int, int] | None = None
        """Where a half line begins and ends that could not be cut yet."""
        self._warned = self._closed = self._name_synced = False
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, file_mode())
        except OSError as error:
            raise self._lost(error) from error
        try:
            _cut_half_line(self._fd)
        except OSError as error:
            os.close(self._fd)
            raise self._lost(error) from error

    def write(self, event: LedgerEvent) -> None:
        """Append one event, with `attempt`, `time` and `at_s` unless it has them.

        Raises:
            TrainingError: Where the disk has taken no line for `MAX_PENDING` events.
            PeftDistError: Whatever `check` raises.
        """
        with self._lock:
            assert not self._closed, "its file is closed, and the number may be another's"
            if self._check is not None:
                self._check()
            stamp = {
                "attempt": self._attempt,
                "time": time.time(),
                "at_s": time.monotonic() - self._clock_zero,
            }
            line = json.dumps(stamp | event.fields(), allow_nan=False)
            self._pending.append(f"{line}\n".encode())
            try:
                self._write_pending()
                self._warned = False
            except OSError as error:
                if len(self._pending) > MAX_PENDING:
                    raise self._lost(error) from error
                if not self._warned:
                    self._warned = True
                    log.warning(
                        "%s: cannot be written: %s; training goes on, its events wait in memory",
                        self._path,
                        error.strerror or error,
                    )

    def sync(self) -> None:
        """Write what waits, and make all lines survive a power cut; does nothing once closed.

        Other threads can write events while the disk is busy with it.

        Raises:
            OSError: Where the disk is full or broken; lines that wait are tried again later.
            PeftDistError: Whatever `check` raises while events wait.
        """
        with self._lock:
            if self._closed:
                return
            if self._pending and self._check is not None:
                self._check()
            try:
                self._write_pending()
                # Its own number: the file may be closed meanwhile, and the number be another's.
                fd = os.dup(self._fd)
            except OSError as error:
                raise self._not_synced(error) from error
        try:
            os.fsync(fd)
            if not self._name_synced:
                sync_folder(self._path.parent)
                self._name_synced = True
        except OSError as error:
            raise self._not_synced(error) from error
        finally:
            os.close(fd)

    def close(self) -> None:
        """Write what waits and close the file; a second time does nothing.

        Raises:
            TrainingError: Where events of the run would be lost.
            PeftDistError: Whatever `check` raises while events wait.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            try:
                if self._pending and self._check is not None:
                    self._check()
                self._write_pending()
                # A network file system may say only here that the disk is full.
                os.fsync(self._fd)
            except OSError as error:
                raise self._lost(error) from error
            finally:
                os.close(self._fd)

    def _write_pending(self) -> None:
        while self._pending:
            self._append(self._pending[0])
            self._pending.popleft()

    def _append(self, line: bytes) -> None:
        """Append a line, or nothing of it."""
        self._undo_half()
        written = 0
        try:
            while written < len(line):
                written += os.write(self._fd, line[written:])
        except OSError:
            if written:
                end = os.lseek(self._fd, 0, os.SEEK_CUR)  # of what was appended last
                self._half = (end - written, end)
                with suppress(OSError):  # else before the next line
                    self._undo_half()
            raise

    def _undo_half(self) -> None:
        if self._half is None:
            return
        begin, end = self._half
        # Behind our half line may stand a line of a newer attempt; that one is not ours to cut.
        if os.fstat(self._fd).st_size == end:
            os.ftruncate(self._fd, begin)
        self._half = None

    def _not_synced(self, error: OSError) -> OSError:
        reason = f"{self._path.name}: {error.strerror or error}"
        return OSError(error.errno, reason)

    def _lost(self, error: OSError) -> TrainingError:
        waiting = f" ({len(self._pending)} events not written)" if self._pending else ""
        free = "let its disk be written to" if error.errno == errno.EROFS else "free space"
        return TrainingError(
            f"cannot be written: {error.strerror or error}{waiting}",
            where=str(self._path),
            remedy=f"{free} and start the run again",
        )


def _cut_half_line(fd: int) -> None:
    """Truncate a file to its last newline."""
    size = end = os.fstat(fd).st_size
    while end > 0:
        begin = max(0, end - TAIL_BYTES)
        newline = os.pread(fd, end - begin, begin).rfind(b"\n")
        if newline >= 0:
            end = begin + newline + 1
            break
        end = begin
    if end < size:
        os.ftruncate(fd, end)
