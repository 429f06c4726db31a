"""Ctrl-C twice on `peft-dist train`: nothing is lost but what is told, and the run goes on."""

import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from peft_dist.status.command import gather
from peft_dist.status.run_state import RunView
from tests.faults.conftest import Undisturbed
from tests.faults.harness import Project
from tests.faults.long import cases, only_long
from tests.faults.oracles import checkpoint_steps, hidden_files, last_step, records
from tests.faults.test_launcher import Command, Run, assert_undisturbed

pytestmark = [pytest.mark.distributed, only_long]

PHASES: dict[str, Callable[[Run], bool]] = {
    "loading": lambda run: len(run.ranks()) == 2,
    "evaluation": lambda run: bool(records(run.path, "start")),
    "steps": lambda run: last_step(run.path) >= 50,
    "saving": lambda run: any((run.path / "checkpoints").glob(".step-*")),
}


@pytest.fixture
def run(project: Project, tmp_path: Path) -> Iterator[Run]:
    run = Run(project, tmp_path)
    yield run
    run.close()


def press_twice(command: Command, gap_s: float) -> None:
    """Press Ctrl-C, and again, unless the command has ended by then."""
    command.process.send_signal(signal.SIGINT)
    time.sleep(gap_s)
    if command.process.poll() is None:
        command.process.send_signal(signal.SIGINT)


def lost_steps(text: str) -> list[int]:
    """Return the steps that a text says are lost."""
    found = re.search(r"steps? (\d+)(?:-(\d+))? (?:is|are) lost", text)
    return [] if found is None else [*range(int(found[1]), int(found[2] or found[1]) + 1)]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("seed", range(cases(1, 3)))
def test_nothing_is_lost_but_what_is_told_and_the_run_goes_on(
    run: Run, undisturbed: Undisturbed, phase: str, seed: int
) -> None:
    command = run.start()
    command.wait_until(lambda: PHASES[phase](run), phase)
    press_twice(command, random.Random(f"{phase} {seed}").uniform(0.0, 0.4))
    assert command.wait() == 75, command.told()
    told = command.told()
    saved = max(checkpoint_steps(run.path), default=0)
    print(f"\n{phase}: {told.strip().splitlines()[-1]}")
    assert lost_steps(told) == [*range(saved + 1, last_step(run.path) + 1)], told
    goes_on = f"goes on after step {saved}" if saved else "begins anew: there is no checkpoint"
    assert told.strip().endswith(f"`peft-dist resume {run.path}` {goes_on}")
    if run.outcomes():
        (view,) = gather([run.path])
        assert isinstance(view, RunView)
        assert view.state == "INTERRUPTED"
        assert lost_steps(view.cause) == lost_steps(told)
    assert not [path for path in hidden_files(run.path) if path.suffix == ".safetensors"]
    again = run.command("resume", str(run.path))
    assert again.wait() == 0, again.told()
    assert_undisturbed(run, undisturbed)
