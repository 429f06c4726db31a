"""Which rows train when: the global sample order, the rows of each step, and who computes them.

The order is a function of (seed, epoch) alone, also where several sources are mixed, and the cursor
a count of rows consumed by all processes together, so any world size can go on from any cursor.
Nothing here reads a row, keeps a cursor or knows a rank's own share of the model.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from peft_dist.config.batch_shape import DEFAULT_GLOBAL_ROWS
from peft_dist.config.recipe import Train

RowIds = NDArray[np.int64]
DEFAULT_EPOCHS = 1.0


class SourceShare(NamedTuple):
    """A source in the mixture."""

    n_rows: int
    epoch_rows: int
    """How many of them are in every epoch; more than there are: some repeat."""


class RowOrder:
    """An endless order of rows, one shuffled epoch after the other.

    With one source an epoch is a permutation of all rows. With several it holds as many of each as
    its share says: a source's rows go round in an order of its own, so none comes a third time
    before all have come twice.
    """

    def __init__(self, n_rows: int, seed: int, shares: Sequence[SourceShare] = ()) -> None:
        """Remember the rows; epochs are made when they are asked for.

        Args:
            n_rows: All rows, source by source.
            seed: The recipe's `train.seed`.
            shares: The sources. Default: one, all of it in every epoch.
        """
        self._shares = tuple(shares) or (SourceShare(n_rows, n_rows),)
        assert n_rows == sum(share.n_rows for share in self._shares) >= 1, (n_rows, shares)
        assert all(share.epoch_rows >= 1 for share in self._shares), shares
        self.n_rows, self.seed = n_rows, seed
        self.epoch_rows = sum(share.epoch_rows for share in self._shares)
        """Rows of an epoch."""

    def rows(self, start: int, stop: int) -> RowIds:
        """Return the rows at places [start, stop) of the order, which may cross epochs."""
        return _places(start, stop, self.epoch_rows, self._epoch)

    def _epoch(self, epoch: int) -> RowIds:
        return _mixed_epoch(self._shares, self.seed, epoch)


def _places(start: int, stop: int, epoch_rows: int, epoch_of: Callable[[int], RowIds]) -> RowIds:
    """Return places [start, stop) of epochs that are laid end to end."""
    assert 0 <= start <= stop, (start, stop)
    parts = [np.empty(0, dtype=np.int64)]
    while start < stop:
        epoch, at = divmod(start, epoch_rows)
        upto = min(epoch_rows, at + stop - start)
        parts.append(epoch_of(epoch)[at:upto])
        start += upto - at
    return np.concatenate(parts)


@lru_cache(maxsize=2)  # a step may lie in two epochs
def _mixed_epoch(shares: tuple[SourceShare, ...], seed: int, epoch: int) -> RowIds:
    parts, first = [], 0
    for stream, share in enumerate(shares, start=1):
        passes, rest = divmod(share.epoch_rows, share.n_rows)
        if rest:
            begin = epoch * share.epoch_rows
            own = _places(
                begin,
                begin + share.epoch_rows,
                share.n_rows,
                partial(_permutation, share.n_rows, seed, stream=stream),
            )
        else:  # all of them as often: the order is made by the shuffle below
            own = np.tile(np.arange(share.n_rows, dtype=np.int64), passes)
        parts.append(own + first)
        first += share.n_rows
    rows = np.concatenate(parts)
    order = rows[_permutation(len(rows), seed, epoch)]
    order.setflags(write=False)
    return order


def _permutation(n_rows: int, seed: int, epoch: int, *, stream: int = 0) -> RowIds:
    # NumPy promises the same raw bits of a bit generator in every release, but not the same
    # Generator.permutation, so rows are sorted by their raw bits
    key, counter = (
        np.array(words, dtype=np.uint64) for words in ([seed, epoch], [0, 0, 0, stream])
    )
    bits = np.random.Philox(key=key, counter=counter).random_raw(n_rows)
    return np.argsort(bits, kind="stable").astype(np.int64, copy=False)


class StepPlan:
    """The rows of every optimizer step, each a function of the cursor at which it begins.

    Args:
        order: The global sample order.
        lengths: [n_rows] tokens of each row; None where nobody knows them, and batches are in rows.
        train: The recipe's section with the length of training and the size of a batch.
    """

    def __init__(self, order: RowOrder, lengths: NDArray[np.int64] | None, train: Train) -> None:
        """Work out how many steps there are; for batches in tokens over epochs, by walking."""
        self.order = order
        self._budget = train.global_batch_tokens
        self._batch_rows = train.global_batch_size or DEFAULT_GLOBAL_ROWS
        if lengths is not None:
            assert len(lengths) == order.n_rows, (len(lengths), order.n_rows)
            self._lengths, self._mean_length = lengths, max(1.0, float(lengths.mean()))
        else:
            assert self._budget is None, "lengths are not known"
        self.total_rows: int | None = None
        """Rows of the whole training, counting repeats; None where it is given in steps."""
        if train.steps is not None:
            self.total_steps = train.steps
            """Optimizer steps of the whole training."""
            return
        epochs = DEFAULT_EPOCHS if train.epochs is None else train.epochs
        self.total_rows = max(1, round(epochs * order.epoch_rows))
        if self._budget is None:
            self.total_steps = -(-self.total_rows // self._batch_rows)
        else:
            self.total_steps = sum(1 for _ in self._walk(0))

    @classmethod
    def of(
        cls, train: Train, lengths: NDArray[np.int64], shares: Sequence[SourceShare] = ()
    ) -> Self:
        """Return the plan of a recipe's `train` section over rows of these lengths."""
        return cls(RowOrder(len(lengths), train.seed, shares), lengths, train)

    def epoch_of(self, cursor: int) -> int:
        """Return how many epochs are complete after `cursor` consumed rows."""
        return cursor // self.order.epoch_rows

    def rows(self, cursor: int) -> RowIds:
        """Return the rows of the step that begins after `cursor` consumed rows.

        Training in epochs ends with a step that may be smaller, and empty ones after it; training
        in steps never ends by itself.
        """
        if self._budget is None:
            return self.order.rows(cursor, self._stop(cursor, self._batch_rows))
        window = 2 * int(self._budget / self._mean_length) + 16
        while True:
            stop = self._stop(cursor, window)
            rows = self.order.rows(cursor, stop)
            filled = np.cumsum(self._lengths[rows])
            fitting = int(np.searchsorted(filled, self._budget, side="right"))
            if fitting < len(rows) or stop < cursor + window:
                return rows[: max(1, fitting)]
            window *= 2

    def steps(self, *, step: int = 0, cursor: int = 0) -> Iterator[tuple[int, int, RowIds]]:
        """Yield (step, cursor, rows) of each step left after `step` steps and `cursor` rows.

        The yielded step counts from 1 and the cursor is the one after the step: exactly what a
        checkpoint made then has to hold.
        """
        for rows in self._walk(cursor):
            if step >= self.total_steps:
                return
            step, cursor = step + 1, cursor + len(rows)
            yield step, cursor, rows

    def _walk(self, cursor: int) -> Iterator[RowIds]:
        while len(rows := self.rows(cursor)):
            yield rows
            cursor += len(rows)

    def _stop(self, cursor: int, count: int) -> int:
        if self.total_rows is None:
            return cursor + count
        return max(cursor, min(cursor + count, self.total_rows))


