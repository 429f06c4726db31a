"""One training process, from its command line to its exit code.

`accelerate launch`, `torchrun` or plain `python` start it through `launch/train.py`, as many times
as there are processes; it never starts others. What decides whether it may run at all comes first
and needs no torch.
"""

import argparse
import logging
import os
import sys
import time
from datetime import date
from pathlib import Path

from peft_dist.common.arguments import add_allow_changed
from peft_dist.common.console import to_rank_log
from peft_dist.common.env import WATCHED_LEASE
from peft_dist.common.errors import EXIT_DO_NOT_RETRY, RunDirError, TrainingError
from peft_dist.common.process_identity import is_launcher_gone
from peft_dist.common.process_table import started_ticks
from peft_dist.common.screen import stage
from peft_dist.config import Recipe, load_recipe
from peft_dist.config.batch_shape import require_settled
from peft_dist.config.run_date import date_in, with_date
from peft_dist.entrypoints.libraries import load_libraries
from peft_dist.run.directory import RunDir
from peft_dist.run.history import (
    ending_of_run,
    is_machine_start,
    is_superseded,
    read_history,
)
from peft_dist.run.lease import Attempt, end_for, refuse_if_held
from peft_dist.run.restart_policy import History, Kind, RestartLimits, decide, decide_by_attempts
from peft_dist.worker import signals
from peft_dist.worker.process import WorkerContext, fix_first, run_worker

log = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Train one recipe as one process of a world, or go on with it; return the exit code."""
    stop_requests = signals.install()
    to_rank_log()
    parser = argparse.ArgumentParser(prog="launch/train.py", description=main.__doc__)
    parser.add_argument("recipe", type=Path, help="recipe file, or that of a run directory")
    parser.add_argument("overrides", nargs="*", help="key=value, such as train.steps=10")
    parser.add_argument("--run-dir", type=Path, help="default: runs/NAME of the recipe file")
    parser.add_argument("--fresh", action="store_true", help="set a run that is there aside")
    add_allow_changed(parser)
    parser.add_argument("--deepspeed", type=Path, metavar="FILE", help="DeepSpeed JSON file")
    parser.add_argument("--local_rank", help="ignored: the deepspeed launcher's own")
    options = parser.parse_intermixed_args(argv)
    code = _exit_code_before_start(options)
    if code is not None:
        return code
    return run_worker(lambda context: _train(options, context, stop_requests))


def _run_of(options: argparse.Namespace) -> tuple[RunDir, bool]:
    """Return the run to train, and whether `peft-dist` has prepared it for this very start."""
    enclosing = RunDir.enclosing(options.recipe)
    if enclosing is not None and not options.overrides and not options.run_dir:
        return enclosing, True
    # The recipe of an earlier run may be the start of another.
    return RunDir((options.run_dir or Path("runs") / options.recipe.stem).absolute()), False


def _recipe_of(options: argparse.Namespace) -> Path:
    """Return the recipe file to train by: of a prepared run the changed one, where there is one."""
    run, prepared = _run_of(options)
    return run.next_recipe if prepared and run.next_recipe.exists() else options.recipe


def _is_restart() -> bool:
    """Whether torchrun starts the processes again, after one of them has ended early."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def _exit_code_before_start(options: argparse.Namespace) -> int | None:
    """Return the exit code of a start that nobody asked for, where the run has come to its end.

    torchrun starts again whatever does not end with 0, also what a signal or an error has ended.
    """
    if is_launcher_gone():  # torchrun starts the group again once its orphans have ended
        return signals.interrupted_code()
    if not (_is_restart() or is_machine_start()):
        return None
    run, _ = _run_of(options)
    if is_superseded(run.attempts):
        return EXIT_DO_NOT_RETRY
    ending = ending_of_run(run)
    if ending is None:
        return None
    # How often it has crashed is for the one rank to judge that takes the run.
    decision = decide(History(), ending, RestartLimits(after_signal=not _is_restart()))
    if decision.again:
        return None
    if ending.kind is Kind.DONE:
        end_for(run.attempts, "done")  # its holder may have been killed just before it said so
    if ending.kind is Kind.INTERRUPTED:
        end_for(run.attempts, "interrupted")  # where its ranks had the signal while they loaded
        return signals.interrupted_code()
    return decision.exit_code


def _train(
    options: argparse.Namespace, context: WorkerContext, stop_requests: signals.StopRequests
) -> None:
    started_s = time.monotonic() - process_age_s()
    context.run_dir = _run_of(options)[0]
    stop_requests.end_setup_by(context.stopped_in_setup)
    recipe = load_recipe(_recipe_of(options), options.overrides)
    require_settled(recipe)
    if context.rank == 0:
        _take(options, recipe, context)
        recipe = with_date(recipe, _date_of_run(context.run_dir))
    # Only now, for it takes seconds: torch, transformers and all that stands on them.
    if "peft_dist.finetune" in sys.modules:  # by the process that this one was forked from
        load_libraries()
    else:
        with stage("loading torch and transformers", log) as told:
            load_libraries()
            told.append("libraries loaded")
    from peft_dist.finetune import fine_tune
    from peft_dist.sharding.launcher_env import deepspeed_exports

    if options.deepspeed is not None:
        os.environ.update(deepspeed_exports(options.deepspeed))
    fine_tune(
        recipe,
        context,
        stop_requests,
        logs=context.run_dir.logs,
        started_s=started_s,
        allow_changed=options.allow_changed,
    )


def _take(options: argparse.Namespace, recipe: Recipe, context: WorkerContext) -> None:
    """Take the run directory for this attempt, as rank 0.

    Raises:
        RunDirError: Where another process holds it, it has finished, learns otherwise, or cannot
            be written.
        TrainingError: Where starting again cannot help.
    """
    run, prepared = _run_of(options)
    watched = os.environ.get(WATCHED_LEASE, "")
    run.require_writable()
    if not prepared:
        fresh = options.fresh and not _is_restart()
        watched = refuse_if_held(run.attempts)
        run = RunDir.claim(
            run.path,
            recipe,
            command=sys.argv,
            fresh=fresh,
            allow_changed=options.allow_changed,
        )
    elif run.is_finished:
        raise RunDirError(
            "holds a run that has finished",
            where=str(run.path),
            remedy="name another folder with --run-dir",
        )
    # A person who starts again after a failure has done something about it.
    after_failure = run.read_failure() is not None
    attempt = Attempt.begin(
        run.attempts, after_verdict=after_failure, world_size=context.size, watched=watched
    )
    context.run_dir, context.attempt, context.attempt_number = run, attempt, attempt.number
    run.remove_leftovers()
    if after_failure:
        run.failure.unlink(missing_ok=True)
    decision = decide_by_attempts(read_history(run, before=attempt.number))
    if decision is not None and decision.word == "stop":
        raise TrainingError(decision.reason, where=str(run.path), remedy=fix_first(run))


def _date_of_run(run: RunDir) -> date | None:
    return date_in(run.next_recipe) if run.next_recipe.exists() else date_in(run.recipe)


def process_age_s() -> float:
    """Return the seconds since this process was started, its interpreter's start among them."""
    ticks = started_ticks(os.getpid())
    if ticks is None:  # no Linux
        return 0.0
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
