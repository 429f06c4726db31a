"""A chain of jobs: pack the base, train, score, merge; each when the one before has ended well."""

import json
from pathlib import Path

import pytest

from tests.cluster.slurm import SlurmCluster
from tests.cluster.submitted import SLOW, Run, Runs
from tests.faults.long import only_long

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(400)]


@only_long
@pytest.mark.parametrize("comes_back_by", ["requeue", "successor"])
def test_a_chain_of_commands_holds_over_the_restarts_of_its_run(
    cluster: SlurmCluster, runs: Runs, comes_back_by: str
) -> None:
    file = str(runs.cluster_file(requeue={"allowed": comes_back_by == "requeue"}))
    model = str(runs.project.folder / "model")
    where = ["--cluster", file]
    packed = runs.folder / "runs" / "quantize-model"
    runs.command("submit", "quantize", model, *where)
    runs.command("submit", str(runs.project.recipe), *SLOW, *where, "--nodes", "2",
                 "--run-dir", "some", "--after", str(packed))  # fmt: skip
    run = Run(runs, runs.folder / "some")
    runs.command("submit", "evaluate", "some", *where, "--nodes", "2", "--after", "some")
    runs.command("submit", "merge", "some", *where, "--out", "merged", "--base", "dequantized",
                 "--after", "some/evaluate")  # fmt: skip
    run.wait_for_step(10)
    assert (packed / "result.json").exists()
    first = run.job
    cluster.run(["scancel", "--signal=USR1", first])
    run.wait_until(lambda: run.starts == 2, "a second start")
    assert (run.job == first) == (comes_back_by == "requeue")
    waiting = [Run(runs, run.path / name) for name in ("evaluate", "merge")]
    assert [cluster.jobs()[one.job].state for one in waiting] == ["PENDING"] * 2
    run.wait_for_end()
    for one in waiting:
        one.wait_until((one.path / "result.json").exists, "its result")
    assert json.loads((run.path / "evaluation.json").read_text(encoding="utf-8"))["rows"] > 0
    assert list(Path(runs.folder / "merged").glob("*.safetensors"))
    states = {row["run"]: row["state"] for row in runs.status("some/merge", str(packed))}
    assert states == {"merge": "COMPLETED", "quantize-model": "COMPLETED"}
