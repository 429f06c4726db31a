"""The kernel's table of processes: their names, parents and environments; this machine's alone."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

RANK_SERVER = "rank server"
"""What the process calls itself that the ranks of a node are forked from."""


@dataclass(frozen=True)
class Process:
    """A process as it was when it was looked at."""

    pid: int
    name: str
    """What `ps -o comm` and `top` show: its program, or what it calls itself."""
    parent: int


def processes(environment: str) -> Iterator[Process]:
    """Yield every process that was started with a setting in its environment.

    Args:
        environment: The setting, NAME=VALUE. What a process sets for itself is not seen.
    """
    wanted = environment.encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # ended meanwhile, or somebody else's
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                yield _process(folder)


def children(parent: int) -> Iterator[Process]:
    """Yield the children of a process."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found = _process(folder)
            if found.parent == parent:
                yield found


def rank_name(rank: int) -> str:
    """Return what the process of a rank calls itself."""
    return f"rank {rank}"


def call_this_process(name: str) -> None:
    """Give this process a name that is seen in the table; at most 15 bytes of it are."""
    with suppress(OSError):  # no Linux, or a closed /proc: nobody sees it there
        Path("/proc/self/comm").write_text(name, encoding="utf-8")


def _process(folder: Path) -> Process:
    # "PID (name) state parent ...", and the name may hold anything.
    text = (folder / "stat").read_text(encoding="utf-8", errors="replace")
    before, _, after = text.rpartition(")")
    return Process(int(folder.name), before.partition("(")[2], int(after.split()[1]))
