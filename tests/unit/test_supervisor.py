"""What a node decides about a run, and what it hears of the other nodes and of the kernel."""

import time
from pathlib import Path

import pytest

from peft_dist.run.directory import RunDir
from peft_dist.slurm import failed_nodes, history, memory_kills
from peft_dist.slurm.failed_nodes import Peers
from peft_dist.slurm.supervisor import OUT_OF_MEMORY, Limits, too_many_starts
from tests.unit.run_folders import make_run, submitted

FEW = Limits(starts=6, without_progress=3)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(make_run(tmp_path / "run"))


def started(run: RunDir, restart: int) -> None:
    history.record(run.path, {"event": "started", "job": "7", "restart": restart})


def decided(run: RunDir, restart: int, step: int, reason: str = "node1 crashed") -> None:
    told = {"event": "decided", "job": "7", "restart": restart, "step": step, "reason": reason}
    history.record(run.path, told | {"decision": "again"})


def begin_again(run: RunDir, *steps: int, reason: str = "node1 crashed") -> None:
    """Note starts that ended at these steps, and the present one that has not ended."""
    history.record(run.path, {"event": "submitted", "job": "7", "by": "submit"})
    for restart, step in enumerate(steps):
        started(run, restart)
        decided(run, restart, step, reason)
    started(run, len(steps))


def checkpoint(run: RunDir, step: int) -> None:
    (run.checkpoints / f"step-{step:08d}").mkdir(parents=True)


def test_starts_that_end_at_one_step_are_enough_some_day(run: RunDir) -> None:
    begin_again(run, 0)
    assert too_many_starts(run, FEW, "stopped") is None
    decided(run, 1, 0)
    started(run, 2)
    assert str(too_many_starts(run, FEW, "stopped")).startswith("no progress in 3 starts")


def test_starts_that_get_on_are_only_counted(run: RunDir) -> None:
    begin_again(run, 10, 20, 30, 40)
    checkpoint(run, 50)
    assert too_many_starts(run, FEW, "stopped") is None
    decided(run, 4, 50)
    started(run, 5)
    checkpoint(run, 60)
    assert str(too_many_starts(run, FEW, "stopped")).startswith("6 starts are all")


def test_starts_that_could_not_decide_count_too(run: RunDir) -> None:
    history.record(run.path, {"event": "submitted", "job": "7", "by": "submit"})
    for restart in range(6):
        started(run, restart)
    assert str(too_many_starts(run, FEW, "stopped")).startswith("6 starts are all")


def test_who_submits_a_run_once_more_begins_to_count_anew(run: RunDir) -> None:
    begin_again(run, 0, 0, 0, 0, 0)
    history.record(run.path, {"event": "submitted", "job": "8", "by": "resume"})
    assert too_many_starts(run, FEW, "stopped") is None


def test_running_out_of_memory_twice_at_one_step_is_enough(run: RunDir) -> None:
    begin_again(run, 0, reason=f"node2 {OUT_OF_MEMORY}")
    assert too_many_starts(run, FEW, "node1 crashed") is None
    assert too_many_starts(run, FEW, f"node1 {OUT_OF_MEMORY}") == "out of memory twice after step 0"
    checkpoint(run, 10)
    assert too_many_starts(run, FEW, f"node1 {OUT_OF_MEMORY}") is None


def test_what_a_start_says_after_the_next_one_has_begun_is_not_heard(run: RunDir) -> None:
    submitted(run.path, "7", restarts=1)
    before = history.events(run.path)
    decided(run, 0, 5, "from a node that was given up")
    history.record(run.path, {"event": "ended", "job": "7", "restart": 0, "decision": "stop"})
    assert history.events(run.path) == before
    decided(run, 1, 5)
    assert len(history.events(run.path)) == len(before) + 1


def test_a_job_beside_the_newest_one_is_known_until_it_says_that_it_ended(run: RunDir) -> None:
    submitted(run.path, "7")
    submitted(run.path, "8")
    assert history.others(run.path) == ["7"]
    history.record(run.path, {"event": "ended", "job": "7", "restart": 0, "decision": "done"})
    assert history.others(run.path) == []


def test_a_node_hears_after_a_while_that_another_one_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failed_nodes, "GRACE_S", 0.3)
    monkeypatch.setattr(failed_nodes, "LOOK_EVERY_S", 0.0)
    ours, other = (Peers(tmp_path, name=name, nonce="ab") for name in ("node1", "node2"))
    Peers(tmp_path, name="node3", nonce="of another try").say_failed("node3 crashed")
    assert not ours.have_lost_one()
    other.say_failed("node2 crashed")
    assert not ours.have_lost_one()
    time.sleep(0.4)
    assert ours.have_lost_one()
    assert ours.lost == "node2 crashed"


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
