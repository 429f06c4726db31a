"""Folders that libraries cannot write to: told in a few words, and nothing is made."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from peft_dist.cli.main import main
from peft_dist.common.cache_folder import code_folder, usable_cache_dir
from peft_dist.common.errors import CacheError
from peft_dist.common.folders import LONGEST_NAME, find_fault
from tests.disks import tmpfs

Make = Callable[[Path], Path]

NOBODY = 65534


def not_utf8(folder: Path) -> Path:
    return folder / os.fsdecode(b"\xff\xfe")


def below_not_utf8(folder: Path) -> Path:
    not_utf8(folder).mkdir()
    return not_utf8(folder) / "a"


def dangling_link(folder: Path) -> Path:
    (folder / "a").symlink_to("absent")
    return folder / "a"


def below_dangling_link(folder: Path) -> Path:
    return dangling_link(folder) / "b"


def loop(folder: Path) -> Path:
    (folder / "a").symlink_to("a")
    return folder / "a"


def file(folder: Path) -> Path:
    (folder / "a").write_text("x", encoding="utf-8")
    return folder / "a"


def below_file(folder: Path) -> Path:
    return file(folder) / "b" / "c"


BAD: dict[str, tuple[Make, str]] = {
    "not UTF-8": (not_utf8, "has a name that is not UTF-8"),
    "below one that is not UTF-8": (below_not_utf8, "has a name that is not UTF-8"),
    "half a character": (lambda folder: folder / "\ud800", "has a name that is not UTF-8"),
    "a NUL": (lambda folder: folder / "a\0b", "has a NUL character in its name"),
    "long name": (lambda folder: folder / ("x" * (LONGEST_NAME + 1)), "more than 200 bytes"),
    "long name above": (lambda folder: folder / ("x" * 256) / "a", "more than 255 bytes"),
    "long path": (lambda folder: folder / "/".join(["x" * 100] * 40), "more than 3800 bytes"),
    "link to nothing": (dangling_link, "is a link to absent, which is not there"),
    "below a link to nothing": (below_dangling_link, "a is a link to absent, which is not there"),
    "loop of links": (loop, "cannot be used: Too many levels of symbolic links"),
    "a file": (file, "is a file"),
    "below a file": (below_file, "a is a file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_folder_that_cannot_be_written_is_told_in_a_few_words(tmp_path: Path, name: str) -> None:
    make, expected = BAD[name]
    folder = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    fault = find_fault(folder)
    assert fault is not None and expected in fault
    assert fault.isprintable()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["a", "a/b/c", "ä 猫 '$(x)'", "x" * LONGEST_NAME])
def test_any_other_folder_is_fine_there_or_not(tmp_path: Path, name: str) -> None:
    assert find_fault(tmp_path / name) is None
    (tmp_path / name).mkdir(parents=True)
    assert find_fault(tmp_path / name) is None
    (tmp_path / "link").symlink_to(tmp_path / name)
    assert find_fault(tmp_path / "link") is None
    assert find_fault(tmp_path / "link" / "b") is None


def as_nobody(work: Callable[[], str | None]) -> str:
    """Return what some work returns for a user who may write nowhere."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        if os.getuid() == 0:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        os.write(writer, str(work()).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return text


def test_a_folder_without_permission_is_told_whether_it_is_there_or_not(tmp_path: Path) -> None:
    for place in (tmp_path, *tmp_path.parents):
        if place == tmp_path or place.name.startswith(("pytest-", "popen-")):
            place.chmod(0o755)
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    assert as_nobody(lambda: find_fault(closed)) == "cannot be written: permission denied"
    told = as_nobody(lambda: find_fault(closed / "a"))
    assert told == f"cannot be written in {closed}: permission denied"
    closed.chmod(0o700)
    if os.getuid() == 0:
        told = as_nobody(lambda: find_fault(closed / "a"))
        assert told == "cannot be used: Permission denied"


@pytest.fixture
def read_only_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a file system that takes nothing, where that can be had."""
    with tmpfs(tmp_path / "disk", "ro") as folder:
        yield folder


def test_a_read_only_file_system_is_told(read_only_disk: Path) -> None:
    assert find_fault(read_only_disk) == "cannot be written: the file system is read-only"


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("command", [["train"], ["train", "--dry-run"]])
def test_train_refuses_such_a_run_directory_in_one_line(
    tmp_path: Path,
    recipe_file: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    command: list[str],
) -> None:
    make, expected = BAD[name]
    folder = tmp_path / "place"
    folder.mkdir()
    assert main([*command, str(recipe_file), "--run-dir", str(make(folder))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("peft-dist: error: ") and line.isprintable()
    assert expected in line
    assert line.endswith("; choose another folder with --run-dir")


@pytest.mark.parametrize(
    "name", [name for name in BAD if name not in ("a NUL", "half a character")]
)
def test_train_refuses_such_a_cache_in_one_line_before_the_run_is_made(
    tmp_path: Path,
    recipe_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    make, expected = BAD[name]
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.setenv("PEFT_DIST_CACHE", str(make(folder)))
    assert main(["train", str(recipe_file), "--run-dir", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("peft-dist: error: ") and line.isprintable()
    assert f": the cache {expected}"[: len(": the cache ")] in line and expected in line
    assert line.endswith("; set PEFT_DIST_CACHE to another folder")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", ["", "packed", "rows"])
@pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777])
def test_a_cache_that_others_can_write_is_refused_unless_it_is_shared_on_purpose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, mode: int
) -> None:
    cache = tmp_path / "cache"
    (cache / part).mkdir(parents=True)
    (cache / part).chmod(mode)
    monkeypatch.setenv("PEFT_DIST_CACHE", str(cache))
    with pytest.raises(CacheError) as caught:
        usable_cache_dir()
    line = str(caught.value)
    assert line.startswith(
        f"{cache / part}: other users can write to the cache (mode {mode:04o}); "
    )
    assert "chmod go-w it, or set PEFT_DIST_CACHE_SHARED=1" in line
    monkeypatch.setenv("PEFT_DIST_CACHE_SHARED", "1")
    assert usable_cache_dir() == cache
    assert code_folder(cache) is None  # what others can write is not run
    monkeypatch.setenv("PEFT_DIST_CACHE_SHARED", "0")
    assert code_folder(cache) == cache / "compiled"
    (cache / part).chmod(0o755)
    assert usable_cache_dir() == cache


def test_a_cache_of_another_user_is_refused_unless_it_is_shared_on_purpose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give a folder away")
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("PEFT_DIST_CACHE", str(cache))
    for uid, name in ((NOBODY, "nobody"), (54321, "uid 54321")):
        os.chown(cache, uid, -1)
        with pytest.raises(CacheError, match=f"the cache belongs to {name}, another user; set "):
            usable_cache_dir()
    monkeypatch.setenv("PEFT_DIST_CACHE_SHARED", "1")
    assert usable_cache_dir() == cache
    assert code_folder(cache) is None  # what others can write is not run


def test_train_refuses_a_cache_that_others_can_write_in_one_line(
    tmp_path: Path,
    recipe_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    monkeypatch.setenv("PEFT_DIST_CACHE", str(tmp_path / "cache"))
    assert main(["train", str(recipe_file), "--run-dir", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "other users can write to the cache (mode 0777)" in line
    assert not (tmp_path / "run").exists()
