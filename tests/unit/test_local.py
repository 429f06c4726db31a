"""Running a launcher: signals reach it, and nothing outlives it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peft_dist.errors import LaunchError
from peft_dist.launch.local import run_launcher

# A launcher like torchrun: its worker lives in a session of its own.
LAUNCHER = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
worker = subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True)
open(sys.argv[2], "w").write(str(worker.pid))
if len(sys.argv) > 3:
    signal.signal(signal.SIGTERM, lambda *_: (worker.terminate(), worker.wait(), sys.exit(9)))
    time.sleep(60)
time.sleep(0.5)  # let a stubborn worker set its handler
"""
SLEEPER = "import time; time.sleep(60)"
STUBBORN = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return False


def has_ended(pid: int) -> bool:
    """A killed process loses its memory, and with it its environment, before it is a zombie."""
    deadline = time.monotonic() + 2
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


def test_the_exit_code_comes_back_and_errors_go_to_the_log(tmp_path: Path) -> None:
    log = tmp_path / "launcher.log"
    code = "import sys; print('oh', file=sys.stderr); sys.exit(7)"
    ended = run_launcher([sys.executable, "-c", code], environment={}, error_log=log)
    assert (ended.code, ended.signal_name) == (7, None)
    assert log.read_text(encoding="utf-8") == "oh\n"


def test_the_environment_is_added_and_files_are_private(tmp_path: Path) -> None:
    code = "import os; assert os.environ['A'] == 'b c' and 'PATH' in os.environ; open('f', 'w')"
    ended = run_launcher(
        [sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r}); {code}"],
        environment={"A": "b c"},
        error_log=tmp_path / "log",
    )
    assert ended.code == 0
    assert (tmp_path / "f").stat().st_mode & 0o077 == 0


def test_a_command_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="/absent/python: cannot be started"):
        run_launcher(["/absent/python"], environment={}, error_log=tmp_path / "log")


@pytest.mark.parametrize("worker", [SLEEPER, STUBBORN])
def test_workers_of_a_launcher_that_died_are_ended(tmp_path: Path, worker: str) -> None:
    pid_file = tmp_path / "pid"
    started = time.monotonic()
    ended = run_launcher(
        [sys.executable, "-c", LAUNCHER, worker, str(pid_file)],
        environment={},
        error_log=tmp_path / "log",
    )
    assert ended.code == 0
    assert has_ended(int(pid_file.read_text(encoding="utf-8")))
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_forwarded_once_and_ends_everything(
    tmp_path: Path, number: signal.Signals
) -> None:
    pid_file = tmp_path / "pid"
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from peft_dist.launch.local import run_launcher\n"
        "ended = run_launcher(sys.argv[2:], environment={}, error_log=Path(sys.argv[1]))\n"
        "print(ended.code, ended.signal_name)\n"
    )
    ours = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "log"), sys.executable, "-c", LAUNCHER,
         SLEEPER, str(pid_file), "stay"],
        stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 20
    while not (pid_file.exists() and pid_file.read_text(encoding="utf-8")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)  # let the launcher set its handler
    os.kill(ours.pid, number)
    output, _ = ours.communicate(timeout=30)
    assert output.split() == [str(128 + number), number.name]
    assert has_ended(int(pid_file.read_text(encoding="utf-8")))
