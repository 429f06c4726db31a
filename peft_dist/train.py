"""One training process, from its command line to its exit code.

`accelerate launch`, `torchrun` or plain `python` start it through `launch/train.py`, as many times
as there are processes; it never starts others.
"""

import argparse
import json
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from peft_dist import checkpoint, dist, resources
from peft_dist.config import Recipe, load_recipe
from peft_dist.data.tokenize import TokenizedRows, tokenize_rows
from peft_dist.errors import LaunchError, RunDirError
from peft_dist.memory import peak_device_bytes, peak_rss_bytes
from peft_dist.model.source import find_base
from peft_dist.run_dir import RunDir, write_text_atomic
from peft_dist.saving import Saver
from peft_dist.scoring import held_out
from peft_dist.session import open_session
from peft_dist.shard.launched import deepspeed_exports
from peft_dist.summary import make_result, summary
from peft_dist.tracking import Ledger, Terminal, Tracker
from peft_dist.trainer import Trainer
from peft_dist.worker import Place, run_worker


def main(argv: list[str]) -> int:
    """Train one recipe as one process of a world; return the exit code."""
    parser = argparse.ArgumentParser(prog="launch/train.py", description=main.__doc__)
    parser.add_argument("recipe", type=Path, help="recipe file, or that of a run directory")
    parser.add_argument("overrides", nargs="*", help="key=value, such as train.steps=10")
    parser.add_argument("--run-dir", type=Path, help="default: runs/NAME of the recipe file")
    parser.add_argument("--deepspeed", type=Path, metavar="FILE", help="DeepSpeed JSON file")
    parser.add_argument("--local_rank", help="ignored: the deepspeed launcher's own")
    options = parser.parse_intermixed_args(argv)
    if options.deepspeed is not None:
        os.environ.update(deepspeed_exports(options.deepspeed))
    return run_worker(lambda world, place: _train(options, world, place))


def _train(options: argparse.Namespace, world: dist.World, place: Place) -> None:
    started = time.monotonic()
    recipe = load_recipe(options.recipe, options.overrides)
    _require_trackers(recipe)
    place.run_dir = _prepared_run(options)
    if world.is_main and place.run_dir is None:
        chosen = options.run_dir or Path("runs") / options.recipe.stem
        place.run_dir = RunDir.create(chosen, recipe, command=sys.argv)
    # What can take minutes comes before the process group, whose collectives would not wait.
    cache = resources.cache_dir()
    rows = tokenize_rows(recipe, "train", cache / "rows")
    held = None
    if recipe.data.eval is not None:
        held = held_out(recipe, tokenize_rows(recipe, "eval", cache / "rows"))
    source = find_base(recipe, cache)

    dist.start(world)
    path = dist.broadcast_object("" if place.run_dir is None else str(place.run_dir.path))
    place.run_dir = run = RunDir.open(path)
    session = open_session(recipe, world, source, label_names=rows.label_names)
    for some in (rows, *([] if held is None else [held.rows])):
        session.check_lengths(some)
    load_seconds = time.monotonic() - started

    saver = Saver(session, rows)

    def save_copy(step: int) -> None:
        saver.save(run.checkpoint(step))
        if world.is_main:
            checkpoint.keep_newest(run.checkpoints, recipe.checkpoint.keep_last)

    trainer = Trainer(session, rows, held, save=save_copy)
    if world.is_main:
        _report_rows(rows)
        trainer.trackers = _trackers(run, recipe, trainer.plan.total_steps)
    outcome = trainer.run()
    train_seconds = time.monotonic() - started - load_seconds
    session.check_integrity()
    saver.save(run.adapter)
    peaks = dist.gather_objects((peak_rss_bytes(), peak_device_bytes(world.device)))
    for tracker in trainer.trackers:
        tracker.close()
    if world.is_main:
        result = make_result(
            session, outcome, load_seconds=load_seconds, train_seconds=train_seconds, peaks=peaks
        )
        write_text_atomic(run.result, json.dumps(result, indent=2) + "\n")
        print(summary(result, run, base=recipe.model.name), flush=True)


def _prepared_run(options: argparse.Namespace) -> RunDir | None:
    """Return the run directory that `peft-dist train` made for this very start, if one did.

    Raises:
        RunDirError: Where that run has trained already.
    """
    run = RunDir.enclosing(options.recipe)
    if run is None or options.overrides or options.run_dir:
        return None  # the recipe of an earlier run may be the start of another
    if run.has_started:
        raise RunDirError(
            "holds a run that has trained already",
            where=str(run.path),
            remedy="name another folder with --run-dir",
        )
    return run


def _require_trackers(recipe: Recipe) -> None:
    """Refuse a tracker that is not installed, on every process and before anything is loaded."""
    if recipe.tracking.wandb.mode != "disabled" and find_spec("wandb") is None:
        raise LaunchError(
            "wandb is not installed",
            where="tracking.wandb.mode",
            remedy="pip install 'peft-dist[wandb]', or mode: disabled",
        )


def _report_rows(rows: TokenizedRows) -> None:
    """Say what was left out of the training rows: a smaller data set is no secret."""
    for report in rows.bad_rows:
        print(f"left out {report}")
    if rows.truncated_rows or rows.dropped_rows:
        print(
            f"rows: {rows.n_rows} kept, {rows.truncated_rows} of them cut to data.max_length, "
            f"{rows.dropped_rows} left out with nothing to train",
            flush=True,
        )


def _trackers(run: RunDir, recipe: Recipe, total_steps: int) -> list[Tracker]:
    trackers: list[Tracker] = [Ledger(run.ledger), Terminal(total_steps)]
    if recipe.tracking.wandb.mode != "disabled":
        from peft_dist.tracking.wandb import WandbTracker

        trackers.append(WandbTracker(recipe, run.path))
    return trackers
