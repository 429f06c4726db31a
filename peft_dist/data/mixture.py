"""How many rows of each source an epoch of a mixture holds, as the recipe says."""

from collections.abc import Sequence

from peft_dist.common.errors import DataError
from peft_dist.config.data import Data
from peft_dist.config.row_sources import RowSource
from peft_dist.data.order import SourceShare

MOST_ROWS = 1_000_000_000
"""Rows that an epoch may have: their order is kept in memory, 8 bytes each."""


def source_shares(data: Data, n_rows: Sequence[int]) -> tuple[SourceShare, ...]:
    """Return the share of every training source.

    Args:
        data: The recipe's section.
        n_rows: Rows of each source.

    Raises:
        DataError: For a source that is so small a part that no row of it would come, or so large a
            one that an epoch of it has no end.
    """
    sources = data.sources("train")
    weights = [source.weight for source in sources if source.weight is not None]
    if weights:
        counts = _by_weight(weights, sum(n_rows))
    else:
        counts = [_count(source, rows) for source, rows in zip(sources, n_rows, strict=True)]
    for at, (source, count) in enumerate(zip(sources, counts, strict=True)):
        if not count:
            raise DataError(
                f"none of {source.path} is in an epoch of {sum(counts):,} rows",
                where=f"data.train[{at}]",
                remedy="raise its weight or epochs, or remove it",
            )
        if count > MOST_ROWS:
            raise DataError(
                f"an epoch would have more than {MOST_ROWS:,} rows of {source.path}",
                where=f"data.train[{at}]",
                remedy="lower its rows or epochs",
            )
    return tuple(map(SourceShare, n_rows, counts))


def _count(source: RowSource, n_rows: int) -> int:
    if source.rows is not None:
        return source.rows
    return n_rows if source.epochs is None else round(min(source.epochs * n_rows, 2 * MOST_ROWS))


def _by_weight(weights: Sequence[float], total: int) -> list[int]:
    """Share `total` rows out by weight; what rounding leaves goes to the largest remainders."""
    largest = max(weights)  # of numbers near the largest there is, sums and products are infinite
    parts = [weight / largest for weight in weights]
    exact = [part * total / sum(parts) for part in parts]
    counts = [int(count) for count in exact]
    by_remainder = sorted(range(len(exact)), key=lambda at: counts[at] - exact[at])
    for at in by_remainder[: total - sum(counts)]:
        counts[at] += 1
    return counts
