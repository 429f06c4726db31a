"""The schema and the reader of the ledger: what a line may be, and how much of a file is read."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from peft_dist.common.errors import RunDirError
from peft_dist.ledger.events import (
    EVENT_TYPES,
    GpuSample,
    LedgerEvent,
    RollbackEvent,
    SampleEvent,
    SavedEvent,
    SkippedEvent,
    StartEvent,
    StepEvent,
    UnknownEvent,
)
from peft_dist.ledger.read_event import from_fields, from_line
from peft_dist.ledger.reader import BLOCK_BYTES, LedgerReader
from peft_dist.ledger.writer import LedgerWriter

ROOT = Path(__file__).resolve().parents[2]
STAMP = {"attempt": 1, "time": 5.0, "at_s": 2.5}
OLD_LINES: list[dict[str, Any]] = [
    {**STAMP, "event": "start", "step": 0, "steps": 9, "startup_s": 1.0, "load_s": 1.5},
    {**STAMP, "event": "micro_batch", "step": 0, "planned": 4, "chosen": 8},
    {**STAMP, "event": "step", "step": 1, "lr": 0.1, "tokens": 8, "rows": 1, "loss": 2.0,
     "grad_norm": 1.0, "tokens_per_s": 8, "peak_memory_bytes": 10},
    {**STAMP, "event": "evaluation", "step": 1, "eval_loss": 2.0, "eval_accuracy": None},
    {**STAMP, "event": "sample", "step": 1, "row": 1, "prompt": "\ud800", "expected": "b",
     "predicted": "c"},
    {**STAMP, "event": "checkpoint", "step": 1, "stall_s": 0.5},
    {**STAMP, "event": "saved", "step": 1, "bytes": 7, "write_s": 0.5},
    {**STAMP, "event": "save_failed", "step": 1, "reason": "disk full", "write_s": 0.5},
    {**STAMP, "event": "skipped", "step": 2, "reason": "loss nan", "tokens": 8},
    {**STAMP, "event": "rollback", "step": 2, "reason": "loss nan", "back_to": 1},
    {**STAMP, "event": "gap", "step": 2, "from_step": 1, "to_step": 2},
    {**STAMP, "event": "system", "step": 1, "cpu_percent": 5, "gpus": [{"power_w": 3.5}]},
    {**STAMP, "event": "end", "step": 2, "outcome": "done"},
]  # fmt: skip


def write_lines(path: Path, lines: list[dict[str, Any]], rest: str = "") -> LedgerReader:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + rest, encoding="utf-8")
    return LedgerReader(path)


def step(number: int) -> dict[str, Any]:
    return {**STAMP, "event": "step", "step": number, "loss": 1.0, "tokens_per_s": 1.0}


def test_every_field_of_every_event_has_its_meaning() -> None:
    for kind in (*EVENT_TYPES, GpuSample):
        fields = {**kind.model_fields, "event": LedgerEvent.model_fields["event"]}
        assert all(field.description for field in fields.values()), kind


def test_every_line_of_an_older_version_is_read_and_holds_what_it_held(tmp_path: Path) -> None:
    events = list(write_lines(tmp_path / "l", OLD_LINES).all())
    assert [type(event) for event in events] == list(EVENT_TYPES)
    assert [event.fields() for event in events] == OLD_LINES


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    events = [from_fields(line) for line in OLD_LINES]
    writer = LedgerWriter(tmp_path / "l")
    for event in events:
        writer.write(event)
    writer.close()
    assert list(LedgerReader(tmp_path / "l").all()) == events
    assert [json.loads(line) for line in (tmp_path / "l").open()] == OLD_LINES


def test_an_event_asks_nothing_of_the_file_system_but_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step writes one: a question each would be many a second for a shared file system."""
    writer = LedgerWriter(tmp_path / "l")
    with monkeypatch.context() as patched:
        for name in ("fstat", "stat", "open", "ftruncate", "fsync"):
            patched.delattr(os, name)
        writer.write(StepEvent(step=1, loss=1.0, tokens_per_s=1.0))
    writer.close()
    assert len(list(LedgerReader(tmp_path / "l").all())) == 1


def test_keys_and_events_of_another_version_are_kept(tmp_path: Path) -> None:
    lines = [
        {**step(1), "heat": 3, "gpus": ["x"]},
        {**STAMP, "event": "pause", "step": 1, "loss": "of another type"},
    ]
    known, unknown = write_lines(tmp_path / "l", lines).all()
    assert isinstance(known, StepEvent) and isinstance(unknown, UnknownEvent)
    assert [known.fields(), unknown.fields()] == lines


def test_an_event_cannot_be_changed_or_made_of_nothing_finite() -> None:
    event = StepEvent(step=1, loss=1.0, tokens_per_s=1.0)
    with pytest.raises(ValueError, match="frozen"):
        event.loss = 2.0  # type: ignore[misc]
    with pytest.raises(ValueError, match="finite"):
        StepEvent(step=1, loss=float("nan"), tokens_per_s=1.0)


