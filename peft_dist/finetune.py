"""The story of a run, as each rank lives it: rows, model, checkpoint, training, verified adapter.

The process around it stands in `entrypoints/train.py`, what follows and guards an attempt in
`tracking/attempt.py`.
"""

import logging
import os
from collections.abc import Collection
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
from torch.distributed import Store

from peft_dist.checkpoint import directory
from peft_dist.checkpoint.checkpointer import Checkpointer
from peft_dist.checkpoint.room import require_room
from peft_dist.checkpoint.run_identity import describe_run, dtype_of_run, refuse_another_run
from peft_dist.checkpoint.same_inputs import describe_inputs, refuse_different_inputs
from peft_dist.checkpoint.start_adapter import load_start, with_start_commit
from peft_dist.checkpoint.state import read_state
from peft_dist.checkpoint.verified_save import AdapterSaver
from peft_dist.common.cache_folder import usable_cache_dir
from peft_dist.common.errors import RunDirError
from peft_dist.common.screen import stage, wait
from peft_dist.common.sizes import megabytes
from peft_dist.config import Recipe
from peft_dist.config.method import hub_adapter
from peft_dist.config.parallel import least_kept
from peft_dist.config.run_date import with_date
from peft_dist.data.mixture import source_shares
from peft_dist.data.stream import StreamedRows, TrainingRows
from peft_dist.data.token_cache import TokenizedRows, tokenize_rows
from peft_dist.distributed import process_group, rendezvous
from peft_dist.distributed.collectives import broadcast_object, gather_objects
from peft_dist.distributed.world import World
from peft_dist.evaluation.scoring import EvalSet, make_eval_set
from peft_dist.micro_batch import CudaMemory, fit_micro_batch
from peft_dist.model.device_settings import export_determinism
from peft_dist.model.precision import compute_dtype
from peft_dist.model.source import find_base
from peft_dist.model.vocabulary import refuse_unknown_ids
from peft_dist.model.weights import model_folder
from peft_dist.model_setup import ModelSetup, set_up_model
from peft_dist.objective.passes import Scores
from peft_dist.objective.reference import reference_scores
from peft_dist.plan.host_memory import free_memory_bytes, keep_on_host
from peft_dist.run.prediction import measures_rows, note_measured_rows
from peft_dist.run.saving import being_saved
from peft_dist.sharding.launcher_env import resolve
from peft_dist.tracking.attempt import TrainingAttempt
from peft_dist.trainer import Trainer
from peft_dist.worker.process import WorkerContext
from peft_dist.worker.signals import StopRequests

log = logging.getLogger(__name__)

FIRST_ROWS = 64
"""Rows that a start looks at where they are streamed."""


