"""What people see of a run: lines, bars and waits, on terminals of any kind and on pipes."""

import errno
import fcntl
import io
import logging
import os
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from peft_dist.common import logs
from peft_dist.common import screen as screens
from peft_dist.common.env import FAILURES, VERBOSITY
from peft_dist.common.screen import PLAIN_LINE_EVERY_S, Screen
from peft_dist.ledger.events import (
    CheckpointEvent,
    EndEvent,
    EvaluationEvent,
    RollbackEvent,
    SavedEvent,
    SkippedEvent,
    StartEvent,
    StepEvent,
)
from peft_dist.tracking.terminal import Terminal
from tests.processes import environment

EVALUATION = EvaluationEvent(step=1, eval_loss=1.25, eval_accuracy=0.5, eval_seconds=3.0)


def step(number: int, *, loss: float = 2.5, tokens_per_s: float = 320.0) -> StepEvent:
    """Return a step of 320 tokens."""
    return StepEvent(
        step=number, lr=1e-3, tokens=320, rows=16, loss=loss, grad_norm=1.0,
        tokens_per_s=tokens_per_s, peak_memory_bytes=10**9,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "peft_dist")


class Pty:
    """A terminal of some width, and what was drawn on it."""

    def __init__(self, columns: int) -> None:
        """Open it."""
        self._leader, follower = os.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream = os.fdopen(follower, "w", encoding="utf-8")
        self._read = b""
        self._reader = threading.Thread(target=self._drain)
        self._reader.start()

    def _drain(self) -> None:
        with suppress(OSError):  # what is read of a terminal without its other end
            while part := os.read(self._leader, 65536):
                self._read += part

    def close(self) -> str:
        """Return all that it was sent."""
        self.stream.close()
        self._reader.join()
        os.close(self._leader)
        return self._read.decode()


@contextmanager
def terminal(columns: int, total: int, first: int = 0) -> Iterator[tuple[Screen, Terminal, Pty]]:
    """Yield a run's progress on a terminal of so many columns."""
    pty = Pty(columns)
    screen = Screen(pty.stream)
    yield screen, Terminal(total, screen, first_step=first), pty


