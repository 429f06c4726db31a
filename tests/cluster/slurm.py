"""A real Slurm of several nodes on one machine: started, broken, healed and removed by tests.

Each node is a machine of its own in all that matters here: its address, its host name, its
processes, its /dev/shm. All share the disk, as a cluster's do. It needs root, but no systemd, and
leaves the machine as it was. It does not know what jobs do.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from tests.cluster.daemons import Daemons
from tests.cluster.jobs import Job, parse_jobs
from tests.cluster.nodes import Node, Traffic, ip
from tests.cluster.site import Place, Site, write_site

START_S = 60.0
"""Longest wait for a daemon, or for all nodes. A loaded machine needs several times its usual."""
COMPLETING_S = 15.0
"""How long the end of a job may take. Slurm asks a node that did not hear it again in a minute."""
COMMANDS = ("slurmctld", "slurmd", "slurmdbd", "sbatch", "sacct", "munged", "mariadbd",
            "mariadb-install-db", "ip", "nsenter", "unshare", "mount")  # fmt: skip
PACKAGES = "slurmctld slurmd slurmdbd slurm-client munge mariadb-server iproute2"
DATABASE = (
    # It is gone with the cluster, so nothing has to reach the disk.
    "--innodb-flush-method=nosync", "--innodb-flush-log-at-trx-commit=0",
    "--innodb-doublewrite=0", "--innodb-log-file-size=32M", "--innodb-buffer-pool-size=64M",
)  # fmt: skip
UP = ("idle", "mixed", "allocated", "completing")
"""States of a node that answers and takes jobs."""


def why_not() -> str | None:
    """Return why this machine cannot run a cluster, in one line, or None where it can."""
    if os.geteuid() != 0:
        return "a cluster needs root: its nodes are namespaces"
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        return f"a cluster needs {', '.join(missing)}; on Debian: apt install {PACKAGES}"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc",
         "ip", "link", "add", "probe", "type", "bridge"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if tried.returncode:
        return f"a cluster needs namespaces and bridges: {tried.stderr.strip()}"
    return None


def without_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without what another Slurm has left in it."""
    return {
        name: text
        for name, text in environment.items()
        if not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))
    }


