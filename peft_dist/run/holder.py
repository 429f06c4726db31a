"""Find the processes that hold a run on this machine, and wait for their end."""

import sys
import time
from contextlib import suppress
from pathlib import Path

from peft_dist.common.console import say
from peft_dist.common.process_identity import is_alive
from peft_dist.run.lease import Record, latest

ORPHANS_WAIT_S = 120.0
"""How long workers whose command was killed may take to save and end before a start is refused."""
LOOK_EVERY_S = 0.1


def wait_for_orphans(folder: Path, *, wait_s: float = ORPHANS_WAIT_S) -> None:
    """Wait until workers whose command was killed have ended, which they do by themselves.

    Takes no time where the run is not held, or its command lives.

    Args:
        folder: The run's folder of attempts.
        wait_s: How long to wait; whether they are gone then is for the lease to say.
    """
    with suppress(OSError):  # `refuse_if_held` says so in one line
        record = latest(folder)
        if record is None or not _is_orphan(record):
            return
        say(
            f"peft-dist: the command that held this run was killed; waiting up to {wait_s:.0f} s "
            f"until its process {record['pid']} has saved and ended",
            sys.stderr,
        )
        wait_for_end(record, wait_s=wait_s)


def wait_for_end(*processes: Record, wait_s: float) -> bool:
    """Wait until processes of this machine have ended; return whether they have.

    Args:
        processes: What `process_identity.this_process` returned in each.
        wait_s: How long to wait.
    """
    deadline = time.monotonic() + wait_s
    while any(is_alive(process) for process in processes):
        if time.monotonic() >= deadline:
            return False
        time.sleep(LOOK_EVERY_S)
    return True


def _is_orphan(record: Record) -> bool:
    launcher = record.get("launcher")
    return bool(launcher and is_alive(launcher) is False and is_alive(record))
