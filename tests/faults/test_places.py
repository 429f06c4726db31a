"""Run directories that change under a training: read-only, moved, removed."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from peft_dist.common.errors import ERROR_PREFIX
from tests.faults.conftest import Undisturbed
from tests.faults.harness import Project
from tests.faults.long import cases
from tests.faults.oracles import assert_same_run, checkpoint_steps
from tests.faults.test_launcher import STEPS, Command, Run

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


class Disk:
    """A file system of its own on a loop device; an error turns it read-only, as on a real one."""

    def __init__(self, folder: Path) -> None:
        """Make and mount it, or skip the test where that needs rights that it has not."""
        self.folder, self._image = folder / "disk", folder / "image"
        self.folder.mkdir()
        with self._image.open("wb") as file:
            file.truncate(32 << 20)
        self._run("mkfs.ext4", "-q", str(self._image))
        options = "loop,errors=remount-ro"
        self._run("mount", "-o", options, str(self._image), str(self.folder))
        found = self._run("findmnt", "-n", "-o", "SOURCE", str(self.folder))
        self._trigger = Path("/sys/fs/ext4", Path(found.strip()).name, "trigger_fs_error")
        if not self._trigger.exists():
            self.unmount()
            pytest.skip("this kernel makes no file system errors")

    def fail(self) -> None:
        """Let it meet an error."""
        self._trigger.write_text("test", encoding="ascii")

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


@pytest.mark.parametrize(
    "saves", ["checkpoint.every_steps=5", "checkpoint.every_steps=null"][: cases(1, 2)]
)
def test_a_file_system_that_turns_read_only_ends_the_run_with_the_code_that_nobody_restarts(
    run: Run, disk: Disk, saves: str
) -> None:
    run.path = disk.folder / "run"
    command = run.start(saves, "parallel.max_restarts=2")
    run.wait_for_step(command, 20)
    disk.fail()
    line = the_line(command, 3)
    assert "Read-only file system" in line


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


def test_a_run_directory_that_is_removed_while_it_trains_is_told_in_one_line(run: Run) -> None:
    command = run.start()
    run.wait_for_step(command, 20)
    shutil.rmtree(run.path, ignore_errors=True)
    while run.path.exists():  # a file came while its folder was emptied
        shutil.rmtree(run.path, ignore_errors=True)
    assert f"{run.path}: is gone; " in the_line(command, 2)
    assert not run.path.exists()
