"""Where the wall-clock time of a run went, from its ledger: which share of it trained the adapter.

Reads files and does sums; measures nothing. Within an attempt it trusts the monotonic `at_s`
alone; between attempts the wall clock.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from peft_dist.common.errors import RunDirError

Record = dict[str, Any]

PHASES = {
    "startup": "launcher, imports",
    "load": "rows, base, checkpoint",
    "step": "training that counts",
    "evaluation": "held-out rows",
    "checkpoint": "waiting for saves",
    "lost_work": "done again or thrown away",
    "down": "between attempts",
    "other": "the rest",
}
"""Every phase that time is put in, and what it is."""
CLOSING = {
    "step": "step",
    "evaluation": "evaluation",
    "checkpoint": "checkpoint",
    "skipped": "lost_work",
    "rollback": "lost_work",
    "end": "other",
}
"""Events that end an interval, which began with the last such event, and the phase it was.

`start` divides its interval by its own figures. Others, such as `saved` of the thread that writes
checkpoints, come in the midst of one.
"""
BAR_WIDTH = 20
SHOWN_ATTEMPTS = 10
"""Attempts that fit one screen; JSON has them all."""


@dataclass(frozen=True)
class AttemptSpan:
    """One start of the run."""

    attempt: int
    from_step: int
    """Steps that were already done when it began."""
    to_step: int
    """The last step it did."""
    outcome: str
    """As it said itself at its end; `cut off` where it could not, `unfinished` for the last one."""
    wall_s: float


@dataclass(frozen=True)
class Goodput:
    """Seconds of every phase, which sum to the run's total, and its attempts in order."""

    seconds: dict[str, float]
    attempts: list[AttemptSpan]

    @property
    def total_s(self) -> float:
        """All the time from the launch to the last record."""
        return math.fsum(self.seconds.values())

    @property
    def fraction(self) -> float:
        """The share of the time that went into steps that count."""
        return self.seconds["step"] / self.total_s if self.total_s else 0.0

    def to_json(self) -> str:
        """Return every figure, for programs."""
        figures = {
            "goodput": self.fraction,
            "total_s": self.total_s,
            "phases_s": self.seconds,
            "attempts": [asdict(span) for span in self.attempts],
        }
        return json.dumps(figures, indent=2)


