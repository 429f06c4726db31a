"""Trainings of a few real processes, started in a blink, killed at will and started again.

    def test_a_killed_rank_resumes(project, harness, undisturbed):
        run = harness.run_dir()
        group = harness.start(project, run, world_size=2, strategy="fsdp")
        group.wait_for_step(33)
        group.kill(1, signal.SIGKILL)
        group.wait_for_end_of(1)
        group.kill_all()
        ended = harness.run_to_end(project, run, world_size=2, strategy="fsdp")
        assert ended.restarts == 0
        assert_same_run(run, undisturbed(2, "fsdp"))

- `project` (session): model, rows, recipe and a warm cache, to be read only. 200 steps,
  a checkpoint every 20, an evaluation every 100; `overrides=["train.steps=60"]` for less. It has
  dropout, which depends on the world size; `method.dropout=0` where that changes in a run.
- `harness` (per test): `run_dir(name)`, `start(...)` for one group of ranks, `run_to_end(...)` for
  as many groups as it takes. `fault("nan_at", step=5, rank=1)` arms a fault of `hooks.py`.
- `undisturbed(world_size, strategy, *overrides)` (session): the same run without any fault.
- `oracles.py` says what must be true afterwards.

At the end of a test every process it started is ended, and the test fails where a rank has left a
process behind, or a run that finished has a hidden or temporary file. Every wait has a time limit.
Ranks are forked by the nursery, which has imported everything: faults that strike while Python
imports need a real launcher (`tests.processes`).
"""

import inspect
import itertools
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults import hooks, oracles
from tests.faults.client import Nursery
from tests.faults.project import Project
from tests.processes import ROOT, environment, free_port

LIMIT_S = 60.0
"""Longest wait where a test names no other."""
POLL_S = 0.01
Fault = dict[str, Any]


def fault(name: str, /, **arguments: Any) -> Fault:
    """Return a fault for `start`, once it is seen that `hooks.py` has it with these arguments."""
    inspect.signature(getattr(hooks, name)).bind(None, **arguments)
    texts = {
        key: str(value) if isinstance(value, Path) else value for key, value in arguments.items()
    }
    return {"name": name, "arguments": texts}


class Group:
    """The ranks of one attempt.

    Attributes:
        run_dir: Their run directory.
        world_size: How many they are.
        pids: Their processes, by rank.
        started_s: When they were forked, in `time.monotonic()`.
    """

    def __init__(self, nursery: Nursery, run_dir: Path, pids: list[int], logs: list[Path]) -> None:
        """Take ranks that the nursery has just forked."""
        self.run_dir, self.pids, self.world_size = run_dir, pids, len(pids)
        self.started_s = time.monotonic()
        self._nursery, self._logs = nursery, logs
        self._steps_before = len(oracles.records(run_dir, "step"))

    @property
    def ended(self) -> list[tuple[int, float] | None]:
        """Each rank's exit code (-9: killed by SIGKILL) and `time.monotonic()` of its end."""
        found = self._nursery.ask(do="ended", pids=self.pids)["ended"]
        return [None if one is None else (one[0], one[1]) for one in found]

    @property
    def codes(self) -> list[int | None]:
        """Each rank's exit code, None while it runs; -9: killed by SIGKILL."""
        return [None if one is None else one[0] for one in self.ended]

    def step(self) -> int:
        """Return the last step that this group has put into the ledger; 0: none yet."""
        steps = oracles.records(self.run_dir, "step")[self._steps_before :]
        return int(steps[-1]["step"]) if steps else 0

    def wait_for_step(self, step: int, timeout_s: float = LIMIT_S) -> None:
        """Wait until this group's ledger has come to a step; it must live until then."""

        def is_there() -> bool:
            if self.step() >= step:
                return True
            assert None in self.codes, f"ended before step {step}: {self.told()}"
            return False

        self.wait_until(is_there, f"step {step}", timeout_s)

    def wait(self, timeout_s: float = LIMIT_S) -> list[int]:
        """Wait until every rank has ended and return the exit codes."""
        self.wait_until(lambda: None not in self.codes, "the end of all ranks", timeout_s)
        return [code for code in self.codes if code is not None]

    def wait_for_end_of(self, rank: int, timeout_s: float = LIMIT_S) -> int:
        """Wait until one rank has ended and return its exit code."""
        self.wait_until(lambda: self.codes[rank] is not None, f"the end of rank {rank}", timeout_s)
        code = self.codes[rank]
        assert code is not None
        return code

    def wait_for_trouble(self, timeout_s: float = LIMIT_S) -> int:
        """Wait until all ranks have ended with 0, or one with another code; return the code."""

        def failed() -> list[int]:
            return [code for code in self.codes if code]

        self.wait_until(
            lambda: bool(failed()) or None not in self.codes, "an end or a crash", timeout_s
        )
        return next(iter(failed()), 0)

    def wait_until(self, is_so: Callable[[], bool], what: str, timeout_s: float = LIMIT_S) -> None:
        """Wait for anything; past the limit fail with what the ranks have said."""
        deadline = time.monotonic() + timeout_s
        while not is_so():
            if time.monotonic() > deadline:
                raise AssertionError(f"no {what} after {timeout_s:g} s: {self.told()}")
            time.sleep(POLL_S)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> bool:
        """Send a rank a signal; return whether it was still there to get it."""
        sent = self._nursery.ask(do="signal", pid=self.pids[rank], signal=int(number))["sent"]
        return bool(sent)

    def kill_all(self, number: int = signal.SIGKILL) -> None:
        """Send every rank a signal; after SIGKILL, wait until all have ended."""
        for rank in range(self.world_size):
            self.kill(rank, number)
        if number == signal.SIGKILL:
            self.wait()

    def output(self, rank: int = 0) -> str:
        """Return what a rank wrote to standard output."""
        return self._text(self._logs[rank].with_suffix(".out"))

    def errors(self, rank: int = 0) -> str:
        """Return what a rank wrote to standard error."""
        return self._text(self._logs[rank].with_suffix(".err"))

    def told(self) -> str:
        """Return codes and errors of all ranks, for a failure's message."""
        said = (f"rank {rank}: {self.errors(rank)[-3000:]}" for rank in range(self.world_size))
        return f"codes {self.codes}, step {self.step()}\n" + "\n".join(said)

    @staticmethod
    def _text(path: Path) -> str:
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


