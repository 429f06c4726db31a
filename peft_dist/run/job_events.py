"""Write and read the events of a run's Slurm jobs: one JSON line each, in the run directory.

The batch script appends its own lines to the same file.
"""

import fcntl
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from peft_dist.common.errors import RunDirError
from peft_dist.common.sharing import file_mode, folder_mode

Event = dict[str, Any]
"""`event` (submitted, started, decided, ended), `job` as `squeue -r` prints it, `time` and more;
`cluster` where Slurm has several."""
SUBMISSION = ("submitting", "queued", "refused")
"""Events that say how one submission goes, and nothing of a job: `submitting` has the `token` by
which Slurm knows the job where nobody learned its id."""

LOCK_WAIT_S = 5.0
"""How long a writer waits for another one; one that is cut off may never let go."""


def jobs_file(run_path: Path) -> Path:
    """Return the file of a run's job events."""
    return run_path / "slurm" / "jobs.jsonl"


def record(run_path: Path, event: Event) -> None:
    """Append one event, durably: a job id that is lost is a job nobody can find again.

    Args:
        run_path: The run directory; its `slurm/` is made where it is missing.
        event: What to say; `time` is now where it has none.

    Raises:
        RunDirError: Where it cannot be written.
    """
    path = jobs_file(run_path)
    line = (json.dumps(event | {"time": event.get("time", time.time())}) + "\n").encode()
    try:
        path.parent.mkdir(mode=folder_mode(), exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, file_mode())
        try:
            _wait_for_others(file)
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":  # of a writer that was killed
                line = b"\n" + line
            if os.write(file, line) < len(line):
                raise OSError(0, "the disk took half a line")
            os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:
        raise RunDirError(
            f"cannot be written: {error.strerror}",
            where=str(path),
            remedy="free space or set its permissions",
        ) from error


def _wait_for_others(file: int) -> None:
    """Have the file for ourselves: NFS finds its end for two writers at once only under a lock."""
    deadline = time.monotonic() + LOCK_WAIT_S
    with suppress(OSError):  # no locks here
        while True:
            try:
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return None
                time.sleep(0.05)


def events(run_path: Path) -> list[Event]:
    """Return all events, the oldest first; lines that are none, such as a half one, are left out.

    So is what a start of a job wrote after another one had begun: a node that was given up may
    live on.

    Raises:
        RunDirError: Where the file is there and cannot be read.
    """
    found: list[Event] = []
    begun: list[tuple[str, Any]] = []
    for event in _all_events(run_path):
        if event["event"] in SUBMISSION:
            continue
        start = (event["job"], event.get("restart"))
        if event["event"] == "started":
            begun.append(start)
        if start not in begun[:-1]:
            found.append(event)
    return found


def others(run_path: Path) -> list[str]:
    """Return jobs that began before the newest one and have not said that they ended.

    Named as `candidates` does.

    A script that is submitted by hand while another job trains the run gives up, and is the newest.

    Raises:
        RunDirError: As `events`.
    """
    told = [event for event in _all_events(run_path) if event["event"] not in SUBMISSION]
    last = {event["job"]: event["event"] for event in told}
    names = [job for job, event in list(last.items())[:-1] if event in ("submitted", "started")]
    return [job + _at_cluster(told) for job in names]


def bare(job: str) -> str:
    """Return a job as Slurm's own cluster knows it, of a name such as `12_3@cluster`."""
    return job.partition("@")[0]


def _at_cluster(told: Sequence[Event]) -> str:
    """Return what a job's name ends with where it is of one of several clusters."""
    named = [event["cluster"] for event in told if event.get("cluster")]
    return f"@{named[-1]}" if named else ""


def open_submission(run_path: Path) -> Event | None:
    """Return the newest submission where nobody has noted what came of it.

    Raises:
        RunDirError: As `events`.
    """
    known = ("submitted", "started", *SUBMISSION)
    told = [event for event in _all_events(run_path) if event["event"] in known]
    if told and told[-1]["event"] == "submitting" and isinstance(told[-1].get("token"), str):
        return told[-1]
    return None


def _all_events(run_path: Path) -> list[Event]:
    path = jobs_file(run_path)
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunDirError(
            f"cannot be read: {error.strerror}", where=str(path), remedy="set its permissions"
        ) from error
    return [event for line in lines if (event := _parse(line)) is not None]


def newest_job(run_path: Path) -> str | None:
    """Return the job that was submitted or started last, or None for a run that had none.

    Raises:
        RunDirError: As `events`.
    """
    return newest_of(events(run_path))


def newest_of(history: Sequence[Event]) -> str | None:
    """Return the job of the last `submitted` or `started` event."""
    jobs = [event["job"] for event in history if event["event"] in ("submitted", "started")]
    return jobs[-1] if jobs else None


def candidates(run_path: Path, history: Sequence[Event]) -> list[str]:
    """Return the jobs that may be live: the newest, and those queued to take over from it.

    A name ends with `@cluster` where the run was submitted to one of several.

    Args:
        run_path: The run directory.
        history: Its `events`.
    """
    newest = newest_of(history)
    if newest is None:
        return []
    cluster = _at_cluster(history)
    with suppress(OSError, UnicodeDecodeError):
        queued = (run_path / "slurm" / "successor").read_text(encoding="utf-8").split()
        # sbatch prints no element: a successor has one where its run is one of an array.
        _, underscore, element = newest.partition("_")
        jobs = [successor + underscore + element for successor in queued]
        known = {event["job"] for event in history}
        return [name + cluster for name in (newest, *(job for job in jobs if job not in known))]
    return [newest + cluster]


def _parse(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    if not isinstance(event, dict):
        return None
    fits = isinstance(event.get("event"), str) and isinstance(event.get("job"), str)
    return event if fits else None


def newest_logs(run_path: Path, history: Sequence[Event]) -> Path | None:
    """Return the folder of what the newest start of a job left beside its logs.

    Args:
        run_path: The run directory.
        history: Its `events`.
    """
    starts = [event for event in history if event["event"] == "started"]
    if not starts:
        return None
    return run_path / "logs" / f"{starts[-1]['job']}-{starts[-1].get('restart', 0)}"


def this_job() -> str:
    """Return the job that this process runs in, as `squeue -r` prints it."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID", "")
