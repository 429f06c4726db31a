"""A process that has imported everything and forks training ranks on request.

Importing torch, transformers and peft takes seconds per process; a fork of a process that has
done it takes milliseconds. A rank then is what a launcher would have started: a session of its
own, the launcher's environment, its output in files, and `entrypoints.train.main` to run. The
nursery computes nothing and has one thread, so that its forks are sound.

`harness.py` starts it with `python -m tests.faults.nursery` and talks to it in lines of JSON, one
answer per request. It ends, and every rank with it, when its standard input does.
"""

import ctypes
import gc
import importlib
import json
import os
import select
import signal
import sys
import time
import traceback
from contextlib import suppress
from typing import Any, NamedTuple

HEAVY = (
    "peft_dist.entrypoints.train",
    "peft_dist.finetune",
    # what a training of a tiny llama would still import
    "peft.tuners.lora.bnb",
    "peft.utils.transformers_weight_conversion",
    "torch.profiler._cupti_monitor",
    "transformers.models.llama.modeling_llama",
)
PR_SET_PDEATHSIG = 1


class Birth(NamedTuple):
    """All that a new rank needs to know, in its own process."""

    request: dict[str, Any]
    rank: int
    pids: list[int]
    """Of all ranks of its group, by rank."""


class Nursery:
    """The ranks that live, and the pipes to the harness."""

    def __init__(self, requests: int, answers: int) -> None:
        """Take over two file descriptors: lines of JSON come in at one and go out at the other."""
        self._requests, self._answers = requests, answers
        self._pids: dict[int, int] = {}  # by pidfd, until the rank is waited for
        self._ended: dict[int, tuple[int, float]] = {}  # by pid: code, time.monotonic()

    def serve(self) -> Birth | None:
        """Answer requests until there are no more; return only then, or as a new rank."""
        unread = b""
        self._answer({"ready": True})
        while True:
            ready, _, _ = select.select([self._requests, *self._pids], [], [])
            for handle in ready:
                if handle in self._pids:
                    self._reap(handle)
            if self._requests not in ready:
                continue
            data = os.read(self._requests, 1 << 20)
            if not data:
                self._kill_all()
                return None
            *lines, unread = (unread + data).split(b"\n")
            for line in lines:
                birth = self._do(json.loads(line))
                if birth is not None:
                    return birth

    def _do(self, request: dict[str, Any]) -> Birth | None:
        if request["do"] == "start":
            return self._fork_group(request)
        if request["do"] == "signal":
            # A pid in `_pids` is not waited for yet, so it is nobody else's.
            sent = request["pid"] in self._pids.values()
            if sent:
                os.kill(request["pid"], request["signal"])
            self._answer({"sent": sent})
        elif request["do"] == "ended":
            self._answer({"ended": [self._ended.get(pid) for pid in request["pids"]]})
        return None

    def _fork_group(self, request: dict[str, Any]) -> Birth | None:
        """Fork all ranks of a group; each waits until it is told the pids of all."""
        world_size = len(request["ranks"])
        pipes = [os.pipe() for _ in range(world_size)]
        pids = []
        parent = os.getpid()
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                os.setsid()
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != parent:
                    os._exit(1)
                told = pipes[rank][0]
                others = {end for pipe in pipes for end in pipe} - {told}
                for handle in {*others, self._requests, self._answers, *self._pids}:
                    os.close(handle)
                with os.fdopen(told, encoding="ascii") as pipe:
                    return Birth(request, rank, json.loads(pipe.readline()))
            pids.append(pid)
        for pid, (told, tell) in zip(pids, pipes, strict=True):
            self._pids[os.pidfd_open(pid)] = pid
            self._ended.pop(pid, None)  # of an earlier process of this number
            os.write(tell, json.dumps(pids).encode() + b"\n")
            os.close(told)
            os.close(tell)
        self._answer({"pids": pids})
        return None

    def _reap(self, handle: int) -> None:
        pid = self._pids.pop(handle)
        os.close(handle)
        _, status = os.waitpid(pid, 0)
        self._ended[pid] = (os.waitstatus_to_exitcode(status), time.monotonic())

    def _kill_all(self) -> None:
        for pid in self._pids.values():
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    def _answer(self, answer: dict[str, Any]) -> None:
        os.write(self._answers, json.dumps(answer).encode() + b"\n")


def live(birth: Birth) -> int:
    """Be the rank: put on its environment, set up its faults and train; return the exit code."""
    own = birth.request["ranks"][birth.rank]
    for handle, path in ((1, own["output"]), (2, own["errors"])):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        os.dup2(file, handle)
        os.close(file)
    # As a launcher would have left them; whoever started us may have had some ignored.
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(birth.request["folder"])
    os.environ.clear()
    os.environ.update(own["environment"])
    sys.argv = birth.request["argv"]
    try:
        import torch

        from peft_dist.entrypoints.train import main
        from tests.faults import hooks

        torch.set_num_threads(1)
        rank = hooks.Rank(birth.rank, len(birth.pids), birth.pids)
        for fault in birth.request["faults"]:
            getattr(hooks, fault["name"])(rank, **fault["arguments"])
    except Exception:
        traceback.print_exc()
        return 99  # no exit code of the program: the test itself is broken
    return main(sys.argv[1:])


def main() -> int:
    """Import, then serve; the process that returns is the nursery or one of its ranks."""
    requests, answers = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)  # what libraries print is no answer
    for name in HEAVY:
        importlib.import_module(name)
    threads = os.listdir("/proc/self/task")  # noqa: PTH208 - no Path for numbers
    assert len(threads) == 1, f"an import has started {len(threads) - 1} threads; forks may hang"
    gc.collect()
    gc.freeze()
    birth = Nursery(requests, answers).serve()
    return 0 if birth is None else live(birth)


if __name__ == "__main__":
    sys.exit(main())
