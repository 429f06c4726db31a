"""The ledger, the terminal and W&B as views of one run."""

import contextlib
import fcntl
import io
import json
import os
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from peft_dist.config import Recipe
from peft_dist.errors import TrainingError
from peft_dist.tracking import Ledger, Record, Terminal
from tests.processes import environment

STEP: Record = {
    "event": "step", "step": 1, "time": 0.0, "lr": 1e-3, "tokens": 320, "rows": 16,
    "loss": 2.5, "grad_norm": 1.0, "tokens_per_s": 1234.0, "peak_memory_bytes": 10**9,
}  # fmt: skip
EVALUATION: Record = {
    "event": "evaluation", "step": 1, "time": 0.0,
    "eval_loss": 1.25, "eval_accuracy": 0.5, "eval_seconds": 3.0,
}  # fmt: skip


def recipe(**wandb: str) -> Recipe:
    raw = {"model": {"name": "m"}, "data": {"train": "d"}, "tracking": {"wandb": wandb}}
    return Recipe.model_validate(raw)


def test_every_record_is_a_line_as_soon_as_it_is_written(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.write(STEP)
    ledger.write(EVALUATION)
    lines = (tmp_path / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [STEP, EVALUATION]
    ledger.close()


def test_a_ledger_that_cannot_be_written_stops_the_run_in_one_line() -> None:
    ledger = Ledger(Path("/dev/full"))
    with pytest.raises(TrainingError, match="/dev/full: cannot be written: No space left"):
        for _ in range(10_000):
            ledger.write(STEP)


def test_a_pipe_gets_plain_lines_without_control_characters() -> None:
    stream = io.StringIO()
    terminal = Terminal(2, stream)
    terminal.write(STEP)
    terminal.write(EVALUATION)
    terminal.write(STEP | {"step": 2})
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
        terminal.write(STEP | {"step": 2})
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


def test_wandb_keeps_the_records_of_an_offline_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    from peft_dist.tracking.wandb import WandbTracker

    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker = WandbTracker(recipe(mode="offline"), tmp_path)
    tracker.write(STEP)
    tracker.write(EVALUATION)
    tracker.close()
    (kept,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = kept.read_bytes()
    for key in (b"train/step", b"train/loss", b"evaluation/eval_accuracy"):
        assert key in content


def test_wandb_without_its_server_is_one_warning_within_seconds(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    code = (
        "import json, sys, time; from pathlib import Path\n"
        "from peft_dist.config import Recipe\n"
        "from peft_dist.tracking.wandb import WandbTracker\n"
        "begun = time.monotonic()\n"
        "tracker = WandbTracker(Recipe.model_validate_json(sys.argv[1]), Path(sys.argv[2]))\n"
        "tracker.write({'event': 'step', 'step': 1, 'loss': 1.0})\n"
        "tracker.close()\n"
        "print(time.monotonic() - begun)\n"
    )
    settings = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    done = subprocess.run(
        [sys.executable, "-c", code, recipe(mode="online").model_dump_json(), str(tmp_path)],
        env=environment(tmp_path, WANDB_SILENT="true", **settings),
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("W&B is off for the rest of the run") == 1
    assert float(done.stdout) < 20
