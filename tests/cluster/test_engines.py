"""Every engine as a job of several nodes, held against the same run without Slurm."""

import json
from pathlib import Path

import pytest

from tests.cluster.slurm import SlurmCluster
from tests.cluster.submitted import Runs
from tests.faults.long import IS_LONG
from tests.faults.oracles import final_steps, records

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(400)]

STEPS = 30
SECRET = "planted-9f1c2d"


def test_engines_give_the_losses_of_a_run_without_slurm(
    cluster: SlurmCluster, runs: Runs, tmp_path: Path
) -> None:
    secrets = tmp_path / "secrets"
    secrets.write_text(f"HF_TOKEN={SECRET}\n", encoding="utf-8")
    secrets.chmod(0o600)
    steps = f"train.steps={STEPS}"
    started = {
        # Two nodes, one process each.
        "fsdp": runs.submit(
            "fsdp", steps, preflight={"enabled": True, "min_free_gb": 0.01},
            secrets_file=str(secrets), stage={"folder": str(cluster.local_disk)},
        ),
        # Two nodes, two processes each: sharded inside a node, replicated between nodes.
        "hsdp": runs.submit(
            "hsdp", steps, "parallel.strategy=hsdp", processes_per_node=2, cpus_per_node=2
        ),
    }  # fmt: skip
    if IS_LONG:
        started |= {
            name: runs.submit(name, steps, f"parallel.strategy={name}")
            for name in ("zero3", "ddp", "zero2")
        }
    here = final_steps(runs.train_here("here", steps))
    assert len(here) == STEPS
    for name, run in started.items():
        run.wait_for_end()
        there = final_steps(run.path)
        for step, record in here.items():
            assert there[step]["loss"] == pytest.approx(record["loss"], abs=1e-5), (name, step)
        result = json.loads((run.path / "result.json").read_text(encoding="utf-8"))
        assert result["strategy"] == name
        assert result["world_size"] == (4 if name == "hsdp" else 2)
        row = run.row()
        assert (row["state"], row["step"], row["steps"]) == ("COMPLETED", STEPS, STEPS)
    hsdp = json.loads((started["hsdp"].path / "result.json").read_text(encoding="utf-8"))
    halves = [size * 2 for size in hsdp["base_bytes_per_rank"]]
    assert halves == [hsdp["base_bytes_total"]] * 4
    check_the_fsdp_run(cluster, started["fsdp"].path, runs)


def check_the_fsdp_run(cluster: SlurmCluster, path: Path, runs: Runs) -> None:
    """Look at what else that run was given: pre-flight, secrets, a copy of the model, logs."""
    report = json.loads((path / "slurm" / "preflight.json").read_text(encoding="utf-8"))
    assert report["ok"] and report["nodes"] == 2 and report["all_reduce_s"] > 0
    assert len(records(path, "start")) == 1
    for file in path.rglob("*"):
        if file.is_file():
            assert SECRET.encode() not in file.read_bytes(), file
    assert SECRET not in cluster.run(["scontrol", "show", "job", "--details"]).stdout
    nodes = [log.stem for log in (path / "logs").glob("*-0/node?.log")]
    assert len(nodes) == 2
    for node in nodes:
        # Each user has a part of it.
        found = cluster.execute(node, ["find", str(cluster.local_disk), "-name", "model-*"]).stdout
        assert found, node
    logs = runs.command("logs", str(path)).stdout
    assert "pre-flight: 2 nodes fine" in logs and f"step {STEPS}/{STEPS}" in logs
    assert "no log of rank 7" in runs.command("logs", str(path), "--rank", "7", check=False).stderr
    recorded = json.loads((path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert recorded["base_model_name_or_path"] == str(runs.project.folder / "model")
