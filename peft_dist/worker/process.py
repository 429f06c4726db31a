"""How one data-plane process starts and ends: quiet libraries, one-line errors, an exit code.

Does no work of its own, and imports torch no sooner than the work does.
"""

import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from peft_dist.common import console
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
from peft_dist.common.process_identity import this_group
from peft_dist.run.directory import RunDir
from peft_dist.run.lease import STALE_AFTER_S, Attempt, latest
from peft_dist.run.restart_policy import LOST_PEER, STOPPED, note_crash, out_of_memory_again
from peft_dist.worker.signals import interrupted_code

LEASE_WAIT_S = STALE_AFTER_S + 5.0
"""How long after its start a rank with a fault to tell still waits for rank 0 to take the run."""
STOP_WAIT_S = 1.0
"""How long a rank waits for that which was told to stop; rank 0 may never get the run."""
SAME_FAULT_S = 2.0
"""How long rank 0 may take to find the fault that another rank has found; it tells it best."""
LOOK_EVERY_S = 0.05


@dataclass
class Place:
    """What the end of a process has to know of it."""

    rank: int = 0
    size: int = 1
    run_dir: RunDir | None = None
    """The run, once that is known; it may still be another's."""
    attempt: Attempt | None = None
    """The lease of the run; rank 0's."""
    attempt_number: int = 0
    """Which attempt this is, once rank 0 has told."""
    has_met: bool = False
    """Whether the processes work together by now, so that a fault is one of all of them."""
    step: int | None = None
    """The step it is at, once it trains."""
    group: str = field(default_factory=this_group)
    """What it has in common with the processes started with it; libraries change what tells it."""
    started_s: float = field(default_factory=time.monotonic)

    @classmethod
    def of_environment(cls) -> "Place":
        """Return the place a launcher gave; whether it makes sense is checked with the world."""
        rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
        return cls(int(rank) if rank.isdecimal() else 0, int(size) if size.isdecimal() else 1)

    def holds_run(self, *, wait_s: float = 0.0) -> bool:
        """Say whether the run is this attempt's to write to; until told, a rank finds out itself.

        Args:
            wait_s: How long rank 0 may take to take the run, where this rank has not been told.
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
        """Leave word of a signal that ends this process before it trains."""
        # torchrun sends SIGTERM to the other processes of one that has crashed, and then starts
        # all of them again: what the signal meant is seen when all have left their word.
        by_torchrun = signal_name == "SIGTERM" and "TORCHELASTIC_RUN_ID" in os.environ
        if self.attempt is not None and not by_torchrun:
            self.attempt.end("interrupted", signal=signal_name)
        elif self.holds_run(wait_s=STOP_WAIT_S):
            self.note_crash(STOPPED, signal_name)

    def note_crash(self, kind: str, error: str) -> None:
        """Leave word of why this process ends, for the attempt after it."""
        if self.run_dir is not None and self.holds_run():
            note_crash(
                self.run_dir.attempts,
                self.attempt_number,
                rank=self.rank,
                kind=kind,
                step=self.step,
                error=error,
            )


def run_worker(work: Callable[[Place], None]) -> int:
    """Run the work of one process; return its exit code.

    A fault that a person must mend becomes one line on rank 0's standard error, and `failure.json`
    for whoever launched this one. With several processes this does not return: the interpreter's
    own teardown can abort while gloo's threads still run, or wait minutes for a lost peer.
    """
    os.umask(0o077)
    logging.basicConfig(format="peft-dist: %(levelname)s: %(message)s", level=logging.WARNING)
    _quieten_libraries()
    place = Place.of_environment()
    try:
        work(place)
        code = EXIT_DONE
    except Interrupted as error:
        code = _interrupted(error, place)
    except PeftDistError as error:
        code = _report(error, place)
    except BaseException as error:
        # Whatever it is, the interpreter's own way out is not to be trusted (see above).
        code = _crashed(error, place)
    console.flush()
    if place.size > 1:
        os._exit(code)
    return code


def _interrupted(error: Interrupted, place: Place) -> int:
    if place.rank == 0:
        say(f"peft-dist: {error}; the same command goes on", sys.stderr)
    if place.attempt is not None:
        place.attempt.end("interrupted", step=place.step)
    return interrupted_code()


def _report(error: PeftDistError, place: Place) -> int:
    if place.rank == 0:
        say(f"{ERROR_PREFIX}{error}", sys.stderr)
    elif not place.has_met:
        say(f"{ERROR_PREFIX}rank {place.rank}: {error}", sys.stderr)
    if not isinstance(error, Superseded):
        _record_failure(error, place)
    if place.attempt is not None:
        place.attempt.end("failed", exit_code=error.exit_code, error=str(error))
    return error.exit_code


def _record_failure(error: PeftDistError, place: Place) -> None:
    """Leave word for whoever would start this run again."""
    # Of a launch that fails rank 0 may be no part.
    if not place.holds_run(wait_s=0.0 if isinstance(error, LaunchError) else LEASE_WAIT_S):
        return
    assert place.run_dir is not None
    by = ""
    if place.rank > 0 and not place.has_met:
        by = f"rank {place.rank} on host {os.uname().nodename}: "
        deadline = time.monotonic() + SAME_FAULT_S
        while place.run_dir.verdict() is None and time.monotonic() < deadline:
            time.sleep(LOOK_EVERY_S)
    with suppress(RunDirError):  # a full disk is often the very fault
        place.run_dir.record_failure(error, by=by)


def _crashed(error: BaseException, place: Place) -> int:
    """Say why, in one line where that is known; the run can go on from its last checkpoint."""
    text = " ".join(str(error).split())
    if _is_out_of_memory(error):
        at = "" if place.step is None else f" at step {place.step}"
        line = (
            f"train.micro_batch_size: rank {place.rank} is out of memory{at} "
            f"({text.split('. ')[0]}); lower it, or set train.activation_checkpointing: true"
        )
        say(f"peft-dist: {line}", sys.stderr)
        place.note_crash("oom", line)
        again = _out_of_memory_again(place)
        return EXIT_CRASHED if again is None else _report(again, place)
    say("".join(traceback.format_exception(error)).rstrip(), sys.stderr)
    # Of a group that has lost a process all others fail in their next exchange: not the cause.
    lost_peer = any(word in text for word in ("Connection closed by peer", "Connection reset"))
    place.note_crash(LOST_PEER if lost_peer else "error", f"{type(error).__name__}: {text}")
    return 130 if isinstance(error, KeyboardInterrupt) else EXIT_CRASHED


def _out_of_memory_again(place: Place) -> TrainingError | None:
    if place.run_dir is None:
        return None
    with suppress(OSError):  # then the next attempt finds out
        problem = out_of_memory_again(place.run_dir.attempts)
        if problem is not None:
            where = str(place.run_dir.path)
            return TrainingError(problem, where=where, remedy="start again once that is mended")
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    told = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, which may not be imported yet
        or any(line in str(error) for line in told)
    )


def _quieten_libraries() -> None:
    """Hide deprecations between versions this project supports, and library chatter."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Unsupported layer type")
    for name in ("transformers", "bitsandbytes", "accelerate", "filelock", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
