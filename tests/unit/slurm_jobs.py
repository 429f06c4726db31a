"""Jobs to render, one of each kind that scripts differ in, and stand-ins for what scripts call.

The stand-ins are commands that bash finds first; they do nothing but note how they were called.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_dist.config import Recipe
from peft_dist.config.cluster import Cluster
from peft_dist.launch.placement import Machine, plan_processes
from peft_dist.slurm.job_scripts import Array, Job, scripts
from tests.unit.run_folders import slurm_commands

FOLDER = Path("/scratch/alice/runs/first")
MODEL = "/scratch/models/llama"
CPUS = {"partition": "cpu", "cpus_per_node": 8, "python": "/opt/venv/bin/python"}
GPUS = {
    "partition": "gpu",
    "gpus_per_node": 4,
    "gres": "gpu:a100:{gpus}",
    "cpus_per_gpu": 16,
    "memory_per_node": "480G",
    "python": "/opt/venv/bin/python",
}
EVERYTHING = {
    **GPUS,
    "account": "my-project",
    "qos": "long",
    "reservation": "course",
    "constraint": "[rack1*2&rack2*4]",
    "exclusive": True,
    "numa_binding": "exclusive",
    "interface": "ib0",
    "environment": {"HF_HOME": "/scratch/hf", "NOTE": 'it\'s a "test" of $HOME', "NCCL_IB_PKEY": 1},
    "secrets_file": "/home/alice/.config/peft-dist/secrets",
    "setup": "module purge\nmodule load cuda\nsource /scratch/venvs/it/bin/activate\n",
    "stage": {"folder": "/local/peft-dist"},
    "preflight": {"timeout_s": 90, "min_free_gb": 20.5},
}
APPTAINER = {
    **GPUS,
    "python": None,
    "container": {
        "runtime": "apptainer",
        "image": "/lustre/images/peft-dist.sif",
        "mounts": ["/lustre", "/disk/models:/local", "/datasets:ro", "/a:/b:rw"],
    },
    "secrets_file": "/home/alice/secrets",
    "stage": {"folder": "/local/models"},
}
PYXIS = APPTAINER | {
    "container": APPTAINER["container"]
    | {"runtime": "pyxis", "image": "nvcr.io#nvidia/pytorch:25.01-py3"}
}


def job(
    cluster: Mapping[str, Any],
    *,
    nodes: int = 1,
    folder: Path = FOLDER,
    time_s: int | None = 86_400,
    array: Array | None = None,
    singleton: bool = False,
    **parallel: Any,
) -> Job:
    """Make a job."""
    checked = Cluster.model_validate(cluster)
    recipe = Recipe.model_validate(
        {"model": {"name": "m"}, "data": {"train": "d"}, "parallel": parallel}
    )
    machine = Machine(gpus=checked.gpus_per_node, cores=checked.cpus_of_a_node or 1)
    return Job(
        name="first",
        folder=folder,
        cluster=checked,
        placement=plan_processes(recipe, machine, nodes, per_node=checked.processes_per_node or 0),
        time_s=time_s,
        lead_s=180,
        max_restarts=recipe.parallel.max_restarts,
        array=array,
        singleton=singleton,
    )


def jobs() -> dict[str, Job]:
    """Return a job of each kind."""
    return {
        "one-node-of-cpus": job(CPUS, time_s=None, max_restarts=0),
        "four-nodes-with-everything": job(EVERYTHING, nodes=4, strategy="fsdp"),
        "hsdp": job(GPUS, nodes=2, strategy="hsdp"),
        "zero3": job({**CPUS, "processes_per_node": 2}, nodes=2, strategy="zero3"),
        "array": job(GPUS, array=Array(elements=4, limit=2), strategy="ddp"),
        "no-requeue": job({**GPUS, "requeue": {"allowed": False}}, nodes=2),
        "apptainer": job(APPTAINER, nodes=2),
        "srun": job({**GPUS, "launcher": "srun", "srun": {"cpu-bind": "cores"}}, nodes=2),
        "pyxis": job(PYXIS, nodes=2),
        "singleton": job({**CPUS, "preflight": {"enabled": False}}, singleton=True),
    }


def render(made: Job) -> dict[str, str]:
    """Return the scripts of a job by what they are called; of an array, those of its first run."""
    run = made.folder / "000" if made.array else made.folder
    return {path.name: text for path, text in scripts(made, [(run, MODEL)]).items()}


INTERPRETER = r"""
case "$1 $2" in
  "-c "*) echo "$STAND_IN_SHARE"; exit ;;
  "-m peft_dist.slurm.stage_model")
    printf '%s\0' "$@" >"$SEEN/stage-$SLURM_NODEID"
    echo '{"a": "b"}'
    exit ;;
esac
case " $* " in
  *" --after "*) printf '%s\0' "$@" >"$SEEN/after"; STAND_IN_DECISION=$STAND_IN_AFTER ;;
