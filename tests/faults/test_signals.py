"""Ranks that are told to stop: all save the same step once, and soon, and the run goes on later."""

import math
import random
import signal
import time
from pathlib import Path

import pytest

from peft_dist.common.errors import EXIT_CRASHED, EXIT_INTERRUPTED
from peft_dist.run import attempt_records
from peft_dist.worker.signals import STOP_SIGNALS
from tests.faults.conftest import Undisturbed
from tests.faults.harness import Fault, Group, Harness, fault
from tests.faults.hooks import ALL
from tests.faults.long import cases
from tests.faults.oracles import assert_same_run, checkpoint_steps, last_step, records
from tests.faults.project import Project

pytestmark = pytest.mark.distributed

SHORT = (
    "train.steps=40",
    "checkpoint.every_steps=10",
    "evaluate.every_steps=20",
    "evaluate.micro_batch_size=1",
)
STOP_S = 2.0
"""How long an end may take, besides the rest of a step and a save."""
SLACK_S = 4.0
"""For ten other processes on the same two cores."""
WHOM = (ALL, 1, 0)
SENT = [
    (strategy, number, (WHOM[(index + turn) % 3]))
    for turn in range(3)
    for strategy in ("fsdp", "ddp", "zero2")
    for index, number in enumerate(STOP_SIGNALS)
]
"""Every signal in every way under every strategy; of the first ones each signal is another."""


def send(group: Group, whom: int, number: int) -> float:
    """Send a signal to one rank or all; return when, in `time.monotonic()`."""
    sent_s = time.monotonic()
    for rank in range(group.world_size):
        if whom in (ALL, rank):
            assert group.kill(rank, number), group.told()
    return sent_s


def assert_stopped(group: Group, sent_s: float, *, besides_s: float = 0.0) -> None:
    """See that all ranks have saved where they stopped, once, and ended soon, and said so.

    Args:
        group: The ranks.
        sent_s: When the first signal was sent.
        besides_s: What a planted delay adds to the step and the saves.
    """
    assert group.wait() == [EXIT_INTERRUPTED] * group.world_size, group.told()
    took_s = max(end[1] for end in group.ended if end) - sent_s
    run_dir, step = group.run_dir, last_step(group.run_dir)
    steps_s = [record["tokens"] / record["tokens_per_s"] for record in records(run_dir, "step")]
    saves_s = [record["write_s"] for record in records(run_dir, "saved")][-2:]
    print(f"ended {took_s:.2f} s after the signal, at step {step}, saves {saves_s}")
    allowed_s = max(steps_s, default=0.0) + math.fsum(saves_s) + besides_s + STOP_S
    assert took_s < allowed_s + SLACK_S, (took_s, allowed_s)
    assert_ended_as_interrupted(run_dir, step)
    if step:
        assert checkpoint_steps(run_dir)[-1] == step
    for event in ("checkpoint", "saved"):
        steps = [record["step"] for record in records(run_dir, event)]
        assert len(steps) == len(set(steps)), f"{event} twice: {steps}"


def assert_ended_as_interrupted(run_dir: Path, step: int) -> None:
    """See that the lease and the ledger both say how the attempt ended."""
    assert [a.get("outcome") for a in attempt_records.records(run_dir / "attempts")] == [
        "interrupted"
    ]
    (end,) = records(run_dir, "end")
    assert (end["outcome"], end["step"]) == ("interrupted", step)
    assert not (run_dir / "failure.json").exists()


def resume(
    harness: Harness, project: Project, run_dir: Path, expected: Path, strategy: str = "fsdp"
) -> None:
    """Start a run again and hold it against the undisturbed one."""
    group = harness.start(project, run_dir, overrides=SHORT, strategy=strategy)
    assert group.wait() == [0, 0], group.told()
    assert_same_run(run_dir, expected)


@pytest.mark.parametrize(("strategy", "number", "whom"), SENT[: cases(3, len(SENT))])
def test_a_signal_makes_all_ranks_save_one_step_and_end(
    harness: Harness,
    project: Project,
    undisturbed: Undisturbed,
    strategy: str,
    number: int,
    whom: int,
) -> None:
    run_dir = harness.run_dir()
    group = harness.start(project, run_dir, overrides=SHORT, strategy=strategy)
    group.wait_for_step(random.Random(number).randint(3, 34))
    assert_stopped(group, send(group, whom, number))
    resume(harness, project, run_dir, undisturbed(2, strategy, *SHORT), strategy)