class SlurmCluster:
    """A cluster that runs. `with SlurmCluster.start(folder, nodes=2) as cluster:` makes one."""

    def __init__(self, base: Path, site: Site) -> None:
        """Take a folder that does not exist; nothing is started yet but what removes it all."""
        base.mkdir(parents=True)
        self.site = site
        self.base = base.resolve()
        self.environment = {"SLURM_CONF": str(self.base / "etc" / "slurm.conf")}
        """What Slurm's commands need in theirs."""
        self._daemons = Daemons(self.base, self.environment)
        self._nodes: dict[str, Node] = {}

    @classmethod
    @contextmanager
    def start(cls, base: Path, **settings: Any) -> Iterator[Self]:
        """Start a cluster and wait until all nodes are idle; remove it at the end.

        Args:
            base: Where its files go; must not exist. All but the database stays there.
            settings: Fields of `Site`.
        """
        cluster = cls(base, Site(**settings))
        try:
            cluster._start()
            yield cluster
        finally:
            cluster._daemons.close()

    @property
    def names(self) -> list[str]:
        """The names of all nodes."""
        return self.site.names()

    @property
    def local_disk(self) -> Path:
        """A folder that is another one on each node."""
        return self.base / "local"

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout_s: float = 60,
        check: bool = True,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on this machine, as on a login node.

        Args:
            argv: The command.
            timeout_s: How long it may take.
            check: Whether to raise RuntimeError, with what it printed, where it fails.
            environment: Its environment but for Slurm's variables. Default: ours.
            cwd: Where it runs.
        """
        done = subprocess.run(
            list(argv),
            env=without_slurm(environment or os.environ) | self.environment,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
        if check and done.returncode:
            told = done.stderr.strip() or done.stdout.strip()
            raise RuntimeError(f"{' '.join(argv)} ended with {done.returncode}: {told}")
        return done

    def execute(
        self, node: str, argv: Sequence[str], *, timeout_s: float = 60, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a node, in its root folder and outside of any job."""
        return self.run([*self.enter(node), *argv], timeout_s=timeout_s, check=check)

    def enter(self, node: str) -> list[str]:
        """Return the start of a command that runs on a node."""
        return self._nodes[node].enter()

    def jobs(self) -> dict[str, Job]:
        """Return all jobs by their id, those that ended lately too."""
        return parse_jobs(self.run(["scontrol", "show", "job", "--oneliner"]).stdout)

    def wait_for_job(self, job: str, *states: str, timeout_s: float = 60) -> Job:
        """Wait until a job is in one of some states, like `RUNNING`, and return it."""
        found: Job | None = None

        def arrived() -> bool:
            nonlocal found
            found = self.jobs()[job]
            return found.state in states

        try:
            self.wait_until(arrived, f"{' or '.join(states)}", timeout_s=timeout_s)
        except RuntimeError as error:
            raise RuntimeError(f"job {job} is {found}: {error}") from None
        assert found is not None
        return found

    def node_states(self) -> dict[str, str]:
        """Return what `sinfo` calls each node, like `idle` or `down*`."""
        told = self.run(["sinfo", "-h", "-N", "-p", "main", "-o", "%N %T"]).stdout
        return dict(line.split() for line in told.splitlines())

    def wait_until(
        self,
        condition: Callable[[], bool],
        what: str,
        *,
        timeout_s: float = 60,
        every_s: float = 0.05,
    ) -> None:
        """Wait for something; raise RuntimeError where it does not come or a daemon ends."""
        self._daemons.wait_until(condition, what, timeout_s=timeout_s, every_s=every_s)

    def wire_bytes(self) -> dict[str, Traffic]:
        """Return what has gone over each node's link."""
        return {name: node.traffic() for name, node in self._nodes.items()}

    def power_off(self, node: str) -> None:
        """Take a node's power: everything on it is gone at once, and nobody is told."""
        self._nodes[node].power_off()

    def kill_slurmd(self, node: str) -> None:
        """Kill slurmd alone; jobs on the node live on."""
        self._nodes[node].kill_slurmd()

    def cut(self, node: str) -> None:
        """Pull a node's network plug; everything on it goes on."""
        self._nodes[node].cut()

    def heal(self, node: str) -> None:
        """Put a node's network plug in again."""
        self._nodes[node].heal()

    def start_node(self, node: str) -> None:
        """Start what is not there of a node, its network too; wait until it takes jobs."""
        machine = self._nodes[node]
        machine.heal()
        since = ""
        if not machine.is_on() or machine.slurmd() is None:
            time.sleep(1 - time.time() % 1)  # Slurm tells one start from another by its second
            since = time.strftime("%Y-%m-%dT%H:%M:%S")
            (machine.start_slurmd if machine.is_on() else machine.boot)()

        def takes_jobs() -> bool:
            self._resume([node], "down")
            # Slurm may not have noticed yet that it was away, so its state alone says nothing.
            told = self.run(["scontrol", "show", "node", "--oneliner", node]).stdout
            started = told.partition(" SlurmdStartTime=")[2].split()[0]
            return started >= since and self.node_states()[node] in UP

        self.wait_until(takes_jobs, f"{node} to take jobs")

    def restore(self) -> None:
        """End all jobs and bring all nodes back."""
        for name, node in self._nodes.items():
            node.heal()
            if not node.is_on():
                self._give_up(name)  # or Slurm may wait for the end of jobs that are gone
            if not node.is_on() or node.slurmd() is None:
                self.start_node(name)
        started_s = time.monotonic()

        def calm() -> bool:
            if self._is_calm():
                return True
            # Again each time: a job may have been on its way back into the queue.
            self.run(["scancel", "--user", "root"])
            if time.monotonic() - started_s > COMPLETING_S:
                for name, state in self.node_states().items():
                    if state.startswith("completing"):
                        self._give_up(name)
            self._resume(self.names, "down", "drain")
            return False

        self.wait_until(calm, "an empty queue and idle nodes", timeout_s=90, every_s=0.25)
        for name, node in self._nodes.items():
            if node.strays():
                node.power_off()
                self.start_node(name)

    def _give_up(self, node: str) -> None:
        """Tell Slurm that a node is down, and with it all that ran there."""
        self.run(["scontrol", "update", f"nodename={node}", "state=down", "reason=gone"])

    def _resume(self, nodes: Sequence[str], *states: str) -> None:
        """Tell Slurm that nodes are well again; by itself it looks after most of a minute."""
        for name, state in self.node_states().items():
            if name in nodes and state.startswith(states):
                self.run(["scontrol", "update", f"nodename={name}", "state=resume"])

    def _start(self) -> None:
        self.place = place = self._take_place()
        write_site(self.site, place)
        if self.site.accounting:
            self._start_database(place.database)
        self._daemons.start(
            "munged",
            ["munged", "--foreground", "--force", f"--socket={place.munge}", "--num-threads=4",
             *(f"--{name}-file={place.munge.with_name(name)}" for name in ("key", "pid", "seed"))],
        )  # fmt: skip
        ip("address", "add", f"{place.address()}/24", "dev", place.tag)
        ip("link", "set", place.tag, "up")
        for name in self.names:
            self._nodes[name] = Node(name, self.site, place, self._daemons)
        for cgroup in place.cgroups():
            self._daemons.made("cgroup", cgroup)
            cgroup.mkdir()
        self.wait_until(place.munge.exists, "munged", timeout_s=START_S)
        if self.site.accounting:
            database = place.database / "socket"
            self.wait_until(database.exists, "mariadbd", timeout_s=START_S)
            self._daemons.start("slurmdbd", ["slurmdbd", "-D"], MYSQL_UNIX_PORT=str(database))
            self._wait_for_port(place.address(), place.accounting_port)
        self._daemons.start("slurmctld", ["slurmctld", "-D"])
        # A slurmd that comes too early asks again after a second only.
        self._wait_for_port(place.address(), place.controller_port)
        for node in self._nodes.values():
            node.boot()
        self.wait_until(self._is_calm, "idle nodes", timeout_s=START_S)

    def _start_database(self, folder: Path) -> None:
        self._daemons.made("folder", folder)
        own = ["--no-defaults", "--user=root", f"--datadir={folder}", *DATABASE]
        self.run(
            ["mariadb-install-db", *own, "--skip-test-db",
             "--auth-root-authentication-method=socket"],
            timeout_s=START_S,
        )  # fmt: skip
        self._daemons.start(
            "mariadbd",
            ["mariadbd", *own, f"--socket={folder}/socket", f"--pid-file={folder}/pid",
             "--skip-networking", "--innodb-lock-wait-timeout=900"],
        )  # fmt: skip

    def _take_place(self) -> Place:
        """Take a free number: to make the bridge of that name takes it, and only one can."""
        taken = ip("-4", "-o", "address", "show").stdout
        told = ""
        # Not all from the same one, so that a number is seldom used again at once.
        for number in ((os.getpid() + offset) % 254 + 1 for offset in range(254)):
            place = Place(self.base, number)
            if f" {place.address().removesuffix('1')}" in taken:
                continue
            made = ip("link", "add", place.tag, "type", "bridge", check=False)
            if made.returncode == 0:
                self._daemons.made("link", place.tag)
                return place
            told = made.stderr.strip()
        raise RuntimeError(f"no free network 10.77.X.0/24: {told}")

    def _wait_for_port(self, address: str, port: int) -> None:
        def listens() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex((address, port)) == 0

        self.wait_until(listens, f"port {port}", timeout_s=START_S)

    def _is_calm(self) -> bool:
        idle = set(self.node_states().values()) == {"idle"}
        return idle and not self.run(["squeue", "--noheader"]).stdout
