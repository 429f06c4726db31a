"""A rank that hangs ends the group soon and is named with its phase and stack; slow is not hung."""

import json
import random
import signal
import time
from typing import NamedTuple

import pytest

from peft_dist.common.errors import EXIT_CRASHED
from peft_dist.run.history import crash_notes
from peft_dist.run.restart_policy import Kind
from peft_dist.worker.watchdog import SLOWEST_FACTOR
from tests.faults.conftest import Undisturbed
from tests.faults.harness import Fault, Group, Harness, fault
from tests.faults.hooks import ALL
from tests.faults.long import cases
from tests.faults.oracles import assert_same_run, last_step, records
from tests.faults.project import Project

pytestmark = pytest.mark.distributed

SHORT = (
    "train.steps=30",
    "checkpoint.every_steps=10",
    "evaluate.every_steps=20",
    "evaluate.micro_batch_size=1",
)
SLACK_S = 6.0
"""For ten other processes on the same two cores."""


def limits(min_s: float, **others: float) -> list[str]:
    """Return overrides that set the watchdog's limits; those not named are of no account here."""
    return [f"watchdog.{name}={seconds}" for name, seconds in {"min_s": min_s, **others}.items()]


def wait_for_the_end(group: Group, hung_s: float, *, least_s: float, rank: int = 0) -> None:
    """Wait until a rank has ended itself, and see that this took no longer than it may.

    Args:
        group: The ranks.
        hung_s: When one began to hang at the latest, in `time.monotonic()`.
        least_s: The limit of the phase, or of a step whose predecessors were quick.
        rank: Which rank ends itself.
    """
    assert group.wait_for_end_of(rank) == EXIT_CRASHED, group.told()
    ended = group.ended[rank]
    assert ended is not None
    took_s = ended[1] - hung_s
    # Of less than a hundred steps the 99th percentile is the slowest.
    steps_s = [
        record["tokens"] / record["tokens_per_s"] for record in records(group.run_dir, "step")
    ]
    allowed_s = max(least_s, SLOWEST_FACTOR * max(steps_s[1:], default=0.0))
    print(f"ended {took_s:.2f} s after the hang began, allowed {allowed_s:.2f} s")
    assert took_s < allowed_s + SLACK_S, group.told()


def report(group: Group, rank: int) -> str:
    """Return a rank's report: the line that names the hang, then the stacks of all threads."""
    path = group.run_dir / "logs" / f"hang-a1-rank-{rank}.txt"
    assert path.exists(), group.told()
    text = path.read_text(encoding="utf-8")
    assert "(most recent call first)" in text and "watchdog.py" in text
    record = json.loads((path.parent / f"collectives-a1-rank-{rank}.json").read_bytes())
    assert record["entries"][-1]["profiling_name"].startswith("gloo:"), record
    assert text.splitlines()[0] in group.errors(rank)
    return text


def verdict(group: Group) -> str:
    """Return the line that says whom the others wait for; the lowest rank that reports has it."""
    lines = [line for rank in (0, 1) for line in group.errors(rank).splitlines()]
    said = [line for line in lines if "stacks: " in line]
    assert said, group.told()
    assert f"collectives: {group.run_dir}/logs/collectives-a1-rank-*.json" in said[0]
    return said[0]


def restart(
    harness: Harness, project: Project, undisturbed: Undisturbed, group: Group, strategy: str
) -> None:
    """End what is left, start again, and hold the run against the undisturbed one."""
    group.kill_all()
    again = harness.start(project, group.run_dir, strategy=strategy, overrides=SHORT)
    assert again.wait() == [0, 0], again.told()
    assert_same_run(group.run_dir, undisturbed(2, strategy, *SHORT))


STOPPED = [("fsdp", 1, 5.0), ("ddp", 0, 2.0), ("zero2", 1, 2.0), ("fsdp", 0, 2.0), ("ddp", 1, 5.0)]