IN_SETUP = [
    ("tokenising", 1, signal.SIGTERM),
    ("loading", 0, signal.SIGTERM),
    ("loading", 1, signal.SIGUSR1),
    ("loading", ALL, signal.SIGTERM),
    *[("tokenising", whom, number) for whom in WHOM for number in STOP_SIGNALS],
]


def loading(
    harness: Harness, project: Project, run_dir: Path, where: str = "loading"
) -> tuple[Group, dict[str, str]]:
    """Return ranks that will be loading for a minute, and what torchrun has told them."""
    told = {"TORCHELASTIC_RUN_ID": "one launch"}
    planted = fault("slow", rank=ALL, where=where, seconds=60.0)
    group = harness.start(project, run_dir, overrides=SHORT, faults=[planted], **told)
    group.wait_until(lambda: bool(attempt_records.records(run_dir / "attempts")), "lease")
    time.sleep(1.0)
    return group, told


@pytest.mark.parametrize(("where", "whom", "number"), IN_SETUP[: cases(2, len(IN_SETUP))])
def test_a_signal_during_setup_ends_it_at_once_and_torchrun_does_not_undo_it(
    harness: Harness,
    project: Project,
    undisturbed: Undisturbed,
    where: str,
    whom: int,
    number: signal.Signals,
) -> None:
    run_dir = harness.run_dir()
    group, told = loading(harness, project, run_dir, where)
    sent_s = send(group, whom, number)
    for rank in range(2):
        if whom in (ALL, rank):
            assert group.wait_for_end_of(rank) == EXIT_INTERRUPTED, group.told()
    took_s = time.monotonic() - sent_s
    print(f"ended {took_s:.2f} s after the signal")
    assert took_s < STOP_S + SLACK_S
    group.kill_all(signal.SIGTERM)  # as torchrun does, before it starts all of them again
    # One that has met the others already may lose one before it is told itself.
    assert set(group.wait()) <= {EXIT_INTERRUPTED, EXIT_CRASHED}, group.told()
    again = harness.start(project, run_dir, overrides=SHORT, restart_count=1, **told)
    assert again.wait() == [EXIT_INTERRUPTED] * 2, again.told()
    assert not records(run_dir)
    outcomes = [record.get("outcome") for record in attempt_records.records(run_dir / "attempts")]
    assert outcomes == ["interrupted"]
    resume(harness, project, run_dir, undisturbed(2, "fsdp", *SHORT))


@pytest.mark.parametrize("rank", [1, 0][: cases(1, 2)])
def test_the_sigterm_that_torchrun_sends_after_a_crash_in_setup_stops_nothing(
    harness: Harness, project: Project, undisturbed: Undisturbed, rank: int
) -> None:
    run_dir = harness.run_dir()
    group, told = loading(harness, project, run_dir)
    group.kill(rank)
    assert group.wait_for_end_of(rank) == -signal.SIGKILL
    group.kill(1 - rank, signal.SIGTERM)
    assert group.wait_for_end_of(1 - rank) == EXIT_INTERRUPTED
    again = harness.start(project, run_dir, overrides=SHORT, restart_count=1, **told)
    assert again.wait() == [0, 0], again.told()
    outcomes = [record.get("outcome") for record in attempt_records.records(run_dir / "attempts")]
    assert outcomes == [None, "done"]
    assert_same_run(run_dir, undisturbed(2, "fsdp", *SHORT))


@pytest.mark.parametrize("whom", [1, 0, ALL][: cases(1, 3)])
@pytest.mark.parametrize("step", [0, 20, 40])
def test_an_evaluation_that_is_stopped_is_done_again(
    harness: Harness, project: Project, undisturbed: Undisturbed, step: int, whom: int
) -> None:
    run_dir, per_batch_s = harness.run_dir(), 0.3
    planted = fault("slow", rank=1, where="evaluation", seconds=per_batch_s, from_step=step)
    group = harness.start(project, run_dir, overrides=SHORT, faults=[planted])
    if step:
        group.wait_for_step(step)
    else:
        group.wait_until(lambda: bool(records(run_dir, "start")), "start")
    time.sleep(per_batch_s)
    assert_stopped(group, send(group, whom, signal.SIGUSR1), besides_s=per_batch_s)
    assert last_step(run_dir) == step
    done = [record["step"] for record in records(run_dir, "evaluation")]
    assert done == [before for before in (0, 20) if before < step]
    resume(harness, project, run_dir, undisturbed(2, "fsdp", *SHORT))
    assert [record["step"] for record in records(run_dir, "evaluation")] == [0, 20, 40]


