"""Ranks that are killed, interrupted or have a wrong clock: the run ends as if nothing had been."""

import math
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

from peft_dist.common.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR
from peft_dist.ledger.goodput import goodput
from peft_dist.ledger.reader import LedgerReader
from peft_dist.run import attempt_records
from tests.faults.conftest import Undisturbed
from tests.faults.harness import Fault, Group, Harness, fault
from tests.faults.long import cases, only_long
from tests.faults.oracles import (
    Record,
    assert_every_row_once,
    assert_same_run,
    checkpoint_steps,
    last_step,
    records,
    trained_rows,
)
from tests.faults.project import Project

pytestmark = pytest.mark.distributed

SAVE_EVERY = 20
"""Steps between two checkpoints of the project's recipe."""
STEPS_PER_EPOCH = 75
RESTART_LIMIT_S = 30.0
"""From a kill to the first new step; the target is 10 s on two cores that do nothing else."""
HOUR_S = 3600.0
LOADING_S = 1.5
"""About how long a rank takes to its first step."""


class Kill(NamedTuple):
    """One rank's end."""

    during: Literal["loading", "step", "evaluation"]
    rank: int
    step: int
    """The last step before it; means nothing while loading."""
    delay_s: float

    @property
    def faults(self) -> list[Fault]:
        """What holds the rank where it is to be killed."""
        if self.during != "evaluation":
            return []
        return [fault("hang_at", where="evaluation", step=self.step, rank=self.rank)]

    def strike(self, group: Group) -> None:
        """Wait for the moment and kill the rank."""
        if self.during != "loading":
            group.wait_for_step(self.step)
        time.sleep(self.delay_s)
        assert group.kill(self.rank), group.told()


def two_kills(seed: int, world_size: int) -> list[Kill]:
    """Return a kill of the first attempt and one of the second."""
    dice = random.Random(seed)
    kills, done = [], 0
    for _ in range(2):
        during = dice.choice(("step", "step", "step", "loading", "evaluation"))
        rank = dice.randrange(world_size)
        if during == "loading":
            kills.append(Kill("loading", rank, 0, dice.uniform(0.0, LOADING_S)))
        elif during == "evaluation":
            done = 100 if done < 100 - SAVE_EVERY else 200
            kills.append(Kill("evaluation", rank, done, 0.2))
        else:
            done = dice.randint(max(1, min(done, 170) - SAVE_EVERY), 190)
            kills.append(Kill("step", rank, done, dice.uniform(0.0, 0.05)))
    return kills


def world_of(seed: int) -> tuple[int, str]:
    """Return world size and strategy: mostly the smallest that shards."""
    others = {7: (2, "ddp"), 8: (2, "zero2"), 9: (4, "hsdp")}
    return others.get(seed % 10, (2, "fsdp"))


@pytest.mark.parametrize("seed", range(cases(1, 50)))
def test_a_run_whose_ranks_are_killed_at_random_is_the_undisturbed_one(
    harness: Harness, project: Project, undisturbed: Undisturbed, seed: int
) -> None:
    world_size, strategy = world_of(seed)
    kills = two_kills(seed, world_size)
    run_dir = harness.run_dir()
    killed_s = [0.0]
    waits_s = []

    def disturb(group: Group, number: int) -> None:
        kill = kills[number] if number < len(kills) else None
        if kill is None or kill.during != "loading":
            # Killed after the last step's checkpoint, a run has no step left to do.
            group.wait_until(lambda: group.step() >= 1 or None not in group.codes, "a step")
            if number > 0 and group.step() >= 1:
                waits_s.append(time.monotonic() - killed_s[0])
        if kill is not None:
            kill.strike(group)
            killed_s[0] = time.monotonic()

    faults = [kill.faults for kill in kills]
    ended = harness.run_to_end(
        project, run_dir, faults=faults, disturb=disturb, world_size=world_size, strategy=strategy
    )
    assert ended.restarts == len(kills)
    assert_same_run(run_dir, undisturbed(world_size, strategy))
    lost = assert_little_is_lost(run_dir)
    print(f"{kills}: first new step after {waits_s} s, steps lost {lost}")
    assert max(waits_s, default=0.0) < RESTART_LIMIT_S


