"""Start the ranks of a node as forks of one process that has imported the libraries: once a node.

torchrun starts each rank as a new interpreter, which spends seconds on the same imports as its
neighbours. A launcher with our rendezvous forks a server first, while it has neither threads nor
connections. That one imports what the ranks need and then forks itself for each of them, also when
torchrun starts them again. A rank is otherwise as torchrun starts it: a session of its own, its
environment, its output. Where the server cannot be forked from, ranks are started as ever.

torch has this for functions (`start_method="forkserver"`) and not for scripts; the one function of
it that is replaced is named in `_HOOK`.
"""

import atexit
import ctypes
import io
import json
import logging
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from peft_dist.common import paths
from peft_dist.common.console import flush, say
from peft_dist.common.process_table import RANK_SERVER, call_this_process, rank_name

log = logging.getLogger(__name__)

PRELOAD = "preload"
"""The name that a script runs by when it is only to import what it needs."""
_HOOK = "get_subprocess_handler"
"""What torchrun starts a rank with (torch 2.13, elastic/multiprocessing/api.py)."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1


def fork_ranks_of(command: Sequence[str], *, talks: bool) -> None:
    """Let torchrun, in this process, fork the ranks of one of our scripts from now on.

    Args:
        command: How this launcher was called.
        talks: Whether people are told what is waited for.
    """
    script = next((word for word in command if _is_ours(word)), None)
    if script is None or not hasattr(api, _HOOK) or _threads() > 1:
        return
    server = RankServer(script, talks=talks)

    class Handler(SubprocessHandler):
        """One rank, as torchrun handles it."""

        def _popen(self, args: Sequence[str], env: dict[str, str]) -> Any:
            if server.can_start(args):
                outputs = [
                    None if out is None else out.name for out in (self._stdout, self._stderr)
                ]
                with suppress(ConnectionError):
                    return server.start(args, env, outputs)
            return super()._popen(tuple(args), env)

    setattr(api, _HOOK, Handler)


def _is_ours(word: str) -> bool:
    return (
        word.endswith(".py") and Path(word).resolve().parent == (paths.root() / "launch").resolve()
    )


def _threads() -> int:
    """Return how many threads this process has; with others, a fork can hang."""
    return sum(1 for _ in Path("/proc/self/task").iterdir())


class RankServer:
    """The launcher's end: it asks for ranks, and hears how they end."""

    def __init__(self, script: str, *, talks: bool) -> None:
        """Fork the server."""
        self.script = script
        self.codes: dict[int, int] = {}
        """Exit codes by process, as `subprocess` gives them."""
        self.is_gone = False
        """Whether nothing more is heard of it; ranks are started without it then."""
        self._started: list[int] = []
        self._rest = b""
        self._channel, other = socket.socketpair()
        sys.stdout.flush()
        sys.stderr.flush()
        launcher = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            self._channel.close()
            _Server(other, launcher).run(script, talks=talks)
        other.close()
        atexit.register(self._end)

    def _end(self) -> None:
        """End the server, so that what its ranks have used counts as the launcher's."""
        with suppress(OSError):
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)

    def can_start(self, args: Sequence[str]) -> bool:
        """Whether a command starts the script as torchrun does when nothing is put before it."""
        return not self.is_gone and list(args[:3]) == [sys.executable, "-u", self.script]

    def start(
        self, args: Sequence[str], env: dict[str, str], outputs: Sequence[str | None]
    ) -> "ForkedRank":
        """Return a new rank.

        Args:
            args: Its command.
            env: All of its environment.
            outputs: Files for its standard output and error; None for the launcher's own.

        Raises:
            ConnectionError: Where the server cannot be forked from, or is gone.
        """
        request = {"argv": list(args[2:]), "env": env, "outputs": outputs}
        self._channel.sendall(json.dumps(request).encode() + b"\n")
        while not (self._started or self.is_gone):
            self.listen(None)
        if not self._started:
            raise ConnectionError
        return ForkedRank(self, self._started.pop())

    def listen(self, timeout_s: float | None) -> None:
        """Note what the server says; wait so long for the first of it, or for ever."""
        while not self.is_gone and select.select([self._channel], [], [], timeout_s)[0]:
            data = b""
            with suppress(ConnectionError):
                data = self._channel.recv(1 << 16)
            self.is_gone = not data
            *lines, self._rest = (self._rest + data).split(b"\n")
            for answer in map(json.loads, lines):
                if "refusal" in answer:
                    log.warning("each process imports for itself: %s", answer["refusal"])
                    self.is_gone = True
                elif "code" in answer:
                    self.codes[answer["pid"]] = answer["code"]
                else:
                    self._started.append(answer["pid"])
            timeout_s = 0.0


