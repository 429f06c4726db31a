"""End the jobs of runs: after a checkpoint, or now."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from peft_dist.errors import RunDirError
from peft_dist.files import replace_file
from peft_dist.run_dir import RunDir
from peft_dist.slurm import client, jobs
from peft_dist.slurm.lead import lead_s
from peft_dist.slurm.states import is_live, is_over, job_states

LOOK_EVERY_S = 1.0
LEAST_WAIT_S = 120
"""How long a run may take to save and end, where it has not been seen to need more."""


def cancel(folders: Sequence[Path], *, now: bool, tell: Callable[[str], None]) -> None:
    """Cancel the jobs of runs and wait until they are over.

    Those that wait in the queue are gone at once. Those that run are told to save and end; after
    the time that may take, or with `now`, Slurm ends them.

    Args:
        folders: Run directories.
        now: Do not wait for a checkpoint.
        tell: Takes what happens, a line at a time.

    Raises:
        RunDirError: Where none of them has a job.
        SlurmError: Where Slurm cannot be asked or refuses.
    """
    newest = {folder: job for folder in folders if (job := jobs.newest_job(folder)) is not None}
    if not newest:
        raise RunDirError(
            "has no Slurm job",
            where=str(folders[0]),
            remedy="press Ctrl-C where it runs, or send SIGTERM to its processes",
        )
    for folder in newest:
        # Whatever is queued of it from here on ends as soon as it starts.
        replace_file(folder / "slurm" / "cancelled", f"{int(time.time())}\n")
        successor = folder / "slurm" / "successor"
        if successor.exists():
            client.scancel(
                [successor.read_text(encoding="utf-8").strip()], options=["--state=PENDING"]
            )
    states = job_states(list(newest.values()))
    live = {folder: job for folder, job in newest.items() if not is_over(states[job].state)}
    running = [job for job in live.values() if states[job].state == "RUNNING"]
    waiting = [job for job in live.values() if job not in running]
    if waiting or (now and running):
        client.scancel(waiting + (running if now else []))
    if running and not now:
        client.scancel(running, options=["--signal=USR1"])
        tell(f"job {' '.join(running)}: told to save and end")
    wait_s = max([LEAST_WAIT_S, *(lead_s(RunDir(folder).ledger, 0) for folder in live)])
    deadline = time.monotonic() + wait_s
    while left := _live(list(live.values())):
        if time.monotonic() > deadline:
            tell(f"job {' '.join(left)}: not over after {wait_s} s; ended by Slurm")
            client.scancel(left)
            break
        time.sleep(LOOK_EVERY_S)
    for folder, job in newest.items():
        step = RunDir(folder).newest_step()
        over = "cancelled" if folder in live else "was over already"
        tell(f"job {job}: {over}; `peft-dist resume {folder}` goes on after step {step}")


def _live(wanted: Sequence[str]) -> list[str]:
    return [job for job, state in job_states(wanted).items() if is_live(state.state)]
