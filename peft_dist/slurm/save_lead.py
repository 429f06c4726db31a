"""How long before its end a job is signalled to save: as long as saving has taken so far."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_dist.ledger.events import SavedEvent, SaveFailedEvent, StepEvent, SystemEvent
from peft_dist.ledger.reader import LedgerReader

MARGIN = 3.0
"""Times a long step and a long save of late: a shared file system has bad hours."""
SETTLE_S = 30.0
"""For the signal to arrive, the ranks to agree and the processes to end."""
RECENT = 500
"""Steps that count, and saves between them; of their times the 99th percentile, so that a job that
was suspended for a night does not save a night before its end for ever after."""
SEARCH_BYTES = 16 << 20
"""Where to stop looking for them, from the ledger's end: some 20,000 steps."""


def lead_s(ledger: Path, least_s: int, foreseen: Mapping[str, Any] | None = None) -> int:
    """Return the seconds that a run needs between the signal to save and its end.

    Args:
        ledger: The run's; it need not exist yet.
        least_s: What the cluster file asks for.
        foreseen: `step_s` and `save_s`, where a plan says so.
    """
    if foreseen is not None and "step_s" in foreseen:
        least_s = max(least_s, needed_lead_s(foreseen["step_s"], foreseen["save_s"]))
    reader, saves = LedgerReader(ledger), (SavedEvent, SaveFailedEvent)
    events = reader.tail(RECENT + 1, StepEvent, limit_bytes=SEARCH_BYTES)
    if not events:  # not begun yet
        return least_s
    saved = [event for event in events if isinstance(event, saves)]
    saved = saved or [
        event
        for event in reader.tail(1, saves, limit_bytes=SEARCH_BYTES)
        if isinstance(event, saves)
    ]
    steps_s = [
        event.at_s - before.at_s
        for before, event in itertools.pairwise(e for e in events if not isinstance(e, SystemEvent))
        if isinstance(before, StepEvent) and isinstance(event, StepEvent)
    ]
    saves_s = [event.write_s for event in saved if event.write_s is not None]
    return max(least_s, needed_lead_s(_long(steps_s), _long(saves_s)))


def needed_lead_s(step_s: float, save_s: float) -> int:
    """Return the seconds that a step and a save of such lengths need, with a margin."""
    return math.ceil(SETTLE_S + MARGIN * (step_s + save_s))


def _long(times_s: Sequence[float]) -> float:
    recent = sorted(times_s[-RECENT:])
    return recent[math.ceil(0.99 * (len(recent) - 1))] if recent else 0.0
