"""Locks between processes, as far as a file system has them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def lock_file(path: Path, *, wait_s: float = -1) -> Iterator[bool]:
    """Hold a lock, of which the kernel lets go when its holder is killed; the file stays.

    Args:
        path: The private file that is locked.
        wait_s: How long to wait for another holder; negative for as long as it takes.

    Yields:
        Whether it is held; True as well where the file system has no locks.

    Raises:
        OSError: Where the file cannot be made.
    """
    lock = FileLock(path, mode=0o600)
    try:
        lock.acquire(timeout=wait_s)
    except Timeout:
        yield False
        return
    except NotImplementedError:  # what filelock says of a file system without flock(2)
        yield True
        return
    try:
        yield True
    finally:
        lock.release()