def fine_tune(
    recipe: Recipe,
    context: WorkerContext,
    stop_requests: StopRequests,
    *,
    logs: Path,
    started_s: float,
    allow_changed: Collection[str] = (),
) -> None:
    """Train a recipe to its end, from the newest checkpoint where there is one.

    Args:
        recipe: What to train.
        context: This process; on rank 0 with the run and its lease.
        stop_requests: The signals it got.
        logs: The run's folder of logs.
        started_s: When it was started, on the monotonic clock.
        allow_changed: Fields that a run may go on with although they have changed.

    Raises:
        PeftDistError: For whatever a person must fix, and for a stop by a signal.
    """
    attempt = TrainingAttempt(recipe, context, stop_requests, logs=logs, started_s=started_s)
    world = attempt.world
    meeting = rendezvous.meet(world)
    recipe = _with_date_of_main(recipe, world, meeting)
    began_in = _dtype_of_run(attempt, meeting)
    dtype, _ = compute_dtype(recipe.model, world.device, began_in)

    # What can take minutes comes before the process group, whose collectives would not wait.
    cache = usable_cache_dir()
    with stage(f"looking for the model {recipe.model.name}", log):
        model_folder(recipe.model.name, recipe.model.revision)  # its tokenizer reads the rows
        recipe = with_start_commit(recipe)
    with stage("reading the rows", log) as told:
        rows, eval_set = _read_rows(recipe, cache / "rows")
        told += _described(rows, eval_set)
    with stage("hashing the model's files", log) as told:
        base = find_base(recipe, cache)
        told.append(f"model: {base.files.folder}, {megabytes(base.files.bytes)}")
    held = None if eval_set is None else eval_set.rows
    some, _ = rows.at(np.arange(min(FIRST_ROWS, rows.n_examples)))
    texts = {"data.train": some.tokens, **({} if eval_set is None else eval_set.texts())}
    with wait("comparing the rows with the model's vocabulary"):
        refuse_unknown_ids(recipe, base.files.folder, texts)
    with wait("sampling the model's weights"):
        inputs = describe_inputs(recipe, {"data.train": rows, "data.eval": held}, base.files, dtype)
    if recipe.train.deterministic:
        export_determinism()  # before NCCL and cuBLAS are used
    many = f"all {world.size} processes are" if world.size > 1 else "torch.distributed is"
    with stage(f"waiting until {many} there", log):
        process_group.start(world, meeting)
        attempt.share_run()
        refuse_different_inputs(inputs)
    recipe = _with_what_the_host_keeps(recipe, world, rows, held)

    setup = set_up_model(
        recipe, world, base, label_names=rows.label_names, rows=rows, began_in=began_in
    )
    load_start(setup)
    setup.check_rows(some)
    if held is not None:
        setup.check_rows(held)
    setup.warn_of_untrained_rows(some)
    saver = AdapterSaver(setup, some)
    with stage("proving that the adapter can be saved", log) as told:
        saver.prove()
        told.append("saving and reading back a changed adapter: proven")
    require_room(setup, attempt.run)
    reference = _reference(setup, rows, cache, attempt)
    if eval_set is not None:
        eval_set = replace(eval_set, reference=_reference(setup, eval_set.rows, cache, attempt))
    trainer = _trainer(saver, rows, eval_set, reference, attempt, allow_changed)

    with attempt.follow(trainer):
        _fit_micro_batch(trainer, attempt)
        trainer.run()
        attempt.end_training(trainer.progress.step)
        with wait("comparing the base with what it was"):
            setup.check_integrity()
        with wait("saving the adapter and reading it back"), being_saved():
            saver.save(attempt.run.adapter, may_publish=attempt.require_lease)
            attempt.measure_peaks()
    attempt.write_result(trainer)
    process_group.stop()
    attempt.show_result()


def _with_date_of_main(recipe: Recipe, world: World, meeting: Store) -> Recipe:
    """Return the recipe with the date that rank 0 trains by: rows must be alike on all ranks."""
    if world.is_main:
        meeting.set("data.date", str(with_date(recipe).data.date))
    day = date.fromisoformat(meeting.get("data.date").decode())
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"date": day})})


def _dtype_of_run(attempt: TrainingAttempt, meeting: Store) -> str:
    """Return the dtype in which the run was begun, as its checkpoints have it; "" for a new one."""
    if attempt.world.is_main:
        meeting.set("began in", dtype_of_run(attempt.run.checkpoints, attempt.world.device))
    return meeting.get("began in").decode()


def _read_rows(recipe: Recipe, cache: Path) -> tuple[TrainingRows, EvalSet | None]:
    """Tokenise the rows of a recipe, or read them from the cache; needs no other process."""
    rows: TrainingRows
    if recipe.data.streaming:
        rows = StreamedRows(recipe, cache)
    else:
        rows = tokenize_rows(recipe, "train", cache)
    source_shares(recipe.data, [source.rows for source in rows.sources])  # refused here, if at all
    if recipe.data.eval is None:
        return rows, None
    return rows, make_eval_set(recipe, tokenize_rows(recipe, "eval", cache))


def _reference(
    setup: ModelSetup, rows: TrainingRows, cache: Path, attempt: TrainingAttempt
) -> Scores | None:
    """Score rows before anything is learned, where the objective asks for it. Collective."""
    if not setup.recipe.objective.has_reference:
        return None
    assert isinstance(rows, TokenizedRows), "the recipe refuses to stream them"
    scores = reference_scores(
        setup, rows, cache / "reference", on_batch=lambda: attempt.phase("evaluation", 0)
    )
    attempt.phase("setup", 0)
    return scores


