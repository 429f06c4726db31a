"""Read from a run directory how its starts ended: what `restart_policy.decide` decides by.

A crash leaves an attempt without outcome; what its ranks could still say is in their notes, and
what a Slurm job decided is among the events of jobs.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from peft_dist.common import process_identity
from peft_dist.common.env import AFTER_JOB
from peft_dist.common.errors import EXIT_USER_ERROR
from peft_dist.run import job_events
from peft_dist.run.attempt_records import Record, latest, record_path, records, write_json
from peft_dist.run.directory import RecordedFailure, RunDir
from peft_dist.run.failure_files import WorkerFailure
from peft_dist.run.restart_policy import Ending, History, Kind

CrashNote = dict[str, Any]
"""What a rank notes before it ends: `rank`, `kind`, `step`, `error`."""

CAUSE_FIRST = (Kind.OUT_OF_MEMORY, Kind.HUNG, Kind.CRASHED, Kind.LOST_PEER)
"""Which of several ranks' notes says how an attempt ended: the others follow from it."""


def is_superseded(attempts: Path) -> bool:
    """Whether another start has taken over the run that this job, or this machine, had.

    Args:
        attempts: The run's records of attempts.
    """
    own = process_identity.slurm_job()
    of_ours = [own.items() <= record.items() for record in records(attempts)]
    return any(of_ours) and not of_ours[-1]


def note_crash(
    folder: Path,
    attempt: int,
    *,
    rank: int,
    kind: Kind,
    step: int | None,
    error: str,
    place: str = "",
) -> bool:
    """Note why a rank ends; return False where the disk does not take it.

    Nobody may write about an attempt that another one has taken over from.

    Args:
        folder: The run's folder of attempts.
        attempt: Which attempt the rank belongs to.
        rank: Which rank ends.
        kind: How.
        step: The optimizer step it was at, where it had begun any.
        error: What happened; folded into one line. Of a stop, the signal's name.
        place: The line of code that raised what will be raised again.
    """
    if record_path(folder, attempt + 1).exists():
        return False
    line = " ".join(error.split())
    note = {"rank": rank, "kind": kind, "step": step, "error": line, "place": place}
    try:
        write_json(record_path(folder, attempt).with_name(f"{attempt:08d}-rank-{rank}.json"), note)
    except OSError:
        return False
    return True


def crash_notes(folder: Path, attempt: int) -> list[CrashNote]:
    """Return what the ranks of an attempt noted before they ended, by rank."""
    notes = []
    for path in folder.glob(f"{attempt:08d}-rank-*.json"):
        with suppress(OSError, ValueError):
            note = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(note, dict) and {"rank", "kind", "step", "error"} <= note.keys():
                notes.append(note)
    return sorted(notes, key=lambda note: int(note["rank"]))


def read_history(run: RunDir, *, before: int | None = None) -> History:
    """Return how the starts of a run ended since a person last started it.

    Args:
        run: The run.
        before: The present attempt, which is left out with all that follow it.

    Raises:
        OSError: Where the folder of attempts cannot be read.
        RunDirError: Where the events of jobs cannot be read.
    """
    attempts = records(run.attempts)
    by_person = [place for place, record in enumerate(attempts) if record.get("counts_from")]
    attempts = [
        record
        for record in attempts[by_person[-1] if by_person else 0 :]
        if before is None or record["attempt"] < before
    ]
    starts: dict[tuple[str, Any], Ending] = {}
    job_starts = 0
    for event in job_events.events(run.path):
        if event["event"] == "submitted":
            starts, job_starts = {}, 0
        elif event["event"] == "started":
            job_starts += 1
        elif event["event"] == "decided":
            start = (event["job"], event.get("restart"))
            starts[start] = _ending_of_start(event)  # the last word on a start is the one
    return History(
        checkpoint=run.newest_step(),
        attempts=tuple(_ending_of_attempt(run.attempts, record) for record in attempts),
        starts=tuple(starts.values()),
        job_starts=job_starts,
    )


def ending_of_run(run: RunDir) -> Ending | None:
    """Return what a run has come to as its directory shows it; None where its end is not known."""
    if run.is_finished:
        return Ending(Kind.DONE)
    failure = run.read_failure()
    if failure is not None:
        return Ending(_kind_of_failure(failure.exit_code), failure.error)
    return _newest_stop(run)


