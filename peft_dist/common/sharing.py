"""Who may read what a run writes: its user alone, or the group of its folder as well.

The run directory says it by its own mode; the processes of a run are told by the environment.
Secrets are never shared, and caches of other programs keep the user's own umask.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from peft_dist.common.env import SHARING, UMASK

GROUP = "group"


def share_like(folder: Path) -> None:
    """Share what this process and its children write as a run directory is shared."""
    with suppress(OSError):
        if folder.stat().st_mode & 0o020:
            os.environ[SHARING] = GROUP


def file_mode() -> int:
    """Return the mode of a new file of a run."""
    return 0o660 if os.environ.get(SHARING) == GROUP else 0o600


def folder_mode() -> int:
    """Return the mode of a new folder of a run."""
    return 0o770 if os.environ.get(SHARING) == GROUP else 0o700


def run_umask() -> int:
    """Return the umask of what works on a run."""
    return 0o777 & ~folder_mode()


def set_run_umask() -> None:
    """Let this process make its files for a run, and remember the user's own umask."""
    users = os.umask(run_umask())
    os.environ.setdefault(UMASK, f"{users:04o}")


@contextmanager
def users_umask() -> Iterator[None]:
    """Let the block write to what belongs to other programs too, as a cache of a hub's files."""
    text = os.environ.get(UMASK, "")
    ours = os.umask(int(text, 8) if re.fullmatch("[0-7]{1,4}", text) else run_umask())
    try:
        yield
    finally:
        os.umask(ours)
