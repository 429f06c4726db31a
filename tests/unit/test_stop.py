"""`peft-dist stop` where there is nothing that it may stop: one line, and exit code 2."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peft_dist.cli.main import main
from peft_dist.common.process_identity import is_alive, this_process
from tests.unit.run_folders import lease, make_run

WAITS = "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint('ready', flush=True)\n"


@pytest.fixture
def other() -> Iterator[dict[str, Any]]:
    """Return the record of a living process that takes no notice of SIGTERM."""
    code = WAITS + "time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        ticks = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
        yield {**this_process(), "pid": process.pid, "start_ticks": int(ticks)}
        process.kill()


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the one line of a stop that is refused."""
    assert main(["stop", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line.removeprefix("peft-dist: error: ")


def test_a_run_that_nothing_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    idle = f"{run}: is trained by no process of this machine; nothing is left to stop"
    assert refused(capsys, str(run)) == f"{idle}; `peft-dist resume {run}` goes on with it"
    lease(run, here=True, start_ticks=1)  # a crash
    assert refused(capsys, str(run)) == f"{idle}; `peft-dist resume {run}` goes on with it"
    lease(run, outcome="done")
    (run / "result.json").write_text("{}")
    assert refused(capsys, str(run)) == idle
    assert "holds no run" in refused(capsys, str(tmp_path))


def test_a_run_of_another_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    lease(run)
    assert refused(capsys, str(run)) == (
        f"{run}: process 4242 on host node1 holds it, which cannot be seen here; "
        f"give `peft-dist stop {run}` on host node1"
    )


@pytest.mark.parametrize("on_this_host", [True, False])
def test_a_run_of_a_slurm_job(
    on_this_host: bool,
    tmp_path: Path,
    other: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = make_run(tmp_path / "run")
    (run / "slurm").mkdir()
    remedy = f"use `peft-dist cancel {run}`"
    assert refused(capsys, str(run)).endswith(f"no process of this machine; {remedy}")
    lease(run, **{**(other if on_this_host else {}), "slurm_job_id": "17"})
    assert refused(capsys, str(run)) == f"{run}: is trained by Slurm job 17; {remedy}"


def test_what_does_not_end_in_time(
    tmp_path: Path, other: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    lease(run, **other)
    line = refused(capsys, str(run), "--wait-s", "1")
    assert f"process {other['pid']} has SIGTERM but has not ended within 1 s" in line
    assert is_alive(other)
    os.kill(other["pid"], signal.SIGKILL)
