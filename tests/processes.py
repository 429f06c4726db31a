"""Run commands that may start processes of their own, with an end to all of them."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def environment(cache: Path, **extra: str) -> dict[str, str]:
    """Return our environment without what a launcher left in it, on the CPU, with its own cache."""
    launchers = ("ACCELERATE_", "FSDP_", "PARALLELISM_", "OMP_", "RANK", "WORLD_SIZE", "LOCAL_")
    kept = {name: text for name, text in os.environ.items() if not name.startswith(launchers)}
    path = os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH"))))
    return {
        **kept,
        "PYTHONPATH": path,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PEFT_DIST_CACHE": str(cache),
        **extra,
    }


def torchrun(processes: int) -> list[str]:
    """Return the start of a command that runs a script in several processes."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", str(processes)]  # fmt: skip


def forked_world(*sizes: int) -> list[str]:
    """Return the start of a command that runs a script in worlds of so many ranks, in turn.

    For scripts that use the library: what a launcher does is for `torchrun`.
    """
    return [sys.executable, "-m", "tests.forked_world", ",".join(map(str, sizes))]


def free_port() -> int:
    """Return a port that nobody listens at, and that no outgoing connection is given.

    Tests that run side by side choose from ranges of their own.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    ports = range(20000, 32000)[worker::workers]
    while True:
        port = random.choice(ports)
        with socket.socket() as one, suppress(OSError):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(("127.0.0.1", port))
            return port


def wait_until(is_so: Callable[[], bool], what: str, *, timeout_s: float = 60) -> None:
    """Return as soon as something is so, and fail the test where it is not in time."""
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.01)


def run(
    command: Sequence[str], *, environment: Mapping[str, str], cwd: Path, timeout_s: float = 180
) -> subprocess.CompletedProcess[str]:
    """Run a command in a session of its own; past its time, end everything it started.

    Raises:
        subprocess.TimeoutExpired: With what it had said until then.
    """
    process = subprocess.Popen(
        list(command),
        env=dict(environment),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except BaseException:
        # torchrun gives its workers sessions of their own and ends them when it is asked to stop.
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(list(command), process.returncode, output, errors)


def error_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the lines in which the program names a user's fault."""
    return [line for line in done.stderr.splitlines() if line.startswith("peft-dist: error:")]
