"""Divide the wall-clock time of a run into phases: which share of it trained the adapter.

Reads the events of a ledger one by one and keeps 17 bytes of each step. Within an attempt it uses
the monotonic `at_s` alone; between attempts the wall clock.
"""

import json
import math
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field

from peft_dist.ledger.events import (
    CheckpointEvent,
    EndEvent,
    EvaluationEvent,
    GapEvent,
    LedgerEvent,
    RollbackEvent,
    SkippedEvent,
    StartEvent,
    StepEvent,
)

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
WORK: dict[type[LedgerEvent], str] = {
    StepEvent: "step",
    EvaluationEvent: "evaluation",
    CheckpointEvent: "checkpoint",
}
"""Events of work that is part of the run unless it is taken back, and the phase of their time."""
CLOSING: dict[type[LedgerEvent], str] = {
    **WORK,
    SkippedEvent: "lost_work",
    RollbackEvent: "lost_work",
    EndEvent: "other",
}
"""Events that end an interval, which began with the last such event, and the phase it was.

`start` divides its interval by its own fields. Others, such as `saved` of the thread that writes
checkpoints, come in the middle of one.
"""
WORK_PHASES = tuple(WORK.values())
_WORK_INDEX = {kind: index for index, kind in enumerate(WORK)}


@dataclass(frozen=True)
class AttemptSpan:
    """One start of the run."""

    attempt: int
    from_step: int
    """Steps that were already done when it began."""
    to_step: int
    """The last step it did."""
    outcome: str
    """As its `end` has it; `cut off` without one, `unfinished` for the newest attempt."""
    wall_s: float


@dataclass(frozen=True)
class LedgerGap:
    """Steps that were done, and whose lines were lost."""

    from_step: int
    to_step: int

    def __str__(self) -> str:
        """Return what a reader must know, in one line."""
        steps = f"steps {self.from_step} to {self.to_step} are"
        if self.from_step == self.to_step:
            steps = f"step {self.from_step} is"
        return f"{steps} not in the ledger: lost lines"


@dataclass(frozen=True)
class Goodput:
    """Seconds of every phase, which sum to the run's total, and its attempts in order."""

    seconds: dict[str, float]
    attempts: list[AttemptSpan]
    gaps: list[LedgerGap] = field(default_factory=list)
    """What the ledger lacks; the time of these steps counts as `down`."""

    @property
    def total_s(self) -> float:
        """All the time from the launch to the last event."""
        return math.fsum(self.seconds.values())

    @property
    def fraction(self) -> float:
        """The share of the time that went into steps that count."""
        return self.seconds["step"] / self.total_s if self.total_s else 0.0

    def to_json(self) -> str:
        """Return every number, for programs."""
        numbers = {
            "goodput": self.fraction,
            "total_s": self.total_s,
            "phases_s": self.seconds,
            "attempts": [asdict(span) for span in self.attempts],
            "gaps": [asdict(gap) for gap in self.gaps],
        }
        return json.dumps(numbers, indent=2)


def goodput(events: Iterable[LedgerEvent], *, now: float | None = None) -> Goodput:
    """Divide the time of a run into phases.

    Args:
        events: All events of its ledger.
        now: Unix time up to which to count, as `down`; by default up to the last event.
    """
    meter = GoodputMeter()
    for event in events:
        meter.add(event)
    return meter.result(now=now)


