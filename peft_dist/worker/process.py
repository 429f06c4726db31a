"""How one data-plane process starts and ends: quiet libraries, one-line errors, an exit code.

Does no work of its own, and imports torch no sooner than the work does.
"""

import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from peft_dist.common import console, logs
from peft_dist.common.console import say
from peft_dist.common.errors import (
    ERROR_PREFIX,
    EXIT_CRASHED,
    EXIT_DONE,
    Interrupted,
    LaunchError,
    PeftDistError,
    RunDirError,
    Superseded,
    TrainingError,
)
from peft_dist.common.library_messages import is_lost_peer, is_out_of_memory
from peft_dist.common.process_identity import this_group
from peft_dist.common.process_table import call_this_process, rank_name
from peft_dist.common.screen import screen
from peft_dist.common.sharing import set_run_umask
from peft_dist.run.attempt_records import latest
from peft_dist.run.directory import RunDir
from peft_dist.run.failure_files import write_failure
from peft_dist.run.history import note_crash, read_history
from peft_dist.run.lease import Attempt
from peft_dist.run.restart_policy import Ending, Kind, RestartLimits, decide
from peft_dist.worker.orphan import end_with_launcher
from peft_dist.worker.signals import interrupted_code

log = logging.getLogger(__name__)

CERTAIN = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError,
    NotImplementedError, TypeError, ValueError,
)  # fmt: skip
"""Errors of code and its inputs, which no start changes."""
NO_LIMIT = 10**6
EXACT_PINNED = (2, 13)
"""The first torch that can be told to lock no more host memory than it is asked for."""
LEASE_WAIT_S = 25.0
"""How long after its start a rank with an error still waits for rank 0 to take the run."""
STOP_WAIT_S = 1.0
"""How long a rank that a signal ends waits for that; rank 0 may never get the run."""
SAME_FAULT_S = 2.0
"""How long rank 0 may take to meet the error that another rank has met; its line is the better."""
LOOK_EVERY_S = 0.05


@dataclass
class WorkerContext:
    """What a worker process knows of itself and its run; its end needs it."""

    rank: int = 0
    size: int = 1
    run_dir: RunDir | None = None
    """The run, once that is known; another start may still hold it."""
    attempt: Attempt | None = None
    """The lease of the run; only rank 0 has one."""
    attempt_number: int = 0
    """Which attempt this is, once rank 0 has broadcast it."""
    has_met: bool = False
    """Whether the processes work together by now, so that a fault is one of all of them."""
    step: int | None = None
    """The step it is at, once it trains."""
    write_memory: Callable[[], Path] | None = None
    """Writes what a GPU's memory holds, where this process has one; returns the file."""
    group: str = field(default_factory=this_group)
    """What the processes of one start have in common; read early, as libraries change it."""
    started_s: float = field(default_factory=time.monotonic)

    @classmethod
    def of_environment(cls) -> "WorkerContext":
        """Return the context that a launcher gave; `read_world` checks whether it makes sense."""
        rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
        return cls(int(rank) if rank.isdecimal() else 0, int(size) if size.isdecimal() else 1)

    def holds_run(self, *, wait_s: float = 0.0) -> bool:
        """Whether this attempt holds the run; a rank that does not know its number looks for it.

        Args:
            wait_s: How long rank 0 may take to take the run, where the number is not known.
        """
        if self.run_dir is None or (self.rank == 0 and not self.attempt_number):
            return False
        deadline = min(time.monotonic() + wait_s, self.started_s + LEASE_WAIT_S)
        while True:
            with suppress(OSError):
                newest = latest(self.run_dir.attempts) or {}
                if newest.get("group") == self.group:
                    self.attempt_number = self.attempt_number or newest["attempt"]
                    return bool(newest["attempt"] == self.attempt_number)
            if self.attempt_number or time.monotonic() >= deadline:
                return False
            time.sleep(LOOK_EVERY_S)

    def stopped_in_setup(self, signal_name: str) -> None:
        """Say and note that a signal ends this process before it trains."""
        if self.rank == 0:
            by = "" if signal_name == "SIGINT" else f"{signal_name}: "
            log.log(logs.NOTICE, "%sstopping while it loads; nothing is lost by that", by)
            screen().close()
        # torchrun sends SIGTERM to the other processes of one that has crashed, and then starts
        # all of them again: what the signal meant is seen when all have left their notes.
        by_torchrun = signal_name == "SIGTERM" and "TORCHELASTIC_RUN_ID" in os.environ
        if self.attempt is not None and not by_torchrun:
            self.attempt.end("interrupted", signal=signal_name)
        elif self.holds_run(wait_s=STOP_WAIT_S):
            self.note_crash(Kind.INTERRUPTED, signal_name)

    def note_crash(self, kind: Kind, error: str, place: str = "") -> None:
        """Note why this process ends, for the attempt after it."""
        if self.run_dir is not None and self.holds_run():
            note_crash(
                self.run_dir.attempts,
                self.attempt_number,
                rank=self.rank,
                kind=kind,
                step=self.step,
                error=error,
                place=place,
            )


