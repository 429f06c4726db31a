"""Run Slurm's own commands: argument lists, no shell, and its own words where it refuses."""

import subprocess
from collections.abc import Mapping, Sequence

from peft_dist.common.errors import SlurmError


def run_slurm(
    argv: Sequence[str],
    *,
    timeout_s: float | None = 30,
    environment: Mapping[str, str] | None = None,
    text: str | None = None,
) -> str:
    """Return what a command prints.

    Args:
        argv: The command.
        timeout_s: How long it may take; None for as long as it takes.
        environment: Its whole environment. Default: ours.
        text: What it reads on standard input.

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
    return done.stdout


def scancel(jobs: Sequence[str], *, options: Sequence[str] = ()) -> None:
    """Cancel jobs, or with `--signal` signal their steps.

    Raises:
        SlurmError: Where Slurm refuses.
    """
    run_slurm(["scancel", *options, *jobs])
