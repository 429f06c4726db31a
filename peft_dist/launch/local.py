"""Run a launcher on this machine and leave no process behind, whatever ends it.

The launcher gets a session of its own, so that a Ctrl-C in the terminal reaches its workers once,
through us, and not a second time from the kernel. Reads no recipe and prints nothing.
"""

import contextlib
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from peft_dist.errors import LaunchError

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SURVIVOR_GRACE_S = 5.0
"""How long workers that outlived their launcher may take to end before they are killed."""

_MARK = "PEFT_DIST_LAUNCH"
"""Tells our workers from all other processes, also after their launcher was killed: torchrun gives
each worker a session of its own, so the launcher's process group does not hold them."""


@dataclass(frozen=True)
class Ended:
    """How a launcher ended."""

    code: int
    """Its exit code; 128 + signal where a signal ended it."""
    signal_name: str | None = None
    """The signal that we were asked to stop with, or None."""


def run_launcher(
    command: Sequence[str], *, environment: Mapping[str, str], error_log: Path
) -> Ended:
    """Run a command to its end with standard error in a file, forwarding signals to its group.

    The first signal asks the launcher to stop its workers; a second one kills everything.

    Args:
        command: The argv.
        environment: Variables added to our own.
        error_log: File that standard error is appended to.

    Raises:
        LaunchError: Where the command cannot be started.
    """
    mark = uuid.uuid4().hex
    try:
        with error_log.open("ab") as errors:
            process = subprocess.Popen(
                list(command),
                env={**os.environ, **environment, _MARK: mark},
                stdin=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
                umask=0o077,
            )
    except OSError as error:
        raise LaunchError(f"cannot be started: {error}", where=command[0]) from error
    received: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number if len(received) == 1 else signal.SIGKILL)

    try:
        with _handled(forward):
            code = process.wait()
    finally:
        _end_survivors(mark)
    if received:
        return Ended(128 + received[0], signal.Signals(received[0]).name)
    return Ended(code if code >= 0 else 128 - code)


def run_tool(command: Sequence[str], *, environment: Mapping[str, str]) -> int:
    """Run one process in the foreground and return its exit code."""
    try:
        done = subprocess.run(list(command), env={**os.environ, **environment}, check=False)
    except OSError as error:
        raise LaunchError(f"cannot be started: {error}", where=command[0]) from error
    return done.returncode if done.returncode >= 0 else 128 - done.returncode


@contextlib.contextmanager
def _handled(handler: object) -> Iterator[None]:
    previous = {number: signal.getsignal(number) for number in FORWARDED}
    try:
        for number in FORWARDED:
            signal.signal(number, handler)  # type: ignore[arg-type]
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def _end_survivors(mark: str) -> None:
    """End the workers whose launcher is gone: first politely, then for good."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in _survivors(mark):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        deadline = time.monotonic() + SURVIVOR_GRACE_S
        while _survivors(mark) and time.monotonic() < deadline:
            time.sleep(0.1)


def _survivors(mark: str) -> list[int]:
    """Return our workers, looking twice: one that is being started shows no environment."""
    found = _marked(mark)
    if not found:
        time.sleep(0.1)
        found = _marked(mark)
    return found


def _marked(mark: str) -> list[int]:
    wanted = f"{_MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile, or somebody else's
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found
