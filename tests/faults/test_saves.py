"""Power that fails at each single change of a file: the run goes on from a whole checkpoint."""

import json
import random
import signal
from pathlib import Path

import pytest

from peft_dist.common.manifest import step_name, verify
from tests.faults.conftest import Undisturbed
from tests.faults.harness import Fault, Harness, fault
from tests.faults.long import cases
from tests.faults.oracles import assert_same_run, checkpoint_steps, records
from tests.faults.project import Project

pytestmark = pytest.mark.distributed

SHORT = (
    "train.steps=8",
    "evaluate.every_steps=null",
    "checkpoint.every_steps=4",
    "checkpoint.keep_last=1",
)
"""Two checkpoints; the second one's save removes the first."""
CHANGES = 59
"""Of files and folders below checkpoints/ in such a training."""
FIRST_CHANGES = 22
"""From the folder that a new run is made in to the lease of its first attempt."""
LAST_CHANGES = 28
"""From the first file of the finished adapter to the lease's last word."""
MAKING, ADAPTER = ".partial-", "/.adapter."
"""In the paths of the folders that a run and its adapter are written in."""


def cuts(short: int, changes: int) -> list[int]:
    """Return which changes to cut, from 1: a few at random, or each."""
    return sorted(random.Random(0).sample(range(1, changes + 1), cases(short, changes)))


def changes_of(harness: Harness, project: Project, since: str) -> list[tuple[str, Path]]:
    """Train without being disturbed; return the changes from the first with a text in its path."""
    # Beside what is watched, or writing it down would be a change.
    book = harness.folder.with_name(f"{harness.folder.name}-changes.jsonl")
    watched = fault("log_file_operations", under=harness.folder, into=book)
    group = harness.start(project, harness.run_dir(), overrides=SHORT, faults=[watched])
    assert group.wait() == [0, 0], group.told()
    lines = book.read_text(encoding="utf-8").splitlines()
    changes = [(name, Path(path)) for name, path in map(json.loads, lines)]
    first = next(index for index, (_, path) in enumerate(changes) if since in str(path))
    return changes[first:]


def cut(harness: Harness, project: Project, run_dir: Path, planted: Fault) -> None:
    """Train until the power fails."""
    group = harness.start(project, run_dir, overrides=SHORT, faults=[planted])
    assert group.wait()[0] == -signal.SIGKILL, group.told()  # rank 1 may have been done


def assert_goes_on(
    harness: Harness, project: Project, run_dir: Path, undisturbed: Undisturbed
) -> None:
    """Start the run again, once; it must go on from its best checkpoint to the same end."""
    whole = []
    for step in checkpoint_steps(run_dir):
        verify(run_dir / "checkpoints" / step_name(step))
        whole.append(step)
    finished = (run_dir / "result.json").exists()
    group = harness.start(project, run_dir, overrides=SHORT, SLURM_RESTART_COUNT="1")
    assert group.wait() == [0, 0], group.told()
    starts = [record["step"] for record in records(run_dir, "start")]
    assert len(starts) == 1 if finished else starts[-1] == max(whole, default=0)
    expected = undisturbed(2, "fsdp", *SHORT)
    assert_same_run(run_dir, expected)
    # What stands there is what a run that was never cut leaves, and not a file more: but for the
    # attempts, and a checkpoint that was to make room for the last one.
    extra = {path.relative_to(run_dir) for path in run_dir.rglob("*")} - {
        path.relative_to(expected) for path in expected.rglob("*")
    }
    assert {path.parts[0] for path in extra} <= {"attempts", "checkpoints"}, extra
    assert set(checkpoint_steps(run_dir)) <= {4, 8}


def test_all_changes_are_cut(harness: Harness, project: Project) -> None:
    changes = changes_of(harness, project, MAKING)
    begun_with = changes[FIRST_CHANGES - 1]
    assert begun_with[0] == "os.remove" and begun_with[1].name.startswith(".00000001.json")
    checkpoints = harness.run_dir() / "checkpoints"
    assert sum(path.is_relative_to(checkpoints) for _, path in changes) == CHANGES
    last = next(index for index, (_, path) in enumerate(changes) if ADAPTER in str(path))
    # Beats of the lease may come in between.
    assert LAST_CHANGES <= len(changes) - last <= LAST_CHANGES + 3
    # The names in the adapter's folder are on the disk before the folder has its own.
    renamed = changes.index(("os.rename", harness.run_dir() / "adapter"))
    assert ("fsync", changes[last][1]) in changes[last:renamed]


def test_the_ledger_is_on_the_disk_before_a_checkpoint_has_its_name(
    harness: Harness, project: Project
) -> None:
    changes = changes_of(harness, project, MAKING)
    run_dir = harness.run_dir()
    written, synced = ("write", run_dir / "ledger.jsonl"), ("fsync", run_dir / "ledger.jsonl")
    for step in (4, 8):
        name = step_name(step)
        renamed = changes.index(("os.rename", run_dir / "checkpoints" / name))
        # The folder that becomes the checkpoint is made once all lines up to its step are written.
        begun = next(
            index for index, (_, path) in enumerate(changes) if path.name.startswith(f".{name}-a")
        )
        assert written in changes[:begun] and synced in changes[begun:renamed]
    # So is the ledger's own name.
    assert ("fsync", run_dir) in changes[changes.index(synced) : renamed]


@pytest.mark.parametrize("change", cuts(5, CHANGES))
def test_a_save_that_is_cut_anywhere_leaves_a_checkpoint_to_go_on_from(
    harness: Harness, project: Project, undisturbed: Undisturbed, change: int
) -> None:
    run_dir = harness.run_dir()
    under = run_dir / "checkpoints"
    cut(harness, project, run_dir, fault("kill_at_file_operation", n=change, under=under))
    assert_goes_on(harness, project, run_dir, undisturbed)


@pytest.mark.parametrize("change", cuts(3, LAST_CHANGES))
def test_an_end_that_is_cut_anywhere_is_made_up_for(
    harness: Harness, project: Project, undisturbed: Undisturbed, change: int
) -> None:
    run_dir = harness.run_dir()
    at = fault("kill_at_file_operation", n=change, under=run_dir, since=ADAPTER)
    cut(harness, project, run_dir, at)
    assert_goes_on(harness, project, run_dir, undisturbed)


@pytest.mark.parametrize("change", cuts(2, FIRST_CHANGES))
def test_a_beginning_that_is_cut_anywhere_is_made_up_for(
    harness: Harness, project: Project, undisturbed: Undisturbed, change: int
) -> None:
    run_dir = harness.run_dir()
    at = fault("kill_at_file_operation", n=change, under=harness.folder, since=MAKING)
    cut(harness, project, run_dir, at)
    assert_goes_on(harness, project, run_dir, undisturbed)
