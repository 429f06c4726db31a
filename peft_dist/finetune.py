"""Fine-tuning as one rank does it: rows, model, checkpoint to go on from, training, result.

What the process around it needs (lease, signals, exit code) it gets from `train`.
"""

import json
import os
import time
from collections.abc import Collection
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from peft_dist.checkpoint import directory
from peft_dist.checkpoint.checkpointer import Checkpointer, read_state
from peft_dist.checkpoint.run_identity import describe_run, refuse_another_run
from peft_dist.checkpoint.verified_save import AdapterSaver
from peft_dist.common import paths
from peft_dist.common.console import say
from peft_dist.common.env import LAUNCHED_AT
from peft_dist.common.errors import Interrupted, LaunchError, PeftDistError, RunDirError, Superseded
from peft_dist.common.process_identity import slurm_job
from peft_dist.config import Recipe
from peft_dist.data.tokenize import TokenizedRows, tokenize_rows
from peft_dist.distributed import process_group, rendezvous
from peft_dist.distributed.collectives import broadcast_object, gather_objects
from peft_dist.distributed.world import read_world
from peft_dist.evaluation.scoring import EvalSet, held_out
from peft_dist.ledger.events import EndEvent, StartEvent
from peft_dist.ledger.writer import LedgerWriter, Tracker
from peft_dist.metrics.memory import peak_device_bytes, peak_rss_bytes
from peft_dist.metrics.result import make_result, summary
from peft_dist.model.source import BaseSource, find_base
from peft_dist.model_setup import open_session
from peft_dist.run.directory import RunDir, write_text_atomic
from peft_dist.run.lease import Attempt
from peft_dist.run.provenance import versions
from peft_dist.run.restart_policy import Kind
from peft_dist.tracking.nodes import watch_machine
from peft_dist.tracking.terminal import Terminal
from peft_dist.tracking.wandb.tracker import WandbTracker
from peft_dist.trainer import Trainer
from peft_dist.worker.process import WorkerContext
from peft_dist.worker.signals import StopRequests
from peft_dist.worker.watchdog import Limits, Watchdog


class _Process:
    """What the training loop hears from, and tells, the process it runs in."""

    def __init__(
        self, place: WorkerContext, stop_requests: StopRequests, watchdog: Watchdog
    ) -> None:
        self._place, self._requests, self._watchdog = place, stop_requests, watchdog

    def stop_requested(self) -> bool:
        """Whether this process was sent a signal."""
        return self._requests.requested is not None

    def phase(self, name: str, step: int) -> None:
        """Tell the watchdog, and whoever reports a crash; see that the run is still ours."""
        self._place.step = step
        if self._place.attempt is not None:
            self._place.attempt.check()
        self._watchdog.phase(name, step)


class _Data(NamedTuple):
    """What a recipe names, found and tokenised."""

    rows: TokenizedRows
    held: EvalSet | None
    source: BaseSource


def fine_tune(
    recipe: Recipe,
    place: WorkerContext,
    stop_requests: StopRequests,
    *,
    logs: Path,
    zero_s: float,
    allow_changed: Collection[str] = (),
) -> None:
    """Train a recipe to its end, from the newest checkpoint where there is one.

    Args:
        recipe: What to train.
        place: This process; on rank 0 with the run and its lease.
        stop_requests: The signals it got.
        logs: The run's folder of logs.
        zero_s: When it was started, on the monotonic clock.
        allow_changed: Fields that a run may go on with although they have changed.

    Raises:
        PeftDistError: For whatever a person must fix, and for a stop by a signal.
    """
    startup_s = time.monotonic() - zero_s
    world = read_world()
    _require_trackers(recipe)
    limits = recipe.watchdog
    watchdog = Watchdog(
        rank=world.rank,
        folder=logs,
        limits=Limits(limits.min_s, limits.setup_s, limits.evaluation_s, limits.save_s),
        world_size=world.size,
        on_hang=lambda line: place.note_crash(Kind.HUNG, line),
    )
    meeting = rendezvous.meet(world)
    # What can take minutes comes before the process group, whose collectives would not wait.
    data = _read(recipe)
    process_group.start(world, meeting)
    _share_run(place)
    watchdog.attempt = place.attempt_number
    process = _Process(place, stop_requests, watchdog)
    session = open_session(recipe, world, data.source, label_names=data.rows.label_names)
    for some in (data.rows, *([] if data.held is None else [data.held.rows])):
        session.check_lengths(some)
    saver = AdapterSaver(session, data.rows)
    saver.prove()
    trainer = _trainer(saver, data, place, process, allow_changed)
    hosts = gather_objects(os.uname().nodename)
    load_s = time.monotonic() - zero_s - startup_s
    write = None
    if world.is_main:
        lease = _lease(place)
        ledger = LedgerWriter(
            _run(place).ledger, attempt=lease.number, clock_zero=zero_s, check=lease.check
        )
        trainer.trackers = _trackers(ledger, _run(place), trainer)
        _begin(trainer, data.rows, place, startup_s=startup_s, load_s=load_s, hosts=hosts)
        write = ledger.write
    sampler = watch_machine(
        recipe.tracking,
        _run(place),
        write,
        rank=world.rank,
        local_rank=world.local_rank,
        attempt=place.attempt_number,
        step=lambda: trainer.progress.step,
        gpu_uuids=world.gpu_uuids(),
    )
    stop_requests.begin_training()
    outcome = "crashed"
    try:
        trainer.run()
        process.phase("save", trainer.progress.step)
        train_s = time.monotonic() - zero_s - startup_s - load_s
        session.check_integrity()
        saver.save(_run(place).adapter, may_publish=lambda: _lease(place).check(now=True))
        peaks = gather_objects((peak_rss_bytes(), peak_device_bytes(world.device)))
        outcome = "done"
    except Superseded:
        trainer.trackers = []  # the ledger is another's now
        raise
    except PeftDistError as error:
        outcome = "interrupted" if isinstance(error, Interrupted) else "failed"
        raise
    finally:
        watchdog.phase("save", trainer.progress.step)
        if sampler is not None:
            sampler.stop()
        _end(trainer, outcome)
        watchdog.stop()
    if world.is_main:
        result = make_result(
            session,
            trainer.progress,
            load_seconds=load_s + startup_s,
            train_seconds=train_s,
            peaks=peaks,
        )
        _lease(place).check(now=True)
        write_text_atomic(_run(place).result, json.dumps(result, indent=2) + "\n")
        _lease(place).end("done", step=trainer.progress.step)
        say(summary(result, _run(place), base=recipe.model.name))
    process_group.stop()


