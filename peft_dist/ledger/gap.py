"""Find the steps that a ledger lacks before the checkpoint that a run goes on from."""

import sys
from collections.abc import Iterable
from pathlib import Path

from peft_dist.ledger.events import (
    GapEvent,
    LedgerEvent,
    RollbackEvent,
    SkippedEvent,
    StartEvent,
    StepEvent,
)
from peft_dist.ledger.goodput import current_events
from peft_dist.ledger.reader import LedgerReader

ATTEMPTED = (StepEvent, SkippedEvent, RollbackEvent)
"""Exactly one event of these is written for each step, whatever became of it."""
TAIL_STEPS = 200
"""How many of the newest are read: the last ones may be of an attempt that had lost the run."""


def read_gap(ledger: Path, checkpoint_step: int) -> GapEvent | None:
    """Return what a ledger lacks before a checkpoint; None where it lacks nothing.

    Args:
        ledger: The ledger, as the attempts before have left it.
        checkpoint_step: Step of the checkpoint that the run goes on from.
    """
    # The whole file only where it has fewer: it may have millions of lines.
    newest = LedgerReader(ledger).tail(TAIL_STEPS, (*ATTEMPTED, GapEvent), limit_bytes=sys.maxsize)
    return find_gap(newest, checkpoint_step)


def find_gap(events: Iterable[LedgerEvent], checkpoint_step: int) -> GapEvent | None:
    """Return which steps are missing between the last one that was recorded and a checkpoint.

    Args:
        events: The newest events, the oldest of them first.
        checkpoint_step: Step of the checkpoint that the run goes on from.
    """
    recorded = 0
    for event in current_events(events):
        if isinstance(event, ATTEMPTED):
            recorded = event.step
        elif isinstance(event, StartEvent):
            recorded = min(recorded, event.step)  # the steps after it are done again
        elif isinstance(event, GapEvent):
            recorded = max(recorded, event.to_step)
    if recorded >= checkpoint_step:
        return None
    return GapEvent(step=checkpoint_step, from_step=recorded + 1, to_step=checkpoint_step)
