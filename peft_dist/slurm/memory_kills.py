"""Count the processes of this job that the kernel killed for its memory, from the job's cgroup.

Slurm writes it only to its own log, and a launcher only sees that a process was killed.
"""

import re
from contextlib import suppress
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
FILES = {"": "memory.events", "memory": "memory.oom_control"}
"""Where kills are counted: in the one hierarchy of version 2, or in version 1's for memory."""


def kills(cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """Return how many processes of this one's cgroup were killed for memory; 0 if not known.

    Args:
        cgroups: Where the hierarchies are mounted.
        own: The list of this process's cgroups: `4:memory:/slurm/uid_1000/job_7/step_0/task_0`.
    """
    found = 0
    with suppress(OSError):
        for line in own.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            for controller in controllers.split(","):
                if controller in FILES:
                    found += _count(cgroups / controller, path, FILES[controller])
    return found


def _count(hierarchy: Path, path: str, file: str) -> int:
    # In a container the mount may begin below the path's root.
    parts = Path(path).parts[1:]
    for begin in range(len(parts)):
        with suppress(OSError):
            text = hierarchy.joinpath(*parts[begin:], file).read_text(encoding="utf-8")
            counted = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
            return int(counted[1]) if counted else 0
    return 0
