"""Disks that are too small: refused before training, and no trained adapter is thrown away."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from peft_dist.checkpoint import room
from peft_dist.checkpoint.adapter_file import ADAPTER_FILE, load_adapter
from peft_dist.checkpoint.room import needed_bytes, require_room
from peft_dist.common.errors import EXIT_USER_ERROR, RunDirError, TrainingError
from peft_dist.distributed.world import World
from peft_dist.run.directory import RunDir
from tests.disks import tmpfs
from tests.unit.test_checkpoint import trained

ADAPTER_BYTES = 4 * 1_000_000


def test_a_checkpoint_is_the_adapter_and_two_moments_of_it() -> None:
    adapter, one = needed_bytes(1_000_000, keeps_parameters=False, checkpoints=1)
    assert (adapter, one) == (ADAPTER_BYTES, 3 * ADAPTER_BYTES)
    assert needed_bytes(1_000_000, keeps_parameters=True, checkpoints=2)[1] == 8 * ADAPTER_BYTES


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with tmpfs(tmp_path / "disk", "size=128k") as folder:
        yield folder


@pytest.mark.parametrize(
    ("free", "there", "fits"), [(10**4, 0, False), (10**7, 0, True), (10**4, 10**6, True)]
)
def test_free_space_is_compared_with_what_the_run_writes(
    tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch, free: int, there: int, fits: bool
) -> None:
    setup, _ = trained(tmp_path, alone)
    run = RunDir(tmp_path / "run")
    checkpoint = run.checkpoints / "step-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "file").write_bytes(bytes(there))
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    if fits:
        require_room(setup, run)
        return
    with pytest.raises(RunDirError) as caught:
        require_room(setup, run)
    assert caught.value.exit_code == EXIT_USER_ERROR
    told = str(caught.value)
    assert told.startswith(f"{run.path}: 0.0 MB are free, and the run writes 0.")
    assert "an adapter of 0." in told and "and 2 checkpoints of 0." in told
    assert told.endswith("free space, lower checkpoint.keep_last, or name another folder with "
                         "--run-dir")  # fmt: skip


@pytest.mark.parametrize("with_checkpoint", [False, True])
def test_an_adapter_that_finds_no_room_is_kept_where_it_is_said_to_be(
    small_disk: Path,
    tmp_path: Path,
    alone: World,
    monkeypatch: pytest.MonkeyPatch,
    with_checkpoint: bool,
) -> None:
    monkeypatch.setenv("PEFT_DIST_CACHE", str(tmp_path / "cache"))
    setup, saver = trained(tmp_path, alone)
    if with_checkpoint:
        (small_disk / "checkpoints" / "step-00000004").mkdir(parents=True)
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - 8192))
    with pytest.raises(TrainingError) as caught:
        saver.save(small_disk / "adapter")
    told = str(caught.value)
    assert "No space left on device" in told
    assert ("the newest checkpoint is" in told) == with_checkpoint, "none is promised"
    kept = Path(told.rpartition("; the trained adapter is in ")[2])
    assert kept.parent == tmp_path / "cache" / "rescued"
    assert (kept / ADAPTER_FILE).is_file()
    found: dict[str, Any] = load_adapter(kept, setup.method, setup.peft, setup.adapter)
    assert found.keys() == setup.engine.adapter_state().keys()
    assert not list(small_disk.glob("*adapter*"))
