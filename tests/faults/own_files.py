"""Faults of one machine's files: what the others have is missing there."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.faults.seams import replace_function

if TYPE_CHECKING:
    from tests.faults.hooks import Rank


def without_rows(here: "Rank", *, rank: int) -> None:
    """Let one rank look for its rows in a folder that does not have them."""
    if not here.is_one_of(rank):
        return
    from peft_dist.data import tokenize

    read = tokenize.tokenize_rows

    def read_elsewhere(recipe: Any, *rest: Any) -> Any:
        absent = Path(recipe.data.train).with_name("absent") / "rows.jsonl"
        data = recipe.data.model_copy(update={"train": str(absent)})
        return read(recipe.model_copy(update={"data": data}), *rest)

    replace_function(read, read_elsewhere)
