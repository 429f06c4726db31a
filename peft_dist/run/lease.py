"""The lease of a run directory: one file per attempt to train it, the highest number holds it.

An attempt's file is its lease and its record. Whoever makes the next number takes the run over;
older attempts see that file and stop. A holder touches its file every `HEARTBEAT_S`; clocks of two
machines are never compared. An attempt without `outcome` that holds no more has crashed, and
`restart_policy` decides what follows from that.
"""

import json
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, Self

from peft_dist.common.atomic import make_file
from peft_dist.common.console import say
from peft_dist.common.errors import RunDirError, RunDirGone, Superseded
from peft_dist.common.process_identity import (
    is_alive,
    is_requeue_of,
    launcher,
    slurm_job,
    this_group,
    this_process,
)
from peft_dist.common.sharing import folder_mode
from peft_dist.run.attempt_records import (
    Record,
    describe,
    latest,
    record_path,
    remove_leftovers,
    write_json,
)

HEARTBEAT_S = 10.0
"""Seconds between two beats of a holder: few metadata operations, for a shared file system serves
hundreds of runs."""
STALE_AFTER_S = 90.0
"""Seconds without a beat after which a holder on another machine counts as dead. NFS may show
attributes that are 60 s old (acregmax, acdirmax in nfs(5)); three beats fit in the rest."""
LOOK_EVERY_S = 1.0
"""Seconds between two looks at a holder on another machine."""
CHECK_EVERY_S = 5.0
"""Seconds between two looks of `Attempt.check` for a later attempt: two metadata operations."""
PAUSE_S = 0.5
"""A process that has not run for so long was stopped: another attempt may hold the run by now."""
TICK_S = 0.1
"""Seconds after which a running process notes, in memory alone, that it runs."""


class Attempt:
    """The lease of a run directory; rank 0 of a run has one.

    Attributes:
        number: Which attempt this is, from 1.
        previous: The record of the attempt before it, where there was one.
    """

    def __init__(self, path: Path, record: Record, previous: Record | None) -> None:
        """Start to beat for a lease that `begin` has taken."""
        self.number: int = record["attempt"]
        self.previous = previous
        self._path = path
        self._next = record_path(path.parent, self.number + 1)
        self._record = record
        self._unwritten = False
        self._lock = threading.RLock()  # a signal's handler may end us in the middle of a note
        self._superseded = False
        self._over = threading.Event()  # ended or superseded: nothing may be written any more
        self._ran_at_s = self._looked_at_s = time.monotonic()
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._heart.start()

    @classmethod
    def begin(
        cls,
        folder: Path,
        *,
        after_verdict: bool = False,
        world_size: int | None = None,
        watched: str = "",
    ) -> Self:
        """Take the next attempt of a run, where nobody holds it any more.

        Takes no time, but up to `STALE_AFTER_S` where the attempt before ended without a word on
        another machine.

        Args:
            folder: The run's folder of attempts; made where it is missing.
            after_verdict: Whether a person starts again after a crash loop was reported; crashes
                before that count no more.
            world_size: How many processes there are, where that is known.
            watched: What `refuse_if_held` returned; what it has watched is not watched again.

        Raises:
            RunDirError: Where another process holds the run, or the folder cannot be used.
        """
        try:
            folder.mkdir(mode=folder_mode(), exist_ok=True)
            previous, held, _ = _find_holder(folder, watch_s=STALE_AFTER_S, watched=watched)
            if held:
                _refuse(folder, previous)
            number = previous["attempt"] + 1 if previous else 1
            record = {
                "attempt": number,
                **this_process(),
                **slurm_job(),
                "group": this_group(),
                "launcher": launcher(),
                "world_size": world_size,
                "counts_from": after_verdict,
            }
            path = record_path(folder, number)
            if not make_file(path, json.dumps(record) + "\n"):
                _refuse(folder, latest(folder))
            remove_leftovers(folder, before=number)
        except OSError as error:
            raise RunDirError(
                f"cannot be written: {error.strerror}",
                where=str(folder),
                remedy="free space or fix its permissions",
            ) from error
        return cls(path, record, previous)

    def check(self, *, now: bool = False) -> None:
        """Check that no later attempt has taken the run over; cheap enough for every step.

        It looks at the disk every `CHECK_EVERY_S`, and where the whole process was stopped.

        Args:
            now: Look at the disk in any case, as before a publish.

        Raises:
            Superseded: Where one has.
            RunDirGone: Where the run directory was moved or removed.
            OSError: With `now`, where the folder cannot be looked at.
        """
        time_s = time.monotonic()
        paused = time_s - max(self._ran_at_s, self._looked_at_s) > PAUSE_S
        if now or paused or time_s - self._looked_at_s > CHECK_EVERY_S:
            try:
                self._look()
            except OSError:
                if now:
                    raise
        if not self._superseded:
            return
        run_dir, newest = self._path.parent.parent, latest(self._path.parent)
        if newest is None and not _exists(self._path.parent):
            raise RunDirGone(run_dir)
        by = describe(newest) if newest else "a fresh run"
        raise Superseded(
            f"attempt {self.number} was taken over by {by}",
            where=str(run_dir),
            remedy="leave it to that one",
        )

    def note(self, **facts: Any) -> None:
        """Add facts to the record; what a full disk refuses, a later beat writes."""
        with self._lock:
            self._write({**self._record, **facts})

    def end(self, outcome: str, **facts: Any) -> None:
        """Stop to beat and let go of the run; the first outcome stays.

        Args:
            outcome: `done`, `interrupted` or `failed`.
            facts: More for the record.
        """
        with self._lock:
            self._write({**self._record, **facts, "outcome": outcome})
            self._over.set()
        self._heart.join(timeout=TICK_S)
        if not self._superseded:
            # Of a start that was killed while it took our number; no contender is left by now.
            remove_leftovers(self._path.parent, before=self.number + 1)

    def _beat(self) -> None:
        beat_at_s = self._ran_at_s + HEARTBEAT_S
        while not self._over.wait(min(TICK_S, HEARTBEAT_S)):
            time_s = time.monotonic()
            if time_s >= beat_at_s or time_s - self._ran_at_s > PAUSE_S:
                with self._lock:
                    self._write(None)
                beat_at_s = time_s + HEARTBEAT_S
            self._ran_at_s = time_s  # last: `check` must not count on a look that is still due

    def _write(self, record: Record | None) -> None:
        """Write a record, or beat."""
        if self._over.is_set():
            return
        # Neither a full disk nor a file server's hiccup may end training, or the heartbeat.
        with suppress(OSError):
            self._look()
            if self._superseded:
                self._over.set()
            elif record is None and not self._unwritten:
                os.utime(self._path)
            else:
                self._unwritten = True
                write_json(self._path, record or self._record, durable=True)
                self._unwritten = False
        self._record = record or self._record

    def _look(self) -> None:
        # The answer can be as old as a network file system's cached attributes (60 s in NFS), and
        # so less than `STALE_AFTER_S`, before which nobody takes a run over that lives elsewhere.
        looked_at_s = time.monotonic()  # before: a stop in between makes the answer an old one
        # Our own file is missing where somebody cleared the folder: then it is another's run, or
        # none where the folder itself is missing; `check` tells these apart.
        if _exists(self._next) or not _exists(self._path):
            self._superseded = True
        self._looked_at_s = looked_at_s


