"""Which rows train when: the global sample order, the rows of each step, and who computes them.

The order is a function of (seed, epoch) alone and the cursor a count of rows consumed by all
processes together, so any world size can go on from any cursor. Nothing here reads a row, keeps a
cursor or knows a rank's own share of the model.
"""

import heapq
from collections.abc import Iterator
from functools import lru_cache
from typing import Self

import numpy as np
from numpy.typing import NDArray

from peft_dist.config.batch_shape import DEFAULT_GLOBAL_ROWS
from peft_dist.config.recipe import Train

RowIds = NDArray[np.int64]
DEFAULT_EPOCHS = 1.0


class RowOrder:
    """An endless order of rows: one permutation of all of them after the other."""

    def __init__(self, n_rows: int, seed: int) -> None:
        """Remember how many rows there are; permutations are made when they are asked for."""
        assert n_rows >= 1, n_rows
        self.n_rows, self.seed = n_rows, seed

    def rows(self, start: int, stop: int) -> RowIds:
        """Return the rows at places [start, stop) of the order, which may cross epochs."""
        assert 0 <= start <= stop, (start, stop)
        parts = [np.empty(0, dtype=np.int64)]
        while start < stop:
            epoch, at = divmod(start, self.n_rows)
            upto = min(self.n_rows, at + stop - start)
            parts.append(_permutation(self.n_rows, self.seed, epoch)[at:upto])
            start += upto - at
        return np.concatenate(parts)


@lru_cache(maxsize=2)  # a step may lie in two epochs
def _permutation(n_rows: int, seed: int, epoch: int) -> RowIds:
    # NumPy promises the same raw bits of a bit generator in every release, but not the same
    # Generator.permutation, so rows are sorted by their raw bits
    bits = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(n_rows)
    order = np.argsort(bits, kind="stable").astype(np.int64, copy=False)
    order.setflags(write=False)
    return order


class StepPlan:
    """The rows of every optimizer step, each a function of the cursor at which it begins.

    Args:
        order: The global sample order.
        lengths: [n_rows] tokens of each row.
        train: The recipe's section with the length of training and the size of a batch.
    """

    def __init__(self, order: RowOrder, lengths: NDArray[np.int64], train: Train) -> None:
        """Work out how many steps there are; for batches in tokens over epochs, by walking."""
        assert len(lengths) == order.n_rows, (len(lengths), order.n_rows)
        self._order, self._lengths = order, lengths
        self._budget = train.global_batch_tokens
        self._batch_rows = train.global_batch_size or DEFAULT_GLOBAL_ROWS
        self._mean_length = max(1.0, float(lengths.mean()))
        self.total_rows: int | None = None
        """Rows of the whole training, counting repeats; None where it is given in steps."""
        if train.steps is not None:
            self.total_steps = train.steps
            """Optimizer steps of the whole training."""
            return
        epochs = DEFAULT_EPOCHS if train.epochs is None else train.epochs
        self.total_rows = max(1, round(epochs * order.n_rows))
        if self._budget is None:
            self.total_steps = -(-self.total_rows // self._batch_rows)
        else:
            self.total_steps = sum(1 for _ in self._walk(0))

    @classmethod
    def of(cls, train: Train, lengths: NDArray[np.int64]) -> Self:
        """Return the plan of a recipe's `train` section over rows of these lengths."""
        return cls(RowOrder(len(lengths), train.seed), lengths, train)

    def rows(self, cursor: int) -> RowIds:
        """Return the rows of the step that begins after `cursor` consumed rows.

        Training in epochs ends with a step that may be smaller, and empty ones after it; training
        in steps never ends by itself.
        """
        if self._budget is None:
            return self._order.rows(cursor, self._stop(cursor, self._batch_rows))
        window = 2 * int(self._budget / self._mean_length) + 16
        while True:
            stop = self._stop(cursor, window)
            rows = self._order.rows(cursor, stop)
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