def test_a_half_last_line_is_left_out(tmp_path: Path) -> None:
    reader = write_lines(tmp_path / "l", [step(1), step(2)], rest='{"event": "step"')
    assert [event.step for event in reader.all()] == [1, 2]
    assert [event.step for event in reader.tail(9)] == [1, 2]
    assert [event.step for event in reader.follow()] == [1, 2]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"event": "step", "st', "is no event"),
        (b"\xff\xfe", "is no event"),
        (b"", "is no event"),
        (b"[1]", "is no event"),
        (b'{"step": 1}', "is no event: .*'event'"),
        (b'{"event": 7, "step": 1}', "is no event"),
        (b'{"event": "end", "step": 1, "time": 0, "at_s": 0}', "`attempt`: Field required"),
        (b'{"event": "end", "step": 1, "attempt": 1, "time": 0, "at_s": NaN}', "`at_s`: .*finite"),
        (b'{"event": "end", "step": 1, "attempt": 1, "time": -1, "at_s": 0}', "`time`: .*greater"),
        (b'{"event": "new", "step": 1.5, "attempt": 1, "time": 0, "at_s": 0}', "`step`: .*integer"),
        (b'{"event": "start", "step": 1, "attempt": 1, "time": 0, "at_s": 0, "load_s": "1"}',
         "`load_s`: .*number"),
    ],
)  # fmt: skip
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, line: bytes, complaint: str) -> None:
    good = json.dumps(step(1)).encode()
    (tmp_path / "ledger.jsonl").write_bytes(b"\n".join([good, line, good, b""]))
    reader = LedgerReader(tmp_path / "ledger.jsonl")
    for read in (reader.all, reader.follow):
        with pytest.raises(RunDirError, match=r"ledger\.jsonl:2: .*" + complaint):
            list(read())
    assert [event.step for event in reader.tail(9)] == [1, 1]


def test_following_yields_each_event_once_and_no_half_line(tmp_path: Path) -> None:
    reader = LedgerReader(tmp_path / "l")
    assert list(reader.follow()) == []
    seen: list[int] = []
    for number in range(1, 5):
        line = json.dumps(step(number)) + "\n"
        for part in (line[:9], line[9:]):
            with (tmp_path / "l").open("a") as file:
                file.write(part)
            seen += [event.step for event in reader.follow()]
        assert seen == list(range(1, number + 1))
    assert len(list(reader.all())) == 4
    assert list(reader.follow()) == []


def test_a_tail_is_the_newest_events_and_reads_no_more_of_the_file(tmp_path: Path) -> None:
    lines = [{**step(n), "note": "x" * (n % 700)} for n in range(1, 5000)]
    reader = write_lines(tmp_path / "l", lines, rest="{")
    text = (tmp_path / "l").read_bytes()
    size = len(text)
    assert size > 20 * BLOCK_BYTES
    # Whatever stands before the last blocks is never looked at.
    (tmp_path / "l").write_bytes(b"\0" * (size - 3 * BLOCK_BYTES) + text[-3 * BLOCK_BYTES :])
    for count in (1, 50, 200):
        assert [e.step for e in reader.tail(count)] == list(range(5000 - count, 5000))
    found = reader.tail(10_000, limit_bytes=2 * BLOCK_BYTES)
    assert [e.step for e in found] == list(range(5000 - len(found), 5000))
    assert sum(len(json.dumps(e.fields())) + 1 for e in found) > 2 * BLOCK_BYTES - 1000


def test_a_tail_reaches_back_to_so_many_events_of_a_kind(tmp_path: Path) -> None:
    saved = {**STAMP, "event": "saved", "step": 0}
    lines = [step(1), saved, step(2), saved, saved, step(3)]
    reader = write_lines(tmp_path / "l", lines)
    assert [e.step for e in reader.tail(2, StepEvent)] == [2, 0, 0, 3]
    assert [e.step for e in reader.tail(9, (StepEvent, SavedEvent))] == [1, 0, 2, 0, 0, 3]
    assert reader.tail(1, SkippedEvent) == reader.tail(6)
    assert LedgerReader(tmp_path / "none").tail(3) == []
    assert write_lines(tmp_path / "l", [], rest="x" * 200_000).tail(3) == []


def test_the_newest_start_and_the_last_event(tmp_path: Path) -> None:
    assert LedgerReader(tmp_path / "none").newest_start() is None
    assert write_lines(tmp_path / "l", [step(1)]).newest_start() is None
    starts = [{**STAMP, "event": "start", "step": n} for n in (0, 7)]
    found = write_lines(tmp_path / "l", [*starts, step(8)]).newest_start()
    assert found is not None
    assert (found[0].step, found[1].step) == (7, 8)


def test_a_rollback_without_its_step_takes_nothing_back() -> None:
    assert RollbackEvent(step=5).last_step == 5
    assert RollbackEvent(step=5, back_to=3).last_step == 3


def test_a_line_of_half_a_surrogate_pair_is_read() -> None:
    line = json.dumps(OLD_LINES[4]).encode()
    event: LedgerEvent = from_line(line)
    assert isinstance(event, SampleEvent) and event.prompt == "\ud800"
    assert isinstance(from_line(json.dumps(OLD_LINES[0]).encode()), StartEvent)
