"""Run directories that change under a training: read-only, moved, removed."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from peft_dist.common.errors import ERROR_PREFIX
from tests.faults.conftest import Undisturbed
from tests.faults.harness import Project
from tests.faults.long import cases, only_long
from tests.faults.oracles import (
    adapter_sha256,
    assert_same_run,
    checkpoint_steps,
    final_steps,
    records,
)
from tests.faults.test_launcher import PEFT_DIST, STEPS, Command, Run

pytestmark = pytest.mark.distributed


@pytest.fixture
def run(project: Project, tmp_path: Path) -> Iterator[Run]:
    run = Run(project, tmp_path)
    yield run
    run.close()


def the_line(command: Command, code: int) -> str:
    """See that a command has ended with a code; return the one line that it told."""
    assert command.wait() == code, command.told()
    (line,) = command.told().splitlines()
    assert line.startswith(ERROR_PREFIX)
    return line


OPTIONS = "loop,errors=remount-ro"


class Disk:
    """A file system of its own on a loop device; an error turns it read-only, as on a real one."""

    def __init__(self, folder: Path) -> None:
        """Make and mount it, or skip the test where that needs rights that it has not."""
        self.folder, self._image = folder / "disk", folder / "image"
        self.folder.mkdir()
        with self._image.open("wb") as file:
            file.truncate(32 << 20)
        self._run("mkfs.ext4", "-q", str(self._image))
        self._run("mount", "-o", OPTIONS, str(self._image), str(self.folder))
        found = self._run("findmnt", "-n", "-o", "SOURCE", str(self.folder))
        self._trigger = Path("/sys/fs/ext4", Path(found.strip()).name, "trigger_fs_error")
        if not self._trigger.exists():
            self.unmount()
            pytest.skip("this kernel makes no file system errors")

    def fail(self) -> None:
        """Let it meet an error."""
        self._trigger.write_text("test", encoding="ascii")

    def repair(self) -> None:
        """Unmount it, have it checked, and mount it again, as after a new start of the machine."""
        self.unmount()
        checked = subprocess.run(
            ["fsck.ext4", "-f", "-y", str(self._image)], capture_output=True, check=False
        )
        assert checked.returncode in (0, 1), checked.stdout  # nothing, or all of it corrected
        subprocess.run(["mount", "-o", OPTIONS, self._image, self.folder], check=True)

    def unmount(self) -> None:
        """Unmount it."""
        subprocess.run(["umount", str(self.folder)], check=True)

    @staticmethod
    def _run(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip(f"there is no {command[0]} here")
        if done.returncode:
            pytest.skip(f"{command[0]} needs root and a loop device")
        return done.stdout


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path)
    yield disk
    disk.unmount()


def is_of_step_before(line: str, step: int) -> bool:
    """Whether a line of a ledger is whole, and of a step before this one."""
    try:
        return bool(json.loads(line)["step"] < step)
    except ValueError:  # what was being written when the disk failed
        return False


@pytest.mark.parametrize("loses_lines", [True, False][: cases(1, 2)])
def test_a_run_on_a_file_system_that_turned_read_only_ends_and_goes_on_after_its_repair(
    run: Run, disk: Disk, undisturbed: Undisturbed, loses_lines: bool
) -> None:
    run.path = disk.folder / "run"
    command = run.start("checkpoint.every_steps=5", "parallel.max_restarts=2")
    command.wait_until(lambda: len(checkpoint_steps(run.path)) > 1, "checkpoints")
    disk.fail()
    assert "Read-only file system" in the_line(command, 3)
    disk.repair()
    saved = checkpoint_steps(run.path)[-1]
    # What was synced is there: no line of a step before a checkpoint is lost with the device.
    assert set(range(1, saved + 1)) <= set(final_steps(run.path))
    if loses_lines:  # as a device that lies about what it has written would
        path = run.path / "ledger.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if is_of_step_before(line, saved - 2)]
        path.write_text("".join(kept), encoding="utf-8")
    again = run.command("resume", str(run.path))
    assert again.wait() == 0, again.told()
    assert adapter_sha256(run.path) == adapter_sha256(undisturbed(2, "fsdp", *STEPS))
    gap = f"steps {saved - 2} to {saved} are not in the ledger" if loses_lines else None
    gaps = [(record["from_step"], record["to_step"]) for record in records(run.path, "gap")]
    assert gaps == ([(saved - 2, saved)] if loses_lines else [])
    for words in (("goodput", str(run.path)), ("status", str(run.path)),
                  ("report", str(run.path), "--out", str(run.folder / "report.html"))):  # fmt: skip
        told = subprocess.run(
            [*PEFT_DIST, *words], capture_output=True, text=True, check=True, cwd=run.folder
        ).stdout
        if words[0] == "report":
            told = (run.folder / "report.html").read_text(encoding="utf-8")
        assert (gap in told) if gap else ("not in the ledger" not in told), (words, told[-2000:])


@only_long
def test_a_read_only_file_system_ends_a_run_that_saves_nothing_by_itself(
    run: Run, disk: Disk
) -> None:
    run.path = disk.folder / "run"
    command = run.start("checkpoint.every_steps=null", "parallel.max_restarts=2")
    run.wait_for_step(command, 20)
    disk.fail()
    assert "Read-only file system" in the_line(command, 3)


def test_a_run_directory_that_is_moved_while_it_trains_is_told_in_one_line(
    run: Run, undisturbed: Undisturbed
) -> None:
    command = run.start("parallel.max_restarts=2")
    run.wait_for_step(command, 40)
    elsewhere = run.path.with_name("elsewhere")
    run.path.rename(elsewhere)
    line = the_line(command, 2)
    assert f"{run.path}: is gone; " in line
    assert "if it was moved, go on with `peft-dist resume NEW_PLACE`" in line
    assert not run.path.exists()
    assert checkpoint_steps(elsewhere)
    run.path = elsewhere
    again = run.command("resume", str(elsewhere))
    assert again.wait() == 0, again.told()
    assert_same_run(elsewhere, undisturbed(2, "fsdp", *STEPS))


@only_long
def test_a_run_directory_that_is_removed_while_it_trains_is_told_in_one_line(run: Run) -> None:
    command = run.start()
    run.wait_for_step(command, 20)
    shutil.rmtree(run.path, ignore_errors=True)
    while run.path.exists():  # a file came while its folder was emptied
        shutil.rmtree(run.path, ignore_errors=True)
    assert f"{run.path}: is gone; " in the_line(command, 2)
    assert not run.path.exists()
