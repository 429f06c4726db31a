"""End the jobs of runs: after a checkpoint, or now."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from peft_dist.common.atomic import replace_file
from peft_dist.common.errors import RunDirError
from peft_dist.run import job_events
from peft_dist.run.directory import RunDir
from peft_dist.slurm import cli_client, waves
from peft_dist.slurm.job_state import JobState, is_live, is_over, job_states
from peft_dist.slurm.save_lead import lead_s

LOOK_EVERY_S, LOOK_AT_LEAST_EVERY_S = 1.0, 15.0
"""Seconds between two questions to Slurm: more each time, for its controller serves everybody."""
LEAST_WAIT_S = 120
"""How long a run may take to save and end, where it has not been seen to need more."""


def cancel(folders: Sequence[Path], *, now: bool, report: Callable[[str], None]) -> None:
    """Cancel the jobs of runs and wait until they are over.

    Those that wait in the queue are gone at once. Those that run are asked to save and end; after
    the time that may take, or with `now`, Slurm ends them.

    Args:
        folders: Run directories.
        now: Do not wait for a checkpoint.
        report: Takes what happens, a line at a time.

    Raises:
        RunDirError: Where none of them has a job.
        SlurmError: Where Slurm cannot be asked or refuses.
    """
    wanted = {
        folder: [
            *job_events.candidates(folder, job_events.events(folder)),
            *job_events.others(folder),
        ]
        for folder in folders
    }
    if not any(wanted.values()):
        raise RunDirError(
            "has no Slurm job",
            where=str(folders[0]),
            remedy=f"where it runs, use `peft-dist stop {folders[0]}`",
        )
    for folder, names in wanted.items():
        waves.drop(folder)
        if names:  # whatever is queued of it from here on ends as soon as it starts
            replace_file(folder / "slurm" / "cancelled", f"{int(time.time())}\n")
    states = job_states([job for names in wanted.values() for job in names])
    live = [job for job, state in states.items() if is_live(state.state)]
    running = [job for job in live if states[job].state == "RUNNING"]
    ended_now = live if now else [job for job in live if job not in running]
    if ended_now:
        cli_client.scancel(ended_now)
    if running and not now:
        cli_client.scancel(running, options=["--signal=USR1"])
        report(f"job {' '.join(running)}: asked to save and end")
    wait_s = max([LEAST_WAIT_S, *(lead_s(RunDir(folder).ledger, 0) for folder in wanted)])
    deadline, pause_s = time.monotonic() + wait_s, LOOK_EVERY_S
    while live and (left := _not_over(live)):
        if time.monotonic() > deadline:
            report(f"job {' '.join(left)}: not over after {wait_s} s; ended by Slurm")
            cli_client.scancel(left)
            break
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, LOOK_AT_LEAST_EVERY_S)
    for folder, names in wanted.items():
        for job in names:
            if job in live:  # its script may have been killed before it could say so
                ended = {"event": "ended", "job": job_events.bare(job), "decision": "cancelled"}
                job_events.record(folder, ended)
            report(f"job {job}: {_outcome(states[job], was_live=job in live)}")
        if names:
            step = RunDir(folder).newest_step()
            report(f"{folder}: `peft-dist resume {folder}` goes on after step {step}")


def _outcome(state: JobState, *, was_live: bool) -> str:
    if was_live:
        return "cancelled"
    if is_over(state.state):
        return "was over already"
    return f"cannot tell whether it is over: {state.reason}"


def _not_over(wanted: Sequence[str]) -> list[str]:
    return [job for job, state in job_states(wanted).items() if not is_over(state.state)]
