"""What a run directory says of its run, read once and as it is; draws nothing and judges little.

What is missing is missing: a run that trains at this moment, was cut off, or comes from a version
that wrote less has a report all the same.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peft_dist.common.errors import RunDirError
from peft_dist.config.load import read_mapping
from peft_dist.ledger.goodput import Goodput, Record, counting_records, current_records, goodput
from peft_dist.ledger.goodput import read_ledger as read_records
from peft_dist.report.series import number, numbers
from peft_dist.run.directory import RunDir
from peft_dist.run.history import crash_notes
from peft_dist.run.restart_policy import Kind

PLAN_FILE = "plan.json"
"""What was foreseen before the run, where somebody planned it: `bytes_per_rank`."""


@dataclass(frozen=True)
class Sample:
    """What the model answered to one held-out row."""

    row: int
    prompt: str
    expected: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Run:
    """One run, as its directory shows it."""

    name: str
    path: Path
    recipe_text: str
    recipe: Mapping[str, Any]
    """By dotted field."""
    made: Mapping[str, Any]
    """`run.json`."""
    result: Mapping[str, Any]
    """`result.json`; empty before the end."""
    failure: str
    """Why starting again cannot help; empty where it can."""
    planned_bytes: Sequence[float]
    """Foreseen memory of every rank; empty without a plan."""
    records: Sequence[Record]
    """The ledger, without what an attempt wrote after it had lost the run."""
    counting: Sequence[Record]
    """Steps and evaluations whose work is part of the run."""
    goodput: Goodput
    crashes: Mapping[int, str]
    """What a rank said before it ended, by attempt."""

    def events(self, *names: str) -> list[Record]:
        """Return the records of these events."""
        return [record for record in self.records if record["event"] in names]

    @cached_property
    def steps(self) -> list[Record]:
        """The steps that made the adapter."""
        return [record for record in self.counting if record["event"] == "step"]

    @cached_property
    def evaluations(self) -> list[Record]:
        """The evaluations that count."""
        return [record for record in self.counting if record["event"] == "evaluation"]

    @property
    def start(self) -> Record:
        """The newest start; empty where none was written."""
        starts = self.events("start")
        return starts[-1] if starts else {}

    @property
    def restarts(self) -> list[Record]:
        """Every start but the first."""
        return self.events("start")[1:]

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run."""
        found = number(self.start.get("steps")) or number(self.result.get("steps"))
        return None if found is None else int(found)

    @property
    def state(self) -> str:
        """How the run stands, in a word or two."""
        if self.result:
            return "finished"
        if self.failure:
            return "failed"
        ends = [record for record in self.records if record["event"] in ("start", "end")]
        if not ends or ends[-1]["event"] == "start":
            return "not finished"
        return str(ends[-1].get("outcome", "ended"))

    @property
    def base_bytes(self) -> list[float]:
        """Bytes of the base that every rank holds."""
        named = "base_bytes_per_rank"
        return numbers(self.result.get(named)) or numbers(self.start.get(named))

    @property
    def peak_bytes(self) -> list[float]:
        """Most memory that every rank has held: its GPU's, or the host's where it has none."""
        on_gpu = self.result.get("device") == "cuda"
        kind = "peak_device_bytes_per_rank" if on_gpu else "peak_rss_bytes_per_rank"
        found = numbers(self.result.get(kind))
        for record in self.steps[-1:]:
            found = found or numbers(record.get("rank_memory_bytes"))
        return found

    @property
    def samples(self) -> list[Sample]:
        """The rows that the model was asked, before the first step and after the last one."""
        rows: dict[tuple[int, str, str], dict[bool, str]] = {}
        for record in self.events("sample"):
            row, prompt, expected = (record.get(name) for name in ("row", "prompt", "expected"))
            key = (row if type(row) is int else 0, str(prompt), str(expected))
            rows.setdefault(key, {})[record["step"] > 0] = str(record.get("predicted"))
        return [Sample(*key, said.get(False), said.get(True)) for key, said in rows.items()]


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Read run directories.

    Raises:
        RunDirError: For one that holds no run, or none that has begun to train.
        RecipeError: For a recipe that cannot be read.
    """
    runs = [RunDir.open(path) for path in paths]
    for path, times in Counter(run.path.resolve() for run in runs).items():
        if times > 1:
            raise RunDirError("is named twice", where=str(path), remedy="name it once")
    alike = Counter(run.path.name for run in runs)
    return [
        read_run(run, run.path.name if alike[run.path.name] == 1 else os.path.relpath(run.path))
        for run in runs
    ]


def read_run(run: RunDir, name: str) -> Run:
    """Read one run directory, to be called by a name."""
    records = current_records(read_records(run.ledger))
    figures = goodput(records)
    failure = run.read_failure()
    return Run(
        name=name,
        path=run.path,
        recipe_text=run.recipe.read_text(encoding="utf-8"),
        recipe=flat(read_mapping(run.recipe, remedy="name another run")),
        made=_read_json(run.run_facts),
        result=_read_json(run.result),
        failure="" if failure is None else failure.error,
        planned_bytes=_planned(run),
        records=records,
        counting=counting_records(records),
        goodput=figures,
        crashes=_crashes(run.attempts, [span.attempt for span in figures.attempts]),
    )


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Return the settings of nested sections by dotted field."""
    if not isinstance(value, Mapping):
        return {path: value}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= flat(item, f"{path}.{key}" if path else str(key))
    return found


def _planned(run: RunDir) -> list[float]:
    told = _read_json(run.path / PLAN_FILE).get("bytes_per_rank")
    one = number(told)
    return numbers(told) if one is None else [one]


def _crashes(folder: Path, attempts: Sequence[int]) -> dict[int, str]:
    found = {}
    for attempt in attempts:
        notes = crash_notes(folder, attempt)
        # Who lost a peer says nothing of why that one ended.
        for note in [note for note in notes if note["kind"] != Kind.LOST_PEER] or notes:
            found[attempt] = f"rank {note['rank']}: {note['error']}"
            break
    return found


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file; empty where there is none."""
    with suppress(OSError, ValueError):
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
    return {}
