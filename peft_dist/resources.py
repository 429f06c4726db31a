"""Where the files that are no Python live: launchers, recipes, and the cache of made things.

Finds folders; reads and writes nothing.
"""

import os
from pathlib import Path

SHARED_FOLDERS = ("launch", "configs", "slurm")
"""Folders at the root of a checkout that the wheel carries as data."""


def root() -> Path:
    """Return the folder that holds `launch/` and `configs/`: in the wheel, else the checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "_share"
    return installed if installed.is_dir() else package.parent


def cache_dir() -> Path:
    """Return the folder for things that can be made again: $PEFT_DIST_CACHE, else the user's."""
    chosen = os.environ.get("PEFT_DIST_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    general = os.environ.get("XDG_CACHE_HOME")
    base = Path(general) if general else Path.home() / ".cache"
    return base / "peft-dist"
