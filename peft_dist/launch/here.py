"""Run workers on this machine to their end, and say in one line how that was.

What a training came to stands in its run directory: a launcher's own exit code only says that a
process failed.
"""

import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from os import environ
from pathlib import Path
from shutil import disk_usage

from peft_dist.common.console import say
from peft_dist.common.errors import (
    ERROR_PREFIX,
    EXIT_CRASHED,
    EXIT_DO_NOT_RETRY,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
)
from peft_dist.config import Recipe
from peft_dist.launch.command import launch_environment, worker_command
from peft_dist.launch.local import run_launcher
from peft_dist.launch.placement import place, this_machine
from peft_dist.run.directory import LAUNCHED_AT, RunDir, error_in_log
from peft_dist.run.lease import end_for, refuse_if_held

LOG_TAIL_LINES = 15
"""Lines of the launcher's log shown after an end that nobody foresaw."""

LEAST_FREE_BYTES = 1 << 16
"""Below this a disk is full: some file systems keep a little that nobody can have."""


@dataclass(frozen=True)
class Start:
    """A training that is ready to be started on this machine."""

    recipe: Recipe
    run: RunDir
    """Where; not made or taken yet."""
    strategy: str
    command: list[str]
    environment: dict[str, str]
    allow_changed: Collection[str]


def prepare(recipe: Recipe, folder: Path, *, allow_changed: Collection[str] = ()) -> Start:
    """Work out what starts a recipe here; make and start nothing.

    Raises:
        LaunchError: For more processes than GPUs, or processes that shards do not divide.
    """
    placement = place(recipe, this_machine())
    run = RunDir(folder.absolute())
    changed = [word for field in allow_changed for word in ("--allow-changed", field)]
    command = worker_command(
        placement,
        "train.py",
        [str(run.recipe), *changed],
        max_restarts=recipe.parallel.max_restarts,
    )
    environment = launch_environment(placement, environ)
    return Start(recipe, run, placement.strategy, command, environment, allow_changed)


def train_here(start: Start, *, fresh: bool = False) -> int:
    """Train to the end, or go on with what is there; return the exit code.

    Args:
        start: What `prepare` returned.
        fresh: Set a run that is there aside and start anew.

    Raises:
        RunDirError: Where another process holds the run, or it has finished, or learns otherwise.
    """
    refuse_if_held(start.run.attempts, fresh=fresh)
    run = RunDir.claim(
        start.run.path,
        start.recipe,
        command=start.command,
        fresh=fresh,
        allow_changed=start.allow_changed,
    )
    log = run.launcher_log
    log_start = log.stat().st_size if log.exists() else 0
    verdict_before = run.verdict()
    environment = start.environment | {LAUNCHED_AT: repr(time.time())}
    ended = run_launcher(start.command, environment=environment, error_log=log)
    if run.is_finished:
        return EXIT_DONE
    verdict = run.verdict()
    if verdict is not None and verdict != verdict_before:
        return complain(verdict.error, verdict.exit_code)
    go_on = f"`peft-dist resume {run.path}` goes on after step {run.newest_step()}"
    if ended.signal_name is not None or run.was_interrupted:
        told = {} if ended.signal_name is None else {"signal": ended.signal_name}
        end_for(run.attempts, "interrupted", **told)
        say(f"peft-dist: stopped by {ended.signal_name or 'a signal'}; {go_on}", sys.stderr)
        return EXIT_INTERRUPTED
    error = error_in_log(log, log_start)
    if error is not None:
        return complain(error, EXIT_USER_ERROR)
    if disk_usage(run.path).free < LEAST_FREE_BYTES:  # then there was no room for any word of it
        return complain(
            f"{run.path}: No space left on device; free some; {go_on}", EXIT_DO_NOT_RETRY
        )
    _print_tail(log)
    return complain(f"a worker failed; see {log}; {go_on}", EXIT_CRASHED)


def run_here(command: Sequence[str], environment: Mapping[str, str], *, log: Path) -> int:
    """Run workers that keep no state to their end; return the exit code."""
    ended = run_launcher(command, environment=environment, error_log=log)
    if ended.code == EXIT_DONE:
        return EXIT_DONE
    if ended.signal_name is not None:
        return complain(f"stopped by {ended.signal_name}", ended.code)
    told = error_in_log(log)
    if told is not None:
        return complain(told, EXIT_USER_ERROR)
    _print_tail(log)
    return complain(f"a worker failed; see {log}", EXIT_CRASHED)


def complain(line: str, code: int) -> int:
    """Print a fault as every fault is printed; return its exit code."""
    say(f"{ERROR_PREFIX}{line}", sys.stderr)
    return code


def _print_tail(log: Path) -> None:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # the log is a convenience here; its path is printed anyway
        return
    say("\n".join(lines[-LOG_TAIL_LINES:]), sys.stderr)
