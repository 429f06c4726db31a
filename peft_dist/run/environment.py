"""What is installed where a run is submitted, and whether it is still the same where it starts.

A job may wait for days: `pip install` or an edit in a checkout meanwhile changes what it runs.
Reads metadata and asks git; imports nothing of what it describes.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from peft_dist.common.atomic import replace_file
from peft_dist.common.console import show
from peft_dist.common.paths import root

FILE = "environment.json"
GIT_LIMIT_S = 20.0
SHOWN = 3
"""Changes that a line holds."""
LONGEST_DIFF_BYTES = 1 << 20
"""Of an uncommitted change that is kept whole beside the run; of a longer one only the hash."""

Environment = dict[str, Any]
"""`python`, `packages` (versions by name), `checkouts` (path, revision and diff by name)."""


def checkouts() -> dict[str, Path]:
    """Return the folders that code is imported from in place, by the name of what is installed."""
    found = {}
    for installed in distributions():
        folder = _editable(installed)
        if folder is not None and folder.is_dir():
            found[_name(installed)] = folder
    own = root()
    if (own / ".git").exists() and own not in found.values():
        found["peft-dist"] = own
    return found


def read_environment(*, with_checkouts: bool = True) -> Environment:
    """Return what this interpreter would run with.

    Args:
        with_checkouts: Whether to look at checkouts; what is copied does not change.
    """
    folders = checkouts() if with_checkouts else {}
    return {
        "python": sys.version.split()[0],
        "packages": dict(sorted((_name(one), one.version) for one in distributions())),
        "checkouts": {name: _state(folder) for name, folder in sorted(folders.items())},
    }


def write_environment(run_path: Path, environment: Environment) -> None:
    """Leave the environment beside a run, and each change of a checkout as a patch of its own.

    Raises:
        OSError: Where it cannot be written.
    """
    kept = {**environment, "checkouts": {}}
    for name, state in environment["checkouts"].items():
        patch = state.get("patch", "")
        if patch:
            replace_file(run_path / f"environment.{name}.diff", patch)
        kept["checkouts"][name] = {key: text for key, text in state.items() if key != "patch"}
    replace_file(run_path / FILE, json.dumps(kept, indent=2) + "\n")


def changes_since_submit(run_path: Path) -> str:
    """Return in one line what is another one here than where the run was submitted.

    Where nobody has written that down, as of an interpreter that only nodes have, this start does.
    """
    try:
        before = json.loads((run_path / FILE).read_text(encoding="utf-8"))
        now = read_environment(with_checkouts=bool(before["checkouts"]))
        changes = differences(before, now)
    except FileNotFoundError:
        with suppress(OSError):  # the next start tries again
            write_environment(run_path, read_environment())
        return ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        changes = [f"{FILE} cannot be read ({type(error).__name__})"]
    if not changes:
        return ""
    more = f" and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
    return f"the environment is not that of the submission: {', '.join(changes[:SHOWN])}{more}"


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs between two environments, a few words each."""
    found = []
    if before["python"] != now["python"]:
        found.append(f"python {before['python']} is now {now['python']}")
    for name in sorted({*before["packages"], *now["packages"]}):
        had, has = (side["packages"].get(name) for side in (before, now))
        if had != has:
            found.append(f"{name} {had or 'missing'} is now {has or 'missing'}")
    for name, had in before["checkouts"].items():
        has = now["checkouts"].get(name)
        if has is None or not had["revision"] or not has["revision"]:
            continue  # no git there: nobody can tell
        if had["revision"] != has["revision"]:
            found.append(f"{name} {had['revision'][:12]} is now {has['revision'][:12]}")
        elif had["diff"] != has["diff"]:
            found.append(f"{name} has been edited in {has['path']}")
    return found


def _name(installed: Distribution) -> str:
    return str(installed.metadata["Name"]).lower().replace("_", "-")


def _editable(installed: Distribution) -> Path | None:
    """Return the folder of what is installed in place; see direct_url.json of PEP 610."""
    try:
        facts = json.loads(installed.read_text("direct_url.json") or "{}")
        if not facts["dir_info"]["editable"]:
            return None
        return Path(unquote(urlparse(facts["url"]).path))
    except (ValueError, KeyError, TypeError):
        return None


def _state(folder: Path) -> dict[str, str]:
    """Return revision and uncommitted change of a checkout; empty texts where git cannot tell."""
    revision, patch = (
        _git(folder, *words) for words in (("rev-parse", "HEAD"), ("diff", "HEAD", "--binary"))
    )
    digest = hashlib.sha256((patch or "").encode()).hexdigest() if patch else ""
    kept = patch if patch and len(patch) <= LONGEST_DIFF_BYTES else ""
    return {
        "path": str(folder), "revision": (revision or "").strip(), "diff": digest, "patch": kept,
    }  # fmt: skip


def _git(folder: Path, *words: str) -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    try:
        done = subprocess.run(
            [git, "-C", str(folder), *words],
            capture_output=True, text=True, errors="replace", timeout=GIT_LIMIT_S, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


if __name__ == "__main__":  # for the interpreter of a cluster file
    show(json.dumps(read_environment()))
