"""One training process, from its command line to its exit code.

`accelerate launch`, `torchrun` or plain `python` start it through `launch/train.py`, as many times
as there are processes; it never starts others. What decides whether it may run at all comes first
and needs no torch.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from peft_dist.common.console import to_rank_log
from peft_dist.common.errors import EXIT_DONE, RunDirError, TrainingError
from peft_dist.common.process_identity import AFTER_JOB
from peft_dist.config import Recipe, load_recipe
from peft_dist.run.directory import RunDir
from peft_dist.run.lease import Attempt, end_for, refuse_if_held
from peft_dist.run.restart_policy import verdict
from peft_dist.worker import signals
from peft_dist.worker.process import Place, run_worker


def main(argv: list[str]) -> int:
    """Train one recipe as one process of a world, or go on with it; return the exit code."""
    stop_requests = signals.install()
    to_rank_log()
    parser = argparse.ArgumentParser(prog="launch/train.py", description=main.__doc__)
    parser.add_argument("recipe", type=Path, help="recipe file, or that of a run directory")
    parser.add_argument("overrides", nargs="*", help="key=value, such as train.steps=10")
    parser.add_argument("--run-dir", type=Path, help="default: runs/NAME of the recipe file")
    parser.add_argument("--fresh", action="store_true", help="set a run that is there aside")
    parser.add_argument(
        "--allow-changed",
        action="append",
        default=[],
        metavar="FIELD",
        help="go on although this setting, or these rows or this model, have changed",
    )
    parser.add_argument("--deepspeed", type=Path, metavar="FILE", help="DeepSpeed JSON file")
    parser.add_argument("--local_rank", help="ignored: the deepspeed launcher's own")
    options = parser.parse_intermixed_args(argv)
    code = _verdict_of_this_launch(options)
    if code is not None:
        return code
    return run_worker(lambda place: _train(options, place, stop_requests))


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
    """Say whether torchrun starts the processes again, after one of them has ended early."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def _is_requeue() -> bool:
    """Say whether Slurm starts the job again, by itself or because a user asked it to."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0" or AFTER_JOB in os.environ


def _verdict_of_this_launch(options: argparse.Namespace) -> int | None:
    """Return the exit code that this launch has come to already, if it has.

    torchrun starts again whatever does not end with 0, be it told to stop or beyond help.
    """
    if not (_is_restart() or _is_requeue()):
        return None
    run, _ = _run_of(options)
    if run.is_finished:
        end_for(run.attempts, "done")  # its holder may have been killed just before it said so
        return EXIT_DONE
    found = run.verdict()
    if found is not None:
        return found.exit_code
    if _is_restart() and run.was_interrupted:
        end_for(run.attempts, "interrupted")  # where its ranks were told while they loaded
        return signals.interrupted_code()
    return None


def _train(options: argparse.Namespace, place: Place, stop_requests: signals.StopRequests) -> None:
    zero_s = time.monotonic() - process_age_s()
    place.run_dir = _run_of(options)[0]
    stop_requests.on_setup_stop = place.stopped_in_setup
    recipe = load_recipe(_recipe_of(options), options.overrides)
    if place.rank == 0:
        _take(options, recipe, place)
    # Only now, for it takes seconds: torch, transformers and all that stands on them.
    from peft_dist.finetune import fine_tune
    from peft_dist.sharding.launcher_env import deepspeed_exports

    if options.deepspeed is not None:
        os.environ.update(deepspeed_exports(options.deepspeed))
    fine_tune(
        recipe,
        place,
        stop_requests,
        logs=place.run_dir.logs,
        zero_s=zero_s,
        allow_changed=options.allow_changed,
    )


def _take(options: argparse.Namespace, recipe: Recipe, place: Place) -> None:
    """Take the run directory for this attempt, as rank 0.

    Raises:
        RunDirError: Where another process holds it, or it has finished, or learns otherwise.
        TrainingError: Where starting again cannot help.
    """
    run, prepared = _run_of(options)
    if not prepared:
        fresh = options.fresh and not _is_restart()
        refuse_if_held(run.attempts, fresh=fresh)
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
    # A person who starts again after a verdict has done something about it.
    after_verdict = run.verdict() is not None
    attempt = Attempt.begin(run.attempts, after_verdict=after_verdict, world_size=place.size)
    place.run_dir, place.attempt, place.attempt_number = run, attempt, attempt.number
    run.remove_leftovers()
    if after_verdict:
        run.failure.unlink(missing_ok=True)
    problem = verdict(run.attempts, run.newest_step())
    if problem is not None:
        raise TrainingError(problem, where=str(run.path), remedy="start again once that is mended")


def process_age_s() -> float:
    """Return the seconds since this process was started, its interpreter's start among them."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started_s)
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