def refuse_if_held(folder: Path) -> str:
    """Refuse a run that is held, before anything of it is touched.

    Takes no time where its holder was a process of this machine or has said how it ended, else up
    to `STALE_AFTER_S`.

    Args:
        folder: The run's folder of attempts.

    Returns:
        Which holder on another machine has shown no beat, for `Attempt.begin`.

    Raises:
        RunDirError: Where another process holds the run, or the folder cannot be read.
    """
    try:
        record, held, watched = _find_holder(folder, watch_s=STALE_AFTER_S)
    except OSError as error:
        raise RunDirError(
            f"cannot be read: {error.strerror}",
            where=str(folder),
            remedy="fix its permissions",
        ) from error
    if held:
        _refuse(folder, record)
    return watched


def end_for(folder: Path, outcome: str, *, wait_s: float = 0.0, **facts: Any) -> None:
    """Note how the newest attempt ended, for a holder that is gone and could not say so itself.

    Args:
        folder: The run's folder of attempts.
        outcome: As in `Attempt.end`.
        wait_s: How long the holder may take to go, once it is killed.
        facts: More for the record.
    """
    with suppress(OSError):  # a full disk is no reason to end otherwise
        deadline = time.monotonic() + wait_s
        while True:
            record, held, _ = _find_holder(folder, watch_s=0.0)
            if not held or time.monotonic() >= deadline:
                break
            time.sleep(0.05)
        if record is None or held:
            return
        remove_leftovers(folder, before=record["attempt"] + 1)
        if "outcome" not in record:
            path = record_path(folder, record["attempt"])
            write_json(path, {**record, **facts, "outcome": outcome}, durable=True)


def _find_holder(
    folder: Path, *, watch_s: float, watched: str = ""
) -> tuple[Record | None, bool, str]:
    """Return the newest record, whether its process holds the run, and the beat it stopped at."""
    first = ""
    # Looks are counted, not the time: one that hangs with its file server shows no missing beat.
    for look in range(1 + round(watch_s / LOOK_EVERY_S)):
        if look > 0:
            time.sleep(LOOK_EVERY_S)
        record = latest(folder)
        if record is None or "outcome" in record or is_requeue_of(record):
            return record, False, ""
        alive = is_alive(record)
        if alive is not None:
            return record, alive, ""
        beat = _beat_of(folder, record)
        first = first or beat
        if beat not in (first, ""):
            return record, True, ""
        if watched and beat == watched:
            break
        if look == 1:
            say(
                f"peft-dist: {describe(record)} held this run; waiting up to {watch_s:.0f} s to "
                "see whether it lives",
                sys.stderr,
            )
    return record, False, first


def _beat_of(folder: Path, record: Record) -> str:
    """Return what changes with every beat; nothing for a file that for once cannot be read."""
    with suppress(OSError):
        status = record_path(folder, record["attempt"]).stat()
        # Versions before this one wrote the file anew, and counted.
        return f"{record['attempt']} {status.st_mtime_ns} {record.get('beat', '')}"
    return ""


def _refuse(folder: Path, record: Record | None) -> NoReturn:
    raise RunDirError(
        f"is in use by {describe(record) if record else 'another process'}",
        where=str(folder.parent),
        remedy=f"wait for it, `peft-dist stop {folder.parent}`, or choose another --run-dir",
    )


def _exists(path: Path) -> bool:
    """Whether a file is there; unlike `Path.exists`, an unreachable folder is no answer."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True
