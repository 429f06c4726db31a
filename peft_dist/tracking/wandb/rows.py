"""The ledger as W&B shows it: each record is one row of named figures, in order.

A row is a function of the ledger up to its record and of nothing else, so that it is the same
whoever sends it, and whenever. Sends nothing, and never imports wandb.
"""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peft_dist.ledger.goodput import PHASES, goodput, parse_record
from peft_dist.ledger.writer import Record

Row = dict[str, Any]

STEP = "train/step"
"""The horizontal axis of every figure; W&B's own step is the number of a row."""
ATTEMPT = "attempt"
TIMESTAMP = "_timestamp"
"""W&B's name for the time of a row: the record's own, also where it is sent much later."""
LOSS, LEARNING_RATE, GRADIENT_NORM = "train/loss", "train/lr", "train/grad_norm"
TOKENS_PER_S, MFU = "train/tokens_per_s", "train/mfu"
HELD_OUT_LOSS, HELD_OUT_ACCURACY = "evaluation/loss", "evaluation/accuracy"
CHECKPOINT_STALL_S, CHECKPOINT_WRITE_S = "checkpoint/stall_s", "checkpoint/write_s"
PEAK_MEMORY = "memory/peak_bytes"
GOODPUT = "goodput/fraction"
SHARES = tuple(f"goodput/{phase}" for phase in PHASES)
"""Shares of the run's time so far, as `peft-dist goodput` divides it."""
MISHAPS = ("skipped", "rollback", "save_failed")
MISHAP_COUNTS = tuple(f"mishaps/{event}" for event in MISHAPS)
"""How often each has happened so far."""
STEP_S_MAX, STEP_S_MEDIAN, SLOWEST_RANK = "rank/step_s_max", "rank/step_s_median", "rank/slowest"
RANK_STEP_S_PATTERN = "rank/[0-9]+/step_s"
RANK_MEMORY_PATTERN = "memory/rank_[0-9]+_bytes"
SYSTEM_PATTERN = "system/.*"
"""Also of other nodes: `system/node_<first rank>/...`."""

MAX_RANKS = 64
"""Ranks that get lines of their own; of more, the slowest and the median say enough."""
SHARES_EVERY = 20
"""Goodput is worked out at attempts' ends, and whenever the ledger has grown by this many records
and by a twentieth: often at first, and never at a cost that grows with the run."""

_SECTIONS = {"step": "train", "saved": "checkpoint", "save_failed": "checkpoint"}
_NODE = "node"
"""In a record: whose it is, where that is not rank 0's; no figure."""
_NAMES = {"peak_memory_bytes": PEAK_MEMORY}
_TEXTS = ("reason", "outcome")
"""The only texts that are sent; others may say more of the machine than anybody needs."""
_OF_EVERY_RECORD = ("event", "step", "attempt", "time", "at_s")
_FOR_GOODPUT = (*_OF_EVERY_RECORD, "back_to", "startup_s", "load_s", "launched", "outcome")


class Numbered(NamedTuple):
    """A record, the row it is, and its number in the run, from 0."""

    number: int
    record: Record
    row: Row


class LedgerRows:
    """Reads a ledger as it grows, and makes a row of each of its records."""

    def __init__(self, ledger: Path) -> None:
        """Begin with the first record."""
        self._path = ledger
        self._read_bytes = 0
        self._records: list[Record] = []
        self._counts = dict.fromkeys(MISHAPS, 0)
        self._shares_at = 0

    @property
    def count(self) -> int:
        """Records read so far."""
        return len(self._records)

    def new(self) -> Iterator[Numbered]:
        """Yield what was written since the last call; a line without its end is left for later.

        Raises:
            RunDirError: Where a line is no record.
            OSError: Where the file cannot be read; one that is not there yet has no records.
        """
        for line in self._new_lines():
            number = self.count
            record = parse_record(line, where=f"{self._path}:{number + 1}")
            self._records.append({k: record[k] for k in _FOR_GOODPUT if k in record})
            yield Numbered(number, record, self._row(record))

    def _new_lines(self) -> Iterator[bytes]:
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(self._read_bytes)
            for line in file:
                if not line.endswith(b"\n"):  # it is being written, or a kill has cut it short
                    return
                self._read_bytes += len(line)
                yield line.rstrip(b"\n")

    def _row(self, record: Record) -> Row:
        event: str = record["event"]
        row: Row = {
            STEP: record["step"],
            ATTEMPT: record["attempt"],
            TIMESTAMP: record["time"],
            "attempt_s": record["at_s"],
            "event": event,
        }
        section = _SECTIONS.get(event, event)
        if event == "system" and _NODE in record:
            section = f"system/node_{record[_NODE]}"
        for name, value in record.items():
            if name in _OF_EVERY_RECORD or name == _NODE:
                continue
            if name.startswith("rank_") and isinstance(value, list):
                row |= _of_ranks(name.removeprefix("rank_"), value)
            elif name in _TEXTS and isinstance(value, str):
                row[f"{section}/{name}"] = value
            else:
                given = _NAMES.get(name, f"{section}/{name.removeprefix('eval_')}")
                row |= dict(_numbers(given, value))
        if event in self._counts:
            self._counts[event] += 1
            row[f"mishaps/{event}"] = self._counts[event]
        return row | self._shares(event)

    def _shares(self, event: str) -> Row:
        grown = self.count - self._shares_at
        due = grown >= max(SHARES_EVERY, self._shares_at // 20)
        if not due and event not in ("start", "end"):
            return {}
        self._shares_at = self.count
        figures = goodput(self._records)
        if not figures.total_s:
            return {}
        shares = (figures.seconds[phase] / figures.total_s for phase in PHASES)
        return {GOODPUT: figures.fraction, **dict(zip(SHARES, shares, strict=True))}


def _of_ranks(name: str, values: Sequence[Any]) -> Row:
    """Name a figure that every rank has."""
    numbers = [value for value in values if _is_number(value)]
    row: Row = {}
    if len(numbers) != len(values) or not numbers:
        return row
    if name == "step_s":
        row[STEP_S_MAX], row[STEP_S_MEDIAN] = max(numbers), statistics.median(numbers)
        row[SLOWEST_RANK] = numbers.index(max(numbers))
    if len(numbers) > MAX_RANKS:
        return row
    for rank, value in enumerate(numbers):
        key = f"memory/rank_{rank}_bytes" if name == "memory_bytes" else f"rank/{rank}/{name}"
        row[key] = value
    return row


def _numbers(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the numbers in a value under a name each; texts stay on the machine."""
    if _is_number(value):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(f"{name}/{key}", inner)
    elif isinstance(value, list) and len(value) <= MAX_RANKS:
        for index, inner in enumerate(value):
            yield from _numbers(f"{name}/{index}", inner)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
