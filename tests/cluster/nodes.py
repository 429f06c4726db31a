"""A node: namespaces with an address, a host name, processes and a /dev/shm of their own.

It knows nothing of jobs; whether Slurm believes in the node is asked elsewhere.
"""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tests.cluster.daemons import Daemons
from tests.cluster.site import Place, Site, mounts
from tests.cluster.sweeper import children, kill

INIT = Path(__file__).with_name("node_init.py")


class Traffic(NamedTuple):
    """Bytes on a node's link since the cluster was started, with all headers."""

    sent: int
    received: int


def ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `ip`; raise RuntimeError with its words where it fails and `check` is set."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done


class Node:
    """A machine that can lose its power and its network."""

    def __init__(self, name: str, site: Site, place: Place, daemons: Daemons) -> None:
        """Connect it to the cluster's network; it is off."""
        self.name = name
        self._site, self._place, self._daemons = site, place, daemons
        self._link = f"{place.tag}-{name}"
        """Of its network namespace too."""
        daemons.made("netns", self._link)
        daemons.made("link", self._link)
        ip("netns", "add", self._link)
        peer = ("peer", "name", "eth0", "netns", self._link)
        ip("link", "add", self._link, "type", "veth", *peer)
        ip("link", "set", self._link, "master", place.tag, "up")
        inside = ("-n", self._link)
        ip(*inside, "link", "set", "lo", "up")
        ip(*inside, "address", "add", f"{place.address(name)}/24", "dev", "eth0")
        ip(*inside, "link", "set", "eth0", "up")
        ip(*inside, "route", "add", "default", "via", place.address())

    def boot(self) -> None:
        """Start it, and slurmd on it."""
        settings = {
            "hostname": self.name,
            "mounts": list(mounts(self._site, self._place, self.name)),
            "slurmd": ["slurmd", "-D", "-N", self.name],
        }
        path = self._place.base / "spool" / self.name / "node.json"
        path.write_text(json.dumps(settings), encoding="utf-8")
        argv = ["nsenter", f"--net=/run/netns/{self._link}",
                "unshare", "--uts", "--ipc", "--mount", "--pid", "--mount-proc",
                "--fork", "--kill-child", sys.executable, "-I", str(INIT), str(path)]  # fmt: skip
        self._daemons.start(self.name, argv)

    def is_on(self) -> bool:
        """Return whether it has power."""
        return self._daemons.runs(self.name)

    def power_off(self) -> None:
        """End everything on it at once; nobody is told."""
        self.cut()  # or the kernel would close its connections in good order
        own = [cgroup / f"slurm_{self.name}" for cgroup in self._place.cgroups()]
        self._daemons.end(self.name, own)

    def cut(self) -> None:
        """Pull its network plug."""
        ip("link", "set", self._link, "down")

    def heal(self) -> None:
        """Put its network plug in."""
        ip("link", "set", self._link, "up")

    def slurmd(self) -> int | None:
        """Return its slurmd's pid on this machine, or None where none runs."""
        for pid in children(self._init()):
            with suppress(FileNotFoundError):  # it has just ended
                if Path(f"/proc/{pid}/comm").read_text(encoding="ascii") == "slurmd\n":
                    return pid
        return None

    def kill_slurmd(self) -> None:
        """Kill slurmd alone; jobs live on."""
        pid = self.slurmd()
        if pid is None:
            raise RuntimeError(f"no slurmd runs on {self.name}")
        kill([pid])

    def start_slurmd(self) -> None:
        """Have a killed slurmd started again."""
        os.kill(self._init(), signal.SIGUSR1)

    def strays(self) -> list[int]:
        """Return what runs on it beside slurmd, by pids on this machine."""
        return [pid for pid in children(self._init()) if pid != self.slurmd()]

    def enter(self) -> list[str]:
        """Return the start of a command that runs on it."""
        return ["nsenter", "--target", str(self._init()), "--net", "--uts", "--ipc", "--mount",
                "--pid", "--"]  # fmt: skip

    def traffic(self) -> Traffic:
        """Return what has gone over its link."""
        counts = Path("/sys/class/net", self._link, "statistics")
        # What this end of the link receives is what the node has sent.
        return Traffic(*(int((counts / f"{way}_bytes").read_text()) for way in ("rx", "tx")))

    def _init(self) -> int:
        """Return its first process."""
        if not self.is_on():
            raise RuntimeError(f"{self.name} is off")
        (init,) = children(self._daemons.pid(self.name))
        return init
