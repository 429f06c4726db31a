"""What two recipes of one run may not differ in: whatever changes what is learned."""

from collections.abc import Collection, Mapping
from typing import Any

from peft_dist.common.errors import RunDirError
from peft_dist.config.recipe import Recipe

FREE = (
    "model.name",  # weights and rows are compared by content, wherever they lie
    "model.revision",
    "model.attention",
    "model.compile",
    "method.start_from",  # compared by content
    "method.fused",
    "data",
    "evaluate",
    "parallel",
    "checkpoint",
    "watchdog",
    "tracking",
    "profile",
    "train.micro_batch_size",
    "train.activation_checkpointing",
    "train.deterministic",
    "train.non_finite",
    "train.max_skipped_steps",
)
"""Fields and sections that a run may go on with another value of."""


def learning_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that decide what is learned, by dotted field."""
    return all_settings(recipe, without=FREE)


def all_settings(recipe: Recipe, *, without: Collection[str] = ()) -> dict[str, Any]:
    """Return the settings of a recipe by dotted field, without some fields and sections."""
    found: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if path in without:
            return
        if isinstance(value, Mapping):
            for key, item in value.items():
                walk(item, f"{path}.{key}" if path else str(key))
        else:
            found[path] = value

    walk(recipe.model_dump(mode="json"), "")
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Return `OLD before, NEW now` for each field whose values differ."""
    return {
        field: f"{old.get(field)} before, {new.get(field)} now"
        for field in sorted(old.keys() | new.keys())
        if old.get(field) != new.get(field)
    }


def refuse_changes(changes: Mapping[str, str], allowed: Collection[str], *, where: str) -> None:
    """Refuse to go on with a run whose recipe, rows or model have changed.

    Args:
        changes: `OLD before, NEW now` by field.
        allowed: Fields that may change.
        where: The run.

    Raises:
        RunDirError: Naming every field with its two values.
    """
    refused = {field: change for field, change in changes.items() if field not in allowed}
    if not refused:
        return
    (first, change), *rest = refused.items()
    others = "".join(f"; {field}: {text}" for field, text in rest)
    raise RunDirError(
        f"{first} is not what the run has been trained with: {change}{others}",
        where=where,
        remedy="put it back, go on all the same with "
        + " ".join(f"--allow-changed {field}" for field in refused)
        + ", or begin anew with `peft-dist train RECIPE --fresh`",
    )