def drawn(text: str) -> list[str]:
    """Return the lines that were drawn, one for each time that they were, without colours."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return [line for line in re.split(r"[\r\n]+|\x1b\[[0-9]*[A-Z]", plain) if line.strip()]


@pytest.mark.parametrize("columns", [100, 40, 0])
def test_a_terminal_gets_a_bar_with_step_loss_speed_and_time_left_whatever_its_width(
    columns: int,
) -> None:
    with terminal(columns, 4) as (screen, progress, pty):
        for number in (1, 2, 3):
            progress.write(step(number))
            assert screen._progress is not None
            screen._progress.refresh()
        progress.close()
    text = pty.close()
    last = drawn(text)[-1]
    assert last.startswith("step 3/4"), text
    if columns != 40:
        assert "loss 2.5000  320 tok/s  00:01 left" in last
    assert max(map(len, drawn(text))) <= (columns or 80)


def test_a_line_never_shares_its_line_with_a_bar() -> None:
    with terminal(100, 4) as (screen, progress, pty):
        progress.write(step(1))
        screen.line("a message")
        bar = screen.bar("evaluating", total=30, unit="rows")
        screen.line("another")
        bar.end()
        progress.close()
        screen.line("the end")
    lines = drawn(pty.close())
    assert [line.strip() for line in lines if "message" in line] == ["a message"]
    assert [line.strip() for line in lines if "another" in line] == ["another"]
    assert lines[-1] == "the end"


def test_the_cursor_is_never_hidden_for_a_killed_process_could_not_show_it() -> None:
    with terminal(100, 4) as (_, progress, pty):
        progress.write(step(1))
        progress.close()
    assert "\x1b[?25l" not in pty.close()


def test_the_time_left_is_told_by_steps_and_not_by_what_is_between_them() -> None:
    with terminal(120, 100) as (screen, progress, pty):
        progress.write(step(1, tokens_per_s=1.0))  # 320 s: it pays for all initialisation
        progress._last_line -= 3600.0  # as if an evaluation had taken an hour
        progress.write(step(2))
        assert screen._bars[0].detail.endswith("01:38 left"), "98 steps of 1 s"
        progress.close()
    pty.close()


def test_a_resumed_bar_starts_at_its_step_and_follows_a_rollback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with terminal(100, 1000, 900) as (screen, progress, pty):
        progress.write(step(901))
        progress.write(RollbackEvent(step=902, reason="loss nan"))
        progress.write(step(851))
        assert (screen._bars[0].done, screen._bars[0].text) == (851, "step 851/1000")
        progress.close()
    assert drawn(pty.close())[0].startswith("step 900/1000")
    assert "step 902  rolled back: loss nan" in caplog.messages


def test_after_the_last_step_the_bar_makes_room_for_what_is_waited_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with terminal(100, 2) as (screen, progress, pty):
        progress.write(step(1))
        progress.write(step(2))
        assert not screen._bars
    pty.close()
    assert caplog.messages == ["step 2/2  loss 2.5000  320 tok/s"]


def test_a_pipe_gets_plain_lines_without_control_characters(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stream = io.StringIO()
    progress = Terminal(2, Screen(stream))
    progress.write(step(1))
    progress.write(EVALUATION)
    progress.write(step(2))
    progress.close()
    assert stream.getvalue() == ""
    assert caplog.messages == [
        "step 1/2  loss 2.5000  320 tok/s",
        "step 1  held-out loss 1.2500  accuracy 0.500  3.0 s",
        "step 2/2  loss 2.5000  320 tok/s",
    ]


def test_a_pipe_gets_a_line_every_few_seconds_and_one_at_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now_s = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    monkeypatch.setattr(Screen, "_tick", lambda self: None)
    progress = Terminal(100, Screen(io.StringIO()))
    for number in range(1, 101):  # a second each
        now_s += 1.0
        progress.write(step(number, loss=100.0 - number))
    progress.close()
    shown = [line.split()[:4] for line in caplog.messages]
    steps = [1, *range(1 + int(PLAIN_LINE_EVERY_S), 101, int(PLAIN_LINE_EVERY_S)), 100]
    assert shown == [["step", f"{n}/100", "loss", f"{100.0 - n:.4f}"] for n in steps]


def test_what_compares_answers_shows_margin_and_accuracy(
    caplog: pytest.LogCaptureFixture,
) -> None:
    progress = Terminal(2, Screen(io.StringIO()))
    rewards = {"reward_margin": 0.25, "reward_accuracy": 0.75}
    progress.write(step(1).model_copy(update=rewards))
    progress.write(EVALUATION.model_copy(update={"eval_reward_margin": 0.5}))
    assert caplog.messages == [
        "step 1/2  loss 2.5000  margin 0.250  accuracy 0.75  320 tok/s",
        "step 1  held-out loss 1.2500  accuracy 0.500  margin 0.500  3.0 s",
    ]


def test_on_a_pipe_a_wait_is_told_once_it_lasts_and_a_short_one_is_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    screen = Screen(io.StringIO())
    screen.bar("short").end()
    monkeypatch.setattr(screens, "SHORT_WAIT_S", 0.0)
    bar = screen.bar("evaluating", total=30, unit="rows")
    bar.advance(12)
    deadline = time.monotonic() + 30
    while not caplog.messages and time.monotonic() < deadline:
        time.sleep(0.05)
    bar.end()
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("evaluating  12/30 rows  ")


def test_where_nobody_wants_progress_there_is_no_bar() -> None:
    pty = Pty(100)
    screen = Screen(pty.stream)
    screen.is_quiet = True
    progress = Terminal(4, screen)
    progress.write(step(1))
    progress.close()
    assert pty.close() == ""


def test_mishaps_get_a_line_and_bookkeeping_gets_none(caplog: pytest.LogCaptureFixture) -> None:
    progress = Terminal(9, Screen(io.StringIO()))
    for event in (StartEvent, CheckpointEvent, SavedEvent, EndEvent):
        progress.write(event(step=4))
    for mishap in (SkippedEvent, RollbackEvent):
        progress.write(mishap(step=5, reason="it rained"))
    progress.close()
    assert caplog.messages == ["step 5  skipped: it rained", "step 5  rolled back: it rained"]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


SHOW = """
import sys
from peft_dist.common.screen import screen
for number in range(100):
    screen().line(f"line {number}")
