"""Tasks that Slurm starts for each rank: those of a node begin when its first one lets them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT
from tests.unit.run_folders import make_run, submitted


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = make_run(tmp_path / "run")
    submitted(run, "7")
    (run / "logs" / "7-0").mkdir()
    return run


def task(run: Path, place: int) -> subprocess.CompletedProcess[str]:
    """Run a task of node1 to its end; its launcher notes which GPU it sees, and fails."""
    launcher = ["bash", "-c", f"echo $CUDA_VISIBLE_DEVICES >{run}/seen-{place}; exit 1"]
    logs = run / "logs" / "7-0"
    return subprocess.run(
        [sys.executable, "-m", "peft_dist.slurm.rank_supervisor", "--run-dir", str(run),
         "--max-starts", "9", "--max-starts-without-progress", "5", "--no-preflight",
         "--per-rank", "--", *launcher],
        env={
            **os.environ, "PYTHONPATH": str(ROOT), "SLURM_NODEID": "0", "SLURM_JOB_ID": "7",
            "SLURM_LOCALID": str(place), "PEFT_DIST_HOSTS": "node1", "PEFT_DIST_PORT": "20120",
            "PEFT_DIST_LOGS": str(logs), "PEFT_DIST_NONCE": "ab", "CUDA_VISIBLE_DEVICES": "4,5",
        },
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def test_the_first_task_lets_the_others_begin_and_decides(run: Path) -> None:
    assert task(run, 0).returncode == 1
    assert (run / "seen-0").read_text(encoding="utf-8") == "4\n"
    logs = run / "logs" / "7-0"
    decision = (logs / "decision").read_text(encoding="utf-8")
    assert decision.startswith("again node1 crashed")
    assert task(run, 1).returncode == 0  # what counts is the decision
    assert (run / "seen-1").read_text(encoding="utf-8") == "5\n"
    assert (logs / "decision").read_text(encoding="utf-8") == decision
    assert sorted(path.name for path in logs.glob("*.failed")) == [
        "node1.1.ab.failed",
        "node1.ab.failed",
    ]


def test_where_the_head_has_decided_before_the_others_never_begin(run: Path) -> None:
    (run / "logs" / "7-0" / "decision").write_text("stop no rows\n", encoding="utf-8")
    assert task(run, 1).returncode == 0
    assert not (run / "seen-1").exists()
