"""Remember which nodes a run does without, and forget them after a while.

One line per node in the run directory, `NAME TIME`, whose first column the batch script reads.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from peft_dist.common.atomic import replace_file

FORGET_AFTER_S = 24 * 3600.0
"""Seconds after which a node gets another chance: sites repair nodes, and nobody tells us."""
AT_MOST = 16
"""Nodes that are remembered, the newest: more of them have something in common."""


def exclude(run: Path, bad: Sequence[str], *, write: bool = True) -> list[str]:
    """Add nodes to those that a run does without; return all of them.

    Args:
        run: The run directory.
        bad: Their names.
        write: Whether to remember them.
    """
    now = time.time()
    known = _read(run)
    found = {name: at for name, at in known.items() if now - at < FORGET_AFTER_S}
    for name in bad:
        found.pop(name, None)
        found[name] = now
    kept = dict([*found.items()][-AT_MOST:])
    if write and kept != known:
        lines = "".join(f"{name} {at:.0f}\n" for name, at in kept.items())
        replace_file(_file(run), lines)
    return sorted(kept)


def _read(run: Path) -> dict[str, float]:
    found = {}
    with suppress(OSError):
        for line in _file(run).read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                name, at = line.split()
                found[name] = float(at)
    return found


def _file(run: Path) -> Path:
    return run / "slurm" / "excluded"
