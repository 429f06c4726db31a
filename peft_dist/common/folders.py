"""Why a folder cannot hold what a run writes, found before any work begins.

Makes and changes nothing. Libraries write there too, so a name that Linux allows may be refused.
"""

import os
import stat
from pathlib import Path

LONGEST_NAME = 200
"""Bytes of a folder's name: files take 255, and what is being made has a longer one for a while."""
LONGEST_PART = 255
"""Bytes of any part of a path, by NAME_MAX of Linux."""
LONGEST_PATH = 3800
"""Bytes of a folder's path: PATH_MAX of Linux is 4096, and files lie up to 200 bytes below."""


def find_fault(folder: Path) -> str | None:
    """Return in a few words why a folder cannot be made or written to; None where it can.

    Args:
        folder: An absolute path. Missing folders above it count as makeable.
    """
    return _fault_of_name(folder) or _fault_on_disk(folder)


def readable_name(folder: Path) -> str:
    """Return a path as text that can be shown anywhere; in it, what cannot be is escaped."""
    try:
        name = os.fsencode(folder).decode("utf-8", errors="backslashreplace")
    except UnicodeEncodeError:  # half a character, of which no file name can come
        name = ascii(str(folder))
    name = "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in name
    )
    if len(name) > LONGEST_NAME * 2:
        return f"{name[:LONGEST_NAME]}..."
    return name


def _fault_of_name(folder: Path) -> str | None:
    try:
        path = os.fsencode(folder)
        path.decode("utf-8")
    except UnicodeError:
        return "has a name that is not UTF-8, which safetensors cannot write to"
    if b"\0" in path:
        return "has a NUL character in its name"
    if len(path) > LONGEST_PATH:
        return f"has a path of more than {LONGEST_PATH} bytes"
    if any(len(os.fsencode(part)) > LONGEST_PART for part in folder.parts[:-1]):
        return f"has a folder above it with a name of more than {LONGEST_PART} bytes"
    if len(os.fsencode(folder.name)) > LONGEST_NAME:
        return f"has a name of more than {LONGEST_NAME} bytes"
    return None


def _fault_on_disk(folder: Path) -> str | None:
    """Look at the folder, or at the nearest one above it that is there."""
    try:
        for place in (folder, *folder.parents):
            subject = "is" if place == folder else f"cannot be made: {readable_name(place)} is"
            try:
                mode = place.stat().st_mode
            except NotADirectoryError:
                continue  # said of the file above
            except FileNotFoundError:
                if place.is_symlink():
                    target = readable_name(place.readlink())
                    return f"{subject} a link to {target}, which is not there"
                continue
            if not stat.S_ISDIR(mode):
                return f"{subject} a file"
            if not os.access(place, os.W_OK | os.X_OK):
                above = "" if place == folder else f" in {readable_name(place)}"
                return f"cannot be written{above}: {_why_not(place)}"
            return None
    except OSError as error:  # a loop of links, a folder above that may not be searched
        return f"cannot be used: {error.strerror or error}"
    return None


def _why_not(place: Path) -> str:
    if os.statvfs(place).f_flag & os.ST_RDONLY:
        return "the file system is read-only"
    return "permission denied"
