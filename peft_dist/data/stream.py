"""Training rows that are read and tokenised when their step comes, and not before.

Their order is that of cached rows, so a step has the same rows, and where each line becomes one row
the same tokens to the bit. What `token_cache.py` finds out of all rows before the first step is
found out here as they come: a malformed one ends the run then.
"""

import hashlib
import json
import logging
from collections import Counter, deque
from collections.abc import Generator, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np

from peft_dist.common.errors import DataError
from peft_dist.common.screen import wait
from peft_dist.config.recipe import Recipe
from peft_dist.data.counts import SourceRows
from peft_dist.data.encoded_row import EncodedRow
from peft_dist.data.order import RowIds
from peft_dist.data.parallel import in_processes
from peft_dist.data.row_index import IndexedSource, indexed
from peft_dist.data.row_job import FittedRows
from peft_dist.data.token_cache import FORMAT, row_job
from peft_dist.data.tokenized_rows import Step, StepRows, TokenizedRows

log = logging.getLogger(__name__)

_COUNTS = ("cut", "lost_end", "dropped", "trained_turns", "stop_tokens")


class StreamedRows:
    """The training rows of a recipe with `data.streaming`; an example is a line, or row, of a file.

    Attributes:
        n_examples: Lines that there are.
        n_rows: The same; how many rows they become nobody knows yet.
        rows_per_example: Rows that are trained together: 2 for pairs of answers.
        fingerprint: Hash of all that decides what the rows become.
    """

    label_names: tuple[str, ...] = ()
    example_lengths = None
    trained_turns = stop_tokens = None

    def __init__(self, recipe: Recipe, cache_dir: Path) -> None:
        """Open the indexes of all files, making what is missing; loads the tokenizer.

        Raises:
            DataError: A source cannot be streamed, or has no rows.
            ModelError: The tokenizer cannot be used.
            RecipeError: `data.max_length` leaves no room.
        """
        job = row_job(recipe, "train", cache_dir)
        with wait("looking for the rows to stream"):
            self._sources = tuple(indexed(source, cache_dir) for source in job.sources)
        self._job = replace(job, sources=self._sources)
        self.rows_per_example = recipe.rows_per_example
        self._arguments = (recipe, cache_dir)
        self._firsts = np.cumsum([0, *map(len, self._sources)], dtype=np.int64)
        self.n_examples = self.n_rows = int(self._firsts[-1])
        facts = json.dumps({"streamed": FORMAT, **self._job.key()}, sort_keys=True)
        self.fingerprint = hashlib.sha256(facts.encode()).hexdigest()
        self._counts = [Counter[str]() for _ in self._sources]

    @property
    def sources(self) -> tuple[SourceRows, ...]:
        """All rows of each source, and what became of those that this process has trained."""
        return tuple(
            SourceRows(
                source.name,
                rows=len(source),
                bad=(),
                shards=source.shards,
                **{name: counts[name] for name in _COUNTS},
            )
            for source, counts in zip(self._sources, self._counts, strict=True)
        )

    @property
    def notices(self) -> tuple[str, ...]:
        """What a person should know of how the rows were read that `at` has read."""
        return tuple(self._job.notices())

    def at(self, examples: RowIds) -> tuple[TokenizedRows, RowIds]:
        """Read and tokenise some examples, which may be the same ones.

        Returns:
            Rows, and which of them stand for the examples: all that each becomes, in order.

        Raises:
            DataError: One of them is malformed, or none has anything to train.
        """
        lines, back = np.unique(examples, return_inverse=True)
        by_line: dict[int, list[EncodedRow]] = {int(line): [] for line in lines}
        sources = []
        for number, source in enumerate(self._sources):
            first, last = self._firsts[number : number + 2]
            rows = tuple((lines[(first <= lines) & (lines < last)] - first).tolist())
            fitted = self._fitted(replace(source, rows=rows)) if rows else None
            kept, counts = fitted or ([], None)
            for row in kept:
                by_line[int(first) + row.line - 1].append(row)
            sources.append(counts or _nothing(source.name))
        found = [row for line in lines for row in by_line[int(line)]]
        if not found:
            raise DataError(
                f"none of {len(lines)} rows has anything to train within data.max_length",
                where=", ".join(source.name for source in self._sources),
                remedy="raise it, or train.global_batch_size",
            )
        counts_of_lines = [len(by_line[int(line)]) // self.rows_per_example for line in lines]
        begins = np.cumsum([0, *counts_of_lines])
        ids = [np.arange(begins[at], begins[at + 1]) for at in back.reshape(-1)]
        return (
            TokenizedRows(
                tokens=np.concatenate([row.tokens for row in found]),
                trained=np.concatenate([row.trained for row in found]),
                offsets=np.cumsum([0, *(len(row.tokens) for row in found)], dtype=np.int64),
                class_ids=None,
                label_names=(),
                pad_id=self._job.tokenizer.pad_id,
                sources=tuple(sources),
                fingerprint="",
                rows_per_example=self.rows_per_example,
            ),
            np.concatenate(ids).astype(np.int64, copy=False),
        )

    def batches(self, steps: Iterator[Step]) -> Generator[StepRows]:
        """Yield the rows of each step; the next ones are tokenised meanwhile in another process.

        Raises:
            DataError: As `at`.
        """
        taken: deque[Step] = deque()

        def ahead() -> Iterator[RowIds]:
            for step in steps:
                taken.append(step)
                yield step[2]

        found = in_processes(_read, ahead(), _begin, self._arguments, processes=1)
        with closing(found):
            try:
                for rows, ids in found:
                    step, cursor, _ = taken.popleft()
                    yield self._counted(StepRows(step, cursor, rows, ids))
            except BrokenProcessPool:
                log.warning("the process that tokenises rows was killed; each step now does it")
        for step, cursor, examples in chain(taken, steps):
            yield self._counted(StepRows(step, cursor, *self.at(examples)))

    def _fitted(self, source: IndexedSource) -> tuple[list[EncodedRow], SourceRows]:
        """Return what is kept of the rows of a source, and what became of them."""
        fitted = FittedRows(self._job, source, None)
        examples = map(fitted.fit, fitted.encode(list(fitted.read())))
        kept = [row for example in examples if example is not None for row in example.rows]
        fitted.bad.refuse_too_many()
        return kept, fitted.counts()

    def _counted(self, step: StepRows) -> StepRows:
        for counts, source in zip(self._counts, step.rows.sources, strict=True):
            counts.update({name: getattr(source, name) for name in _COUNTS})
        return step


TrainingRows = TokenizedRows | StreamedRows

_own: list[StreamedRows] = []
"""In the process that reads ahead."""


def _begin(recipe: Recipe, cache_dir: Path) -> None:
    _own.append(StreamedRows(recipe, cache_dir))


def _read(examples: RowIds) -> tuple[TokenizedRows, RowIds]:
    return _own[0].at(examples)


def _nothing(name: str) -> SourceRows:
    return SourceRows(name, 0, 0, 0, 0, 0, 0, ())
