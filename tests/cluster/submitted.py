"""Runs that are submitted to the cluster, as a person would: by `peft-dist`, watched by its files.

    run = runs.submit("some", nodes=2)
    run.wait_for_step(30)
    cluster.run(["scancel", "--signal=USR1", run.job])
    run.wait_for_end()
    assert_same_run(run.path, reference)

What is trained is the tiny project of the fault tests, in steps of 50 ms or more, so that there is
time to strike.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft_dist.config.load import render_yaml
from tests import processes
from tests.cluster.slurm import SlurmCluster
from tests.faults import oracles
from tests.faults.project import Project

SLOW = ("train.steps=100", "train.global_batch_size=32", "train.micro_batch_size=1",
        "method.dropout=0")  # fmt: skip
"""Sixteen passes for each of two processes: a step takes 50 ms and more."""


class Runs:
    """Submits runs of one project to one cluster."""

    def __init__(self, cluster: SlurmCluster, project: Project, folder: Path) -> None:
        """Take the folder where runs and cluster files go."""
        self.cluster, self.project, self.folder = cluster, project, folder
        self.environment = processes.environment(project.cache)

    def cluster_file(self, **settings: Any) -> Path:
        """Write a cluster file; `settings` replace ours."""
        values = {
            "partition": "main",
            "processes_per_node": 1,
            "cpus_per_node": 1,
            "memory_per_node": "1500M",
            "max_time": "00:30:00",
            "signal_lead_s": 20,
            "interface": "eth0",
            "shared": [str(self.folder), str(self.project.folder)],
            "environment": {"PEFT_DIST_CACHE": str(self.project.cache), "OMP_NUM_THREADS": "1"},
            "preflight": {"enabled": False},
        } | settings
        variables = values["environment"]
        if "PYTHONPATH" in variables:  # else jobs would run whatever tree is installed
            ours = f"{processes.ROOT}{os.pathsep}{variables['PYTHONPATH']}"
            values["environment"] = {**variables, "PYTHONPATH": ours}
        path = self.folder / f"cluster-{len(list(self.folder.glob('cluster-*')))}.yaml"
        path.write_text(render_yaml(values), encoding="utf-8")
        return path

    def command(
        self, *words: str, check: bool = True, timeout_s: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run `peft-dist` as on a login node."""
        return self.cluster.run(
            [sys.executable, "-m", "peft_dist", *words],
            environment=self.environment,
            cwd=self.folder,
            check=check,
            timeout_s=timeout_s,
        )

    def submit(
        self,
        name: str,
        *overrides: str,
        nodes: int = 2,
        options: Sequence[str] = (),
        **settings: Any,
    ) -> "Run":
        """Submit a run with a cluster file of its own."""
        file = self.cluster_file(**settings)
        self.command(
            "submit", str(self.project.recipe), *SLOW, *overrides, "--cluster", str(file),
            "--nodes", str(nodes), "--run-dir", name, *options,
        )  # fmt: skip
        return Run(self, self.folder / name)

    def train_here(self, name: str, *overrides: str, nproc: int = 2) -> Path:
        """Train on this machine without Slurm; return the run's folder."""
        self.command(
            "train", str(self.project.recipe), *SLOW, *overrides, "--run-dir", name,
            "--nproc", str(nproc), timeout_s=300,
        )  # fmt: skip
        return self.folder / name

    def status(self, *names: str) -> list[dict[str, Any]]:
        """Return what `peft-dist status` knows of runs."""
        return list(json.loads(self.command("status", "--json", *names).stdout))


class Run:
    """One submitted run."""

    def __init__(self, runs: Runs, path: Path) -> None:
        """Name it."""
        self.runs, self.path = runs, path

    @property
    def job(self) -> str:
        """The job that was submitted or started last."""
        jobs = [event["job"] for event in self.events("submitted", "started")]
        return str(jobs[-1])

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """Return what its jobs noted."""
        lines = (self.path / "slurm" / "jobs.jsonl").read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines]
        return [event for event in found if not kinds or event["event"] in kinds]

    @property
    def starts(self) -> int:
        """How often the batch script has started."""
        return len(self.events("started"))

    def row(self) -> dict[str, Any]:
        """Return its row of `peft-dist status`."""
        (row,) = self.runs.status(str(self.path))
        return row

    def wait_for_step(self, step: int, *, timeout_s: float = 120) -> None:
        """Wait until a step is in the ledger."""
        self.wait_until(
            lambda: oracles.last_step(self.path) >= step, f"step {step}", timeout_s=timeout_s
        )

    def wait_for_end(self, *, timeout_s: float = 240) -> None:
        """Wait until the run has trained to its end and its job is over."""
        self.wait_until((self.path / "result.json").exists, "its result", timeout_s=timeout_s)
        self.wait_until(lambda: self._job_state() == "COMPLETED", "its job", timeout_s=30)

    def wait_until(
        self, condition: Callable[[], bool], what: str, *, timeout_s: float = 120
    ) -> None:
        """Wait for something; past its time, fail with all that the run has said."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"{what} in vain:\n{self.told()}"
            time.sleep(0.1)

    def _job_state(self) -> str:
        job = self.runs.cluster.jobs().get(self.job)
        return "" if job is None else job.state

    def told(self) -> str:
        """Return the ends of all its logs and what its jobs noted."""
        logs = [*self.path.rglob("*.log"), self.path / "slurm" / "jobs.jsonl"]
        parts = []
        for log in sorted(logs):
            if log.is_file() and not log.is_symlink():
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:]
                parts.append("\n".join([f"--- {log}", *lines]))
        queue = self.runs.cluster.run(["squeue", "-r"], check=False).stdout
        return "\n".join([*parts, queue])
