"""Faults of one machine's files: what the others have is missing there."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.faults.seams import replace_function, wrap

if TYPE_CHECKING:
    from tests.faults.hooks import Rank


def without_rows(here: "Rank", *, rank: int) -> None:
    """Let one rank look for its rows in a folder that does not have them."""
    if not here.is_one_of(rank):
        return
    from peft_dist.data import token_cache

    read = token_cache.tokenize_rows

    def read_elsewhere(recipe: Any, *rest: Any) -> Any:
        absent = Path(recipe.data.train).with_name("absent") / "rows.jsonl"
        data = recipe.data.model_copy(update={"train": str(absent)})
        return read(recipe.model_copy(update={"data": data}), *rest)

    replace_function(read, read_elsewhere)


def bug_while_loading(here: "Rank", *, rank: int) -> None:
    """Let one rank meet a fault of code in its rows, as a broken template is one."""
    if not here.is_one_of(rank):
        return
    from peft_dist.data import token_cache

    def broken(*_rest: Any) -> Any:
        raise TypeError("planted while loading")

    replace_function(token_cache.tokenize_rows, broken)


def other_recipe(here: "Rank", *, rank: int, changes: dict[str, Any]) -> None:
    """Let one rank read another recipe, as from a stale copy: `{"section.field": value}`."""
    if not here.is_one_of(rank):
        return
    from peft_dist.config import load

    read = load.load_recipe

    def read_other(path: Any, overrides: Any = (), **options: Any) -> Any:
        own = [f"{key}={value}" for key, value in changes.items()]
        return read(path, [*overrides, *own], **options)

    replace_function(read, read_other)


def other_base(here: "Rank", *, rank: int) -> None:
    """Let one rank hold another base than what it read, as where memory or a copy is bad."""
    if not here.is_one_of(rank):
        return
    import torch

    from peft_dist.model.source import BaseSource

    def fill(method: Any, self: Any, parameters: Any, *rest: Any, **named: Any) -> Any:
        found = method(self, parameters, *rest, **named)
        with torch.no_grad():
            base = (p for p in parameters.values() if not p.requires_grad)
            next(p for p in base if p.is_floating_point()).view(-1)[-1].add_(1)
        return found

    wrap(BaseSource, "fill", fill)
