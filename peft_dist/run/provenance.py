"""With what a run was made: command, package versions, revision of the checkout."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RECORDED_PACKAGES = (
    "peft-dist",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "safetensors",
    "tokenizers",
    "datasets",
    "deepspeed",
    "wandb",
    "numpy",
)
"""Packages whose versions change what a run computes or writes."""


def run_facts(command: Sequence[str]) -> dict[str, Any]:
    """Return what `run.json` says of a run that is made now by this command line."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "python": sys.version.split()[0],
        "versions": versions(),
        "git": _git_state(Path.cwd()),
    }


def versions() -> dict[str, str]:
    """Return the versions of the recorded packages that are installed here."""
    found = {}
    for package in RECORDED_PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _git_state(folder: Path) -> dict[str, Any] | None:
    """Return revision and cleanliness of the checkout a run was started from, or None."""
    git = shutil.which("git")
    if git is None:
        return None
    outputs = []
    for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(
                [git, "-C", str(folder), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            )
        except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
            return None
        outputs.append(done.stdout.strip())
    return {"revision": outputs[0], "modified": bool(outputs[1])}
