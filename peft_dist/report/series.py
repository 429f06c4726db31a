"""Series of numbers over the steps of a run, and their reduction to what a page can hold.

A thinned series keeps the lowest and the highest number of every part, so that no spike is lost.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Self

from peft_dist.ledger.events import LedgerEvent

MOST_POINTS = 1_000
"""Points of one line in a figure; more could not be distinguished."""
NUMBERS = frozenset((int, float))
"""Types that are numbers in a JSON file; `true` is none."""
PARTS = 40
"""A mean is taken over this part of a run."""


def number(value: Any) -> float | None:
    """Return a finite number as it stands in a JSON file, None for anything else."""
    if type(value) not in NUMBERS or not math.isfinite(value):
        return None
    return float(value)


def numbers(value: Any) -> list[float]:
    """Return a list of finite numbers as it stands in a JSON file; empty for anything else."""
    if not isinstance(value, list) or not NUMBERS.issuperset(map(type, value)):
        return []
    return value if all(map(math.isfinite, value)) else []


@dataclass(frozen=True)
class Series:
    """Points of one line, in order."""

    x: Sequence[float]
    y: Sequence[float]

    @classmethod
    def of(cls, events: Iterable[LedgerEvent], name: str) -> Self:
        """Return one field of the events over their steps; events without it are left out."""
        pairs = [
            (event.step, value) for event in events if (value := getattr(event, name)) is not None
        ]
        return cls([step for step, _ in pairs], [value for _, value in pairs])

    def __len__(self) -> int:
        return len(self.y)

    @property
    def window(self) -> int:
        """Return over how many points `mean` is taken; 1 where there are too few of them."""
        return max(1, len(self) // PARTS)

    def mean(self) -> Self:
        """Return the mean of every point and its neighbours, `window` of them in all."""
        if self.window == 1:
            return self
        before = (self.window - 1) // 2
        sums = list(accumulate(self.y, initial=0.0))
        means = []
        for index in range(len(self)):
            begin = max(0, index - before)
            end = min(len(self), index - before + self.window)
            means.append((sums[end] - sums[begin]) / (end - begin))
        return type(self)(self.x, means)

    def thinned(self, at_most: int = MOST_POINTS) -> Self:
        """Return at most so many points: the lowest and the highest of equal parts, and the ends.

        Args:
            at_most: The limit; 4 or more.
        """
        if len(self) <= at_most:
            return self
        parts = (at_most - 2) // 2
        last = len(self) - 1
        kept = {0, last}
        for part in range(parts):
            inside = range(last * part // parts, max(last * (part + 1) // parts, 1))
            kept |= {min(inside, key=self.y.__getitem__), max(inside, key=self.y.__getitem__)}
        order = sorted(kept)
        return type(self)([self.x[i] for i in order], [self.y[i] for i in order])

    def at(self, step: float) -> float | None:
        """Return the last value up to a step."""
        index = bisect_right(self.x, step)
        return self.y[index - 1] if index else None


def short(values: Iterable[float]) -> list[float]:
    """Return numbers as a figure needs them: six digits, whole ones without a point."""
    return [int(value) if value == int(value) else float(f"{value:.6g}") for value in values]


def quantile(values: Sequence[float], part: float) -> float:
    """Return the value that this part of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]
