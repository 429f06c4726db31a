"""The files of a Slurm site: what its administrator would have written. Nothing is started here."""

import os
import socket
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
CONTROLLERS = ("freezer", "memory", "cpuacct")
"""What Slurm's cgroup plugins use with these settings."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """What kind of a site it is. All times are far below a real one's."""

    nodes: int = 3
    """Called node1, node2 and so on."""
    cpus: int = 4
    """Per node; Slurm believes it, whatever this machine has."""
    memory_mb: int = 4000
    """Per node; a job that takes more than it asked for is ended where there are cgroups."""
    gpus: int = 0
    """Per node: something that Slurm hands out and that nothing can compute on."""
    hardware: str = ""
    """What a node has besides, as slurm.conf says it: `Features=h100 TmpDisk=400000`."""
    gpu_kinds: tuple[str, ...] = ()
    """Types of GPUs, `gpus` of each; empty for GPUs without one."""
    tmpfs_gb: int = 0
    """Per node, that jobs ask for as `gres`."""
    accounting: bool = True
    """Whether there is slurmdbd with its database, so that `sacct` answers. Costs start time."""
    job_requeue: bool = True
    """Whether jobs may come back (`JobRequeue`)."""
    grace_s: int = 0
    """From the first signal to the end of a job of partition `low` that is preempted."""
    credential_s: int = 5
    """How long a credential is valid; a requeued job waits a little longer. Slurm's least is 5."""
    node_timeout_s: int = 10
    """After this time without an answer a node is down (`SlurmdTimeout`)."""
    kill_wait_s: int = 5
    """From SIGTERM to SIGKILL of a job that is cancelled or out of time (`KillWait`)."""
    min_job_age_s: int = 300
    """How long a job that has ended can be asked for (`MinJobAge`)."""
    private_tmp: bool = False
    """Whether each node has a /tmp of its own. Folders in `shared` stay the same on all."""
    shared: tuple[Path, ...] = ()
    """With `private_tmp`: what below /tmp is on a shared file system, beside the cluster itself."""
    extra: tuple[str, ...] = ()
    """More lines of slurm.conf."""

    def names(self) -> list[str]:
        """Return the names of its nodes."""
        return [f"node{index}" for index in range(1, self.nodes + 1)]


@dataclass(frozen=True)
class Place:
    """Where a cluster is on this machine; two clusters share none of it."""

    base: Path
    """The folder of all its files."""
    number: int
    """From 1 to 254; its subnet, ports and the names of its links have it."""

    @property
    def tag(self) -> str:
        """What the names of its links, namespaces and cgroups begin with."""
        return f"pd{self.number}"

    @property
    def etc(self) -> Path:
        """The folder of its configuration; on a node it is /etc/slurm."""
        return self.base / "etc"

    @property
    def conf(self) -> Path:
        """Its slurm.conf."""
        return self.etc / "slurm.conf"

    @property
    def log(self) -> Path:
        """The folder of what its daemons say."""
        return self.base / "log"

    @property
    def munge(self) -> Path:
        """The socket of its munged."""
        return self.base / "munge" / "socket"

    @property
    def database(self) -> Path:
        """The folder of its database, with its socket."""
        return self.base / "mysql"

    @property
    def controller_port(self) -> int:
        """Where slurmctld listens, on all addresses, as it cannot be told one."""
        return 21000 + self.number

    @property
    def accounting_port(self) -> int:
        """Where slurmdbd listens, on all addresses too."""
        return 22000 + self.number

    def address(self, node: str | None = None) -> str:
        """Return a node's address, or this machine's on its network."""
        last = 1 if node is None else 10 + int(node.removeprefix("node"))
        return f"10.77.{self.number}.{last}"

    def cgroups(self) -> list[Path]:
        """Return what stands for the root of each hierarchy on its nodes; empty without cgroups."""
        if not all(os.access(CGROUPS / name, os.W_OK) for name in CONTROLLERS):
            return []
        return [CGROUPS / name / self.tag for name in CONTROLLERS]