def slow_checkpoints(run_dir: Path) -> Fault:
    """Let every checkpoint take about two seconds to write."""
    return fault("slow_disk", under=run_dir / "checkpoints", seconds=0.06)


@pytest.mark.parametrize("whom", WHOM[: cases(1, 3)])
def test_a_signal_while_a_checkpoint_is_written_waits_for_it(
    harness: Harness, project: Project, undisturbed: Undisturbed, whom: int
) -> None:
    run_dir = harness.run_dir()
    group = harness.start(project, run_dir, overrides=SHORT, faults=[slow_checkpoints(run_dir)])
    making = run_dir / "checkpoints"
    group.wait_until(lambda: any(making.glob(".step-00000010-*")), "checkpoint being written")
    sent_s = send(group, whom, signal.SIGTERM)
    assert not records(run_dir, "saved")
    assert_stopped(group, sent_s)
    assert records(run_dir, "saved")[0]["step"] == 10
    resume(harness, project, run_dir, undisturbed(2, "fsdp", *SHORT))


@pytest.mark.parametrize("seed", range(cases(1, 10)))
def test_signals_during_the_save_change_nothing(
    harness: Harness, project: Project, undisturbed: Undisturbed, seed: int
) -> None:
    dice, run_dir = random.Random(seed), harness.run_dir()
    group = harness.start(project, run_dir, overrides=SHORT, faults=[slow_checkpoints(run_dir)])
    group.wait_for_step(3)
    sent_s = send(group, ALL, signal.SIGTERM)
    group.wait_until(lambda: bool(records(run_dir, "checkpoint")), "save")
    for number in dice.choices(STOP_SIGNALS, k=2):
        time.sleep(dice.uniform(0.0, 0.5))
        send(group, dice.choice(WHOM), number)
    assert not records(run_dir, "saved")
    assert_stopped(group, sent_s)
    assert checkpoint_steps(run_dir) == [last_step(run_dir)]
    resume(harness, project, run_dir, undisturbed(2, "fsdp", *SHORT))


@pytest.mark.parametrize("whom", WHOM[: cases(1, 3)])
@pytest.mark.parametrize("step", [1, 40])
def test_a_signal_in_the_first_or_last_step_is_obeyed_after_it(
    harness: Harness, project: Project, undisturbed: Undisturbed, step: int, whom: int
) -> None:
    run_dir = harness.run_dir()
    planted = fault("signal_at", step=step, rank=whom, number=int(signal.SIGINT))
    group = harness.start(project, run_dir, overrides=SHORT, faults=[planted])
    group.wait_for_step(step)
    assert_stopped(group, time.monotonic())
    assert last_step(run_dir) == step
    resume(harness, project, run_dir, undisturbed(2, "fsdp", *SHORT))


@pytest.mark.parametrize("whom", WHOM[: cases(1, 3)])
def test_a_signal_during_the_final_save_is_too_late_to_stop_it(
    harness: Harness, project: Project, undisturbed: Undisturbed, whom: int
) -> None:
    run_dir = harness.run_dir()
    planted = fault("slow", rank=ALL, where="final save", seconds=1.0)
    group = harness.start(project, run_dir, overrides=SHORT, faults=[planted])

    def has_saved() -> bool:
        return any(record["step"] == 40 for record in records(run_dir, "saved"))

    group.wait_until(has_saved, "last checkpoint")
    for number in (signal.SIGTERM, signal.SIGINT):
        time.sleep(0.2)
        send(group, whom, number)
    assert not (run_dir / "adapter").exists()
    assert group.wait() == [0, 0], group.told()
    assert [record["step"] for record in records(run_dir, "checkpoint")] == [10, 20, 30, 40]
    assert_same_run(run_dir, undisturbed(2, "fsdp", *SHORT))


def test_a_rank_has_no_child_processes_while_it_trains(harness: Harness, project: Project) -> None:
    group = harness.start(project, harness.run_dir(), world_size=2)
    group.wait_for_step(5)
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = status.read_text(encoding="utf-8", errors="replace")
        except OSError:  # ended meanwhile
            continue
        parents[int(status.parent.name)] = int(text.rpartition(")")[2].split()[1])
    assert group.codes == [None, None], group.told()
    assert all(parents[pid] == harness.nursery.pid for pid in group.pids)
    assert not [pid for pid, parent in parents.items() if parent in group.pids]
