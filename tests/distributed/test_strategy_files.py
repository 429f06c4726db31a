"""Each strategy file, through the real launcher: the processes it starts and what it tells them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peft_dist import resources
from peft_dist.config import Recipe
from peft_dist.launch.command import launch_environment, worker_command
from peft_dist.launch.placement import Machine, place

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# Stands where launch/train.py does: the workers meet in a gloo group and write what they see.
WORKER = """
import json, os, sys
import torch.distributed as dist
dist.init_process_group("gloo")
facts = dict(os.environ) | {"GROUP_SIZE": str(dist.get_world_size())}
with open(os.path.join(sys.argv[1], f"{dist.get_rank()}.json"), "w") as file:
    json.dump(facts, file)
dist.destroy_process_group()
"""
MESH = ("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "PARALLELISM_CONFIG_DP_SHARD_SIZE")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder like a checkout, whose worker writes down its environment."""
    strategies = tmp_path / "root" / "launch" / "strategies"
    strategies.mkdir(parents=True)
    for file in (resources.root() / "launch" / "strategies").glob("*.yaml"):
        (strategies / file.name).write_bytes(file.read_bytes())
    (tmp_path / "root" / "launch" / "train.py").write_text(WORKER, encoding="utf-8")
    return tmp_path / "root"


def launched(command: list[str], folder: Path, extra: dict[str, str]) -> list[dict[str, str]]:
    """Run a launcher and return the environments its workers saw, in rank order."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_", "OMP_"))
    }
    environment = {**kept, "CUDA_VISIBLE_DEVICES": "", **extra}
    subprocess.run(command, env=environment, check=True, timeout=120)
    files = sorted(folder.glob("*.json"), key=lambda path: int(path.stem))
    return [json.loads(path.read_text(encoding="utf-8")) for path in files]


@pytest.mark.parametrize(("strategy", "processes"), [("ddp", 2), ("fsdp", 2), ("hsdp", 4)])
def test_a_bare_accelerate_launch_starts_the_processes(
    root: Path, tmp_path: Path, strategy: str, processes: int
) -> None:
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
               str(root / "launch" / "strategies" / f"{strategy}.yaml"),
               str(root / "launch" / "train.py"), str(tmp_path / "out")]  # fmt: skip
    seen = launched(command, tmp_path / "out", {})
    assert [facts["GROUP_SIZE"] for facts in seen] == [str(processes)] * processes
    check_exports(seen[0], strategy, mesh=("2", "2"))


@pytest.mark.parametrize(
    ("strategy", "processes", "shard_size", "mesh"),
    [
        ("ddp", 1, None, None),
        ("fsdp", 1, None, None),
        ("hsdp", 1, None, ("1", "1")),
        ("ddp", 3, None, None),
        ("fsdp", 3, None, None),
        ("hsdp", 2, 1, ("2", "1")),
    ],
)
def test_our_command_starts_any_number_of_processes(
    root: Path,
    tmp_path: Path,
    strategy: str,
    processes: int,
    shard_size: int | None,
    mesh: tuple[str, str] | None,
) -> None:
    (tmp_path / "out").mkdir()
    parallel = {"strategy": strategy, "processes": processes, "shard_size": shard_size}
    recipe = Recipe.model_validate(
        {"model": {"name": "m"}, "data": {"train": "d"}, "parallel": parallel}
    )
    placement = place(recipe, Machine(gpus=0, cores=6))
    command = worker_command(placement, "train.py", [str(tmp_path / "out")], root=root)
    seen = launched(command, tmp_path / "out", launch_environment(placement, {}))
    assert [facts["GROUP_SIZE"] for facts in seen] == [str(processes)] * processes
    assert seen[0]["OMP_NUM_THREADS"] == str(6 // processes)
    assert seen[0]["ACCELERATE_USE_CPU"] == "true"
    check_exports(seen[0], strategy, mesh=mesh)


def check_exports(facts: dict[str, str], strategy: str, *, mesh: tuple[str, str] | None) -> None:
    """Check what a worker can tell the strategy by."""
    sharded = strategy in ("fsdp", "hsdp")
    assert facts.get("ACCELERATE_USE_FSDP") == ("true" if sharded else None)
    assert facts.get("FSDP_VERSION") == ("2" if sharded else None)
    # Else transformers would leave the weights of ranks above 0 unread.
    assert facts.get("FSDP_CPU_RAM_EFFICIENT_LOADING") == ("false" if sharded else None)
    assert facts["ACCELERATE_MIXED_PRECISION"] == "no"
    assert facts.get("ACCELERATE_USE_PARALLELISM_CONFIG") == (
        "true" if strategy == "hsdp" else None
    )
    expected = mesh if strategy == "hsdp" else None
    assert tuple(facts[name] for name in MESH if name in facts) == (expected or ())
