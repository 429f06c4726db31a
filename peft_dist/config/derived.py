"""Numbers that follow from a recipe and a process count. Pure; reads no data and no machine."""

import math
from dataclasses import dataclass

from peft_dist.config.recipe import Recipe, Train

DEFAULT_GLOBAL_ROWS = 16
"""Rows per optimizer step where the recipe gives neither rows nor tokens."""


@dataclass(frozen=True)
class BatchShape:
    """How the rows of one optimizer step are spread; the fullest process counts."""

    rows_per_step: int
    rows_per_process: int
    accumulation: int
    """Passes per optimizer step."""


def batch_shape(recipe: Recipe, processes: int) -> BatchShape | None:
    """Return the shape of a step, or None where `global_batch_tokens` leaves it to the rows."""
    if recipe.train.global_batch_tokens is not None:
        return None
    rows = recipe.train.global_batch_size or DEFAULT_GLOBAL_ROWS
    rows_per_process = -(-rows // processes)
    return BatchShape(
        rows_per_step=rows,
        rows_per_process=rows_per_process,
        accumulation=-(-rows_per_process // recipe.train.micro_batch_size),
    )


def peak_learning_rate(recipe: Recipe) -> float:
    """Return the recipe's learning rate, or the one its method learns with."""
    return recipe.train.learning_rate or recipe.method.default_learning_rate


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
