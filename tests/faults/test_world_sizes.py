"""One run on four processes, two, one and four again, on another engine each time."""

import signal
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from peft_dist.common.errors import EXIT_INTERRUPTED
from tests.faults.conftest import Undisturbed
from tests.faults.harness import Harness, fault
from tests.faults.long import cases
from tests.faults.oracles import (
    adapter_sha256,
    assert_every_row_once,
    final_steps,
    records,
    trained_rows,
)
from tests.faults.project import Project

pytestmark = pytest.mark.distributed

# Dropout is another on another number of processes.
OVERRIDES = ("method.dropout=0", "train.steps=100", "checkpoint.every_steps=50")
World = tuple[int, str]
WORLDS: list[Sequence[World]] = [
    [(4, "fsdp"), (2, "ddp"), (1, "ddp"), (2, "zero3"), (4, "hsdp")],
    [(4, "hsdp"), (2, "zero2"), (1, "fsdp"), (4, "zero3")],
    [(1, "ddp"), (4, "ddp"), (2, "fsdp"), (4, "zero2"), (1, "zero3")],
    [(2, "zero3"), (1, "zero2"), (4, "fsdp"), (2, "hsdp"), (4, "ddp")],
]
STOPS = (15, 40, 60, 85)
"""After these steps the world changes; an epoch ends at 75."""


@pytest.mark.parametrize("worlds", WORLDS[: cases(1, len(WORLDS))])
def test_a_run_that_changes_its_world_takes_every_row_once_and_keeps_its_losses(
    harness: Harness, project: Project, undisturbed: Undisturbed, worlds: Sequence[World]
) -> None:
    run_dir = harness.run_dir()
    packed = [harness.folder / f"packed-{number}" for number in range(len(worlds))]
    stops = STOPS[: len(worlds) - 1]
    for (world_size, strategy), folder, stop in zip(worlds, packed, [*stops, None], strict=True):
        faults = [fault("record_rows", folder=folder)]
        if stop is not None:
            faults.append(fault("signal_at", step=stop, rank=0, number=signal.SIGTERM, to="group"))
        group = harness.start(
            project, run_dir, world_size=world_size, strategy=strategy,
            overrides=OVERRIDES, faults=faults,
        )  # fmt: skip
        code = 0 if stop is None else EXIT_INTERRUPTED
        assert set(group.wait()) == {code}, group.told()
    assert_every_row_once(run_dir, project.cache, packed)
    trained = [step for folder in packed for step in trained_rows([folder])]
    assert trained == list(range(1, 101)), "steps were done twice"
    starts = records(run_dir, "start")
    assert [(r["world_size"], r["strategy"]) for r in starts] == list(worlds)
    expected = undisturbed(*worlds[0], *OVERRIDES)
    differences = loss_differences(run_dir, expected)
    first = [differences[record["step"] + 1] for record in starts]
    print(f"largest difference {max(differences.values())}, at first steps {first}")
    assert max(first) <= 1e-6
    assert max(differences.values()) <= 1e-5
    assert adapter_sha256(run_dir) != adapter_sha256(expected), "the world has not changed at all"


def test_a_streamed_run_whose_whole_group_is_told_to_stop_goes_on_with_other_processes(
    harness: Harness, project: Project, undisturbed: Undisturbed
) -> None:
    run_dir, streamed = harness.run_dir(), (*OVERRIDES, "data.streaming=true")
    group = harness.start(project, run_dir, strategy="ddp", overrides=streamed)
    group.wait_for_step(15)
    readers = [one for pid in group.pids for one in psutil.Process(pid).children(recursive=True)]
    assert len(readers) >= 2, "each rank has a process that reads ahead"
    for reader in readers:  # a scheduler tells every process of a job
        reader.send_signal(signal.SIGTERM)
    group.kill_all(signal.SIGTERM)
    assert set(group.wait()) == {EXIT_INTERRUPTED}, group.told()
    group = harness.start(project, run_dir, world_size=1, strategy="ddp", overrides=streamed)
    assert set(group.wait()) == {0}, group.told()
    steps = [record["step"] for record in records(run_dir, "step")]
    assert steps == list(range(1, 101)), "steps were done twice"
    differences = loss_differences(run_dir, undisturbed(2, "ddp", *OVERRIDES))
    assert max(differences.values()) <= 1e-5


def loss_differences(run: Path, other: Path) -> dict[int, float]:
    """Return by step how far the losses of two runs lie apart."""
    ours, theirs = final_steps(run), final_steps(other)
    return {step: abs(ours[step]["loss"] - theirs[step]["loss"]) for step in sorted(ours)}
