"""Token ids that the model's embedding has no row for; needs no torch."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from peft_dist.common import paths
from peft_dist.common.errors import ModelError
from peft_dist.config.models import read_model_config
from peft_dist.config.recipe import Recipe
from peft_dist.data.encode import load_tokenizer


def rows_of_embedding(recipe: Recipe) -> int | None:
    """Return how many tokens the model has rows for; None where no config.json here says so."""
    from huggingface_hub import try_to_load_from_cache

    name = recipe.model.name
    file = (paths.staged(name) or Path(name).expanduser()) / "config.json"
    if not file.parent.is_dir():
        found = try_to_load_from_cache(name, file.name, revision=recipe.model.revision)
        file = Path(found) if isinstance(found, str) else file
    if not file.is_file():
        return None
    config = read_model_config(file)
    text_config = config.get("text_config")
    rows = (text_config if isinstance(text_config, dict) else config).get("vocab_size")
    return rows if isinstance(rows, int) else None


def refuse_ids_above(rows: int, recipe: Recipe, field: str, ids: NDArray[np.int32]) -> None:
    """Refuse a token that an embedding with so many rows has none for; `field` holds its text.

    Raises:
        ModelError: Naming the token, its id, where it stands, and the rows that there are.
    """
    highest = int(ids.max(initial=-1))
    if highest < rows:
        return
    token = load_tokenizer(recipe).convert_ids_to_tokens(highest)
    raise ModelError(
        f"the token {token!r} of {field} has id {highest}, but the model's embedding has {rows} "
        "rows",
        where="model.name",
        remedy="put the tokenizer that the model was trained with beside it",
    )
