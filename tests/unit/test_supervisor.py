"""What a node decides about a run, and what it hears of the other nodes and of the kernel."""

import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from peft_dist.run import job_events
from peft_dist.run.directory import RunDir
from peft_dist.run.restart_policy import Ending, Kind
from peft_dist.slurm import excluded_nodes, failed_nodes, memory_kills
from peft_dist.slurm.excluded_nodes import exclude
from peft_dist.slurm.failed_nodes import FailedNodes
from peft_dist.slurm.old_logs import pack_old_logs
from tests.processes import ROOT
from tests.unit.run_folders import make_run, submitted


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(make_run(tmp_path / "run"))


def decided_once(run: RunDir, restart: int, step: int, reason: str = "node1 crashed") -> None:
    event = {"event": "decided", "job": "7", "restart": restart, "step": step, "reason": reason}
    job_events.record(run.path, event | {"decision": "again"})


CANCELLED = "JobId=7 JobState=COMPLETING PreemptTime=None EndTime=2030-01-01T00:00:00"
UP = "node1 mixed\nnode2 allocated\n"


def look_back(
    run: RunDir,
    job: str = "",
    nodes: str = "",
    *,
    restart: int = 0,
    left_s: float = 1e6,
    decided: bool = False,
    **files: str,
) -> str:
    """Have the batch host decide of a start that is over; return the decision.

    Args:
        run: The run.
        job: What Slurm says of the job.
        nodes: What Slurm says of its nodes.
        restart: Which start it is.
        left_s: Seconds until its time limit.
        decided: Whether the decision that is there must stand.
        files: What nodes have left beside the logs: `node1_set_up_failed`.
    """
    logs = run.logs / f"7-{restart}"
    logs.mkdir(exist_ok=True)
    (logs / "job.txt").write_text(job, encoding="utf-8")
    (logs / "nodes.txt").write_text(nodes, encoding="utf-8")
    for name, text in files.items():
        node, _, what = name.partition("_")
        (logs / f"{node}.ab.{what.replace('_', '-')}").write_text(text + "\n", encoding="utf-8")
    (logs / "job-end").write_text(f"{time.time() + left_s:.0f}\n", encoding="utf-8")
    job_events.record(run.path, {"event": "started", "job": "7", "restart": restart})
    done = subprocess.run(
        [sys.executable, "-m", "peft_dist.slurm.supervisor", "--run-dir", str(run.path),
         "--max-starts", "100", "--max-starts-without-progress", "5", "--no-preflight",
         "--after", "137", "--", "false"],
        env={
            **os.environ, "PYTHONPATH": str(ROOT), "SLURM_NODEID": "0", "SLURM_JOB_ID": "7",
            "SLURM_RESTART_COUNT": str(restart), "PEFT_DIST_HOSTS": "node1,node2",
            "PEFT_DIST_PORT": "20120", "PEFT_DIST_LOGS": str(logs), "PEFT_DIST_NONCE": "ab",
        },
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    told = (logs / "decision").read_text(encoding="utf-8").strip()
    assert done.stdout.strip() == ("" if decided else f"peft-dist: {told}"), done.stderr
    return told


def test_starts_that_left_no_decision_are_tried_three_times(run: RunDir) -> None:
    for restart in (0, 1):
        told = look_back(run, restart=restart)
        assert told.startswith("again srun ended with code 137 before the run; see ")
    told = look_back(run, restart=2)
    assert told.startswith("stop 3 starts in a row ended without a decision; last: srun ended")
    assert [event["kind"] for event in job_events.events(run.path)[1::2]] == ["no decision"] * 3


@pytest.mark.parametrize("by", ["scancel", "peft-dist cancel"])
def test_a_job_that_was_cancelled_is_not_started_again(run: RunDir, by: str) -> None:
    if by == "peft-dist cancel":
        (run.path / "slurm").mkdir()
        (run.path / "slurm" / "cancelled").touch()
    told = look_back(run, *((CANCELLED, UP) if by == "scancel" else ()))
    assert told == "cancelled cancelled by its user"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "nodes", "left_s"),
    [
        (CANCELLED, "", 1e6),  # sinfo gave no answer
        (CANCELLED, "node1 mixed\n", 1e6),
        (CANCELLED, "node1 mixed\nnode2 down*\n", 1e6),
        (CANCELLED, "node1 mixed\nnode2 mixed*\n", 1e6),
        (CANCELLED, UP, -5),
        (CANCELLED.replace("Time=None", "Time=2026-01-01T00:00:00"), UP, 1e6),
        ("", UP, 1e6),
    ],
)
def test_what_may_be_a_lost_node_a_time_limit_or_a_preemption_is_no_cancelling(
    run: RunDir, job: str, nodes: str, left_s: float
) -> None:
    assert look_back(run, job, nodes, left_s=left_s).startswith("again ")