def write_site(site: Site, place: Place) -> None:
    """Write all files that daemons, nodes and commands read, but for the folder of logs."""
    for folder in (place.etc, place.munge.parent, place.base / "state"):
        folder.mkdir(parents=True)
    for name in site.names():
        for own in ("spool", "disk", "tmp"):
            (place.base / own / name).mkdir(parents=True)
        (place.base / "tmp" / name).chmod(0o1777)
    (place.base / "local").mkdir()
    key = place.munge.with_name("key")
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    files = {
        place.etc / "hosts": _hosts(site, place),
        # A name server that refuses at once: torch's rendezvous looks up the names of addresses,
        # and every one would wait for a server that a node cannot reach.
        place.etc / "resolv.conf": ["nameserver 127.0.0.1", "options timeout:1 attempts:1"],
        place.conf: _slurm_conf(site, place),
        place.etc / "cgroup.conf": _cgroup_conf(place),
        place.etc / "slurmdbd.conf": _slurmdbd_conf(place),
        place.etc / "gres.conf": _gres_conf(site, place),
    }
    for path, lines in files.items():
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    (place.etc / "slurmdbd.conf").chmod(0o600)  # slurmdbd insists


def mounts(site: Site, place: Place, node: str) -> Iterator[list[str]]:
    """Yield arguments of the `mount` commands that make a node's file system its own."""
    yield ["-t", "tmpfs", "-o", "mode=1777", "shm", "/dev/shm"]
    bound = {
        place.etc / "hosts": Path("/etc/hosts"),
        place.etc / "resolv.conf": Path("/etc/resolv.conf"),
        place.etc: Path("/etc/slurm"),
        place.base / "disk" / node: place.base / "local",
    }
    bound |= {own: CGROUPS / own.parent.name for own in place.cgroups()}
    for source, target in bound.items():
        if target.exists():
            yield ["--bind", str(source), str(target)]
    if site.private_tmp:
        own = place.base / "tmp" / node
        for folder in (place.base, *site.shared):
            if folder.is_relative_to("/tmp"):
                inside = own / folder.relative_to("/tmp")
                inside.mkdir(parents=True, exist_ok=True)
                yield ["--rbind", str(folder), str(inside)]
        yield ["--rbind", str(own), "/tmp"]


def short_host() -> str:
    """Return this machine's name as Slurm wants it."""
    return socket.gethostname().partition(".")[0]


def _hosts(site: Site, place: Place) -> list[str]:
    # Some sites reach a node's fast network by its name with an i.
    nodes = [f"{place.address(name)} {name} {name}i" for name in site.names()]
    return ["127.0.0.1 localhost", f"{place.address()} {short_host()}", *nodes]


