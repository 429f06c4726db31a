"""Where the files that are no Python live: launchers, recipes, and the cache of made things.

Finds folders; reads and writes nothing.
"""

import glob
import json
import os
from pathlib import Path

from peft_dist.common.env import CACHE, STAGED

SHARED_FOLDERS = ("launch", "configs", "slurm")
"""Folders at the root of a checkout that the wheel carries as data."""

MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""What is read of a model's folder."""

TOKENIZER_FILES = ("*token*.json", "chat_template*", "vocab*", "merges.txt", "*.model")
"""What of it decides how a text is tokenised, and a conversation rendered."""

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""What is read of an adapter."""


def root() -> Path:
    """Return the folder that holds `launch/` and `configs/`: in the wheel, else the checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_share"
    return installed if installed.is_dir() else package.parent


def cache_dir() -> Path:
    """Return the folder for things that can be made again: $PEFT_DIST_CACHE, else the user's."""
    chosen = os.environ.get(CACHE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    general = os.environ.get("XDG_CACHE_HOME")
    base = Path(general) if general else Path.home() / ".cache"
    return base / "peft-dist"


def staged(name: str) -> Path | None:
    """Return this node's own copy of a model; None where it has none.

    Args:
        name: The recipe's `model.name`, which files go on to record.
    """
    try:
        folder = json.loads(os.environ.get(STAGED) or "{}").get(name)
    except (ValueError, AttributeError):
        return None  # nothing of ours; the model is read where it lies
    return Path(folder) if isinstance(folder, str) and Path(folder).is_dir() else None


def files_like(pattern: str) -> tuple[str, ...]:
    """Return the files that an absolute pattern such as `/rows/part-*.jsonl` matches, in order."""
    found = glob.glob(pattern, recursive=True)  # noqa: PTH207  Path.glob wants a relative one
    return tuple(sorted(one for one in found if Path(one).is_file()))
