"""A loss or gradient that is not finite on one rank never reaches the adapter, on any rank."""

import json
import math
import signal
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file

from peft_dist.common.errors import EXIT_DO_NOT_RETRY
from peft_dist.common.manifest import verify
from peft_dist.run.attempt_records import records as attempts
from tests.faults.conftest import Undisturbed
from tests.faults.harness import Fault, Group, Harness, fault
from tests.faults.hooks import ALL
from tests.faults.long import cases
from tests.faults.oracles import (
    assert_same_run,
    checkpoint_steps,
    final_steps,
    last_step,
    records,
    sha256,
)
from tests.faults.project import Project

pytestmark = pytest.mark.distributed

STEPS = 40
SHORT = (
    f"train.steps={STEPS}",
    "checkpoint.every_steps=10",
    "checkpoint.background=false",  # where a killed run goes on is then no matter of time
    "checkpoint.keep_last=10",
    "evaluate.every_steps=null",
)


class Spoiled(NamedTuple):
    """What is not finite, where and when."""

    strategy: str
    rank: int
    what: str
    step: int
    factor: float = math.nan

    @property
    def planted(self) -> Fault:
        """The fault, for every group of a run: data that are bad are so again."""
        return fault("nan_at", step=self.step, rank=self.rank, what=self.what, factor=self.factor)


def spoiled_cases(short: list[Spoiled]) -> list[Spoiled]:
    """Return a few cases, or those and one for every strategy, rank and kind of spoiling."""
    kinds = product(("loss", "gradient"), (math.nan, math.inf))
    every = [
        Spoiled(strategy, rank, what, 11 + (7 * index + rank) % 8, factor)
        for index, (what, factor) in enumerate(kinds)
        for strategy in ("fsdp", "ddp", "zero2")
        for rank in (0, 1)
    ]
    return [*short, *every][: cases(len(short), len(short) + len(every))]


def assert_finite(run_dir: Path) -> None:
    """See that neither the adapter nor any checkpoint holds a value that is not finite."""
    files = [
        path
        for folder in ("adapter", "checkpoints")
        for path in (run_dir / folder).rglob("*.safetensors")
    ]
    assert any(path.parent.parent.name.startswith("step-") for path in files)
    for path in files:
        for name, tensor in load_file(path).items():
            assert np.isfinite(tensor).all(), f"{path}: {name}"


def assert_left_out(run_dir: Path, steps: set[int], event: str) -> None:
    """See that just these steps have a record of the event, and all others one of a step."""
    left_out = records(run_dir, event)
    assert {record["step"] for record in left_out} == steps
    for record in left_out:
        assert f"at step {record['step']}" in record["reason"]
    assert sorted(final_steps(run_dir)) == sorted(set(range(1, STEPS + 1)) - steps)
    others = {"skipped", "rollback"} - {event}
    assert not [record for record in records(run_dir) if record["event"] in others]
    for record in records(run_dir, "step"):
        assert math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])


def kill_at(step: int) -> Fault:
    """Kill the whole group when a step begins."""
    return fault("signal_at", step=step, rank=0, number=int(signal.SIGKILL), to="group")


@pytest.mark.parametrize("policy", ["skip", "rollback"][: cases(1, 2)])
@pytest.mark.parametrize(
    "spoiled",
    spoiled_cases([Spoiled("zero2", 0, "gradient", 13), Spoiled("ddp", 1, "loss", 16, math.inf)]),
    ids=lambda spoiled: f"{spoiled.strategy}-{spoiled.rank}-{spoiled.what}-{spoiled.factor}",
)
def test_a_step_that_is_not_finite_is_left_out_by_all_ranks(
    harness: Harness, project: Project, spoiled: Spoiled, policy: str
) -> None:
    calm, killed = harness.run_dir("calm"), harness.run_dir("killed")
    settings = [*SHORT, f"train.non_finite={policy}"]
    group = harness.start(
        project, calm, strategy=spoiled.strategy, overrides=settings, faults=[spoiled.planted]
    )
    assert group.wait() == [0, 0], group.told()
    event = {"skip": "skipped", "rollback": "rollback"}[policy]
    (left_out,) = records(calm, event)
    assert ("loss nan" in left_out["reason"] or "loss inf" in left_out["reason"]) == (
        spoiled.what == "loss"
    )
    assert left_out.get("back_to") == (10 if policy == "rollback" else None)
    # Once before a checkpoint has been made of it, so that it comes again, and once after.
    faults = [[spoiled.planted, kill_at(19)], [spoiled.planted, kill_at(26)], [spoiled.planted]]
    ended = harness.run_to_end(
        project, killed, strategy=spoiled.strategy, overrides=settings, faults=faults
    )
    assert ended.restarts == 2
    assert [record["step"] for record in records(killed, "start")] == [0, 10, 20]
    assert len(records(killed, event)) == 2
    assert_same_run(killed, calm)
    for run_dir in (calm, killed):
        assert_left_out(run_dir, {spoiled.step}, event)
        assert_finite(run_dir)


