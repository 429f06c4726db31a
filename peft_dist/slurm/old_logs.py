"""Pack the logs of a run's old starts, one file for each: users have a quota of files, too."""

import shutil
import tarfile
from contextlib import suppress
from pathlib import Path

KEPT = 10
"""The newest starts, whose logs stay as they are."""


def pack_old_logs(logs: Path) -> None:
    """Pack the folders of all but the newest starts of jobs: `12-0` becomes `12-0.tar.gz`.

    Args:
        logs: The run's folder of logs.
    """
    with suppress(OSError):
        starts = [path for path in logs.glob("*-*") if path.is_dir() and not path.is_symlink()]
        starts = [
            path for path in starts if path.name.replace("_", "-").replace("-", "").isdecimal()
        ]
        starts.sort(key=lambda path: path.stat().st_mtime)
        for start in starts[:-KEPT]:
            _pack(start)


def _pack(start: Path) -> None:
    packed = start.with_name(f"{start.name}.tar.gz")
    partial = start.with_name(f".{start.name}.tar.gz.part")
    try:
        with tarfile.open(partial, "w:gz") as file:
            file.add(start, start.name)
        partial.replace(packed)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    shutil.rmtree(start)
