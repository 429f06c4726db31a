"""What a person is told who stops a run: at once, what is done next; at the end, what is lost."""

import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from peft_dist.common.errors import EXIT_INTERRUPTED
from peft_dist.config import Recipe, load_recipe
from peft_dist.launch import run_here
from peft_dist.ledger.events import StepEvent
from peft_dist.ledger.writer import LedgerWriter
from peft_dist.run.attempt_records import latest, record_path, write_json
from peft_dist.run.directory import RunDir
from peft_dist.status.run_state import INTERRUPTED, read_run, view
from peft_dist.tracking.attempt import stop_notice
from tests.unit.test_signals import line, start

AGAIN = "; Ctrl-C again stops without saving"


@pytest.mark.parametrize(
    ("phase", "step", "told"),
    [
        ("step", 4, f"finishing step 4, then saving{AGAIN}"),
        ("", 0, f"finishing step 1, then saving{AGAIN}"),
        ("evaluation", 0, "leaving the evaluation; no step is trained yet, so there is nothing to"),
        ("evaluation", 4, f"leaving the evaluation, then saving step 4{AGAIN}"),
        ("save", 4, "step 4 is being saved; the run ends when that is done"),
        ("end", 9, "the last step is done; the adapter is saved, and the run ends"),
    ],
)
def test_what_follows_a_stop_depends_on_what_is_done(phase: str, step: int, told: str) -> None:
    assert stop_notice(phase, step, AGAIN).startswith(told)


def test_the_first_signal_is_told_at_once_while_the_main_thread_works(tmp_path: Path) -> None:
    code = """
requests.on_request = lambda name: say(f"told of {name}")
requests.begin_training()
say("ready")
while requests.count < 2:  # a step that takes its time
    time.sleep(0.01)
"""
    process = start(code, tmp_path / "note")
    assert line(process) == "ready"
    process.send_signal(signal.SIGINT)
    assert line(process) == "told of SIGINT", "before the step has ended"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "", "a second one is nothing new"


def lost(tmp_path: Path, steps: int, saved: int) -> tuple[RunDir, str]:
    """Return a run whose newest attempt has trained and saved so much, and what it has lost."""
    recipe = Recipe.model_validate({"model": {"name": "m"}, "data": {"train": "d"}})
    run = RunDir.create(tmp_path / "run", recipe)
    run.attempts.mkdir()
    write_json(record_path(run.attempts, 2), {"attempt": 2, "steps": 40})
    ledger = LedgerWriter(run.ledger, attempt=1)
    ledger.write(StepEvent(step=30, loss=1.0, tokens=1, tokens_per_s=1.0))
    ledger.close()
    ledger = LedgerWriter(run.ledger, attempt=2)
    for step in range(1, steps + 1):
        ledger.write(StepEvent(step=step, loss=1.0, tokens=1, tokens_per_s=1.0))
    ledger.close()
    if saved:
        (run.checkpoints / f"step-{saved:08d}").mkdir(parents=True)
    return run, run_here._lost_steps(run)


@pytest.mark.parametrize(
    ("steps", "saved", "told"),
    [
        (3, 0, "steps 1-3 are lost"),
        (3, 2, "step 3 is lost"),
        (3, 3, ""),
        (0, 0, ""),  # those of the attempt before it were lost with that
    ],
)
def test_what_is_lost_is_told_in_steps(tmp_path: Path, steps: int, saved: int, told: str) -> None:
    assert lost(tmp_path, steps, saved)[1] == told


def test_a_run_that_was_stopped_without_saving_is_interrupted_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The holder takes a while to go; until then its attempt looks as if it had crashed."""
    run, _ = lost(tmp_path, 0, 0)
    record_path(run.attempts, 2).unlink()
    worker = """
import sys, time
from pathlib import Path
from peft_dist.run.directory import RunDir
from peft_dist.run.lease import Attempt
from peft_dist.ledger.events import StepEvent
from peft_dist.ledger.writer import LedgerWriter
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
run = RunDir(Path(sys.argv[1]))
attempt = Attempt.begin(run.attempts)
ledger = LedgerWriter(run.ledger, attempt=attempt.number)
for step in (1, 2, 3):
    ledger.write(StepEvent(step=step, loss=1.0, tokens=1, tokens_per_s=1.0))
(run.path / "ready").touch()
time.sleep(120)
"""
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
    (run.path / "ledger.jsonl").unlink()
    recipe = load_recipe(run.recipe, check_paths=False)
    started = run_here.prepare(recipe, run.path)
    command = [sys.executable, "-c", code, worker, str(run.path)]
    started = replace(started, command=command)

    def press_twice() -> None:
        while not (run.path / "ready").exists():
            time.sleep(0.05)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    presses = threading.Thread(target=press_twice)
    presses.start()
    assert run_here.train_here(started) == EXIT_INTERRUPTED
    presses.join()
    told = capsys.readouterr().err
    assert "stopped by SIGINT without saving; steps 1-3 are lost; `peft-dist resume" in told
    assert "begins anew: there is no checkpoint" in told
    assert (latest(run.attempts) or {})["outcome"] == "interrupted"
    seen = view(read_run(run.path), {}, name="run", now=time.time())
    assert (seen.state, seen.cause) == (INTERRUPTED, "steps 1-3 are lost")
