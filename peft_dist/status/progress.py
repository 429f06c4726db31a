"""Where a run stands, from the end of its ledger: the part that one read of the disk brings.

Sums nothing up; `goodput.py` reads the whole file. Whatever is no record is passed over: the file
may be written to at this moment.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TAIL_BYTES = 65_536
"""How much of a ledger's end is read: some hundred steps; of a thousand processes, a few."""
MORE = 16
"""So many times as much is read where that holds no two steps: between slow ones may stand samples
of many machines."""
RECENT_STEPS = 50
"""Over so many steps the time of one is taken, evaluations and saves between them included."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Standing:
    """How far a run has come; None is not known."""

    step: int | None = None
    steps: int | None = None
    """Steps of the whole run."""
    loss: float | None = None
    """Of the last step, as its record has it."""
    tokens_per_s: float | None = None
    """Likewise."""
    step_s: float | None = None
    """Seconds that a step takes of late."""


def read_tail(path: Path, limit: int = TAIL_BYTES) -> list[Record]:
    """Return the records of a ledger's end, the oldest first; none where it cannot be read."""
    records, is_whole = _read_end(path, limit)
    steps = sum(record["event"] == "step" for record in records)
    return records if is_whole or steps > 1 else _read_end(path, limit * MORE)[0]


def _read_end(path: Path, limit: int) -> tuple[list[Record], bool]:
    """Return the records of so many bytes, and whether that is all of the file."""
    try:
        with path.open("rb") as file:
            begin = max(0, file.seek(0, 2) - limit)
            file.seek(begin)
            lines = file.read(limit).split(b"\n")
    except OSError:
        return [], True
    # The last line has not ended, and the first one begins before what was read.
    whole = lines[1 if begin else 0 : -1]
    return [record for line in whole if (record := _parse(line)) is not None], begin == 0


def standing(records: Sequence[Record]) -> Standing:
    """Return where the newest attempt among these records stands."""
    step = steps = loss = tokens_per_s = None
    attempt = 0
    rows: list[list[float]] = [[]]  # of steps done one after another: seconds since their attempt
    for record in records:
        if record["attempt"] < attempt:  # the run was no longer its own
            continue
        event = record["event"]
        if event in ("start", "rollback") or record["attempt"] > attempt:
            rows.append([])
        attempt = record["attempt"]
        if event == "start":
            steps = _whole(record.get("steps")) or steps
        if event == "step":
            rows[-1].append(record["at_s"])
            loss = _number(record.get("loss"))
            tokens_per_s = _number(record.get("tokens_per_s"))
        if event in ("start", "step", "rollback"):
            step = record.get("back_to", record["step"])
    return Standing(step, steps, loss, tokens_per_s, _step_s(rows))


def _step_s(rows: Sequence[Sequence[float]]) -> float | None:
    """Return the time of a step in the newest row that has two."""
    for row in reversed(rows):
        recent = row[-RECENT_STEPS - 1 :]
        if len(recent) > 1:
            return max(0.0, recent[-1] - recent[0]) / (len(recent) - 1)
    return None


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("event"), str):
        return None
    counts = [record.get("attempt"), record.get("step"), record.get("back_to", 0)]
    fits = all(_whole(count) is not None for count in counts)
    return record if fits and _number(record.get("at_s")) is not None else None


def _whole(value: Any) -> int | None:
    return value if type(value) is int else None


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) else None
