"""How far the clock of a file system's server is ahead of this machine's."""

import tempfile
import time
from pathlib import Path

_ahead_s: dict[int, float] = {}
"""By file system, as it was found once."""


def ahead_s(folder: Path) -> float:
    """Return by how many seconds the times of a folder's files are ahead of this machine's clock.

    Makes a file there for a moment, once in a process. 0 where nothing can be written.

    Args:
        folder: On the file system.
    """
    try:
        device = folder.stat().st_dev
        if device not in _ahead_s:
            with tempfile.TemporaryFile(dir=folder, prefix=".clock-") as file:
                before_s = time.time()
                file.write(b"0")
                file.flush()
                written_s = Path(f"/proc/self/fd/{file.fileno()}").stat().st_mtime
                _ahead_s[device] = written_s - (before_s + time.time()) / 2
        return _ahead_s[device]
    except OSError:
        return 0.0
