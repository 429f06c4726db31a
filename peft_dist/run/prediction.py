"""What was foreseen of a run before it began: `plan.json` in its directory."""

import json
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from peft_dist.config import Recipe, load_recipe, render_recipe
from peft_dist.run.directory import RunDir, write_text_atomic

Prediction: TypeAlias = Mapping[str, Any]
"""`bytes_per_rank` of tensors, `step_s` and `tokens_per_s` with rows of the longest length, and
what was chosen."""

MEASURES_ROWS, MEASURED_ROWS = "measures_rows", "measured_rows"
"""In it: whether the first start is to measure how many rows fit into a pass, and what it found."""


def read_prediction(run: RunDir) -> Prediction:
    """Return what was foreseen of a run; nothing where that is not known."""
    try:
        found = json.loads(run.plan.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def measures_rows(run: RunDir) -> bool:
    """Whether a run has yet to measure how many rows fit into a pass."""
    return read_prediction(run).get(MEASURES_ROWS) is True


def note_measured_rows(run: RunDir, rows: int) -> None:
    """Write the rows of a pass that a start has measured into the run's recipe, for good.

    Raises:
        RunDirError: Where the disk is full or the folder cannot be written.
    """
    recipe = with_rows(load_recipe(run.recipe, check_paths=False), rows)
    write_text_atomic(run.recipe, render_recipe(recipe))
    write_prediction(run, {**read_prediction(run), MEASURES_ROWS: False, MEASURED_ROWS: rows})


def as_measured(
    run: RunDir, recipe: Recipe, prediction: Prediction | None
) -> tuple[Recipe, Prediction | None]:
    """Return a recipe, and what is foreseen, as a run should go on by them.

    Where the rows of a pass are left open again, and nothing else is foreseen than when they were
    measured, the run keeps what was measured: to go on with other rows would round otherwise.
    """
    before = read_prediction(run)
    rows = before.get(MEASURED_ROWS)
    same = (
        "micro_batch_size",
        "strategy",
        "activation_checkpointing",
        "reshard",
        "dequantized_blocks",
        "bytes_per_rank",
    )
    if (
        prediction is None
        or not prediction.get(MEASURES_ROWS)
        or not isinstance(rows, int)
        or any(before.get(name) != prediction.get(name) for name in same)
    ):
        return recipe, prediction
    measured = {**prediction, MEASURES_ROWS: False, MEASURED_ROWS: rows}
    return with_rows(recipe, rows), measured


def with_rows(recipe: Recipe, rows: int) -> Recipe:
    """Return a recipe with another number of rows per process and pass."""
    train = recipe.train.model_copy(update={"micro_batch_size": rows})
    return recipe.model_copy(update={"train": train})


def planned_facts(run: RunDir) -> dict[str, float]:
    """Return what a start notes of it, by the ledger's names; nothing for what is no number."""
    foreseen = read_prediction(run)
    found: dict[str, float] = {}
    size, step_s = foreseen.get("bytes_per_rank"), foreseen.get("step_s")
    if isinstance(size, int):
        found["planned_bytes_per_rank"] = size
    if isinstance(step_s, float) and math.isfinite(step_s):
        found["planned_step_s"] = step_s
    return found


def write_prediction(run: RunDir, prediction: Prediction | None) -> None:
    """Note what is foreseen of a run, or that nothing is."""
    if prediction is None:
        run.plan.unlink(missing_ok=True)
    else:
        write_text_atomic(run.plan, json.dumps(prediction, indent=2) + "\n")
