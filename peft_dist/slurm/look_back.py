"""Tell how a start ended whose head left no decision, or that Slurm may have cancelled.

By what the batch script asked of Slurm and left beside the logs, and by what `node.sh` left there
where it ended before Python began.
"""

import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from peft_dist.run.restart_policy import Ending, Kind

LOST = re.compile(r"down|fail|error|unknown|reboot|power|no_respond|\w+\*")
"""States of a node that may have lost its part of a job; `*` marks one that does not answer."""
NEAR_END_S = 60.0
"""A job that ends so shortly before its time limit ends because of it."""


def ending_of_start(
    logs: Path, *, nonce: str, hosts: Sequence[str], srun_code: int, job_end_s: float
) -> Ending:
    """Return how a start ended that left no decision of its own.

    Args:
        logs: The folder of its logs.
        nonce: What tells this try from others.
        hosts: The job's nodes.
        srun_code: How srun ended.
        job_end_s: The unix time at which Slurm ends the job.
    """
    if is_cancelled(logs, hosts=hosts, job_end_s=job_end_s):
        return Ending(Kind.CANCELLED)
    failed = _told(logs, hosts, f"{nonce}.set-up-failed")
    stopped = _told(logs, hosts, f"{nonce}.set-up-stopped")
    if failed:
        first = next(iter(failed.values()))
        why = f"the set-up fails on {len(failed)} of {len(hosts)} nodes: {first}"
        return Ending(Kind.NODES_UNFIT, why, nodes=tuple(failed))
    preempted = _fields(logs).get("PreemptTime", "None") != "None"
    if stopped or preempted or time.time() > job_end_s - NEAR_END_S:
        name = next(iter(stopped.values()), "its preemption" if preempted else "its time limit")
        return Ending(Kind.NOT_BEGUN, f"stopped by {name} before it trained")
    return Ending(Kind.NO_DECISION, f"srun ended with code {srun_code} before the run; see {logs}")


def is_cancelled(logs: Path, *, hosts: Sequence[str], job_end_s: float) -> bool:
    """Whether Slurm ends a job by its user's wish; where it says too little, it does not.

    While its script lives, Slurm shows of a job that was cancelled only that it is completing; so
    it does of one that has lost a node, was preempted or reached its time limit.

    Args:
        logs: Where the batch script has left Slurm's answers.
        hosts: The job's nodes.
        job_end_s: The unix time at which Slurm ends the job.
    """
    told = _fields(logs)
    if told.get("JobState") != "COMPLETING" or told.get("PreemptTime") != "None":
        return False
    if time.time() >= job_end_s:
        return False
    nodes: dict[str, str] = {}
    with suppress(OSError):
        lines = (logs / "nodes.txt").read_text(encoding="utf-8").splitlines()
        nodes = dict(words for line in lines if len(words := line.split()) == 2)
    return all(host in nodes and not LOST.match(nodes[host].lower()) for host in hosts)


def _fields(logs: Path) -> dict[str, str]:
    with suppress(OSError):
        text = (logs / "job.txt").read_text(encoding="utf-8", errors="replace")
        return dict(re.findall(r"(?:^|\s)(JobState|PreemptTime)=(\S+)", text))
    return {}


def _told(logs: Path, hosts: Sequence[str], suffix: str) -> dict[str, str]:
    """Return what the set-up of each node has left, by the node's name."""
    found = {}
    for host in hosts:
        with suppress(OSError):
            text = (logs / f"{host}.{suffix}").read_text(encoding="utf-8", errors="replace")
            found[host] = " ".join(text.split())
    return found
