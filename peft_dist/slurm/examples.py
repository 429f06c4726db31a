"""Write `slurm/examples/`: the scripts of a few jobs as they would be submitted, to be read.

`python -m peft_dist.slurm.examples FOLDER` makes them; `make examples` does so for the checkout.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_dist.common import paths
from peft_dist.common.errors import EXIT_DONE
from peft_dist.config import Recipe
from peft_dist.config.cluster import Cluster
from peft_dist.config.load import read_mapping
from peft_dist.launch.placement import Machine, plan_processes
from peft_dist.slurm.job_scripts import Array, Job, scripts

RUNS = Path("/scratch/alice/runs")
MODEL = "/scratch/models/llama"
JOBS: Mapping[str, tuple[str, dict[str, Any], int, Array | None]] = {
    "one-node": ("one run on one node", {}, 1, None),
    "four-nodes": ("one run on four nodes", {}, 4, None),
    "array": ("eight runs of one node, two at a time", {}, 1, Array(elements=8, limit=2)),
    "chain": (
        "one run on two nodes, at a site that requeues nothing: each job queues its successor",
        {"requeue": {"allowed": False}},
        2,
        None,
    ),
}
"""What each example is, what its cluster file says besides, its nodes, and its array."""
HEAD = """\
# What is submitted

Each folder holds the two scripts of a job for the cluster of `slurm/clusters/example.yaml`, as
`peft-dist submit` writes them into a run directory. `make examples` makes them; a test compares.

"""


def examples() -> dict[str, str]:
    """Return every file of the folder by its path there."""
    cluster_file = paths.root() / "slurm" / "clusters" / "example.yaml"
    values = read_mapping(cluster_file, remedy="")
    values["secrets_file"] = "/home/alice/.config/peft-dist/secrets"
    lines = [f"- `{name}`: {about}" for name, (about, *_) in JOBS.items()]
    found = {"README.md": HEAD + "\n".join(lines) + "\n"}
    for name, (_, more, nodes, array) in JOBS.items():
        made = _job(name, Cluster.model_validate(values | more), nodes, array)
        run = made.folder / "000" if array else made.folder
        for path, text in scripts(made, [(run, MODEL)]).items():
            found[f"{name}/{path.name}"] = text
    return found


def _job(name: str, cluster: Cluster, nodes: int, array: Array | None) -> Job:
    recipe = Recipe.model_validate(
        {"model": {"name": MODEL}, "data": {"train": "/scratch/alice/rows.jsonl"}}
    )
    machine = Machine(gpus=cluster.gpus_per_node, cores=cluster.cpus_of_a_node or 1)
    return Job(
        name=name,
        folder=RUNS / name,
        cluster=cluster,
        placement=plan_processes(recipe, machine, nodes, per_node=0),
        time_s=86_400,
        lead_s=cluster.signal_lead_s,
        max_restarts=recipe.parallel.max_restarts,
        array=array,
    )


def main() -> int:
    """Write the examples into the folder that is named."""
    folder = Path(sys.argv[1])
    for name, text in examples().items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