def run_worker(work: Callable[[WorkerContext], None]) -> int:
    """Run the work of one process; return its exit code.

    An error that a person must fix becomes one line on rank 0's standard error, a file for the
    launcher and `failure.json` in the run. With several processes this does not return: Python's
    own teardown can abort while gloo's threads still run, or wait minutes for a lost peer.
    """
    set_run_umask()
    set_allocator(os.environ)
    _close_input()
    context = WorkerContext.of_environment()
    call_this_process(rank_name(context.rank))
    logs.begin(context.rank)
    quieten_libraries()
    end_with_launcher()
    try:
        work(context)
        code = EXIT_DONE
    except Interrupted as error:
        code = _interrupted(error, context)
    except PeftDistError as error:
        code = _report(error, context)
    except BaseException as error:
        # Whatever it is, the interpreter's own way out is not to be trusted (see above).
        code = _crashed(error, context)
    screen().close()
    console.flush()
    if context.size > 1:
        os._exit(code)
    return code


def fix_first(run: RunDir) -> str:
    """Return the remedy for what no restart changes."""
    return f"see {run.logs}, and start again once that is fixed"


def set_allocator(environ: MutableMapping[str, str]) -> None:
    """Let torch's memory on a GPU grow in place, unless the environment has settings of its own.

    Micro-batches of other lengths leave holes otherwise that no later one fits into. And the
    page-locked memory of an offloaded base would be rounded up to powers of two, at worst twice its
    bytes. torch reads it when it uses CUDA first.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & environ.keys():
        environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
        if _torch_version() >= EXACT_PINNED:  # an older one refuses what it does not know
            environ["PYTORCH_ALLOC_CONF"] += ",pinned_max_round_threshold_mb:1"


def _torch_version() -> tuple[int, ...]:
    """Return major and minor version of torch, without importing it; (0,) without it."""
    try:
        return tuple(int(part) for part in version("torch").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return (0,)


def _close_input() -> None:
    """Let nothing be asked: a library that wants a yes gets the end of the input."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)


def _interrupted(error: Interrupted, context: WorkerContext) -> int:
    if context.rank == 0:
        say(f"peft-dist: {error}; the same command goes on", sys.stderr)
    if context.attempt is not None:
        context.attempt.end("interrupted", step=context.step)
    return interrupted_code()


def _report(error: PeftDistError, context: WorkerContext) -> int:
    by = ""
    if context.rank > 0 and not context.has_met:
        by = f"rank {context.rank} on host {os.uname().nodename}: "
    if context.rank == 0:
        say(f"{ERROR_PREFIX}{error}", sys.stderr)
    elif by:
        say(f"{ERROR_PREFIX}rank {context.rank}: {error}", sys.stderr)
    if context.rank == 0 or by:
        write_failure(error, rank=context.rank, by=by)
    if not isinstance(error, Superseded):
        _record_failure(error, context, by)
    if context.attempt is not None:
        context.attempt.end("failed", exit_code=error.exit_code, error=str(error))
    return error.exit_code


