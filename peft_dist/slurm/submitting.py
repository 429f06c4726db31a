"""Submit a job so that it is neither lost nor queued twice, whatever sbatch prints or fails to say.

Each submission has a token, its comment, by which Slurm can be asked for the job afterwards.
"""

import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence

from peft_dist.common.env import AFTER_JOB
from peft_dist.common.errors import SlurmError
from peft_dist.slurm.cli_client import of_cluster, run_slurm

OF_USERS = ("SLURM_CLUSTERS", "SLURM_CONF", "SLURM_JWT", "SBATCH_ACCOUNT", "SBATCH_CLUSTERS",
            "SBATCH_PARTITION", "SBATCH_QOS", "SBATCH_RESERVATION")  # fmt: skip
"""Variables by which users say how they submit at a site, and which Slurm sets in no job."""
VARIABLES = {"array": "SBATCH_ARRAY_INX", "time": "SBATCH_TIMELIMIT", "mem": "SBATCH_MEM_PER_NODE",
             "no-requeue": "SBATCH_REQUEUE", "requeue": "SBATCH_NO_REQUEUE"}  # fmt: skip
"""What sbatch reads in the place of an option, where it is not just the option's name."""


class SubmissionUnknown(SlurmError):
    """A submission of which nobody can tell whether it has made a job."""


def new_token() -> str:
    """Return the comment of a new submission."""
    return f"peft-dist-{secrets.token_hex(8)}"


def sbatch(
    argv: Sequence[str], *, token: str, script: str, after: str | None = None, clusters: str = ""
) -> str:
    """Run a command that submits and prints the job's id; return that.

    It ends with `@cluster` where Slurm has several, and says which one has taken the job.

    Waits as long as sbatch takes: one that is killed may have been heard.

    Args:
        argv: The command.
        token: Its comment.
        script: The text of the batch script.
        after: The job that this one goes on for.
        clusters: Where it may be queued, where that is not Slurm's own.

    Raises:
        SlurmError: Where Slurm refuses, and no job has the token.
        SubmissionUnknown: Where nobody can tell.
    """
    refused: SlurmError | None = None
    output = ""
    environment = submitting_environment(script) | ({AFTER_JOB: after} if after else {})
    try:
        output = run_slurm(argv, timeout_s=None, environment=environment)
    except SlurmError as error:
        refused = error
    refused = refused or SlurmError(f"printed {output.strip()!r} and no job id", where="sbatch")
    try:
        job = job_id(output) or find_job(token, clusters)
    except SlurmError as error:
        raise SubmissionUnknown(
            f"{refused}; cannot tell whether the job is queued: {error}",
            remedy="submit again when Slurm answers: that looks for the job first",
        ) from error
    if job is None:
        raise refused
    return job


def job_id(output: str) -> str | None:
    """Return the id that `sbatch --parsable` printed, behind whatever a site prints first.

    Of `47;cluster`, which is one of several, it returns `47@cluster`.
    """
    ids = re.findall(r"^([0-9]+)(?:;(.*))?$", output, re.MULTILINE)
    return "@".join(filter(None, ids[-1])) if ids else None


def find_job(token: str, clusters: str = "") -> str | None:
    """Return the job of this user that was submitted with a token; None where there is none.

    Args:
        token: The job's comment.
        clusters: Where to look, where that is not Slurm's own; the job's name ends with `@cluster`.

    Raises:
        SlurmError: Where Slurm does not answer.
    """
    options = ["--noheader", "--me", "--states=all", "-o", "%F|%k"]
    at = ""
    for line in run_slurm(["squeue", *of_cluster(clusters), *options]).splitlines():
        job, _, comment = line.strip().partition("|")
        if job.startswith("CLUSTER: "):
            at = "@" + job.removeprefix("CLUSTER: ").strip()
        elif comment == token and job.isdecimal():
            return job + at
    return None


def check_script(script: str, options: Sequence[str] = ()) -> str:
    """Have Slurm check a batch script without submitting it; return when it would start.

    Args:
        script: Its text.
        options: What counts more than what the script says.

    Returns:
        Date and time on Slurm's clock; empty where it does not say.

    Raises:
        SlurmError: Where Slurm would refuse it.
    """
    environment = submitting_environment(script)
    argv = ["sbatch", "--test-only", *options]
    told = run_slurm(argv, environment=environment, text=script, with_errors=True)
    found = re.search(r"\bto start at (\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d)", told)
    return "" if found is None else f"{found[1]} {found[2]}"


def kept_variables(options: Iterable[str]) -> list[str]:
    """Return the variables that a job hands to sbatch: sites' own, but for what its script says."""
    answered = _answered(options)
    return [name for name in OF_USERS if name not in answered]


def submitting_environment(
    script: str, environment: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Return what sbatch may see of our environment.

    It believes a variable more than the script: none is left in which an enclosing job, or a user,
    says something else than the script does.

    Args:
        script: The text of the batch script.
        environment: Ours.
    """
    options = re.findall(r"^#SBATCH --([a-z-]+)", script, re.MULTILINE)
    in_job, answered = "SLURM_JOB_ID" in environment, _answered(options)

    def is_kept(name: str) -> bool:
        if name in answered or name == AFTER_JOB:
            return False
        return name in OF_USERS or not in_job or not name.startswith(("SLURM_", "SBATCH_"))

    return {name: value for name, value in environment.items() if is_kept(name)}


def _answered(options: Iterable[str]) -> set[str]:
    names = [(option, option.upper().replace("-", "_")) for option in options]
    return {VARIABLES.get(option, f"SBATCH_{name}") for option, name in names}
