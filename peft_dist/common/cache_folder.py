"""The cache folder, looked at before anything relies on it."""

import os
import pwd
import stat
from pathlib import Path

from peft_dist.common import paths
from peft_dist.common.env import CACHE, CACHE_SHARED
from peft_dist.common.errors import CacheError
from peft_dist.common.folders import find_fault, readable_name


def usable_cache_dir() -> Path:
    """Return the cache folder; what starts a training and each of its processes call this.

    Raises:
        CacheError: Where it cannot be written, or where other users can write to it and nothing
            says that they may: they could change the base that runs train on.
    """
    folder = paths.cache_dir()
    fault = find_fault(folder)
    if fault is not None:
        raise CacheError(
            f"the cache {fault}",
            where=readable_name(folder),
            remedy=f"set {CACHE} to another folder",
        )
    if os.environ.get(CACHE_SHARED) != "1":
        for place in (folder, *(folder / name for name in _PARTS)):
            _require_own(place)
    return folder


def code_folder(cache_dir: Path) -> Path | None:
    """Return where code that was compiled is kept; None where the cache is shared.

    torch keeps what it compiles as pickles and libraries: who can write there can run code as us.
    """
    return None if os.environ.get(CACHE_SHARED) == "1" else cache_dir / "compiled"


_PARTS = ("compiled", "packed", "proofs", "reference", "rows", "sha256")
"""Folders in the cache: code that torch has made, bases, what was proven of them, their scores of
answers, rows, and what is remembered of files."""


def _require_own(folder: Path) -> None:
    try:
        status = folder.stat()
    except OSError:  # not there yet, or no longer: then it is made, privately
        return
    remedy = f"or set {CACHE_SHARED}=1 where all who can write there are trusted"
    if status.st_uid not in (0, os.geteuid()):
        raise CacheError(
            f"the cache belongs to {_user(status.st_uid)}, another user",
            where=readable_name(folder),
            remedy=f"set {CACHE} to a folder of your own, {remedy}",
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CacheError(
            f"other users can write to the cache (mode {stat.S_IMODE(status.st_mode):04o})",
            where=readable_name(folder),
            remedy=f"chmod go-w it, {remedy}",
        )


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"
