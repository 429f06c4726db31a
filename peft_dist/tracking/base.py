"""The record of a run, as lines of JSON, and what every view of it must offer.

A record is one optimizer step or one evaluation. Nothing here computes a metric.
"""

import json
from pathlib import Path
from typing import Any, Protocol

from peft_dist.errors import TrainingError

Record = dict[str, Any]
"""`event` (`step` or `evaluation`), `step`, `time` (unix seconds) and the event's own figures."""


class Tracker(Protocol):
    """A view of the run."""

    def write(self, record: Record) -> None:
        """Take one record."""

    def close(self) -> None:
        """Show what is still held back."""


class Ledger:
    """`ledger.jsonl`: every record of the run, each whole as soon as it is written."""

    def __init__(self, path: Path) -> None:
        """Open the file for appending.

        Raises:
            TrainingError: Where it cannot be written.
        """
        self._path = path
        try:
            self._file = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise self._lost(error) from error

    def write(self, record: Record) -> None:
        """Append one line.

        Raises:
            TrainingError: Where the disk is full: a run without its record is not worth going on.
        """
        try:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
        except OSError as error:
            raise self._lost(error) from error

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        self._file.close()

    def _lost(self, error: OSError) -> TrainingError:
        return TrainingError(
            f"cannot be written: {error.strerror or error}",
            where=str(self._path),
            remedy="free space and start the run again",
        )
