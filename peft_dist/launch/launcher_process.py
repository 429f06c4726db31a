"""Run a launcher on this machine and leave no process behind, whatever ends it.

The launcher gets a session of its own, so that a Ctrl-C in the terminal reaches its workers once,
through us, and not a second time from the kernel. Reads no recipe, and prints nothing itself.
"""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from peft_dist.common.env import FAILURES, LAUNCH_MARK, TMPDIR
from peft_dist.common.errors import LaunchError
from peft_dist.common.process_table import RANK_SERVER, Process, processes
from peft_dist.common.sharing import run_umask
from peft_dist.run.failure_files import WorkerFailure, read_failure
from peft_dist.run.saving import is_saving

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
RESCAN_S = 0.2
"""How often the launcher is looked at, and after a signal its workers."""
SURVIVOR_GRACE_S = 30.0
"""How long workers that outlived their launcher may take to save and end before they are killed."""
IDLE_GRACE_S = 2.0
"""How long a launcher without workers may take to end once it is asked: torchrun can wait for the
launchers of other nodes inside C++, where Python hears no signal, for five minutes."""
KILL_WAIT_S = 5.0
"""How long killed processes may take to go; one in a dead file system never does."""

# The mark also finds workers whose launcher was killed: torchrun gives each its own session, so
# the launcher's process group does not hold them.


@dataclass(frozen=True)
class Ended:
    """How a launcher ended."""

    code: int
    """Its exit code; 128 + signal where a signal ended it."""
    signal_name: str | None = None
    """The signal that we were asked to stop with, or None."""
    failure: WorkerFailure | None = None
    """The error that ended its workers, where one of them left it."""
    killed: bool = False
    """Whether a second SIGINT ended its workers before they had saved."""


def run_launcher(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    error_log: Path | None,
    is_lost: Callable[[], bool] = lambda: False,
    tell: Callable[[str], None] = lambda _text: None,
) -> Ended:
    """Run a command to its end, passing signals on to its workers.

    They save and end in their own time. The launcher itself is only asked to stop while it has no
    workers: torchrun would kill those that need more than 30 s. A second SIGINT kills everything,
    once a save that is under way is done.

    Args:
        command: The argv.
        environment: Variables added to our own.
        error_log: File that standard error is appended to; None leaves it where ours is.
        is_lost: Asked again and again; once it is true everything is killed, as in a crash.
        tell: Takes what a person who asks us to stop should know, where no worker could say it.

    Raises:
        LaunchError: Where the command cannot be started.
    """
    mark = uuid.uuid4().hex
    received: list[int] = []
    with _handled(lambda number, _frame: received.append(number)), ExitStack() as stack:
        try:
            folder = tempfile.TemporaryDirectory(prefix="peft-dist-", ignore_cleanup_errors=True)
            failures = Path(stack.enter_context(folder))
            with error_log.open("ab") if error_log else contextlib.nullcontext() as errors:
                process = subprocess.Popen(
                    list(command),
                    env={**os.environ, **environment, **_own(command, mark, failures)},
                    stdin=subprocess.DEVNULL,
                    stderr=errors,
                    start_new_session=True,
                    umask=run_umask(),
                )
        except OSError as error:
            raise LaunchError(f"cannot be started: {error}", where=command[0]) from error
        try:
            code, killed = _supervise(process, _Launch(mark, failures, received, tell), is_lost)
        finally:
            _end_survivors(mark, received, failures)
        failure = read_failure(failures)
    if received:
        return Ended(128 + received[0], signal.Signals(received[0]).name, failure, killed)
    return Ended(code if code >= 0 else 128 - code, failure=failure)


def _own(command: Sequence[str], mark: str, folder: Path) -> dict[str, str]:
    """Return what a launcher is told besides; torchrun leaves folders in its temporary one."""
    own = {LAUNCH_MARK: mark, FAILURES: str(folder)}
    if "--rdzv_backend" in command:  # ours, which gives the workers their own TMPDIR back
        own |= {"TMPDIR": str(folder), TMPDIR: os.environ.get("TMPDIR", "")}
    return own


