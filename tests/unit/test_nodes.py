"""The machines besides rank 0's: one leaves samples, rank 0 tells each of them once."""

import json
import logging
import stat
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from peft_dist.config.run_sections import Tracking
from peft_dist.ledger.events import LedgerEvent, SystemEvent
from peft_dist.run.directory import RunDir
from peft_dist.tracking.nodes import STALE_INTERVALS, NodeFile, OtherNodes, watch_machine
from peft_dist.tracking.system import SystemSampler
from tests.unit.test_system import FIELDS, wait_until

EVERY_S = 0.05


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    (tmp_path / "run").mkdir(mode=0o700)
    return RunDir(tmp_path / "run")


def watch(
    run: RunDir, write: Callable[[LedgerEvent], None] | None = None, **more: Any
) -> SystemSampler | None:
    """Watch as rank 0 does, or as the process that `more` tells of."""
    tracking = {"system_every_s": EVERY_S, "system_nodes": True, **more.pop("tracking", {})}
    place = {"rank": 0, "local_rank": 0, "attempt": 1, "step": lambda: 7, "gpu_uuids": (), **more}
    return watch_machine(Tracking.model_validate(tracking), run, write, **place)


def leave(run: RunDir, *, rank: int = 4, attempt: int = 1, **figures: Any) -> None:
    event = SystemEvent(step=3, **figures)
    NodeFile(run.system, rank=rank, attempt=attempt).write(event)


def test_rank_0_tells_of_its_own_machine_and_of_the_others(run: RunDir) -> None:
    events: list[LedgerEvent] = []
    with ExitStack() as stopping:
        for place in ({"rank": 4}, {"rank": 8, "step": lambda: 6}):
            other = watch(run, **place)
            assert other is not None
            stopping.callback(other.stop)
        wait_until(lambda: len(list(run.system.glob("node-*.json"))) == 2)
        assert {stat.S_IMODE(path.stat().st_mode) for path in run.system.iterdir()} == {0o600}
        assert stat.S_IMODE(run.system.stat().st_mode) == 0o700
        main = watch(run, events.append)
        assert main is not None
        nodes = lambda: [event.fields().get("node") for event in events]  # noqa: E731
        wait_until(lambda: all(nodes().count(node) > 1 for node in (None, 4, 8)))
        main.stop()
    records = [event.fields() for event in events]
    assert "node" not in records[0]
    for record in records:
        assert record.keys() - {"node"} == FIELDS
        assert (record["event"], record["step"]) == ("system", 6 if record.get("node") == 8 else 7)
        assert record["memory_total_bytes"] == psutil.virtual_memory().total
        assert 0 <= record["cpu_percent"] <= 100
    assert not run.system.exists(), "a machine that is done leaves nothing"


@pytest.mark.parametrize(
    "place",
    [
        {"rank": 5, "local_rank": 1},
        {"rank": 4, "tracking": {"system_nodes": False}},
        {"rank": 4, "tracking": {"system_every_s": None}},
    ],
)
def test_no_other_process_looks_at_a_machine(run: RunDir, place: dict[str, Any]) -> None:
    assert watch(run, **place) is None
    assert not list(run.path.iterdir())


def test_unless_it_is_asked_for_rank_0_tells_of_its_own_machine_alone(run: RunDir) -> None:
    leave(run, cpu_percent=1.0)
    events: list[LedgerEvent] = []
    main = watch(run, events.append, tracking={"system_nodes": False})
    assert main is not None
    wait_until(lambda: len(events) > 2)
    main.stop()
    assert all("node" not in event.fields() for event in events)


def test_a_sample_is_told_once_and_one_of_another_attempt_never(run: RunDir) -> None:
    others = OtherNodes(run.system, attempt=2, every_s=60.0)
    assert list(others.new()) == []
    leave(run, rank=4, attempt=2, cpu_percent=1.0)
    leave(run, rank=8, attempt=1, cpu_percent=2.0)
    told = SystemEvent(step=3, cpu_percent=1.0, node=4)
    assert list(others.new()) == [told]
    assert list(others.new()) == []
    leave(run, rank=4, attempt=2, cpu_percent=1.0)  # another sample, of the same figures
    assert list(others.new()) == [told]


def test_what_was_left_while_rank_0_did_not_look_for_long_is_not_told(run: RunDir) -> None:
    others = OtherNodes(run.system, attempt=1, every_s=EVERY_S)
    leave(run, cpu_percent=1.0)
    time.sleep(STALE_INTERVALS * EVERY_S * 1.5)
    assert list(others.new()) == []
    leave(run, cpu_percent=2.0)
    assert [event.cpu_percent for event in others.new()] == [2.0]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"attempt": 1}', "\0" * 9])
def test_a_file_that_is_none_is_told_once_and_harms_no_other(
    run: RunDir, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    leave(run, rank=8, cpu_percent=1.0)
    (run.system / "node-4.json").write_text(text, encoding="utf-8")
    (run.system / "node-5.json").write_text(text, encoding="utf-8")
    others = OtherNodes(run.system, attempt=1, every_s=60.0)
    assert [event.node for event in others.new()] == [8]
    (warning,) = caplog.records
    assert "node-4.json cannot be read" in warning.message
    assert "training goes on" in warning.message


def test_a_sample_that_cannot_be_left_is_told_once_and_the_next_one_is(
    run: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    run.system.write_text("in the way", encoding="utf-8")
    other = watch(run, rank=4)
    assert other is not None
    wait_until(lambda: bool(caplog.records))
    time.sleep(4 * EVERY_S)
    run.system.unlink()
    wait_until(lambda: (run.system / "node-4.json").is_file())
    other.stop()
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert "File exists" in warning.message and "training goes on" in warning.message


def test_the_next_attempt_removes_what_killed_machines_left(run: RunDir) -> None:
    leave(run, cpu_percent=1.0)
    (run.system / ".node-4.json.half").write_text(json.dumps({}), encoding="utf-8")
    run.remove_leftovers()
    assert not run.system.exists()
