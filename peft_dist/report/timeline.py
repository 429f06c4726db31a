"""The timeline of a run: its starts, its ends and what went wrong; single steps are left out."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby

from peft_dist.ledger import events
from peft_dist.ledger.goodput import LedgerGap
from peft_dist.report.run_data import RunData
from peft_dist.report.text import duration, some

NO_END = {"cut off": ("bad", "cut off"), "unfinished": ("notice", "last heard of")}
"""Outcomes of attempts without an `end` event, with kind and words."""
LAST_TIME_S = datetime(9999, 12, 31, tzinfo=UTC).timestamp()
MOST_SHOWN = 200
"""Entries on a page; of more, the first and the last are shown."""


@dataclass(frozen=True)
class TimelineEntry:
    """One line of the table."""

    run: str
    time: str
    """In UTC."""
    since: str
    """Time since the run began."""
    attempt: int
    step: int
    kind: str
    """`plain`, `good`, `notice` or `bad`; never shown by colour alone."""
    what: str
    detail: str = ""


def timeline(runs: Sequence[RunData]) -> tuple[list[TimelineEntry], int]:
    """Return the entries of the runs, one run after the other, and how many are left out."""
    found = [entry for run in runs for entry in timeline_of(run)]
    left_out = len(found) - MOST_SHOWN
    if left_out <= 0:
        return found, 0
    half = MOST_SHOWN // 2
    return [*found[:half], *found[-half:]], left_out


def timeline_of(run: RunData) -> list[TimelineEntry]:
    """Return all entries of a run."""
    found: list[TimelineEntry] = []
    outcomes = {span.attempt: span.outcome for span in run.goodput.attempts}
    for attempt, group in groupby(run.events, key=lambda event: event.attempt):
        own = list(group)
        for event in own:
            described = _described(run, event)
            if described is not None:
                found.append(_entry(run, event, *described))
        if outcomes[attempt] in NO_END:
            kind, words = NO_END[outcomes[attempt]]
            found.append(_entry(run, own[-1], kind, words, run.crashes.get(attempt, "")))
    if run.failure and run.events:
        found.append(_entry(run, run.events[-1], "bad", "will not go on", run.failure))
    return found


def _described(run: RunData, event: events.LedgerEvent) -> tuple[str, str, str] | None:
    """Return kind, words and detail of an event that is worth a line."""
    match event:
        case events.StartEvent():
            words = "started" if event is run.starts[0] else "went on"
            return "plain", words, _start_detail(event)
        case events.EndEvent():
            kind = {"done": "good", "interrupted": "notice"}.get(event.outcome, "bad")
            words = {"done": "finished", "interrupted": "interrupted, and saved"}.get(
                event.outcome, event.outcome
            )
            return kind, words, run.crashes.get(event.attempt, "")
        case events.SkippedEvent():
            return "notice", "step skipped", event.reason
        case events.RollbackEvent():
            detail = f"back to step {event.last_step}: {event.reason}"
            return "notice", "rolled back", detail
        case events.GapEvent():
            return "notice", "gap", str(LedgerGap(event.from_step, event.to_step))
        case events.SaveFailedEvent():
            return "bad", "checkpoint not written", event.reason
    return None


def _start_detail(start: events.StartEvent) -> str:
    ranks, hosts = start.world_size, list(dict.fromkeys(start.hosts or []))
    parts = [
        ("1 process" if ranks == 1 else f"{ranks} processes") if ranks else "",
        start.strategy or "",
        f"on {', '.join(hosts[:8])}" if hosts else "",
        f"Slurm job {start.slurm_job_id}" if start.slurm_job_id else "",
        some("requeue", start.slurm_restart_count) if start.slurm_restart_count else "",
    ]
    return ", ".join(part for part in parts if part)


def _entry(
    run: RunData, event: events.LedgerEvent, kind: str, what: str, detail: str
) -> TimelineEntry:
    begun = run.events[0].time - run.events[0].at_s
    when = datetime.fromtimestamp(min(event.time, LAST_TIME_S), UTC)
    return TimelineEntry(
        run=run.name,
        time=f"{when:%Y-%m-%d %H:%M:%S}",
        since=duration(max(0.0, event.time - begun)),
        attempt=event.attempt,
        step=event.step,
        kind=kind,
        what=what,
        detail=detail,
    )
