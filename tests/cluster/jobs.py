"""What `scontrol show job` says of jobs, in the few fields that tests ask for."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """A job as Slurm's controller knows it, ended or not."""

    state: str
    """Like `RUNNING`, `PENDING`, `COMPLETED` or `NODE_FAIL`."""
    reason: str
    """Why it waits, like `BeginTime`; `None` where it does not."""
    restarts: int
    """How often it was requeued."""
    exit_code: str
    """The batch script's, as `code:signal`."""
    nodes: str
    """Like `node[1-2]`; empty before its first start."""


def parse_jobs(told: str) -> dict[str, Job]:
    """Return jobs by their id from what `scontrol show job --oneliner` prints."""
    jobs = {}
    for line in told.splitlines():
        if line.startswith("JobId="):
            jobs[line.split()[0].removeprefix("JobId=")] = Job(
                state=_field(line, "JobState"),
                reason=_field(line, "Reason"),
                restarts=int(_field(line, "Restarts")),
                exit_code=_field(line, "ExitCode"),
                nodes=_field(line, "NodeList").replace("(null)", ""),
            )
    return jobs


def _field(line: str, name: str) -> str:
    found = re.search(rf" {name}=(\S*)", line)
    assert found, f"no {name} in {line}"
    return found[1]