def _record_failure(error: PeftDistError, context: WorkerContext, by: str) -> None:
    """Record in the run why starting it again cannot help."""
    # Of a launch that fails rank 0 may be no part.
    if not context.holds_run(wait_s=0.0 if isinstance(error, LaunchError) else LEASE_WAIT_S):
        return
    assert context.run_dir is not None
    if by:
        deadline = time.monotonic() + SAME_FAULT_S
        while context.run_dir.read_failure() is None and time.monotonic() < deadline:
            time.sleep(LOOK_EVERY_S)
    with suppress(RunDirError):  # a full disk is often the very fault
        context.run_dir.record_failure(error, by=by)


def _crashed(error: BaseException, context: WorkerContext) -> int:
    """Say why, in one line where that is known; the run can go on from its last checkpoint."""
    text = " ".join(str(error).split())
    if is_out_of_memory(error):
        at = "" if context.step is None else f" at step {context.step}"
        line = (
            f"train.micro_batch_size: rank {context.rank} is out of memory{at} "
            f"({text.split('. ')[0]}); lower it, or set train.activation_checkpointing: true"
        )
        say(f"peft-dist: {line}{_memory_file(context)}", sys.stderr)
        context.note_crash(Kind.OUT_OF_MEMORY, line)
        refusal = _verdict(
            context, Ending(Kind.OUT_OF_MEMORY, line, rank=context.rank, step=context.step)
        )
        return EXIT_CRASHED if refusal is None else _report(refusal, context)
    say("".join(traceback.format_exception(error)).rstrip(), sys.stderr)
    # Of a group that has lost a process all others fail in their next exchange: not the cause.
    kind = Kind.LOST_PEER if is_lost_peer(error) else Kind.CRASHED
    line, place = f"{type(error).__name__}: {text}", place_of(error)
    context.note_crash(kind, line, place)
    if place and kind is Kind.CRASHED:
        ending = Ending(kind, line, rank=context.rank, step=context.step, place=place)
        refusal = _verdict(context, ending)
        if refusal is not None:
            return _report(refusal, context)
    return 130 if isinstance(error, KeyboardInterrupt) else EXIT_CRASHED


def _memory_file(context: WorkerContext) -> str:
    """Write what the memory holds while the error still holds its tensors; return words for it."""
    if context.write_memory is None:
        return ""
    try:
        return f"; what its memory holds: {context.write_memory()}"
    except Exception as error:  # a process that is out of memory has to end all the same
        return f"; what its memory holds could not be written: {error}"


def place_of(error: BaseException) -> str:
    """Return `FILE:LINE` of what raised an error that the next start would meet again, else "".

    What a disk, a network or a device did may be otherwise the next time.
    """
    if not isinstance(error, CERTAIN) or isinstance(error, OSError):
        return ""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _verdict(context: WorkerContext, ending: Ending) -> TrainingError | None:
    """Return why this attempt must be the last, if it must."""
    if context.run_dir is None or not context.attempt_number:
        return None
    if ending.kind is Kind.OUT_OF_MEMORY and ending.step is None:  # no place to compare with
        return None
    with suppress(OSError, RunDirError):  # then the next attempt finds out
        history = read_history(context.run_dir, before=context.attempt_number)
        limits = RestartLimits(without_progress=NO_LIMIT)  # the next attempt counts those
        decision = decide(history, ending, limits)
        if decision.word == "stop":
            where = str(context.run_dir.path)
            return TrainingError(decision.reason, where=where, remedy=fix_first(context.run_dir))
    return None


def quieten_libraries() -> None:
    """Hide deprecations between versions this project supports, and library chatter."""
    if logs.is_verbose():
        return
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Unsupported layer type")
    for name in ("transformers", "bitsandbytes", "accelerate", "filelock", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