class GoodputMeter:
    """Takes the events of a run in order, and has its goodput after each of them."""

    def __init__(self) -> None:
        """Start before the first event."""
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._spans: list[AttemptSpan] = []
        self._gaps: list[LedgerGap] = []
        self._attempt: _Attempt | None = None
        self._last_time, self._last_step = 0.0, 0
        # Of all work that counts so far: its step, the index of its phase in `WORK_PHASES`, and the
        # seconds of that phase before it.
        self._steps, self._phases, self._before_s = array("q"), bytearray(), array("d")

    def add(self, event: LedgerEvent) -> bool:
        """Take the next event; return whether it counts: its attempt had not lost the run."""
        own = self._attempt
        if own is None or event.attempt > own.number:
            own = self._begin(event)
        elif event.attempt < own.number:
            return False
        at_s = event.at_s
        self._last_time = event.time
        if at_s > own.last_s:
            own.last_s = at_s
        kept_step = last_kept_step(event, self._last_step)
        if kept_step is not None:
            self._take_back(kept_step)
            self._last_step = kept_step
        if isinstance(event, StepEvent):
            self._last_step = own.to_step = event.step
            if event.step < own.first_step:
                own.first_step = event.step
        elif isinstance(event, GapEvent):
            self._gaps.append(LedgerGap(event.from_step, event.to_step))
        kind = type(event)
        phase = "other" if kind is StartEvent else CLOSING.get(kind)
        if phase is None:
            return True
        interval = at_s - own.mark_s
        if interval > 0.0:
            own.mark_s = at_s
        else:
            interval = 0.0
        if isinstance(event, StartEvent):
            startup = min(event.startup_s, interval)
            load = min(event.load_s, interval - startup)
            self._seconds["startup"] += startup
            self._seconds["load"] += load
            interval -= startup + load
            own.from_step = event.step if own.from_step is None else own.from_step
        elif not own.started:  # it holds an unknown startup: its `start` was never written
            self._seconds["other"] += interval
            interval = 0.0
        if isinstance(event, EndEvent):
            own.outcome = event.outcome
        own.started = True
        if kind in WORK:
            self._steps.append(event.step)
            self._phases.append(_WORK_INDEX[kind])
            self._before_s.append(self._seconds[phase])
        self._seconds[phase] += interval
        return True

    def result(self, *, now: float | None = None) -> Goodput:
        """Return the goodput so far; `now` as in `goodput`."""
        if self._attempt is None:
            return Goodput(dict(self._seconds), [])
        seconds = dict(self._seconds)
        seconds["other"] += self._attempt.rest_s
        if now is not None:
            seconds["down"] += max(0.0, now - self._last_time)
        return Goodput(seconds, [*self._spans, self._attempt.span("unfinished")], list(self._gaps))

    def _begin(self, first: LedgerEvent) -> "_Attempt":
        process_start = first.time - first.at_s
        ended = -math.inf
        if self._attempt is not None:
            ended = self._last_time
            self._seconds["other"] += self._attempt.rest_s
            self._spans.append(self._attempt.span("cut off"))
        # A launcher that restarts its processes in place was itself launched before the attempt
        # before ended; then the time since is `down`.
        launched = first.launched if isinstance(first, StartEvent) else 0.0
        launching = max(0.0, process_start - launched) if launched > max(0.0, ended) else 0.0
        if self._attempt is not None:
            self._seconds["down"] += max(0.0, process_start - launching - ended)
        self._seconds["startup"] += launching
        self._attempt = _Attempt(first.attempt, launching)
        return self._attempt

    def _take_back(self, last_step: int) -> None:
        """Move the time of all work past a step to `lost_work`; what is done again is no gap."""
        while self._gaps and self._gaps[-1].to_step > last_step:
            gap = self._gaps.pop()
            if gap.from_step <= last_step:
                self._gaps.append(LedgerGap(gap.from_step, last_step))
        while self._steps and self._steps[-1] > last_step:
            self._steps.pop()
            phase, before_s = WORK_PHASES[self._phases.pop()], self._before_s.pop()
            self._seconds["lost_work"] += self._seconds[phase] - before_s
            self._seconds[phase] = before_s


@dataclass(slots=True)
class _Attempt:
    """The attempt whose events are being read."""

    number: int
    launching_s: float
    mark_s: float = 0.0
    """Where the next interval begins, since the process started."""
    last_s: float = 0.0
    started: bool = False
    from_step: int | None = None
    first_step: float = math.inf
    to_step: int | None = None
    outcome: str = ""

    @property
    def rest_s(self) -> float:
        """Seconds from the last interval to the last event."""
        return max(0.0, self.last_s - self.mark_s)

    def span(self, cut: str) -> AttemptSpan:
        """Return the attempt's line; `cut` is its outcome where it could not write one."""
        from_step = self.from_step
        if from_step is None:
            from_step = 0 if self.to_step is None else int(self.first_step) - 1
        return AttemptSpan(
            attempt=self.number,
            from_step=from_step,
            to_step=from_step if self.to_step is None else self.to_step,
            outcome=self.outcome or cut,
            wall_s=self.launching_s + max(self.last_s, self.mark_s),
        )


def current_events(events: Iterable[LedgerEvent]) -> Iterator[LedgerEvent]:
    """Leave out what an attempt wrote after a later one had begun: it had lost the run.

    Decided by the order of the lines, which needs no clock.
    """
    attempt = -math.inf
    for event in events:
        if event.attempt >= attempt:
            attempt = event.attempt
            yield event


def counting_events(events: Iterable[LedgerEvent]) -> list[LedgerEvent]:
    """Return the steps, evaluations and checkpoints whose work is part of the run.

    What an attempt did past the step that a later one starts from is lost; so is, within one
    attempt, what a rollback took back and did again.
    """
    kept: list[LedgerEvent] = []
    last_step = 0
    for event in current_events(events):
        kept_step = last_kept_step(event, last_step)
        if kept_step is not None:
            while kept and kept[-1].step > kept_step:
                kept.pop()
            last_step = kept_step
        if isinstance(event, StepEvent):
            last_step = event.step
        if type(event) in WORK:
            kept.append(event)
    return kept


def last_kept_step(event: LedgerEvent, last_step: int) -> int | None:
    """Return the step after which an event takes work back; None where it takes nothing back."""
    if isinstance(event, StepEvent):
        return event.step - 1 if event.step <= last_step else None
    if isinstance(event, StartEvent):
        return event.step
    return event.last_step if isinstance(event, RollbackEvent) else None
