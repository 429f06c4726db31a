"""Locks between processes, as far as a file system has them."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from peft_dist.common.sharing import file_mode

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What flock(2) answers on a file system without locks, as on Lustre mounted without them."""


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
    # Not filelock's own way out of missing locks: such a lock outlives a holder that was killed.
    lock = FileLock(path, mode=file_mode(), fallback_to_soft=False)
    try:
        lock.acquire(timeout=wait_s)
    except Timeout:
        yield False
        return
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        yield True
        return
    try:
        yield True
    finally:
        lock.release()
