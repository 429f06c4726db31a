"""Row 10: a disk that is full where a run saves, keeps its ledger or says something."""

import errno
import json
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from peft_dist.common.manifest import step_name, verify
from tests.disks import tmpfs
from tests.faults.conftest import Undisturbed
from tests.faults.harness import Group, Harness, Project, fault
from tests.faults.long import cases
from tests.faults.oracles import assert_same_run, checkpoint_steps, records

pytestmark = pytest.mark.distributed

SHORT = (
    "train.steps=60",
    "evaluate.every_steps=null",
    "checkpoint.every_steps=10",
    "checkpoint.keep_last=9",
    "checkpoint.background=false",
)
"""Saved before the next step begins, so that it is known which checkpoints meet the full disk."""
LONGER = ("train.steps=100", "checkpoint.every_steps=5", "checkpoint.max_failed_saves=100")


@pytest.mark.parametrize("seed", range(cases(1, 40)))
def test_checkpoints_that_find_no_room_are_told_and_training_goes_on(
    harness: Harness, project: Project, undisturbed: Undisturbed, seed: int
) -> None:
    expected = undisturbed(2, "fsdp", *SHORT)
    size = records(expected, "saved")[0]["bytes"]
    room = random.Random(seed).randrange(size) if seed else 0
    run = harness.run_dir()
    full = fault("full_disk", under=run / "checkpoints", after_bytes=room, from_step=15, to_step=45)
    overrides = [*SHORT, "checkpoint.max_failed_saves=4"]
    group = harness.start(project, run, overrides=overrides, faults=[full])
    assert group.wait() == [0, 0], group.told()
    failed = records(run, "save_failed")
    assert [record["step"] for record in failed] == [20, 30, 40]
    assert all("No space left" in record["reason"] for record in failed), failed
    assert [record["step"] for record in records(run, "saved")] == [10, 50, 60]
    assert checkpoint_steps(run) == [10, 50, 60]
    for step in (10, 50, 60):
        verify(run / "checkpoints" / step_name(step))
    assert "checkpoint of step 20 was not written" in group.errors(0)
    assert_same_run(run, expected)


def test_saves_that_keep_failing_end_the_run_with_the_code_that_asks_for_a_person(
    harness: Harness, project: Project, undisturbed: Undisturbed
) -> None:
    run = harness.run_dir()
    full = fault("full_disk", under=run / "checkpoints", after_bytes=1000, from_step=15)
    overrides = [*SHORT, "checkpoint.max_failed_saves=3"]
    group = harness.start(project, run, overrides=overrides, faults=[full])
    assert group.wait() == [3, 3], group.told()
    assert "checkpoint.max_failed_saves: 3 checkpoints in a row" in group.errors(0)
    assert [record["step"] for record in records(run, "save_failed")] == [20, 30, 40]
    assert records(run)[-1]["outcome"] == "failed"
    assert checkpoint_steps(run) == [10]
    again = harness.start(project, run, overrides=overrides, restart_count=1)
    assert again.wait() == [3, 3], "torchrun's own restart must not undo the verdict"
    by_hand = harness.start(project, run, overrides=overrides)
    assert by_hand.wait() == [0, 0], by_hand.told()
    assert records(run, "start")[-1]["step"] == 10
    assert_same_run(run, undisturbed(2, "fsdp", *SHORT))


@pytest.mark.parametrize("seed", range(cases(1, 20)))
def test_a_ledger_that_finds_no_room_keeps_its_lines_and_writes_them_later(
    harness: Harness, project: Project, undisturbed: Undisturbed, seed: int
) -> None:
    run, expected = harness.run_dir(), undisturbed(2, "fsdp", *SHORT)
    room = random.Random(seed).randrange(400)
    full = fault(
        "full_disk", under=run / "ledger.jsonl", after_bytes=room, from_step=15, to_step=45
    )
    overrides = [*SHORT, "checkpoint.max_failed_saves=4"]
    group = harness.start(project, run, overrides=overrides, faults=[full])
    assert group.wait() == [0, 0], group.told()
    assert "its events wait in memory" in group.errors(0)
    # No checkpoint may outlive the lines of its steps.
    failed = {(record["step"], record["reason"]) for record in records(run, "save_failed")}
    assert failed == {(step, "ledger.jsonl: No space left on device") for step in (20, 30, 40)}
    assert checkpoint_steps(run) == [10, 50, 60]
    kinds = [
        (record["event"].replace("save_failed", "saved"), record["step"]) for record in records(run)
    ]
    assert kinds == [(record["event"], record["step"]) for record in records(expected)]
    at = [record["at_s"] for record in records(run)]
    assert at == sorted(at)
    assert_same_run(run, expected)


