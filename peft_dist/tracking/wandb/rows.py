"""Turn the ledger into rows for W&B: one row of named numbers per event, in order.

A gap is as many rows as steps it stands for.

A row is a function of the ledger up to its event and of nothing else, so that it is the same
whoever sends it, and whenever. Sends nothing, and never imports wandb.
"""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peft_dist.ledger import events
from peft_dist.ledger.goodput import PHASES, GoodputMeter
from peft_dist.ledger.reader import LedgerReader

Row = dict[str, Any]

STEP = "train/step"
"""The horizontal axis of every metric; W&B's own step is the number of a row."""
ATTEMPT = "attempt"
TIMESTAMP = "_timestamp"
"""W&B's name for the time of a row: the event's own, also where it is sent much later."""
LOSS, LEARNING_RATE, GRADIENT_NORM = "train/loss", "train/lr", "train/grad_norm"
TOKENS_PER_S, MFU = "train/tokens_per_s", "train/mfu"
HELD_OUT_LOSS, HELD_OUT_ACCURACY = "evaluation/loss", "evaluation/accuracy"
REWARD_CHOSEN, REWARD_REJECTED = "train/reward_chosen", "train/reward_rejected"
REWARD_MARGIN, REWARD_ACCURACY = "train/reward_margin", "train/reward_accuracy"
HELD_OUT_MARGIN = "evaluation/reward_margin"
CHECKPOINT_STALL_S, CHECKPOINT_WRITE_S = "checkpoint/stall_s", "checkpoint/write_s"
PEAK_MEMORY = "memory/peak_bytes"
GOODPUT = "goodput/fraction"
SHARES = tuple(f"goodput/{phase}" for phase in PHASES)
"""Shares of the run's time so far, as `peft-dist goodput` divides it."""
MISHAPS = tuple(
    events.event_name(kind)
    for kind in (events.SkippedEvent, events.RollbackEvent, events.SaveFailedEvent)
)
MISHAP_COUNTS = tuple(f"mishaps/{name}" for name in MISHAPS)
"""How often each has happened so far."""
STEP_S_MAX, STEP_S_MEDIAN, SLOWEST_RANK = "rank/step_s_max", "rank/step_s_median", "rank/slowest"
RANK_STEP_S_PATTERN = "rank/[0-9]+/step_s"
RANK_MEMORY_PATTERN = "memory/rank_[0-9]+_bytes"
SYSTEM_PATTERN = "system/.*"
"""Also of other nodes: `system/node_<first rank>/...`."""

MAX_RANKS = 64
"""Ranks that get lines of their own; of more, the slowest and the median are enough."""
SHARES_EVERY = 20
"""Goodput stands in the rows of starts and ends, and in every so many."""

_SECTIONS: dict[type[events.LedgerEvent], str] = {
    events.StepEvent: "train",
    events.SavedEvent: "checkpoint",
    events.SaveFailedEvent: "checkpoint",
}
"""First part of the names of an event's metrics, where it is not the event's name."""
_NAMES = {"peak_memory_bytes": PEAK_MEMORY}
_TEXTS = ("reason", "outcome")
"""The only texts that are sent; others may say more of the node than anybody needs."""
_NO_METRICS = frozenset((*events.LedgerEvent.model_fields, "node"))


class Numbered(NamedTuple):
    """An event, the row it is, and its number in the run, from 0."""

    number: int
    event: events.LedgerEvent
    row: Row


class LedgerRows:
    """Reads a ledger as it grows, and makes a row of each of its events."""

    def __init__(self, ledger: Path) -> None:
        """Begin with the first event."""
        self._reader = LedgerReader(ledger)
        self._meter = GoodputMeter()
        self._mishaps = dict.fromkeys(MISHAPS, 0)
        self.count = 0
        """Rows made so far."""

    def new(self) -> Iterator[Numbered]:
        """Yield what was written since the last call.

        Raises:
            RunDirError: Where a line is no event.
            OSError: Where the file cannot be read.
        """
        for event in self._reader.follow():
            self._meter.add(event)
            row = self._row(event)
            for _ in range(rows_of(event)):
                number, self.count = self.count, self.count + 1
                yield Numbered(number, event, row | self._shares(event, number))

    def _row(self, event: events.LedgerEvent) -> Row:
        row: Row = {
            STEP: event.step,
            ATTEMPT: event.attempt,
            TIMESTAMP: event.time,
            "attempt_s": event.at_s,
            "event": event.event,
        }
        section = _SECTIONS.get(type(event), event.event)
        if isinstance(event, events.SystemEvent) and event.node is not None:
            section = f"system/node_{event.node}"
        for name, value in event.fields().items():
            if name in _NO_METRICS:
                continue
            if name.startswith("rank_") and isinstance(value, list):
                row |= _of_ranks(name.removeprefix("rank_"), value)
            elif name in _TEXTS and isinstance(value, str):
                row[f"{section}/{name}"] = value
            else:
                given = _NAMES.get(name, f"{section}/{name.removeprefix('eval_')}")
                row |= dict(_numbers(given, value))
        if event.event in self._mishaps:
            self._mishaps[event.event] += 1
            row[f"mishaps/{event.event}"] = self._mishaps[event.event]
        return row

    def _shares(self, event: events.LedgerEvent, number: int) -> Row:
        if number % SHARES_EVERY and not isinstance(event, events.StartEvent | events.EndEvent):
            return {}
        found = self._meter.result()
        if not found.total_s:
            return {}
        shares = (found.seconds[phase] / found.total_s for phase in PHASES)
        return {GOODPUT: found.fraction, **dict(zip(SHARES, shares, strict=True))}


def rows_of(event: events.LedgerEvent) -> int:
    """Return how many rows an event is: one, but of a gap one for each step whose line was lost.

    The server may have the rows of lost lines. It counts rows: without others in their place, as
    many later ones would be taken for those that it has.
    """
    return max(1, event.missing_steps) if isinstance(event, events.GapEvent) else 1


def _of_ranks(name: str, values: Sequence[Any]) -> Row:
    """Name a metric that every rank has."""
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
