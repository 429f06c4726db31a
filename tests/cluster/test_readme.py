"""The README's commands for a cluster, on one, with a tiny model in the real one's place."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from tests.cluster.slurm import SlurmCluster
from tests.faults.long import only_long
from tests.processes import ROOT, environment
from tests.tiny import tiny_model

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(400)]

README = (ROOT / "README.md").read_text(encoding="utf-8")
# As a person would write what the probe leaves open; all of it is small.
CHANGES = """
gpus_per_node: 0
cpus_per_node: 1
memory_per_node: 1500M
max_time: 00:20:00
signal_lead_s: 20
interface: eth0
"""


def commands() -> list[str]:
    """Return the lines of the README's blocks for a cluster, in order, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


@only_long
def test_every_command_for_a_cluster_runs(cluster: SlurmCluster, tmp_path: Path) -> None:
    cache = tmp_path / ".cache/peft-dist"
    tiny_model(cache / "models/smollm2-135m-instruct", "llama")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    logs = tmp_path / "runs/c/logs"
    user = environment(cache, HOME=str(tmp_path))
    smaller = ["train.steps=3", "evaluate.max_rows=4", "data.max_length=128"]
    assert len(commands()) >= 7
    for command in commands():
        words = [sys.executable, "-m", "peft_dist", *shlex.split(command)[1:]]
        if words[3] == "submit":
            words += smaller
        if words[3] == "resume":  # what was cancelled may have ended just before
            cluster.wait_until(lambda: not cluster.run(["squeue", "-h"]).stdout, "an empty queue")
        done = cluster.run(words, environment=user, cwd=tmp_path, check=False, timeout_s=150)
        finished = words[3] == "resume" and "has finished" in done.stderr
        assert done.returncode == 0 or finished, (command, done.stdout, done.stderr)
        if words[3] == "cluster":
            file = tmp_path / "mycluster.yaml"
            kept = [
                line
                for line in file.read_text(encoding="utf-8").splitlines()
                if not line.startswith(tuple(re.findall(r"^\w+:", CHANGES, re.MULTILINE)))
            ]
            file.write_text("\n".join([*kept, f"shared: [{tmp_path}]", CHANGES]), encoding="utf-8")
        if words[3] == "submit" and "--array" not in words and "--dry-run" not in words:
            cluster.wait_until(lambda: bool(list(logs.glob("*/node*.log"))), "logs", timeout_s=60)
    results = [tmp_path / f"runs/sweep/{index:03d}/result.json" for index in range(2)]
    cluster.wait_until(lambda: all(path.exists() for path in results), "results", timeout_s=180)