esac
until [ -z "$STAND_IN_HANGS" ] || [ -e "$SEEN/requeued" ]; do sleep 0.1; done
printf '%s\0' "$@" >"$SEEN/argv-$SLURM_NODEID"
env -0 >"$SEEN/environment-$SLURM_NODEID"
while [ "$1" != --run-dir ]; do shift; done
echo "$STAND_IN_DECISION" >"$PEFT_DIST_LOGS/decision"
"""
SRUN = r"""
printf '%s\0' "$@" >"$SEEN/srun"
output=/dev/stderr only=
while [ "$1" != bash ]; do
  case $1 in --output=*) output=${1#--output=} ;; --nodelist=*) only=${1#--nodelist=node} ;; esac
  shift
done
if [ -n "$only" ]; then SLURMD_NODENAME=node$only SLURM_NODEID=0 "$@"; exit; fi
node=0 tasks=
while [ "$node" -lt "$SLURM_JOB_NUM_NODES" ]; do
  log=$(echo "$output" | sed "s/%N/node$((node + 1))/; s/%%/%/g")
  SLURM_NODEID=$node SLURMD_NODENAME=node$((node + 1)) "$@" >>"$log" 2>&1 &
  tasks="$tasks $!"
  node=$((node + 1))
done
code=0
for task in $tasks; do wait "$task" || code=$?; done
exit $code
"""
SCONTROL = r"""
case "$1 $2" in
  "show hostnames") node=0
    while [ "$node" -lt "$SLURM_JOB_NUM_NODES" ]; do node=$((node + 1)); echo "node$node"; done ;;
  "show job") [ ! -e "$SEEN/requeued" ] || STAND_IN_STATE=PENDING
    echo "JobId=12 JobState=$STAND_IN_STATE Restarts=0 PreemptTime=$STAND_IN_PREEMPTED \
EndTime=$STAND_IN_END NodeList=x" ;;
  "requeue "*) printf '%s\0' "$2" >>"$SEEN/requeued" ;;
esac
"""
APPTAINER_COMMAND = r"""
printf '%s\0' "$@" >"$SEEN/apptainer"
shift
while :; do
  case $1 in
    --nv) shift ;;
    --bind) shift 2 ;;
    *) break ;;
  esac
done
shift
exec "$@"
"""


class Machines:
    """A job's nodes, played by this machine: bash is real, and Slurm's commands only take notes."""

    def __init__(self, folder: Path) -> None:
        """Make the commands; nothing but `/usr/bin` and `/bin` is found besides."""
        self.seen = folder / "seen"
        self.seen.mkdir()
        self.commands = slurm_commands(
            folder / "commands",
            srun=SRUN,
            scontrol=SCONTROL,
            sbatch="case $* in *--parsable*) echo 77 ;; esac",
            scancel="",
            sinfo='node=0; while [ "$node" -lt "$SLURM_JOB_NUM_NODES" ]; do node=$((node + 1)); '
            'echo "node$node mixed"; done',
            squeue="",
            apptainer=APPTAINER_COMMAND,
            python3=INTERPRETER,
        )
        self.interpreter = self.commands / "python3"

    def environment(self, *, nodes: int = 1, decision: str = "done", **more: str) -> dict[str, str]:
        """Return what Slurm gives to a batch script."""
        return {
            "PATH": f"{self.commands}:/usr/bin:/bin",
            "HOME": str(self.seen),
            "LANG": "C.UTF-8",
            "SEEN": str(self.seen),
            "STAND_IN_SHARE": "/share of/it",
            "STAND_IN_DECISION": decision,
            "STAND_IN_AFTER": "",
            "STAND_IN_STATE": "RUNNING",
            "STAND_IN_HANGS": "",
            "STAND_IN_PREEMPTED": "None",
            "STAND_IN_END": "Unknown",
            "SLURM_JOB_ID": "12",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_JOB_NODELIST": f"node[1-{nodes}]",
            "SLURMD_NODENAME": "node1",
            "SLURM_CPUS_ON_NODE": "8",
            "SLURM_CPUS_PER_TASK": "8",
            **more,
        }

    def run(self, script: Path, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run a batch script, or a node's, to its end."""
        return subprocess.run(
            ["bash", str(script)],
            env=self.environment(**more),
            cwd=self.seen,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def words(self, name: str) -> list[str]:
        """Return how something was called: `srun`, `apptainer`, `argv-NODE` or `stage-NODE`."""
        return os.fsdecode((self.seen / name).read_bytes()).split("\0")[:-1]

    def variables(self, node: int = 0) -> dict[str, str]:
        """Return the environment of a node's Python."""
        texts = self.words(f"environment-{node}")
        return dict(text.split("=", 1) for text in texts)


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":  # for a test that compares two processes
    json.dump({name: render(made) for name, made in jobs().items()}, sys.stdout)