class LaunchMark(NamedTuple):
    """What a run directory shows before a launch, and what therefore says nothing of it."""

    failure: RecordedFailure | None
    attempt: int
    """The newest attempt; 0 where there was none."""


def mark_launch(run: RunDir) -> LaunchMark:
    """Return what a run directory shows just before its processes are launched."""
    newest = latest(run.attempts)
    return LaunchMark(run.read_failure(), 0 if newest is None else newest["attempt"])


def ending_of_launch(
    run: RunDir,
    *,
    before: LaunchMark,
    signal: str | None,
    failure: WorkerFailure | None,
    otherwise: Ending,
) -> Ending:
    """Return how the processes of a run ended that a launcher of this machine started.

    Args:
        run: The run.
        before: What `mark_launch` returned before the launch.
        signal: The signal that the launcher was asked to stop with, or None.
        failure: What one of its processes wrote before it ended, if one did.
        otherwise: How it ended where nothing else is known.
    """
    if run.is_finished:
        return Ending(Kind.DONE)
    recorded = run.read_failure()
    if recorded is not None and recorded != before.failure:
        return Ending(_kind_of_failure(recorded.exit_code), recorded.error)
    if signal is not None:
        return Ending(Kind.INTERRUPTED, f"stopped by {signal}", signal)
    stop = _newest_stop(run, after=before.attempt)
    if stop is not None:
        return stop
    if failure is not None:
        return Ending(_kind_of_failure(failure.exit_code), failure.error)
    return otherwise


def is_machine_start() -> bool:
    """Whether Slurm starts the job again: of itself, as a successor, or because a user asked."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0" or AFTER_JOB in os.environ


def was_interrupted(folder: Path, record: Record) -> bool:
    """Whether a signal ended an attempt: by its own record, or by its ranks' while they loaded.

    Where a rank has crashed, a launcher sends SIGTERM to the others. The one that crashed has
    noted no signal, so SIGTERM counts only where every rank has had it, or has lost a peer that
    had.

    Args:
        folder: The run's folder of attempts.
        record: The attempt's.
    """
    if "outcome" in record:
        return bool(record["outcome"] == "interrupted")
    notes = crash_notes(folder, record["attempt"])
    signals = [note["error"] for note in notes if note["kind"] == Kind.INTERRUPTED]
    followed = [note for note in notes if note["kind"] in (Kind.INTERRUPTED, Kind.LOST_PEER)]
    return any(name != "SIGTERM" for name in signals) or (
        bool(signals) and len(followed) == record.get("world_size")
    )


def _newest_stop(run: RunDir, *, after: int = 0) -> Ending | None:
    """Return how the newest attempt after a certain one ended, where a signal ended it."""
    newest = latest(run.attempts)
    if newest is None or newest["attempt"] <= after:
        return None
    ending = _ending_of_attempt(run.attempts, newest)
    return ending if ending.kind is Kind.INTERRUPTED else None


def _ending_of_attempt(folder: Path, record: Record) -> Ending:
    began_at = record.get("from_step")
    if record.get("outcome") == "done":
        return Ending(Kind.DONE, began_at=began_at)
    if was_interrupted(folder, record):
        signal = record.get("signal")
        return Ending(
            Kind.INTERRUPTED, f"stopped by {signal or 'a signal'}", signal, began_at=began_at
        )
    notes = [note for note in crash_notes(folder, record["attempt"]) if note["kind"] in CAUSE_FIRST]
    if not notes:
        return Ending(Kind.CRASHED, str(record.get("error", "")), began_at=began_at)
    note = min(notes, key=lambda note: (CAUSE_FIRST.index(note["kind"]), note["step"] is None))
    kind, step = Kind(note["kind"]), note["step"]
    if kind is Kind.OUT_OF_MEMORY and step is None:  # no place to compare with another one
        kind = Kind.CRASHED
    return Ending(
        kind,
        note["error"],
        rank=note["rank"],
        step=step,
        place=str(note.get("place", "")),
        began_at=began_at,
    )


def _ending_of_start(event: job_events.Event) -> Ending:
    kind = Kind.CRASHED
    with suppress(ValueError):  # of another version
        kind = Kind(event.get("kind", ""))
    error = str(event.get("error", event.get("reason", "")))
    return Ending(kind, error, checkpoint=event.get("step"))


def _kind_of_failure(exit_code: int) -> Kind:
    return Kind.USER_ERROR if exit_code == EXIT_USER_ERROR else Kind.TRAINING_FAILED
