"""How far a run has come, from the end of its ledger."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft_dist.ledger.events import LedgerEvent, RollbackEvent, StartEvent, StepEvent
from peft_dist.ledger.reader import LedgerReader

RECENT_STEPS = 50
"""Over so many steps the time of one is taken, evaluations and saves between them included."""
TAIL_STEPS = 4 * RECENT_STEPS
"""So many are read: the newest of them may be of an attempt that had lost the run."""


@dataclass(frozen=True)
class RunProgress:
    """How far a run has come; None is not known."""

    step: int | None = None
    steps: int | None = None
    """Steps of the whole run."""
    loss: float | None = None
    """Of the last step."""
    tokens_per_s: float | None = None
    """Likewise."""
    step_s: float | None = None
    """Seconds that a step takes of late."""


def read_progress(ledger: Path) -> RunProgress:
    """Return how far a run has come; nothing is known where its ledger cannot be read."""
    return progress(LedgerReader(ledger).tail(TAIL_STEPS, StepEvent))


def progress(events: Iterable[LedgerEvent]) -> RunProgress:
    """Return how far the newest attempt among the newest events of a ledger has come."""
    step = steps = loss = tokens_per_s = None
    attempt = 0
    intervals: list[list[float]] = [[]]  # of steps in sequence: seconds since their attempt began
    for event in events:
        if event.attempt < attempt:  # it had lost the run
            continue
        if isinstance(event, StartEvent | RollbackEvent) or event.attempt > attempt:
            intervals.append([])
        attempt = event.attempt
        match event:
            case StartEvent():
                step, steps = event.step, event.steps or steps
            case RollbackEvent():
                step = event.last_step
            case StepEvent():
                step, loss, tokens_per_s = event.step, event.loss, event.tokens_per_s
                intervals[-1].append(event.at_s)
    return RunProgress(step, steps, loss, tokens_per_s, _step_s(intervals))


def _step_s(intervals: Sequence[Sequence[float]]) -> float | None:
    """Return the time of a step in the newest sequence that has two."""
    for times_s in reversed(intervals):
        recent = times_s[-RECENT_STEPS - 1 :]
        if len(recent) > 1:
            return max(0.0, recent[-1] - recent[0]) / (len(recent) - 1)
    return None
