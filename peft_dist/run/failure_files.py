"""Carry an error from a worker process to its launcher: one small file for each rank that fails.

The launcher names a folder of its own by an environment variable. Plain torchrun and
`accelerate launch` name none; then the line on standard error is all there is.
"""

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from peft_dist.common.atomic import make_file
from peft_dist.common.env import FAILURES
from peft_dist.common.errors import PeftDistError


@dataclass(frozen=True)
class WorkerFailure:
    """The error that ended a worker process."""

    exit_code: int
    error: str
    """In one line."""
    rank: int
    host: str
    time: float
    """Unix time."""


def write_failure(error: PeftDistError, *, rank: int, by: str = "") -> None:
    """Leave an error for the launcher, where it named a folder; the first of a rank stays.

    Args:
        error: What ended this process.
        rank: Its rank.
        by: What the line begins with, where it must say who met the error.
    """
    folder = os.environ.get(FAILURES)
    if not folder:
        return
    host = os.uname().nodename
    failure = WorkerFailure(error.exit_code, f"{by}{error}", rank, host, time.time())
    with suppress(OSError):  # a full disk: then the launcher knows that the process failed
        make_file(Path(folder) / f"rank-{rank}.json", json.dumps(asdict(failure)) + "\n")


def read_failure(folder: Path) -> WorkerFailure | None:
    """Return the error that ended the workers: that of rank 0, else the first one."""
    found = []
    for path in folder.glob("rank-*.json"):
        with suppress(OSError, ValueError, TypeError):
            found.append(WorkerFailure(**json.loads(path.read_text(encoding="utf-8"))))
    return min(found, key=lambda failure: (failure.rank != 0, failure.time), default=None)
