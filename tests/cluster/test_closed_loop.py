"""What ends a job before its run has ended, and that the run comes back by itself."""

import time
from pathlib import Path

import pytest

from peft_dist.ledger.goodput import goodput
from peft_dist.ledger.reader import LedgerReader
from tests.cluster.slurm import SlurmCluster
from tests.cluster.submitted import Run, Runs
from tests.faults.long import only_long
from tests.faults.oracles import assert_same_run, records

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(400)]


def assert_one_run(run: Run, attempts: int) -> None:
    """See that the ledger holds one run with so many attempts, whose times sum to the clock's."""
    starts = records(run.path, "start")
    assert [record["attempt"] for record in starts] == list(range(1, attempts + 1))
    assert run.row()["attempt"] == attempts
    found = goodput(LedgerReader(run.path / "ledger.jsonl").all())
    ledger = records(run.path)
    assert found.total_s >= ledger[-1]["time"] - ledger[0]["time"]


def test_a_run_that_is_signalled_requeued_and_preempted_is_the_undisturbed_one(
    cluster: SlurmCluster, runs: Runs, reference
) -> None:
    run = runs.submit("some", partition="low")
    run.wait_for_step(10)
    cluster.run(["scancel", "--signal=USR1", run.job])
    run.wait_until(lambda: run.starts == 2, "a second start")
    run.wait_for_step(25)
    cluster.run(["scontrol", "requeue", run.job])
    run.wait_until(lambda: run.starts == 3, "a third start")
    run.wait_for_step(40)
    other = cluster.run(["sbatch", "--parsable", "-p", "high", "-N4", "--exclusive",
                         "-o", "/dev/null", "--wrap", "sleep 3"]).stdout.strip()  # fmt: skip
    cluster.wait_for_job(other, "RUNNING", "COMPLETED")
    run.wait_until(lambda: run.starts == 4, "a fourth start")
    run.wait_for_end()
    assert_same_run(run.path, reference)
    assert_one_run(run, attempts=4)
    outcomes = [record["outcome"] for record in records(run.path, "end")]
    assert outcomes == ["interrupted"] * 3 + ["done"]
    assert {event["job"] for event in run.events("started")} == {run.job}


@only_long
def test_a_run_that_comes_to_its_time_limit_saves_and_goes_on(runs: Runs) -> None:
    slow = runs.train_here("here", "train.steps=400")
    run = runs.submit("long", "train.steps=400", options=["--time", "00:01:00"])
    run.wait_until(lambda: run.starts == 2, "a second start", timeout_s=150)
    (first,) = run.events("decided")
    assert first["decision"] == "again"
    assert "stopped by SIGUSR1" in first["reason"]
    assert first["step"] > 0
    run.wait_for_end()
    assert_same_run(run.path, slow)
    # What was saved is where the second attempt begins: nothing was done twice.
    assert records(run.path, "start")[1]["step"] == first["step"]


@only_long
def test_a_job_that_hears_no_signal_comes_back_from_its_hard_time_limit(
    cluster: SlurmCluster, runs: Runs, tmp_path: Path
) -> None:
    deaf = f"[ -e {tmp_path}/hung ] || {{ touch {tmp_path}/hung; trap '' USR1 TERM; sleep 600; }}"
    run = runs.submit("some", "train.steps=5", nodes=1, setup=deaf, options=["--time", "00:01:00"])
    run.wait_until(lambda: run.starts == 2, "a second start", timeout_s=200)
    assert {event["job"] for event in run.events("started")} == {run.job}
    run.wait_for_end()


@only_long
def test_a_site_that_forbids_requeueing_gets_a_chain_of_jobs(
    cluster: SlurmCluster, runs: Runs, reference
) -> None:
    run = runs.submit("chain", requeue={"allowed": False})
    first = run.job
    run.wait_for_step(30)
    successor = (run.path / "slurm" / "successor").read_text(encoding="utf-8").strip()
    assert cluster.jobs()[successor].state == "PENDING"
    cluster.run(["scancel", "--signal=USR1", first])
    run.wait_until(lambda: run.starts == 2, "the successor")
    assert run.job == successor != first
    assert run.row()["job"] in cluster.jobs()
    run.wait_for_end()
    assert_same_run(run.path, reference)
    assert_one_run(run, attempts=2)
    # The last job's own successor is not left in the queue.
    run.wait_until(lambda: not cluster.run(["squeue", "-h"]).stdout, "an empty queue", timeout_s=30)


def test_a_job_that_is_cancelled_by_slurms_own_command_stays_so(
    cluster: SlurmCluster, runs: Runs
) -> None:
    run = runs.submit("some")
    run.wait_for_step(10)
    cluster.run(["scancel", run.job])
    cluster.wait_for_job(run.job, "CANCELLED")
    time.sleep(cluster.site.credential_s + 2)
    assert cluster.jobs()[run.job].state == "CANCELLED"
    assert run.starts == 1
    row = run.row()
    assert row["state"] == "CANCELLED"
    # All the same it has saved.
    assert records(run.path, "end")[-1]["outcome"] == "interrupted"
