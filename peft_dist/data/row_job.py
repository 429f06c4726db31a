"""Which rows are tokenised, and what is kept of each: the path from a source to its tokens.

Nothing is written here (see `token_cache.py`).
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, cast

from peft_dist.common.errors import DataError
from peft_dist.common.screen import Bar, wait
from peft_dist.config.recipe import Recipe
from peft_dist.data.counts import SourceRows
from peft_dist.data.encode import Encoder
from peft_dist.data.encoded_row import EncodedRow
from peft_dist.data.hold_out import HoldOut
from peft_dist.data.pairs import Example, encode_judged, encode_pairs, with_mismatched
from peft_dist.data.parallel import encode_in_processes, processes_here
from peft_dist.data.preference_rows import AnyRow, JudgedRow, PairRow, read_examples
from peft_dist.data.rows import BadRows, ChatRow, Row
from peft_dist.data.sources import Source
from peft_dist.data.template_file import TemplateFile

ROWS_PER_BATCH = 1000
ROWS_BEFORE_PROCESSES = 20_000
"""Rows of chats after which it pays to start processes that encode the rest."""


@dataclass(frozen=True)
class RowJob:
    """Rows to tokenise, and everything that decides what becomes of them."""

    recipe: Recipe
    which: Literal["train", "eval"]
    sources: tuple[Source, ...]
    encoders: Mapping[TemplateFile | None, Encoder]
    """One for each chat template of the sources, all with one tokenizer."""
    label_names: tuple[str, ...] | None = None
    """The only classes that may be; None: any."""

    def encoder(self, source: Source) -> Encoder:
        """Return what encodes the rows of a source."""
        return self.encoders[source.template]

    @property
    def tokenizer(self) -> Encoder:
        """An encoder, for what is the same of all: the tokens and their text."""
        return next(iter(self.encoders.values()))

    def notices(self) -> list[str]:
        """Return what a person should know of the conversations that were encoded."""
        found = (line for encoder in self.encoders.values() for line in encoder.notices())
        return list(dict.fromkeys(found))

    def key(self) -> dict[str, Any]:
        """Return all that decides what the rows become."""
        data = self.recipe.data
        encoders = [self.encoder(source).fingerprint() for source in self.sources]
        return {
            "sources": [
                [source.kind, source.split, str(source.part), source.fingerprint, source.columns]
                for source in self.sources
            ],
            "held_out": data.held_out and [self.which, data.held_out, self.recipe.train.seed],
            "tokenizer": encoders[0] if len(set(encoders)) == 1 else encoders,
            "task": self.recipe.model.task,
            "rows": self.recipe.objective.rows,
            "options": [data.max_length, data.truncation, data.max_bad_rows],
            "label_names": self.label_names,
        }

    def rows(self, source: Source, bad: BadRows, *, most: int | None = None) -> Iterator[AnyRow]:
        """Yield the rows of a source before any is held out."""
        as_chat = self.encoder(source).has_chat_template
        return read_examples(self.recipe, source, bad, as_chat=as_chat, most=most)

    def hold_out(self) -> HoldOut | None:
        """Return which rows are held out, which takes a look at all of them; None: none."""
        size = self.recipe.data.held_out
        if size is None:
            return None
        rows = (row for source in self.sources for row in self.rows(source, BadRows(source, None)))
        with wait("choosing the rows that are held out"):
            return HoldOut.of(rows, size=size, seed=self.recipe.train.seed)


class FittedRows:
    """Rows of a source that fit `data.max_length` and have something to train; counts the rest."""

    def __init__(
        self, job: RowJob, source: Source, hold_out: HoldOut | None, bad: BadRows | None = None
    ) -> None:
        """Read nothing yet.

        Args:
            job: What is tokenised.
            source: One of its sources.
            hold_out: Which rows are held out.
            bad: Takes the malformed rows. Default: as many as the recipe allows.
        """
        self._job, self.source, self._hold_out = job, source, hold_out
        self._encoder = job.encoder(source)
        self.bad = bad or BadRows.as_allowed(source, job.recipe.data)
        self.kept = self.cut = self.lost_end = self.dropped = self.split = self.pieces = 0
        self.longest_dropped = 0
        """Tokens of the longest example that is dropped."""
        self.trained_turns = self.stop_tokens = 0
        self.verdicts: list[bool] = []
        """Of the judged answers that are kept."""

    def __iter__(self) -> Iterator[EncodedRow]:
        rows = self.read()
        batches = iter(lambda: list(islice(rows, ROWS_PER_BATCH)), [])
        with wait(f"tokenising {self.source.name}") as bar:
            for example in self._examples(batches, bar):
                fitted = self.fit(example)
                if fitted is not None:
                    yield from fitted.rows
        self.bad.refuse_too_many()

    def _examples(self, batches: Iterator[list[AnyRow]], bar: Bar) -> Iterator[Example]:
        """Yield what is trained together, of every batch."""

        def one_by_one(encoded: Iterator[list[Example]]) -> Iterator[Example]:
            for examples in encoded:
                done = bar.done + len(examples)
                rate = done / max(1e-3, time.monotonic() - bar.began_s)
                bar.update(done, text=bar.text, detail=f"{done:,} rows, {rate:,.0f} rows/s")
                yield from examples

        match self._job.recipe.objective.rows:
            case "single":
                rows: Any = batches
                return one_by_one(self._alone(encoded) for encoded in self._encoded(rows))
            case "pair":
                return one_by_one(map(self.encode, batches))
            case "judged":
                return with_mismatched(one_by_one(map(self.encode, batches)), self.source.name)

    def encode(self, batch: Sequence[AnyRow]) -> list[Example]:
        """Return what becomes of some rows, an answer with a verdict alone."""
        encoder, rows = self._encoder, list(batch)
        match self._job.recipe.objective.rows:
            case "single":
                return self._alone(encoder.encode(cast("list[Row]", rows), self.bad))
            case "pair":
                return encode_pairs(encoder, cast("list[PairRow]", rows), self.bad)
            case "judged":
                return encode_judged(encoder, cast("list[JudgedRow]", rows), self.bad)

    def _alone(self, rows: Sequence[EncodedRow]) -> list[Example]:
        """Return rows that are trained alone, long texts in pieces where that is asked."""
        data = self._job.recipe.data
        if data.truncation != "split":
            return [Example((row,)) for row in rows]
        found: list[Example] = []
        for row in rows:
            is_text = bool(row.trained[row.head :].all())
            pieces = [row]
            if is_text and len(row.tokens) > data.max_length:
                pieces = row.pieces(data.max_length)
                self.split += 1
                self.pieces += len(pieces)
            found += [Example((piece,)) for piece in pieces]
        return found

    def _encoded(self, batches: Iterator[list[Row]]) -> Iterator[list[EncodedRow]]:
        """Yield the tokens of each batch; the later ones of many chats on all cores."""
        encode, processes, are_chats = self._encoder.encode, processes_here(), False
        for batch in islice(batches, ROWS_BEFORE_PROCESSES // ROWS_PER_BATCH):
            are_chats |= any(isinstance(row, ChatRow) for row in batch)
            yield encode(batch, self.bad)
        if not are_chats or processes == 1:
            for batch in batches:
                yield encode(batch, self.bad)
            return
        found = encode_in_processes(batches, self._job.recipe, self.source, processes=processes)
        for encoded, bad, tally in found:
            self.bad.take(bad)
            self._encoder.tally.update(tally)
            yield encoded

    def read(self, most: int | None = None) -> Iterator[AnyRow]:
        """Yield the rows before they are encoded."""
        job, hold_out = self._job, self._hold_out
        if hold_out is None:
            return job.rows(self.source, self.bad, most=most)
        if job.which == "train":
            rows = job.rows(self.source, self.bad, most=most)
            return (row for row in rows if not hold_out.has(row))
        # of the rows that are malformed, the training rows tell
        rows = job.rows(self.source, BadRows(self.source, None), most=most)
        return (row for row in rows if hold_out.has(row))

    def fit(self, example: Example) -> Example | None:
        """Return what is kept of an example, and count it; None where nothing is."""
        data = self._job.recipe.data
        # a row that answers another prompt is nobody's own: it is cut, whatever the setting
        own = example.rows if example.desirable is None else example.rows[:1]
        if not all(self._label_is_known(row) for row in own):
            return None
        too_long = [row for row in own if len(row.tokens) > data.max_length]
        if too_long and data.truncation == "error":
            self._refuse_long(too_long[0])
            return None
        kept = [self._cut(row, is_own=at < len(own)) for at, row in enumerate(example.rows)]
        fitted = [row for row in kept if row is not None and _has_predictions(row)]
        if len(fitted) < len(example.rows):
            self.dropped += 1
            self.longest_dropped = max(self.longest_dropped, *(len(row.tokens) for row in own))
            return None
        self.kept += 1
        self.cut += bool(too_long)
        lost = [self._count_stops(row, cut) for row, cut in zip(own, fitted, strict=False)]
        self.lost_end += any(lost)
        if example.desirable is not None:
            self.verdicts.append(example.desirable)
        return example._replace(rows=tuple(fitted))

    def _count_stops(self, row: EncodedRow, fitted: EncodedRow) -> bool:
        """Count turns and stop tokens: every turn that keeps its end is trained to stop there.

        Returns whether a turn has lost its end.
        """
        ends = fitted.tokens[fitted.stops].tolist()
        are_stops = self._encoder.stop_ids.issuperset(ends)  # np.isin takes 20 times as long
        are_stops &= bool(fitted.trained[fitted.stops].all())
        assert are_stops, f"{self.source.where(row.line)}: a turn has no stop token"
        self.trained_turns += len(row.stops)
        self.stop_tokens += len(ends)
        return len(ends) < len(row.stops)

    def require_some(self) -> None:
        """Stop where no row is left.

        Raises:
            DataError: With why there is none, and which setting would keep some.
        """
        if self.kept:
            return
        data = self._job.recipe.data
        why, remedy = "with nothing to train", "fix the rows"
        if self.longest_dropped > data.max_length:
            why = f"as data.max_length ({data.max_length}) leaves nothing of them to train (the "
            why += f"longest has {self.longest_dropped} tokens)"
            remedy = "raise data.max_length, or set data.truncation: "
            remedy += "start, to cut prompts" if data.truncation == "end" else "end"
        raise DataError(
            f"no row is left to use: {self.dropped} dropped {why}, {len(self.bad.found)} malformed",
            where=self.source.name,
            remedy=remedy,
        )

    def counts(self) -> SourceRows:
        """Return what has become of the rows so far."""
        return SourceRows(
            name=self.source.name,
            rows=self.kept,
            cut=self.cut,
            lost_end=self.lost_end,
            dropped=self.dropped,
            trained_turns=self.trained_turns,
            stop_tokens=self.stop_tokens,
            bad=tuple(sorted(self.bad.found)),
            shards=self.source.shards,
        )

    def _cut(self, row: EncodedRow, *, is_own: bool) -> EncodedRow | None:
        data = self._job.recipe.data
        if len(row.tokens) <= data.max_length:
            return row
        if is_own and data.truncation == "drop":
            return None
        keep = "end" if data.truncation == "start" else "start"
        return row.cut(max_length=data.max_length, keep=keep)

    def _refuse_long(self, row: EncodedRow) -> None:
        why = f"the row has {len(row.tokens)} tokens, data.max_length is "
        why += str(self._job.recipe.data.max_length)
        if self.bad.limit is None:
            self.bad.add(row.line, why)
            return
        raise DataError(
            why,
            where=self.source.where(row.line),
            remedy="raise data.max_length, or set data.truncation to end, start or drop",
        )

    def _label_is_known(self, row: EncodedRow) -> bool:
        names = self._job.label_names
        if names is None or row.label in names:
            return True
        self.bad.add(row.line, f"label {row.label!r} is not in data.train: {', '.join(names)}")
        return False


def _has_predictions(row: EncodedRow) -> bool:
    return len(row.tokens) > 0 if row.label is not None else bool(row.trained[1:].any())


def split_notices(read: Sequence[FittedRows]) -> list[str]:
    """Return how many rows were split; without paths, for rows are the same wherever they lie."""
    rows, pieces = sum(one.split for one in read), sum(one.pieces for one in read)
    return (
        [f"{rows:,} texts longer than data.max_length are trained as {pieces:,} rows"]
        if rows
        else []
    )