def read_ledger(path: Path) -> list[Record]:
    """Return the records of a ledger; a last line without its end is left out.

    Raises:
        RunDirError: Where the file cannot be read, or a line is no record; it names the line.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RunDirError(
            f"cannot be read: {error.strerror or error}",
            where=str(path),
            remedy="name the folder of a run that has begun to train",
        ) from error
    whole = enumerate(lines[:-1], start=1)
    return [parse_record(line, where=f"{path}:{number}") for number, line in whole]


def parse_record(line: bytes, *, where: str) -> Record:
    """Return the record that a line of a ledger holds.

    Args:
        line: The line, without its end.
        where: Which line of which file this is, for the error.

    Raises:
        RunDirError: Where it is no record.
    """
    try:
        record: Record = json.loads(line)
        _check(record)
    except ValueError as error:
        raise RunDirError(
            f"{line[:60].decode(errors='replace')!r} is no record: {error}",
            where=where,
            remedy="remove this line",
        ) from error
    return record


def _check(record: Any) -> None:
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    if not isinstance(record.get("event"), str):
        raise ValueError("`event` must be a text")
    for name in ("step", "attempt", "back_to"):
        if type(record.get(name, 0 if name == "back_to" else None)) is not int:
            raise ValueError(f"`{name}` must be a whole number")
    for name in ("time", "at_s", "startup_s", "load_s", "launched"):
        value: Any = record.get(name, None if name in ("time", "at_s") else 0)
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise ValueError(f"`{name}` must be seconds, 0 or more")


def final_steps(records: Iterable[Record]) -> list[Record]:
    """Return the `step` records that made the adapter, in order: each step once, as last done."""
    counting = counting_records(current_records(records))
    return [record for record in counting if record["event"] == "step"]


def goodput(records: Iterable[Record], *, now: float | None = None) -> Goodput:
    """Divide the time of a run into phases.

    Args:
        records: What `read_ledger` returns.
        now: Unix time up to which to count, as `down`; by default up to the last record.
    """
    current = current_records(records)
    counting = {id(record) for record in counting_records(current)}
    attempts = [list(group) for _, group in groupby(current, key=lambda record: record["attempt"])]
    seconds = dict.fromkeys(PHASES, 0.0)
    spans = []
    ended = -math.inf  # unix time of the last record
    for index, own in enumerate(attempts):
        launching = _launching(own[0], ended)
        if index > 0:
            seconds["down"] += max(0.0, _process_start(own[0]) - launching - ended)
        seconds["startup"] += launching
        own_s = _add_phases(own, counting, seconds)
        cut = "unfinished" if index == len(attempts) - 1 else "cut off"
        spans.append(_span(own, launching + own_s, cut))
        ended = own[-1]["time"]
    if now is not None and attempts:
        seconds["down"] += max(0.0, now - ended)
    return Goodput(seconds, spans)


def render(figures: Goodput) -> str:
    """Return one screen of text: the share that counts, the phases, the attempts."""
    total = figures.total_s
    lines = [
        f"goodput {figures.fraction:.1%}: {figures.seconds['step']:,.1f} s of {total:,.1f} s "
        "went into steps that count",
        "",
        f"{'phase':<11}{'seconds':>12}{'share':>8}",
    ]
    for phase, seconds in figures.seconds.items():
        share = seconds / total if total else 0.0
        bar = "#" * round(BAR_WIDTH * share)
        name = phase.replace("_", " ")
        row = f"{name:<11}{seconds:>12,.1f}{share:>8.1%}  {bar:<{BAR_WIDTH}}  {PHASES[phase]}"
        lines.append(row)
    lines += [
        f"{'total':<11}{total:>12,.1f}{1:>8.1%}",
        "",
        f"{'attempt':>7}{'from step':>11}{'to step':>9}{'wall s':>12}  outcome",
    ]
    left_out = len(figures.attempts) - SHOWN_ATTEMPTS
    if left_out > 0:
        lines.append(f"{'...':>7}  {left_out} earlier; see --json")
    lines += [
        f"{span.attempt:>7}{span.from_step:>11}{span.to_step:>9}{span.wall_s:>12,.1f}"
        f"  {span.outcome}"
        for span in figures.attempts[-SHOWN_ATTEMPTS:]
    ]
    return "\n".join(lines)


def current_records(records: Iterable[Record]) -> list[Record]:
    """Leave out what an attempt wrote after a later one had begun: the run was no longer its own.

    Told by the order of the lines, which needs no clock.
    """
    kept: list[Record] = []
    for record in records:
        if not kept or record["attempt"] >= kept[-1]["attempt"]:
            kept.append(record)
    return kept


def counting_records(records: Sequence[Record]) -> list[Record]:
    """Return the steps, evaluations and checkpoints whose work is part of the run.

    What an attempt did past the step that a later one starts from is lost; so is, within one
    attempt, what a rollback took back and did again.
    """
    kept: list[Record] = []
    last_step = 0
    for record in records:
        event: str = record["event"]
        step: int = record["step"]
        if event in ("start", "rollback"):
            last_step = record.get("back_to", step)
            kept = [earlier for earlier in kept if earlier["step"] <= last_step]
        elif event == "step":
            if step <= last_step:  # done again
                kept = [earlier for earlier in kept if earlier["step"] < step]
            last_step = step
        if event in ("step", "evaluation", "checkpoint"):
            kept.append(record)
    return kept


def _process_start(first: Record) -> float:
    """Return the unix time at which the process of an attempt started."""
    return float(first["time"] - first["at_s"])


def _launching(first: Record, ended: float) -> float:
    """Return the seconds from the launch of an attempt to its process.

    A launcher that restarts its processes in place was itself launched before the attempt before
    ended; then the time since is `down`.
    """
    launched = first.get("launched", 0.0)
    return max(0.0, _process_start(first) - launched) if launched > max(0.0, ended) else 0.0


def _add_phases(own: Sequence[Record], counting: set[int], seconds: dict[str, float]) -> float:
    """Add the intervals of one attempt to the phases; return how long it lasted."""
    mark, started = 0.0, False
    for record in own:
        event = record["event"]
        if event != "start" and event not in CLOSING:
            continue
        interval = max(0.0, record["at_s"] - mark)
        mark += interval
        if event == "start":
            started = True
            startup = min(record.get("startup_s", 0.0), interval)
            load = min(record.get("load_s", 0.0), interval - startup)
            seconds["startup"] += startup
            seconds["load"] += load
            seconds["other"] += interval - startup - load
        elif not started:  # It holds an unknown startup: its `start` was never written.
            started = True
            seconds["other"] += interval
        elif event in ("step", "evaluation", "checkpoint") and id(record) not in counting:
            seconds["lost_work"] += interval
        else:
            seconds[CLOSING[event]] += interval
    last = max(record["at_s"] for record in own)
    seconds["other"] += max(0.0, last - mark)
    return float(max(last, mark))


def _span(own: Sequence[Record], wall_s: float, cut: str) -> AttemptSpan:
    """Return an attempt's line; `cut` is its outcome where it could not tell one."""
    starts = [record["step"] for record in own if record["event"] == "start"]
    steps = [record["step"] for record in own if record["event"] == "step"]
    from_step = starts[0] if starts else min(steps, default=0) - bool(steps)
    outcomes = [str(record.get("outcome")) for record in own if record["event"] == "end"]
    return AttemptSpan(
        attempt=own[0]["attempt"],
        from_step=from_step,
        to_step=steps[-1] if steps else from_step,
        outcome=outcomes[-1] if outcomes else cut,
        wall_s=wall_s,
    )
