"""How the rows of one optimizer step are divided over processes and passes."""

from dataclasses import dataclass

from peft_dist.common.errors import RecipeError
from peft_dist.config.recipe import Recipe

DEFAULT_GLOBAL_ROWS = 16
"""Rows per optimizer step where the recipe gives neither rows nor tokens."""


DEFAULT_MICRO_ROWS = 4
"""Rows per process and pass where the recipe leaves them open and no GPU is known."""


@dataclass(frozen=True)
class BatchShape:
    """How the rows of one optimizer step are spread; the fullest process counts."""

    rows_per_step: int
    rows_per_process: int
    accumulation: int
    """Passes per optimizer step."""


def require_settled(recipe: Recipe) -> None:
    """Refuse a recipe that leaves open what only the control plane can choose.

    Raises:
        RecipeError: Naming the field.
    """
    for field in ("micro_batch_size", "activation_checkpointing"):
        if getattr(recipe.train, field) == "auto":
            raise RecipeError(
                "got 'auto', which `peft-dist train` and `peft-dist submit` replace",
                where=f"train.{field}",
                remedy="start with one of them, or set a value",
            )


def micro_batch_rows(recipe: Recipe) -> int:
    """Return the most rows per process and pass; what is still open counts as the default."""
    rows = recipe.train.micro_batch_size
    return DEFAULT_MICRO_ROWS if rows == "auto" else rows


def longest_rows_of_step(recipe: Recipe) -> int:
    """Return how many examples a step has where all are as long as `data.max_length` allows."""
    tokens = recipe.train.global_batch_tokens
    if tokens is not None:
        return max(1, tokens // (recipe.data.max_length * recipe.rows_per_example))
    return recipe.train.global_batch_size or DEFAULT_GLOBAL_ROWS


def batch_shape(recipe: Recipe, processes: int) -> BatchShape | None:
    """Return the shape of a step, or None where `global_batch_tokens` leaves it to the rows."""
    if recipe.train.global_batch_tokens is not None:
        return None
    rows = recipe.train.global_batch_size or DEFAULT_GLOBAL_ROWS
    rows_per_process = -(-rows // processes)
    return BatchShape(
        rows_per_step=rows,
        rows_per_process=rows_per_process,
        accumulation=-(-rows_per_process // micro_batch_rows(recipe)),
    )
