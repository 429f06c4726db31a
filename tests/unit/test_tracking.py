"""The ledger as the record of one run."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from peft_dist.common.errors import RunDirError, TrainingError
from peft_dist.ledger.events import (
    EndEvent,
    EvaluationEvent,
    LedgerEvent,
    SavedEvent,
    StartEvent,
    StepEvent,
)
from peft_dist.ledger.writer import LedgerWriter
from tests.processes import environment

EVALUATION = EvaluationEvent(step=1, eval_loss=1.25, eval_accuracy=0.5, eval_seconds=3.0)


def step(number: int, *, loss: float = 2.5) -> StepEvent:
    return StepEvent(
        step=number, lr=1e-3, tokens=320, rows=16, loss=loss, grad_norm=1.0, tokens_per_s=1234.0,
        peak_memory_bytes=10**9,
    )  # fmt: skip


STEP = step(1)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_event_is_a_line_as_soon_as_it_is_written(tmp_path: Path) -> None:
    ledger = LedgerWriter(tmp_path / "ledger.jsonl")
    ledger.write(STEP)
    ledger.write(EVALUATION)
    lines = read(tmp_path / "ledger.jsonl")
    for line, event in zip(lines, (STEP, EVALUATION), strict=True):
        assert line | event.fields() == line
    assert (tmp_path / "ledger.jsonl").stat().st_mode & 0o777 == 0o600
    ledger.close()
    ledger.close()


def test_an_event_gets_the_attempt_and_both_clocks_unless_it_has_them(tmp_path: Path) -> None:
    ledger = LedgerWriter(tmp_path / "l", attempt=3, clock_zero=time.monotonic() - 100.0)
    begun = time.time()
    ledger.write(StartEvent(step=0))
    ledger.write(EndEvent(step=1, attempt=2, time=5.0, at_s=6.0))
    ledger.close()
    first, second = read(tmp_path / "l")
    assert first["attempt"] == 3
    assert begun <= first["time"] <= time.time()
    assert 100.0 <= first["at_s"] < 160.0
    assert (second["attempt"], second["time"], second["at_s"]) == (2, 5.0, 6.0)


@pytest.mark.parametrize("half", ['{"event": "st', "x" * 200_000])
def test_a_half_line_left_by_a_kill_is_cut_before_the_next_attempt_writes(
    tmp_path: Path, half: str
) -> None:
    path = tmp_path / "ledger.jsonl"
    for whole in ("", json.dumps(STEP.fields()) + "\n"):
        path.write_text(whole + half, encoding="utf-8")
        ledger = LedgerWriter(path, attempt=2)
        assert path.read_text(encoding="utf-8") == whole
        ledger.write(EVALUATION)
        ledger.close()
        assert [record["event"] for record in read(path)] == ["step"] * bool(whole) + ["evaluation"]


FULL_DISK = """
import json, logging, resource, sys
from pathlib import Path
from peft_dist.common.errors import TrainingError
from peft_dist.ledger import writer
from peft_dist.ledger.events import SkippedEvent
from peft_dist.ledger.writer import LedgerWriter

path, room = Path(sys.argv[1]), int(sys.argv[2])
def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
def whole():
    text = path.read_bytes()
    assert text == b"" or text.endswith(b"\\n")
    return [json.loads(line)["step"] for line in text.splitlines()]

ledger = LedgerWriter(path)
limit(room)  # a disk with so much room: the write that crosses it ends half-way through a line
for step in range(1, 51):
    ledger.write(SkippedEvent(step=step, reason="x" * 100))
    found = whole()
    assert found == list(range(1, len(found) + 1))
