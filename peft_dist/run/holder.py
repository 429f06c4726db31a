"""Find the processes that hold a run on this machine, stop them, and wait for their end."""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from peft_dist.common.console import say
from peft_dist.common.errors import RunDirError
from peft_dist.common.process_identity import is_alive
from peft_dist.run.attempt_records import Record, latest
from peft_dist.run.directory import RunDir

ORPHANS_WAIT_S = 120.0
"""How long workers whose command was killed may take to save and end before a start is refused."""
LOOK_EVERY_S = 0.1


def wait_for_orphans(folder: Path, *, wait_s: float = ORPHANS_WAIT_S) -> None:
    """Wait until workers whose command was killed have ended, which they do by themselves.

    Takes no time where the run is not held, or its command lives.

    Args:
        folder: The run's folder of attempts.
        wait_s: How long to wait; whether they are gone then is for the lease to say.
    """
    with suppress(OSError):  # `refuse_if_held` says so in one line
        record = latest(folder)
        if record is None or not _is_orphan(record):
            return
        say(
            f"peft-dist: the command that held this run was killed; waiting up to {wait_s:.0f} s "
            f"until its process {record['pid']} has saved and ended",
            sys.stderr,
        )
        wait_for_end(record, wait_s=wait_s)


def stop_holder(run: RunDir, *, wait_s: float) -> str:
    """Have what trains a run on this machine save and end; return one line about its end.

    SIGTERM goes to its `peft-dist` command, which passes it on to the workers. Without a command
    (`torchrun`, `accelerate launch`) it goes to rank 0, which tells the others: torchrun would kill
    those that need more than 30 s to save.

    Args:
        run: The run.
        wait_s: How long to wait for the end.

    Raises:
        RunDirError: Where nothing trains it here, it is a Slurm job, or it has not ended in time.
    """
    try:
        record = latest(run.attempts) or {}
    except OSError as error:
        raise RunDirError(
            f"cannot be read: {error.strerror}",
            where=str(run.attempts),
            remedy="fix its permissions",
        ) from error
    command = record.get("launcher")
    # The command comes first: between two attempts it is all that lives.
    living = [process for process in (command, record) if process and is_alive(process)]
    by_slurm = record.get("slurm_job_id") is not None and (run.path / "slurm").is_dir()
    if by_slurm or not living:
        raise _not_stoppable(run, record)
    target = living[0]["pid"]
    try:
        os.kill(target, signal.SIGTERM)
    except ProcessLookupError:
        pass  # ended just now
    except PermissionError as error:
        raise RunDirError(
            f"is trained by another user's process {target}",
            where=str(run.path),
            remedy="ask that user to stop it",
        ) from error
    if not wait_for_end(*living, wait_s=wait_s):
        raise RunDirError(
            f"process {target} has SIGTERM but has not ended within {wait_s:g} s",
            where=str(run.path),
            remedy="give the command again, with a longer --wait-s",
        )
    if run.is_finished:
        return f"{run.path} has finished"
    go_on = f"`peft-dist resume {run.path}` goes on after step {run.newest_step()}"
    return f"{run.path} has stopped; {go_on}"


def wait_for_end(*processes: Record, wait_s: float) -> bool:
    """Wait until processes of this machine have ended; return whether they have.

    Args:
        processes: What `process_identity.this_process` returned in each.
        wait_s: How long to wait.
    """
    deadline = time.monotonic() + wait_s
    while any(is_alive(process) for process in processes):
        if time.monotonic() >= deadline:
            return False
        time.sleep(LOOK_EVERY_S)
    return True


def _not_stoppable(run: RunDir, record: Record) -> RunDirError:
    where, problem = str(run.path), "is trained by no process of this machine"
    has_ended = "pid" not in record or "outcome" in record or is_alive(record) is False
    if (run.path / "slurm").is_dir():
        job = record.get("slurm_job_id")
        if job is not None and not has_ended:
            problem = f"is trained by Slurm job {job}"
        return RunDirError(problem, where=where, remedy=f"use `peft-dist cancel {run.path}`")
    if not has_ended:
        return RunDirError(
            f"process {record['pid']} on host {record['host']} holds it, which cannot be seen here",
            where=where,
            remedy=f"give `peft-dist stop {run.path}` on host {record['host']}",
        )
    remedy = "nothing is left to stop"
    if not run.is_finished:
        remedy += f"; `peft-dist resume {run.path}` goes on with it"
    return RunDirError(problem, where=where, remedy=remedy)


def _is_orphan(record: Record) -> bool:
    launcher = record.get("launcher")
    return bool(launcher and is_alive(launcher) is False and is_alive(record))
