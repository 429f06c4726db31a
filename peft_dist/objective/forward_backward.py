"""The passes of one step: rows to micro-batches, forward, loss, backward."""

import hashlib
from typing import NamedTuple

import torch

from peft_dist.config.batch_shape import micro_batch_rows
from peft_dist.data.order import RowIds, assign
from peft_dist.data.pack import Everyone
from peft_dist.data.tokenized_rows import StepRows, TokenizedRows
from peft_dist.model_setup import ModelSetup
from peft_dist.objective.passes import Scores, Share, make_pass
from peft_dist.objective.router import RouterBalance
from peft_dist.objective.source_loss import SourceLosses
from peft_dist.optim.loss_scale import LossScale


class StepSums(NamedTuple):
    """What this process adds to a step."""

    loss: torch.Tensor
    """float32 [], the sum over its micro-batches."""
    metrics: torch.Tensor
    """float32 [metrics], parts of the objective's figures."""
    divisor: float
    """What the loss of all processes is divided by."""


class ForwardBackward:
    """The passes over the rows of a step under the run's objective; gradients add up."""

    def __init__(self, setup: ModelSetup, rows: TokenizedRows, reference: Scores | None) -> None:
        """Take a model and rows.

        Args:
            setup: The loaded model.
            rows: Rows that micro-batches are taken from: all, or those of a first look.
            reference: [n_rows] scores of the rows at the start, where the objective has them.
        """
        self.setup, self._rows = setup, rows
        self._device, self._seed = setup.world.device, setup.recipe.train.seed
        self.micro_batch_rows = micro_batch_rows(setup.recipe)
        """Most rows of a pass: as the recipe says, until a measurement says better."""
        self.objective = make_pass(setup, rows, reference)
        self.router = RouterBalance(setup, rows)
        self.source_losses = SourceLosses(setup.recipe, rows, self._device)
        self.loss_scale = LossScale(self._device, setup.compute_dtype)

    def run(self, batch: StepRows) -> StepSums:
        """Pass over this process's share of a step's rows. Collective."""
        step, _, rows, ids = batch
        self._take_from(rows)
        world = self.setup.world
        shares = assign(
            ids,
            rows.example_lengths,
            world_size=world.size,
            micro_batch_size=self.micro_batch_rows,
        )
        groups, rows_of = shares[world.rank], self.objective.rows
        everyone = self.setup.everyone(rows, [[*map(rows_of, share)] for share in shares])
        # Every rank knows all rows, so the divisor of the whole global batch needs no exchange.
        divisor = self._begin(ids, groups)
        loss = torch.zeros((), dtype=torch.float32, device=self._device)
        metrics = torch.zeros(len(self.objective.metrics), device=self._device)
        for index, micro in enumerate(groups):
            self._seed_dropout(step, index)
            share = self._learn(micro, divisor, everyone[index])
            loss += share.loss
            metrics += share.metrics
        return StepSums(loss, metrics, divisor)

    def try_out(self, examples: RowIds) -> None:
        """Pass over one micro-batch, as in a step, and leave no trace of it. Collective."""
        self._learn(examples, self._begin(examples, [examples]), None)
        self.source_losses.take()
        self.setup.engine.zero_gradients()

    def _take_from(self, rows: TokenizedRows) -> None:
        """Take micro-batches from these rows from now on."""
        if rows is not self._rows:
            self.setup.check_rows(rows)
            self._rows = self.objective.data = self.router.rows = self.source_losses.rows = rows

    def _begin(self, examples: RowIds, groups: list[RowIds]) -> float:
        divisor = self.objective.begin(examples, groups)
        self.router.begin([*map(self.objective.rows, groups)])
        return divisor

    def _learn(self, micro: RowIds, divisor: float, everyone: Everyone | None) -> Share:
        """Run the examples of one micro-batch forward and backward.

        Args:
            micro: The examples.
            divisor: What `objective.begin` has returned for the global batch.
            everyone: What the other processes compute meanwhile, where they all know it.
        """
        rows = self.objective.rows(micro)
        batch = self.setup.pack(self._rows, rows, everyone).to(self._device)
        with self.setup.autocast():
            losses = self.setup.model(batch)
            share = self.objective.share(losses, batch, micro)
        self.source_losses.add(micro, batch, losses.nll)
        loss = share.loss + divisor * self.router.share(losses)
        self.loss_scale.scaled(loss / divisor).backward()
        return Share(loss.detach(), share.metrics)

    def _seed_dropout(self, step: int, index: int) -> None:
        """Make dropout a function of (seed, step, micro-batch), so that any restart repeats it.

        Many bases have dropout of their own, some of it in no module that could be asked.
        """
        world = self.setup.world
        key = f"{self._seed} {step} {index * world.size + world.rank}"
        digest = hashlib.sha256(key.encode("ascii")).digest()
        seed = int.from_bytes(digest[:8], "big") >> 1
        # Not by `torch.manual_seed`: for kinds of device that nobody uses it formats the stack,
        # each time, and asks the file system for every source file on it.
        torch.default_generator.manual_seed(seed)
        if self._device.type == "cuda":
            torch.cuda.manual_seed(seed)
