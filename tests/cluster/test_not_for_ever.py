"""Faults that no restart fixes: the job ends, and `status` says why in one line."""

from pathlib import Path

import pytest

from peft_dist.data.first_rows import ROWS
from tests.cluster.slurm import SlurmCluster
from tests.cluster.submitted import Run, Runs
from tests.faults.long import only_long

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(400)]


def wait_for_failure(run: Run) -> str:
    """Wait until the run's job is over; return the cause that `status` shows."""
    run.wait_until(lambda: run.row()["state"] == "FAILED", "the end of its job", timeout_s=240)
    row = run.row()
    assert "\n" not in row["cause"]
    assert row["cause"]
    return str(row["cause"])


def in_the_second_rank(folder: Path, code: str) -> dict[str, str]:
    """Return the environment in which rank 1 runs some code in a thread, forked or not."""
    program = f"""
import os, sys, threading, time

def wait_and_run():
    while "peft_dist.trainer" not in sys.modules or "RANK" not in os.environ:
        time.sleep(0.05)
    if os.environ["RANK"] == "1":
        {code}

def begin():
    threading.Thread(target=wait_and_run, daemon=True).start()

os.register_at_fork(after_in_child=begin)
begin()
"""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(program, encoding="utf-8")
    return {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def require_cgroups(cluster: SlurmCluster) -> None:
    """Skip where nothing ends what takes more memory than it asked for."""
    if not cluster.place.cgroups():
        pytest.skip("without cgroups Slurm does not end what takes too much memory")


def test_a_fault_of_the_rows_ends_the_job_at_once(
    cluster: SlurmCluster, runs: Runs, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    good = '{"prompt": "a", "completion": "b"}\n'
    # Those that submit looks at are fine.
    rows.write_text(good * ROWS + '{"prompt": 7}\n' * 4, encoding="utf-8")
    run = runs.submit("some", f"data.train={rows}")
    cause = wait_for_failure(run)
    assert f"rows.jsonl:{ROWS + 1}" in cause
    assert run.starts == 1
    assert cluster.jobs()[run.job].exit_code == "3:0"


@only_long
def test_a_crash_loop_is_ended(cluster: SlurmCluster, runs: Runs, tmp_path: Path) -> None:
    environment = in_the_second_rank(tmp_path / "site", "time.sleep(3); os.abort()")
    run = runs.submit(
        "some", "checkpoint.every_steps=1000", "parallel.max_restarts=1", environment=environment
    )
    cause = wait_for_failure(run)
    assert "attempts" in cause, cause
    assert run.starts <= 3


@only_long
def test_a_rank_that_runs_out_of_memory_again_and_again_is_ended(
    cluster: SlurmCluster, runs: Runs, tmp_path: Path
) -> None:
    require_cgroups(cluster)
    # Once it trains, the second rank takes more than the job may have; the kernel ends it.
    hog = "time.sleep(3); taken = [b'x' * (1 << 26) for _ in range(64)]"
    environment = in_the_second_rank(tmp_path / "site", hog)
    run = runs.submit("some", "checkpoint.every_steps=1000", environment=environment)
    cause = wait_for_failure(run)
    assert "no progress in 3 attempts" in cause or "memory" in cause, cause
    assert run.starts <= 3


def test_a_job_that_slurm_kills_for_its_memory_is_not_requeued_for_ever(
    cluster: SlurmCluster, runs: Runs
) -> None:
    require_cgroups(cluster)
    run = runs.submit("some", memory_per_node="150M")
    cause = wait_for_failure(run)
    assert "memory_per_node" in cause, cause
    assert run.starts == 2