def test_a_ledger_whose_lines_would_be_lost_is_told_with_their_number(
    harness: Harness, project: Project
) -> None:
    run = harness.run_dir()
    full = fault("full_disk", under=run / "ledger.jsonl", after_bytes=50, from_step=55)
    group = harness.start(project, run, overrides=SHORT, faults=[full])
    assert group.wait_for_end_of(0) == 3, group.told()
    assert "ledger.jsonl: cannot be written: No space left on device (" in group.errors(0)
    assert "events not written); free space and start the run again" in group.errors(0)
    by_hand = harness.start(project, run, overrides=SHORT)
    assert by_hand.wait() == [0, 0], by_hand.told()


@pytest.mark.parametrize("stream", ["out", "err"][: cases(1, 2)])
def test_what_is_said_into_a_full_disk_ends_no_training(
    harness: Harness, project: Project, undisturbed: Undisturbed, stream: str
) -> None:
    for number in range(3):
        for rank in range(2):
            path = harness.folder / "ranks" / f"{number}-{rank}.{stream}"
            path.parent.mkdir(exist_ok=True)
            path.symlink_to("/dev/full")
    run = harness.run_dir()
    stop = fault("signal_at", step=25, rank=1, number=signal.SIGTERM)
    group = harness.start(project, run, overrides=SHORT, faults=[stop])
    assert group.wait() == [75, 75], group.told()
    again = harness.start(project, run, overrides=SHORT)
    assert again.wait() == [0, 0], again.told()
    assert records(run, "start")[-1]["step"] == 25
    assert_no_loss(run, undisturbed(2, "fsdp", *SHORT))
    finished = harness.start(project, run, overrides=SHORT)
    assert finished.wait_for_end_of(0) == 2, finished.told()


def assert_no_loss(run: Path, expected: Path) -> None:
    """Like O1; the checkpoint of a stop is one more than the undisturbed run has."""
    assert checkpoint_steps(run) == sorted({25, *checkpoint_steps(expected)})
    assert_same_run(run, expected)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a file system of 4 MiB of its own, where that can be had."""
    with tmpfs(tmp_path / "disk", "size=4m") as folder:
        yield folder


def fill(folder: Path) -> Path:
    """Take every byte that a file system has left."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
    return path


def fill_until_a_save_fails(group: Group, disk: Path, step: int) -> Path:
    group.wait_for_step(step)
    filler = fill(disk)
    group.wait_until(lambda: "was not written" in group.errors(0), "failed save")
    return filler


@pytest.mark.parametrize("seed", range(cases(1, 10)))
def test_a_real_file_system_that_is_full_for_a_while_costs_nothing_but_checkpoints(
    small_disk: Path, harness: Harness, project: Project, undisturbed: Undisturbed, seed: int
) -> None:
    run = small_disk / "run"
    slow = fault("slow_rank", rank=1, seconds=0.02)
    group = harness.start(project, run, overrides=LONGER, faults=[slow])
    filler = fill_until_a_save_fails(group, small_disk, random.Random(seed).randrange(10, 50))
    filler.unlink()
    assert group.wait() == [0, 0], group.told()
    assert records(run, "save_failed")
    assert records(run, "saved")[-1]["step"] == 100
    assert_same_run(run, undisturbed(2, "fsdp", *LONGER))


@pytest.mark.parametrize("seed", range(cases(1, 10)))
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_ends_on_a_full_file_system_goes_on_once_there_is_room(
    small_disk: Path,
    harness: Harness,
    project: Project,
    undisturbed: Undisturbed,
    number: int,
    seed: int,
) -> None:
    run = small_disk / "run"
    slow = fault("slow_rank", rank=1, seconds=0.02)
    group = harness.start(project, run, overrides=LONGER, faults=[slow])
    filler = fill_until_a_save_fails(group, small_disk, random.Random(seed).randrange(10, 50))
    whole = checkpoint_steps(run)[-1]
    group.kill_all(number)
    codes = group.wait()
    # Lines that the ledger could not take are lost with the process: that wants a person.
    assert set(codes) <= ({3, 75} if number == signal.SIGTERM else {-number}), group.told()
    filler.unlink()
    again = harness.start(project, run, overrides=LONGER)
    assert again.wait() == [0, 0], again.told()
    assert records(run, "start")[-1]["step"] >= whole
    attempts = sorted((run / "attempts").glob("????????.json"))
    assert json.loads(attempts[-1].read_text(encoding="utf-8"))["outcome"] == "done"
    assert_same_run(run, undisturbed(2, "fsdp", *LONGER))