print(len(found))
"""


def full_disk(path: Path, code: str, *, room: int) -> subprocess.CompletedProcess[str]:
    """Run code after 50 events were written to a disk with so many bytes of room."""
    return subprocess.run(
        [sys.executable, "-c", FULL_DISK + code, str(path), str(room)],
        env=environment(path.parent), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_a_full_disk_loses_no_event_and_leaves_no_half_line(tmp_path: Path) -> None:
    code = (
        "limit(resource.RLIM_INFINITY)\n"
        "ledger.write(SkippedEvent(step=51))\n"
        "assert whole() == list(range(1, 52))\n"
        "ledger.close()\n"
    )
    done = full_disk(tmp_path / "ledger.jsonl", code, room=2000)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) < 15
    (warning,) = done.stderr.splitlines()
    assert "ledger.jsonl: cannot be written: File too large; training goes on" in warning


def test_events_that_wait_are_written_at_the_end(tmp_path: Path) -> None:
    code = "limit(resource.RLIM_INFINITY)\nledger.close()\nassert len(whole()) == 50\n"
    done = full_disk(tmp_path / "ledger.jsonl", code, room=0)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 0


def test_a_disk_full_to_the_end_is_told(tmp_path: Path) -> None:
    code = (
        "try:\n    ledger.close()\n"
        "except TrainingError as error:\n    print(error)\n"
        "ledger.close()\n"
    )
    done = full_disk(tmp_path / "ledger.jsonl", code, room=2000)
    assert done.returncode == 0, done.stderr
    count, line = done.stdout.splitlines()
    waiting = 50 - int(count)
    assert f"cannot be written: File too large ({waiting} events not written); free space" in line


def test_a_full_disk_that_outlasts_the_memory_set_aside_stops_the_run(tmp_path: Path) -> None:
    code = (
        "writer.MAX_PENDING = 60\n"
        "for step in range(51, 61):\n    ledger.write(SkippedEvent(step=step))\n"
        "try:\n    ledger.write(SkippedEvent(step=61))\n"
        "except TrainingError as error:\n    print(error)\n"
    )
    done = full_disk(tmp_path / "ledger.jsonl", code, room=0)
    assert done.returncode == 0, done.stderr
    assert "cannot be written: File too large (61 events not written)" in done.stdout


def test_a_line_that_another_process_wrote_behind_a_half_one_is_not_cut(tmp_path: Path) -> None:
    code = (
        "text = path.read_bytes()\n"
        "ledger._half = (len(text), len(text) + 3)\n"
        "limit(resource.RLIM_INFINITY)\n"
        "with path.open('ab') as other:\n    other.write(b'abc\\nother line\\n')\n"
        "ledger.close()\n"
    )
    path = tmp_path / "ledger.jsonl"
    done = full_disk(path, code, room=2000)
    assert done.returncode == 0, done.stderr
    assert path.read_text(encoding="utf-8").count("other line") == 1


def test_a_ledger_without_room_cannot_be_synced_until_there_is_room(tmp_path: Path) -> None:
    code = (
        "try:\n    ledger.sync()\n"
        "except OSError as error:\n    print(error.strerror)\n"
        "limit(resource.RLIM_INFINITY)\n"
        "ledger.sync()\n"
        "assert whole() == list(range(1, 51))\n"
        "ledger.close()\n"
        "ledger.sync()\n"
    )
    done = full_disk(tmp_path / "ledger.jsonl", code, room=2000)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == ["ledger.jsonl: File too large"]


def test_no_event_waits_for_a_disk_that_is_slow_to_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fsync = tmp_path / "ledger.jsonl", os.fsync
    begun, may_end = threading.Event(), threading.Event()
    synced: list[Path] = []

    def slow(handle: int) -> None:
        synced.append(Path(f"/proc/self/fd/{handle}").readlink())
        begun.set()
        assert may_end.wait(30)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", slow)
    ledger = LedgerWriter(path)
    ledger.write(STEP)
    thread = threading.Thread(target=ledger.sync)
    thread.start()
    assert begun.wait(30)
    ledger.write(EVALUATION)
    assert [record["event"] for record in read(path)] == ["step", "evaluation"]
    may_end.set()
    thread.join()
    ledger.sync()
    assert synced == [path, tmp_path, path]  # the name of a new file is in its folder
    ledger.close()


def test_a_ledger_in_a_missing_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"ledger\.jsonl: cannot be written: No such file"):
        LedgerWriter(tmp_path / "none" / "ledger.jsonl")


def test_an_attempt_that_lost_the_run_writes_nothing_more(tmp_path: Path) -> None:
    lost = False

    def check() -> None:
        if lost:
            raise RunDirError("was taken over")

    ledger = LedgerWriter(tmp_path / "l", check=check)
    ledger.write(STEP)
    lost = True
    with pytest.raises(RunDirError):
        ledger.write(step(2))
    ledger.close()
    assert [record["step"] for record in read(tmp_path / "l")] == [1]


def test_events_that_wait_are_not_written_into_a_run_of_another_attempt(tmp_path: Path) -> None:
    code = (
        "limit(resource.RLIM_INFINITY)\n"
        "def check():\n    raise TrainingError('was taken over')\n"
        "ledger._check = check\n"
        "try:\n    ledger.close()\n"
        "except TrainingError as error:\n    print(error, len(whole()))\n"
    )
    done = full_disk(tmp_path / "ledger.jsonl", code, room=0)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "was taken over 0"


def test_threads_may_write_at_once(tmp_path: Path) -> None:
    ledger = LedgerWriter(tmp_path / "l")

    def write(kind: type[LedgerEvent]) -> None:
        for number in range(500):
            ledger.write(kind.model_validate({"step": number}))

    threads = [threading.Thread(target=write, args=(kind,)) for kind in (EndEvent, SavedEvent)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ledger.close()
    records = read(tmp_path / "l")
    assert len(records) == 1000
    assert [record["at_s"] for record in records] == sorted(record["at_s"] for record in records)


def test_a_killed_writer_leaves_whole_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    code = (
        "import sys; from pathlib import Path\n"
        "from peft_dist.ledger.events import EndEvent\n"
        "from peft_dist.ledger.writer import LedgerWriter\n"
        "ledger = LedgerWriter(Path(sys.argv[1]))\n"
        "for step in range(10**9): ledger.write(EndEvent(step=step))\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], env=environment(tmp_path))
    deadline = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size > 100_000):
        assert writer.poll() is None
        assert time.monotonic() < deadline
    writer.kill()
    writer.wait()
    steps = [record["step"] for record in read(path)]
    assert steps == list(range(len(steps)))


def test_a_closed_ledger_takes_nothing_more(tmp_path: Path) -> None:
    ledger = LedgerWriter(tmp_path / "l")
    ledger.write(STEP)
    ledger.close()
    with pytest.raises(AssertionError):  # by now its descriptor may be another file's
        ledger.write(STEP)
    assert len(read(tmp_path / "l")) == 1
