"""Signals on a rank: recorded during training, prompt during setup, in real processes."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from peft_dist.worker.signals import STOP_SIGNALS

INSTALLED = """
import os, signal, sys, threading, time
from pathlib import Path
from peft_dist.worker.signals import install
requests = install()
def end_by_note():
    requests.end_setup_by(lambda name: Path(sys.argv[1]).write_text(name))
def say(text):
    print(text, flush=True)
"""
KNOWN = INSTALLED + "end_by_note()\n"
"""A rank that knows its run."""


def start(code: str, note: Path, before: str = KNOWN) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", before + code, str(note)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_in_training_is_recorded_and_nothing_else(
    tmp_path: Path, number: signal.Signals
) -> None:
    code = """
requests.begin_training()
assert requests.requested is None
say("ready")
while requests.requested is None:
    time.sleep(0.01)
say(requests.requested)
"""
    process = start(code, tmp_path / "note")
    assert line(process) == "ready"
    process.send_signal(number)
    output, errors = process.communicate(timeout=20)
    assert (process.returncode, output, errors) == (0, number.name + "\n", "")
    assert not (tmp_path / "note").exists()


def test_further_signals_are_only_counted(tmp_path: Path) -> None:
    code = """
requests.begin_training()
for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
    os.kill(os.getpid(), number)
say(f"{requests.requested} {requests.count}")
"""
    assert start(code, tmp_path / "note").communicate(timeout=20)[0] == "SIGUSR1 3\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_in_setup_ends_a_process_that_waits_for_peers(
    tmp_path: Path, number: signal.Signals
) -> None:
    code = """
import torch.distributed as dist
say("ready")
dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).wait(["absent"])
"""
    process = start(code, tmp_path / "note")
    assert line(process) == "ready"
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (75, "")
    assert (tmp_path / "note").read_text(encoding="utf-8") == number.name


def test_a_signal_before_the_run_is_known_ends_the_process_once_it_is(tmp_path: Path) -> None:
    code = """
say("ready")
while requests.requested is None:
    time.sleep(0.01)
time.sleep(0.2)
say("its run is known now")
end_by_note()
say("must not be reached")
"""
    process = start(code, tmp_path / "note", INSTALLED)
    assert line(process) == "ready"
    process.terminate()
    output, errors = process.communicate(timeout=20)
    assert (process.returncode, output, errors) == (75, "its run is known now\n", "")
    assert (tmp_path / "note").read_text(encoding="utf-8") == "SIGTERM"


def test_a_note_that_cannot_be_written_does_not_keep_the_process_alive(tmp_path: Path) -> None:
    process = start("say('ready'); time.sleep(60)", tmp_path / "absent" / "note")
    assert line(process) == "ready"
    process.terminate()
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 75
    assert "FileNotFoundError" in errors


def test_a_signal_recorded_before_training_begins_ends_as_in_setup(tmp_path: Path) -> None:
    code = """
requests._reader.close()  # the thread is out of the game
requests.requested = "SIGHUP"
requests.begin_training()
say("trained")
"""
    process = start(code, tmp_path / "note")
    assert process.communicate(timeout=20)[0] == ""
    assert process.returncode == 75
    assert (tmp_path / "note").read_text(encoding="utf-8") == "SIGHUP"


def test_a_signal_at_any_instant_is_either_a_stop_in_setup_or_recorded(tmp_path: Path) -> None:
    code = """
say("ready")
for _ in range(int(sys.stdin.readline())):
    pass
requests.begin_training()
while requests.requested is None:
    pass
say(requests.requested)
sys.exit(3)
"""
    seen = []
    for spin in (0, 10**3, 10**4, 10**5, 10**6, 3 * 10**6):
        note = tmp_path / str(spin)
        process = subprocess.Popen(
            [sys.executable, "-c", KNOWN + code, str(note)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert line(process) == "ready"
        assert process.stdin is not None
        process.stdin.write(f"{spin}\n")
        process.stdin.flush()
        process.terminate()
        output, _ = process.communicate(timeout=20)
        ends = {(75, "", True): "setup", (3, "SIGTERM\n", False): "training"}
        seen.append(ends[process.returncode, output, note.exists()])
    assert "setup" in seen


def test_a_storm_of_signals_prints_no_warning(tmp_path: Path) -> None:
    code = """
requests.begin_training()
requests._ending.acquire()  # the thread reads no further than one buffer
for _ in range(5000):
    os.kill(os.getpid(), signal.SIGUSR1)
say(requests.count)
"""
    process = start(code, tmp_path / "note")
    output, errors = process.communicate(timeout=60)
    assert (output, errors) == ("5000\n", "")


def test_under_nohup_sighup_stays_ignored(tmp_path: Path) -> None:
    code = """
requests.begin_training()
os.kill(os.getpid(), signal.SIGHUP)
os.kill(os.getpid(), signal.SIGTERM)
say(f"{requests.requested} {requests.count}")
"""
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + INSTALLED + code
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "note")],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    assert done.stdout == "SIGTERM 1\n"


def test_every_call_returns_the_same_record(tmp_path: Path) -> None:
    process = start("say(install() is requests)", tmp_path / "note")
    assert process.communicate(timeout=20)[0] == "True\n"
