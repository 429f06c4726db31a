"""When Slurm ends the job that this process runs in."""

import os
from contextlib import suppress
from pathlib import Path

from peft_dist.common.env import JOB_END, LOGS


def job_end_s() -> float:
    """Return the unix time at which Slurm ends this job; infinity where it does not, or no job is.

    The batch script asks Slurm again and again, for a limit may be changed while a job runs.
    """
    with suppress(KeyError, OSError, ValueError):
        return float((Path(os.environ[LOGS]) / "job-end").read_text(encoding="ascii"))
    with suppress(KeyError, ValueError):
        return float(os.environ[JOB_END])
    return float("inf")
