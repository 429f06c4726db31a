"""Rows 1, 3 and 20 where `peft-dist train` is the one that is hit, with torchrun beneath it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.faults.conftest import Undisturbed
from tests.faults.harness import Project
from tests.faults.long import cases, only_long
from tests.faults.oracles import (
    assert_same_run,
    checkpoint_steps,
    hidden_files,
    last_step,
    processes_below,
    records,
)
from tests.processes import environment, wait_until
from tests.tiny import completion_rows, write_jsonl

pytestmark = pytest.mark.distributed

STEPS = ("train.steps=200", "evaluate.every_steps=null", "checkpoint.every_steps=20")
LIMIT_S = 120.0
PEFT_DIST = [sys.executable, "-m", "peft_dist"]


class Command:
    """A command that runs."""

    def __init__(self, project: Project, folder: Path, name: str, *arguments: str) -> None:
        """Start it, in a session of its own."""
        self.folder, self._log = folder, folder / f"{name}.err"
        self.started_s = time.monotonic()
        with self._log.open("ab") as errors:
            self.process = subprocess.Popen(
                arguments,
                env=environment(project.cache, PEFT_DIST_TEST=str(folder)),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )

    def wait(self, timeout_s: float = LIMIT_S) -> int:
        """Wait for its end and return its exit code."""
        return self.process.wait(timeout_s)

    def told(self) -> str:
        """Return what it wrote to standard error."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def wait_until(self, is_so: Callable[[], bool], what: str) -> None:
        """Wait for anything while it runs."""
        deadline = time.monotonic() + LIMIT_S
        while not is_so():
            assert self.process.poll() is None, f"ended before {what}: {self.told()}"
            assert time.monotonic() < deadline, f"no {what}: {self.told()}"
            time.sleep(0.01)


class Run:
    """A run directory and the commands that a test gives for it."""

    def __init__(self, project: Project, folder: Path) -> None:
        """Nothing runs yet."""
        self.project, self.folder = project, folder
        self.path = folder / "run"
        self._commands: list[Command] = []

    def start(self, *overrides: str) -> Command:
        """Start `peft-dist train` on two processes."""
        settings = {word.partition("=")[0]: word for word in (*STEPS, *overrides)}
        return self.command(
            "train", str(self.project.recipe), "--run-dir", str(self.path), "--nproc", "2",
            "parallel.strategy=fsdp", *settings.values(),
        )  # fmt: skip

    def command(self, *arguments: str) -> Command:
        """Start any `peft-dist` command."""
        return self.execute(*PEFT_DIST, *arguments)

    def execute(self, *arguments: str) -> Command:
        """Start any command."""
        command = Command(self.project, self.folder, f"{len(self._commands)}", *arguments)
        self._commands.append(command)
        return command

    def wait_for_step(self, command: Command, step: int) -> None:
        """Wait until the ledger has come to a step."""
        command.wait_until(lambda: last_step(self.path) >= step, f"step {step}")

    def ranks(self) -> dict[int, int]:
        """Return the processes that train, by rank."""
        return {
            int(name.removeprefix("rank ")): pid
            for pid, name in self.names().items()
            if re.fullmatch(r"rank \d+", name)
        }

    def names(self) -> dict[int, str]:
        """Return what each process of the test calls itself."""
        found = {}
        for pid in processes_below(self.folder):
            with suppress(OSError):
                found[pid] = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
        return found

    def launcher(self, command: Command) -> int:
        """Return the process of accelerate and torchrun, which are one."""
        (pid,) = (
            pid
            for pid, name in self.names().items()
            if pid != command.process.pid and not name.startswith("rank ")
        )
        return pid

    def outcomes(self) -> list[str | None]:
        """Return how each attempt ended, as it said itself."""
        files = sorted((self.path / "attempts").glob("????????.json"))
        return [json.loads(path.read_text(encoding="utf-8")).get("outcome") for path in files]

    def launcher_said(self) -> str:
        """Return what launcher and workers wrote to standard error."""
        return (self.path / "logs" / "launcher.log").read_text(encoding="utf-8")

    def close(self) -> None:
        """End what still runs; fail where a command that had ended has left something behind."""
        running = [one.process for one in self._commands if one.process.poll() is None]
        left = [] if running else processes_below(self.folder)
        for pid in processes_below(self.folder):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in running:
            process.wait(LIMIT_S)
        assert not left, f"processes left behind: {left}"
        if (self.path / "result.json").exists():
            assert not hidden_files(self.path)


@pytest.fixture
def run(project: Project, tmp_path: Path) -> Iterator[Run]:
    run = Run(project, tmp_path)
    yield run
    run.close()


def assert_undisturbed(run: Run, undisturbed: Undisturbed) -> None:
    """O1; the harness's own environment differs from torchrun's in nothing that trains."""
    assert_same_run(run.path, undisturbed(2, "fsdp", *STEPS))