@pytest.mark.parametrize(("strategy", "rank", "min_s"), STOPPED[: cases(1, len(STOPPED))])
def test_a_rank_that_is_stopped_is_named_by_the_other(
    harness: Harness,
    project: Project,
    undisturbed: Undisturbed,
    strategy: str,
    rank: int,
    min_s: float,
) -> None:
    other = 1 - rank
    group = harness.start(
        project, harness.run_dir(), strategy=strategy, overrides=[*SHORT, *limits(min_s)],
        faults=[fault("slow_rank", rank=ALL, seconds=0.05)],
    )  # fmt: skip
    group.wait_for_step(13)
    group.kill(rank, signal.SIGSTOP)
    wait_for_the_end(group, time.monotonic(), least_s=min_s, rank=other)
    step = last_step(group.run_dir)
    assert 13 <= step < 30
    text = report(group, other)
    assert f"rank {other} has been in step " in text
    assert "/torch/distributed/" in text
    assert f"no word from rank {rank}: it is stopped" in verdict(group)
    assert not (group.run_dir / "logs" / f"hang-a1-rank-{rank}.txt").exists()
    (note,) = crash_notes(group.run_dir / "attempts", 1)
    assert (note["rank"], note["kind"]) == (other, "hang")
    assert group.wait_for_end_of(rank, 15.0) == -signal.SIGKILL  # torchrun would give it 30 s
    restart(harness, project, undisturbed, group, strategy)


class Hang(NamedTuple):
    """A rank that sleeps for ever, and what is to be said of it."""

    strategy: str
    rank: int
    where: str
    step: int
    phase: str
    verdict: str
    """`{rank}` and `{step}` are filled in."""
    limit: str = "min_s"


ELSEWHERE = "all ranks but rank {rank}, which is elsewhere, are in a collective"
BEHIND = "rank {rank} is furthest behind: "
HANGS = [
    Hang("zero2", 1, "rows", 13, "step 13 (phase step)", ELSEWHERE),
    Hang("ddp", 0, "collective", 14, "step 14 (phase step)", ELSEWHERE),
    Hang("fsdp", 1, "evaluation", 20, "step 20 (phase evaluation)", ELSEWHERE, "evaluation_s"),
    Hang("fsdp", 1, "setup", 0, "phase setup", ELSEWHERE, "setup_s"),
    Hang("fsdp", 0, "rows", 1, "step 1 (phase step)", ELSEWHERE, "setup_s"),
    Hang("zero2", 0, "collective", 21, "step 21 (phase step)", ELSEWHERE),
    Hang("ddp", 1, "rows", 30, "step 30 (phase step)", ELSEWHERE),
    Hang("fsdp", 1, "step", 12, "step 11 (phase step)", BEHIND + "step 11 (phase step)"),
    Hang("zero2", 0, "evaluation", 20, "step 20 (phase evaluation)", ELSEWHERE, "evaluation_s"),
]  # fmt: skip


@pytest.mark.parametrize("hang", HANGS[: cases(2, len(HANGS))], ids=lambda hang: hang.where)
def test_a_rank_that_hangs_says_so_itself(
    harness: Harness, project: Project, undisturbed: Undisturbed, hang: Hang
) -> None:
    planted = fault("hang_at", rank=hang.rank, where=hang.where, step=hang.step)
    limits_s = {"min_s": 2.0, "evaluation_s": 3.0}
    if hang.limit == "setup_s":  # setup itself takes seconds
        limits_s["setup_s"] = 12.0
    group = harness.start(
        project, harness.run_dir(), strategy=hang.strategy,
        overrides=[*SHORT, *limits(**limits_s)], faults=[planted],
    )  # fmt: skip
    done = 20 if hang.where == "evaluation" else max(hang.step - 1, 0)
    if done:
        group.wait_for_step(done)
    wait_for_the_end(group, time.monotonic(), least_s=limits_s[hang.limit], rank=hang.rank)
    group.wait_until(lambda: None not in group.codes, "the end of the other rank", SLACK_S)
    assert last_step(group.run_dir) == done
    text = report(group, hang.rank)
    assert text.startswith(f"rank {hang.rank} has been in {hang.phase} for "), text
    assert "in _sleep_for_ever" in text
    report(group, 1 - hang.rank)
    told = verdict(group)
    assert hang.verdict.format(rank=hang.rank, step=hang.step) in told, told
    notes = {note["rank"]: note["kind"] for note in crash_notes(group.run_dir / "attempts", 1)}
    assert notes[hang.rank] == "hang"
    assert notes[1 - hang.rank] in (
        "hang",
        Kind.LOST_PEER,
    )  # whichever of the two it was told first
    assert group.codes == [EXIT_CRASHED] * 2
    restart(harness, project, undisturbed, group, hang.strategy)


