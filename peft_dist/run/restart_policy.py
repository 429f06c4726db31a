"""Whether starting a run again can help: what its attempts before say of their ends.

A crash leaves an attempt without outcome; what ranks could still say is in their notes. Holds no
lease and ends nothing.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from peft_dist.common.process_identity import is_this_process
from peft_dist.run.lease import Record, record_path, records, write_json

ATTEMPTS_WITHOUT_PROGRESS = 3
"""So many attempts in a row that reach no new checkpoint are a crash loop."""
ATTEMPTS_OUT_OF_MEMORY = 2
"""So many attempts in a row that run out of memory at one step are a crash loop."""

LOST_PEER = "lost peer"
"""The kind of a crash that only follows from another rank's."""

STOPPED = "stopped"
"""The kind of an end that a signal asked for while the rank set itself up; the error names it."""

CrashNote = dict[str, Any]
"""What a rank said before it ended: `rank`, `kind`, `step`, `error`."""


def note_crash(
    folder: Path, attempt: int, *, rank: int, kind: str, step: int | None, error: str
) -> bool:
    """Leave word of why a rank ends; return False where the disk does not take it.

    Of an attempt that another has taken over, nobody may write any more.

    Args:
        folder: The run's folder of attempts.
        attempt: Which attempt the rank belongs to.
        rank: Which rank ends.
        kind: The class of the crash: `oom`, `hang`, `lost peer`, ...
        step: The optimizer step it was at, where it had begun any.
        error: What happened; folded into one line.
    """
    if record_path(folder, attempt + 1).exists():
        return False
    note = {"rank": rank, "kind": kind, "step": step, "error": " ".join(error.split())}
    try:
        write_json(record_path(folder, attempt).with_name(f"{attempt:08d}-rank-{rank}.json"), note)
    except OSError:
        return False
    return True


def crash_notes(folder: Path, attempt: int) -> list[CrashNote]:
    """Return what the ranks of an attempt said before they crashed, by rank."""
    notes = []
    for path in folder.glob(f"{attempt:08d}-rank-*.json"):
        with suppress(OSError, ValueError):
            note = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(note, dict) and {"rank", "kind", "step", "error"} <= note.keys():
                notes.append(note)
    return sorted(notes, key=lambda note: int(note["rank"]))


def was_stopped(folder: Path, record: Record) -> bool:
    """Say whether an attempt was told to stop: by its own word, or by its ranks' while they loaded.

    Where a rank has crashed, a launcher sends SIGTERM to the others. The one that crashed has left
    no word of a signal, so that of SIGTERM counts only where every rank has had it, or has lost
    one that had.

    Args:
        folder: The run's folder of attempts.
        record: The attempt's.
    """
    if "outcome" in record:
        return bool(record["outcome"] == "interrupted")
    notes = crash_notes(folder, record["attempt"])
    signals = [note["error"] for note in notes if note["kind"] == STOPPED]
    followed = [note for note in notes if note["kind"] in (STOPPED, LOST_PEER)]
    return any(name != "SIGTERM" for name in signals) or (
        bool(signals) and len(followed) == record.get("world_size")
    )


def verdict(folder: Path, step: int) -> str | None:
    """Return in one line why starting again cannot help, or None where it may.

    To be asked by the process that holds the run; its own attempt does not count.

    Args:
        folder: The run's folder of attempts.
        step: The step the run would go on from.

    Raises:
        OSError: Where the folder cannot be read.
    """
    row = _crashes_in_a_row(folder)
    return _out_of_memory(folder, row) or _no_progress(folder, row, step)


def out_of_memory_again(folder: Path) -> str | None:
    """Return in one line why starting again cannot help, or None where it may.

    To be asked by a process that ends for want of memory and has noted it; its attempt counts.

    Args:
        folder: The run's folder of attempts.

    Raises:
        OSError: Where the folder cannot be read.
    """
    return _out_of_memory(folder, _crashes_in_a_row(folder, with_ours=True))


def _crashes_in_a_row(folder: Path, *, with_ours: bool = False) -> list[Record]:
    """Return the attempts that crashed one after another, the newest first."""
    row = []
    for record in reversed(records(folder)):
        if record.get("outcome") == "done" or was_stopped(folder, record):
            break
        if with_ours or "outcome" in record or not is_this_process(record):
            row.append(record)
        if record.get("counts_from"):
            break
    return row


def _out_of_memory(folder: Path, row: Sequence[Record]) -> str | None:
    if len(row) < ATTEMPTS_OUT_OF_MEMORY:
        return None
    last, *before = (
        {
            note["step"]: note
            for note in reversed(crash_notes(folder, record["attempt"]))
            if note["kind"] == "oom" and note["step"] is not None
        }
        for record in row[:ATTEMPTS_OUT_OF_MEMORY]
    )
    for step, note in last.items():
        if all(step in notes for notes in before):
            return (
                f"out of memory at step {step} in {ATTEMPTS_OUT_OF_MEMORY} attempts"
                f" (rank {note['rank']}: {note['error']})"
            )
    return None


def _no_progress(folder: Path, row: Sequence[Record], step: int) -> str | None:
    last = row[:ATTEMPTS_WITHOUT_PROGRESS]
    # An attempt that crashed before it knew where to go on has got no further either.
    if len(last) < ATTEMPTS_WITHOUT_PROGRESS or any(
        record.get("from_step", step) != step for record in last
    ):
        return None
    line = (
        f"no progress in {ATTEMPTS_WITHOUT_PROGRESS} attempts: each began at step {step}"
        " and ended before another checkpoint"
    )
    for record in last:
        # Who lost a peer says nothing of why that one ended.
        notes = crash_notes(folder, record["attempt"])
        for note in sorted(notes, key=lambda note: bool(note["kind"] == LOST_PEER)):
            return f"{line}; last: {note['error']} (rank {note['rank']})"
    return line
