"""The ledger and the terminal as views of one run."""

import contextlib
import errno
import fcntl
import gc
import io
import json
import os
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from peft_dist.common.errors import RunDirError, TrainingError
from peft_dist.ledger.events import (
    CheckpointEvent,
    EndEvent,
    EvaluationEvent,
    LedgerEvent,
    RollbackEvent,
    SavedEvent,
    SaveFailedEvent,
    SkippedEvent,
    StartEvent,
    StepEvent,
)
from peft_dist.ledger.writer import LedgerWriter
from peft_dist.tracking.terminal import PLAIN_LINE_EVERY_S, Terminal
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


def test_what_compares_answers_shows_margin_and_accuracy() -> None:
    stream = io.StringIO()
    terminal = Terminal(2, stream)
    rewards = {"reward_margin": 0.25, "reward_accuracy": 0.75}
    terminal.write(STEP.model_copy(update=rewards))
    terminal.write(EVALUATION.model_copy(update={"eval_reward_margin": 0.5}))
    first, second = stream.getvalue().splitlines()
    assert first == "step 1/2  loss 2.5000  margin 0.250  accuracy 0.75  1,234 tok/s"
    assert second == "step 1  held-out loss 1.2500  accuracy 0.500  margin 0.500"


def test_a_pipe_gets_plain_lines_without_control_characters() -> None:
    stream = io.StringIO()
    terminal = Terminal(2, stream)
    terminal.write(STEP)
    terminal.write(EVALUATION)
    terminal.write(step(2))
    terminal.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 1/2  loss 2.5000  1,234 tok/s"
    assert lines[1] == "step 1  held-out loss 1.2500  accuracy 0.500"
    assert lines[2].startswith("step 2/2  loss 2.5000  1,234 tok/s")
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_a_terminal_gets_a_bar_with_step_loss_speed_and_time_left() -> None:
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with os.fdopen(follower, "w", encoding="utf-8") as stream:
        terminal = Terminal(2, stream)
        terminal.write(STEP)
        terminal.write(step(2))
        terminal.close()
    shown = b""
    with contextlib.suppress(OSError):  # what is read of a terminal without its other end
        while part := os.read(leader, 65536):
            shown += part
    os.close(leader)
    last = shown.decode().replace("\n", "\r").strip("\r").split("\r")[-1]
    assert last.startswith("step 2/2 |")
    assert "loss 2.5000  1,234 tok/s" in last
    assert last.rstrip().endswith("left")


def test_a_resumed_run_goes_on_from_its_step_at_its_own_speed() -> None:
    stream = io.StringIO()
    terminal = Terminal(1000, stream, first_step=900)
    terminal.write(step(901))
    terminal._begun -= 10.0  # as if the next 10 steps had taken a second each
    terminal._last_line -= 10.0
    terminal.write(step(911))
    terminal.close()
    first, second = stream.getvalue().splitlines()
    assert first == "step 901/1000  loss 2.5000  1,234 tok/s"
    assert second.endswith(" 01:29 left")


def test_a_resumed_bar_starts_at_its_step_and_follows_a_rollback() -> None:
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with os.fdopen(follower, "w", encoding="utf-8") as stream:
        terminal = Terminal(1000, stream, first_step=900)
        terminal.write(step(901))
        terminal.write(RollbackEvent(step=902, reason="loss nan"))
        terminal.write(step(851))
        terminal.close()
    shown = b""
    with contextlib.suppress(OSError):
        while part := os.read(leader, 65536):
            shown += part
    os.close(leader)
    assert b"step 900/1000 |" in shown
    assert b"step 902  rolled back: loss nan" in shown
    assert shown.decode().replace("\n", "\r").strip("\r").split("\r")[-1].startswith("step 851/")


def test_a_pipe_gets_a_line_every_few_seconds_and_one_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    stream = io.StringIO()
    terminal = Terminal(100, stream)
    for number in range(1, 101):  # a second each
        now_s += 1.0
        terminal.write(step(number, loss=100.0 - number))
    terminal.close()
    shown = [line.split()[:4] for line in stream.getvalue().splitlines()]
    steps = [1, *range(1 + int(PLAIN_LINE_EVERY_S), 101, int(PLAIN_LINE_EVERY_S)), 100]
    assert shown == [["step", f"{n}/100", "loss", f"{100.0 - n:.4f}"] for n in steps]


def test_a_closed_ledger_takes_nothing_more(tmp_path: Path) -> None:
    ledger = LedgerWriter(tmp_path / "l")
    ledger.write(STEP)
    ledger.close()
    with pytest.raises(AssertionError):  # by now its descriptor may be another file's
        ledger.write(STEP)
    assert len(read(tmp_path / "l")) == 1


def test_mishaps_get_a_line_and_bookkeeping_gets_none() -> None:
    stream = io.StringIO()
    terminal = Terminal(9, stream)
    for event in (StartEvent, CheckpointEvent, SavedEvent, EndEvent):
        terminal.write(event(step=4))
    for mishap in (SkippedEvent, RollbackEvent, SaveFailedEvent):
        terminal.write(mishap(step=5, reason="it rained"))
    assert stream.getvalue().splitlines() == [
        "step 5  skipped: it rained",
        "step 5  rolled back: it rained",
        "step 5  save failed: it rained",
    ]


SHOW = (
    "import json, sys\n"
    "from peft_dist.ledger.events import from_fields\n"
    "from peft_dist.tracking.terminal import Terminal\n"
    "terminal = Terminal(100, first_step=0)\n"
    "for step in range(1, 101):\n"
    "    terminal.write(from_fields(json.loads(sys.argv[1]) | {'step': step}))\n"
    "terminal.close()\n"
    "print('trained', file=sys.stderr)\n"
)


@pytest.mark.parametrize("broken", ["full disk", "broken pipe"])
def test_a_stream_that_breaks_ends_neither_training_nor_its_exit_code(
    tmp_path: Path, broken: str
) -> None:
    if broken == "full disk":
        out = os.open("/dev/full", os.O_WRONLY)
    else:
        unread, out = os.pipe()
        os.close(unread)
    done = subprocess.run(
        [sys.executable, "-c", SHOW, json.dumps(EVALUATION.fields())],
        # An unbuffered stream would hold nothing back that could fail at the end.
        env=environment(tmp_path, PYTHONUNBUFFERED=""), stdout=out, stderr=subprocess.PIPE,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    os.close(out)
    assert done.returncode == 0, done.stderr
    warning, trained = done.stderr.splitlines()
    assert warning.startswith("progress is no longer shown: ")
    assert trained == "trained"


def test_a_bar_whose_terminal_breaks_does_not_end_training(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    late: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", late.append)

    class Breaking(io.StringIO):
        broken = False

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            if self.broken:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(text)

    stream = Breaking()
    terminal = Terminal(100, stream)
    stream.broken = True
    for number in range(1, 4):
        terminal.write(EVALUATION.model_copy(update={"step": number}))
        terminal.write(step(number))
    terminal.close()
    del terminal
    gc.collect()  # a bar that is not closed shows itself once more
    assert late == []
    assert caplog.text.count("progress is no longer shown: No space left on device") == 1
