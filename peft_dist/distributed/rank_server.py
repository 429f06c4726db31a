"""Import what the ranks of a node need once, and fork this process for each of them.

The launcher's end of it is `forked_ranks`, which forks or starts this one. Imports no torch before
it has a name and leaves signals to the launcher.

    python -m peft_dist.distributed.rank_server CHANNEL LAUNCHER SCRIPT TALKS
"""

import ctypes
import io
import json
import os
import runpy
import select
import signal
import socket
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from peft_dist.common.console import flush, say
from peft_dist.common.process_table import RANK_SERVER, call_this_process, rank_name

PRELOAD = "preload"
"""The name that a script runs by when it is only to import what it needs."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1


def threads() -> int:
    """Return how many threads this process has; a fork of one that has several can hang."""
    return sum(1 for _ in Path("/proc/self/task").iterdir())


class Server:
    """The server's end: it forks, and says who has ended."""

    def __init__(self, channel: socket.socket, launcher: int) -> None:
        """Know the launcher's process id."""
        self.channel, self.launcher = channel, launcher
        self.has_gpus = False

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
        """Have a name, leave signals to the launcher, and end when it does."""
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
        import torch

        self.has_gpus = torch.cuda.is_available()
        return f"the libraries have started {count - 1} threads" if (count := threads()) > 1 else ""

    def _be_rank(self, request: dict[str, Any]) -> int:
        """Do what torchrun would have started, in this fork; return the exit code."""
        import torch

        _become_rank(request)
        if self.has_gpus and torch.cuda._is_in_bad_fork():  # torch knows what has opened CUDA
            self._answer(refusal="the libraries have opened CUDA")
            return 1
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
    import torch

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


if __name__ == "__main__":
    channel, launcher, script, talks = sys.argv[1:]
    Server(socket.socket(fileno=int(channel)), int(launcher)).run(script, talks=talks == "talks")
