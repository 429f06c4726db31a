"""Run workers on this machine to their end, and report in one line how they ended.

A launcher's own exit code only says that a process failed: how a training ended stands in its run
directory, and what ended any other command in the file of the worker that failed.
"""

import json
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from os import environ
from pathlib import Path
from shutil import disk_usage
from tempfile import TemporaryFile

from peft_dist.common.cache_folder import usable_cache_dir
from peft_dist.common.console import say
from peft_dist.common.env import LAUNCHED_AT, LAUNCHER, WATCHED_LEASE
from peft_dist.common.errors import (
    ERROR_PREFIX,
    EXIT_CRASHED,
    EXIT_DO_NOT_RETRY,
    EXIT_DONE,
    PeftDistError,
    RunDirError,
    RunDirGone,
)
from peft_dist.common.process_identity import this_process
from peft_dist.config import Recipe, load_recipe, render_recipe
from peft_dist.config.resume_rules import all_settings, differences
from peft_dist.config.run_date import with_date
from peft_dist.data.first_rows import check_first_rows
from peft_dist.launch.command import launch_environment, worker_command
from peft_dist.launch.local import run_launcher
from peft_dist.launch.placement import plan_processes, this_machine
from peft_dist.run.directory import RunDir
from peft_dist.run.history import ending_of_launch, mark_launch
from peft_dist.run.holder import wait_for_orphans
from peft_dist.run.lease import end_for, refuse_if_held
from peft_dist.run.prediction import Prediction, write_prediction
from peft_dist.run.restart_policy import Ending, History, Kind, RestartLimits, decide

LOG_TAIL_LINES = 15
"""Lines of the launcher's log shown after an end that nobody foresaw."""

LEAST_FREE_BYTES = 1 << 16
"""Below this a disk is full: some file systems keep a little that nobody can have."""


@dataclass(frozen=True)
class LocalLaunch:
    """A training that is ready to be started on this machine."""

    recipe: Recipe
    run: RunDir
    """Where; not made or taken yet."""
    strategy: str
    command: list[str]
    environment: dict[str, str]
    allow_changed: Collection[str]
    prediction: Prediction | None
    """What the plan says of it, for the record."""


def prepare(
    recipe: Recipe,
    folder: Path,
    *,
    allow_changed: Collection[str] = (),
    prediction: Prediction | None = None,
) -> LocalLaunch:
    """Work out what starts a recipe here; make and start nothing.

    Args:
        recipe: What to train.
        folder: Of the run.
        allow_changed: Settings that may differ from those the run was trained with.
        prediction: What the plan says of it, for the record.

    Raises:
        LaunchError: For more processes than GPUs, or processes that shards do not divide.
        DataError: For rows that cannot be read, as far as the first of them tell.
        RunDirError, CacheError: For a folder that the training could not write to.
    """
    placement = plan_processes(recipe, this_machine())
    run = RunDir(folder.absolute())
    run.require_writable()
    usable_cache_dir()
    check_first_rows(recipe)
    changed = [word for field in allow_changed for word in ("--allow-changed", field)]
    command = worker_command(
        placement,
        "train.py",
        [str(run.recipe), *changed],
        max_restarts=recipe.parallel.max_restarts,
    )
    environment = launch_environment(placement, environ)
    strategy = placement.strategy
    return LocalLaunch(recipe, run, strategy, command, environment, allow_changed, prediction)


