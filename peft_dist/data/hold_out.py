"""Which of the training rows are held out: a function of their content and a seed.

A row is held out wherever it stands, so a copy of it is never trained, whatever is added to the
file or in which order.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any, Self

import numpy as np

from peft_dist.common.errors import DataError
from peft_dist.data.preference_rows import AnyRow


class HoldOut:
    """The held-out part of some rows."""

    def __init__(self, seed: int, highest: int) -> None:
        """Hold out the rows whose hash is at most `highest`."""
        self._seed, self._highest = seed, highest

    @classmethod
    def of(cls, rows: Iterable[AnyRow], *, size: int | float, seed: int) -> Self:
        """Return the part of `size` rows, or of a share of them; copies of a row may add to it.

        Raises:
            DataError: None would be left to train.
        """
        hashes = np.fromiter((_hash(row, seed) for row in rows), dtype=np.uint64)
        count = size if isinstance(size, int) else max(1, round(size * len(hashes)))
        if count < len(hashes):
            highest = np.partition(hashes, count - 1)[count - 1]
            if highest < hashes.max():
                return cls(seed, int(highest))
        raise DataError(
            f"{count:,} of {len(hashes):,} rows held out leave none to train",
            where="data.eval",
            remedy="hold out fewer",
        )

    def has(self, row: AnyRow) -> bool:
        """Whether a row is held out."""
        return _hash(row, self._seed) <= self._highest


def _hash(row: AnyRow, seed: int) -> int:
    text = repr(_content(row)).encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(text, digest_size=8, key=seed.to_bytes(8, "big"))
    return int.from_bytes(digest.digest(), "big")


def _content(value: Any) -> Any:
    """Return all that a row holds, and not where it stands."""
    if not is_dataclass(value):
        return value
    kept = [getattr(value, field.name) for field in fields(value) if field.name != "line"]
    return type(value).__name__, [_content(item) for item in kept]
