"""The first rows of a recipe as they are trained, and every one of them that is malformed."""

from dataclasses import dataclass

from peft_dist.common.errors import DataError
from peft_dist.data.counts import SourceRows
from peft_dist.data.encoded_row import EncodedRow
from peft_dist.data.pairs import Example
from peft_dist.data.row_job import FittedRows, RowJob
from peft_dist.data.rows import BadRows


@dataclass(frozen=True)
class SourcePreview:
    """The first lines of one source."""

    counts: SourceRows
    """What became of them; every malformed line among it."""
    lines: int
    """Lines that were read and are no held-out rows."""
    examples: list[Example]
    """What they are trained as; a line may give several, or none."""
    dropped: list[tuple[int, int]]
    """Line and tokens of each that has nothing to train within `data.max_length`."""

    @property
    def rows(self) -> list[tuple[str, EncodedRow]]:
        """Return each row with what it is in its example, which is nothing where it is alone."""
        return [
            pair
            for example in self.examples
            for pair in zip(_parts(example), example.rows, strict=True)
        ]


def _parts(example: Example) -> tuple[str, ...]:
    if example.desirable is not None:
        return ("desirable" if example.desirable else "undesirable",)
    return ("",) if len(example.rows) == 1 else ("chosen", "rejected")


def preview(job: RowJob, most: int) -> list[SourcePreview]:
    """Tokenise the first `most` lines of every source, keeping on after any number of bad ones.

    Raises:
        DataError: A source cannot be read as a whole.
    """
    hold_out = job.hold_out()
    found = []
    for source in job.sources:
        bad = BadRows(source, None)
        fitted = FittedRows(job, source, hold_out, bad)
        kept: list[Example] = []
        dropped: list[tuple[int, int]] = []
        lines = set()
        for row in fitted.read(most):
            lines.add(row.line)
            try:
                encoded = fitted.encode([row])
            except DataError as error:  # in a training, one such row ends it
                where = f"{source.where(row.line)}: "
                bad.add(row.line, str(error).removeprefix(where))
                continue
            for example in encoded:
                before = fitted.dropped
                whole = fitted.fit(example)
                if whole is not None:
                    kept.append(whole)
                elif fitted.dropped > before:
                    dropped.append((row.line, max(len(one.tokens) for one in example.rows)))
        lines |= {line for line, _ in bad.found}
        found.append(SourcePreview(fitted.counts(), len(lines), kept, dropped))
    return found
