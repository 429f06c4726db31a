"""End a rank that hangs, and report which rank, where, since when, and every Python stack.

Slow is not hung: a step's limit follows the steps before it, and the end of its job. A rank whose
interpreter is stopped or blocked cannot watch itself; the others, which wait for it, name it.
"""

import faulthandler
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple

from peft_dist.common.console import printable
from peft_dist.common.errors import EXIT_CRASHED
from peft_dist.common.job_end import job_end_s
from peft_dist.common.process_table import children, rank_name

PHASES = ("setup", "step", "evaluation", "save", "end")
"""In the order in which they follow each other."""
STEPS_REMEMBERED = 500
STEPS_FOR_A_LIMIT = 10
"""With fewer steps than this their 99th percentile says little, and the first one counts too."""
SLOWEST_FACTOR = 5.0
"""A step's limit over the 99th percentile of the steps before it."""
PEERS_WAIT_S = 1.0
"""How long a rank that hangs waits for the other ranks' reports."""
SPEAKER_WAIT_S = 0.5
"""How long the others wait for the rank that reports whom all wait for."""
SHORTEST_S = 20.0
"""No phase is given less, however soon the job ends."""
BEFORE_END_S = 40.0
"""How long before the end of its job a process that hangs ends by itself."""
ASK_JOB_EVERY_S = 5.0
DUMP_S = 2.0
"""A record of collectives that takes longer is done without."""
REPORT_S = 10.0
"""A report that takes longer (a dead file system) is given up, and the process with it."""


@dataclass(frozen=True)
class WatchdogLimits:
    """How long one phase may last before it is a hang, in seconds."""

    min_s: float
    """The least that a step is given, however quick the steps before it were."""
    setup_s: float
    """Setup, and the first step (compilation, lazy initialisation)."""
    evaluation_s: float
    """One batch of an evaluation."""
    save_s: float
    """One save, and the end of the process."""


class _Phase(NamedTuple):
    name: str
    step: int | None
    since_s: float
    is_first_step: bool