print("trained", file=sys.stderr)
"""


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
        [sys.executable, "-c", SHOW],
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
    monkeypatch.setattr(threading, "excepthook", late.append)

    class Breaking(io.StringIO):
        broken = False

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            if self.broken:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(text)

    stream = Breaking()
    screen = Screen(stream)
    progress = Terminal(100, screen)
    stream.broken = True
    for number in range(1, 4):
        progress.write(step(number))
        screen.line("still here")
    progress.close()
    assert late == []
    assert caplog.text.count("progress is no longer shown: No space left on device") == 1


LOG = """
import logging, warnings
from peft_dist.common import logs
logs.begin({rank})
log = logging.getLogger("peft_dist.some")
log.debug("detail")
log.info("stage")
log.log(logs.NOTICE, "notice")
log.warning("trouble")
logging.getLogger("library").info("chatter")
warnings.warn("a library's")
"""


def said(tmp_path: Path, rank: int | None, **environ: str) -> tuple[list[str], list[str]]:
    """Return the last words of the lines on standard output and error of a process that logs."""
    done = subprocess.run(
        [sys.executable, "-c", LOG.format(rank=rank)], env=environment(tmp_path, **environ),
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    by = r"" if rank is None else rf" \[rank {rank}\]"
    for line in (done.stdout + done.stderr).splitlines():
        assert re.match(rf"\d\d:\d\d:\d\d{by} |  warnings.warn", line), line
    words = ("detail", "stage", "notice", "trouble", "chatter", "library's")
    return (
        [word for word in words if word in done.stdout],
        [word for word in words if word in done.stderr],
    )


def test_one_logger_speaks_for_commands_and_ranks_with_time_and_rank(tmp_path: Path) -> None:
    seen = ["stage", "notice", "trouble", "library's"]
    assert said(tmp_path, None) == (seen, [])
    assert said(tmp_path, 0) == (seen, seen[2:]), "by hand: what is wrong stands on stderr too"
    assert said(tmp_path, 0, **{FAILURES: str(tmp_path)}) == (seen, seen), "a launcher's log"
    assert said(tmp_path, 1) == ([], seen[2:]), "of what goes well rank 0 tells for all"


def test_quiet_and_verbose_decide_how_much_is_said(tmp_path: Path) -> None:
    quiet, verbose = {VERBOSITY: "quiet"}, {VERBOSITY: "verbose"}
    assert said(tmp_path, 0, **quiet)[0] == ["notice", "trouble", "library's"]
    assert said(tmp_path, 0, **verbose)[0][:2] == ["detail", "stage"]
    assert said(tmp_path, 1, **verbose, **{FAILURES: str(tmp_path)})[1][:2] == ["detail", "stage"]
    assert logs.LEVELS["normal"] == logging.INFO


def test_a_block_that_is_waited_for_is_logged_with_what_came_of_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = logging.getLogger("peft_dist.test")
    with screens.stage("reading the rows", log) as told:
        told.append("rows: 3")
    with suppress(ValueError), screens.stage("failing", log) as told:
        raise ValueError
    (message,) = caplog.messages
    assert re.fullmatch(r"rows: 3  \d+\.\d s", message)


def test_who_draws_may_log_while_another_thread_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    screen = Screen(stream)
    monkeypatch.setattr(logs, "screen", lambda: screen)
    handler = logs._ScreenHandler()
    record = logging.LogRecord("a", logging.INFO, "x.py", 1, "a line", (), None)
    drawn_and_logged = threading.Event()

    def draw_and_log() -> None:
        with screen._lock:
            other.start()
            time.sleep(0.2)  # the other one waits for the screen by now
            handler.handle(record)
        drawn_and_logged.set()

    other = threading.Thread(target=handler.handle, args=(record,), daemon=True)
    threading.Thread(target=draw_and_log, daemon=True).start()
    assert drawn_and_logged.wait(20), "each waits for what the other holds"
    other.join(20)
    assert stream.getvalue() == "a line\na line\n"
