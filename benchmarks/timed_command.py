"""Run one command of a benchmark under a time limit, leaving nothing behind.

Knows neither side of a comparison; a command that fails ends the benchmark with its last output.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """Return a TCP port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(cache: Path) -> dict[str, str]:
    """Return the environment of both sides: offline, one thread per rank, caches of their own.

    The caches start empty, so the first round is cold for both sides and later ones are warm.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "MASTER_PORT": str(free_port()),
        "XDG_CACHE_HOME": str(cache),
        "PEFT_DIST_CACHE": str(cache / "peft-dist"),
        "HF_HOME": str(cache / "huggingface"),
        "PYTHONPATH": path,
    }


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a command and all that it started, politely and then for good.

    torchrun starts its workers in sessions of their own, where a signal to the group never comes.
    """
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=10)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass
    for child in family:
        if child.is_running():
            child.kill()
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_command(argv: list[str], *, folder: Path, cache: Path, limit_s: float) -> float:
    """Run a command to its end and return the clock time at which it started."""
    log = folder / "output.log"
    with log.open("wb") as output:
        started = time.time()
        process = subprocess.Popen(
            argv,
            cwd=folder,
            env=environment(cache),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | str = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            code = f"not done after {limit_s:.0f} s"
        finally:
            stop(process)
    if code != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        sys.exit(
            f"{' '.join(argv)}\n{tail}\npeers: stopped ({code}); the end of its output is above"
        )
    return started
