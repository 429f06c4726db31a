"""Tokenised rows in memory: where each begins, what of it is trained, which belong together."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from peft_dist.data.counts import SourceRows
from peft_dist.data.order import RowIds

Step = tuple[int, int, RowIds]
"""Number from 1, rows consumed after it, and its examples; as `StepPlan.steps` yields it."""


@dataclass(frozen=True)
class TokenizedRows:
    """All rows, source by source and end to end. Arrays may be memory maps: do not write."""

    tokens: NDArray[np.int32]
    """[n_tokens]"""
    trained: NDArray[np.bool_]
    """[n_tokens] which tokens are targets."""
    offsets: NDArray[np.int64]
    """[n_rows + 1] row i is tokens[offsets[i]:offsets[i + 1]]."""
    class_ids: NDArray[np.int64] | None
    """[n_rows] index into `label_names`; None for causal-lm."""
    label_names: tuple[str, ...]
    """Sorted names of the classes in the training rows; empty for causal-lm."""
    pad_id: int
    """What to fill padded batches with."""
    sources: tuple[SourceRows, ...]
    """What became of the rows of each source; their kept ones stand in this order."""
    fingerprint: str
    """Hash of the content: equal rows, equal fingerprint."""
    notices: tuple[str, ...] = ()
    """What a person should know of how the rows were read."""
    rows_per_example: int = 1
    """Rows that are trained together: a chosen and a rejected one, or an answer and a mismatched
    one; 1 for everything but preferences."""
    desirable: NDArray[np.bool_] | None = None
    """[n_examples] the verdict on each answer; None where there are none."""

    @property
    def trained_turns(self) -> int:
        """Answers, completions and texts that are trained."""
        return sum(source.trained_turns for source in self.sources)

    @property
    def stop_tokens(self) -> int:
        """How many of them are trained to their end."""
        return sum(source.stop_tokens for source in self.sources)

    @cached_property
    def source_of_row(self) -> NDArray[np.int64]:
        """[n_rows] index into `sources` of each row."""
        counts = [source.rows * self.rows_per_example for source in self.sources]
        return np.repeat(np.arange(len(self.sources)), counts)

    def at(self, examples: RowIds) -> "tuple[TokenizedRows, RowIds]":
        """Return rows that hold these examples, and their ids there."""
        return self, examples

    def batches(self, steps: Iterator[Step]) -> "Generator[StepRows]":
        """Yield the rows of each step."""
        for step, cursor, examples in steps:
            yield StepRows(step, cursor, self, examples)

    @property
    def n_rows(self) -> int:
        """Rows that can be trained."""
        return len(self.offsets) - 1

    @property
    def n_examples(self) -> int:
        """What an epoch counts: rows, or pairs of them."""
        return self.n_rows // self.rows_per_example

    @cached_property
    def example_lengths(self) -> NDArray[np.int64]:
        """[n_examples] tokens of each example, all its rows together."""
        lengths: NDArray[np.int64] = self.lengths.reshape(-1, self.rows_per_example).sum(axis=1)
        return lengths

    def rows_of(self, examples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows of these examples, those of each side by side."""
        within = np.arange(self.rows_per_example)
        rows: NDArray[np.int64] = (examples[:, None] * self.rows_per_example + within).reshape(-1)
        return rows

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[n_rows] tokens of each row."""
        return np.diff(self.offsets)

    @cached_property
    def predicted_counts(self) -> NDArray[np.int64]:
        """[n_rows] trained predictions of each row: targets with a token before them, or 1."""
        if self.class_ids is not None:
            return np.ones(self.n_rows, dtype=np.int64)
        starts = self.offsets[:-1]
        return np.add.reduceat(self.trained, starts, dtype=np.int64) - self.trained[starts]


class StepRows(NamedTuple):
    """What one optimizer step trains on."""

    step: int
    cursor: int
    """Examples of the global order that are consumed after it."""
    rows: TokenizedRows
    """Rows of the step at least."""
    ids: RowIds
    """Its examples among them."""
