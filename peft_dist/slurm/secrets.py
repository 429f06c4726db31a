"""Read the file of a user's secrets, which stand in no script, argument, log or run directory."""

import os
import stat
from pathlib import Path

from peft_dist.common.errors import ClusterError


def read_secrets(file: Path) -> dict[str, str]:
    """Return the variables of a file that nobody else can read.

    Raises:
        ClusterError: For a file that is missing, open to others, or no list of NAME=value.
    """
    where = f"secrets_file: {file}"
    try:
        status = file.stat()
        if stat.S_IMODE(status.st_mode) & 0o077 or status.st_uid != os.getuid():
            raise ClusterError("can be read by others", where=where, remedy="chmod 600 it")
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ClusterError(
            f"cannot be read: {error.strerror}",
            where=where,
            remedy="make it, with a line such as WANDB_API_KEY=... and mode 0600",
        ) from error
    except UnicodeDecodeError as error:
        raise ClusterError("is not UTF-8", where=where, remedy="save it as text") from error
    found = {}
    for number, line in enumerate(lines, start=1):
        name, equals, value = line.partition("=")
        if not line.strip() or line.startswith("#"):
            continue
        if not (equals and name.isidentifier() and name.isascii() and "\0" not in value):
            raise ClusterError(  # never the line itself
                f"line {number} is not NAME=value", where=where, remedy="write one per line"
            )
        found[name] = value.strip()
    return found
