"""The cluster itself: several machines, faults that are real, and nothing left of it afterwards."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.site import CGROUPS
from tests.cluster.slurm import SlurmCluster, why_not
from tests.faults.long import only_long
from tests.processes import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.usefixtures("able")]

OWNER = """
import sys, time
from pathlib import Path
from tests.cluster.slurm import SlurmCluster
with SlurmCluster.start(Path(sys.argv[1]), nodes=2, accounting=False) as cluster:
    cluster.run(["sbatch", "--output=/dev/null", "-N2", "--wrap=srun sleep 600"])
    cluster.wait_for_job("1", "RUNNING")
    print(cluster.place.tag, flush=True)
    time.sleep(600)
"""


def test_nodes_are_machines_of_their_own(cluster: SlurmCluster) -> None:
    told = cluster.run(["srun", "-N4", "bash", "-c", "hostname; hostname -i; ls -A /dev/shm"])
    addresses = [cluster.place.address(name) for name in cluster.names]
    assert sorted(told.stdout.split()) == sorted([*cluster.names, *addresses])
    cluster.execute("node1", ["touch", "/dev/shm/mine", f"{cluster.local_disk}/mine"])
    look = ["ls", "/dev/shm", str(cluster.local_disk)]
    assert cluster.execute("node1", look).stdout.count("mine") == 2
    assert cluster.execute("node2", look).stdout.count("mine") == 0
    assert not (cluster.local_disk / "mine").exists()


def test_a_node_is_told_at_once_that_an_address_has_no_name(cluster: SlurmCluster) -> None:
    look_up = "import socket; print(socket.gethostbyaddr('10.77.0.200'))"
    started_s = time.monotonic()
    done = cluster.execute("node1", [sys.executable, "-c", look_up], check=False)
    assert "socket.herror" in done.stderr
    assert time.monotonic() - started_s < 3


def test_bytes_between_nodes_are_counted_where_they_went(cluster: SlurmCluster) -> None:
    before = cluster.wire_bytes()
    listen = (
        "import socket; s = socket.create_server(('', 7000)).accept()[0]\nwhile s.recv(65536): 1"
    )
    send = "import socket; socket.create_connection(('node2', 7000), 5).sendall(bytes(5_000_000))"
    script = f"""
        if [ "$SLURM_PROCID" = 1 ]; then exec {sys.executable} -c "{listen}"; fi
        sleep 1
        exec {sys.executable} -c "{send}"
    """
    cluster.run(["srun", "-N2", "-w", "node1,node2", "bash", "-c", script])
    after = cluster.wire_bytes()
    grown = {
        name: [new - old for new, old in zip(after[name], before[name], strict=True)]
        for name in cluster.names
    }
    assert 5_000_000 < grown["node1"][0] < 6_000_000
    assert 5_000_000 < grown["node2"][1] < 6_000_000
    assert max(*grown["node3"], *grown["node4"]) < 100_000


@only_long
def test_a_job_comes_back_without_the_node_that_lost_its_power(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    job = submit_beats(cluster, tmp_path)
    cluster.power_off("node1")
    said = (tmp_path / "node1").read_text(encoding="ascii")
    assert wait_for_restart(cluster, job) == "node2"
    assert cluster.node_states()["node1"] == "down*"
    assert (tmp_path / "node1").read_text(encoding="ascii") == said
    cluster.wait_until(
        lambda: (
            cluster.run(["sacct", "-nPXD", "-j", job, "-o", "State"]).stdout.split()
            == ["NODE_FAIL", "RUNNING"]
        ),
        "both starts in the accounts",
    )
    cluster.start_node("node1")
    assert cluster.node_states()["node1"] == "idle"


@only_long
def test_a_task_lives_on_where_only_the_network_is_gone(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    job = submit_beats(cluster, tmp_path)
    cluster.cut("node1")
    assert wait_for_restart(cluster, job) == "node2"
    beats = tmp_path / "node1"
    said = beats.stat().st_size
    cluster.wait_until(lambda: beats.stat().st_size > said, "a task that Slurm gave up")
    cluster.start_node("node1")
    cluster.wait_until(lambda: not tasks(cluster, "node1"), "the end of that task")


def test_a_task_lives_on_without_slurmd(cluster: SlurmCluster, tmp_path: Path) -> None:
    job = submit_beats(cluster, tmp_path)
    cluster.kill_slurmd("node1")
    assert tasks(cluster, "node1")
    cluster.start_node("node1")
    assert tasks(cluster, "node1")
    assert cluster.jobs()[job].state == "RUNNING"


def test_what_a_test_leaves_behind_is_put_right(slurm: SlurmCluster, tmp_path: Path) -> None:
    job = submit_beats(slurm, tmp_path)
    slurm.run(["sbatch", "--output=/dev/null", "--begin=now+1hour", "--wrap=true"])
    slurm.execute("node2", ["bash", "-c", "sleep 600 >/dev/null 2>&1 &"])
    slurm.run(["scontrol", "update", "nodename=node3", "state=drain", "reason=test"])
    slurm.kill_slurmd("node4")
    slurm.power_off("node1")
    slurm.restore()
    assert slurm.node_states() == dict.fromkeys(slurm.names, "idle")
    assert slurm.jobs()[job].state == "CANCELLED"
    assert not slurm.execute("node2", ["pgrep", "sleep"], check=False).stdout
    assert len(slurm.run(["srun", "-N4", "hostname"]).stdout.split()) == 4


def test_two_clusters_know_nothing_of_each_other(slurm: SlurmCluster, base: Path) -> None:
    with SlurmCluster.start(base, nodes=2, accounting=False) as other:
        assert other.place.number != slurm.place.number
        job = other.run(
            ["sbatch", "--parsable", "--output=/dev/null", "-w", "node1", "--wrap=sleep 600"]
        ).stdout.strip()
        other.wait_for_job(job, "RUNNING")
        other.power_off("node2")
        assert slurm.run(["squeue", "-h"]).stdout == ""
        assert sorted(slurm.run(["srun", "-N2", "hostname"]).stdout.split()) == ["node1", "node2"]
        assert other.jobs()[job].state == "RUNNING"
    assert slurm.run(["srun", "hostname"]).stdout == "node1\n"


def test_a_tmp_of_its_own_hides_nothing_that_is_shared(
    able: None, base: Path, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    with SlurmCluster.start(
        base, nodes=2, accounting=False, private_tmp=True, shared=(shared,), gpus=2
    ) as cluster:
        script = f'echo "$CUDA_VISIBLE_DEVICES" > {shared}/told; touch /tmp/mine'
        cluster.run(["srun", "-w", "node1", "--gpus-per-node=2", "bash", "-c", script])
        assert (shared / "told").read_text() == "0,1\n"
        assert "mine" in cluster.execute("node1", ["ls", "/tmp"]).stdout
        assert "mine" not in cluster.execute("node2", ["ls", "/tmp"]).stdout
        assert not Path("/tmp/mine").exists()


@pytest.mark.parametrize("accounting", [False, True])
def test_nothing_is_left_of_a_cluster_that_has_ended(
    able: None, base: Path, accounting: bool
) -> None:
    with SlurmCluster.start(base, nodes=2, accounting=accounting) as cluster:
        tag = cluster.place.tag
        cluster.run(["sbatch", "--output=/dev/null", "-N2", "--wrap=srun sleep 600"])
        cluster.wait_for_job("1", "RUNNING")
        kinds = set(traces(base, tag))
        assert kinds >= {"process", "link", "netns", "mount"}
    assert traces(base, tag) == {}


def test_nothing_is_left_of_a_cluster_whose_owner_was_killed(able: None, base: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(base)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    tag = owner.stdout.readline().strip()
    assert "process" in traces(base, tag)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    deadline_s = time.monotonic() + 20
    while traces(base, tag):
        assert time.monotonic() < deadline_s, traces(base, tag)
        time.sleep(0.1)


def test_a_daemon_that_cannot_start_is_named_with_its_words(able: None, base: Path) -> None:
    with (
        pytest.raises(RuntimeError, match=r"(?s)slurmctld ended with 1:.*Nonsense"),
        SlurmCluster.start(base, nodes=2, accounting=False, extra=("Nonsense=1",)),
    ):
        pass
    assert "process" not in traces(base, "pd")


def test_the_reason_why_there_is_no_cluster_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    reason = why_not()
    assert reason is not None
    assert "slurmctld" in reason
    assert "\n" not in reason


def submit_beats(cluster: SlurmCluster, folder: Path) -> str:
    """Run a job on node1 that writes to a file named after its node, for ever."""
    beats = f"while :; do echo beat >> {folder}/$SLURMD_NODENAME; sleep 0.2; done"
    job = cluster.run(
        ["sbatch", "--parsable", "--output=/dev/null", f"--wrap={beats}"]
    ).stdout.strip()
    cluster.wait_until((folder / "node1").exists, "the job's first words")
    return job


def wait_for_restart(cluster: SlurmCluster, job: str) -> str:
    """Wait until a job runs again, and return where."""

    def again() -> bool:
        found = cluster.jobs()[job]
        return (found.restarts, found.state) == (1, "RUNNING")

    cluster.wait_until(again, "the job's second start")
    return cluster.jobs()[job].nodes


def tasks(cluster: SlurmCluster, node: str) -> list[str]:
    """Return the processes of our job on a node."""
    return cluster.execute(node, ["pgrep", "-f", "slurm_script"], check=False).stdout.split()


def traces(base: Path, tag: str) -> dict[str, list[str]]:
    """Return what there is of a cluster on this machine, by kind."""
    mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    found: dict[str, Callable[[], Iterator[str]]] = {
        "process": lambda: processes(base),
        "link": lambda: names("/sys/class/net", tag),
        "netns": lambda: names("/run/netns", tag),
        "cgroup": lambda: (str(path) for path in CGROUPS.glob(f"*/{tag}")),
        "mount": lambda: (line for line in mounts if str(base) in line or f"/{tag}-" in line),
    }
    return {kind: list(seen()) for kind, seen in found.items() if list(seen())}


def names(folder: str, tag: str) -> Iterator[str]:
    """Yield what a folder has of a cluster."""
    for name in os.listdir(folder):  # noqa: PTH208 - names, not paths
        if name == tag or name.startswith(f"{tag}-"):
            yield name


def processes(base: Path) -> Iterator[str]:
    """Yield the command lines of all processes that name a cluster's folder or have it from it."""
    for folder in Path("/proc").glob("[0-9]*"):
        if int(folder.name) == os.getpid():
            continue
        try:
            environment = (folder / "environ").read_bytes()
            command = (folder / "cmdline").read_bytes()
        except OSError:  # gone, or guarded even from root
            continue
        if f"SLURM_CONF={base}/".encode() in environment or str(base).encode() in command:
            yield f"{folder.name}: {command.decode(errors='replace')}"
