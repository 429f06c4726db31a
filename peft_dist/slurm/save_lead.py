"""How long before its end a job must be told to save: as long as saving has been seen to take."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from peft_dist.common.errors import RunDirError
from peft_dist.ledger.goodput import read_ledger

MARGIN = 3.0
"""Times a long step and a long save of late: a shared file system has bad hours."""
SETTLE_S = 30.0
"""For the signal to arrive, the ranks to agree and the processes to end."""
RECENT = 500
"""Steps and saves that count; of their times the 99th percentile, so that a job that was suspended
for a night does not save a night before its end for ever after."""


def lead_s(ledger: Path, least_s: int) -> int:
    """Return the seconds that a run needs between the signal to save and its end.

    Args:
        ledger: The run's; it need not be there yet.
        least_s: What the cluster file asks for.
    """
    try:
        records = read_ledger(ledger)
    except RunDirError:  # not begun yet
        return least_s
    saves_s = [record["write_s"] for record in records if "write_s" in record]
    steps_s = [
        record["at_s"] - before["at_s"]
        for before, record in itertools.pairwise(r for r in records if r["event"] != "system")
        if before["event"] == record["event"] == "step"
    ]
    needed_s = SETTLE_S + MARGIN * (_long(steps_s) + _long(saves_s))
    return max(least_s, math.ceil(needed_s))


def _long(times_s: Sequence[float]) -> float:
    recent = sorted(times_s[-RECENT:])
    return recent[math.ceil(0.99 * (len(recent) - 1))] if recent else 0.0
