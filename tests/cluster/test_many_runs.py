"""Arrays, runs that wait for each other, and runs that are cancelled and taken up again."""

import time
from pathlib import Path

import pytest

from tests.cluster.slurm import SlurmCluster
from tests.cluster.submitted import Run, Runs
from tests.faults.long import only_long
from tests.faults.oracles import checkpoint_steps, final_steps, records

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(400)]


@only_long
def test_an_array_of_four_runs_two_at_a_time(cluster: SlurmCluster, runs: Runs) -> None:
    run = runs.submit(
        "sweep", "train.steps=30", nodes=1,
        options=["--array", "train.seed=1,2", "--array", "train.learning_rate=1e-3,5e-3",
                 "--limit", "2"],
    )  # fmt: skip
    elements = [Run(runs, run.path / f"{index:03d}") for index in range(4)]
    # The last element's raw job id is the array's own.
    elements[3].wait_until(lambda: elements[3].starts == 1, "the last element")
    cluster.wait_until(lambda: bool(records(elements[3].path, "start")), "its attempt")
    cluster.run(["scancel", "--signal=USR1", elements[3].job])
    most = 0

    def over() -> bool:
        nonlocal most
        (row,) = runs.status("sweep")
        most = max(most, row["counts"]["running"])
        assert sum(row["counts"].values()) == 4
        return bool(row["counts"]["done"] == 4)

    elements[0].wait_until(over, "four results", timeout_s=300)
    assert [element.starts for element in elements] == [1, 1, 1, 2]
    assert 1 <= most <= 2
    shown = runs.command("status", "sweep").stdout
    assert "4 runs: 4 done" in shown
    assert "results of sweep" in shown
    seeds = {(e.path / "recipe.yaml").read_text(encoding="utf-8") for e in elements}
    assert len(seeds) == 4
    again = runs.command("resume", "sweep", check=False)
    assert again.returncode == 2 and "has finished" in again.stderr


@only_long
def test_a_live_run_is_not_submitted_twice_and_a_singleton_waits(
    cluster: SlurmCluster, runs: Runs
) -> None:
    run = runs.submit("one/same", options=["--singleton"])
    again = runs.command(
        "submit", str(runs.project.recipe), "--cluster", str(runs.cluster_file()),
        "--run-dir", "one/same", check=False,
    )  # fmt: skip
    assert again.returncode == 2
    assert f"job {run.job} is " in again.stderr
    assert len(again.stderr.strip().splitlines()) == 1
    run.wait_for_step(1)
    # A singleton waits for every job of its name, here that of another run.
    other = runs.submit("two/same", "train.steps=4", options=["--singleton"])
    run.wait_for_step(10)
    assert other.row()["reason"] == "Dependency"
    runs.command("cancel", "--now", str(run.path))
    other.wait_for_end()


@only_long
def test_a_cancelled_run_has_saved_and_goes_on_with_other_nodes(
    cluster: SlurmCluster, runs: Runs, reference: Path
) -> None:
    run = runs.submit("some", "checkpoint.every_steps=1000")
    run.wait_for_step(20)
    started = time.monotonic()
    told = runs.command("cancel", "some").stdout
    assert time.monotonic() - started < 30
    (step,) = checkpoint_steps(run.path)
    assert f"goes on after step {step}" in told
    assert step >= 20
    row = run.row()
    assert (row["state"], row["step"]) == ("CANCELLED", step)
    time.sleep(cluster.site.credential_s)
    assert not cluster.run(["squeue", "-h"]).stdout  # it does not come back by itself
    runs.command("resume", "some", "--nodes", "1")
    run.wait_until(lambda: len(records(run.path, "start")) == 2, "another attempt")
    assert records(run.path, "start")[1]["world_size"] == 1
    run.wait_for_step(40)
    runs.command("cancel", "some")
    runs.command("resume", "some", "--nodes", "2", "--time", "00:20:00")
    run.wait_for_end()
    assert [record["world_size"] for record in records(run.path, "start")] == [2, 1, 2]
    ours, theirs = final_steps(run.path), final_steps(reference)
    assert ours.keys() == theirs.keys()
    for step, record in theirs.items():  # another number of processes rounds otherwise
        assert ours[step]["loss"] == pytest.approx(record["loss"], abs=1e-4)


@only_long
def test_a_rendered_script_is_a_plain_one(cluster: SlurmCluster, runs: Runs) -> None:
    run = runs.submit("some", "train.steps=8")
    run.wait_for_step(1)
    runs.command("cancel", "--now", "some")
    job = cluster.run(["sbatch", "--parsable", str(run.path / "job.sbatch")]).stdout.strip()
    run.wait_until(lambda: run.job == job, "a start by hand")
    run.wait_for_end()
