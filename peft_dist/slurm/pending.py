"""What Slurm says of jobs that wait: why, in words, how many come first, and one's fair share.

Asked once where a person asks, never again and again: for a place in the queue the controller has
to send its jobs of all users.
"""

import re
from collections.abc import Iterable

from peft_dist.common.errors import SlurmError
from peft_dist.slurm.cli_client import ask_slurm

REASONS = (
    ("Priority", "other jobs come first"),
    ("Resources", "it is next, and waits for nodes to become free"),
    ("DependencyNeverSatisfied", "what it waits for did not end well: resume that, or cancel this"),
    ("Dependency|Singleton", "it waits for another job"),
    ("BeginTime", "Slurm holds a job for a moment that was queued again"),
    ("JobArrayTaskLimit", "as many elements run as --limit allows"),
    ("JobHeld.*|.*held.*", "it is held; `scontrol release` it"),
    ("(QOS|Assoc)Max.*Submit.*", "you have as many jobs in the queue as you may"),
    ("(QOS|Assoc|Max).*(Grp|Max|Job).*", "a limit of your account or QOS is reached"),
    ("Partition(Time|Node)Limit", "it asks for more time or nodes than the partition allows"),
    ("Partition(Down|Inactive)|AccountNotAllowed|QOSNotAllowed", "it may not run there now"),
    ("ReqNodeNotAvail.*", "a node that it needs is down, drained or reserved"),
    ("Reservation.*", "it waits for its reservation"),
    ("BadConstraints|NodeConfig.*", "no node has what it asks for: change the cluster file"),
    ("Licenses.*", "it waits for a licence"),
)
"""The words of squeue (squeue(1), JOB REASON CODES), and what they mean to a person."""
TIMEOUT_S = 5.0


def reason_in_words(reason: str) -> str:
    """Return what a reason of Slurm means; its own word where that is unknown."""
    for pattern, words in REASONS:
        if re.fullmatch(pattern, reason):
            return words
    return reason


def jobs_ahead(jobs: Iterable[str]) -> dict[str, int]:
    """Return how many jobs that wait in its partition come before each job, as far as one may see.

    An array counts once. Jobs of which Slurm says nothing are left out, as are all where it does
    not answer.

    Args:
        jobs: As `squeue -r` prints them.
    """
    argv = ["squeue", "--noheader", "--states=PENDING", "-o", "%F|%P|%Q"]
    try:
        lines = ask_slurm(argv, timeout_s=TIMEOUT_S).splitlines()
    except SlurmError:
        return {}
    rows = [row for line in lines if len(row := line.split("|")) == 3 and row[2].isdecimal()]
    waiting = {(job, partition): int(priority) for job, partition, priority in rows}
    ahead: dict[str, int] = {}
    for job in jobs:
        number = job.partition("_")[0]
        for (own, partition), priority in waiting.items():
            if own == number:
                others = [
                    other
                    for (name, where), other in waiting.items()
                    if where == partition and name != number
                ]
                ahead[job] = sum(other > priority for other in others)
    return ahead


def fair_shares() -> dict[str, float]:
    """Return one's fair share by account, from 0 to 1; none where `sshare` does not answer."""
    try:
        text = ask_slurm(
            ["sshare", "--noheader", "--parsable2", "-U", "-o", "Account,FairShare"],
            timeout_s=TIMEOUT_S,
        )
    except SlurmError:
        return {}
    found = {}
    for line in text.splitlines():
        account, _, share = line.strip().partition("|")
        if account and re.fullmatch(r"[01]?\.?\d+", share):
            found[account] = float(share)
    return found
