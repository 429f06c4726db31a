"""How the rows of one optimizer step are divided over processes and passes."""

from dataclasses import dataclass

from peft_dist.config.recipe import Recipe

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
