"""Arrays that are larger than Slurm takes at once."""

from pathlib import Path
from typing import Any

import pytest

from peft_dist.cli.main import main
from peft_dist.run import job_events
from peft_dist.slurm.job_scripts import Array, render_job, render_node
from tests.unit.run_folders import slurm_commands
from tests.unit.slurm_desk import Capture, Desk
from tests.unit.slurm_jobs import CPUS, Machines, job, json_lines

FULL = """echo 'sbatch: error: AssocMaxSubmitJobLimit
sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, \
user'\"'\"'s size and/or time limits)' >&2; exit 1"""
AT_MOST = """case $* in
  *--test-only*) ;;
  *--array=0,1,2,3,4*) {full} ;;
  *--array=0,1*) echo 4711 ;;
  *) {full} ;;
esac"""
SEEDS = ["--array", "train.seed=1,2,3,4,5"]


def waves(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "waves").iterdir())


def test_as_many_runs_are_queued_as_slurm_takes_and_the_others_wait(
    desk: Desk, capsys: Capture
) -> None:
    desk.answer(squeue="", sbatch=AT_MOST.format(full=FULL))
    assert desk.submit(*SEEDS) == 0
    assert "Slurm takes 2 of 5 runs now; their jobs queue the others" in capsys.readouterr().err
    assert waves(desk.run) == ["2", "3", "4"]
    known = [bool(job_events.events(desk.run / f"{index:03d}")) for index in range(5)]
    assert known == [True, True, False, False, False]
    desk.job_is("PENDING", "4711_0")
    desk.answer(scancel="", squeue="echo '4711_0|4711|CANCELLED|||None'", sacct="", scontrol="")
    assert main(["cancel", "runs/mine", "--now"]) == 0
    assert waves(desk.run) == []


def test_no_more_are_queued_at_first_than_may_run_at_once(desk: Desk) -> None:
    desk.answer(squeue="", sbatch=AT_MOST.format(full=FULL).replace("0,1*", "0%1*"))
    assert desk.submit(*SEEDS, "--limit", "1") == 0
    assert waves(desk.run) == ["1", "2", "3", "4"]


def test_another_refusal_is_none_of_numbers(desk: Desk, capsys: Capture) -> None:
    desk.answer(sbatch="case $* in *--test-only*) ;; *) echo 'Invalid account' >&2; exit 1 ;; esac")
    assert desk.submit(*SEEDS) == 2
    assert "Invalid account" in capsys.readouterr().err
    assert not (desk.run / "waves").exists()


def element(folder: Path, **array: Any) -> tuple[Machines, Path]:
    """Write the scripts of an array whose last two runs wait for a place; return its script."""
    machines = Machines(folder)
    made = job({**CPUS, "python": str(machines.interpreter)}, folder=folder / "sweep",
               array=Array(4, array.get("limit")))  # fmt: skip
    for index in range(4):
        run = made.folder / f"{index:03d}"
        (run / "slurm").mkdir(parents=True)
        (run / "node.sh").write_text(render_node(made, run), encoding="utf-8")
    (made.folder / "waves").mkdir()
    for index in (2, 3):
        (made.folder / "waves" / str(index)).touch()
    script = made.folder / "job.sbatch"
    script.write_text(render_job(made), encoding="utf-8")
    return machines, script


ELEMENT = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "1"}


@pytest.mark.parametrize(("limit", "left"), [(None, []), (2, ["3"])])
def test_a_job_that_ends_queues_what_waits(
    tmp_path: Path, limit: int | None, left: list[str]
) -> None:
    machines, script = element(tmp_path, limit=limit)
    done = machines.run(script, decision="done", **ELEMENT)
    assert done.returncode == 0, done.stderr
    folder = script.parent
    assert waves(folder) == left
    (event,) = json_lines(folder / "002" / "slurm" / "jobs.jsonl")
    assert (event["event"], event["job"], event["by"]) == ("submitted", "77_2", "wave")
    calls = (machines.commands / "calls").read_text(encoding="utf-8").splitlines()
    queued = [call.split() for call in calls if call.startswith("sbatch")]
    assert queued[0][3:] == ["--array=2", str(script)]


@pytest.mark.parametrize("decision", ["again", "cancelled", "done"])
def test_a_job_that_goes_on_or_finds_no_place_queues_nothing(tmp_path: Path, decision: str) -> None:
    machines, script = element(tmp_path)
    slurm_commands(machines.commands, sbatch=f"case $* in *--parsable*) {FULL} ;; esac")
    machines.run(script, decision=decision, **ELEMENT)
    assert waves(script.parent) == ["2", "3"]
    calls = (machines.commands / "calls").read_text(encoding="utf-8")
    assert calls.count("--array=2") == (1 if decision == "done" else 0)
