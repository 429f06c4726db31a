"""What became of the rows of a source: kept, cut, dropped, malformed."""

from dataclasses import asdict, dataclass
from typing import Any

from peft_dist.data.sources import place


@dataclass(frozen=True)
class SourceRows:
    """The rows of one source, after tokenising."""

    name: str
    rows: int
    """Rows that are kept."""
    cut: int
    """Of those: rows that lost tokens to `data.max_length`."""
    lost_end: int
    """Of those: rows of which a trained turn lost its stop token."""
    dropped: int
    """Rows left out because they were too long (truncation: drop) or had nothing to train."""
    trained_turns: int
    """Answers, completions and texts that are trained."""
    stop_tokens: int
    """How many of them are trained to their end; the others lost it to `data.max_length`."""
    bad: tuple[tuple[int, str], ...]
    """Line and reason of each malformed row that was left out."""
    shards: tuple[str, ...] = ()
    """Its files, where it has several."""

    @property
    def reports(self) -> tuple[str, ...]:
        """Return `file:line: why` of each malformed row."""
        return tuple(f"{place(line, self.name, self.shards)}: {why}" for line, why in self.bad)

    @property
    def lose_much(self) -> bool:
        """Whether `data.max_length` costs more than one row of 20, or its stop token."""
        return self.dropped + self.lost_end > (self.rows + self.dropped) / 20

    def line(self, what: str) -> str:
        """Return the counts as one line, such as for the log of a start."""
        total = self.rows + self.dropped + len(self.bad)
        parts = [f"{self.rows:,} kept"]
        if self.cut:
            ends = f", {self.lost_end:,} of these without a stop token" if self.lost_end else ""
            parts.append(f"{_part(self.cut, self.rows)} of them cut to data.max_length{ends}")
        if self.dropped:
            dropped = _part(self.dropped, total)
            parts.append(f"{dropped} dropped with nothing to train within data.max_length")
        if self.bad:
            parts.append(f"{_part(len(self.bad), total)} malformed")
        return f"{what} rows of {self.name}: {'; '.join(parts)}"

    def facts(self) -> dict[str, Any]:
        """Return the counts for `result.json`."""
        facts = asdict(self) | {"bad": len(self.bad)}
        del facts["shards"]
        return facts


def _part(count: int, total: int) -> str:
    return f"{count:,} ({count / max(1, total):.1%})"