SLOW_RANKS = [("fsdp", 1), ("ddp", 0), ("zero2", 1), ("zero2", 0), ("ddp", 1), ("fsdp", 0)]


@pytest.mark.parametrize(("strategy", "rank"), SLOW_RANKS[: cases(1, len(SLOW_RANKS))])
def test_a_rank_that_is_only_slow_is_left_alone(
    harness: Harness, project: Project, undisturbed: Undisturbed, strategy: str, rank: int
) -> None:
    min_s, evaluation_s = 3.0, 3.0
    dice = random.Random(rank)
    # Steps of very different length, some beyond half the limit, and an evaluation that takes
    # longer than its limit, but not one of its batches.
    pauses_s = [dice.choice([0.0, 0.2, 0.6 * min_s]) for _ in range(10)]
    planted: list[Fault] = [
        fault("delay_steps", rank=rank, seconds=pauses_s, from_step=8),
        fault("slow", rank=rank, where="evaluation", seconds=0.8, from_step=30),
    ]
    assert max(pauses_s) > min_s / 2
    run_dir = harness.run_dir()
    group = harness.start(
        project, run_dir, strategy=strategy, faults=planted,
        overrides=[*SHORT, *limits(min_s, evaluation_s=evaluation_s)],
    )  # fmt: skip
    assert group.wait() == [0, 0], group.told()
    assert records(run_dir, "evaluation")[-1]["eval_seconds"] > evaluation_s
    assert not list((run_dir / "logs").glob("*hang-*"))
    assert_same_run(run_dir, undisturbed(2, strategy, *SHORT))


@pytest.mark.parametrize("stopped_s", [4.0, 12.0][: cases(1, 2)])
def test_a_group_that_was_stopped_as_a_whole_goes_on(
    harness: Harness, project: Project, undisturbed: Undisturbed, stopped_s: float
) -> None:
    run_dir = harness.run_dir()
    group = harness.start(project, run_dir, overrides=[*SHORT, *limits(2.0)])
    group.wait_for_step(13)
    group.kill_all(signal.SIGSTOP)
    time.sleep(stopped_s)
    group.kill_all(signal.SIGCONT)
    assert group.wait() == [0, 0], group.told()
    assert not list((run_dir / "logs").glob("*hang-*"))
    assert_same_run(run_dir, undisturbed(2, "fsdp", *SHORT))


@pytest.mark.parametrize("n", [1, 9][: cases(1, 2)])
def test_a_checkpoint_that_cannot_be_written_is_a_hang_of_the_next_one(
    harness: Harness, project: Project, undisturbed: Undisturbed, n: int
) -> None:
    run_dir = harness.run_dir()
    planted = fault("hang_at_file_operation", n=n, under=run_dir / "checkpoints", since="step-")
    group = harness.start(
        project, run_dir, overrides=[*SHORT, *limits(2.0, save_s=2.0)], faults=[planted]
    )
    group.wait_for_step(20)
    wait_for_the_end(group, time.monotonic(), least_s=2.0)
    text = report(group, 0)
    assert text.startswith("rank 0 has been in step 20 (phase save) for "), text
    assert "in _sleep_for_ever" in text
    restart(harness, project, undisturbed, group, "fsdp")


def test_a_checkpoint_that_cannot_be_written_is_a_hang_although_none_is_due(
    harness: Harness, project: Project, undisturbed: Undisturbed
) -> None:
    run_dir = harness.run_dir()
    planted = [
        fault("hang_at_file_operation", n=1, under=run_dir / "checkpoints", since="step-"),
        fault("slow_rank", rank=1, seconds=0.4),
    ]
    seconds = ("checkpoint.every_steps=null", "checkpoint.every_seconds=1")
    group = harness.start(
        project, run_dir, overrides=[*SHORT, *limits(2.0, save_s=2.0), *seconds], faults=planted
    )
    group.wait_until(lambda: bool(records(run_dir, "checkpoint")), "checkpoint")
    wait_for_the_end(group, time.monotonic(), least_s=2 * 2.0)
    step = last_step(run_dir)
    assert step < 25, "nobody noticed before the end of the run"
    text = report(group, 0)
    assert text.startswith(f"rank 0 has been in step {step} (phase save) for "), text
    assert "in _sleep_for_ever" in text
    restart(harness, project, undisturbed, group, "fsdp")
