"""A lease on a network file system that answers from caches, seen from two hosts.

FUSE stands for NFS: each host has a mount of its own whose attributes, names and missing names are
cached. All times of the lease pass `FASTER` times as fast, and so does NFS's cache of 60 seconds.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.processes import environment, wait_until

FASTER = 10
CACHED_S = 60 / FASTER
STALE_AFTER_S = 90 / FASTER
PROGRAM = f"""
import sys, time
from pathlib import Path
from peft_dist.common.errors import RunDirError, Superseded
from peft_dist.run import lease
for name in ("HEARTBEAT_S", "STALE_AFTER_S", "LOOK_EVERY_S", "CHECK_EVERY_S", "PAUSE_S", "TICK_S"):
    setattr(lease, name, getattr(lease, name) / {FASTER})
folder, began_s = Path(sys.argv[1]), time.monotonic()
try:
    attempt = lease.Attempt.begin(folder / "attempts")
    print(f"attempt {{attempt.number}} after {{time.monotonic() - began_s:.1f}}", flush=True)
    while True:
        time.sleep(0.02)
        attempt.check()
        with (folder / "steps").open("a") as file:
            file.write(f"{{attempt.number}}\\n")
except Superseded:
    print("superseded", flush=True)
except RunDirError as error:
    print(f"refused after {{time.monotonic() - began_s:.1f}}: {{error}}", flush=True)
"""
Start = Callable[[str], "subprocess.Popen[str]"]

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("bindfs") is None or not Path("/dev/fuse").exists(),
    reason="needs root, /dev/fuse and bindfs",
)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a holder on a host; each has a mount and pids of its own."""
    shared = tmp_path / "shared"
    shared.mkdir()
    started: list[subprocess.Popen[str]] = []
    mounts: list[Path] = []

    def on_host(name: str) -> "subprocess.Popen[str]":
        mount = tmp_path / name
        mount.mkdir()
        caching = ",".join(f"{what}_timeout={CACHED_S}" for what in ("attr", "entry", "negative"))
        command = ["bindfs", "-o", caching, str(shared), str(mount)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"this machine mounts nothing by FUSE: {done.stderr.strip()}")
        mounts.append(mount)
        host = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        process = subprocess.Popen(
            [*host, sys.executable, "-c", PROGRAM, str(mount)],
            env=environment(tmp_path / "cache"),
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield on_host
    for process in started:
        process.kill()
        process.communicate()
    for mount in mounts:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


def line_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def program_of(process: "subprocess.Popen[str]") -> int:
    """Return the pid of the program that `unshare` has forked."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_until(lambda: children.read_text(encoding="ascii") != "", "a forked program")
    return int(children.read_text(encoding="ascii"))


def test_a_holder_on_another_host_keeps_its_run_although_its_beats_are_seen_late(
    start: Start,
) -> None:
    holder = start("one")
    assert line_of(holder).startswith("attempt 1 ")
    refused = line_of(start("two"))
    assert "is in use by attempt 1" in refused
    assert float(refused.split()[2].rstrip(":")) < STALE_AFTER_S
    assert holder.poll() is None


@pytest.mark.slow
def test_a_host_that_stands_still_loses_its_run_and_writes_nothing_when_it_wakes(
    start: Start, tmp_path: Path
) -> None:
    steps = tmp_path / "shared" / "steps"
    zombie = start("one")
    assert line_of(zombie).startswith("attempt 1 ")
    wait_until(lambda: steps.exists() and steps.stat().st_size > 20, "steps of attempt 1")
    pid = program_of(zombie)
    os.kill(pid, signal.SIGSTOP)
    taken = line_of(start("two"))
    assert taken.startswith("attempt 2 after ")
    assert float(taken.split()[-1]) >= STALE_AFTER_S
    wait_until(lambda: steps.read_text(encoding="ascii").endswith("2\n"), "steps of attempt 2")
    os.kill(pid, signal.SIGCONT)
    assert line_of(zombie) == "superseded\n"
    time.sleep(0.2)
    lines = steps.read_text(encoding="ascii").split()
    assert lines == sorted(lines), "attempt 1 wrote after it was taken over"
