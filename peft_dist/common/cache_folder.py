"""The cache folder, looked at before anything relies on it."""

from pathlib import Path

from peft_dist.common import paths
from peft_dist.common.env import CACHE
from peft_dist.common.errors import CacheError
from peft_dist.common.folders import find_fault, readable_name


def usable_cache_dir() -> Path:
    """Return the cache folder; what starts a training and each of its processes call this.

    Raises:
        CacheError: Where it cannot be written.
    """
    folder = paths.cache_dir()
    fault = find_fault(folder)
    if fault is not None:
        raise CacheError(
            f"the cache {fault}",
            where=readable_name(folder),
            remedy=f"set {CACHE} to another folder",
        )
    return folder
