"""Queue the jobs that go on for one another, from the login node: `submit --chain N`."""

import sys
from collections.abc import Sequence

from peft_dist.common.console import show
from peft_dist.common.errors import SlurmError
from peft_dist.run import job_events
from peft_dist.slurm.job_scripts import JOB_SCRIPT, Job
from peft_dist.slurm.submitting import new_token, sbatch


def queue_chain(job: Job, length: int, command: Sequence[str], *, script: str, first: str) -> None:
    """Queue so many jobs, each to go on where the one before it ends, as far as Slurm takes them.

    Args:
        job: What they all do.
        length: How many.
        command: The start of the command that submits one.
        script: The text of its script.
        first: The job that they go on for.
    """
    after, file = job_events.bare(first), job.folder / JOB_SCRIPT
    for number in range(1, length + 1):
        token = new_token()
        dependency = f"--dependency=afterany:{after}{',singleton' if job.singleton else ''}"
        argv = [*command, f"--comment={token}", dependency, str(file)]
        try:
            clusters = str(job.cluster.sbatch.get("clusters", ""))
            queued = sbatch(argv, token=token, script=script, after=after, clusters=clusters)
            after = job_events.bare(queued)
        except SlurmError as error:
            show(
                f"peft-dist: warning: --chain: {number - 1} of {length} jobs are queued: {error}",
                sys.stderr,
            )
            return
        with (job.folder / "slurm" / "successor").open("a", encoding="utf-8") as successors:
            successors.write(f"{after}\n")