OF_LORA = "kind: lora, rank: 4, alpha: 8, dropout: 0.1"
METHODS = [
    ("fsdp", ["method={kind: prefix, virtual_tokens: 4, projection: true}"]),
    ("fsdp", [f"method={{{OF_LORA}, dora: true}}"]),
    ("fsdp", [f"method={{{OF_LORA}, init: pissa}}", "quantization=none"]),
    ("zero2", [f"method={{{OF_LORA}, learning_rate_ratio: 16}}"]),
    ("zero3", [f"method={{{OF_LORA}, init: pissa}}", "quantization=none"]),
    ("ddp", ["method={kind: bottleneck, bottleneck_size: 8, dropout: 0.1}"]),
]
"""Methods whose checkpoints hold more than what is trained, or that train otherwise."""


@pytest.mark.parametrize(("strategy", "method"), METHODS[: cases(1, len(METHODS))])
def test_a_killed_run_of_another_method_is_the_undisturbed_one(
    harness: Harness,
    project: Project,
    undisturbed: Undisturbed,
    strategy: str,
    method: list[str],
) -> None:
    overrides = ["train.steps=80", "evaluate.every_steps=null", *method]
    run_dir = killed_once(harness, project, strategy, overrides)
    assert_same_run(run_dir, undisturbed(2, strategy, *overrides))
    assert_little_is_lost(run_dir)


@only_long  # tests/faults/test_world_sizes.py stops a stream by signals, and goes on
def test_a_killed_run_of_streamed_rows_is_the_undisturbed_one_of_cached_rows(
    harness: Harness, project: Project, undisturbed: Undisturbed
) -> None:
    overrides = ["train.steps=80", "evaluate.every_steps=null"]  # the second epoch begins at 75
    run_dir = killed_once(harness, project, "ddp", [*overrides, "data.streaming=true"])
    assert_same_run(run_dir, undisturbed(2, "ddp", *overrides))
    assert_little_is_lost(run_dir)


def killed_once(
    harness: Harness, project: Project, strategy: str, overrides: Sequence[str]
) -> Path:
    """Return a finished run of two ranks, one of which was killed after step 33."""
    run_dir = harness.run_dir()

    def disturb(group: Group, number: int) -> None:
        if number == 0:
            group.wait_for_step(33)
            group.wait_until(lambda: bool(records(run_dir, "saved")), "checkpoint")
            group.kill(1)

    ended = harness.run_to_end(
        project, run_dir, disturb=disturb, strategy=strategy, overrides=overrides
    )
    assert ended.restarts == 1
    assert records(run_dir, "start")[1]["step"] >= SAVE_EVERY
    return run_dir


def assert_little_is_lost(run_dir: Path) -> list[int]:
    """See that attempts go on from the last checkpoint written; return the steps each has lost.

    What is done while a checkpoint is written is lost with it, besides the steps up to it.
    """
    lost, before = [], list[Record]()
    for record in records(run_dir):
        if record["event"] == "start":
            saved = max((r["step"] for r in before if r["event"] == "saved"), default=0)
            taken = max((r["step"] for r in before if r["event"] == "checkpoint"), default=0)
            done = next((r["step"] for r in reversed(before) if r["event"] == "step"), 0)
            assert record["step"] >= saved
            in_writing = done - taken if record["step"] < taken else 0
            lost.append(done - record["step"])
            assert lost[-1] <= SAVE_EVERY + in_writing
        before.append(record)
    return lost


