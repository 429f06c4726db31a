"""A run that crashes again and again is started again only as long as it gets further."""

import json

import pytest

from peft_dist.common.errors import EXIT_CRASHED, EXIT_DO_NOT_RETRY
from tests.faults.conftest import Undisturbed
from tests.faults.harness import Harness, fault
from tests.faults.long import cases
from tests.faults.oracles import assert_same_run, records
from tests.faults.project import Project

pytestmark = pytest.mark.distributed

SHORT = ("train.steps=12", "checkpoint.every_steps=4", "evaluate.every_steps=null",
         "checkpoint.background=false")  # fmt: skip
"""A checkpoint is on disk before the next step begins, so a crash after it has made progress."""
STEPS = [2, 6, 10, 3, 7, 12][: cases(1, 6)]
"""Where the crash comes, never in an attempt's first step, where a bug's second time is the last:
before the first checkpoint, after it, ..."""


@pytest.mark.parametrize("step", STEPS)
def test_three_attempts_without_a_new_checkpoint_are_the_last(
    harness: Harness, project: Project, undisturbed: Undisturbed, step: int
) -> None:
    run_dir, planted = harness.run_dir(), [fault("crash_at", step=step, rank=1)]
    saved = (step - 1) // 4 * 4
    # The first attempt makes the checkpoint that the three after it do not get beyond.
    crashes = 3 if saved == 0 else 4
    ended = harness.run_to_end(
        project, run_dir, faults=[planted] * 9, stop_codes=[EXIT_DO_NOT_RETRY], overrides=SHORT
    )
    assert (ended.code, ended.restarts) == (EXIT_DO_NOT_RETRY, crashes)
    assert [group.codes[1] for group in ended.groups[:-1]] == [EXIT_CRASHED] * crashes
    assert len(records(run_dir, "start")) == crashes  # the last one trained nothing
    failure = json.loads((run_dir / "failure.json").read_text(encoding="utf-8"))
    assert failure["exit_code"] == EXIT_DO_NOT_RETRY
    assert (
        f"no progress in 3 attempts: none saved a checkpoint after step {saved}" in failure["error"]
    )
    assert f"planted at step {step}" in failure["error"]
    (line,) = [line for line in ended.groups[-1].errors().splitlines() if "error:" in line]
    assert failure["error"] in line

    in_place = harness.start(project, run_dir, overrides=SHORT, restart_count=9)
    assert in_place.wait() == [EXIT_DO_NOT_RETRY] * 2, in_place.told()
    by_hand = harness.start(project, run_dir, overrides=SHORT, faults=planted)
    assert by_hand.wait_for_end_of(1) == EXIT_CRASHED, by_hand.told()  # it was tried, at least
    by_hand.kill_all()
    fixed = harness.start(project, run_dir, overrides=SHORT)
    assert fixed.wait() == [0, 0], fixed.told()
    assert_same_run(run_dir, undisturbed(2, "fsdp", *SHORT))


def test_crashes_that_each_get_further_are_no_loop(
    harness: Harness, project: Project, undisturbed: Undisturbed
) -> None:
    longer = ("train.steps=20", *SHORT[1:])
    crashes = [5, 6, 9, 10, 13, 14, 18]
    planted = [[fault("crash_at", step=step, rank=step % 2)] for step in crashes]
    run_dir = harness.run_dir()
    ended = harness.run_to_end(project, run_dir, faults=planted, overrides=longer)
    assert (ended.code, ended.restarts) == (0, len(crashes))
    assert not (run_dir / "failure.json").exists()
    assert_same_run(run_dir, undisturbed(2, "fsdp", *longer))


@pytest.mark.parametrize("rank", range(cases(1, 2)))
def test_a_fault_of_code_before_the_first_step_is_a_verdict_when_it_comes_again(
    harness: Harness, project: Project, rank: int
) -> None:
    run_dir, planted = harness.run_dir(), [fault("bug_while_loading", rank=rank)]
    codes = []
    for count in range(2):
        group = harness.start(
            project, run_dir, overrides=SHORT, faults=planted, restart_count=count
        )
        codes.append(group.wait_for_end_of(rank))
        group.kill_all()
    assert codes == [EXIT_CRASHED, EXIT_DO_NOT_RETRY]
    failure = json.loads((run_dir / "failure.json").read_text(encoding="utf-8"))["error"]
    assert "the same fault ended 2 attempts in a row before any step" in failure
    assert f"TypeError: planted while loading (rank {rank}), at " in failure
    assert f"see {run_dir / 'logs'}, and start again once that is fixed" in failure
