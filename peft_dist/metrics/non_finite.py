"""What becomes of a step whose loss or gradient is not finite."""

import math
from typing import Literal

from peft_dist.common.errors import TrainingError
from peft_dist.config.recipe import Train
from peft_dist.metrics.step import StepMetrics
from peft_dist.optim.loss_scale import LEAST


def skip_or_roll_back(
    train: Train, step: int, metrics: StepMetrics, *, in_a_row: int
) -> tuple[Literal["skip", "rollback"], str]:
    """Return what to do about such a step, and why in words.

    Where only the gradients of float16 have overflowed, and their scale was halved for it, the
    step is left out whatever the recipe says.

    Args:
        train: The recipe's settings.
        step: Which one.
        metrics: Its figures.
        in_a_row: How many such steps have come one after another, this one included.

    Raises:
        TrainingError: Where the recipe says so, or too many have come in a row.
    """
    reason = f"loss {metrics.loss:g}, gradient norm {metrics.norm:g} at step {step}"
    overflow = math.isfinite(metrics.loss) and metrics.loss_scale > LEAST
    if metrics.loss_scale > LEAST:
        reason += f", loss scale {metrics.loss_scale:g}"
    policy = "skip" if overflow else train.non_finite
    if policy == "stop" or in_a_row > train.max_skipped_steps:
        raise TrainingError(
            reason + (f", not finite {in_a_row} times in a row" if in_a_row > 1 else ""),
            where="train.non_finite",
            remedy="lower train.learning_rate, or look at the rows; the adapter of the last "
            "checkpoint is sound",
        )
    return policy, reason
