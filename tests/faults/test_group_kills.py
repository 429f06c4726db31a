"""Row 1 as the OOM killer or a lost machine has it: command, launcher and ranks die at once."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.faults.conftest import Undisturbed
from tests.faults.harness import Project
from tests.faults.long import cases
from tests.faults.oracles import checkpoint_steps, last_step, processes_below, records
from tests.faults.test_launcher import Command, Run, assert_undisturbed
from tests.processes import wait_until

pytestmark = pytest.mark.distributed

KILLS = cases(1, 20)
SETUP_S = 3.0
"""About how long command, launcher and ranks take to the first step."""
LIMIT_S = 600.0
"""A machine that does much else takes minutes to start."""
STEPS_LOST = 30
"""Most steps that a start does before it is killed: more than there are between checkpoints."""


@pytest.fixture
def run(project: Project, tmp_path: Path) -> Iterator[Run]:
    run = Run(project, tmp_path)
    yield run
    run.close()


def wait_for(is_so: Callable[[], bool], command: Command) -> None:
    """Wait for something that a command does."""
    wait_until(lambda: is_so() or command.process.poll() is not None, "it", timeout_s=LIMIT_S)
    assert is_so(), command.told()


def kill_all(run: Run) -> None:
    """Kill every process of a run at once; those that are born meanwhile too."""
    while found := processes_below(run.folder):
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_a_run_whose_processes_are_all_killed_again_and_again_is_the_undisturbed_one(
    run: Run, undisturbed: Undisturbed
) -> None:
    dice = random.Random(KILLS)
    told = []
    for number in range(KILLS):
        command = run.start()
        if number and dice.random() < 0.25:
            time.sleep(dice.uniform(0.0, SETUP_S))
            told.append("setup")
        else:
            begun = len(records(run.path, "start"))
            wait_for(lambda n=begun: len(records(run.path, "start")) > n, command)
            begin = records(run.path, "start")[-1]["step"]
            # As many steps as the undisturbed run has for each kill, with some to spare.
            goal = min(begin + dice.randint(1, STEPS_LOST), 195)
            wait_for(lambda n=goal: last_step(run.path) >= n, command)
            told.append(f"step {goal}")
        if dice.random() < 0.5:
            kill_all(run)
        else:  # the command's own group, as a shell's `kill -9 %1` has it; its workers notice
            os.killpg(command.process.pid, signal.SIGKILL)
            wait_until(lambda: not processes_below(run.folder), "end of all", timeout_s=LIMIT_S)
        command.wait()
    last = run.start()
    assert last.wait(LIMIT_S) == 0, last.told()
    print(f"\nkilled at {told}; {len(records(run.path, 'start'))} starts trained")
    assert checkpoint_steps(run.path)[-1] == last_step(run.path) == 200
    assert_undisturbed(run, undisturbed)
