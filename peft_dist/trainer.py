"""The training loop: rows of a step, passes, one update, a record.

Knows no file format, no engine by name and no command line.
"""

import math
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peft_dist.checkpoint.checkpointer import Checkpointer
from peft_dist.checkpoint.progress import NoHooks, Progress, TrainerHooks
from peft_dist.common.errors import Interrupted, TrainingError
from peft_dist.common.screen import wait
from peft_dist.data.mixture import source_shares
from peft_dist.data.order import RowOrder, StepPlan
from peft_dist.data.stream import TrainingRows
from peft_dist.data.tokenized_rows import StepRows
from peft_dist.distributed.collectives import barrier, sum_over
from peft_dist.evaluation.during_training import evaluate
from peft_dist.evaluation.scoring import EvalSet, ScoringStopped
from peft_dist.ledger.events import (
    CheckpointEvent,
    LedgerEvent,
    RollbackEvent,
    SkippedEvent,
    StepEvent,
)
from peft_dist.ledger.writer import Tracker
from peft_dist.metrics.memory import peak_memory_bytes
from peft_dist.metrics.mfu import Utilisation
from peft_dist.metrics.non_finite import skip_or_roll_back
from peft_dist.metrics.step import StepInputs, StepMetrics, StepMetricsReader, make_extras
from peft_dist.model_setup import ModelSetup
from peft_dist.objective.forward_backward import ForwardBackward
from peft_dist.objective.passes import Scores
from peft_dist.optim.lr_schedule import learning_rate, peak_learning_rate
from peft_dist.sharding.chosen_optimizer import make_optimizer


