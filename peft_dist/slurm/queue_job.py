"""Queue a checked job, with notes in the folders of its runs before and after it is asked for.

Every submission of a person goes through here; what a job submits itself is in its script.
"""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_dist.common import paths
from peft_dist.common.errors import SlurmError
from peft_dist.common.locks import lock_file
from peft_dist.run import job_events
from peft_dist.slurm.after import Waiting
from peft_dist.slurm.submitting import SubmissionUnknown, new_token, sbatch


@dataclass(frozen=True)
class Queued:
    """A job that Slurm has taken."""

    job: str
    start: str
    """When Slurm expects it to start, on its clock; empty where that is not known."""

    def describe(self, folder: Path) -> str:
        """Return what a person who has submitted it wants to know.

        Args:
            folder: That of the run, as they named it.
        """
        start = f", expected to start {self.start}" if self.start else ""
        return f"job {self.job}: {folder}{start}; `peft-dist status {folder}` shows how it is"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Let one command of a user at a time submit what is beside a folder."""
    name = hashlib.sha256(str(folder.parent).encode()).hexdigest()
    with ExitStack() as stack:
        with suppress(OSError):  # a cache that cannot be written
            locks = paths.cache_dir() / "submit"
            locks.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock_file(locks / f"{name[:32]}.lock"))
        yield


def queue_job(
    argv: Sequence[str],
    folders: Mapping[Path, int | None],
    *,
    script: str,
    facts: Mapping[str, Any],
    waiting: Waiting,
    clusters: str = "",
) -> str:
    """Submit a job; return its id, which ends with `@cluster` where Slurm has several.

    Args:
        argv: The command, with the path of the script as its last word.
        folders: The folders of its runs, each with its element in an array.
        script: The text of the script.
        facts: What else the notes say.
        waiting: What the job waits for.
        clusters: Where it may be queued, where that is not Slurm's own.

    Raises:
        SlurmError: Where Slurm refuses it.
    """
    token, facts = new_token(), {"time": int(time.time()), **facts}
    if clusters:
        facts["cluster"] = clusters
    for folder, element in folders.items():
        of_array = {} if element is None else {"element": element}
        event = {"event": "submitting", "job": "", "token": token, **of_array, **facts}
        job_events.record(folder, event)
    *command, file = argv
    try:
        argv = [*command, f"--comment={token}", file]
        job, _, cluster = sbatch(argv, token=token, script=script, clusters=clusters).partition("@")
    except SubmissionUnknown:  # the next command asks again
        raise
    except SlurmError:
        for folder in folders:
            job_events.record(folder, {"event": "refused", "job": ""})
        raise
    if cluster:
        facts["cluster"] = cluster
    for folder, element in folders.items():
        name = job if element is None else f"{job}_{element}"
        job_events.record(folder, {"event": "submitted", "job": name, **facts})
    waiting.note(job)
    return f"{job}@{cluster}" if cluster else job