def assign(
    rows: RowIds, lengths: NDArray[np.int64], *, world_size: int, micro_batch_size: int
) -> list[list[RowIds]]:
    """Share the rows of one step out as `[rank][micro-batch]`, each row exactly once.

    Tokens are balanced over ranks and then over the micro-batches of a rank. Every rank gets the
    same number of micro-batches, the least that holds the rows, because ranks that shard a model
    must run the same collectives; with few rows some are empty.

    Args:
        rows: Row ids of the step.
        lengths: [n_rows] tokens of every row of the data, indexed by row id.
        world_size: Processes.
        micro_batch_size: Most rows of a micro-batch.
    """
    per_rank = -(-len(rows) // world_size)
    n_micro = max(1, -(-per_rank // micro_batch_size))
    ranks = _balanced(rows, lengths, bins=world_size, capacity=n_micro * micro_batch_size)
    return [_balanced(share, lengths, bins=n_micro, capacity=micro_batch_size) for share in ranks]


def _balanced(
    rows: RowIds, lengths: NDArray[np.int64], *, bins: int, capacity: int
) -> list[RowIds]:
    """Put the longest row left into the emptiest bin with a free place, again and again."""
    taken: list[list[int]] = [[] for _ in range(bins)]
    heap = [(0, number) for number in range(bins)]
    of_row = lengths[rows]
    for at in np.argsort(-of_row, kind="stable"):
        tokens, number = heapq.heappop(heap)
        taken[number].append(int(at))
        if len(taken[number]) < capacity:
            heapq.heappush(heap, (tokens + int(of_row[at]), number))
    return [rows[np.array(sorted(places), dtype=np.int64)] for places in taken]
