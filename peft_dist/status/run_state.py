"""What can be said of one run: its state, how far it has come, and what is wrong with it.

A run's directory proves how it ended; of a job that may still come to something, Slurm knows more.
Asks Slurm nothing itself, and writes nothing.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft_dist.common.errors import RunDirError
from peft_dist.common.process_identity import is_alive
from peft_dist.common.server_clock import ahead_s
from peft_dist.ledger.goodput import LedgerGap
from peft_dist.run.attempt_records import Record, record_path, records
from peft_dist.run.directory import RunDir
from peft_dist.run.history import crash_notes
from peft_dist.run.job_events import Event, candidates, events, newest_logs, others
from peft_dist.run.lease import STALE_AFTER_S
from peft_dist.run.restart_policy import Kind
from peft_dist.slurm.job_state import UNKNOWN, JobState, is_live, is_over
from peft_dist.slurm.pending import reason_in_words
from peft_dist.status.gpu_hours import gpu_hours
from peft_dist.status.progress import RunProgress, read_progress

DONE = "COMPLETED"
"""The run has trained to its end, and its result proves it."""
NOT_STARTED = "NEW"
INTERRUPTED = "INTERRUPTED"
"""A run without a job was asked to stop, and saved."""
CRASHED = "CRASHED"
"""The process that held a run without a job is gone, and has not said why."""
ENDED = "ENDED"
"""Its job ended well, as Slurm sees it, and left no result."""
WAITING = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED"})
"""Live states in which nothing of the run is at work."""


@dataclass(frozen=True)
class RunView:
    """One row of the table; None is not known, an empty text is nothing."""

    run: str
    path: str
    job: str
    state: str
    """Slurm's word, or one of ours."""
    reason: str
    nodes: str
    attempt: int
    """Attempts to train so far, the present one included."""
    step: int | None
    steps: int | None
    loss: float | None
    tokens_per_s: float | None
    """Of its last step; None where nothing is at work."""
    eta_s: float | None
    heartbeat_s: float | None
    """Age of the last sign of life."""
    cause: str
    """What is wrong, in one line."""
    gap: str = ""
    """Which steps the ledger lacks, in one line."""
    start: str = ""
    """When a job that waits is expected to start, on Slurm's clock."""
    waits: str = ""
    """Of a job that waits: its expected start, its place and why, in words."""
    gpu_hours: float | None = None
    """What its jobs have had so far; None for a run without, or of an older version."""


@dataclass(frozen=True)
class Reading:
    """What a run directory says, before Slurm is asked."""

    run: RunDir
    history: list[Event]
    record: Record | None
    """Of the newest attempt."""
    progress: RunProgress
    jobs: Sequence[str]
    """Those that may be live, as `jobs.candidates` returns them."""
    problem: str = ""
    """Why the directory could not be read."""
    gap: str = ""
    """Which steps the ledger lacks, as the attempts have found it."""

    def job(self, answers: Mapping[str, JobState]) -> JobState | None:
        """Return the job that is or was at work, of those whose state is known."""
        known = [answers[job] for job in self.jobs if job in answers]
        return next((job for job in known if is_live(job.state)), known[0] if known else None)


def read_run(path: Path) -> Reading:
    """Read a run's directory; what cannot be read is said in `problem`."""
    run = RunDir(path)
    try:
        history, attempts = events(path), records(run.attempts)
    except (RunDirError, OSError) as error:
        return Reading(run, [], None, RunProgress(), [], problem=str(error))
    record = attempts[-1] if attempts else None
    own = (record or {}).get("slurm_job_id")
    jobs = [*candidates(path, history), *others(path)] or ([str(own)] if own else [])
    found = read_progress(run.ledger)
    # The ledger's end may lie long after its start.
    known = [attempt["steps"] for attempt in attempts if type(attempt.get("steps")) is int]
    steps = known[-1] if known else found.steps
    progress = replace(found, steps=steps)
    return Reading(run, history, record, progress, jobs, gap=_gaps(attempts))