class HangWatchdog:
    """Watches this process from a thread of its own.

    Args:
        rank: This process's rank.
        folder: Where reports go; all ranks' reports meet there.
        limits: What is too long.
        world_size: How many ranks there are.
        on_hang: Called with the line that names the hang, just before the process ends.
        collectives: Returns a record of this process's collectives as JSON, if there is one.
    """

    def __init__(
        self,
        *,
        rank: int,
        folder: Path,
        limits: WatchdogLimits,
        world_size: int,
        on_hang: Callable[[str], None] | None = None,
        collectives: Callable[[], bytes | None] | None = None,
    ) -> None:
        self.attempt = 0
        """Number in the names of the reports; to be set as soon as it is known."""
        self._rank, self._world_size, self._folder = rank, world_size, folder
        self._limits, self._on_hang, self._collectives = limits, on_hang, collectives
        self._tick_s = min(0.5, min(astuple(limits)) / 10)
        self._first_step_s: float | None = None
        self._durations_s: deque[float] = deque(maxlen=STEPS_REMEMBERED)
        self._current = _Phase("setup", None, time.monotonic(), False)
        self._limit_s = limits.setup_s
        self._job_end_s, self._ask_again_s = float("inf"), 0.0
        self._old_reports = self._reports()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def phase(self, name: str, step: int | None = None) -> None:
        """Note what begins now; also at every step and at every batch of an evaluation.

        Takes about a microsecond: the thread only reads what is left here.

        Args:
            name: One of `PHASES`.
            step: The number of the step, once there is one.
        """
        now, before = time.monotonic(), self._current
        is_first_step = False
        if before.name == "step":
            took_s = now - before.since_s
            if before.is_first_step:
                self._first_step_s = took_s
            elif took_s <= self._limit_s:  # else the whole process was stopped meanwhile
                self._durations_s.append(took_s)
        if name == "step":
            is_first_step = self._first_step_s is None
        self._current = _Phase(name, step, now, is_first_step)

    def stop(self) -> None:
        """Stop watching."""
        self._stopped.set()
        self._thread.join(timeout=PEERS_WAIT_S)

    def _watch(self) -> None:
        watched, excused_s = self._current, 0.0
        before = time.monotonic()
        while not self._stopped.wait(self._tick_s):
            now = time.monotonic()
            overslept_s, before = now - before - self._tick_s, now
            current = self._current
            if current is not watched:
                watched, excused_s = current, 0.0
            if overslept_s > self._tick_s:
                # We did not run either: stopped (SIGSTOP, a suspended laptop) or starved.
                excused_s += min(overslept_s, now - current.since_s)
            elapsed_s = now - current.since_s - excused_s
            self._limit_s = self._within_job(self._limit_of(current), elapsed_s)
            if elapsed_s > self._limit_s or self._is_asked(elapsed_s):
                self._report(current, elapsed_s)

    def _limit_of(self, phase: _Phase) -> float:
        limits = self._limits
        if phase.name == "setup" or phase.is_first_step:
            return limits.setup_s
        if phase.name == "evaluation":
            return limits.evaluation_s
        if phase.name in ("save", "end"):
            return limits.save_s
        steps_s = sorted(self._durations_s)
        if len(steps_s) < STEPS_FOR_A_LIMIT and self._first_step_s is not None:
            steps_s = sorted([*steps_s, self._first_step_s])
        p99_s = steps_s[-(-len(steps_s) * 99 // 100) - 1] if steps_s else 0.0
        return max(limits.min_s, SLOWEST_FACTOR * p99_s)

    def _within_job(self, limit_s: float, elapsed_s: float) -> float:
        """Return a limit that ends before the job does: then it can still be told what hung."""
        if elapsed_s <= SHORTEST_S:
            return limit_s
        if time.monotonic() >= self._ask_again_s:
            self._job_end_s = job_end_s()
            self._ask_again_s = time.monotonic() + ASK_JOB_EVERY_S
        left_s = self._job_end_s - time.time()
        return min(limit_s, max(SHORTEST_S, elapsed_s + left_s - BEFORE_END_S))

    def _is_asked(self, elapsed_s: float) -> bool:
        """Whether another rank reported a hang while this one may be waiting for it.

        Its limit can be longer than theirs, and its report shows them that it still lives. Files
        are only looked for when no healthy step lasts this long.
        """
        if self._world_size == 1 or elapsed_s < self._limits.min_s / 2:
            return False
        faulthandler.dump_traceback_later(self._limit_s + REPORT_S, exit=True)
        asked = bool(self._new_reports())
        faulthandler.cancel_dump_traceback_later()
        return asked

    def _report(self, phase: _Phase, elapsed_s: float) -> None:
        faulthandler.dump_traceback_later(REPORT_S, exit=True)
        line = (
            f"rank {self._rank} has been in {_position(phase.step, phase.name)} "
            f"for {elapsed_s:.1f} s, limit {self._limit_s:.1f} s"
        )
        _say(line)
        try:
            path = self._folder / f"hang-a{self.attempt}-rank-{self._rank}.txt"
            part = path.with_name(f".{path.name}")  # other ranks read the report as it appears
            with part.open("w", encoding="utf-8") as file:
                file.write(line + "\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            part.replace(path)
        except OSError:  # a full disk
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        self._dump_collectives()
        deadline = time.monotonic() + PEERS_WAIT_S
        while len(self._new_reports()) < self._world_size and time.monotonic() < deadline:
            time.sleep(0.02)
        reports = {self._rank: line, **self._read_reports()}
        if self._world_size > 1 and self._rank == min(reports):
            stacks = self._folder / f"hang-a{self.attempt}-rank-*.txt"
            others = self._dump_path("*")
            more = f"; collectives: {others}" if any(self._folder.glob(others.name)) else ""
            _say(f"{describe_hang(reports, self._world_size)}; stacks: {stacks}{more}")
        elif self._world_size > 1:
            # The speaker's main thread may wait for this rank, and crash as soon as it is gone.
            time.sleep(SPEAKER_WAIT_S)
        try:
            if self._on_hang is not None:
                self._on_hang(line)
        except Exception:  # whatever it is, a process that hangs has to end
            traceback.print_exc()
        _kill_siblings(set(range(self._world_size)) - set(reports))
        os._exit(EXIT_CRASHED)

    def _dump_path(self, rank: int | str) -> Path:
        return self._folder / f"collectives-a{self.attempt}-rank-{rank}.json"

    def _dump_collectives(self) -> None:
        """Write the record of collectives, from a thread: what it asks may hang as well."""

        def write() -> None:
            record = None if self._collectives is None else self._collectives()
            if record is not None:
                with suppress(OSError):  # a full disk
                    self._dump_path(self._rank).write_bytes(record)

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(DUMP_S)

    def _reports(self) -> dict[str, int]:
        """Return every rank's report with its time of change, to tell old ones from new ones."""
        found = {}
        with suppress(OSError), os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name.startswith("hang-a"):
                    with suppress(OSError):
                        found[entry.name] = entry.stat().st_mtime_ns
        return found

    def _new_reports(self) -> list[str]:
        mine = f"hang-a{self.attempt}-rank-"
        return [
            name
            for name, changed_ns in self._reports().items()
            if name.startswith(mine) and self._old_reports.get(name) != changed_ns
        ]

    def _read_reports(self) -> dict[int, str]:
        reports = {}
        for name in self._new_reports():
            with suppress(OSError, ValueError):
                rank = int(name.rpartition("-")[2].removesuffix(".txt"))
                text = (self._folder / name).read_text(encoding="utf-8", errors="replace")
                reports[rank] = text
        return reports


def describe_hang(reports: Mapping[int, str], world_size: int) -> str:
    """Return in one line which rank the others wait for, as far as their reports show.

    Args:
        reports: Each rank's report: the line that names the hang, then its stacks.
        world_size: How many ranks there are.
    """
    silent = sorted(set(range(world_size)) - set(reports))
    if silent:
        one = "it is stopped, gone or holds the interpreter"
        many = "they are stopped, gone or hold the interpreter"
        return f"no word from {_ranks(silent)}: {one if len(silent) == 1 else many}"
    positions = {rank: _parse_position(text) for rank, text in reports.items()}
    last = min(positions.values(), key=_order)
    behind = sorted(rank for rank, position in positions.items() if position == last)
    if len(behind) == world_size:
        busy = sorted(rank for rank, text in reports.items() if not _is_in_collective(text))
        if not 0 < len(busy) < world_size:
            return f"all ranks are in {_position(*last)}"
        verb = "is" if len(busy) == 1 else "are"
        return f"all ranks but {_ranks(busy)}, which {verb} elsewhere, are in a collective"
    verb = "is" if len(behind) == 1 else "are"
    return f"{_ranks(behind)} {verb} furthest behind: {_position(*last)}"


def _position(step: int | None, phase: str) -> str:
    return f"phase {phase}" if step is None else f"step {step} (phase {phase})"


def _parse_position(line: str) -> tuple[int | None, str]:
    found = re.search(r"in (?:step (\d+) \()?phase (\w+)", line)
    if found is None:
        return None, PHASES[0]
    return None if found[1] is None else int(found[1]), found[2]


def _is_in_collective(report: str) -> bool:
    main_thread = report.rpartition("\n\n")[2]  # faulthandler lists the oldest thread last
    return "/torch/distributed/" in main_thread


def _order(position: tuple[int | None, str]) -> tuple[float, int]:
    step, phase = position
    at = PHASES.index(phase) if phase in PHASES else 0
    if step is None:  # before the first step, or after the last
        return (float("inf") if phase == "end" else -1.0), at
    return float(step), at


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _kill_siblings(ranks: Collection[int]) -> None:
    """Kill silent ranks that our launcher started here; torchrun would give each of them 30 s."""
    wanted = {rank_name(rank) for rank in ranks}
    launcher = os.getppid()
    if launcher == 1:  # gone, and not everything that init adopts is ours
        return
    for sibling in children(launcher) if wanted else ():
        if sibling.name in wanted:
            with suppress(OSError):  # ended meanwhile
                os.kill(sibling.pid, signal.SIGKILL)


def _say(line: str) -> None:
    # Not through sys.stderr: the main thread may hang holding its lock.
    with suppress(OSError):
        os.write(2, f"peft-dist: {printable(line)}\n".encode())
