"""A stranger at every port of a job: he runs no code, joins nothing and stops nothing."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.cluster.slurm import SlurmCluster
from tests.cluster.submitted import Run, Runs
from tests.faults.long import cases, only_long
from tests.faults.oracles import assert_same_run, last_step, records
from tests.processes import ROOT, environment

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]

MESSAGES = cases(100, 10_000)
RUNS_S, RESTS_S = 0.01, 0.5
"""A rank that runs for a moment now and then lets a run of seconds last as long as the attack."""


def ranks(run: Run) -> dict[int, int]:
    """Return the processes of a run that train, by rank, with their pids on this machine."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            name = (process / "comm").read_text(encoding="utf-8").strip()
            rank = name.removeprefix("rank ")
            if f"{run.path}/recipe.yaml".encode() in words and rank.isdecimal():
                found[int(rank)] = int(process.name)
    return found


def ports(cluster: SlurmCluster, node: str) -> dict[str, bool]:
    """Return every address at which a job listens on a node, and whether the port is Slurm's own.

    What slurmd listens at is no job's.
    """
    own, found = cluster.place.address(node), {}
    for line in cluster.execute(node, ["ss", "-Hlntp"]).stdout.splitlines():
        if '"slurmd"' not in line:
            host, _, port = line.split()[3].rpartition(":")
            is_srun = '"srun"' in line
            found[f"{own if host in ('*', '0.0.0.0') else host}:{port}"] = is_srun
    return found


@contextmanager
def held_back(pid: int) -> Iterator[None]:
    """Let a process run for a moment now and then."""
    done = threading.Event()

    def stop_and_go() -> None:
        with suppress(ProcessLookupError):  # its launcher has ended it
            while not done.is_set():
                os.kill(pid, signal.SIGSTOP)
                done.wait(RESTS_S)
                os.kill(pid, signal.SIGCONT)
                time.sleep(RUNS_S)

    thread = threading.Thread(target=stop_and_go)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def attack(
    cluster: SlurmCluster, nodes: list[str], canary: Path, *, stays: bool = True
) -> list[str]:
    """Attack every port of a job at once, from each of its nodes; return those that are ours.

    Args:
        cluster: Where the job runs.
        nodes: Those of the job.
        canary: The file that is made where somebody unpickles what the strangers send.
        stays: Whether nobody ends the processes meanwhile.
    """
    canary.parent.mkdir(exist_ok=True)
    canary.parent.chmod(0o777)  # the canary is not to be stopped by its folder
    at = {node: ports(cluster, node) for node in nodes}
    strangers = [
        subprocess.Popen(
            [*cluster.enter(node), sys.executable, "-m", "tests.stranger", str(canary),
             str(MESSAGES), *at[node]],
            env=environment(canary.parent), cwd=ROOT, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        for node in nodes
    ]  # fmt: skip
    for node, stranger in zip(nodes, strangers, strict=True):
        told = stranger.communicate(timeout=800)[0].splitlines()
        print(node, told)
        taken = dict(line.split() for line in told)
        assert list(taken) == list(at[node])
        for port, is_sruns in at[node].items():  # whose queue may fill up
            assert not stays or is_sruns or int(taken[port]) == MESSAGES, (node, told)
    return [port for each in at.values() for port, is_sruns in each.items() if not is_sruns]


def test_a_stranger_at_every_port_of_a_job_changes_nothing(
    cluster: SlurmCluster, runs: Runs, reference: Path, tmp_path: Path
) -> None:
    run = runs.submit("one", nodes=1, processes_per_node=2, cpus_per_node=2)
    run.wait_for_step(1)
    with held_back(ranks(run)[1]):
        attacked = attack(cluster, ["node1"], tmp_path / "open" / "canary")
    assert len(attacked) >= 3, "the launcher's store, and gloo in each rank"
    assert last_step(run.path) < 100, "the attack came after the training"
    run.wait_for_end()
    assert not (tmp_path / "open" / "canary").exists()
    assert_same_run(run.path, reference)
    assert (run.starts, len(records(run.path, "start"))) == (1, 1)


@only_long
def test_strangers_on_four_nodes_change_nothing_even_while_the_nodes_meet_again(
    cluster: SlurmCluster, runs: Runs, tmp_path: Path
) -> None:
    undisturbed = runs.train_here("here", nproc=4)
    run = runs.submit("four", nodes=4)
    run.wait_for_step(1)
    canary = tmp_path / "open" / "canary"
    with ThreadPoolExecutor(1) as pool:
        before = ranks(run)
        with held_back(before[1]):
            first = pool.submit(attack, cluster, cluster.names, canary, stays=False)
            time.sleep(5)
            os.kill(before[3], signal.SIGKILL)  # all nodes meet again, while they are written to
            run.wait_until(lambda: len(records(run.path, "start")) == 2, "a second start")
        with held_back(ranks(run)[1]):
            first.result()
            attacked = attack(cluster, cluster.names, canary)
    assert len(attacked) >= 5, "the store of node 1, and gloo on each"
    assert last_step(run.path) < 100, "the attack came after the training"
    run.wait_for_end()
    assert not canary.exists()
    assert_same_run(run.path, undisturbed)
    assert (run.starts, len(records(run.path, "start"))) == (1, 2)