def view(
    reading: Reading,
    answers: Mapping[str, JobState],
    *,
    name: str,
    now: float,
    ahead: Mapping[str, int] | None = None,
) -> RunView:
    """Put together what the directory and Slurm say of a run.

    Args:
        reading: What `read_run` returned.
        answers: What Slurm says of jobs; of `reading.jobs` only where it was asked.
        name: What to call the run.
        now: Unix time.
        ahead: How many jobs come before each that waits, where that was asked.
    """
    job, heartbeat_s = reading.job(answers), _heartbeat_s(reading, now)
    state, reason = _state(reading, job, heartbeat_s)
    cause = _cause(reading, state)
    if state == UNKNOWN and not cause:
        reason, cause = "", reason
    elif is_over(state) and cause:
        reason = ""
    found, record = reading.progress, reading.record or {}
    return RunView(
        run=name,
        path=str(reading.run.path),
        job=job.job if job else next(iter(reading.jobs), ""),
        state=state,
        reason=reason,
        nodes=_nodes(reading, job, state),
        attempt=record.get("attempt", 0),
        step=found.step,
        steps=found.steps,
        loss=found.loss,
        tokens_per_s=found.tokens_per_s if state == "RUNNING" else None,
        eta_s=_left_s(found) if state == "RUNNING" else None,
        heartbeat_s=heartbeat_s,
        cause=cause,
        gap=reading.gap,
        start=job.start if job and state in WAITING else "",
        waits=_waits(job, (ahead or {}).get(job.job)) if job and state in WAITING else "",
        gpu_hours=gpu_hours(reading.history, now, is_at_work=is_at_work(state)),
    )


def _waits(job: JobState, ahead: int | None) -> str:
    """Return when a job that waits is expected to start, its place in the queue, and why."""
    parts = [f"expected to start {job.start.replace('T', ' ')}"] if job.start else []
    if ahead is not None and job.reason in ("Priority", "Resources"):
        parts.append(f"{ahead} job{'s' * (ahead != 1)} ahead of it")
    words = reason_in_words(job.reason)
    return "; ".join([*parts, *([words] if words not in ("", job.reason) else [])])


def result_of(run: RunDir) -> dict[str, Any] | None:
    """Return the result of a run that has finished."""
    with suppress(OSError, ValueError):
        result = json.loads(run.result.read_text(encoding="utf-8"))
        if isinstance(result, dict):
            return result
    return None


def is_at_work(state: str) -> bool:
    """Whether a run in this state has processes that train, or is about to end them."""
    return is_live(state) and state not in WAITING


def has_failed(state: str) -> bool:
    """Whether a run in this state ended otherwise than it should, or than somebody told it."""
    asked_for = (DONE, "CANCELLED", "PREEMPTED")
    return state in (CRASHED, ENDED) or (is_over(state) and state not in asked_for)


def _state(reading: Reading, job: JobState | None, heartbeat_s: float | None) -> tuple[str, str]:
    run = reading.run
    if reading.problem:
        return UNKNOWN, ""
    if run.is_finished:
        return DONE, ""
    if job is not None and is_live(job.state):
        return job.state, job.reason
    if job is None:
        return _state_alone(reading, heartbeat_s)
    if is_over(job.state):
        if _went_on_here(reading.record):
            return "RUNNING", ""
        if (run.path / "slurm" / "cancelled").exists():
            return "CANCELLED", ""
        if job.state == DONE:
            return ENDED, "no result"
        # Why it waited, once, is still there.
        return job.state, "" if job.state == "CANCELLED" else job.reason
    newest = reading.history[-1] if reading.history else {}
    if newest.get("event") == "ended" and newest.get("decision") in ("stop", "cancelled"):
        return ("FAILED" if newest["decision"] == "stop" else "CANCELLED"), ""
    if run.failure.exists():
        return "FAILED", ""
    return "RUNNING" if _shows_life(reading.record, heartbeat_s) else UNKNOWN, job.reason


