"""The one day that the chat templates of a run take for today, on every rank and in every start."""

import datetime as dt
from contextlib import suppress
from pathlib import Path

from peft_dist.common.errors import PeftDistError
from peft_dist.config.load import load_recipe
from peft_dist.config.recipe import Recipe


def with_date(recipe: Recipe, day: dt.date | None = None) -> Recipe:
    """Return a recipe with a `data.date`: as it is written, else this day, else today in UTC."""
    if recipe.data.date is not None:
        return recipe
    day = day or dt.datetime.now(dt.UTC).date()
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"date": day})})


def date_in(path: Path) -> dt.date | None:
    """Return the date that a recipe file has; None where it has none or cannot be read."""
    with suppress(PeftDistError):  # which others say who need more of it
        return load_recipe(path, check_paths=False).data.date
    return None
