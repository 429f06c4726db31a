"""Token ids against the rows of the model's embedding, before a weight is read.

A tokenizer that was extended and a model that was not lie in many a folder. Past the embedding a
CPU raises an IndexError, and a GPU a device assert that says nothing of tokens.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from peft_dist.common.errors import ModelError
from peft_dist.config import Recipe
from peft_dist.data.encode import load_tokenizer
from peft_dist.model.architectures import read_config


def refuse_unknown_ids(
    recipe: Recipe, folder: Path, texts: Mapping[str, NDArray[np.int32]]
) -> None:
    """Refuse a token that the model has no row for; reads config.json alone.

    Args:
        recipe: Names the model, and words that an adapter starts from.
        folder: The model.
        texts: Token ids by the field that they come from.

    Raises:
        ModelError: Naming the token, its id, where it stands, and the rows that there are.
    """
    rows: int = read_config(folder, task=recipe.model.task).vocab_size
    all_texts = dict(texts)
    words = getattr(recipe.method, "text", None)
    if words is not None:
        ids = load_tokenizer(recipe)(words, add_special_tokens=False)["input_ids"]
        all_texts["method.text"] = np.array(ids, dtype=np.int32)
    for field, ids in all_texts.items():
        highest = int(ids.max(initial=-1))
        if highest >= rows:
            token = load_tokenizer(recipe).convert_ids_to_tokens(highest)
            raise ModelError(
                f"the token {token!r} of {field} has id {highest}, but the model's embedding has "
                f"{rows} rows",
                where="model.name",
                remedy="put the tokenizer that the model was trained with beside it",
            )
