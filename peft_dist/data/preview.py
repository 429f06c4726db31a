"""The first rows of a recipe as they are trained, and every one of them that is malformed."""

from dataclasses import dataclass

from peft_dist.common.errors import DataError
from peft_dist.data.counts import SourceRows
from peft_dist.data.encode import EncodedRow
from peft_dist.data.row_job import FittedRows, RowJob
from peft_dist.data.rows import BadRows


@dataclass(frozen=True)
class SourcePreview:
    """The first lines of one source."""

    counts: SourceRows
    """What became of them; every malformed line among it."""
    lines: int
    """Lines that were read and are no held-out rows."""
    rows: list[EncodedRow]
    """What they are trained as; a line may give several, or none."""


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
        kept: list[EncodedRow] = []
        lines = set()
        for row in fitted.read(most):
            lines.add(row.line)
            try:
                encoded = job.encoder.encode([row], bad)
            except DataError as error:  # in a training, one such row ends it
                where = f"{source.where(row.line)}: "
                bad.add(row.line, str(error).removeprefix(where))
                continue
            kept += [whole for one in encoded if (whole := fitted.fit(one)) is not None]
        lines |= {line for line, _ in bad.found}
        found.append(SourcePreview(fitted.counts(), len(lines), kept))
    return found
