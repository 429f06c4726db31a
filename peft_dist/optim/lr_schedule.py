"""The learning rate of each step."""

import math

from peft_dist.config.recipe import Recipe, Train


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
