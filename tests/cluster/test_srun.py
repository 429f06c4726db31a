"""Ranks that Slurm starts itself, a task for each: the run is the one that torchrun starts."""

from pathlib import Path

import pytest

from peft_dist.data.first_rows import ROWS
from tests.cluster.slurm import SlurmCluster
from tests.cluster.submitted import Runs
from tests.faults.long import only_long
from tests.faults.oracles import assert_same_run, records

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(400), only_long]


def test_a_task_for_each_rank_is_the_same_run_and_comes_back(
    cluster: SlurmCluster, runs: Runs, reference: Path
) -> None:
    run = runs.submit("some", nodes=1, launcher="srun", processes_per_node=2, cpus_per_node=2,
                      preflight={"enabled": True, "min_free_gb": 0.01})  # fmt: skip
    run.wait_for_step(10)
    step = cluster.run(["scontrol", "show", "step", f"{run.job}.0", "-o"]).stdout
    assert " Tasks=2 " in step
    cluster.run(["scancel", "--signal=USR1", run.job])
    run.wait_until(lambda: run.starts == 2, "a second start")
    run.wait_for_end()
    assert_same_run(run.path, reference)
    assert [record["outcome"] for record in records(run.path, "end")] == ["interrupted", "done"]


def test_ranks_of_several_nodes_meet_and_a_fault_ends_them_all(runs: Runs, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    good = '{"prompt": "a", "completion": "b"}\n'
    # Those that submit looks at are fine.
    rows.write_text(good * ROWS + '{"prompt": 7}\n' * 4, encoding="utf-8")
    many = {"launcher": "srun", "processes_per_node": 2, "cpus_per_node": 2}
    bad = runs.submit("bad", f"data.train={rows}", nodes=2, **many)
    good = runs.submit("good", "train.steps=5", "parallel.strategy=hsdp", nodes=2, **many)
    good.wait_for_end()
    bad.wait_until(lambda: bad.row()["state"] == "FAILED", "the end of the bad one")
    assert f"rows.jsonl:{ROWS + 1}" in bad.row()["cause"]
    assert bad.starts == 1
