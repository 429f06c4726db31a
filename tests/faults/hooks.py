"""Faults that a rank is born with: each function here arms one, before the rank's `main` runs.

A test names them with `harness.fault("nan_at", step=5, rank=1)`; they travel to the rank as JSON.
Every fault is given to all ranks of a group and arms itself only on those it is for. The program
knows nothing of them; where they hold on to it is in `seams.py`. A step begins where
`StepPlan.steps` yields it.

Steps count from 1, and a fault "at step k" comes before anything of step k is computed, when the
ledger ends with step k - 1. It comes again whenever step k begins in this process, as after a
rollback, and in later attempts only if it is given to them too.
"""

import datetime
import functools
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from errno import ENOSPC
from pathlib import Path
from typing import Any, Literal

from tests.faults import disk
from tests.faults.delays import delay_steps, on_another_machine, slow  # noqa: F401 - by name
from tests.faults.meeting import late_rank as late_rank
from tests.faults.meeting import meeting_limit as meeting_limit
from tests.faults.own_files import bug_while_loading as bug_while_loading
from tests.faults.own_files import other_base as other_base
from tests.faults.own_files import other_recipe as other_recipe
from tests.faults.own_files import without_rows as without_rows
from tests.faults.seams import (
    around_forward,
    at_steps,
    begun,
    modules_of_the_program,
    nothing,
    replace_function,
    wrap,
)

ALL = -1
"""The `rank` of a fault that is for every rank."""


@dataclass(frozen=True)
class Rank:
    """The process that a fault is for."""

    rank: int
    world_size: int
    pids: list[int]
    """Of all ranks of the group, by rank."""

    def is_one_of(self, rank: int) -> bool:
        """Whether a fault for `rank` is for this one."""
        return rank in (ALL, self.rank)

    def kill_group(self) -> None:
        """End every rank of the group at this very moment, as if the machine had lost power."""
        for pid in (*(pid for pid in self.pids if pid != os.getpid()), os.getpid()):
            with suppress(ProcessLookupError):  # it may have been done
                os.kill(pid, signal.SIGKILL)


def signal_at(
    here: Rank, *, step: int, rank: int, number: int, to: Literal["self", "group"] = "self"
) -> None:
    """Send a signal when a step begins, to the rank itself or to every rank of the group."""

    def send(now: int) -> None:
        if now == step:
            others = [pid for pid in here.pids if pid != os.getpid()] if to == "group" else []
            for pid in (*others, os.getpid()):
                os.kill(pid, number)

    if here.is_one_of(rank):
        at_steps(send)


def nan_at(
    here: Rank,
    *,
    step: int,
    rank: int,
    what: Literal["loss", "gradient"] = "loss",
    factor: float = float("nan"),
) -> None:
    """Make the loss of one rank NaN, and so its gradient; or its gradient alone.

    Args:
        here: The rank.
        step: At which step.
        rank: On which rank.
        what: Where the NaN comes from.
        factor: What it is multiplied by; infinity makes it infinite.
    """

    def spoiled(forward: Callable[..., Any], model: Any, *rest: Any) -> Any:
        losses = forward(model, *rest)
        if not (begun["step"] == step and model.training):
            return losses
        if what == "loss":
            return losses._replace(nll=losses.nll * factor)
        losses.nll.register_hook(lambda gradient: gradient * factor)
        return losses

    if here.is_one_of(rank):
        at_steps(nothing)
        around_forward(spoiled)


def oom_at(here: Rank, *, step: int, rank: int) -> None:
    """Let the forward pass of one rank run out of device memory."""
    import torch

    def forward_without_memory(forward: Callable[..., Any], model: Any, *rest: Any) -> Any:
        if begun["step"] == step and model.training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(model, *rest)

    if here.is_one_of(rank):
        at_steps(nothing)
        around_forward(forward_without_memory)


def crash_at(here: Rank, *, step: int, rank: int) -> None:
    """Raise an error of the program's own when a step begins, with a traceback."""

    def crash(now: int) -> None:
        assert now != step, f"planted at step {step}"

    if here.is_one_of(rank):
        at_steps(crash)


def hang_at(
    here: Rank,
    *,
    rank: int,
    where: Literal["setup", "step", "rows", "collective", "evaluation"],
    step: int = 0,
) -> None:
    """Let one rank sleep for ever, in Python.

    Args:
        here: The rank.
        rank: On which rank.
        where: `setup`: before the model is opened. `step`: when a step begins. `rows`: while its
            rows are packed. `collective`: before the exchange of gradients. `evaluation`: in the
            first evaluation after so many steps.
        step: At which step; means nothing for `setup`.
    """
    if not here.is_one_of(rank):
        return
    if where == "setup":
        from peft_dist import model_setup

        replace_function(model_setup.set_up_model, lambda *_, **__: _sleep_for_ever())
        return
    at_steps(lambda now: _sleep_for_ever() if where == "step" and now == step else None)

    def around(call: Callable[..., Any], *rest: Any, **named: Any) -> Any:
        if begun["step"] == step:
            _sleep_for_ever()
        return call(*rest, **named)

    if where == "rows":
        from peft_dist.model_setup import ModelSetup

        wrap(ModelSetup, "pack", around)
    elif where == "collective":
        from peft_dist.sharding.engine import Engine

        wrap(Engine, "reduce", around)
    elif where == "evaluation":
        from peft_dist.evaluation import scoring

        replace_function(scoring.score_rows, functools.partial(around, scoring.score_rows))


