"""Every change that this process makes below a folder, seen before it is made.

A change is a name (`open` for writing, `write`, `fsync`, `os.rename`, `os.mkdir`, `os.remove`,
`os.rmdir`, `os.link`, `os.truncate`, ...) and a path. Most are seen by an audit hook; `write` and
`fsync` have no audit event, so Python's files are opened through a class of our own and
safetensors' files are written by Python. Reading is not seen, and neither are other processes.
"""

import builtins
import io
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Before = Callable[[str, Path, int], int]
"""What is asked before a change: its name, its path and the bytes to write (0 for no write).

Returns how many bytes may be written; it may raise an OSError, which the program then sees as the
answer of the system, or not return at all.
"""

_EVENTS = {
    "os.link": 2,
    "os.mkdir": 1,
    "os.remove": 1,
    "os.rename": 2,
    "os.rmdir": 1,
    "os.symlink": 2,
    "os.truncate": 1,
}
"""Audit events that change a folder or a file, and how many paths stand first in them."""
_FOLDERS_AT = {"os.mkdir": 2, "os.remove": 1, "os.rmdir": 1, "os.rename": 2, "os.link": 2}
"""Where the events hold the folder handles that relative paths begin at."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def watch(under: str | Path, before: Before) -> None:
    """Ask before every change below a folder, from now to the end of this process."""
    folder = os.path.normpath(Path(under).absolute())

    def is_below(path: str) -> bool:
        return path == folder or path.startswith(folder + os.sep)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & _WRITES or isinstance(path, int):
                return
            paths = [_absolute(path)]
        elif event in _EVENTS:
            at = _FOLDERS_AT.get(event)
            folders = () if at is None else arguments[at:]
            paths = [
                _absolute(path, folders[index] if index < len(folders) else -1)
                for index, path in enumerate(arguments[: _EVENTS[event]])
            ]
        else:
            return
        below = [path for path in paths if is_below(path)]
        if below:
            before(event, Path(below[-1]), 0)

    sys.addaudithook(audit)
    _watch_writes(is_below, before)


def _absolute(path: Any, folder: int = -1) -> str:
    """Return the path that a call of the system means."""
    if isinstance(path, int):
        return str(_of_handle(path))
    name = Path(os.fsdecode(path))
    # without resolving links: what is opened, renamed or removed may be one
    return os.path.normpath(name.absolute() if folder in (-1, None) else _of_handle(folder) / name)


def _of_handle(handle: int) -> Path:
    return Path(f"/proc/self/fd/{handle}").readlink()


def _watch_writes(is_below: Callable[[str], bool], before: Before) -> None:
    import safetensors.torch
    from safetensors import SafetensorError

    open_file, write, fsync = io.open, os.write, os.fsync
    serialize_file: Any = safetensors.torch.serialize_file  # type: ignore[attr-defined]

    class File(io.FileIO):
        def write(self, data: Any, /) -> int:
            view = memoryview(data).cast("B")
            return super().write(view[: before("write", _of_handle(self.fileno()), len(view))])

    def watched_open(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        if not set(mode) & set("wax+") or not is_below(_absolute(file)):
            return open_file(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = File(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        lines = buffering == 1
        text = io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=lines)
        text.mode = mode  # type: ignore[misc]
        return text

    def watched_write(handle: int, data: Any, /) -> int:
        path = _of_handle(handle)
        if not is_below(str(path)):
            return write(handle, data)
        view = memoryview(data).cast("B")
        return write(handle, view[: before("write", path, len(view))])

    def watched_fsync(fd: Any) -> None:
        path = _of_handle(fd if isinstance(fd, int) else fd.fileno())
        if is_below(str(path)):
            before("fsync", path, 0)
        fsync(fd)

    def watched_serialize_file(tensors: Any, filename: Any, metadata: Any = None) -> None:
        if not is_below(_absolute(filename)):
            serialize_file(tensors, filename, metadata=metadata)
            return
        with tempfile.TemporaryDirectory() as elsewhere:
            made = Path(elsewhere, "made")
            serialize_file(tensors, str(made), metadata=metadata)
            data = made.read_bytes()
        try:
            # As the library does it: a hidden file beside the one it is for, then a rename.
            handle, partial = tempfile.mkstemp(prefix=".tmp", dir=Path(filename).parent)
            try:
                with watched_open(handle, "wb") as file:
                    file.write(data)
                Path(partial).rename(filename)
            except OSError:
                Path(partial).unlink()
                raise
        except OSError as error:  # what the library makes of it
            raise SafetensorError(f"Error while serializing: I/O error: {error}") from error

    for owner in (builtins, io, sys.modules["_io"]):
        owner.open = watched_open  # type: ignore[attr-defined]
    os.write, os.fsync = watched_write, watched_fsync
    safetensors.torch.serialize_file = watched_serialize_file  # type: ignore