@pytest.mark.parametrize("seed", range(cases(1, 10)))
def test_a_killed_rank_is_started_again_in_place(
    run: Run, undisturbed: Undisturbed, seed: int, record_property: Callable[[str, object], None]
) -> None:
    command = run.start()
    run.wait_for_step(command, 50 + 12 * seed)
    killed_at_s, killed_time = time.monotonic(), time.time()
    before = last_step(run.path)
    os.kill(run.ranks()[seed % 2], signal.SIGKILL)
    command.wait_until(lambda: len(records(run.path, "start")) == 2, "second start")
    command.wait_until(lambda: records(run.path)[-1]["event"] != "start", "step after the restart")
    seconds = time.monotonic() - killed_at_s
    record_property("kill_to_first_new_step_s", round(seconds, 2))
    print(f"\nkill to first new step: {seconds:.1f} s, torchrun's own restart")
    assert seconds < 30.0  # 10 s is the target on a quiet machine
    assert command.wait() == 0, command.told()
    again = records(run.path, "start")[1]
    assert again["time"] > killed_time
    assert again["step"] >= before - 2 * 20  # one is being written, one is whole
    assert run.outcomes() == [None, "done"]
    assert_undisturbed(run, undisturbed)


SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP][: cases(1, 4)]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_to_the_command_saves_and_resume_finishes(
    run: Run, undisturbed: Undisturbed, number: signal.Signals
) -> None:
    command = run.start()
    run.wait_for_step(command, 50)
    told_at_s = time.monotonic()
    command.process.send_signal(number)
    assert command.wait() == 75, command.told()
    print(f"\n{number.name} to exit: {time.monotonic() - told_at_s:.1f} s")
    assert time.monotonic() - told_at_s < 20.0
    stopped = last_step(run.path)
    assert 50 <= stopped < 200
    assert checkpoint_steps(run.path)[-1] == stopped
    assert f"stopped by {number.name}" in command.told()
    assert f"`peft-dist resume {run.path}` goes on after step {stopped}" in command.told()
    again = run.command("resume", str(run.path))
    assert again.wait() == 0, again.told()
    assert records(run.path, "start")[1]["step"] == stopped
    assert run.outcomes() == ["interrupted", "done"]
    assert_undisturbed(run, undisturbed)


