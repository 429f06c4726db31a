"""The losses of preferences, as functions of what a model and its start make of each answer.

Every formula is that of TRL's trainers, with which the tests compare it.
"""

from dataclasses import dataclass
from typing import assert_never

import torch
from torch.nn import functional

from peft_dist.config.objective import Dpo, Ipo, Kto, Orpo, Preference, Reward, Simpo

_NEARLY_CERTAIN = -1e-6
"""Mean log-likelihood past which the odds of an answer would be infinite."""


@dataclass(frozen=True)
class Scored:
    """Some answers, each a row; all float32 [n].

    Attributes:
        logps: Log-likelihood of all its trained tokens.
        counts: How many those are.
        reference: The same log-likelihood at the start of training; zeros without a reference.
    """

    logps: torch.Tensor
    counts: torch.Tensor
    reference: torch.Tensor

    def part(self, which: slice) -> "Scored":
        """Return some of the answers."""
        return Scored(self.logps[which], self.counts[which], self.reference[which])

    @property
    def log_ratios(self) -> torch.Tensor:
        """How much likelier each answer has become since the start, in nats."""
        return self.logps - self.reference

    @property
    def per_token(self) -> torch.Tensor:
        """The same, on average per token."""
        return self.log_ratios / self.counts


def rewards(objective: Preference, answers: Scored) -> torch.Tensor:
    """Return what the objective takes for the reward of each answer, [n]."""
    match objective:
        case Dpo() | Ipo() | Kto():
            return objective.beta * answers.log_ratios
        case Orpo() | Simpo():
            return objective.beta * answers.logps / answers.counts
        case _:
            assert_never(objective)


def pair_losses(
    objective: Dpo | Ipo | Orpo | Simpo, chosen: Scored, rejected: Scored
) -> torch.Tensor:
    """Return the loss of each pair, [n], without the likelihood of the chosen answers."""
    match objective:
        case Dpo():
            if objective.length_normalised:
                gap = objective.beta * (chosen.per_token - rejected.per_token)
            else:
                gap = rewards(objective, chosen) - rewards(objective, rejected)
            return _likely_right(gap, objective.label_smoothing)
        case Ipo():
            # Per token, as its authors run it: else the square grows with the answers' lengths.
            gap = chosen.per_token - rejected.per_token
            return (gap - 1 / (2 * objective.beta)) ** 2
        case Orpo():
            odds = _log_odds(chosen) - _log_odds(rejected)
            return -objective.beta * functional.logsigmoid(odds)
        case Simpo():
            gap = rewards(objective, chosen) - rewards(objective, rejected)
            return _likely_right(gap - objective.gamma, objective.label_smoothing)
        case _:
            assert_never(objective)


def judged_losses(
    objective: Kto, answers: Scored, desirable: torch.Tensor, kl: torch.Tensor
) -> torch.Tensor:
    """Return the loss of each judged answer, [n].

    Args:
        objective: Its settings.
        answers: The answers.
        desirable: bool [n], the verdicts.
        kl: float32 [], how far the model is from its start on average, in nats; not negative.
    """
    gap = objective.beta * (answers.log_ratios - kl)
    good = objective.desirable_weight * torch.sigmoid(-gap)
    bad = objective.undesirable_weight * torch.sigmoid(gap)
    return torch.where(desirable, good, bad)


def reward_losses(objective: Reward, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Return the loss of each pair of rewards, [n]."""
    losses = -functional.logsigmoid(chosen - rejected)
    return losses + objective.center * (chosen + rejected) ** 2 if objective.center else losses


def _likely_right(gap: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Return -log of the chance that the first of each pair is the better one, [n]."""
    right = -functional.logsigmoid(gap)
    if not smoothing:
        return right
    return right * (1 - smoothing) - functional.logsigmoid(-gap) * smoothing


def _log_odds(answers: Scored) -> torch.Tensor:
    """Return log(p / (1 - p)) of each answer's mean likelihood per token, [n]."""
    mean = (answers.logps / answers.counts).clamp(max=_NEARLY_CERTAIN)
    return mean - torch.log(-torch.expm1(mean))
