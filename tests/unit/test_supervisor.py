"""What a node decides about a run, and what it hears of the other nodes and of the kernel."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peft_dist.run import job_events
from peft_dist.run.directory import RunDir
from peft_dist.run.restart_policy import Ending, Kind
from peft_dist.slurm import failed_nodes, memory_kills
from peft_dist.slurm.failed_nodes import FailedNodes
from tests.processes import ROOT
from tests.unit.run_folders import make_run, submitted


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(make_run(tmp_path / "run"))


def decided(run: RunDir, restart: int, step: int, reason: str = "node1 crashed") -> None:
    event = {"event": "decided", "job": "7", "restart": restart, "step": step, "reason": reason}
    job_events.record(run.path, event | {"decision": "again"})


def look_back(run: RunDir, why: str, *, restart: int = 0) -> str:
    """Have the batch host decide of a start that is over; return the decision."""
    logs = run.logs / f"7-{restart}"
    logs.mkdir(exist_ok=True)
    job_events.record(run.path, {"event": "started", "job": "7", "restart": restart})
    done = subprocess.run(
        [sys.executable, "-m", "peft_dist.slurm.supervisor", "--run-dir", str(run.path),
         "--max-starts", "100", "--max-starts-without-progress", "5", "--no-preflight",
         "--after", why, "--srun-code", "137", "--", "false"],
        env={
            **os.environ, "PYTHONPATH": str(ROOT), "SLURM_NODEID": "0", "SLURM_JOB_ID": "7",
            "SLURM_RESTART_COUNT": str(restart), "PEFT_DIST_HOSTS": "node1,node2",
            "PEFT_DIST_PORT": "20120", "PEFT_DIST_LOGS": str(logs), "PEFT_DIST_NONCE": "ab",
        },
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    told = (logs / "decision").read_text(encoding="utf-8").strip()
    assert done.stdout.strip() == f"peft-dist: {told}", done.stderr
    return told


def test_starts_that_left_no_decision_are_tried_three_times(run: RunDir) -> None:
    for restart in (0, 1):
        told = look_back(run, "ended", restart=restart)
        assert told.startswith("again srun ended with code 137 before the run; see ")
    told = look_back(run, "ended", restart=2)
    assert told.startswith("stop 3 starts in a row ended without a decision; last: srun ended")
    assert [event["kind"] for event in job_events.events(run.path)[1::2]] == ["no decision"] * 3


@pytest.mark.parametrize("by", ["scancel", "peft-dist cancel"])
def test_a_job_that_was_cancelled_is_not_started_again(run: RunDir, by: str) -> None:
    if by == "peft-dist cancel":
        (run.path / "slurm").mkdir()
        (run.path / "slurm" / "cancelled").touch()
    why = "cancelled" if by == "scancel" else "ended"
    assert look_back(run, why) == "cancelled cancelled by its user"


def test_a_run_that_has_finished_is_done_however_its_job_ended(run: RunDir) -> None:
    run.result.write_text("{}", encoding="utf-8")
    assert look_back(run, "cancelled") == "done"


def test_what_a_start_says_after_the_next_one_has_begun_is_not_heard(run: RunDir) -> None:
    submitted(run.path, "7", restarts=1)
    before = job_events.events(run.path)
    decided(run, 0, 5, "from a node that was given up")
    job_events.record(run.path, {"event": "ended", "job": "7", "restart": 0, "decision": "stop"})
    assert job_events.events(run.path) == before
    decided(run, 1, 5)
    assert len(job_events.events(run.path)) == len(before) + 1


def test_a_job_beside_the_newest_one_is_known_until_it_says_that_it_ended(run: RunDir) -> None:
    submitted(run.path, "7")
    submitted(run.path, "8")
    assert job_events.others(run.path) == ["7"]
    job_events.record(run.path, {"event": "ended", "job": "7", "restart": 0, "decision": "done"})
    assert job_events.others(run.path) == []


def test_a_node_sees_after_a_while_that_another_one_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failed_nodes, "GRACE_S", 0.3)
    monkeypatch.setattr(failed_nodes, "LOOK_EVERY_S", 0.0)
    ours, other = (FailedNodes(tmp_path, name=name, nonce="ab") for name in ("node1", "node2"))
    FailedNodes(tmp_path, name="node3", nonce="of another try").add_own(Ending(Kind.CRASHED))
    assert not ours.have_one()
    other.add_own(Ending(Kind.CRASHED, "node2 crashed"))
    assert not ours.have_one()
    time.sleep(0.4)
    assert ours.have_one()
    assert ours.ending == Ending(Kind.NODE_FAILED, "node2 crashed")
    other.add_own(Ending(Kind.OUT_OF_MEMORY, "node2 ran out"))
    assert ours.have_one()
    assert ours.ending == Ending(Kind.OUT_OF_MEMORY, "node2 ran out")


@pytest.mark.parametrize(
    ("own", "file", "text"),
    [
        ("0::/slurm/job_7/step_0", "slurm/job_7/step_0/memory.events", "oom 3\noom_kill 2\n"),
        (
            "9:name=systemd:/x\n4:memory:/slurm/uid_0/job_7\n0::/x",
            "memory/slurm/uid_0/job_7/memory.oom_control",
            "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
        ),
        # The hierarchy is mounted from a part of it.
        ("4:cpu,memory:/host/slurm/job_7", "memory/slurm/job_7/memory.oom_control", "oom_kill 2\n"),
    ],
)
def test_kills_for_memory_are_counted_in_both_versions_of_cgroups(
    tmp_path: Path, own: str, file: str, text: str
) -> None:
    (tmp_path / "cgroup").write_text(own)
    assert memory_kills.kills(tmp_path, tmp_path / "cgroup") == 0
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(text)
    assert memory_kills.kills(tmp_path, tmp_path / "cgroup") == 2
