"""A rank that runs out of memory is named; the second time at one step nothing starts again."""

import json

import pytest

from peft_dist.common.errors import EXIT_CRASHED, EXIT_DO_NOT_RETRY
from peft_dist.run.history import crash_notes
from tests.faults.conftest import Undisturbed
from tests.faults.harness import Group, Harness, fault
from tests.faults.long import cases
from tests.faults.oracles import adapter_sha256, assert_same_run, records
from tests.faults.project import Project

pytestmark = pytest.mark.distributed

SHORT = ("train.steps=30", "checkpoint.every_steps=10", "evaluate.every_steps=null")
WHO = [("fsdp", 1), ("zero2", 0), ("ddp", 1), ("fsdp", 0), ("zero2", 1), ("ddp", 0)]
WHO = WHO[: cases(1, len(WHO))]


def assert_named(group: Group, attempt: int, rank: int, step: int) -> None:
    """See that the rank has said, in one line and for the next attempt, what it ended of."""
    (line,) = [line for line in group.errors(rank).splitlines() if "out of memory" in line][:1]
    assert line.startswith("peft-dist: train.micro_batch_size: ")
    assert f"rank {rank} is out of memory at step {step} " in line
    assert "Traceback" not in group.errors(rank)
    notes = [
        note for note in crash_notes(group.run_dir / "attempts", attempt) if note["kind"] == "oom"
    ]
    assert [(note["rank"], note["step"]) for note in notes] == [(rank, step)]


@pytest.mark.parametrize(("strategy", "rank"), WHO)
def test_out_of_memory_twice_at_one_step_is_not_tried_again(
    harness: Harness, project: Project, undisturbed: Undisturbed, strategy: str, rank: int
) -> None:
    run_dir, planted = harness.run_dir(), fault("oom_at", step=13, rank=rank)
    for count, code in enumerate([EXIT_CRASHED, EXIT_DO_NOT_RETRY]):
        group = harness.start(
            project, run_dir, strategy=strategy, overrides=SHORT, faults=[planted],
            restart_count=count,
        )  # fmt: skip
        assert group.wait_for_end_of(rank) == code, group.told()
        group.kill_all()
        assert_named(group, count + 1, rank, 13)
        assert (run_dir / "failure.json").exists() == (code == EXIT_DO_NOT_RETRY)
    failure = json.loads((run_dir / "failure.json").read_text(encoding="utf-8"))
    assert failure["exit_code"] == EXIT_DO_NOT_RETRY
    assert "out of memory at step 13 in 2 attempts" in failure["error"]
    in_place = harness.start(
        project, run_dir, strategy=strategy, overrides=SHORT, restart_count=2
    )  # torchrun's own, which it makes for any exit code
    assert in_place.wait() == [EXIT_DO_NOT_RETRY] * 2, in_place.told()
    assert len(records(run_dir, "start")) == 2
    by_hand = harness.start(project, run_dir, strategy=strategy, overrides=SHORT)
    assert by_hand.wait() == [0, 0], by_hand.told()
    assert_same_run(run_dir, undisturbed(2, strategy, *SHORT))


@pytest.mark.parametrize(("strategy", "rank"), WHO)
def test_out_of_memory_that_does_not_come_again_costs_one_restart_each(
    harness: Harness, project: Project, undisturbed: Undisturbed, strategy: str, rank: int
) -> None:
    run_dir = harness.run_dir()
    planted = [[fault("oom_at", step=step, rank=rank)] for step in (13, 14)]
    ended = harness.run_to_end(project, run_dir, faults=planted, strategy=strategy, overrides=SHORT)
    assert (ended.code, ended.restarts) == (0, 2)
    assert [group.codes[rank] for group in ended.groups] == [EXIT_CRASHED, EXIT_CRASHED, 0]
    for number, step in enumerate((13, 14)):
        assert_named(ended.groups[number], number + 1, rank, step)
    assert not (run_dir / "failure.json").exists()
    expected = undisturbed(2, strategy, *SHORT)
    assert_same_run(run_dir, expected)
    assert adapter_sha256(run_dir) == adapter_sha256(expected)
