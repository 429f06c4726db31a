"""Token ids against the rows of the model's embedding, before a weight is read.

A tokenizer that was extended and a model that was not lie in many a folder. Past the embedding a
CPU raises an IndexError, and a GPU a device assert that says nothing of tokens.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from peft_dist.common.errors import RecipeError, nearest
from peft_dist.config import Recipe
from peft_dist.config.method import Lora, Method
from peft_dist.data.encode import load_tokenizer
from peft_dist.data.known_ids import refuse_ids_above
from peft_dist.model.architectures import read_config

_ROWS_AT_ONCE = 1024
_WHOLE_NUMBERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def with_token_ids(recipe: Recipe, rows: int) -> Method:
    """Return the method's settings with an id for each token that is trained by its name.

    Args:
        recipe: The run's recipe.
        rows: Of the model's embedding.

    Raises:
        RecipeError: For a token that the tokenizer does not know, or an id past the embedding.
    """
    method = recipe.method
    if not isinstance(method, Lora) or not method.trainable_tokens:
        return method
    where = "method.trainable_tokens"
    ids: set[int] = set()
    for token in method.trainable_tokens:
        found = token
        if isinstance(token, str):
            known = load_tokenizer(recipe).get_vocab()
            if token not in known:
                added = load_tokenizer(recipe).get_added_vocab()
                raise RecipeError(
                    f"the tokenizer has no token {token!r}",
                    where=where,
                    remedy=nearest(token, added) if added else "add it to the tokenizer",
                )
            found = known[token]
        assert isinstance(found, int)
        if found >= rows:
            raise RecipeError(
                f"{token!r} has id {found}, but the model's embedding has {rows} rows"
                if found != token
                else f"{found} is no row of the model's embedding, which has {rows}",
                where=where,
                remedy="resize the embedding, and save model and tokenizer together",
            )
        ids.add(found)
    return method.model_copy(update={"trainable_tokens": tuple(sorted(ids))})


def untrained_rows(
    weight: torch.Tensor, used: NDArray[np.int64], *, least: float = 1e-2
) -> list[int]:
    """Return tokens whose row nobody has trained, of some that data uses.

    Such a row is a small part as long as others are, as padding of the vocabulary often is, or has
    the very values of another used row.

    Args:
        weight: The embedding, [V, H].
        used: Token ids, each once.
        least: What part of the median length a trained row has at least.
    """
    width = weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(1 << 40, (width,), generator=generator).to(weight.device)
    lengths, sums = [], []
    # Part by part: a copy of the whole in float32 could be larger than the rest of a GPU.
    for ids in torch.from_numpy(used).to(weight.device).split(_ROWS_AT_ONCE):
        rows = weight[ids].contiguous()
        lengths.append(rows.float().norm(dim=1))
        # Equal rows have equal sums, exactly: of whole numbers the order does not matter.
        bits = rows.view(_WHOLE_NUMBERS[rows.element_size()]).long()
        sums.append((bits * factors).sum(dim=1))
    length = torch.cat(lengths)
    _, group, count = torch.unique(torch.cat(sums), return_inverse=True, return_counts=True)
    odd = (length < least * length.median()) | (count[group] > 1)
    return [int(one) for one in used[odd.cpu().numpy()]]


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
    rows: int = read_config(folder, task=recipe.model.task).get_text_config().vocab_size
    all_texts = dict(texts)
    words = getattr(recipe.method, "text", None)
    if words is not None:
        ids = load_tokenizer(recipe)(words, add_special_tokens=False)["input_ids"]
        all_texts["method.text"] = np.array(ids, dtype=np.int32)
    for field, ids in all_texts.items():
        refuse_ids_above(rows, recipe, field, ids)
