"""What happened to a run, in order: starts, ends, mishaps; steps are not told one by one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

from peft_dist.report.run_data import Run
from peft_dist.report.series import number
from peft_dist.report.text import duration, some

UNTOLD = {"cut off": ("bad", "cut off"), "unfinished": ("notice", "last heard of")}
"""Outcomes of attempts that did not tell one, with kind and words."""
LAST_TIME_S = datetime(9999, 12, 31, tzinfo=UTC).timestamp()
MOST_SHOWN = 200
"""Happenings on a page; of more, the first and the last are shown."""


@dataclass(frozen=True)
class Happening:
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


def happenings(runs: Sequence[Run]) -> tuple[list[Happening], int]:
    """Return what happened to the runs, one after the other, and how much is left out of it."""
    found = [happening for run in runs for happening in of_run(run)]
    left_out = len(found) - MOST_SHOWN
    if left_out <= 0:
        return found, 0
    half = MOST_SHOWN // 2
    return [*found[:half], *found[-half:]], left_out


def of_run(run: Run) -> list[Happening]:
    """Return what happened to a run."""
    found: list[Happening] = []
    begun = _begun(run)
    outcomes = {span.attempt: span.outcome for span in run.goodput.attempts}
    for attempt, group in groupby(run.records, key=lambda record: int(record["attempt"])):
        own = list(group)
        for record in own:
            told = _told(run, record)
            if told is not None:
                found.append(_happening(run, record, begun, *told))
        if outcomes[attempt] in UNTOLD:  # nobody could write how it ended
            kind, words = UNTOLD[outcomes[attempt]]
            detail = run.crashes.get(attempt, "")
            found.append(_happening(run, own[-1], begun, kind, words, detail))
    if run.failure and run.records:
        last = run.records[-1]
        found.append(_happening(run, last, begun, "bad", "will not go on", run.failure))
    return found


def _told(run: Run, record: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """Return kind, words and detail of a record that is worth a line."""
    match record["event"]:
        case "start":
            first = record is run.events("start")[0]
            return "plain", "started" if first else "went on", _start_detail(record)
        case "end":
            outcome = str(record.get("outcome", "ended"))
            kind = {"done": "good", "interrupted": "notice"}.get(outcome, "bad")
            words = {"done": "finished", "interrupted": "interrupted, and saved"}
            return kind, words.get(outcome, outcome), run.crashes.get(record["attempt"], "")
        case "skipped":
            return "notice", "step skipped", str(record.get("reason", ""))
        case "rollback":
            back = f"back to step {record.get('back_to')}: {record.get('reason', '')}"
            return "notice", "rolled back", back
        case "save_failed":
            return "bad", "checkpoint not written", str(record.get("reason", ""))
    return None


def _start_detail(record: Mapping[str, Any]) -> str:
    ranks, strategy = number(record.get("world_size")), record.get("strategy")
    hosts = record.get("hosts")
    names = [str(host) for host in hosts] if isinstance(hosts, list) else []
    job, restarts = record.get("slurm_job_id"), number(record.get("slurm_restart_count"))
    parts = [
        ("1 process" if ranks == 1 else f"{ranks:.0f} processes") if ranks else "",
        str(strategy or ""),
        f"on {', '.join(list(dict.fromkeys(names))[:8])}" if names else "",
        f"Slurm job {job}" if job else "",
        some("requeue", int(restarts)) if restarts else "",
    ]
    return ", ".join(part for part in parts if part)


def _begun(run: Run) -> float:
    first = run.records[0] if run.records else {"time": 0.0, "at_s": 0.0}
    return float(first["time"] - first["at_s"])


def _happening(
    run: Run, record: Mapping[str, Any], begun: float, kind: str, what: str, detail: str
) -> Happening:
    when = datetime.fromtimestamp(min(record["time"], LAST_TIME_S), UTC)
    return Happening(
        run=run.name,
        time=f"{when:%Y-%m-%d %H:%M:%S}",
        since=duration(max(0.0, record["time"] - begun)),
        attempt=record["attempt"],
        step=record["step"],
        kind=kind,
        what=what,
        detail=detail,
    )