class ForkedRank:
    """A rank that the server has started; has what torchrun uses of `subprocess.Popen`."""

    def __init__(self, server: RankServer, pid: int) -> None:
        """Know it by its process id, which its session has too."""
        self.pid, self._server = pid, server

    def poll(self) -> int | None:
        """Return its exit code; None while it runs."""
        self._server.listen(0.0)
        if self.pid not in self._server.codes and self._server.is_gone and not _lives(self.pid):
            self._server.codes[self.pid] = -signal.SIGKILL  # its end was not seen
        return self._server.codes.get(self.pid)

    def wait(self, timeout: float | None = None) -> int:
        """Return its exit code once it has ended.

        Raises:
            subprocess.TimeoutExpired: Where it runs longer than so many seconds.
        """
        end_s = float("inf") if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                raise subprocess.TimeoutExpired("a rank", timeout or 0.0)
            self._server.listen(min(left_s, 0.1))
            if self._server.is_gone:
                time.sleep(0.1)
        return code


def _lives(pid: int) -> bool:
    with suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return stat.rpartition(")")[2].split()[0] not in "ZX"
    return False


class _Server:
    """The server's end: it forks, and says who has ended."""

    def __init__(self, channel: socket.socket, launcher: int) -> None:
        self.channel, self.launcher = channel, launcher

    def run(self, script: str, *, talks: bool) -> NoReturn:
        """Serve until the launcher is gone; in each fork, be that rank.

        Never returns to the frames above, which are the launcher's.
        """
        code = 1
        try:
            self._prepare()
            request = self._serve(self._preload(script, talks=talks))
            code = 0 if request is None else self._be_rank(request)
        except BaseException:
            traceback.print_exc()
        flush()
        os._exit(code)

    def _prepare(self) -> None:
        call_this_process(RANK_SERVER)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in _SIGNALS:  # the launcher decides
            signal.signal(number, signal.SIG_IGN)
        if os.getppid() != self.launcher:
            os._exit(0)

    def _preload(self, script: str, *, talks: bool) -> str:
        """Import what the ranks need; return why this process cannot be forked from, if so."""
        if not sys.flags.safe_path:
            sys.path[0] = str(Path(script).resolve().parent)
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # else to look for GPUs opens CUDA
        try:
            runpy.run_path(script, run_name=PRELOAD)["preload"](talks=talks)
        except BaseException as error:  # whatever it is, a rank meets it too, and says so
            return f"{type(error).__name__}: {error}"
        if (threads := _threads()) > 1:
            return f"the libraries have started {threads - 1} threads"
        return "the libraries have opened CUDA" if torch.cuda.is_initialized() else ""

    def _be_rank(self, request: dict[str, Any]) -> int:
        """Do what torchrun would have started, in this fork; return the exit code."""
        _become_rank(request)
        self._answer(pid=os.getpid())  # not before: the launcher may end its session at once
        self.channel.close()
        return _run(request["argv"])

    def _serve(self, refusal: str) -> dict[str, Any] | None:
        """Return what to be, in each fork; None once the launcher is gone."""
        woken, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        rest = b""
        while True:
            readable = select.select([self.channel.fileno(), woken], [], [])[0]
            if woken in readable:
                os.read(woken, 1 << 10)
                self._report_ended()
            if self.channel.fileno() not in readable:
                continue
            data = self.channel.recv(1 << 16)
            if not data:
                return None
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if refusal:
                    self._answer(refusal=refusal)
                    continue
                try:
                    if os.fork() == 0:
                        for end in (woken, wake):
                            os.close(end)
                        return dict(json.loads(line))
                except OSError as error:
                    self._answer(refusal=str(error))

    def _report_ended(self) -> None:
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                self._answer(pid=ended[0], code=os.waitstatus_to_exitcode(ended[1]))

    def _answer(self, **answer: object) -> None:
        with suppress(ConnectionError):  # the launcher is gone, which is seen next
            self.channel.sendall(json.dumps(answer).encode() + b"\n")


def _become_rank(request: dict[str, Any]) -> None:
    """Make this fork what torchrun would have started."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in (*_SIGNALS, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Python's own
    os.environ.clear()
    os.environ.update(request["env"])
    call_this_process(rank_name(int(os.environ["RANK"])))
    for stream, path in zip((sys.stdout, sys.stderr), request["outputs"], strict=True):
        if path is not None:
            file = os.open(path, os.O_WRONLY | os.O_APPEND)
            os.dup2(file, stream.fileno())
            os.close(file)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    sys.excepthook = sys.__excepthook__  # not the launcher's
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal():  # torchrun may have set it after torch had read it
        torch.set_num_threads(int(threads))


def _run(argv: list[str]) -> int:
    """Run a script as an interpreter does; return the exit code."""
    sys.argv = argv
    code: object = 0
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as error:
        code = error.code
    if code is not None and not isinstance(code, int):
        say(str(code), sys.stderr)
        return 1
    return code or 0
