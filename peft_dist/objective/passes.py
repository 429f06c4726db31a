"""What one pass over a few examples adds to the loss of a step, for every objective.

All processes know all rows, so what a share is divided by needs no exchange: the loss is one of
the global batch, whatever shares it out.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from math import isnan
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from peft_dist.config.objective import Dpo, Ipo, Kto, Orpo, Preference, Reward, Sft, Simpo
from peft_dist.data.order import RowIds
from peft_dist.data.pack import Batch, to_device
from peft_dist.data.token_cache import TokenizedRows
from peft_dist.distributed.collectives import sum_over
from peft_dist.model.loss import Losses
from peft_dist.model_setup import ModelSetup
from peft_dist.objective.preference_losses import (
    Scored,
    judged_losses,
    pair_losses,
    reward_losses,
    rewards,
)

Scores = NDArray[np.float32]


class Share(NamedTuple):
    """What a micro-batch adds."""

    loss: torch.Tensor
    """float32 [], to be divided by the step's divisor; carries the gradient."""
    metrics: torch.Tensor
    """float32 [metrics], parts of means: their sum over all micro-batches is the figure."""


class ObjectivePass(ABC):
    """The passes over one set of rows under one objective."""

    metrics: tuple[str, ...] = ()
    """What is reported of a step besides its loss."""

    def __init__(self, setup: ModelSetup, rows: TokenizedRows) -> None:
        """Take a model and the rows it is trained or scored on."""
        self.setup, self.data = setup, rows

    @abstractmethod
    def begin(self, examples: RowIds, groups: Sequence[RowIds]) -> float:
        """Begin with a global batch; return what the sum of all losses is divided by.

        Collective where the objective needs it.

        Args:
            examples: All examples of the global batch.
            groups: This process's share of them, micro-batch by micro-batch.
        """

    def rows(self, examples: RowIds) -> RowIds:
        """Return the rows that the pass over these examples reads: all that they have."""
        return self.data.rows_of(examples)

    @abstractmethod
    def share(self, losses: Losses, batch: Batch, examples: RowIds) -> Share:
        """Return what these examples add, given what the model made of their rows."""

    def _nothing(self, losses: Losses) -> Share:
        """Return the share of a micro-batch without rows: its passes are for the others."""
        zeros = torch.zeros(len(self.metrics), device=losses.nll.device)
        return Share(losses.nll.sum(), zeros)


class SftPass(ObjectivePass):
    """The mean loss of all trained tokens of the batch; or of all rows, for classes."""

    def begin(self, examples: RowIds, groups: Sequence[RowIds]) -> float:
        """Count the predictions of the batch."""
        self._no_metrics = torch.zeros(0, device=self.setup.world.device)
        return int(self.data.predicted_counts[examples].sum())

    def share(self, losses: Losses, batch: Batch, examples: RowIds) -> Share:
        """Return the sum of the losses."""
        return Share(losses.nll.sum(), self._no_metrics)


class _Preferences(ObjectivePass):
    """What pairs and judged answers share: a score for each row, and its reference."""

    def __init__(
        self, setup: ModelSetup, rows: TokenizedRows, reference: Scores | None = None
    ) -> None:
        """Take a model, rows, and the rows' scores at the start where the objective has any."""
        super().__init__(setup, rows)
        zeros = np.zeros(rows.n_rows, dtype=np.float32)
        known = np.stack([rows.predicted_counts, zeros if reference is None else reference])
        self._known = known.astype(np.float32)

    def _to_device(self, values: NDArray[np.float32]) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        return to_device(tensor, self.setup.world.device)

    def _scored(self, losses: Losses, batch: Batch, rows: RowIds) -> Scored:
        counts, reference = self._to_device(self._known[:, rows])
        return Scored(row_scores(losses, batch), counts, reference)


class PairPass(_Preferences):
    """Chosen and rejected answers side by side in one pass; the mean over all pairs."""

    def __init__(
        self,
        setup: ModelSetup,
        rows: TokenizedRows,
        objective: Dpo | Ipo | Orpo | Simpo,
        reference: Scores | None = None,
    ) -> None:
        """Take the objective besides; see `_Preferences`."""
        super().__init__(setup, rows, reference)
        self.objective, self.metrics = objective, objective.metrics
        self._nll_weight = 1.0 if isinstance(objective, Orpo) else objective.sft_weight

    def begin(self, examples: RowIds, groups: Sequence[RowIds]) -> float:
        """Count the pairs of the batch, and the tokens of its chosen answers."""
        self._pairs = len(examples)
        self._chosen_tokens = int(self.data.predicted_counts[2 * examples].sum())
        return self._pairs

    def share(self, losses: Losses, batch: Batch, examples: RowIds) -> Share:
        """Return the sum of the pairs' losses, and their part in the batch's mean rewards."""
        if not len(examples):
            return self._nothing(losses)
        answers = self._scored(losses, batch, self.rows(examples))
        chosen, rejected = answers.part(slice(0, None, 2)), answers.part(slice(1, None, 2))
        loss = pair_losses(self.objective, chosen, rejected).sum()
        if self._nll_weight:
            mean_nll = -chosen.logps.sum() / self._chosen_tokens
            loss = loss + self._nll_weight * self._pairs * mean_nll
        with torch.no_grad():
            good, bad = rewards(self.objective, chosen), rewards(self.objective, rejected)
        return Share(loss, _mean_rewards(good, bad, self._pairs))


