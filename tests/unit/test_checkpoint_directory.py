"""A folder of checkpoints: whole ones under a step's name, whatever is killed and whenever."""

import errno
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from peft_dist.checkpoint import directory
from peft_dist.checkpoint.directory import (
    clean,
    folders,
    newest_good,
    prune,
    publish,
    set_aside,
    step_of,
    work_folder,
)
from peft_dist.common.manifest import seal, step_name, verify
from tests.processes import ROOT


def write(checkpoints: Path, step: int, attempt: int) -> Path:
    partial = work_folder(checkpoints, step, attempt)
    (partial / "adapter").mkdir()
    (partial / "adapter" / "adapter_model.safetensors").write_text(f"{step} {attempt}")
    (partial / "state.json").write_text("{}")
    seal(partial, {"step": step, "attempt": attempt})
    return partial


def save(checkpoints: Path, step: int, attempt: int = 1) -> Path:
    folder = checkpoints / step_name(step)
    publish(write(checkpoints, step, attempt), folder)
    return folder


def steps(checkpoints: Path) -> list[int]:
    return [step_of(folder) for folder in folders(checkpoints)]


def hidden(checkpoints: Path) -> list[str]:
    return [path.name for path in checkpoints.iterdir() if path.name.startswith(".")]


def names(checkpoints: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.iterdir())


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def test_a_folder_that_is_not_there_holds_no_checkpoint(checkpoints: Path) -> None:
    assert folders(checkpoints) == []
    assert newest_good(checkpoints) == (None, [])
    clean(checkpoints)
    assert not checkpoints.exists()


def test_folders_come_in_the_order_of_their_steps(checkpoints: Path) -> None:
    for step in (20, 5, 123_456_789, 99_999_999):
        save(checkpoints, step)
    for other in ("step-1", "bad-step-00000001", ".step-00000001-old", "step-00000001x", "notes"):
        (checkpoints / other).mkdir()
    assert steps(checkpoints) == [5, 20, 99_999_999, 123_456_789]


def test_a_work_folder_is_hidden_private_and_of_its_own(checkpoints: Path) -> None:
    one, other = work_folder(checkpoints, 40, 3), work_folder(checkpoints, 40, 3)
    assert one != other
    assert one.name.startswith(".step-00000040-a00000003-")
    assert stat.S_IMODE(one.stat().st_mode) == stat.S_IMODE(checkpoints.stat().st_mode) == 0o700
    assert folders(checkpoints) == []


def test_bad_checkpoints_are_named_newest_first_and_the_good_one_found(checkpoints: Path) -> None:
    for step in (10, 20, 30, 40):
        save(checkpoints, step)
    (checkpoints / "step-00000010" / "state.json").unlink()
    (checkpoints / "step-00000030" / "state.json").write_text("[]")
    (checkpoints / "step-00000040" / "manifest.json").unlink()
    assert newest_good(checkpoints) == (
        checkpoints / "step-00000020",
        [
            (checkpoints / "step-00000040", "manifest.json is missing"),
            (checkpoints / "step-00000030", "state.json has another sha256"),
        ],
    )


def test_what_is_set_aside_is_kept_and_never_found_again(checkpoints: Path) -> None:
    save(checkpoints, 10)
    aside = [set_aside(save(checkpoints, 20, attempt)) for attempt in (1, 2, 3)]
    assert [path.name for path in aside] == [
        "bad-step-00000020",
        "bad-step-00000020-2",
        "bad-step-00000020-3",
    ]
    assert (aside[1] / "adapter" / "adapter_model.safetensors").read_text() == "20 2"
    clean(checkpoints)
    prune(checkpoints, 1, 0, lambda _: None)
    assert steps(checkpoints) == [10]
    assert all(path.is_dir() for path in aside)


def test_a_published_checkpoint_takes_the_place_of_an_older_attempts(checkpoints: Path) -> None:
    save(checkpoints, 40, attempt=1)
    folder = save(checkpoints, 40, attempt=2)
    assert verify(folder)["attempt"] == 2
    assert names(checkpoints) == [folder.name]


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_publish_that_fails_leaves_every_name_as_it_was(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    folder = save(checkpoints, 40, attempt=1)
    partial = write(checkpoints, 40, 2)
    before = names(checkpoints)
    calls = 0

    def once_failing(real: object) -> object:
        def call(*arguments: object) -> object:
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError(errno.EIO, "Input/output error")
            return real(*arguments)

        return call

    monkeypatch.setattr(Path, "rename", once_failing(Path.rename))
    monkeypatch.setattr(directory, "sync_folder", once_failing(directory.sync_folder))
    with pytest.raises(OSError, match="Input/output error"):
        publish(partial, folder)
    assert names(checkpoints) == before
    assert verify(folder)["attempt"] == 1
    publish(partial, folder)
    assert verify(folder)["attempt"] == 2
    assert names(checkpoints) == [folder.name]


def test_clean_removes_leftovers_and_nothing_else(checkpoints: Path) -> None:
    save(checkpoints, 40)
    write(checkpoints, 40, 2)
    work_folder(checkpoints, 50, 1)
    (checkpoints / ".step-00000030-gone-0123abcd").mkdir()
    (checkpoints / ".step-00000040-old").mkdir()
    others = [".mine", ".step-00000040", ".step-00000040-notes", "bad-step-00000010", "old"]
    for other in others:
        (checkpoints / other).mkdir()
    clean(checkpoints)
    assert names(checkpoints) == sorted([*others, "step-00000040"])


def test_clean_puts_the_swapped_out_checkpoint_back(checkpoints: Path) -> None:
    folder = save(checkpoints, 40, attempt=1)
    write(checkpoints, 40, 2)
    folder.rename(checkpoints / ".step-00000040-old")
    assert newest_good(checkpoints) == (None, [])
    clean(checkpoints)
    assert newest_good(checkpoints) == (folder, [])
    assert verify(folder)["attempt"] == 1
    assert hidden(checkpoints) == []


SCORES = {10: 0.5, 20: 0.1, 30: None, 40: 0.5, 50: float("nan"), 60: 0.9, 70: None}


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "kept"),
    [
        (1, 0, [70]),
        (0, 0, [70]),
        (0, 1, [20, 70]),
        (2, 1, [20, 60, 70]),
        (2, 2, [20, 40, 60, 70]),
        (1, 9, [10, 20, 40, 60, 70]),
        (9, 0, [10, 20, 30, 40, 50, 60, 70]),
    ],
)
def test_the_newest_and_the_best_checkpoints_stay(
    checkpoints: Path, keep_last: int, keep_best: int, kept: list[int]
) -> None:
    for step in SCORES:
        save(checkpoints, step)
    prune(checkpoints, keep_last, keep_best, lambda folder: SCORES[step_of(folder)])
    assert names(checkpoints) == [step_name(step) for step in kept]