def _state_alone(reading: Reading, heartbeat_s: float | None) -> tuple[str, str]:
    """Return state and reason as the directory alone shows them."""
    record = reading.record
    if _shows_life(record, heartbeat_s):
        return "RUNNING", ""
    if reading.run.failure.exists():
        return "FAILED", ""
    if record is None:
        return NOT_STARTED, ""
    outcome = record.get("outcome")
    if outcome == "interrupted":
        return INTERRUPTED, str(record.get("signal", ""))
    if outcome is not None:
        return "FAILED", ""
    if _is_alive(record) is None:
        return UNKNOWN, f"no heartbeat from {record.get('host', 'its host')}"
    return CRASHED, ""


def _shows_life(record: Record | None, heartbeat_s: float | None) -> bool:
    """Whether an attempt holds the run; for one elsewhere its last heartbeat tells."""
    if record is None or "outcome" in record:
        return False
    alive = _is_alive(record)
    if alive is None:
        return heartbeat_s is not None and heartbeat_s < STALE_AFTER_S
    return alive


def _is_alive(record: Record) -> bool | None:
    return is_alive(record) if "pid" in record else None


def _went_on_here(record: Record | None) -> bool:
    """Whether somebody trains the run on this machine, after its job."""
    if record is None or "outcome" in record or record.get("slurm_job_id") is not None:
        return False
    return _is_alive(record) is True


def _left_s(found: RunProgress) -> float | None:
    if found.step is None or found.steps is None or found.step_s is None:
        return None
    return max(0, found.steps - found.step) * found.step_s


def _nodes(reading: Reading, job: JobState | None, state: str) -> str:
    if job is not None and job.nodes:
        return job.nodes
    if state in WAITING or state == NOT_STARTED:
        return ""
    started = [event for event in reading.history if event["event"] == "started"]
    if started:
        return str(started[-1].get("nodes", ""))
    return str((reading.record or {}).get("host", ""))


def _heartbeat_s(reading: Reading, now: float) -> float | None:
    if reading.record is None:
        return None
    path = record_path(reading.run.attempts, reading.record["attempt"])
    with suppress(OSError):
        # As the file server's clock has it: this machine's may be another's minutes ahead.
        age_s = now + ahead_s(reading.run.path) - path.stat().st_mtime
        return max(0.0, age_s)
    return None


def _cause(reading: Reading, state: str) -> str:
    if reading.problem:
        return reading.problem
    if state in (DONE, NOT_STARTED) or is_at_work(state):
        return ""
    failure = reading.run.read_failure()
    if failure is not None and state not in WAITING:
        return failure.error
    if state == INTERRUPTED:
        return str((reading.record or {}).get("error", ""))
    return _decision(reading) or ("" if state in WAITING else _crash(reading))


def _gaps(attempts: Sequence[Record]) -> str:
    """Return which steps the ledger lacks; those that were done again since are there."""
    found: list[LedgerGap] = []
    for record in attempts:
        if type(begun := record.get("from_step")) is int:
            found = [
                LedgerGap(gap.from_step, min(gap.to_step, begun))
                for gap in found
                if gap.from_step <= begun
            ]
        match record.get("ledger_gap"):
            case [int(first), int(last)]:
                found.append(LedgerGap(first, last))
    return "; ".join(map(str, found))


def _decision(reading: Reading) -> str:
    """Return why the last start of the job came to its end, unless it is told of an earlier one."""
    newest = reading.history[-1] if reading.history else {}
    by_person = newest.get("event") == "submitted" and newest.get("by") in ("submit", "resume")
    if by_person or newest.get("event") == "started":
        return ""
    logs = newest_logs(reading.run.path, reading.history)
    with suppress(OSError):
        text = "" if logs is None else (logs / "decision").read_text(errors="replace")
        word, _, reason = " ".join(text.split()).partition(" ")
        if word == "again-without":
            nodes, _, reason = reason.partition(" ")
            return f"goes on without {nodes}: {reason}"
        return reason
    return ""


def _crash(reading: Reading) -> str:
    """Return what a rank of the newest attempt said before it ended."""
    record = reading.record or {}
    if record.get("outcome") in ("done", "interrupted"):
        return ""
    notes = crash_notes(reading.run.attempts, record.get("attempt", 0))
    # Who lost a peer says nothing of why that one ended.
    own = [note for note in notes if note["kind"] != Kind.LOST_PEER] or notes
    return f"rank {own[0]['rank']}: {own[0]['error']}" if own else ""
