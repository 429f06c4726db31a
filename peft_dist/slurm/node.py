"""Refuse the scripts of an earlier version, which start this module, or ask for another one.

Their job ends with this one line as its cause; `peft_dist/__init__.py` leads here as well.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from peft_dist.common.console import show
from peft_dist.common.env import LOGS
from peft_dist.common.errors import ERROR_PREFIX, EXIT_USER_ERROR

PROBLEM = "job.sbatch and node.sh were made by another version of peft-dist; "
REMEDY = "`peft-dist resume RUN` makes new ones"


def refuse() -> NoReturn:
    """End with the one line, and leave it as the decision that the batch script obeys."""
    show(f"{ERROR_PREFIX}{PROBLEM}{REMEDY}", sys.stderr)
    logs = os.environ.get(LOGS)
    if logs and os.environ.get("SLURM_NODEID") == "0":
        with suppress(OSError):
            (Path(logs) / "decision").write_text(f"stop {PROBLEM}{REMEDY}\n", encoding="utf-8")
    raise SystemExit(EXIT_USER_ERROR)


if __name__ == "__main__":
    refuse()