def run_tool(command: Sequence[str], *, environment: Mapping[str, str]) -> int:
    """Run one process in the foreground, which may ask nothing; return its exit code."""
    try:
        done = subprocess.run(
            list(command),
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except OSError as error:
        raise LaunchError(f"cannot be started: {error}", where=command[0]) from error
    return done.returncode if done.returncode >= 0 else 128 - done.returncode


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    previous = {number: signal.getsignal(number) for number in PASSED_ON}
    if previous[signal.SIGHUP] == signal.SIG_IGN:
        del previous[signal.SIGHUP]  # nohup
    try:
        for number in previous:
            signal.signal(number, handler)
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


@dataclass
class _Launch:
    """What watching a launcher needs to know."""

    mark: str
    failures: Path
    received: Sequence[int]
    tell: Callable[[str], None]
    told: set[str] = field(default_factory=set)

    def say(self, text: str) -> None:
        """Tell it once."""
        if text not in self.told:
            self.told.add(text)
            self.tell(text)


def _supervise(
    process: subprocess.Popen[bytes], launch: _Launch, is_lost: Callable[[], bool]
) -> tuple[int, bool]:
    """Wait for the launcher, passing on what we receive.

    Returns:
        Its exit code, and whether a second SIGINT has killed what was not done.
    """
    mark, received, killed = launch.mark, launch.received, False
    passed_on: dict[int, int] = {}  # worker -> how many of the signals it has had
    launcher_asked_s: float | None = None
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=RESCAN_S), killed
        lost = is_lost()
        if not received and not lost:
            continue
        wants_kill = _is_killed(received)
        if lost or (wants_kill and not is_saving(launch.failures)):
            killed = wants_kill
            _send(signal.SIGKILL, _marked(mark))
            continue
        workers = _workers(mark, process.pid)
        if wants_kill:
            launch.say("a save is under way; the run ends when it is written")
        elif not workers and not passed_on:
            launch.say("stopping; no process has begun to train")
        # Once those that had the signal have ended, new ones are a restart by torchrun, which takes
        # every exit code but 0 for a crash. They have nothing to save yet.
        if launcher_asked_s is None:
            if not passed_on.keys() & workers and (passed_on or not workers):
                launcher_asked_s = time.monotonic()
                _send_group(signal.SIGTERM, process.pid)
        elif not workers and time.monotonic() - launcher_asked_s > IDLE_GRACE_S:
            _send_group(signal.SIGKILL, process.pid)
        for pid in workers:
            for number in received[passed_on.get(pid, 0) :]:
                _send(number, [pid])
            passed_on[pid] = len(received)


def _is_killed(received: Sequence[int]) -> bool:
    return received.count(signal.SIGINT) > 1


def _end_survivors(mark: str, received: Sequence[int], failures: Path) -> None:
    """End the workers whose launcher is gone: first politely, then for good."""
    start, asked = time.monotonic(), set[int]()
    while survivors := _survivors(mark):
        waited_s = time.monotonic() - start
        is_killed = _is_killed(received) and not is_saving(failures)
        if waited_s > SURVIVOR_GRACE_S or is_killed:
            _send(signal.SIGKILL, survivors)
            if waited_s > SURVIVOR_GRACE_S + KILL_WAIT_S:
                return
        else:
            # Children of a worker are its own business for as long as it lives.
            workers = _workers(mark, None)
            _send(signal.SIGTERM, workers - asked)
            asked |= workers
        time.sleep(0.1)


def _survivors(mark: str) -> set[int]:
    """Return our processes, looking twice: one that is being started shows no environment."""
    found = _marked(mark)
    if not found:
        time.sleep(0.1)
        found = _marked(mark)
    return set(found)


def _workers(mark: str, launcher: int | None) -> set[int]:
    """Return the ranks: children of the launcher, or of the server that forks them for it.

    Once these are gone, their orphans; never the ranks' own children.

    RANK in the environment would not tell them: a launcher can have inherited it, and what a
    worker starts inherits it too.
    """
    found = _marked(mark)
    servers = {pid for pid, process in found.items() if process.name == RANK_SERVER}
    starters = servers if launcher is None else {launcher, *servers}
    return {
        pid
        for pid, process in found.items()
        if pid not in starters and (process.parent in starters or process.parent not in found)
    }


def _marked(mark: str) -> dict[int, Process]:
    """Return every process that our launcher started, and itself."""
    return {one.pid: one for one in processes(f"{LAUNCH_MARK}={mark}")}


def _send_group(number: int, group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _send(number: int, pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)
