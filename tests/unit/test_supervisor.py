"""What a node decides about a run, and what it hears of the other nodes and of the kernel."""

import time
from pathlib import Path

import pytest

from peft_dist.run import job_events
from peft_dist.run.directory import RunDir
from peft_dist.run.restart_policy import Ending, Kind
from peft_dist.slurm import failed_nodes, memory_kills
from peft_dist.slurm.failed_nodes import FailedNodes
from tests.unit.run_folders import make_run, submitted


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(make_run(tmp_path / "run"))


def decided(run: RunDir, restart: int, step: int, reason: str = "node1 crashed") -> None:
    event = {"event": "decided", "job": "7", "restart": restart, "step": step, "reason": reason}
    job_events.record(run.path, event | {"decision": "again"})


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
