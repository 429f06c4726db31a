"""Note the environment that a job is submitted with; copy the checkouts that it would import."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from peft_dist.common.errors import LaunchError, RunDirError
from peft_dist.config.cluster import Cluster
from peft_dist.run.environment import Environment, checkouts, read_environment

FOLDER = "snapshot"
ASK_LIMIT_S = 120.0


def environment_of(cluster: Cluster, *, with_checkouts: bool = True) -> Environment | None:
    """Return what the nodes' interpreter has installed; None where only nodes can tell.

    Args:
        cluster: Where the job will run.
        with_checkouts: Whether code of checkouts is run in place.
    """
    if cluster.container is not None:
        return None
    if cluster.interpreter == sys.executable:
        return read_environment(with_checkouts=with_checkouts)
    try:
        done = subprocess.run(
            [cluster.interpreter, "-m", "peft_dist.run.environment"],
            capture_output=True, text=True, timeout=ASK_LIMIT_S, check=True,
        )  # fmt: skip
        found: Environment = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):  # it needs the set-up, perhaps
        return None
    return found if with_checkouts else {**found, "checkouts": {}}


def trees_to_copy() -> dict[str, Path]:
    """Return the checkouts that code is imported from here, by name.

    Raises:
        LaunchError: Where there are none.
    """
    found = checkouts()
    if not found:
        raise LaunchError(
            "nothing is imported from a checkout here", where="--snapshot", remedy="leave it out"
        )
    return found


def copy_trees(trees: Mapping[str, Path], folder: Path) -> None:
    """Copy checkouts into a run's folder: what git tracks, and what it does not ignore.

    Raises:
        RunDirError: Where that fails; a copy is whole or not there.
    """
    target = folder / FOLDER
    try:
        shutil.rmtree(target, ignore_errors=True)
        for name, tree in trees.items():
            words = ["git", "-C", str(tree), "ls-files", "-z", "-co", "--exclude-standard"]
            told = subprocess.run(words, capture_output=True, check=True).stdout
            for file in filter(None, told.decode(errors="surrogateescape").split("\0")):
                source, copy = tree / file, target / name / file
                if source.is_file():  # one that was removed is listed too
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, copy)
    except (OSError, subprocess.SubprocessError) as error:
        shutil.rmtree(target, ignore_errors=True)
        raise RunDirError(
            f"cannot be copied: {error}", where="--snapshot", remedy="leave it out, or make room"
        ) from error


def import_paths(folder: Path, names: Mapping[str, Path] | None = None) -> tuple[str, ...]:
    """Return where Python finds the copies: of the checkouts named, else of those in the folder.

    Args:
        folder: The run's, or the array's.
        names: Checkouts that are going to be copied.
    """
    if names is None:
        there = folder / FOLDER
        names = {one.name: one for one in sorted(there.iterdir())} if there.is_dir() else {}
    found = []
    for name, tree in names.items():
        own = folder / FOLDER / name
        found += [str(own / "src"), str(own)] if (tree / "src").is_dir() else [str(own)]
    return tuple(found)
