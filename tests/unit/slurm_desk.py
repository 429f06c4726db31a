"""A login node to submit from: a recipe, a cluster file, and a Slurm that takes all it gets."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from peft_dist.cli.main import main
from peft_dist.config.load import render_yaml
from tests.unit.run_folders import slurm_commands

GPUS = {"gpus_per_node": 2, "cpus_per_gpu": 4, "max_nodes": 4, "max_time": "08:00:00"}
NOT_THERE = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"


class Desk:
    """The login node; Slurm's commands take notes, and answer as they are told to."""

    def __init__(self, folder: Path) -> None:
        """Write the recipe and the cluster file."""
        self.folder = folder
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
        (folder / "train.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
        self.recipe = folder / "mine.yaml"
        self.recipe.write_text("model: {name: ./model}\ndata: {train: train.jsonl}\n")
        self.run = folder / "runs" / "mine"
        self.slurm = folder / "slurm"
        self.answer(sbatch="case $* in *--parsable*) echo 4711 ;; esac")
        self.cluster({})

    def cluster(self, values: Mapping[str, Any], name: str = "cluster.yaml") -> None:
        """Write the cluster file; our folder counts as shared."""
        settings = {"shared": [str(self.folder)], **GPUS, **values}
        (self.folder / name).write_text(render_yaml(settings), encoding="utf-8")

    def answer(self, **commands: str) -> None:
        """Let commands of Slurm answer otherwise."""
        slurm_commands(self.slurm, **commands)

    def job_is(self, state: str, job: str = "4711") -> None:
        """Let Slurm say how a job is; of no other it knows anything."""
        known = f"{job}|{job.partition('_')[0]}|{state}|node1|2026-11-24T08:28:56|None"
        self.answer(squeue=f"echo '{known}'", sacct="", scontrol=NOT_THERE)

    def submit(self, *words: str) -> int:
        """Call `peft-dist submit`."""
        cluster = str(self.folder / "cluster.yaml")
        return main(["submit", str(self.recipe), "--cluster", cluster, *words])

    def secrets(self, text: str = "WANDB_API_KEY=x\n", *, mode: int = 0o600) -> None:
        """Write a secrets file, and name it in the cluster file."""
        file = self.folder / "secrets"
        file.write_text(text)
        file.chmod(mode)
        self.cluster({"secrets_file": str(file)})

    def calls(self, command: str = "sbatch") -> list[list[str]]:
        """Return how a command of Slurm was called."""
        file = self.slurm / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        return [words[1:] for line in lines if (words := shlex.split(line))[0] == command]

    def made(self) -> list[str]:
        """Return what there is besides what the tests made."""
        ours = {"model", "train.jsonl", "mine.yaml", "slurm", "cluster.yaml", "secrets"}
        return sorted(path.name for path in self.folder.iterdir() if path.name not in ours)


Capture = pytest.CaptureFixture[str]


def told(capsys: Capture) -> str:
    """Return the one line of a complaint, without what begins every one."""
    text = capsys.readouterr().err
    assert len(text.splitlines()) == 1, text
    return text.removeprefix("peft-dist: error: ").rstrip("\n")
