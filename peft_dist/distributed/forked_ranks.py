"""Start the ranks of a node as forks of one process that has imported the libraries: once a node.

torchrun starts each rank as a new interpreter, which spends seconds on the same imports as its
neighbours. A launcher with our rendezvous has a server import them (`rank_server`), and asks it
for a fork of itself for each rank, also when torchrun starts them again. A rank is otherwise as
torchrun starts it: a session of its own, its environment, its output. Where the server cannot be
forked from, ranks are started as ever.

torch has this for functions (`start_method="forkserver"`) and not for scripts; the one function of
it that is replaced is named in `_HOOK`.
"""

import atexit
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from peft_dist.common import paths
from peft_dist.common.console import flush
from peft_dist.common.process_table import lives
from peft_dist.distributed.rank_server import Server, threads

log = logging.getLogger(__name__)

_HOOK = "get_subprocess_handler"
"""What torchrun starts a rank with (torch 2.13, elastic/multiprocessing/api.py)."""


def fork_ranks_of(command: Sequence[str], *, talks: bool) -> None:
    """Let torchrun, in this process, fork the ranks of one of our scripts from now on.

    Args:
        command: How this launcher was called.
        talks: Whether people are told what is waited for.
    """
    script = next((word for word in command if _is_ours(word)), None)
    if script is None or not hasattr(api, _HOOK):
        return
    server = RankServer(script, talks=talks)

    class Handler(SubprocessHandler):
        """One rank, as torchrun handles it."""

        def _popen(self, args: Sequence[str], env: dict[str, str]) -> Any:
            if server.can_start(args):
                streams = (self._stdout, self._stderr)
                outputs = [None if stream is None else stream.name for stream in streams]
                with suppress(ConnectionError):
                    return server.start(args, env, outputs)
            return super()._popen(tuple(args), env)

    setattr(api, _HOOK, Handler)


def _is_ours(word: str) -> bool:
    folder = (paths.root() / "launch").resolve()
    return word.endswith(".py") and Path(word).resolve().parent == folder


class RankServer:
    """The launcher's end: it asks for ranks, and hears how they end."""

    def __init__(self, script: str, *, talks: bool) -> None:
        """Start the server."""
        self.script = script
        self.codes: dict[int, int] = {}
        """Exit codes by process, as `subprocess` gives them."""
        self.refuses = False
        """Whether it starts no more ranks; it still says how those that it has started end."""
        self.is_gone = False
        self._started: list[int] = []
        self._rest = b""
        self._channel, other = socket.socketpair()
        self._pid = self._begin(other, talks=talks)
        other.close()
        atexit.register(self._end)

    def _begin(self, other: socket.socket, *, talks: bool) -> int:
        """Return the process id of a new server at the other end of the channel.

        It is a fork of this launcher, which has imported torch, where that can be: accelerate and
        torchrun look for GPUs, and what has opened CUDA has no forks that can use it.
        """
        launcher = os.getpid()
        if torch.backends.cuda.is_built() or threads() > 1:
            words = [str(other.fileno()), str(launcher), self.script, "talks" if talks else "-"]
            command = [sys.executable, "-m", "peft_dist.distributed.rank_server", *words]
            # numpy would start a thread per core as it is imported, and a fork has none of them.
            env = {"OPENBLAS_NUM_THREADS": "1"} | os.environ
            self._process = subprocess.Popen(command, pass_fds=[other.fileno()], env=env)
            return self._process.pid
        flush()
        pid = os.fork()
        if pid == 0:
            self._channel.close()
            Server(other, launcher).run(self.script, talks=talks)
        return pid

    def _end(self) -> None:
        """End the server, so that what its ranks have used counts as the launcher's."""
        with suppress(OSError):
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)

    def can_start(self, args: Sequence[str]) -> bool:
        """Whether a command starts the script as torchrun does when nothing is put before it."""
        is_open = not (self.is_gone or self.refuses)
        return is_open and list(args[:3]) == [sys.executable, "-u", self.script]

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
        while not (self._started or self.is_gone or self.refuses):
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
                    self.refuses = True
                elif "code" in answer:
                    self.codes[answer["pid"]] = answer["code"]
                else:
                    self.codes.pop(answer["pid"], None)  # of an earlier process of this number
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
        if self.pid not in self._server.codes and self._server.is_gone and not lives(self.pid):
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