def _read(recipe: Recipe) -> _Data:
    """Find the model and tokenise the rows; needs no other process."""
    cache = paths.cache_dir()
    rows = tokenize_rows(recipe, "train", cache / "rows")
    held = None
    if recipe.data.eval is not None:
        held = held_out(recipe, tokenize_rows(recipe, "eval", cache / "rows"))
    return _Data(rows, held, find_base(recipe, cache))


def _share_run(place: WorkerContext) -> None:
    """Tell every process which attempt of which run this is. Collective."""
    path = "" if place.run_dir is None else str(place.run_dir.path)
    path, place.attempt_number = broadcast_object([path, place.attempt_number])
    place.run_dir, place.has_met = RunDir.open(path), True


def _trainer(
    saver: AdapterSaver,
    data: _Data,
    place: WorkerContext,
    process: _Process,
    allow_changed: Collection[str],
) -> Trainer:
    """Return a trainer that stands where the newest checkpoint stood. Collective."""
    session, run = saver.session, _run(place)
    facts = describe_run(session, data.rows, data.held)
    if session.world.is_main:
        directory.clean(run.checkpoints)
    checkpointer = Checkpointer(
        saver,
        run.checkpoints,
        session.recipe.checkpoint,
        attempt=place.attempt_number,
        facts=facts,
        may_publish=lambda: _lease(place).check(now=True),
    )
    trainer = Trainer(session, data.rows, data.held, checkpointer=checkpointer, hooks=process)
    newest = checkpointer.newest()
    if newest is not None:
        try:
            refuse_another_run(read_state(newest), facts, allow_changed, where=str(run.path))
        except RunDirError:
            if session.world.is_main:
                run.drop_next_recipe()
            raise
        trainer.resume(newest)
    if session.world.is_main:
        _lease(place).check(now=True)
        run.accept_recipe()
    return trainer


def _begin(trainer: Trainer, rows: TokenizedRows, place: WorkerContext, **facts: Any) -> None:
    """Say, in the lease, in the ledger (with these facts) and aloud where this attempt begins."""
    step, steps, session = trainer.progress.step, trainer.plan.total_steps, trainer.session
    _lease(place).note(from_step=step, steps=steps, world_size=session.world.size)
    _report_rows(rows)
    if step:
        say(f"going on after step {step} (attempt {place.attempt_number})")
    job = slurm_job()
    if job["slurm_job_id"] is not None:
        facts |= job
    if LAUNCHED_AT in os.environ:
        facts["launched"] = float(os.environ[LAUNCHED_AT])
    trainer.write(
        StartEvent(
            step=step,
            steps=steps,
            world_size=session.world.size,
            strategy=session.strategy,
            device=session.world.device_name,
            base_parameters=session.base_parameters,
            base_bytes_per_rank=session.base_bytes_by_rank,
            versions=versions(),
            **facts,
        )
    )


def _end(trainer: Trainer, outcome: str) -> None:
    """Close every tracker, whatever one of them raises; the ledger says how the attempt ended.

    A checkpoint that is being written is not given up, whatever else has failed.
    """
    with ExitStack() as closing:
        for tracker in trainer.trackers:
            closing.callback(tracker.close)
        trainer.finish_saves()
        trainer.write(EndEvent(step=trainer.progress.step, outcome=outcome))


def _run(place: WorkerContext) -> RunDir:
    assert place.run_dir is not None
    return place.run_dir


def _lease(place: WorkerContext) -> Attempt:
    assert place.attempt is not None, "rank 0 alone holds the run"
    return place.attempt


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
        say(f"left out {report}")
    if rows.truncated_rows or rows.dropped_rows:
        say(
            f"rows: {rows.n_rows} kept, {rows.truncated_rows} of them cut to data.max_length, "
            f"{rows.dropped_rows} left out with nothing to train"
        )


def _trackers(ledger: LedgerWriter, run: RunDir, trainer: Trainer) -> list[Tracker]:
    """Return the views of a run, in the order in which they get a record; closed in the other."""
    trackers: list[Tracker] = [ledger]
    if trainer.recipe.tracking.wandb.mode != "disabled":
        trackers.append(WandbTracker(run))
    terminal = Terminal(trainer.plan.total_steps, first_step=trainer.progress.step)
    return [*trackers, terminal]
