"""How a recipe names rows: a file, several of them mixed, and the columns that are read."""

import re
from typing import Annotated, Any, Self

from pydantic import Discriminator, Field, PositiveInt, Tag, model_validator

from peft_dist.config.section import PositiveFloat, Section, Text

_SHARE = re.compile(r"\d+(\.\d+)?%")


class Columns(Section):
    """Which column, or key, of a row holds what."""

    prompt: Text | None = None
    """Column of the text that is only read."""
    completion: Text | None = None
    """Column of the text that is trained."""
    text: Text | None = None
    """Column of text of which every token is trained, or that is classified."""
    messages: Text | None = None
    """Column of the turns of a conversation."""
    chosen: Text | None = None
    """Column of the better of two answers, for objectives that read pairs."""
    rejected: Text | None = None
    """Column of the worse one."""
    label: Text | None = None
    """Column of the class, or of the verdict on an answer."""

    def names(self) -> dict[str, str]:
        """Return the column of each of our keys that has another name."""
        return self.model_dump(exclude_none=True)


class RowSource(Section):
    """One of several sources, and how much of it is in every epoch of the mixture."""

    path: Text
    """File, pattern of files, folder or hub name, as for a single source."""
    split: Text | None = None
    """Split, or part of one, as `train_split` has it. Default: `train_split`."""
    columns: Columns | None = None
    """Which column holds what. Default: as `data.columns` says."""
    template: Text | None = None
    """File with the chat template of its conversations (relative to the recipe). Default: as
    `data.template` says."""
    weight: PositiveFloat | None = None
    """Share of the mixture: of 3 and 1, three rows of four. An epoch has as many rows as all
    sources together; small sources repeat, large ones go on in the next epoch. All have one, or
    none."""
    rows: PositiveInt | None = None
    """Rows of it in every epoch."""
    epochs: PositiveFloat | None = None
    """Passes over it in every epoch. Default: 1 where neither `weight` nor `rows` is given."""

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        given = [name for name in AMOUNTS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both given; keep one of them")
        return self


AMOUNTS = ("weight", "rows", "epochs")
"""Fields that say how much of a source is in an epoch."""


def _kind(value: Any) -> str:
    return "list" if isinstance(value, list | tuple) else "text"


def _kind_of_eval(value: Any) -> str:
    return "number" if isinstance(value, int) else _kind(value)


_Name = Annotated[Text, Tag("text")]
_List = Annotated[tuple[RowSource, ...], Field(min_length=1), Tag("list")]
TrainSources = Annotated[_Name | _List, Discriminator(_kind)]
"""A name, or a list of sources."""
EvalSources = Annotated[
    _Name | _List | Annotated[PositiveInt, Tag("number")], Discriminator(_kind_of_eval)
]
"""A name, a list of sources, or the part of the training rows that is held out."""


def held_out(value: Any) -> int | float | None:
    """Return how many of the training rows are held out, or what share; None: none of them.

    Raises:
        ValueError: For a share that is nothing or all.
    """
    if isinstance(value, int):
        return value
    if not isinstance(value, str) or not _SHARE.fullmatch(value):
        return None
    share = float(value[:-1]) / 100
    if not 0 < share < 1:
        raise ValueError(f"eval {value} must be above 0% and below 100%")
    return share


def require_one_kind_of_amount(sources: tuple[RowSource, ...]) -> None:
    """Refuse sources of which some have a weight.

    Raises:
        ValueError: Naming one without.
    """
    without = [source.path for source in sources if source.weight is None]
    if without and len(without) < len(sources):
        raise ValueError(
            f"train mixes sources with a weight and without ({without[0]}); give all a weight, or "
            "use rows and epochs"
        )