@pytest.mark.parametrize("spoiled", spoiled_cases([Spoiled("fsdp", 1, "loss", 13)]))
def test_a_skipped_step_changes_nothing_but_the_place_in_the_rows(
    harness: Harness, project: Project, spoiled: Spoiled
) -> None:
    run_dir, step = harness.run_dir(), spoiled.step
    group = harness.start(
        project, run_dir, strategy=spoiled.strategy, faults=[spoiled.planted],
        overrides=[*SHORT, "checkpoint.every_steps=1", "checkpoint.keep_last=100"],
    )  # fmt: skip
    assert group.wait() == [0, 0], group.told()
    assert_left_out(run_dir, {step}, "skipped")
    assert_finite(run_dir)
    before, skipped, after = (
        [
            sha256(run_dir / "checkpoints" / f"step-{at:08d}" / name)
            for name in ("adapter/adapter_model.safetensors", "optimizer.safetensors")
        ]
        for at in (step - 1, step, step + 1)
    )
    assert before == skipped
    assert skipped[0] != after[0] and skipped[1] != after[1]
    cursors = {record["step"]: record["cursor"] for record in records(run_dir, "step")}
    (left_out,) = records(run_dir, "skipped")
    assert cursors[step - 1] < left_out["cursor"] < cursors[step + 1]


def assert_beyond_help(group: Group, step: int) -> None:
    """See that all ranks ended for good at a step, and left a whole and finite checkpoint."""
    run_dir = group.run_dir
    assert group.wait() == [EXIT_DO_NOT_RETRY] * 2, group.told()
    assert "Traceback" not in group.errors(0) + group.errors(1)
    failure = json.loads((run_dir / "failure.json").read_text(encoding="utf-8"))
    assert failure["exit_code"] == EXIT_DO_NOT_RETRY
    assert f"at step {step}" in failure["error"] and "train.non_finite" in failure["error"]
    assert attempts(run_dir / "attempts")[-1]["outcome"] == "failed"
    steps = checkpoint_steps(run_dir)
    assert steps == list(range(10, step, 10))
    for at in steps:
        verify(run_dir / "checkpoints" / f"step-{at:08d}")
    assert_finite(run_dir)
    assert not (run_dir / "adapter").exists()


@pytest.mark.parametrize("spoiled", spoiled_cases([Spoiled("fsdp", 1, "gradient", 13)]))
def test_a_run_that_is_to_stop_goes_on_only_by_hand(
    harness: Harness, project: Project, undisturbed: Undisturbed, spoiled: Spoiled
) -> None:
    run_dir, strategy = harness.run_dir(), spoiled.strategy
    settings = [*SHORT, "train.non_finite=stop"]
    group = harness.start(
        project, run_dir, strategy=strategy, overrides=settings, faults=[spoiled.planted]
    )
    assert_beyond_help(group, spoiled.step)
    assert last_step(run_dir) == spoiled.step - 1
    in_place = harness.start(
        project, run_dir, strategy=strategy, overrides=settings, restart_count=1
    )
    assert in_place.wait() == [EXIT_DO_NOT_RETRY] * 2, in_place.told()
    assert len(records(run_dir, "start")) == 1
    by_hand = harness.start(project, run_dir, strategy=strategy, overrides=settings)
    assert by_hand.wait() == [0, 0], by_hand.told()
    assert_same_run(run_dir, undisturbed(2, strategy, *SHORT))


@pytest.mark.parametrize("policy", ["skip", "rollback"][: cases(1, 2)])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2"][: cases(1, 3)])
def test_too_many_steps_in_a_row_that_are_not_finite_end_the_run(
    harness: Harness, project: Project, strategy: str, policy: str
) -> None:
    run_dir = harness.run_dir()
    planted = [fault("nan_at", step=step, rank=step % 2) for step in (12, 14, 15, 16, 17, 18)]
    group = harness.start(
        project, run_dir, strategy=strategy, faults=planted,
        overrides=[*SHORT, f"train.non_finite={policy}", "train.max_skipped_steps=2"],
    )  # fmt: skip
    assert_beyond_help(group, 16)
    event = {"skip": "skipped", "rollback": "rollback"}[policy]
    assert [record["step"] for record in records(run_dir, event)] == [12, 14, 15]


@pytest.mark.parametrize("strategy", ["fsdp", "ddp", "zero2"][: cases(1, 3)])
def test_without_a_checkpoint_there_is_nothing_to_roll_back_to(
    harness: Harness, project: Project, strategy: str
) -> None:
    planted = fault("nan_at", step=5, rank=ALL)
    group = harness.start(
        project, harness.run_dir(), strategy=strategy, faults=[planted],
        overrides=[*SHORT, "train.non_finite=rollback"],
    )  # fmt: skip
    assert group.wait() == [EXIT_DO_NOT_RETRY] * 2, group.told()
    assert "there is no checkpoint to roll back to" in group.errors(0)
