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


def lives(pid: int) -> bool:
    """Whether a process runs: not ended, nor ended and not yet waited for."""
    with suppress(OSError):
        return _status(Path(f"/proc/{pid}"))[1][0] not in "ZX"
    return False


def started_ticks(pid: int) -> int | None:
    """Return when a process that runs was started, in ticks since boot; None once it has ended."""
    with suppress(OSError):
        state, *rest = _status(Path(f"/proc/{pid}"))[1]
        return None if state in "ZX" else int(rest[18])
    return None


def rank_name(rank: int) -> str:
    """Return what the process of a rank calls itself."""
    return f"rank {rank}"


def call_this_process(name: str) -> None:
    """Give this process a name that is seen in the table; at most 15 bytes of it are."""
    with suppress(OSError):  # no Linux, or a closed /proc: nobody sees it there
        Path("/proc/self/comm").write_text(name, encoding="utf-8")


def _process(folder: Path) -> Process:
    name, fields = _status(folder)
    return Process(int(folder.name), name, int(fields[1]))


def _status(folder: Path) -> tuple[str, list[str]]:
    """Return a process's name, and what follows it: its state, parent, ... (proc_pid_stat(5))."""
    # "PID (name) state parent ...", and the name may hold anything.
    text = (folder / "stat").read_text(encoding="utf-8", errors="replace")
    before, _, after = text.rpartition(")")
    return before.partition("(")[2], after.split()
