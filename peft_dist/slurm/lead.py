"""How long before its end a job must be told to save: as long as saving has been seen to take."""

import math
from pathlib import Path

from peft_dist.errors import RunDirError
from peft_dist.goodput import read_ledger

MARGIN = 3.0
"""Times the longest step and the longest save seen so far: a shared file system has bad hours."""
SETTLE_S = 30.0
"""For the signal to arrive, the ranks to agree and the processes to end."""


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
    save_s = max((record.get("write_s", 0.0) for record in records), default=0.0)
    step_s, before = 0.0, None
    for record in records:
        if record["event"] == "step" and before is not None and before["event"] == "step":
            step_s = max(step_s, record["at_s"] - before["at_s"])
        before = record
    return max(least_s, math.ceil(SETTLE_S + MARGIN * (step_s + save_s)))
