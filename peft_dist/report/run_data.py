"""Read a run directory into the data of its report.

What is missing is left out: a run that trains at this moment, was cut off, or comes from a version
that wrote less has a report all the same.
"""

import gc
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from peft_dist.common.errors import RunDirError
from peft_dist.config.load import read_mapping
from peft_dist.ledger.events import (
    EndEvent,
    EvaluationEvent,
    LedgerEvent,
    SampleEvent,
    StartEvent,
    StepEvent,
)
from peft_dist.ledger.goodput import Goodput, GoodputMeter, counting_events
from peft_dist.ledger.reader import LedgerReader
from peft_dist.report.series import number, numbers
from peft_dist.report.thin_events import ThinnedEvents
from peft_dist.run.directory import RunDir
from peft_dist.run.history import crash_notes
from peft_dist.run.prediction import read_prediction
from peft_dist.run.restart_policy import Kind

AnyEvent = TypeVar("AnyEvent", bound=LedgerEvent)


@dataclass(frozen=True)
class SampleAnswers:
    """What the model answered to one example of the eval set."""

    row: int
    prompt: str
    expected: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class RunData:
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
    """Planned memory of every rank; empty without a plan."""
    planned_tokens_per_s: float | None
    """Planned speed, each row of the longest length."""
    events: Sequence[LedgerEvent]
    """The ledger, without what an attempt wrote after it had lost the run; of very many steps a
    sample and the extremes."""
    ledger_steps: int
    """Steps in the ledger."""
    counting: Sequence[LedgerEvent]
    """Steps, evaluations and checkpoints whose work is part of the run."""
    goodput: Goodput
    crashes: Mapping[int, str]
    """The error of a rank that crashed, by attempt."""
    traces: Sequence[Path] = ()
    """Files of the profiler."""

    def of(self, *kinds: type[AnyEvent]) -> list[AnyEvent]:
        """Return the events of these classes."""
        return [event for event in self.events if isinstance(event, kinds)]

    @cached_property
    def steps(self) -> list[StepEvent]:
        """The steps that made the adapter."""
        return [event for event in self.counting if isinstance(event, StepEvent)]

    @property
    def is_thinned(self) -> bool:
        """Whether `events` lacks steps of the ledger."""
        return len(self.of(StepEvent)) < self.ledger_steps

    @cached_property
    def evaluations(self) -> list[EvaluationEvent]:
        """The evaluations that count."""
        return [event for event in self.counting if isinstance(event, EvaluationEvent)]

    @cached_property
    def starts(self) -> list[StartEvent]:
        """The start of every attempt that came so far."""
        return self.of(StartEvent)

    @property
    def start(self) -> StartEvent:
        """The newest start; an empty one where none was written."""
        return self.starts[-1] if self.starts else StartEvent(step=0)

    @property
    def restarts(self) -> list[StartEvent]:
        """Every start but the first."""
        return self.starts[1:]

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run."""
        found = self.start.steps or number(self.result.get("steps"))
        return None if found is None else int(found)

    @property
    def state(self) -> str:
        """How the run stands, in a word or two."""
        if self.result:
            return "finished"
        if self.failure:
            return "failed"
        for event in reversed(self.events):
            if isinstance(event, StartEvent | EndEvent):
                return event.outcome if isinstance(event, EndEvent) else "not finished"
        return "not finished"

    @property
    def base_bytes(self) -> list[float]:
        """Bytes of the base that every rank holds."""
        found = numbers(self.result.get("base_bytes_per_rank"))
        return found or list(self.start.base_bytes_per_rank or [])

    @property
    def peak_bytes(self) -> list[float]:
        """Peak memory of every rank: its GPU's, or the host's where it has none."""
        on_gpu = self.result.get("device") == "cuda"
        kind = "peak_device_bytes_per_rank" if on_gpu else "peak_rss_bytes_per_rank"
        found = numbers(self.result.get(kind))
        if not found and self.steps:
            found = list(self.steps[-1].rank_memory_bytes or [])
        return found

    @property
    def samples(self) -> list[SampleAnswers]:
        """The examples that the model was asked, before the first step and after the last one."""
        found: dict[tuple[int, str, str], dict[bool, str]] = {}
        for event in self.of(SampleEvent):
            key = (event.row, event.prompt, event.expected)
            found.setdefault(key, {})[event.step > 0] = event.predicted
        return [
            SampleAnswers(*key, answers.get(False), answers.get(True))
            for key, answers in found.items()
        ]


def read_runs(paths: Sequence[str | Path]) -> list[RunData]:
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


def read_run(run: RunDir, name: str) -> RunData:
    """Read one run directory, to be called by a name."""
    thinned, meter = ThinnedEvents(), GoodputMeter()
    gc.disable()  # it would look at all that is kept again and again: half of the time
    try:
        for event in LedgerReader(run.ledger).all():
            if meter.add(event):
                thinned.add(event)
    finally:
        gc.enable()
    events, time_use = thinned.finish(), meter.result()
    failure = run.read_failure()
    return RunData(
        name=name,
        path=run.path,
        recipe_text=run.recipe.read_text(encoding="utf-8"),
        recipe=flat(read_mapping(run.recipe, remedy="name another run")),
        made=_read_json(run.run_facts),
        result=_read_json(run.result),
        failure="" if failure is None else failure.error,
        planned_bytes=_planned(run),
        planned_tokens_per_s=number(read_prediction(run).get("tokens_per_s")),
        events=events,
        ledger_steps=thinned.steps,
        counting=counting_events(events),
        goodput=time_use,
        crashes=_crashes(run.attempts, [span.attempt for span in time_use.attempts]),
        traces=sorted(run.profile.glob("*.json.gz")),
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
    planned = read_prediction(run).get("bytes_per_rank")
    one = number(planned)
    return numbers(planned) if one is None else [one]


def _crashes(folder: Path, attempts: Sequence[int]) -> dict[int, str]:
    found = {}
    for attempt in attempts:
        notes = crash_notes(folder, attempt)
        # A rank that lost a peer does not know why that one ended.
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
