"""`peft-dist stop` on runs that train on this machine, whichever launcher started them."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Undisturbed
from tests.faults.harness import Project
from tests.faults.long import only_long
from tests.faults.oracles import checkpoint_steps, last_step, processes_below, records
from tests.faults.test_launcher import STEPS, Run, assert_undisturbed
from tests.processes import ROOT, wait_until

pytestmark = pytest.mark.distributed


@pytest.fixture
def run(project: Project, tmp_path: Path) -> Iterator[Run]:
    run = Run(project, tmp_path)
    yield run
    run.close()


def test_stop_saves_and_ends_a_run_which_its_command_goes_on_with(
    run: Run, undisturbed: Undisturbed
) -> None:
    command = run.start()
    run.wait_for_step(command, 50)
    stop = run.command("stop", str(run.path))
    assert stop.wait() == 0, stop.told()
    assert not run.ranks()
    assert command.wait(5) == 75, command.told()
    stopped = last_step(run.path)
    assert 50 <= stopped < 200
    assert checkpoint_steps(run.path)[-1] == stopped
    again = run.command("stop", str(run.path))
    assert again.wait() == 2
    assert "is trained by no process of this machine" in again.told()
    finishing = run.start()
    assert finishing.wait() == 0, finishing.told()
    assert records(run.path, "start")[1]["step"] == stopped
    assert_undisturbed(run, undisturbed)


@only_long
def test_stop_saves_and_ends_a_run_that_torchrun_has_started(run: Run) -> None:
    torchrun = run.execute(
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "--max-restarts", "3", str(ROOT / "launch" / "train.py"), str(run.project.recipe),
        "--run-dir", str(run.path), *STEPS, "train.steps=2000",
    )  # fmt: skip
    run.wait_for_step(torchrun, 50)
    stop = run.command("stop", str(run.path))
    assert stop.wait() == 0, stop.told()
    wait_until(lambda: not processes_below(run.folder), "end of all", timeout_s=60)
    assert run.outcomes() == ["interrupted"]
    assert checkpoint_steps(run.path)[-1] == last_step(run.path) < 2000