@pytest.mark.parametrize("seed", range(cases(1, 5)))
@pytest.mark.parametrize("times", [2, 5][: cases(1, 2)])
def test_a_run_that_is_requeued_again_and_again_takes_every_row_once(
    harness: Harness, project: Project, undisturbed: Undisturbed, times: int, seed: int
) -> None:
    dice = random.Random(100 * times + seed)
    in_first_epoch = sorted(dice.sample(range(3, STEPS_PER_EPOCH - 3), 2))
    later = sorted(dice.sample(range(STEPS_PER_EPOCH, 190), times - 2))
    run_dir = harness.run_dir()
    packed = [harness.folder / f"packed-{number}" for number in range(times + 1)]
    for number, step in enumerate([*in_first_epoch, *later, None]):
        book = fault("record_rows", folder=packed[number])
        group = harness.start(project, run_dir, faults=[book], SLURM_RESTART_COUNT=str(number))
        if step is None:
            assert group.wait() == [0, 0], group.told()
            continue
        group.wait_for_step(step)
        stopped_s = time.monotonic()
        group.kill_all(signal.SIGTERM)
        assert group.wait() == [EXIT_INTERRUPTED] * 2, group.told()
        print(f"step {step}: ended {time.monotonic() - stopped_s:.2f} s after SIGTERM")
        assert last_step(run_dir) == checkpoint_steps(run_dir)[-1]
    assert_same_run(run_dir, undisturbed(2, "fsdp"))
    assert_every_row_once(run_dir, project.cache, packed)
    trained = [step for folder in packed for step in trained_rows([folder])]
    assert trained == list(range(1, 201)), "steps were done twice"
    outcomes = [record.get("outcome") for record in attempt_records.records(run_dir / "attempts")]
    assert outcomes == ["interrupted"] * times + ["done"]


@pytest.mark.parametrize(
    "shifts_s",
    [(HOUR_S, HOUR_S), (-HOUR_S, -HOUR_S), (HOUR_S, -HOUR_S), (-HOUR_S, HOUR_S)][: cases(1, 4)],
)
@pytest.mark.parametrize("rank", [0, 1][: cases(1, 2)])
def test_a_wrong_clock_changes_nothing_but_timestamps(
    harness: Harness,
    project: Project,
    undisturbed: Undisturbed,
    rank: int,
    shifts_s: tuple[float, float],
) -> None:
    overrides = ["train.steps=60"]
    run_dir = harness.run_dir()
    wrong = [[fault("clock_shift", rank=rank, seconds=seconds)] for seconds in shifts_s]

    def disturb(group: Group, number: int) -> None:
        if number > 0:
            return
        group.wait_for_step(30)
        # While it holds the run, nobody else gets it, whatever that one takes the time to be.
        other = harness.start(project, run_dir, overrides=overrides, faults=wrong[1])
        assert other.wait_for_end_of(0) == EXIT_USER_ERROR
        other.kill_all()
        assert "is in use by attempt 1" in other.errors(0)
        group.kill(1)

    ended = harness.run_to_end(project, run_dir, faults=wrong, disturb=disturb, overrides=overrides)
    assert ended.restarts == 1
    expected = undisturbed(2, "fsdp", *overrides)
    assert_same_run(run_dir, expected)
    assert checkpoint_steps(run_dir) == checkpoint_steps(expected)
    assert_little_is_lost(run_dir)
    assert [record["attempt"] for record in attempt_records.records(run_dir / "attempts")] == [1, 2]
    assert_time_is_accounted_for(run_dir, ended.groups)


def assert_time_is_accounted_for(run_dir: Path, groups: Sequence[Group]) -> None:
    """Hold the phases of `peft-dist goodput` against the time the harness has measured."""
    figures = goodput(LedgerReader(run_dir / "ledger.jsonl").all())
    assert min(figures.seconds.values()) >= 0.0
    ours_s = figures.total_s - figures.seconds["down"]
    assert math.isclose(ours_s, math.fsum(span.wall_s for span in figures.attempts))
    ends_s = [end[1] if (end := group.ended[0]) else math.nan for group in groups]
    lived_s = math.fsum(
        end_s - group.started_s for end_s, group in zip(ends_s, groups, strict=True)
    )
    # The ledger begins with the process and ends with its last record, at most a step before.
    assert abs(lived_s - ours_s) < 1.0 * len(groups), (lived_s, figures)