def _slurm_conf(site: Site, place: Place) -> list[str]:
    names = ",".join(site.names())
    cgroups = bool(place.cgroups())
    counted = [f"gpu:{kind}:{site.gpus}" for kind in site.gpu_kinds] or [f"gpu:{site.gpus}"]
    counted += [f"tmpfs:{site.tmpfs_gb}G"] * bool(site.tmpfs_gb)
    gres = f" Gres={','.join(counted)}" if site.gpus else ""
    hardware = f"CPUs={site.cpus} RealMemory={site.memory_mb}{gres} {site.hardware}"
    return [
        f"ClusterName={place.tag}",
        f"SlurmctldHost={short_host()}({place.address()})",
        f"SlurmctldPort={place.controller_port}",
        "SlurmUser=root",
        "SlurmdUser=root",
        "AuthType=auth/munge",
        "CredType=cred/munge",
        f"AuthInfo=socket={place.munge},cred_expire={site.credential_s}",
        "MpiDefault=none",
        # Without cgroups what a task has started can outlive its step.
        f"ProctrackType=proctrack/{'cgroup' if cgroups else 'linuxproc'}",
        f"TaskPlugin=task/{'cgroup' if cgroups else 'none'}",
        f"JobAcctGatherType=jobacct_gather/{'cgroup' if cgroups else 'linux'}",
        "JobAcctGatherFrequency=task=5",
        "SlurmdParameters=config_overrides",
        "ReturnToService=2",
        "SlurmctldTimeout=10",
        f"SlurmdTimeout={site.node_timeout_s}",
        "MessageTimeout=5",
        "BatchStartTimeout=10",
        f"KillWait={site.kill_wait_s}",
        "UnkillableStepTimeout=30",
        f"MinJobAge={site.min_job_age_s}",
        "SchedulerType=sched/backfill",
        "SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=1,"
        "sched_min_interval=100000",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core_Memory",
        f"DefMemPerCPU={site.memory_mb // site.cpus}",
        *([f"GresTypes=gpu{',tmpfs' if site.tmpfs_gb else ''}"] if site.gpus else []),
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        f"JobRequeue={int(site.job_requeue)}",
        f"StateSaveLocation={place.base}/state",
        f"SlurmdSpoolDir={place.base}/spool/%n",
        f"SlurmdPidFile={place.base}/spool/%n/slurmd.pid",
        f"SlurmctldPidFile={place.base}/state/slurmctld.pid",
        f"SlurmctldLogFile={place.log}/slurmctld.log",
        f"SlurmdLogFile={place.log}/%n.log",
        *_accounting(site, place),
        *(
            f"NodeName={name} NodeAddr={place.address(name)} {hardware} State=UNKNOWN"
            for name in site.names()
        ),
        f"PartitionName=main Nodes={names} Default=YES PriorityTier=5 MaxTime=INFINITE",
        f"PartitionName=low Nodes={names} PriorityTier=1 PreemptMode=REQUEUE"
        f" GraceTime={site.grace_s} MaxTime=INFINITE",
        f"PartitionName=high Nodes={names} PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE",
        *site.extra,
    ]


def _accounting(site: Site, place: Place) -> list[str]:
    if not site.accounting:
        return ["AccountingStorageType=accounting_storage/none"]
    return [
        "AccountingStorageType=accounting_storage/slurmdbd",
        f"AccountingStorageHost={place.address()}",
        f"AccountingStoragePort={place.accounting_port}",
        f"AccountingStoragePass={place.munge}",
        "AccountingStoreFlags=job_comment",
        *(["AccountingStorageTRES=gres/gpu"] if site.gpus else []),
    ]


def _slurmdbd_conf(place: Place) -> list[str]:
    return [
        "AuthType=auth/munge",
        f"AuthInfo=socket={place.munge}",
        "DbdHost=localhost",
        f"DbdAddr={place.address()}",
        f"DbdPort={place.accounting_port}",
        "SlurmUser=root",
        f"LogFile={place.log}/slurmdbd.log",
        f"PidFile={place.base}/state/slurmdbd.pid",
        "StorageType=accounting_storage/mysql",
        "StorageHost=localhost",
        "StorageUser=root",
    ]


def _cgroup_conf(place: Place) -> list[str]:
    if place.cgroups():
        return ["CgroupPlugin=cgroup/v1", "ConstrainRAMSpace=yes"]
    # slurmd loads a cgroup plugin even then; these are the ones that need nothing to be there.
    version = subprocess.run(["slurmd", "-V"], capture_output=True, text=True, check=True).stdout
    return [f"CgroupPlugin={'cgroup/v1' if ' 22.05' in version else 'disabled'}"]


def _gres_conf(site: Site, place: Place) -> Iterator[str]:
    kinds = site.gpu_kinds or ("",)
    for index in range(site.gpus * len(kinds)):
        # Slurm wants a character device; this is a copy of /dev/null.
        device = place.base / f"gpu{index}"
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        kind = kinds[index // site.gpus]
        typed = f" Type={kind}" if kind else ""
        yield f"Name=gpu{typed} File={device} Flags=nvidia_gpu_env"
    if site.tmpfs_gb:
        yield f"Name=tmpfs Count={site.tmpfs_gb}G Flags=CountOnly"
