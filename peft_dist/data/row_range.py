"""Splits and parts of them, as `datasets` writes them: `train`, `train[:10%]`, `train[-500:]`."""

import re
from dataclasses import dataclass

from peft_dist.common.errors import DataError

_BOUND = r"(-?\d{1,15})(%?)"
_SPLIT = re.compile(rf"([^\[\]]*)(?:\[(?:{_BOUND})?:(?:{_BOUND})?\])?")


@dataclass(frozen=True)
class Bound:
    """One end of a part: a row, or a percentage of the rows; below 0 counted from the end."""

    value: int
    is_percent: bool

    def row(self, n_rows: int) -> int:
        """Return the row it stands for; percentages are rounded to the nearest row."""
        value = round(self.value * n_rows / 100) if self.is_percent else self.value
        return min(n_rows, max(0, value + n_rows if value < 0 else value))


@dataclass(frozen=True)
class RowRange:
    """Rows from `start` up to, and without, `stop`; None: from the first, to the last."""

    start: Bound | None
    stop: Bound | None

    @property
    def is_relative(self) -> bool:
        """Whether which rows are meant depends on how many there are."""
        bounds = (self.start, self.stop)
        return any(bound is not None and (bound.is_percent or bound.value < 0) for bound in bounds)

    def of(self, n_rows: int) -> range:
        """Return the rows that are meant of so many, counted from 0."""
        start = 0 if self.start is None else self.start.row(n_rows)
        stop = n_rows if self.stop is None else self.stop.row(n_rows)
        return range(start, max(start, stop))


def parse_split(text: str, *, field: str) -> tuple[str, RowRange | None]:
    """Return the name of a split, and the part of it that is meant; None: all.

    Raises:
        DataError: For what is neither.
    """
    found = _SPLIT.fullmatch(text.strip())
    if found is None:
        raise DataError(
            f"got {text!r}", where=field, remedy="write it like train, train[:10%] or train[-500:]"
        )
    name, start, start_unit, stop, stop_unit = found.groups()
    if "[" not in text:
        return name, None
    bounds = [
        None if value is None else Bound(int(value), unit == "%")
        for value, unit in ((start, start_unit), (stop, stop_unit))
    ]
    for bound in bounds:
        if bound is not None and bound.is_percent and abs(bound.value) > 100:
            raise DataError(f"got {text!r}", where=field, remedy="give at most 100%")
    return name.strip(), RowRange(*bounds)