class RewardPass(ObjectivePass):
    """The rewards of chosen and rejected answers; the mean over all pairs."""

    def __init__(self, setup: ModelSetup, rows: TokenizedRows, objective: Reward) -> None:
        """Take the objective besides; see `ObjectivePass`."""
        super().__init__(setup, rows)
        self.objective, self.metrics = objective, objective.metrics

    def begin(self, examples: RowIds, groups: Sequence[RowIds]) -> float:
        """Count the pairs of the batch."""
        self._pairs = len(examples)
        return self._pairs

    def share(self, losses: Losses, batch: Batch, examples: RowIds) -> Share:
        """Return the sum of the pairs' losses, and their part in the batch's mean rewards."""
        if not len(examples):
            return self._nothing(losses)
        chosen, rejected = (-losses.nll).view(-1, 2).unbind(1)
        loss = reward_losses(self.objective, chosen, rejected).sum()
        return Share(loss, _mean_rewards(chosen.detach(), rejected.detach(), self._pairs))


class JudgedPass(_Preferences):
    """Single answers with verdicts (KTO); the mean over all of them."""

    def __init__(
        self, setup: ModelSetup, rows: TokenizedRows, objective: Kto, reference: Scores
    ) -> None:
        """Take the objective besides; see `_Preferences`."""
        super().__init__(setup, rows, reference)
        assert rows.desirable is not None, "the rows have no verdicts"
        self.objective, self.metrics = objective, objective.metrics
        self._verdicts = rows.desirable.astype(np.float32)

    def begin(self, examples: RowIds, groups: Sequence[RowIds]) -> float:
        """Measure how far the model is from its start, on mismatched answers. Collective.

        Without dropout, as the reference was. It takes a pass without gradients over as many rows
        as the batch has.
        """
        setup, device = self.setup, self.setup.world.device
        total = torch.zeros((), device=device)
        was_training = setup.model.training
        setup.model.eval()
        try:
            with torch.no_grad(), setup.autocast():
                for micro in groups:
                    rows = self.rows(micro) + 1
                    batch = setup.pack(self.data, rows).to(device)
                    losses: Losses = setup.model(batch)
                    if len(micro):
                        total += self._scored(losses, batch, rows).log_ratios.sum()
        finally:
            setup.model.train(was_training)
        self._kl = (sum_over(total) / len(examples)).clamp(min=0.0)
        desirable = int(self._verdicts[examples].sum())
        self._counts = len(examples), desirable, len(examples) - desirable
        return len(examples)

    def rows(self, examples: RowIds) -> RowIds:
        """Return the answers themselves; the mismatched ones stand behind each."""
        return 2 * examples

    def share(self, losses: Losses, batch: Batch, examples: RowIds) -> Share:
        """Return the sum of the answers' losses, and their part in the batch's mean rewards."""
        if not len(examples):
            return self._nothing(losses)
        answers = self._scored(losses, batch, self.rows(examples))
        desirable = self._to_device(self._verdicts[examples]) > 0
        loss = judged_losses(self.objective, answers, desirable, self._kl).sum()
        with torch.no_grad():
            reward, (total, good, bad) = rewards(self.objective, answers), self._counts
            zero = torch.zeros_like(reward)
            means = torch.stack(
                [
                    torch.where(desirable, reward, zero).sum() / (good or torch.nan),
                    torch.where(desirable, zero, reward).sum() / (bad or torch.nan),
                    self._kl * (len(examples) / total),
                ]
            )
        return Share(loss, means)


def _mean_rewards(chosen: torch.Tensor, rejected: torch.Tensor, pairs: int) -> torch.Tensor:
    """Return what a micro-batch adds to the `PAIR_METRICS` of so many pairs, float32 [3]."""
    # A tie is half right, so that a model which cannot tell the two apart has 0.5.
    right = ((chosen > rejected).float() + (chosen >= rejected).float()) / 2
    return torch.stack([chosen.sum(), rejected.sum(), right.sum()]) / pairs


def row_scores(losses: Losses, batch: Batch) -> torch.Tensor:
    """Return the log-likelihood of each row's trained tokens, float32 [rows]."""
    sums = torch.zeros(batch.n_rows, device=losses.nll.device)
    return -sums.index_add(0, batch.target_rows, losses.nll)


def with_margin(figures: Mapping[str, float]) -> dict[str, float]:
    """Return an objective's figures that there are, and how far apart its two rewards lie."""
    found = {name: value for name, value in figures.items() if not isnan(value)}
    if found.keys() >= {"reward_chosen", "reward_rejected"}:
        found["reward_margin"] = found["reward_chosen"] - found["reward_rejected"]
    return found


def make_pass(
    setup: ModelSetup, rows: TokenizedRows, reference: Scores | None = None
) -> ObjectivePass:
    """Return the passes of the recipe's objective over some rows.

    Args:
        setup: The model.
        rows: What it is trained or scored on.
        reference: [n_rows] the rows' scores at the start, for an objective that has them.
    """
    objective: Sft | Preference | Reward = setup.recipe.objective
    if objective.has_reference:
        assert reference is not None, f"{objective.kind} needs a reference"
    match objective:
        case Sft():
            return SftPass(setup, rows)
        case Kto():
            assert reference is not None
            return JudgedPass(setup, rows, objective, reference)
        case Reward():
            return RewardPass(setup, rows, objective)
        case _:
            return PairPass(setup, rows, objective, reference)
