"""Run workers on this machine to their end, and report in one line how they ended.

A launcher's own exit code only says that a process failed: how a training ended stands in its run
directory, and what ended any other command in the file of the worker that failed.
"""

import json
import logging
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
from peft_dist.common.console import clear_bar, say
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
from peft_dist.common.logs import NOTICE
from peft_dist.common.process_identity import this_process
from peft_dist.config import Recipe, load_recipe, render_recipe
from peft_dist.config.resume_rules import all_settings, differences
from peft_dist.config.run_date import with_date
from peft_dist.data.first_rows import check_first_rows
from peft_dist.launch.command import launch_environment, worker_command
from peft_dist.launch.launcher_process import run_launcher
from peft_dist.launch.model_folder import check_model_folder
from peft_dist.launch.placement import Placement, plan_processes, this_machine
from peft_dist.ledger.events import StepEvent
from peft_dist.ledger.reader import LedgerReader
from peft_dist.run.attempt_records import latest
from peft_dist.run.directory import RunDir
from peft_dist.run.history import ending_of_launch, mark_launch
from peft_dist.run.holder import wait_for_orphans
from peft_dist.run.lease import end_for, refuse_if_held
from peft_dist.run.prediction import Prediction, as_measured, write_prediction
from peft_dist.run.restart_policy import Ending, History, Kind, RestartLimits, decide

log = logging.getLogger(__name__)

LOG_TAIL_LINES = 15
"""Lines of the launcher's log shown after an end that nobody foresaw."""

KILLED_WAIT_S = 10.0
"""How long a killed process that held the run may take to go."""

LEAST_FREE_BYTES = 1 << 16
"""Below this a disk is full: some file systems keep a little that nobody can have."""


@dataclass(frozen=True)
class LocalLaunch:
    """A training that is ready to be started on this machine."""

    recipe: Recipe
    run: RunDir
    """Where; not made or taken yet."""
    placement: Placement
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
    check_model_folder(recipe)
    check_first_rows(recipe)
    changed = [word for field in allow_changed for word in ("--allow-changed", field)]
    command = worker_command(
        placement,
        "train.py",
        [str(run.recipe), *changed],
        max_restarts=recipe.parallel.max_restarts,
    )
    environment = launch_environment(placement, environ)
    return LocalLaunch(recipe, run, placement, command, environment, allow_changed, prediction)


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
    recipe, prediction = start.recipe, start.prediction
    if not fresh:
        recipe, prediction = as_measured(start.run, recipe, prediction)
    run = RunDir.claim(
        start.run.path,
        recipe,
        command=start.command,
        fresh=fresh,
        allow_changed=start.allow_changed,
    )
    write_prediction(run, prediction)
    _introduce(start)
    before = mark_launch(run)
    facts = {LAUNCHED_AT: repr(time.time()), WATCHED_LEASE: watched}
    environment = start.environment | _launcher() | facts
    errors = run.launcher_log
    ended = run_launcher(start.command, environment=environment, error_log=errors, tell=_tell)
    clear_bar()
    if not run.path.exists():
        gone = RunDirGone(run.path)
        return fail(str(gone), gone.exit_code)
    ending = ending_of_launch(
        run,
        before=before,
        signal=ended.signal_name,
        failure=ended.failure,
        otherwise=Ending(Kind.CRASHED, f"a worker failed; see {errors}"),
    )
    # Only torchrun starts again here; a person reads what would come of another start.
    decision = decide(History(run.newest_step()), ending, RestartLimits())
    if not decision.again:
        return EXIT_DONE if ending.kind is Kind.DONE else fail(decision.reason, decision.exit_code)
    step = run.newest_step()
    after = f"goes on after step {step}" if step else "begins anew: there is no checkpoint"
    go_on = f"`peft-dist resume {run.path}` {after}"
    if ending.kind is Kind.INTERRUPTED:
        facts = {} if ending.signal is None else {"signal": ending.signal}
        how = ending.error
        if ended.killed and (lost := _lost_steps(run)):
            facts["error"] = lost
            how = f"{how} without saving; {lost}"
        end_for(run.attempts, "interrupted", wait_s=KILLED_WAIT_S, **facts)
        say(f"peft-dist: {how}; {go_on}", sys.stderr)
        return decision.exit_code
    refusal = _refusal_of_disk(run.path)
    if refusal is not None:  # then no process could leave its error there
        return fail(f"{run.path}: {refusal}; {go_on}", EXIT_DO_NOT_RETRY)
    _print_tail(errors)
    return fail(f"{ending.error}; {go_on}", decision.exit_code)


def run_here(command: Sequence[str], environment: Mapping[str, str], *, error_log: Path) -> int:
    """Run workers that keep no state to their end; return the exit code."""
    environment = {**environment, **_launcher()}
    log.info("starting the processes; loading torch and transformers")
    ended = run_launcher(command, environment=environment, error_log=error_log, tell=_tell)
    clear_bar()
    if ended.code == EXIT_DONE:
        return EXIT_DONE
    if ended.signal_name is not None:
        return fail(f"stopped by {ended.signal_name}", ended.code)
    if ended.failure is not None:
        return fail(ended.failure.error, ended.failure.exit_code)
    _print_tail(error_log)
    return fail(f"a worker failed; see {error_log}", EXIT_CRASHED)


def _introduce(start: LocalLaunch) -> None:
    """Say what is about to be done, before the libraries are loaded, which takes seconds."""
    recipe, run, placement = start.recipe, start.run, start.placement
    step = run.newest_step()
    log.info("run directory: %s", run.path)
    log.info(
        "model: %s (%s), %s adapters; rows: %s", recipe.model.name, recipe.quantization,
        recipe.method.kind, ", ".join(source.path for source in recipe.data.sources("train")),
    )  # fmt: skip
    where = "a GPU each" if placement.on_gpu else "the CPU"
    many = "1 process" if placement.processes == 1 else f"{placement.processes} processes"
    log.info(
        "starting %s (%s) on %s%s; loading torch and transformers", many, placement.strategy, where,
        f", from step {step}" if step else "",
    )  # fmt: skip


def _tell(text: str) -> None:
    clear_bar()
    log.log(NOTICE, "%s", text)


def _lost_steps(run: RunDir) -> str:
    """Return which steps the newest attempt has trained and not saved, or nothing."""
    newest, saved = latest(run.attempts) or {}, run.newest_step()
    found = LedgerReader(run.ledger).tail(1, StepEvent)
    steps = [
        event.step
        for event in found
        if isinstance(event, StepEvent) and event.attempt == newest.get("attempt")
    ]
    lost = range(saved + 1, max(steps, default=0) + 1)
    if not lost:
        return ""
    return f"step {lost[0]} is lost" if len(lost) == 1 else f"steps {lost[0]}-{lost[-1]} are lost"


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