def test_a_decision_that_is_there_stands_unless_the_job_is_cancelled(run: RunDir) -> None:
    logs = run.logs / "7-0"
    logs.mkdir()
    (logs / "decision").write_text("again node1 crashed\n", encoding="utf-8")
    assert look_back(run, decided=True) == "again node1 crashed"
    assert look_back(run, CANCELLED, UP) == "cancelled cancelled by its user"


@pytest.mark.slow
def test_a_preemption_before_training_is_no_failure_however_often_it_comes(run: RunDir) -> None:
    preempted = "JobId=7 JobState=RUNNING PreemptTime=2026-01-01T00:00:00"
    for restart in range(3):
        told = look_back(run, restart=restart, node2_set_up_stopped="SIGTERM")
        assert told.startswith("again stopped by SIGTERM before it trained; goes on after step 0")
    for restart in range(3, 6):
        told = look_back(run, preempted, restart=restart)
        assert told.startswith("again stopped by its preemption before it trained")
    for restart in range(6, 8):
        assert "by its time limit" in look_back(run, restart=restart, left_s=5)
    assert look_back(run, restart=8).startswith("again srun ended")


def test_a_set_up_that_fails_on_one_node_leaves_that_one_out_with_its_words(run: RunDir) -> None:
    told = look_back(run, node2_set_up_failed="node2: code 1: cuda/99 not found",
                     node1_set_up_stopped="SIGTERM")  # fmt: skip
    assert told.startswith(
        "again-without node2 the set-up fails on 1 of 2 nodes: node2: code 1: cuda/99 not found"
    )
    (line,) = (run.path / "slurm" / "excluded").read_text(encoding="utf-8").splitlines()
    assert line.split()[0] == "node2"


def test_excluded_nodes_get_another_chance_after_a_day_and_are_few(run: RunDir) -> None:
    (run.path / "slurm").mkdir()
    file = run.path / "slurm" / "excluded"
    now = time.time()
    file.write_text(f"old {now - 90_000:.0f}\nnode1\nnew {now - 60:.0f}\n", encoding="utf-8")
    assert exclude(run.path, ["node3"]) == ["new", "node3"]
    assert exclude(run.path, [f"node{n}" for n in range(99)])[0] == "node83"
    assert len(file.read_text(encoding="utf-8").splitlines()) == excluded_nodes.AT_MOST


def test_a_run_that_has_finished_is_done_however_its_job_ended(run: RunDir) -> None:
    run.result.write_text("{}", encoding="utf-8")
    assert look_back(run, CANCELLED, UP) == "done"


def test_what_a_start_says_after_the_next_one_has_begun_is_not_heard(run: RunDir) -> None:
    submitted(run.path, "7", restarts=1)
    before = job_events.events(run.path)
    decided_once(run, 0, 5, "from a node that was given up")
    job_events.record(run.path, {"event": "ended", "job": "7", "restart": 0, "decision": "stop"})
    assert job_events.events(run.path) == before
    decided_once(run, 1, 5)
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


def test_the_logs_of_old_starts_become_one_file_each(tmp_path: Path) -> None:
    for number in range(12):
        start = tmp_path / f"7_1-{number}"
        start.mkdir()
        (start / "node1.log").write_text(f"start {number}", encoding="utf-8")
        os.utime(start, (number, number))
    (tmp_path / "profile-1").mkdir()
    pack_old_logs(tmp_path)
    assert len([*tmp_path.glob("7_1-*/")]) == 10
    assert sorted(path.name for path in tmp_path.glob("*.gz")) == ["7_1-0.tar.gz", "7_1-1.tar.gz"]
    with tarfile.open(tmp_path / "7_1-0.tar.gz") as packed:
        file = packed.extractfile("7_1-0/node1.log")
        assert file is not None and file.read() == b"start 0"
    assert (tmp_path / "profile-1").is_dir()