def handles(pid: int) -> bool:
    """Whether a process has its own answer to SIGUSR1."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    caught = int(status.split("SigCgt:")[1].split()[0], 16)
    return bool(caught >> (signal.SIGUSR1 - 1) & 1)


IN_SETUP = [(1, signal.SIGTERM), (0, signal.SIGTERM), (1, signal.SIGUSR1), (0, signal.SIGUSR1)]


@pytest.mark.parametrize(("rank", "number"), IN_SETUP[: cases(1, 4)])
def test_a_signal_to_one_rank_that_loads_stops_the_command(
    run: Run, rank: int, number: signal.Signals
) -> None:
    command = run.start()
    command.wait_until(lambda: 1 in run.ranks() and handles(run.ranks()[1]), "rank 1")
    os.kill(run.ranks()[1], signal.SIGSTOP)  # so that none can begin to train
    command.wait_until(lambda: bool(run.outcomes()) and handles(run.ranks()[0]), "lease")
    assert not records(run.path)
    told_at_s = time.monotonic()
    os.kill(run.ranks()[rank], number)
    os.kill(run.ranks()[1], signal.SIGCONT)
    assert command.wait() == 75, command.told()
    print(
        f"\n{number.name} to rank {rank} in setup: ended {time.monotonic() - told_at_s:.1f} s after"
    )
    # Which one it was is known where rank 0 had it once it had the run.
    assert re.search(f"stopped by (a signal|{number.name}); `peft-dist resume ", command.told())
    assert run.outcomes() == ["interrupted"]
    assert not records(run.path)


@only_long
def test_workers_whose_launcher_is_killed_save_and_end_and_train_goes_on(
    run: Run, undisturbed: Undisturbed
) -> None:
    command = run.start()
    run.wait_for_step(command, 50)
    os.kill(run.launcher(command), signal.SIGKILL)
    assert command.wait() in (1, 75), command.told()
    assert "goes on after step" in command.told()
    assert not run.ranks()
    stopped = last_step(run.path)
    assert checkpoint_steps(run.path)[-1] == stopped
    again = run.start()
    assert again.wait() == 0, again.told()
    assert records(run.path, "start")[1]["step"] == stopped
    assert_undisturbed(run, undisturbed)


def test_a_command_that_is_killed_takes_its_workers_along_and_its_repetition_goes_on(
    run: Run, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    command = run.start("parallel.max_restarts=3")
    run.wait_for_step(command, 50)
    held_back = run.ranks()[1]
    os.kill(held_back, signal.SIGSTOP)  # the run must not finish before they notice
    command.process.kill()
    killed_at_s = time.monotonic()
    command.wait()
    wait_until(lambda: "was killed; the run ends" in run.launcher_said(), "rank 0 notices")
    os.kill(held_back, signal.SIGCONT)
    wait_until(lambda: not processes_below(run.folder), "end of all", timeout_s=20)
    print(f"\nSIGKILL to the end of all: {time.monotonic() - killed_at_s:.1f} s")
    assert run.outcomes() == ["interrupted"]
    stopped = last_step(run.path)
    assert 50 <= stopped < 200
    assert checkpoint_steps(run.path)[-1] == stopped
    again = run.start("parallel.max_restarts=3")
    assert again.wait() == 0, again.told()
    assert records(run.path, "start")[1]["step"] == stopped
    assert run.outcomes() == ["interrupted", "done"]
    assert not list((tmp_path / "tmp").iterdir())
    assert_undisturbed(run, undisturbed)


@only_long
def test_a_start_right_after_its_process_group_was_killed_waits_and_goes_on(
    run: Run, undisturbed: Undisturbed
) -> None:
    command = run.start()
    run.wait_for_step(command, 50)
    held_back = run.ranks()[1]
    os.kill(held_back, signal.SIGSTOP)
    os.killpg(command.process.pid, signal.SIGKILL)
    command.wait()
    again = run.start()
    again.wait_until(lambda: "waiting up to 120 s" in again.told(), "waiting")
    wait_until(lambda: "was killed; the run ends" in run.launcher_said(), "rank 0 notices")
    os.kill(held_back, signal.SIGCONT)
    assert again.wait() == 0, again.told()
    assert run.outcomes() == ["interrupted", "done"]
    assert_undisturbed(run, undisturbed)


def test_workers_that_load_end_when_their_command_is_killed(run: Run) -> None:
    command = run.start("parallel.max_restarts=3")
    command.wait_until(lambda: bool(run.outcomes()), "lease")
    command.process.kill()
    command.wait()
    wait_until(lambda: not processes_below(run.folder), "end of all", timeout_s=20)
    assert len(run.outcomes()) == 1, "started again with nobody to look after it"
    assert not records(run.path, "step")


def test_a_bad_row_ends_the_command_at_once_and_burns_no_restart(run: Run, tmp_path: Path) -> None:
    broken = Project(tmp_path / "project")
    shutil.copytree(run.project.folder, broken.folder)
    with (broken.folder / "rows.jsonl").open("ab") as file:
        file.write(b'{"prompt": "a", "completion": null}\n')
    run.project = broken
    command = run.start("parallel.max_restarts=3")
    assert command.wait() == 2, command.told()
    assert command.told().count("peft-dist: error: ") == 1
    assert "rows.jsonl:301: completion is null" in command.told()
    assert len(run.outcomes()) == 1, run.outcomes()
    assert not records(run.path)


@only_long
def test_a_command_that_is_refused_for_its_rows_leaves_the_run_as_it_was(
    run: Run, tmp_path: Path
) -> None:
    command = run.start("train.steps=2000")
    run.wait_for_step(command, 5)
    command.process.send_signal(signal.SIGTERM)
    assert command.wait() == 75, command.told()
    before = (run.path / "recipe.yaml").read_bytes()
    other = write_jsonl(tmp_path / "other.jsonl", completion_rows(300, seed=7))
    refused = run.start("train.steps=2000", f"data.train={other}")
    assert refused.wait() == 2, refused.told()
    assert "data.train is not what the run has been trained with" in refused.told()
    assert (run.path / "recipe.yaml").read_bytes() == before
    assert not (run.path / "recipe.next.yaml").exists()


@only_long
def test_without_restarts_a_killed_rank_ends_the_command_which_says_how_to_go_on(
    run: Run,
) -> None:
    command = run.start("parallel.max_restarts=0", "train.steps=2000")
    run.wait_for_step(command, 50)
    started_s = time.monotonic()
    second = run.start("train.steps=2000")
    assert second.wait() == 2, second.told()
    seconds = time.monotonic() - started_s
    print(f"\nsecond command on the folder refused after {seconds:.2f} s")
    assert seconds < 6.0  # 2 s is the target on a quiet machine
    assert "peft-dist: error: " in second.told()
    assert f"in use by attempt 1, process {run.ranks()[0]}" in second.told(), second.told()
    os.kill(run.ranks()[1], signal.SIGKILL)
    assert command.wait() == 1, command.told()
    assert f"`peft-dist resume {run.path}` goes on after step " in command.told()
    assert run.outcomes() == [None]
