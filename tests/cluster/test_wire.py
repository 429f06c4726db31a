"""What travels between the nodes of an hsdp run: adapter gradients, and nothing of the base."""

import json

import pytest

from tests.cluster.slurm import SlurmCluster
from tests.cluster.submitted import Runs
from tests.faults.long import only_long
from tests.faults.oracles import final_steps

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(400)]

FLOAT_BYTES = 4
FEW, MANY = 10, 60


@only_long
def test_between_nodes_only_adapter_bytes_travel(cluster: SlurmCluster, runs: Runs) -> None:
    # Two runs that differ in their steps alone: start, load and end cost both the same.
    settings = ("parallel.strategy=hsdp", "method.rank=512", "train.global_batch_size=8",
                "train.micro_batch_size=2", "evaluate.every_steps=null",
                "checkpoint.every_steps=null", "quantization=none")  # fmt: skip
    sent: dict[int, dict[str, int]] = {}
    for steps in (FEW, MANY):
        before = cluster.wire_bytes()
        run = runs.submit(
            f"wire-{steps}", f"train.steps={steps}", *settings, processes_per_node=2,
            cpus_per_node=2,
        )  # fmt: skip
        run.wait_for_end()
        after = cluster.wire_bytes()
        nodes = ("node1", "node2")
        sent[steps] = {node: after[node].sent - before[node].sent for node in nodes}
        assert len(final_steps(run.path)) == steps
    result = json.loads((run.path / "result.json").read_text(encoding="utf-8"))
    adapter_bytes = FLOAT_BYTES * result["trainable_parameters"]
    ranks = result["world_size"]
    # A ring of all ranks crosses each way between the nodes once: every rank passes its share on
    # 2 (n - 1) times, once to sum and once to spread the sum.
    predicted = 2 * (ranks - 1) / ranks * adapter_bytes * (MANY - FEW)
    for node in ("node1", "node2"):
        measured = sent[MANY][node] - sent[FEW][node]
        print(f"{node}: {measured / predicted:.3f} of {predicted / 1e6:.1f} MB predicted")
        assert 0.95 <= measured / predicted <= 1.10
