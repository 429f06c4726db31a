"""Files and folders that are there whole or not at all, whatever is killed."""

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from peft_dist.common.sharing import file_mode, folder_mode


def replace_file(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a file that is either the old one or the whole new one.

    Args:
        path: Which file.
        text: What it will hold.
        durable: Whether it must outlive its machine, and not only its process.

    Raises:
        OSError: Where it cannot be written; nothing is left then.
    """
    temporary = _write_temporary(path, text, durable=durable)
    try:
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def make_file(path: Path, text: str) -> bool:
    """Make a whole file that is not there yet; return False where somebody else made it.

    Raises:
        OSError: Where it cannot be written.
    """
    temporary = _write_temporary(path, text, durable=True)
    try:
        os.link(temporary, path)
        return True
    except FileExistsError:
        # NFS may repeat a link whose answer was lost and find its own: see O_EXCL in open(2).
        return temporary.stat().st_nlink == 2
    except OSError:  # a file system without links: there the file is empty for a moment
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL, file_mode()))
        except FileExistsError:
            return False
        temporary.replace(path)
        return True
    finally:
        temporary.unlink(missing_ok=True)


class FolderTaken(OSError):
    """Something stands already where a new folder was to be."""


@contextmanager
def whole_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a hidden, private folder that takes its place, durably, where the block succeeds.

    Args:
        folder: Its place; missing folders above it are made.
        replace: Whether it replaces what stands there; an empty folder is always replaced.

    Raises:
        FolderTaken: Where something stands there, without `replace`.
        OSError: Where it cannot be written; what stood there is back then.
    """
    partial = folder_beside(folder)
    try:
        yield partial
        sync_tree(partial)
        put_in_place(partial, folder, replace=replace)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def folder_beside(folder: Path) -> Path:
    """Make a hidden, private folder for what will stand in another one's place; return it.

    Raises:
        OSError: Where it cannot be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=_partial_prefix(folder), dir=folder.parent))
    if folder_mode() != 0o700:
        made.chmod(made.stat().st_mode | folder_mode())
    return made


def put_in_place(partial: Path, folder: Path, *, replace: bool) -> None:
    """Rename a folder to its place: a reader finds the old one or the whole new one.

    Raises:
        FolderTaken, OSError: As `whole_folder`.
    """
    old = partial.with_name(f"{partial.name}-old")
    if replace and folder.exists():
        folder.rename(old)  # whoever has its files open keeps them
    try:
        partial.rename(folder)
    except OSError as error:
        if old.exists():
            old.rename(folder)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FolderTaken(errno.EEXIST, os.strerror(errno.EEXIST), str(folder)) from error
        raise
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_unfinished(folder: Path, *, older_than_s: float = 0.0) -> None:
    """Remove what writers of a folder left beside it when they were killed."""
    for leftover in folder.parent.iterdir() if folder.parent.exists() else []:
        with suppress(OSError):
            begun = leftover.name.startswith(_partial_prefix(folder))
            if begun and time.time() - leftover.stat().st_mtime >= older_than_s:
                shutil.rmtree(leftover, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Make all that is below a folder survive a power cut.

    Raises:
        OSError: Where the disk is full or broken.
    """
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            with (Path(parent) / name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(parent))


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut.

    Raises:
        OSError: Where the file system cannot promise it.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _partial_prefix(folder: Path) -> str:
    return f".{folder.name}.partial-"


def _write_temporary(path: Path, text: str, *, durable: bool) -> Path:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            os.fchmod(handle, file_mode())
            file.write(text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return Path(name)
