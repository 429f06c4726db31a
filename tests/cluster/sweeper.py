"""A process that is told what a cluster is made of, and removes it when its owner ends.

It is the only way in which anything is removed, whether the owner stops, fails half-way or is
killed. It reads lines of JSON, one for each thing made, and starts when there are no more. It ends
nothing gently: of a cluster nothing is kept but what it wrote.
"""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

PROCESSES_S = 20.0
"""How long killed processes may take to end."""
CGROUP_S = 10.0
"""How long the kernel may take to see that a cgroup is empty."""


def children(pid: int) -> list[int]:
    """Return the children of a process; none where it is gone."""
    try:
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):
        return []


def thaw(cgroup: Path) -> None:
    """Let processes go on that Slurm has frozen in order to kill them; frozen ones cannot die."""
    with suppress(OSError):  # any of it may vanish at any time
        for state in cgroup.rglob("freezer.state"):
            state.write_text("THAWED")


def kill(pids: Sequence[int], freezers: Sequence[Path] = ()) -> bool:
    """Kill processes with their children and wait for their end; return whether it came."""
    waiting = set()
    for pid in [pid for parent in pids for pid in (*children(parent), parent)]:
        with suppress(ProcessLookupError):
            waiting.add(os.pidfd_open(pid))
    for handle in waiting:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
    deadline = time.monotonic() + PROCESSES_S
    while waiting and time.monotonic() < deadline:
        for cgroup in freezers:
            thaw(cgroup)
        ended, _, _ = select.select(waiting, [], [], 0.1)
        for handle in ended:
            os.close(handle)
            waiting.remove(handle)
    for handle in waiting:
        os.close(handle)
    return not waiting


def remove_cgroup(name: str) -> bool:
    """Remove a cgroup and those below it; return whether all are gone."""
    cgroup = Path(name)
    deadline = time.monotonic() + CGROUP_S
    while cgroup.exists():
        for folder, _, _ in os.walk(cgroup, topdown=False):
            with suppress(OSError):  # still busy
                os.rmdir(folder)  # noqa: PTH106 - os.walk gives strings
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def ip(*arguments: str) -> bool:
    """Run `ip`; return whether it succeeded."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"ip {' '.join(arguments)}: {done.stderr.strip()}", flush=True)
    return done.returncode == 0


def alive(handle: int) -> bool:
    """Return whether the process of a pidfd has not ended."""
    return not select.select([handle], [], [], 0)[0]


def sweep(made: list[tuple[str, str]], processes: dict[int, int]) -> bool:
    """Remove everything that was made; return whether it worked.

    Args:
        made: Kind and name of each thing, in the order of its making.
        processes: Their pids by their pidfds.
    """
    # While a process has not ended, its pid is nobody else's.
    living = [pid for handle, pid in processes.items() if alive(handle)]
    worked = kill(living, [Path(value) for kind, value in made if kind == "cgroup"])
    for kind, value in made[::-1]:
        if not REMOVE[kind](value):
            print(f"cannot remove {kind} {value}", flush=True)
            worked = False
    return worked


def remove_link(name: str) -> bool:
    """Remove a network link."""
    return not Path("/sys/class/net", name).exists() or ip("link", "delete", name)


def remove_netns(name: str) -> bool:
    """Remove a network namespace."""
    return not Path("/run/netns", name).exists() or ip("netns", "delete", name)


def remove_folder(name: str) -> bool:
    """Remove a folder with all that is in it."""
    shutil.rmtree(name, ignore_errors=True)
    return not Path(name).exists()


REMOVE = {
    "link": remove_link,
    "netns": remove_netns,
    "folder": remove_folder,
    "cgroup": remove_cgroup,
}


def main() -> int:
    """Remember until the owner ends, then sweep."""
    made: list[tuple[str, str]] = []
    processes: dict[int, int] = {}
    for line in sys.stdin:
        if not line.endswith("\n"):  # its owner was killed in writing it
            break
        kind, value = json.loads(line)
        if kind == "process":
            with suppress(ProcessLookupError):
                processes[os.pidfd_open(int(value))] = int(value)
        else:
            made.append((kind, value))
    return 0 if sweep(made, processes) else 1


if __name__ == "__main__":
    sys.exit(main())
