"""The lease of a run directory: one file per attempt to train it, the highest number holds it.

An attempt's file is its lease and its record. Whoever makes the next number takes the run over;
older attempts see that file and stop. Holders show that they live by counting beats in their file;
clocks of two machines are never compared. Judges no crash: an attempt without `outcome` that holds
no more has crashed, and `crash_loop` says what follows from that.
"""

import json
import re
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, Self

from peft_dist.common.atomic import make_file, replace_file
from peft_dist.common.errors import RunDirError, Superseded
from peft_dist.common.process_identity import (
    is_alive,
    is_requeue_of,
    slurm_job,
    this_group,
    this_process,
)

HEARTBEAT_S = 0.5
"""Seconds between two beats of a holder."""
STALE_AFTER_S = 20.0
"""Seconds without a beat after which a holder on another machine counts as dead."""
SEEN_ALIVE_WITHIN_S = 1.5
"""Seconds in which a living holder on another machine surely shows a beat."""
LOOK_EVERY_S = 0.1
"""Seconds between two looks at the beats of a holder on another machine."""
CHECK_EVERY_S = 0.2
"""`Attempt.check` looks at the disk no more often than this."""

Record = dict[str, Any]
"""What one attempt says of itself; of a file that cannot be read only `attempt` is known."""


class Attempt:
    """The held lease of a run directory; rank 0 of a run has one.

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
        self._lock = threading.RLock()  # a signal's handler may end us in the middle of a note
        self._superseded = False
        self._over = threading.Event()  # ended or superseded: nothing may be written any more
        self._looked_at_s = time.monotonic()
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._heart.start()

    @classmethod
    def begin(
        cls, folder: Path, *, after_verdict: bool = False, world_size: int | None = None
    ) -> Self:
        """Take the next attempt of a run, where nobody holds it any more.

        Takes no time, but up to `STALE_AFTER_S` where the attempt before ended without a word on
        another machine.

        Args:
            folder: The run's folder of attempts; made where it is missing.
            after_verdict: Whether a person starts again after a crash loop was told; crashes
                before that count no more.
            world_size: How many processes there are, where that is known.

        Raises:
            RunDirError: Where another process holds the run, or the folder cannot be used.
        """
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            previous, held = _judge(folder, watch_s=STALE_AFTER_S)
            if held:
                _refuse(folder, previous)
            number = previous["attempt"] + 1 if previous else 1
            record = {
                "attempt": number,
                **this_process(),
                **slurm_job(),
                "group": this_group(),
                "world_size": world_size,
                "counts_from": after_verdict,
                "beat": 0,
            }
            path = record_path(folder, number)
            if not make_file(path, json.dumps(record) + "\n"):
                _refuse(folder, latest(folder))
            _remove_leftovers(folder, before=number)
        except OSError as error:
            raise RunDirError(
                f"cannot be written: {error.strerror}",
                where=str(folder),
                remedy="free space or fix its permissions",
            ) from error
        return cls(path, record, previous)

    def check(self, *, now: bool = False) -> None:
        """See that no later attempt has taken the run over; cheap enough for every step.

        Args:
            now: Look at the disk in any case, as before a publish.

        Raises:
            Superseded: Where one has.
            OSError: With `now`, where the folder cannot be looked at.
        """
        if now or time.monotonic() - self._looked_at_s >= CHECK_EVERY_S:
            self._looked_at_s = time.monotonic()
            try:
                self._superseded = self._superseded or self._find_successor()
            except OSError:
                if now:
                    raise
        if not self._superseded:
            return
        newest = latest(self._path.parent)
        by = _describe(newest) if newest else "a fresh run"
        raise Superseded(
            f"attempt {self.number} was taken over by {by}",
            where=str(self._path.parent.parent),
            remedy="leave it to that one",
        )

    def note(self, **facts: Any) -> None:
        """Add facts to the record; what a full disk refuses, a later beat writes."""
        with self._lock:
            self._write({**self._record, **facts}, durable=True)

    def end(self, outcome: str, **facts: Any) -> None:
        """Stop to beat and let go of the run; the first outcome stays.

        Args:
            outcome: `done`, `interrupted` or `failed`.
            facts: More for the record.
        """
        with self._lock:
            self._write({**self._record, **facts, "outcome": outcome}, durable=True)
            self._over.set()
        self._heart.join(timeout=HEARTBEAT_S)
        if not self._superseded:
            # Of a start that was killed while it took our number; no contender is left by now.
            _remove_leftovers(self._path.parent, before=self.number + 1)

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT_S):
            with self._lock:
                self._write({**self._record, "beat": self._record["beat"] + 1})

    def _write(self, record: Record, *, durable: bool = False) -> None:
        if self._over.is_set():
            return
        # Neither a full disk nor a file server's hiccup may end training, or the heartbeat.
        with suppress(OSError):
            self._superseded = self._superseded or self._find_successor()
            if self._superseded:
                self._over.set()
                return
            write_json(self._path, record, durable=durable)
        self._record = record

    def _find_successor(self) -> bool:
        # Our own file is missed where somebody cleared the folder: then this is another's run.
        return _exists(self._next) or not _exists(self._path)


def latest(folder: Path) -> Record | None:
    """Return the record of the newest attempt, the holder if there is one.

    Raises:
        OSError: Where the folder is there and cannot be read.
    """
    numbers = _numbers(folder)
    return _read(folder, numbers[-1]) if numbers else None


def records(folder: Path) -> list[Record]:
    """Return the records of all attempts, the oldest first.

    Raises:
        OSError: Where the folder is there and cannot be read.
    """
    return [_read(folder, number) for number in _numbers(folder)]


def refuse_if_held(folder: Path, *, fresh: bool = False) -> None:
    """Refuse a run that is seen to be held, before anything of it is touched.

    Takes less than two seconds: a holder on another machine that shows no beat in this time is
    left for `Attempt.begin`. A run that is to be set aside has none, so it takes as long as that.

    Args:
        folder: The run's folder of attempts.
        fresh: Whether the run is to be set aside.

    Raises:
        RunDirError: Where another process holds the run, or the folder cannot be read.
    """
    try:
        watch_s = STALE_AFTER_S if fresh else SEEN_ALIVE_WITHIN_S
        record, held = _judge(folder, watch_s=watch_s)
    except OSError as error:
        raise RunDirError(
            f"cannot be read: {error.strerror}",
            where=str(folder),
            remedy="fix its permissions",
        ) from error
    if held:
        _refuse(folder, record)


def end_for(folder: Path, outcome: str, **facts: Any) -> None:
    """Note how the newest attempt ended, for a holder that is gone and could not say so itself.

    Args:
        folder: The run's folder of attempts.
        outcome: As in `Attempt.end`.
        facts: More for the record.
    """
    with suppress(OSError):  # a full disk is no reason to end otherwise
        record, held = _judge(folder, watch_s=0.0)
        if record is None or held:
            return
        _remove_leftovers(folder, before=record["attempt"] + 1)
        if "outcome" not in record:
            path = record_path(folder, record["attempt"])
            write_json(path, {**record, **facts, "outcome": outcome}, durable=True)


def record_path(folder: Path, number: int) -> Path:
    """Return the file of an attempt."""
    return folder / f"{number:08d}.json"


def write_json(path: Path, value: object, *, durable: bool = False) -> None:
    """Replace a private file of JSON as a whole; see `files.replace_file`."""
    replace_file(path, json.dumps(value) + "\n", durable=durable)


def _judge(folder: Path, *, watch_s: float) -> tuple[Record | None, bool]:
    """Return the newest record and whether its process is seen to hold the run."""
    first = record = latest(folder)
    # Looks are counted, not the time: one that hangs with its file server shows no missing beat.
    for look in range(1 + round(watch_s / LOOK_EVERY_S)):
        if look > 0:
            time.sleep(LOOK_EVERY_S)
            record = latest(folder)
        if record is None or "outcome" in record or is_requeue_of(record):
            return record, False
        alive = is_alive(record)
        if alive is not None:
            return record, alive
        if first is None or _shows_life(record, first):
            return record, True
    return record, False


def _shows_life(record: Record, before: Record) -> bool:
    if record["attempt"] != before["attempt"]:
        return True
    # A file that for once cannot be read has no beat, and is no sign of life.
    return record.get("beat") is not None and record["beat"] != before.get("beat")


def _refuse(folder: Path, record: Record | None) -> NoReturn:
    raise RunDirError(
        f"is in use by {_describe(record) if record else 'another process'}",
        where=str(folder.parent),
        remedy="wait for it, stop it, or choose another folder with --run-dir",
    )


def _describe(record: Record) -> str:
    name = f"attempt {record['attempt']}"
    if "pid" not in record:
        return name
    job = f" (Slurm job {record['slurm_job_id']})" if record.get("slurm_job_id") else ""
    return f"{name}, process {record['pid']} on host {record['host']}{job}"


def _remove_leftovers(folder: Path, *, before: int) -> None:
    """Remove what killed attempts were writing; the files of contenders bear our number."""
    for path in folder.glob(".*.json.*"):
        number = path.name[1:9]
        if number.isdecimal() and int(number) < before:
            with suppress(OSError):
                path.unlink()


def _numbers(folder: Path) -> list[int]:
    try:
        names = [entry.name for entry in folder.iterdir()]
    except FileNotFoundError:
        return []
    return sorted(int(name[:-5]) for name in names if re.fullmatch(r"\d{8,}\.json", name))


def _read(folder: Path, number: int) -> Record:
    with suppress(OSError, ValueError):
        record = json.loads(record_path(folder, number).read_text(encoding="utf-8"))
        if isinstance(record, dict) and record.get("attempt") == number:
            return record
    return {"attempt": number}


def _exists(path: Path) -> bool:
    """Whether a file is there; unlike `Path.exists`, an unreachable folder is no answer."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True
