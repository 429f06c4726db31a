"""Let the launcher see that a rank is saving, which it then does not cut short.

The mark is a file in the folder that the launcher names by an environment variable; one whose
process has ended counts for nothing.
"""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from peft_dist.common.env import FAILURES


class SaveMark:
    """Says that this process saves, from when it is made until `remove`."""

    def __init__(self) -> None:
        """Set it, where a launcher looks for it."""
        folder = os.environ.get(FAILURES)
        self._path: Path | None = None
        if folder:
            path = Path(folder) / f"saving-{os.getpid()}-{uuid.uuid4().hex}"
            with suppress(OSError):  # a full disk: then a save can be cut short
                path.touch()
                self._path = path

    def remove(self) -> None:
        """Say that it is done."""
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink()


@contextmanager
def being_saved() -> Iterator[None]:
    """Mark a block that saves."""
    mark = SaveMark()
    try:
        yield
    finally:
        mark.remove()


def is_saving(folder: Path) -> bool:
    """Whether a process that still runs has marked that it saves."""
    return any(_runs(path.name.split("-")[1]) for path in folder.glob("saving-*"))


def _runs(pid: str) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"
