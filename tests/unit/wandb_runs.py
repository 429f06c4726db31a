"""Runs as W&B's side-car sees them: a ledger that grows, and the real SDK at the other end.

`python -m tests.unit.wandb_runs RUN_DIR STEPS [DURING]` plays a training process of its own.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft_dist.config import Recipe, load_recipe
from peft_dist.ledger.events import EndEvent, LedgerEvent, StartEvent, StepEvent
from peft_dist.ledger.writer import LedgerWriter, Tracker
from peft_dist.run.directory import RunDir
from peft_dist.tracking.wandb.rows import LedgerRows
from peft_dist.tracking.wandb.tracker import WandbTracker
from tests.processes import ROOT, environment
from tests.wandb_stub import KEY, Run, Stub

VERSIONS = {"torch": "2.13.0", "peft-dist": "0.1.0"}


def make_run(path: Path, **wandb: Any) -> RunDir:
    """Make a run that is to be logged as these settings of `tracking.wandb` say."""
    # A machine that does much else takes its time to send all rows.
    settings = {"mode": "auto", "project": "a-project", "wait_s": 90.0, **wandb}
    raw = {
        "model": {"name": "m"}, "data": {"train": "d"}, "tracking": {"wandb": settings},
    }  # fmt: skip
    return RunDir.create(path, Recipe.model_validate(raw))


def user(home: Path, stub: Stub | None, key: str | None = KEY, **extra: str) -> dict[str, str]:
    """Return the environment of somebody who uses a server with a key."""
    kept = {name: text for name, text in environment(home).items() if "WANDB" not in name}
    kept |= {"HOME": str(home), **extra}
    if key is not None:
        kept["WANDB_API_KEY"] = key
    if stub is not None:
        kept["WANDB_BASE_URL"] = stub.url
    return kept


def start_event(step: int = 0) -> StartEvent:
    """Return how an attempt begins that has done `step` steps before."""
    return StartEvent(
        step=step, steps=10_000, world_size=2, strategy="fsdp", startup_s=1.0, load_s=0.5,
        versions=VERSIONS, hosts=["node-7", "node-8"], device="cpu",
        base_bytes_per_rank=[1000, 1000],
    )  # fmt: skip


def step_event(step: int, **fields: Any) -> StepEvent:
    """Return what a step leaves."""
    given = {"rank_step_s": [0.25, 0.5 + step / 1000], "rank_memory_bytes": [10**9, 10**9 + step]}
    return StepEvent(
        step=step, lr=1e-3, rows=16, cursor=16 * step, tokens=320, loss=4.0 / step, grad_norm=1.5,
        tokens_per_s=1234.5, mfu=0.25, peak_memory_bytes=10**9, **(given | fields),
    )  # fmt: skip


class Training:
    """Plays rank 0 of one attempt: what it writes, and to whom."""

    def __init__(
        self, run: RunDir, *, attempt: int = 1, step: int = 0, with_wandb: bool = True
    ) -> None:
        """Begin after so many steps."""
        recipe = load_recipe(run.recipe, [], check_paths=False)
        self.wandb = WandbTracker(run, wait_s=recipe.tracking.wandb.wait_s)
        self.trackers: list[Tracker] = [LedgerWriter(run.ledger, attempt=attempt)]
        self.trackers += [self.wandb] if with_wandb else []
        self.write_s: list[float] = []
        """How long each step's event took."""
        self.step = step
        self.write(start_event(step))

    def write(self, event: LedgerEvent) -> None:
        """Pass an event on, as the trainer does."""
        for each in self.trackers:
            each.write(event)

    def train(self, steps: int, pause_s: float = 0.0) -> None:
        """Do some steps."""
        for _ in range(steps):
            self.step += 1
            begun = time.perf_counter()
            self.write(step_event(self.step))
            self.write_s.append(time.perf_counter() - begun)
            time.sleep(pause_s)

    def end(self, outcome: str = "done") -> float:
        """End as `fine_tune` does; return how long that took."""
        begun = time.monotonic()
        self.write(EndEvent(step=self.step, outcome=outcome))
        for each in reversed(self.trackers):
            each.close()
        return time.monotonic() - begun


def ledger(run: RunDir) -> list[dict[str, Any]]:
    """Return what stands in every line of a run's ledger."""
    lines = run.ledger.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def wanted_rows(run: RunDir) -> list[dict[str, Any]]:
    """Return what W&B must hold of a run: a row for each line of its ledger that was ever there."""
    rows = [one.row for one in LedgerRows(run.ledger).new()]
    lost = [line["to_step"] - line["from_step"] for line in ledger(run) if line["event"] == "gap"]
    assert len(rows) == len(ledger(run)) + sum(lost)
    return [{name: row[name] for name in row if name != "_timestamp"} for row in rows]


def sync(environment: dict[str, str], *runs: Path) -> subprocess.CompletedProcess[str]:
    """Run `peft-dist sync`."""
    return subprocess.run(
        [sys.executable, "-m", "peft_dist", "sync", *map(str, runs)],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def play(environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    """Start a training process that waits for a line on its input, and then ends."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.unit.wandb_runs", *arguments],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, cwd=ROOT,
    )  # fmt: skip


def wait_for(what: Callable[[], object], timeout_s: float = 30.0) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.1)


def side_cars(run: RunDir) -> list[int]:
    """Return the processes that name a run directory on their command line as a side-car does."""
    return [pid for pid, words in command_lines().items() if words[-1:] == [str(run.path)]]


def command_lines() -> dict[int, list[str]]:
    """Return what `ps` shows of every process."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")[:-1]
        except OSError:  # ended meanwhile
            continue
        found[int(folder.name)] = [word.decode(errors="replace") for word in words]
    return found


def rows_of(run: Run) -> list[dict[str, Any]]:
    """Return a server's rows, and see that their numbers are in order."""
    assert [json.loads(line)["_step"] for line in run.lines] == list(range(len(run.lines)))
    return run.rows


def main(argv: Sequence[str]) -> None:
    """Train so many steps; on a line from outside some more; and end."""
    run, steps, more = RunDir.open(argv[0]), int(argv[1]), int(argv[2])
    training = Training(run)
    training.train(steps)
    print("trained", os.getpid(), flush=True)
    sys.stdin.readline()
    training.train(more)
    print(json.dumps({"end_s": training.end(), "slowest_write_s": max(training.write_s)}))


if __name__ == "__main__":
    main(sys.argv[1:])
