"""Nodes that die, that are cut off and live on, or that should not take part."""

from pathlib import Path

import pytest

from peft_dist.run.lease import CHECK_EVERY_S
from tests.cluster.slurm import SlurmCluster
from tests.cluster.submitted import Runs
from tests.faults.long import only_long
from tests.faults.oracles import assert_same_run, records, sha256

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.mark.parametrize("node", ["node2", pytest.param("node1", marks=only_long)])
def test_a_run_goes_on_without_the_node_that_died(
    cluster: SlurmCluster, runs: Runs, reference: Path, node: str
) -> None:
    run = runs.submit("some")
    run.wait_for_step(45)
    first, second = run.events("started")[0]["nodes"], cluster.jobs()[run.job].nodes
    assert first == second == "node[1-2]"
    cluster.power_off(node)
    run.wait_until(lambda: run.starts == 2, "a second start")
    nodes = cluster.jobs()[run.job].nodes
    assert node not in cluster.run(["scontrol", "show", "hostnames", nodes]).stdout.split()
    run.wait_for_end()
    assert_same_run(run.path, reference)


@only_long
def test_a_node_that_was_cut_off_and_lives_on_publishes_nothing(
    cluster: SlurmCluster, runs: Runs
) -> None:
    # One process each, which goes on training for as long as it is let.
    long = ("parallel.strategy=ddp", "train.steps=600")
    here = runs.train_here("here", *long, nproc=1)
    run = runs.submit("some", *long, nodes=1)
    run.wait_for_step(25)
    cluster.cut("node1")
    run.wait_until(lambda: len(records(run.path, "start")) == 2, "a second attempt")
    taken_over_s = records(run.path, "start")[1]["time"]
    checkpoints = run.path / "checkpoints"
    seen = {path.name: sha256(path / "manifest.json") for path in checkpoints.glob("step-*")}
    # The zombie has noticed, and has ended: nothing of it is left on its node.
    run.wait_until(lambda: not processes_on(cluster, "node1"), "the end of the zombie")
    # Until it has looked, its events are written too; readers leave them out.
    late = [one["time"] for one in records(run.path) if one["attempt"] == 1]
    assert max(late) <= taken_over_s + CHECK_EVERY_S + 2
    for path in checkpoints.glob("step-*"):
        assert seen.get(path.name, sha256(path / "manifest.json")) == sha256(path / "manifest.json")
    run.wait_for_end()
    assert_same_run(run.path, here)
    assert [record["attempt"] for record in records(run.path, "end")][-1] == 2


def processes_on(cluster: SlurmCluster, node: str) -> str:
    """Return the processes of ours that run on a node."""
    return cluster.execute(node, ["pgrep", "-f", "launch/train.py"], check=False).stdout


@only_long
def test_a_node_that_differs_from_the_others_is_left_out_of_the_next_start(
    cluster: SlurmCluster, runs: Runs
) -> None:
    # A folder that is another one on each node holds, on one of them, another version of a package.
    for node in ("node1", "node2", "node3", "node4"):
        cluster.execute(node, ["mkdir", "-p", f"{cluster.local_disk}/site"])
    odd = f"{cluster.local_disk}/site/safetensors-99.0.dist-info"
    cluster.execute("node2", ["mkdir", odd])
    metadata = r"Metadata-Version: 2.1\nName: safetensors\nVersion: 99.0\n"
    cluster.execute("node2", ["bash", "-c", f"printf '{metadata}' >{odd}/METADATA"])
    run = runs.submit(
        "some", "train.steps=5", preflight={"enabled": True, "min_free_gb": 0.01},
        environment={
            "PEFT_DIST_CACHE": str(runs.project.cache),
            "PYTHONPATH": f"{cluster.local_disk}/site",
        },
        nodes=3,
    )  # fmt: skip
    first = run.job
    run.wait_for_end()
    decision = run.events("decided")[0]
    assert decision["decision"] == "again-without"
    assert decision["reason"].startswith("node2 pre-flight: node2: safetensors 99.0, node1 has ")
    assert "node2" not in run.events("started")[-1]["nodes"]
    assert run.job != first  # the nodes of a job are fixed
    cluster.execute("node2", ["rm", "-r", odd])
