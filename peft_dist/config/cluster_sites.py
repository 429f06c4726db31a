"""The cluster files that are shipped, by name: those of public sites, and general ones."""

import re
from pathlib import Path

from peft_dist.common import paths
from peft_dist.common.errors import ClusterError, nearest

PLACEHOLDER = "my-account"
"""The account in shipped files that nobody has."""


def shipped_clusters() -> dict[str, Path]:
    """Return the shipped files by name."""
    folder = paths.root() / "slurm" / "clusters"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def find_cluster(name: str | Path) -> Path:
    """Return a cluster file: a path, else the shipped file of that name.

    Raises:
        ClusterError: For a name that is neither.
    """
    path, text = Path(name), str(name)
    if re.fullmatch(r"[a-z0-9-]+", text) and not path.exists():
        return shipped_cluster(text)
    return path


def shipped_cluster(name: str) -> Path:
    """Return a shipped file.

    Raises:
        ClusterError: Where none has that name.
    """
    shipped = shipped_clusters()
    if name not in shipped:
        raise ClusterError(
            "is neither a file nor a shipped cluster file",
            where=ascii(name)[1:-1],
            remedy=nearest(name, shipped),
        )
    return shipped[name]


def summary(file: Path) -> str:
    """Return what a shipped file says of itself in its first line."""
    first, _, _ = file.read_text(encoding="utf-8").partition("\n")
    return first.removeprefix("#").strip()