def _with_what_the_host_keeps(
    recipe: Recipe, world: World, rows: TrainingRows, held: TokenizedRows | None
) -> Recipe:
    """Return the recipe with what stays gathered and dequantized without GPUs. Collective.

    What every process has memory for; on GPUs the plan has chosen that.
    """
    if world.device.type != "cpu":
        return recipe
    longest = recipe.data.max_length
    if isinstance(rows, TokenizedRows):
        longest = max(int(np.diff(some.offsets).max()) for some in (rows, held) if some is not None)
    own = keep_on_host(
        recipe,
        resolve(recipe.parallel, world, os.environ).strategy,
        processes=world.size,
        here=world.local_size,
        longest_row=longest,
        free_bytes=free_memory_bytes(),
    )
    found = gather_objects([own.reshard, own.dequantized_blocks])
    all_own = [
        own.model_copy(update={"reshard": reshard, "dequantized_blocks": blocks})
        for reshard, blocks in found
    ]
    own = own.model_copy(update=least_kept(all_own))
    return recipe.model_copy(update={"parallel": own})


def _described(rows: TrainingRows, eval_set: EvalSet | None) -> list[str]:
    """Log what became of the rows of each source, and return a line about all of them.

    A smaller data set is no secret.
    """
    held = [] if eval_set is None else [("held-out", eval_set.rows)]
    read = [("training", rows)] if isinstance(rows, TokenizedRows) else []
    for what, some in [*read, *held]:
        for notice in some.notices:
            log.warning("%s rows: %s", what, notice)
        for source in some.sources:
            for report in source.reports:
                log.warning("left out %s", report)
            level = logging.WARNING if source.lose_much else logging.INFO
            log.log(level, "%s", source.line(what))
    how = f"{len(rows.tokens):,} tokens" if isinstance(rows, TokenizedRows) else "streamed"
    kept = f"rows: {rows.n_examples:,} to train on, {how}"
    return [kept + ("" if eval_set is None else f", {eval_set.rows.n_examples:,} held out")]


def _fit_micro_batch(trainer: Trainer, attempt: TrainingAttempt) -> None:
    """Measure how many rows fit into a pass, where the recipe left that open. Collective.

    Once in a run, before its first step, and on a GPU alone: a host's memory is shared. Of rows
    that are streamed nobody knows the longest: there the plan's number stands.
    """
    device = trainer.world.device
    if device.type != "cuda" or trainer.progress.step or trainer.recipe.data.streaming:
        return
    if not broadcast_object(trainer.world.is_main and measures_rows(attempt.run)):
        return
    with stage("measuring how many rows fit into a pass", log) as told:
        found = fit_micro_batch(trainer, CudaMemory(device))
        told.append(f"rows of a pass: {found.chosen}; the plan had {found.planned}")
    if trainer.world.is_main:
        attempt.require_lease()
        note_measured_rows(attempt.run, found.chosen)
    trainer.write(found)


def _trainer(
    saver: AdapterSaver,
    rows: TrainingRows,
    eval_set: EvalSet | None,
    reference: Scores | None,
    attempt: TrainingAttempt,
    allow_changed: Collection[str],
) -> Trainer:
    """Return a trainer that goes on from the newest checkpoint, or begins. Collective."""
    setup, run = saver.setup, attempt.run
    facts = describe_run(setup, rows, eval_set)
    if setup.world.is_main:
        directory.clean(run.checkpoints)
    checkpointer = Checkpointer(
        saver,
        run.checkpoints,
        setup.recipe.checkpoint,
        attempt=attempt.number,
        facts=facts,
        may_publish=attempt.require_lease,
        sync_ledger=attempt.sync_ledger,
    )
    trainer = Trainer(
        setup, rows, eval_set, reference=reference, checkpointer=checkpointer, hooks=attempt
    )
    newest = checkpointer.newest()
    if newest is not None:
        try:
            refuse_another_run(read_state(newest), facts, allow_changed, where=str(run.path))
        except RunDirError:
            if setup.world.is_main:
                run.drop_next_recipe()
            raise
        with stage("reading the checkpoint", log) as told:
            trainer.resume(newest)
            size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
            told.append(f"checkpoint: step {trainer.progress.step}, {megabytes(size)}")
    if setup.world.is_main:
        attempt.require_lease()
        start = setup.recipe.method.start_from
        run.accept_recipe(start_from=start if start is not None and hub_adapter(start) else None)
    return trainer