def slow_rank(here: Rank, *, rank: int, seconds: float, from_step: int = 1) -> None:
    """Let one rank begin every step, from a given one on, so much later."""
    if here.is_one_of(rank):
        at_steps(lambda now: time.sleep(seconds) if now >= from_step else None)


def clock_shift(here: Rank, *, rank: int, seconds: float) -> None:
    """Let the wall clock of one rank be wrong; monotonic clocks are right."""
    if not here.is_one_of(rank):
        return
    now, now_ns = time.time, time.time_ns

    class Shifted(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return cls.fromtimestamp(time.time(), tz)

    time.time = lambda: now() + seconds
    time.time_ns = lambda: now_ns() + int(seconds * 1e9)
    for module in modules_of_the_program():
        for name, value in list(vars(module).items()):
            if value is datetime.datetime:
                setattr(module, name, Shifted)


def record_rows(here: Rank, *, folder: str) -> None:
    """Write down which rows this rank packs to train on: `rank-R.jsonl`, {"step", "rows"} a line.

    `oracles.trained_rows` reads it. It is what the rank did, where the ledger is what it says.
    """
    from peft_dist.model_setup import ModelSetup

    path = Path(folder) / f"rank-{here.rank}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    # One line of one write each: a kill leaves whole lines.
    book = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def around(pack: Callable[..., Any], setup: Any, rows: Any, ids: Any, *more: Any) -> Any:
        if begun["step"] and setup.model.training:
            line = {"step": begun["step"], "rows": [int(row) for row in ids]}
            os.write(book, json.dumps(line).encode() + b"\n")
        return pack(setup, rows, ids, *more)

    at_steps(nothing)
    wrap(ModelSetup, "pack", around)


def log_file_operations(here: Rank, *, under: str, into: str, rank: int = 0) -> None:
    """Write down every change of files below a folder by one rank: [name, path] a line."""
    if not here.is_one_of(rank):
        return
    book = os.open(into, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def before(name: str, path: Path, size: int) -> int:
        os.write(book, json.dumps([name, str(path)]).encode() + b"\n")
        return size

    disk.watch(under, before)


def kill_at_file_operation(
    here: Rank, *, n: int, under: str, rank: int = 0, since: str = ""
) -> None:
    """Kill all ranks at the n-th change of files below a folder by one rank, before it is made.

    Where that is a write, half of it is made. Only below `checkpoints/` are the changes the same in
    every run; elsewhere the lease beats meanwhile.

    Args:
        here: The rank.
        n: Which change, from 1. More than there are: nothing happens.
        under: The folder.
        rank: Whose changes count.
        since: Changes count from the first one whose path holds this text.
    """
    if here.is_one_of(rank):
        disk.watch(under, _at_change(n, since, here.kill_group, tear=True))


def hang_at_file_operation(
    here: Rank, *, n: int, under: str, rank: int = 0, since: str = ""
) -> None:
    """Let the thread that makes the n-th change below a folder sleep for ever before it."""
    if here.is_one_of(rank):
        disk.watch(under, _at_change(n, since, _sleep_for_ever, tear=False))


def slow_disk(here: Rank, *, under: str, seconds: float, rank: int = 0) -> None:
    """Let every change of files below a folder take so much longer."""

    def before(_name: str, _path: Path, size: int) -> int:
        time.sleep(seconds)
        return size

    if here.is_one_of(rank):
        disk.watch(under, before)


def full_disk(
    here: Rank,
    *,
    under: str,
    after_bytes: int,
    rank: int = 0,
    from_step: int = 0,
    to_step: int = 10**9,
) -> None:
    """Let the file system below a folder be full once so many bytes were written to it.

    As on a real one a write is cut short first, then writes, new files and new folders fail with
    ENOSPC, and removing still works; unlike on a real one nothing that is removed makes room.

    Args:
        here: The rank.
        under: The folder.
        after_bytes: Room that is left.
        rank: Whose disk.
        from_step: The step at which it begins to fill up; 0: at once.
        to_step: The step at which there is room again.
    """
    if not here.is_one_of(rank):
        return
    left, lock = [after_bytes], threading.Lock()

    def before(name: str, path: Path, size: int) -> int:
        if not from_step <= begun["step"] < to_step or name not in ("open", "os.mkdir", "write"):
            return size
        with lock:
            if name == "open" and path.exists():
                return size
            allowed = min(size, left[0])
            if left[0] <= 0:
                raise OSError(ENOSPC, os.strerror(ENOSPC), str(path))
            left[0] -= allowed
            return allowed

    at_steps(nothing)
    disk.watch(under, before)


def _at_change(
    n: int, since: str, act: Callable[[], Any], *, tear: bool
) -> Callable[[str, Path, int], int]:
    """Return what counts changes and acts at the n-th; a torn one's second half is the next."""
    lock, count = threading.Lock(), [0]

    def before(_name: str, path: Path, size: int) -> int:
        with lock:
            if not count[0] and since not in str(path):
                return size
            count[0] += 1
            now = count[0]
        if tear and now == n and size > 1:
            return size // 2
        if now == n or (tear and now > n):
            act()
        return size

    return before


def _sleep_for_ever() -> None:
    while True:
        time.sleep(3600)