def test_a_link_under_a_steps_name_is_removed_without_what_it_points_to(checkpoints: Path) -> None:
    folder = save(checkpoints, 10)
    folder.rename(checkpoints.parent / "elsewhere")
    folder.symlink_to(checkpoints.parent / "elsewhere")
    save(checkpoints, 20)
    prune(checkpoints, 1, 0, lambda _: None)
    assert names(checkpoints) == ["step-00000020"]
    assert (checkpoints.parent / "elsewhere" / "manifest.json").exists()


# The n-th file operation kills the process before it is done; exit 0 says there were fewer.
KILLED = """
import os, signal, sys
from pathlib import Path
from peft_dist.common.manifest import seal
from peft_dist.checkpoint.directory import clean, prune, publish, work_folder

task, checkpoints, last = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
operations = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree"}
left = last

def hook(event, arguments):
    global left
    if event in operations:
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

def save(step, attempt):
    partial = work_folder(checkpoints, step, attempt)
    (partial / "adapter").mkdir()
    (partial / "adapter" / "adapter_model.safetensors").write_text(f"{step} {attempt}")
    (partial / "state.json").write_text("{}")
    seal(partial, {"step": step, "attempt": attempt})
    publish(partial, checkpoints / f"step-{step:08d}")

sys.addaudithook(hook)
if task == "clean":
    clean(checkpoints)
elif task == "prune":
    prune(checkpoints, 1, 1, lambda folder: int(folder.name[5:]))
elif task == "publish":
    save(40, 2)
else:
    save(30, 2)
"""


def operations_survived(task: str, pristine: Path, work: Path) -> int:
    """Kill a task at each of its file operations in turn; return how many there were."""
    for last in range(1, 500):
        shutil.copytree(pristine, work)
        ended = subprocess.run(
            [sys.executable, "-c", KILLED, task, str(work), str(last)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ended.returncode in (0, -signal.SIGKILL), ended.stderr
        check_after_a_kill(task, work)
        shutil.rmtree(work)
        if ended.returncode == 0:
            return last - 1
    raise AssertionError("the task never ends")


def check_after_a_kill(task: str, checkpoints: Path) -> None:
    found, bad = newest_good(checkpoints)  # even before anything is cleaned
    assert bad == []
    assert found is not None
    assert step_of(found) in {"publish": (30, 40), "replace": (20, 30)}.get(task, (20, 30))
    clean(checkpoints)
    assert hidden(checkpoints) == []
    for folder in folders(checkpoints):
        facts = verify(folder)
        text = (folder / "adapter" / "adapter_model.safetensors").read_text()
        assert text == f"{facts['step']} {facts['attempt']}"
    assert steps(checkpoints)[-1] in {"publish": (30, 40)}.get(task, (30,))
    assert 10 in steps(checkpoints)
    # Life goes on: the same step once more, the next one, and only what is to be kept stays.
    save(checkpoints, 30, attempt=3)
    save(checkpoints, 50, attempt=3)
    prune(checkpoints, 2, 0, lambda _: None)
    assert names(checkpoints)[-1] == "step-00000050"
    assert len(names(checkpoints)) == 2
    assert [verify(folder)["step"] for folder in folders(checkpoints)] == steps(checkpoints)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "at_least"), [("publish", 12), ("replace", 20), ("prune", 8), ("clean", 20)]
)
def test_a_kill_at_any_file_operation_leaves_whole_checkpoints_only(
    tmp_path: Path, task: str, at_least: int
) -> None:
    pristine = tmp_path / "pristine"
    for step in (10, 20, 30):
        save(pristine, step)
    if task == "clean":
        # An older attempt's step was swapped out, a partial one left, and one half removed.
        write(pristine, 30, 2)
        (pristine / "step-00000030").rename(pristine / ".step-00000030-old")
        half = write(pristine, 5, 1).rename(pristine / ".step-00000005-gone-0123abcd")
        (half / "manifest.json").unlink()
    assert operations_survived(task, pristine, tmp_path / "work") >= at_least