class Ended(NamedTuple):
    """A run that has come to its end."""

    code: int
    """The last group's first exit code that is not 0, or 0."""
    groups: list[Group]

    @property
    def restarts(self) -> int:
        """Groups besides the first."""
        return len(self.groups) - 1


class Harness:
    """What one test starts, all of it below one folder."""

    def __init__(self, nursery: Nursery, folder: Path) -> None:
        """Nothing runs yet."""
        self.nursery, self.folder = nursery, folder
        self.grace_s = 5.0
        """How long what a rank has started may outlive it."""
        self.groups: list[Group] = []
        self._numbers = itertools.count()

    def run_dir(self, name: str = "run") -> Path:
        """Return the path of a run directory, which the program will make."""
        return self.folder / name

    def start(
        self,
        project: Project,
        run_dir: Path,
        *,
        world_size: int = 2,
        strategy: str = "fsdp",
        overrides: Sequence[str] = (),
        faults: Sequence[Fault] = (),
        arguments: Sequence[str] = (),
        restart_count: int = 0,
        **extra: str,
    ) -> Group:
        """Start one group of ranks, as a launcher would; do not wait for anything.

        Args:
            project: What to train.
            run_dir: Where; as it is, or still to be made.
            world_size: How many ranks.
            strategy: The recipe's parallel.strategy.
            overrides: More of the recipe's, such as "train.steps=60".
            faults: From `fault`.
            arguments: More of the command line, such as "--fresh".
            restart_count: How often torchrun would have started all ranks again before.
            extra: More of the environment, or instead of it.
        """
        number = next(self._numbers)
        logs = [self.folder / "ranks" / f"{number}-{rank}" for rank in range(world_size)]
        logs[0].parent.mkdir(parents=True, exist_ok=True)
        common = environment(
            project.cache,
            **{
                "ACCELERATE_USE_CPU": "true",
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free_port()),
                "PEFT_DIST_TEST": str(self.folder),
                "TORCHELASTIC_RESTART_COUNT": str(restart_count),
                "WORLD_SIZE": str(world_size),
                **extra,
            },
        )
        ranks = [
            {
                "environment": {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                "output": str(logs[rank].with_suffix(".out")),
                "errors": str(logs[rank].with_suffix(".err")),
            }
            for rank in range(world_size)
        ]
        argv = [
            str(ROOT / "launch" / "train.py"), str(project.recipe), "--run-dir", str(run_dir),
            *arguments, f"parallel.strategy={strategy}", *overrides,
        ]  # fmt: skip
        answer = self.nursery.ask(
            do="start", folder=str(self.folder), argv=argv, ranks=ranks, faults=list(faults)
        )
        group = Group(self.nursery, run_dir, answer["pids"], logs)
        self.groups.append(group)
        return group

    def run_to_end(
        self,
        project: Project,
        run_dir: Path,
        *,
        faults: Sequence[Sequence[Fault]] = (),
        disturb: Callable[[Group, int], None] | None = None,
        max_restarts: int = 10,
        stop_codes: Sequence[int] = (),
        by_hand: bool = False,
        timeout_s: float = LIMIT_S,
        **start: Any,
    ) -> Ended:
        """Start a group, and again whenever a rank fails, until all ranks end with 0.

        Like torchrun, it kills the others as soon as one rank has failed.

        Args:
            project: What to train.
            run_dir: Where.
            faults: Those of the first group, of the second, and so on; the rest have none.
            disturb: Called with each group right after its start, and its number from 0.
            max_restarts: More than these fail the test.
            stop_codes: Exit codes that also are an end.
            by_hand: Start each group as a person would, and not as torchrun starts them again.
            timeout_s: Longest life of one group.
            start: More for `start`.
        """
        groups: list[Group] = []
        while True:
            number = len(groups)
            planted = faults[number] if number < len(faults) else ()
            count = 0 if by_hand else number
            group = self.start(project, run_dir, faults=planted, restart_count=count, **start)
            groups.append(group)
            if disturb is not None:
                disturb(group, number)
            code = group.wait_for_trouble(timeout_s)
            group.kill_all()
            if code == 0 or code in stop_codes:
                return Ended(code, groups)
            assert number < max_restarts, f"restarted {number} times: {group.told()}"

    def close(self) -> None:
        """End every process of the test, and fail where the program has left something behind."""
        for group in self.groups:
            group.kill_all()
        left = self._processes_left()
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert not left, f"processes left behind: {left}"
        last = {group.run_dir: group for group in self.groups}
        for run_dir, group in last.items():
            if set(group.codes) == {0}:
                hidden = oracles.hidden_files(run_dir)
                hidden += run_dir.parent.glob(f".{run_dir.name}*")
                assert not hidden, f"left behind by a finished run: {hidden}"

    def _processes_left(self) -> list[int]:
        deadline = time.monotonic() + self.grace_s
        while left := oracles.processes_below(self.folder):
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
        return left
