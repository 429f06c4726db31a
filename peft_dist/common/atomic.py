"""Private files that are there whole or not at all, whatever is killed."""

import os
import tempfile
from pathlib import Path


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
            os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            return False
        temporary.replace(path)
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _write_temporary(path: Path, text: str, *, durable: bool) -> Path:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return Path(name)
