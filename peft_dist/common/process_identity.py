"""Which process wrote a record, and whether it still lives; exact on its own machine only.

Reads the kernel's tables and Slurm's environment. Compares no clocks and sends no signals.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from peft_dist.common.env import AFTER_JOB, LAUNCHER
from peft_dist.common.process_table import started_ticks


def this_process() -> dict[str, Any]:
    """Return what tells this process from every other one, on any machine, at any time."""
    boot_id = pid_namespace = None
    with suppress(OSError):  # no Linux
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        pid_namespace = str(Path("/proc/self/ns/pid").readlink())
    return {
        "host": os.uname().nodename,
        "pid": os.getpid(),
        "start_ticks": started_ticks(os.getpid()),
        "boot_id": boot_id,
        "pid_namespace": pid_namespace,
    }


def launcher() -> dict[str, Any] | None:
    """Return the `peft-dist` process that looks after this one; None where there is none."""
    with suppress(ValueError):
        record = json.loads(os.environ.get(LAUNCHER, ""))
        if isinstance(record, dict) and isinstance(record.get("pid"), int):
            return record
    return None


def is_launcher_gone() -> bool:
    """Whether the `peft-dist` process that looked after this one has ended."""
    record = launcher()
    return record is not None and is_alive(record) is False


def this_group() -> str:
    """Return what all processes of one start have in common, and those of no other start.

    They meet at one address, and a launcher that starts them again counts that.
    """
    names = (
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_RUN_ID",
        "TORCHELASTIC_RESTART_COUNT",
        "SLURM_RESTART_COUNT",
    )
    return " ".join(os.environ.get(name, "-") for name in names)


def slurm_job() -> dict[str, Any]:
    """Return the Slurm job this process runs in, and how often Slurm has requeued it."""
    restarts = os.environ.get("SLURM_RESTART_COUNT", "")
    return {
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "slurm_restart_count": int(restarts) if restarts.isdecimal() else 0,
    }


def is_this_process(record: dict[str, Any]) -> bool:
    """Whether this very process wrote a record."""
    return all(record.get(name) == value for name, value in this_process().items())


def is_alive(record: dict[str, Any]) -> bool | None:
    """Whether the process that wrote a record lives, or None where that cannot be seen here."""
    here = this_process()
    seen = here["pid_namespace"] is not None and all(
        record.get(name) == here[name] for name in ("boot_id", "pid_namespace")
    )
    if not seen or record.get("start_ticks") is None:
        return None
    # Pids are used again; with the start time they are not.
    return bool(started_ticks(record["pid"]) == record["start_ticks"])


def is_requeue_of(record: dict[str, Any]) -> bool:
    """Whether the record's job goes on as ours: what lives of it is a zombie.

    When slurmd is lost, the job is queued again while its processes may go on.
    """
    ours = slurm_job()
    before = os.environ.get(AFTER_JOB)
    if before is not None and record.get("slurm_job_id") == before:
        return True
    return (
        ours["slurm_job_id"] is not None
        and record.get("slurm_job_id") == ours["slurm_job_id"]
        and ours["slurm_restart_count"] > record.get("slurm_restart_count", 0)
    )
