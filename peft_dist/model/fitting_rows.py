"""Refuse rows that a model has no place for: in its embedding, or in its table of positions."""

from transformers import PretrainedConfig

from peft_dist.common.errors import DataError
from peft_dist.config import Recipe
from peft_dist.config.batch_shape import micro_batch_rows
from peft_dist.data.known_ids import refuse_ids_above
from peft_dist.data.token_cache import TokenizedRows
from peft_dist.model import architectures


def refuse_rows_that_do_not_fit(
    config: PretrainedConfig,
    recipe: Recipe,
    rows: TokenizedRows,
    max_positions: int | None,
    learned: int,
) -> None:
    """Compare rows with the positions and the embedding that a model has.

    Args:
        config: The model's.
        recipe: The run's recipe.
        rows: All rows, or those of a step.
        max_positions: Most tokens of a row, where the model has a table of positions.
        learned: Positions before a row that the adapter takes up.

    Raises:
        DataError: Where a model with a table of positions has none for the end of a row.
        ModelError: For a token that the model has no row for.
    """
    refuse_ids_above(config.get_text_config().vocab_size, recipe, "data.train", rows.tokens)
    longest = int(rows.lengths.max())
    limit = architectures.rope_limit(config)
    if limit and longest > limit and micro_batch_rows(recipe) > 1:
        raise DataError(
            f"a row has {longest} tokens, and above {limit} {config.model_type} takes other "
            "positions for all rows that are computed together",
            where="data.max_length",
            remedy=f"set it to {limit}, or train.micro_batch_size to 1",
        )
    if max_positions is not None and longest > max_positions:
        raise DataError(
            f"a row has {longest} tokens, but {config.model_type} has places for "
            f"{max_positions}" + (f" behind {learned} learned ones" if learned else ""),
            where="data.max_length",
            remedy=f"set it to {max_positions}",
        )
