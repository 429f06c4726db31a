"""The training loop: rows of a step, passes, one update, a record.

Knows no file format, no engine by name and no command line.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from peft_dist.config.derived import peak_learning_rate
from peft_dist.config.recipe import Train
from peft_dist.data.order import RowIds, StepPlan, assign
from peft_dist.data.tokenize import TokenizedRows
from peft_dist.errors import TrainingError
from peft_dist.memory import peak_memory_bytes
from peft_dist.scoring import HeldOut, Score, score
from peft_dist.session import Session
from peft_dist.tracking import Record, Tracker


@dataclass(frozen=True)
class Outcome:
    """What a finished training leaves besides the adapter."""

    first: Score | None
    last: Score | None
    steps: int
    final_loss: float
    tokens: int
    step_seconds: float
    """Time spent in steps, evaluations and saves left out."""


def learning_rate(train: Train, step: int, total_steps: int, *, peak: float) -> float:
    """Return the learning rate of a step, which counts from 1.

    Rises linearly over the warm-up, so that the first step is not wasted on a rate of zero, then
    decays as the recipe says; the rate after the last step would be zero.
    """
    warmup = round(train.warmup_fraction * total_steps)
    if step <= warmup:
        return peak * step / warmup
    if train.schedule == "constant":
        return peak
    progress = (step - 1 - warmup) / max(1, total_steps - warmup)
    left = 1.0 - progress if train.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return peak * left


def make_optimizer(session: Session) -> torch.optim.AdamW:
    """Return AdamW over the adapter; vectors (biases, magnitudes) do not decay.

    Groups are those that hold a parameter: DeepSpeed and torch's state loading trip over an empty
    one.
    """
    train = session.recipe.train
    groups = [
        {
            "params": [flat],
            "weight_decay": train.weight_decay if group.decays else 0.0,
            "rate_factor": group.rate_factor,
        }
        for group, flat in session.engine.flat_parameters().items()
    ]
    return torch.optim.AdamW(groups, betas=train.betas, eps=train.epsilon, fused=True)


class Trainer:
    """One training of one session on one set of rows."""

    def __init__(
        self,
        session: Session,
        rows: TokenizedRows,
        held: HeldOut | None,
        *,
        save: Callable[[int], None],
    ) -> None:
        """Prepare; nothing runs yet.

        Args:
            session: The loaded model.
            rows: Training rows.
            held: Held-out rows, if any.
            save: Keeps a copy of the adapter after a step; called on every rank.
        """
        self.session, self.rows, self.held = session, rows, held
        self.recipe, self.world = session.recipe, session.world
        self.save = save
        self.trackers: list[Tracker] = []
        """Views of the run; stays empty on every rank but 0."""
        self.plan = StepPlan.of(self.recipe.train, rows.lengths)
        self.peak_rate = peak_learning_rate(self.recipe)
        self.optimizer = session.engine.share_optimizer(make_optimizer(session))
        # A GPU's figures are read one step late, so that the host never waits for the device.
        self._read_late = self.world.device.type == "cuda"
        self._unread: deque[tuple[Record, torch.Tensor, torch.cuda.Event | None]] = deque()
        self._mark = time.monotonic()
        self._step_seconds, self._tokens, self._final_loss = 0.0, 0, math.nan

    def run(self) -> Outcome:
        """Train to the end. Collective.

        Raises:
            TrainingError: For a loss or gradient that is not finite, or a full disk.
        """
        recipe, total = self.recipe, self.plan.total_steps
        first = last = self._evaluate(0)
        self.session.model.train()
        self._mark = time.monotonic()
        for step, _, ids in self.plan.steps():
            self._step(step, total, ids)
            if step == 1:
                self.session.check_adapters_agree()
            if recipe.checkpoint.every_steps and step % recipe.checkpoint.every_steps == 0:
                self._settle()
                self._off_the_clock(lambda step=step: self.save(step))
            every = recipe.evaluate.every_steps
            if step == total or (every and step % every == 0):
                self._settle()
                last = self._off_the_clock(lambda step=step: self._evaluate(step))
        self._settle()
        return Outcome(first, last, total, self._final_loss, self._tokens, self._step_seconds)

    def _step(self, step: int, total: int, ids: RowIds) -> None:
        """Train on the rows of one step and update the adapter once."""
        engine, device = self.session.engine, self.world.device
        groups = assign(
            ids,
            self.rows.lengths,
            world_size=self.world.size,
            micro_batch_size=self.recipe.train.micro_batch_size,
        )[self.world.rank]
        # Every rank knows all rows, so the divisor of the whole global batch needs no exchange.
        predictions = int(self.rows.predicted_counts[ids].sum())
        loss = torch.zeros((), dtype=torch.float32, device=device)
        for index, micro in enumerate(groups):
            batch = self.session.pack(self.rows, micro)
            if self._read_late:
                batch = batch.pin_memory()
            batch = batch.to(device)
            self._seed_dropout(step, index)
            with self.session.autocast():
                nll_sum = self.session.model(batch).nll.sum()
            (nll_sum / predictions).backward()
            loss += nll_sum.detach()
        loss = engine.reduce(loss)
        norm = engine.clip(self.recipe.train.max_grad_norm)
        rate = learning_rate(self.recipe.train, step, total, peak=self.peak_rate)
        record: Record = {
            "event": "step",
            "step": step,
            "lr": rate,
            "rows": len(ids),
            "tokens": int(self.rows.lengths[ids].sum()),
        }
        self._read(record, torch.stack([loss / predictions, norm.float()]))
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate_factor"]
        self.optimizer.step()
        engine.zero_gradients()
        self._publish(keep=1 if self._read_late else 0)

    def _seed_dropout(self, step: int, index: int) -> None:
        """Make dropout a function of (seed, step, micro-batch), so that any restart repeats it.

        Many bases have dropout of their own, some of it in no module that could be asked.
        """
        place = index * self.world.size + self.world.rank
        torch.manual_seed(hash((self.recipe.train.seed, step, place)) & (2**63 - 1))

    def _read(self, record: Record, figures: torch.Tensor) -> None:
        """Take a step's [loss, gradient norm]; on a CPU look at them before the update."""
        if not self._read_late:
            self._check(record, figures)
            self._unread.append((record, figures, None))
            return
        host = torch.empty(2, pin_memory=True)
        host.copy_(figures, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._unread.append((record, host, event))

    def _check(self, record: Record, figures: torch.Tensor) -> None:
        if not bool(torch.isfinite(figures).all()):
            loss, norm = figures.tolist()
            raise TrainingError(
                f"loss {loss:g}, gradient norm {norm:g} at step {record['step']}",
                where="train",
                remedy="lower train.learning_rate, or look at the rows; no adapter was written "
                "after this step",
            )

    def _publish(self, *, keep: int) -> None:
        """Write the records of all but the last `keep` steps."""
        while len(self._unread) > keep:
            record, figures, event = self._unread.popleft()
            if event is not None:
                event.synchronize()
                self._check(record, figures)
            now = time.monotonic()
            seconds = now - self._mark
            self._mark = now
            loss, norm = figures.tolist()
            self._step_seconds += seconds
            self._tokens += record["tokens"]
            self._final_loss = loss
            self._tell(
                record
                | {
                    "loss": loss,
                    "grad_norm": norm,
                    "tokens_per_s": record["tokens"] / seconds,
                    "peak_memory_bytes": peak_memory_bytes(self.world.device),
                }
            )

    def _settle(self) -> None:
        """Bring every record up to date, before anything is saved or scored."""
        self._publish(keep=0)

    def _off_the_clock(self, work: Callable[[], Score | None]) -> Score | None:
        result = work()
        self._mark = time.monotonic()
        return result

    def _evaluate(self, step: int) -> Score | None:
        if self.held is None:
            return None
        started = time.monotonic()
        result = score(self.session, self.held)
        if not math.isfinite(result.loss):
            raise TrainingError(
                f"held-out loss {result.loss} after step {step}",
                where="evaluate",
                remedy="look at the model's weights and the held-out rows",
            )
        self._tell(
            {
                "event": "evaluation",
                "step": step,
                "eval_loss": result.loss,
                "eval_accuracy": result.accuracy,
                "eval_seconds": time.monotonic() - started,
            }
        )
        return result

    def _tell(self, record: Record) -> None:
        record["time"] = time.time()
        for tracker in self.trackers:
            tracker.write(record)
