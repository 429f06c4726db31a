"""Run Slurm's own commands: argument lists, no shell, and its own words where it refuses."""

import os
import subprocess
from collections.abc import Mapping, Sequence

from peft_dist.common.errors import SlurmError


def run_slurm(
    argv: Sequence[str],
    *,
    timeout_s: float | None = 30,
    environment: Mapping[str, str] | None = None,
    text: str | None = None,
    with_errors: bool = False,
) -> str:
    """Return what a command prints.

    Args:
        argv: The command.
        timeout_s: How long it may take; None for as long as it takes.
        environment: Its whole environment. Default: ours.
        text: What it reads on standard input.
        with_errors: Whether to return what it prints on standard error too.

    Raises:
        SlurmError: Where there is no such command, or it fails, in its own words.
    """
    try:
        done = subprocess.run(
            list(argv),
            input=text or "",
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env=dict(environment) if environment is not None else None,
            check=False,
        )
    except FileNotFoundError as error:
        raise SlurmError(
            "no such command", where=argv[0], remedy="run this where Slurm's commands are"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"no answer in {error.timeout:g} s", where=argv[0]) from error
    except OSError as error:
        raise SlurmError(f"cannot be run: {error}", where=argv[0]) from error
    if done.returncode:
        if "configuration source" in done.stderr:  # said over several lines
            raise SlurmError(
                "finds neither a slurm.conf nor a controller",
                where=argv[0],
                remedy="run this on a login node of the cluster",
            )
        output = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        raise SlurmError(output.removeprefix(f"{argv[0]}: error: "), where=argv[0])
    return done.stdout + (done.stderr if with_errors else "")


def ask_slurm(argv: Sequence[str], *, timeout_s: float) -> str:
    """Return what a command answers, whatever the user has set for their own use of it.

    Args:
        argv: The command: squeue, sacct or sshare, say.
        timeout_s: How long it may take.

    Raises:
        SlurmError: As `run_slurm`.
    """
    # A user's SQUEUE_PARTITION, say, would hide jobs from us.
    own = ("SQUEUE_", "SACCT_")
    environment = {name: text for name, text in os.environ.items() if not name.startswith(own)}
    return run_slurm(argv, timeout_s=timeout_s, environment=environment)


def scancel(jobs: Sequence[str], *, options: Sequence[str] = ()) -> None:
    """Cancel jobs, or with `--signal` signal their steps.

    Raises:
        SlurmError: Where Slurm refuses.
    """
    for cluster, own in by_cluster(jobs).items():
        run_slurm(["scancel", *of_cluster(cluster), *options, *own])


def by_cluster(jobs: Sequence[str]) -> dict[str, list[str]]:
    """Return the ids of jobs by their cluster, of names such as `12@cluster`; else by an empty one.

    One controller knows nothing of the other's jobs, and numbers them as it likes.
    """
    found: dict[str, list[str]] = {}
    for job in jobs:
        own, _, cluster = job.partition("@")
        found.setdefault(cluster, []).append(own)
    return found


def of_cluster(cluster: str) -> list[str]:
    """Return the option by which Slurm's commands ask another cluster than their own."""
    return [f"--clusters={cluster}"] if cluster else []
