"""Each strategy file, through the real launcher: the processes it starts and what it tells them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peft_dist.common import paths
from peft_dist.config import Recipe
from peft_dist.config.parallel import Parallel
from peft_dist.distributed.world import World
from peft_dist.launch.command import launch_environment, worker_command
from peft_dist.launch.placement import Machine, plan_processes
from peft_dist.sharding.launcher_env import Launched, resolve
from tests.faults.long import cases
from tests.processes import ROOT, environment, free_port, run
from tests.tiny import completion_rows, tiny_model, write_jsonl

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# Stands where launch/train.py does: the workers meet in a gloo group and write what they see.
WORKER = """
import json, os, sys
import torch.distributed as dist
from peft_dist.distributed import process_group
from peft_dist.distributed.world import read_world
process_group.start(read_world())
facts = dict(os.environ) | {"GROUP_SIZE": str(dist.get_world_size())}
with open(os.path.join(sys.argv[1], f"{dist.get_rank()}.json"), "w") as file:
    json.dump(facts, file)
dist.destroy_process_group()
"""
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is an extra"
)
CPU = torch.device("cpu")
ZERO2, ZERO3 = (pytest.param(name, 2, marks=needs_deepspeed) for name in ("zero2", "zero3"))

# As `accelerate config` writes them, less what is the same in all.
ASKED = """
compute_environment: LOCAL_MACHINE
debug: false
downcast_bf16: 'no'
enable_cpu_affinity: false
machine_rank: 0
main_process_port: 0
main_training_function: main
mixed_precision: bf16
num_machines: 1
num_processes: 2
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: false
"""
ASKED_DDP = "distributed_type: MULTI_GPU\ngpu_ids: all\n"
ASKED_FSDP = """
distributed_type: FSDP
fsdp_config:
  fsdp_activation_checkpointing: false
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: true
  fsdp_offload_params: true
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_version: 2
"""
ASKED_ZERO3 = """
distributed_type: DEEPSPEED
deepspeed_config:
  gradient_accumulation_steps: 1
  gradient_clipping: 1.0
  offload_optimizer_device: none
  offload_param_device: cpu
  zero3_init_flag: true
  zero3_save_16bit_model: false
  zero_stage: 3
"""
ASKED_FILE = """
distributed_type: DEEPSPEED
deepspeed_config:
  deepspeed_config_file: {file}
  zero3_init_flag: false
"""
MESH = ("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "PARALLELISM_CONFIG_DP_SHARD_SIZE")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder like a checkout, whose worker writes down its environment."""
    strategies = tmp_path / "root" / "launch" / "strategies"
    strategies.mkdir(parents=True)
    for file in (paths.root() / "launch" / "strategies").glob("*.yaml"):
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


@pytest.mark.parametrize(
    ("strategy", "processes"),
    [("hsdp", 4), ZERO3, ("ddp", 2), ("fsdp", 2), ZERO2][: cases(1, 5)],
)
def test_a_bare_accelerate_launch_starts_the_processes(
    root: Path, tmp_path: Path, strategy: str, processes: int
) -> None:
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
               str(root / "launch" / "strategies" / f"{strategy}.yaml"),
               "--main_process_port", str(free_port()),
               str(root / "launch" / "train.py"), str(tmp_path / "out")]  # fmt: skip
    seen = launched(command, tmp_path / "out", {})
    assert [facts["GROUP_SIZE"] for facts in seen] == [str(processes)] * processes
    check_exports(seen[0], strategy, mesh=("2", "2"))


@pytest.mark.parametrize(
    ("strategy", "processes", "shard_size", "mesh"),
    [
        ("fsdp", 3, None, None),
        ("hsdp", 2, 1, ("2", "1")),
        pytest.param("zero3", 1, None, None, marks=needs_deepspeed),
        ("hsdp", 1, None, ("1", "1")),
        ("ddp", 3, None, None),
        ("ddp", 1, None, None),
        ("fsdp", 1, None, None),
        pytest.param("zero2", 3, None, None, marks=needs_deepspeed),
    ][: cases(2, 8)],
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
    placement = plan_processes(recipe, Machine(gpus=0, cores=6))
    command = worker_command(placement, "train.py", [str(tmp_path / "out")], root=root)
    seen = launched(command, tmp_path / "out", launch_environment(placement, {}))
    assert [facts["GROUP_SIZE"] for facts in seen] == [str(processes)] * processes
    assert seen[0]["OMP_NUM_THREADS"] == str(6 // processes)
    assert seen[0]["ACCELERATE_USE_CPU"] == "true"
    expected = Launched(strategy, placement.shard_size)
    assert resolve(recipe.parallel, World(0, processes, 0, processes, CPU), seen[0]) == expected
    check_exports(seen[0], strategy, mesh=mesh)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        pytest.param(ASKED_DDP, Launched("ddp", 1), id="MULTI_GPU"),
        pytest.param(ASKED_FSDP, Launched("fsdp", 2, offload=True), id="FSDP"),
        pytest.param(
            ASKED_ZERO3, Launched("zero3", 2, offload=True), id="ZeRO-3", marks=needs_deepspeed
        ),
        pytest.param(ASKED_FILE, Launched("zero2", 1), id="a JSON file", marks=needs_deepspeed),
    ],
)
def test_a_file_that_accelerate_config_wrote_is_followed(
    root: Path, tmp_path: Path, asked: str, expected: Launched
) -> None:
    (tmp_path / "out").mkdir()
    text = ASKED + asked.format(file=paths.root() / "launch" / "strategies" / "zero2.json")
    (tmp_path / "own.yaml").write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
               str(tmp_path / "own.yaml"), str(root / "launch" / "train.py"),
               str(tmp_path / "out")]  # fmt: skip
    seen = launched(command, tmp_path / "out", {})
    assert [facts["GROUP_SIZE"] for facts in seen] == ["2", "2"]
    assert resolve(Parallel(), World(0, 2, 0, 2, CPU), seen[0]) == expected


@needs_deepspeed
def test_the_deepspeed_launcher_trains_with_its_own_json_file(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model", "llama")
    write_jsonl(tmp_path / "rows.jsonl", completion_rows(16))
    (tmp_path / "recipe.yaml").write_text(
        "model: {name: model, dtype: float32}\ndata: {train: rows.jsonl}\ntrain: {steps: 1}\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2",
               "--master_port", str(free_port()), str(ROOT / "launch" / "train.py"),
               "recipe.yaml", "--run-dir", "run",
               "--deepspeed", str(ROOT / "launch" / "strategies" / "zero3.json")]  # fmt: skip
    done = run(command, environment=environment(tmp_path / "cache"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-5000:]
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert (result["strategy"], len(result["base_bytes_per_rank"])) == ("zero3", 2)


def check_exports(facts: dict[str, str], strategy: str, *, mesh: tuple[str, str] | None) -> None:
    """Check what a worker can tell the strategy by."""
    sharded = strategy in ("fsdp", "hsdp")
    stage = strategy.removeprefix("zero") if strategy.startswith("zero") else None
    assert facts.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == stage
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