class Trainer:
    """One training of one model setup on one set of rows."""

    def __init__(
        self,
        setup: ModelSetup,
        rows: TrainingRows,
        eval_set: EvalSet | None,
        *,
        reference: Scores | None = None,
        checkpointer: Checkpointer | None = None,
        hooks: TrainerHooks | None = None,
    ) -> None:
        """Prepare; nothing runs yet.

        Args:
            setup: The loaded model.
            rows: Training rows.
            eval_set: Held-out rows, if any.
            reference: [n_rows] scores of the training rows at the start, where the objective has
                them.
            checkpointer: Makes checkpoints. Default: none are made.
            hooks: The process it runs in. Default: one that is never asked to stop.
        """
        self.setup, self.rows, self.eval_set = setup, rows, eval_set
        self.recipe, self.world = setup.recipe, setup.world
        self.checkpointer = checkpointer
        self.hooks = hooks or NoHooks()
        self.trackers: list[Tracker] = []
        """Views of the run; stays empty on every rank but 0."""
        some, _ = rows.at(np.arange(1))
        self.passes = ForwardBackward(setup, some, reference)
        shares = source_shares(self.recipe.data, [source.rows for source in rows.sources])
        order = RowOrder(rows.n_examples, self.recipe.train.seed, shares)
        self.plan = StepPlan(order, rows.example_lengths, self.recipe.train)
        self.peak_rate = peak_learning_rate(self.recipe)
        self.optimizer = make_optimizer(setup.engine, setup.recipe.train)
        self.progress = Progress()
        device, figures = self.world.device, self.passes.objective.metrics
        self._reader = StepMetricsReader(
            device, objective=figures, sources=self.recipe.source_losses
        )
        self._stop = self._save_due = self._give_up = False
        self._saved_step = -1
        self._saved_at = self._mark = time.monotonic()
        name, count = self.world.device_name, self.world.size
        self._utilisation = Utilisation.of(setup.base_parameters, device_name=name, devices=count)

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint of the checkpointer's. Collective."""
        assert self.checkpointer is not None
        facts = self.checkpointer.load(checkpoint, self.optimizer)
        self.progress = Progress.of(facts)
        self.passes.loss_scale.restore(facts)
        self._saved_step = self.progress.step

    def run(self) -> Progress:
        """Train to the end. Collective.

        Raises:
            Interrupted: Where a process was asked to stop; a checkpoint was made.
            TrainingError: For losses or gradients that are not finite, and checkpoints that cannot
                be written.
        """
        total, first = self.plan.total_steps, self.progress.step + 1
        self.setup.model.train()
        self._saved_at = self._go_on()
        self._after(self.progress.step)  # an evaluation may be due, before the first step or after
        plan = self.plan.steps(step=self.progress.step, cursor=self.progress.cursor)
        with closing(self.rows.batches(plan)) as batches:
            for batch in batches:
                self.hooks.phase("step", batch.step)
                self._step(batch)
                if batch.step == first:
                    self.setup.check_adapters_agree()
                    self.setup.engine.compute_timer.begin()  # that was waiting for others
                self._after(batch.step)
        self._settle()
        self.hooks.phase("save", total)
        self.finish_saves()
        return self.progress

    def _go_on(self) -> float:
        """Begin to time a step, after whatever was no part of one; return the time."""
        self._mark = time.monotonic()
        self.setup.engine.compute_timer.begin()
        return self._mark

    def _step(self, batch: StepRows) -> None:
        """Train on the rows of one step and update the adapter once."""
        engine, device = self.setup.engine, self.world.device
        step, cursor, rows, ids = batch
        own, sources = self.passes.run(batch), self.passes.source_losses
        engine.compute_timer.end()
        # Flags and metrics of all processes are carried by the gradient all-reduce.
        extras = make_extras(
            self.world,
            own.loss,
            own.metrics,
            flags=self._flags(),
            step_s=engine.compute_timer.latest_s(),
            memory_bytes=peak_memory_bytes(device),
            source_nll=sources.take(),
        )
        summed, scale = engine.reduce(extras), self.passes.loss_scale
        scale.unscale(engine.gradients)
        norm = engine.clip(self.recipe.train.max_grad_norm)
        first = torch.stack([summed[0] / own.divisor, norm.float(), scale.value])
        metrics = torch.cat([first, summed[1:]])
        rate = learning_rate(self.recipe.train, step, self.plan.total_steps, peak=self.peak_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate_factor"]
        finite = torch.isfinite(metrics[:2]).all()
        self.optimizer.step(finite)
        scale.update(finite)
        engine.zero_gradients()
        engine.compute_timer.begin()
        self.progress.step, self.progress.cursor = step, cursor
        tokens = int(rows.example_lengths[ids].sum())
        by_source = sources.predictions(ids)
        self._reader.put(StepInputs(step, rate, len(ids), cursor, tokens, by_source), metrics)
        # To roll back a step later would undo one that was sound, and is in the ledger.
        waits = not self._reader.is_late or self.recipe.train.non_finite == "rollback"
        self._publish(keep=0 if waits else 1)

    def _flags(self) -> tuple[bool, bool, bool]:
        """Return what this process asks of all at the end of a step: stop, save, give up."""
        save = give_up = False
        if self.checkpointer is not None and self.world.is_main:
            save_s, since_s = self.recipe.watchdog.save_s, time.monotonic() - self._saved_at
            save = self.checkpointer.is_due(since_s, hangs_after_s=save_s)
            give_up = self.checkpointer.failed_in_a_row >= self.recipe.checkpoint.max_failed_saves
        return self.hooks.stop_requested(), save, give_up

    def _after(self, step: int) -> None:
        """Do what is due between two steps: an evaluation, a checkpoint, stopping."""
        score, save = self.recipe.evaluate.every_steps, self.recipe.checkpoint.every_steps
        total = self.plan.total_steps
        evaluate_due = self.progress.evaluated != step and (
            step == total
            or bool(step and score and step % score == 0)
            or (step == 0 and self.recipe.evaluate.at_start)
        )
        may_be_best = evaluate_due and self.recipe.checkpoint.keep_best > 0
        save_due = may_be_best or bool(save and step % save == 0)
        save_due &= step not in (0, self._saved_step)
        if evaluate_due or save_due or self._save_due or self._stop:
            self._settle()
        self._write_saves()
        if self._give_up:
            assert self.checkpointer is not None
            raise TrainingError(
                f"{self.recipe.checkpoint.max_failed_saves} checkpoints in a row could not be "
                f"written, the last one before step {step}{self.checkpointer.last_failure}",
                where="checkpoint.max_failed_saves",
                remedy="free space, or let the disk be written to; the last one written is whole",
            )
        if evaluate_due and not self._stop:
            self._evaluate(step)
        if self._stop:
            if step:
                self._save(step)
            lost = "" if self.checkpointer is None else self.checkpointer.warning_unless_saved(step)
            raise Interrupted(f"stopped after step {step} of {total}{lost}")
        if save_due or self._save_due:
            self._save(step)

    def _save(self, step: int) -> None:
        """Make a checkpoint, where there is none of this step yet. Collective."""
        self._save_due = False
        if self.checkpointer is None:
            return
        started = time.monotonic()
        self.hooks.phase("save", step)
        if self._saved_step != step:
            epoch = self.plan.epoch_of(self.progress.cursor)
            facts = {**asdict(self.progress), "epoch": epoch, **self.passes.loss_scale.facts()}
            with wait(f"saving step {step}"):
                self.checkpointer.take(facts, self.optimizer)
            self._saved_step = step
            stall = time.monotonic() - started
            self.write(CheckpointEvent(step=step, stall_s=stall))
        if self._stop:
            self.finish_saves()
            # All end together: torchrun kills within 30 s what outlives the first that ends.
            barrier()
        self._saved_at = self._go_on()

    def finish_saves(self) -> None:
        """Wait for the checkpoint that is being written, if there is one, and record it."""
        if self.checkpointer is not None:
            with wait("writing the last checkpoint"):
                self.checkpointer.wait()
            self._write_saves()

    def _write_saves(self) -> None:
        """Record what became of the checkpoints that were being written."""
        for event in [] if self.checkpointer is None else self.checkpointer.results():
            self.write(event)

    def _publish(self, *, keep: int) -> None:
        """Write the events of all but the last `keep` steps, and take over their flags."""
        for inputs, metrics in self._reader.take(keep=keep):
            now = time.monotonic()
            seconds, self._mark = now - self._mark, now
            self._stop |= metrics.stop > 0
            self._save_due |= metrics.save > 0
            self._give_up |= metrics.give_up > 0
            if not (math.isfinite(metrics.loss) and math.isfinite(metrics.norm)):
                self._not_finite(inputs, metrics)
                continue
            self.progress.skipped_in_a_row = 0
            self.progress.step_seconds += seconds
            self.progress.tokens += inputs.tokens
            self.progress.final_loss = metrics.loss
            tokens_per_s = inputs.tokens / seconds
            self.write(
                StepEvent(
                    **inputs.fields(),
                    **metrics.fields(inputs.source_predictions),
                    tokens_per_s=tokens_per_s,
                    mfu=self._utilisation.mfu(tokens_per_s),
                    peak_memory_bytes=peak_memory_bytes(self.world.device),
                )
            )

    def _not_finite(self, inputs: StepInputs, metrics: StepMetrics) -> None:
        """Deal with a step that has left the adapter as it was. Collective under `rollback`.

        Raises:
            TrainingError: Where the recipe says so, or too many have come in a row.
        """
        self.progress.skipped_in_a_row += 1
        policy, reason = skip_or_roll_back(
            self.recipe.train, inputs.step, metrics, in_a_row=self.progress.skipped_in_a_row
        )
        fields: dict[str, Any] = {**inputs.fields(), "reason": reason}
        del fields["lr"]
        if policy == "skip":
            self.write(SkippedEvent(**fields))
            return
        newest = None if self.checkpointer is None else self.checkpointer.newest()
        if self.checkpointer is None or newest is None:
            raise TrainingError(
                f"{reason}, and there is no checkpoint to roll back to",
                where="train.non_finite",
                remedy="set checkpoint.every_steps, or non_finite: skip",
            )
        back_to = self.checkpointer.load(newest, self.optimizer)["step"]
        self.setup.engine.compute_timer.begin()
        self.write(RollbackEvent(**fields, back_to=back_to))

    def _settle(self) -> None:
        """Write the events of all steps, before anything is saved or scored."""
        self._publish(keep=0)

    def _evaluate(self, step: int) -> None:
        """Score the held-out rows; leaves the step unevaluated where it is asked to stop."""
        self.progress.evaluated = step
        if self.eval_set is None:
            return

        def wants_stop() -> bool:
            self.hooks.phase("evaluation", step)
            return self.hooks.stop_requested()

        wants_stop()
        ends = step in (0, self.plan.total_steps)
        try:
            result, events = evaluate(
                self.setup, self.eval_set, step, with_samples=ends, wants_stop=wants_stop
            )
        except ScoringStopped:
            self.progress.evaluated, self._stop = -1, True
            return
        self.progress.last = result
        if step == 0:
            self.progress.first = result
        self._go_on()
        for event in events:
            self.write(event)
        if not ends:  # a stop that came after the last batch had begun
            asked = torch.tensor(float(self.hooks.stop_requested()), device=self.world.device)
            self._stop = sum_over(asked).item() > 0

    def write(self, event: LedgerEvent) -> None:
        """Pass an event on to every tracker."""
        for tracker in self.trackers:
            tracker.write(event)
