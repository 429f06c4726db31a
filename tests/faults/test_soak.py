"""Row 25: one run, every kind of fault at random times, for a while; then O1 and the books."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from peft_dist.common.manifest import step_name
from peft_dist.ledger.goodput import goodput
from peft_dist.ledger.reader import LedgerReader
from tests.faults.harness import Group, Harness, Project, fault
from tests.faults.long import cases, only_long
from tests.faults.mutations import KINDS
from tests.faults.oracles import assert_same_run, checkpoint_steps, last_step, records

pytestmark = pytest.mark.distributed

STEPS = cases(220, 12000)
BETWEEN_FAULTS_S = cases(4, 25)
"""Mean time from the first step of a group to its fault; the start of the next comes on top."""
STEP_S = 0.08
"""What a step is slowed to, so that the run lasts 40 s, or 20 minutes."""
OVERRIDES = (
    f"train.steps={STEPS}",
    "evaluate.every_steps=null",
    "checkpoint.every_steps=10",
    "checkpoint.keep_last=4",
    "checkpoint.max_failed_saves=100",
    "watchdog.min_s=3",
)
NANS = [STEPS // 10, STEPS // 3, STEPS // 2]
"""Steps whose loss is not finite, whoever comes to them and however often."""
DAMAGE = ("truncated", "bit flipped", "0 bytes", "missing", "within")


def kill_one(group: Group, rng: random.Random) -> None:
    """Kill one rank; the other is ended by the launcher."""
    group.kill(rng.randrange(group.world_size))
    group.wait_for_trouble()
    group.kill_all()


def kill_all(group: Group, _rng: random.Random) -> None:
    """Kill all ranks at once."""
    group.kill_all()


def stop_one(group: Group, rng: random.Random) -> None:
    """Ask one rank to stop; all do, after a save."""
    group.kill(rng.randrange(group.world_size), rng.choice([signal.SIGTERM, signal.SIGUSR1]))
    assert set(group.wait()) <= {75, 0}, group.told()


def stop_all(group: Group, _rng: random.Random) -> None:
    """Ask all ranks to stop."""
    group.kill_all(signal.SIGTERM)
    assert set(group.wait()) <= {75, 0}, group.told()


def freeze_one(group: Group, rng: random.Random) -> None:
    """Let one rank stand still; the watchdog of the other one ends it."""
    rank = rng.randrange(group.world_size)
    group.kill(rank, signal.SIGSTOP)
    code = group.wait_for_end_of(1 - rank, 60.0)
    # A rank that has done its part already has nobody to wait for.
    assert code == 1 or last_step(group.run_dir) == STEPS, group.told()
    group.kill_all()


def damage_newest(group: Group, rng: random.Random) -> None:
    """Kill all ranks, and damage the newest checkpoint before the next group starts."""
    group.kill_all()
    steps = checkpoint_steps(group.run_dir)
    if len(steps) > 1:
        folder = group.run_dir / "checkpoints" / step_name(steps[-1])
        KINDS[rng.choice(DAMAGE)](folder, rng)


FAULTS: list[Callable[[Group, random.Random], None]] = [
    kill_one, kill_all, stop_one, stop_all, freeze_one, damage_newest,
]  # fmt: skip


@only_long
@pytest.mark.timeout(cases(600, 3600))
def test_a_run_under_steady_fire_comes_to_the_same_end(harness: Harness, project: Project) -> None:
    rng, run = random.Random(0), harness.run_dir()
    nans = [fault("nan_at", step=step, rank=step % 2) for step in NANS]
    expected = harness.run_dir("undisturbed")
    calm = harness.start(project, expected, overrides=OVERRIDES, faults=nans)
    assert calm.wait(cases(120, 1200)) == [0, 0], calm.told()

    started_time, tried, coming = time.time(), [], []
    while True:
        full_from = last_step(run) + rng.randrange(5, 20)
        full = fault(
            "full_disk",
            under=run / "checkpoints",
            after_bytes=rng.randrange(20_000),
            from_step=full_from,
            # the last save is the one that the run is judged by
            to_step=min(full_from + rng.randrange(5, 25), STEPS - 5),
        )
        slow = fault("slow_rank", rank=rng.randrange(2), seconds=STEP_S)
        group = harness.start(
            project,
            run,
            overrides=OVERRIDES,
            faults=[*nans, slow, *([full] * (len(tried) % 2))],
        )
        coming = coming or rng.sample(FAULTS, len(FAULTS))
        act = coming.pop()
        if strike(group, act, rng):
            break
        tried.append(act.__name__)
    ended_time = records(run)[-1]["time"]

    print(f"\n{len(tried)} faults in {ended_time - started_time:.0f} s: {', '.join(tried)}")
    print(f"failed saves: {len(records(run, 'save_failed'))}")
    assert len(tried) >= cases(4, 25)
    assert_same_run(run, expected)
    assert {record["step"] for record in records(run, "skipped")} == set(NANS)
    assert_books_balance(run, ended_time - started_time)


def strike(group: Group, act: Callable[[Group, random.Random], None], rng: random.Random) -> bool:
    """Let a group train for a while, then let a fault strike it; return whether the run is done."""
    group.wait_until(lambda: group.step() > 0 or None not in group.codes, "first step")
    until = time.monotonic() + rng.uniform(0.4, 1.6) * BETWEEN_FAULTS_S
    while time.monotonic() < until and None in group.codes:
        time.sleep(0.05)
    if None in group.codes:
        act(group, rng)
    codes = group.wait()
    assert set(codes) <= {0, 1, 75, -signal.SIGKILL}, group.told()
    return set(codes) == {0}


def assert_books_balance(run: Path, wall_s: float) -> None:
    """See that the ledger accounts for every second from the first start to the last record."""
    figures = goodput(LedgerReader(run / "ledger.jsonl").all())
    print({phase: round(seconds, 2) for phase, seconds in figures.seconds.items()})
    assert figures.total_s == pytest.approx(wall_s, rel=0.01)
    assert all(seconds >= 0 for seconds in figures.seconds.values())
    assert figures.seconds["down"] > 0
    assert figures.seconds["lost_work"] > 0