def train_here(start: LocalLaunch, *, fresh: bool = False) -> int:
    """Train to the end, or go on with what is there; return the exit code.

    Of a run that has finished with the same recipe one line says so, and nothing is started.

    Args:
        start: What `prepare` returned.
        fresh: Set a run that is there aside and start anew.

    Raises:
        RunDirError: Where another process holds the run, or it has finished with another recipe, or
            learns otherwise.
    """
    wait_for_orphans(start.run.attempts)
    watched = refuse_if_held(start.run.attempts)
    if not fresh and _has_finished(start.run, start.recipe):
        say(f"{start.run.path} has finished; nothing is left to do")
        return EXIT_DONE
    run = RunDir.claim(
        start.run.path,
        start.recipe,
        command=start.command,
        fresh=fresh,
        allow_changed=start.allow_changed,
    )
    write_prediction(run, start.prediction)
    log = run.launcher_log
    before = mark_launch(run)
    facts = {LAUNCHED_AT: repr(time.time()), WATCHED_LEASE: watched}
    environment = start.environment | _launcher() | facts
    ended = run_launcher(start.command, environment=environment, error_log=log)
    if not run.path.exists():
        gone = RunDirGone(run.path)
        return fail(str(gone), gone.exit_code)
    ending = ending_of_launch(
        run,
        before=before,
        signal=ended.signal_name,
        failure=ended.failure,
        otherwise=Ending(Kind.CRASHED, f"a worker failed; see {log}"),
    )
    # Only torchrun starts again here; a person reads what would come of another start.
    decision = decide(History(run.newest_step()), ending, RestartLimits())
    if not decision.again:
        return EXIT_DONE if ending.kind is Kind.DONE else fail(decision.reason, decision.exit_code)
    go_on = f"`peft-dist resume {run.path}` goes on after step {run.newest_step()}"
    if ending.kind is Kind.INTERRUPTED:
        signal = {} if ending.signal is None else {"signal": ending.signal}
        end_for(run.attempts, "interrupted", **signal)
        say(f"peft-dist: {ending.error}; {go_on}", sys.stderr)
        return decision.exit_code
    refusal = _refusal_of_disk(run.path)
    if refusal is not None:  # then no process could leave its error there
        return fail(f"{run.path}: {refusal}; {go_on}", EXIT_DO_NOT_RETRY)
    _print_tail(log)
    return fail(f"{ending.error}; {go_on}", decision.exit_code)


def run_here(command: Sequence[str], environment: Mapping[str, str], *, log: Path) -> int:
    """Run workers that keep no state to their end; return the exit code."""
    environment = {**environment, **_launcher()}
    ended = run_launcher(command, environment=environment, error_log=log)
    if ended.code == EXIT_DONE:
        return EXIT_DONE
    if ended.signal_name is not None:
        return fail(f"stopped by {ended.signal_name}", ended.code)
    if ended.failure is not None:
        return fail(ended.failure.error, ended.failure.exit_code)
    _print_tail(log)
    return fail(f"a worker failed; see {log}", EXIT_CRASHED)


def fail(line: str, code: int) -> int:
    """Print an error as every error is printed; return its exit code."""
    say(f"{ERROR_PREFIX}{line}", sys.stderr)
    return code


def _refusal_of_disk(folder: Path) -> str | None:
    """Return why nothing can be written to a folder, with the remedy; None where that can be."""
    try:
        if disk_usage(folder).free < LEAST_FREE_BYTES:
            return "No space left on device; free some"
        # What the kernel says of a file system that an error made read-only may be out of date.
        with TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"{error.strerror or error}; let it be written to again"


def _has_finished(run: RunDir, recipe: Recipe) -> bool:
    """Whether a run has finished with a recipe; on which processes makes no difference then."""
    if not run.is_finished:
        return False
    with suppress(PeftDistError):  # of another version: not the same, as far as we know
        old = load_recipe(RunDir.open(run.path).recipe, check_paths=False)
        old = old.model_copy(update={"parallel": recipe.parallel})
        return render_recipe(old) == render_recipe(with_date(recipe, old.data.date))
    return False


def refuse_changes_of_finished(run: RunDir, overrides: Sequence[str]) -> None:
    """Refuse settings that nothing would be trained with any more.

    Raises:
        RunDirError: Naming the first setting that differs, with both values.
    """
    had, wanted = (
        all_settings(load_recipe(run.recipe, words, check_paths=False), without=["parallel"])
        for words in ((), overrides)
    )
    changes = differences(had, wanted)
    for field, change in changes.items():
        raise RunDirError(
            f"holds a run that has finished, and {field} would be another: {change}",
            where=str(run.path),
            remedy="train the changed recipe with another --run-dir",
        )


def _launcher() -> dict[str, str]:
    """Return the variable by which workers see that this command was killed."""
    return {LAUNCHER: json.dumps(this_process())}


def _print_tail(log: Path) -> None:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # the log is a convenience here; its path is printed anyway
        return
    say("\n".join(lines[-LOG_TAIL_LINES:]), sys.stderr)
