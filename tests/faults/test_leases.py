"""One run directory has one holder: a second start is refused, a zombie writes nothing."""

import json
import signal
import time
from pathlib import Path

import pytest

from peft_dist.common.errors import EXIT_DO_NOT_RETRY, EXIT_USER_ERROR
from tests.faults.conftest import Undisturbed
from tests.faults.harness import Harness, fault
from tests.faults.long import cases
from tests.faults.oracles import assert_same_run, records, sha256
from tests.faults.project import Project

pytestmark = pytest.mark.distributed

SHORT = ("train.steps=60", "checkpoint.every_steps=20", "evaluate.every_steps=null")
REFUSED_WITHIN_S = 2.0
STOPPED_AT = [30, 5, 21, 41, 59][: cases(1, 5)]


def outcomes(run_dir: Path) -> list[str | None]:
    """Return how each attempt of a run has ended."""
    found = sorted((run_dir / "attempts").glob("????????.json"))
    return [json.loads(path.read_text(encoding="utf-8")).get("outcome") for path in found]


def everything(run_dir: Path) -> dict[str, str]:
    """Return the sha256 of every file of a run, and which file it is."""
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    return {str(path): f"{sha256(path)} {path.stat().st_ino}" for path in files}


def test_a_second_start_is_refused_at_once_and_harms_nothing(
    harness: Harness, project: Project, undisturbed: Undisturbed
) -> None:
    run_dir = harness.run_dir()
    slow = fault("slow_rank", rank=0, seconds=0.05)
    holder = harness.start(project, run_dir, overrides=SHORT, faults=[slow])
    holder.wait_for_step(3)
    for _ in range(cases(3, 10)):
        second = harness.start(project, run_dir, overrides=SHORT)
        assert second.wait_for_end_of(0) == EXIT_USER_ERROR, second.told()
        ended = second.ended[0]
        assert ended is not None
        assert ended[1] - second.started_s < REFUSED_WITHIN_S
        second.kill_all()
        (line,) = [line for line in second.errors().splitlines() if "error:" in line]
        assert f"{run_dir}: is in use by attempt 1, process {holder.pids[0]} on host " in line
    assert holder.wait() == [0, 0], holder.told()
    assert outcomes(run_dir) == ["done"]
    assert not (run_dir / "failure.json").exists()
    assert_same_run(run_dir, undisturbed(2, "fsdp", *SHORT))


def test_the_lease_of_a_killed_run_is_taken_over(
    harness: Harness, project: Project, undisturbed: Undisturbed
) -> None:
    run_dir = harness.run_dir()
    killed = harness.start(project, run_dir, overrides=SHORT)
    killed.wait_for_step(25)
    killed.kill_all()
    again = harness.start(project, run_dir, overrides=SHORT)
    assert again.wait() == [0, 0], again.told()
    assert outcomes(run_dir) == [None, "done"]
    assert_same_run(run_dir, undisturbed(2, "fsdp", *SHORT))


@pytest.mark.parametrize("step", STOPPED_AT)
def test_a_zombie_of_a_requeued_job_writes_nothing(
    harness: Harness, project: Project, undisturbed: Undisturbed, step: int
) -> None:
    run_dir = harness.run_dir()
    slow = fault("slow_rank", rank=0, seconds=0.03)
    zombie = harness.start(project, run_dir, overrides=SHORT, faults=[slow], SLURM_JOB_ID="7")
    zombie.wait_for_step(step)
    zombie.kill_all(signal.SIGSTOP)
    requeued = harness.start(
        project, run_dir, overrides=SHORT, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1"
    )
    requeued.wait_for_step(min(step + 2, 60))
    zombie.kill_all(signal.SIGCONT)  # while the other one trains
    assert zombie.wait_for_end_of(0) == EXIT_DO_NOT_RETRY, zombie.told()
    assert "was taken over by attempt 2" in zombie.errors()
    assert requeued.wait() == [0, 0], requeued.told()
    of_attempt_1 = [record["at_s"] for record in records(run_dir) if record["attempt"] == 1]
    lines = [record["attempt"] for record in records(run_dir)]
    assert lines == sorted(lines), "the zombie wrote after it was taken over"
    assert of_attempt_1 == sorted(of_attempt_1)
    assert outcomes(run_dir) == [None, "done"]
    assert not (run_dir / "failure.json").exists()
    zombie.kill_all()
    assert_same_run(run_dir, undisturbed(2, "fsdp", *SHORT))


@pytest.mark.parametrize("step", [15, 60])
def test_a_zombie_that_wakes_after_the_end_changes_no_file(
    harness: Harness, project: Project, step: int
) -> None:
    run_dir = harness.run_dir()
    # After the last step it is stopped when it has begun to save the finished adapter.
    saving = fault("slow", rank=0, where="final save", seconds=2.0)
    zombie = harness.start(project, run_dir, overrides=SHORT, SLURM_JOB_ID="7", faults=[saving])
    zombie.wait_for_step(step)
    time.sleep(1.0 if step == 60 else 0.0)
    zombie.kill_all(signal.SIGSTOP)
    assert not (run_dir / "adapter").exists()
    requeued = harness.start(
        project, run_dir, overrides=SHORT, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1"
    )
    assert requeued.wait() == [0, 0], requeued.told()
    before = everything(run_dir)
    zombie.kill_all(signal.SIGCONT)
    assert zombie.wait_for_end_of(0) == EXIT_DO_NOT_RETRY, zombie.told()
    zombie.kill_all()
    time.sleep(1.0)
    assert everything(run_dir) == before
