"""Processes on several nodes that are alike: how many, and who shards with whom."""

from pathlib import Path
from typing import Any

import pytest

from peft_dist.common.errors import LaunchError
from peft_dist.config import Recipe
from peft_dist.launch.placement import Machine, plan_processes, this_machine
from peft_dist.slurm.own_gpu import own_gpu

CPU = Machine(gpus=0, cores=8)
FOUR_GPUS = Machine(gpus=4, cores=64)


def recipe(**parallel: Any) -> Recipe:
    return Recipe.model_validate(
        {"model": {"name": "m"}, "data": {"train": "d"}, "parallel": parallel}
    )


def test_every_gpu_of_every_node_gets_a_process() -> None:
    placement = plan_processes(recipe(), FOUR_GPUS, 3)
    assert (placement.nodes, placement.processes, placement.processes_per_node) == (3, 12, 4)
    assert placement.threads_per_process == 16


def test_a_node_without_gpus_gets_as_many_processes_as_asked_for() -> None:
    assert plan_processes(recipe(), CPU, 3).processes == 3
    assert plan_processes(recipe(), CPU, 3, per_node=2).processes == 6


def test_what_the_recipe_says_of_all_processes_goes_before_what_a_node_would_get() -> None:
    placement = plan_processes(recipe(processes=4), CPU, 2, per_node=8)
    assert (placement.processes, placement.processes_per_node) == (4, 2)


@pytest.mark.parametrize(
    ("strategy", "shard_size", "replicas"),
    [("fsdp", 12, 1), ("auto", 12, 1), ("zero3", 12, 1), ("hsdp", 4, 3), ("ddp", 1, 12),
     ("zero2", 1, 12)],
)  # fmt: skip
def test_only_hsdp_keeps_its_shards_inside_a_node(
    strategy: str, shard_size: int, replicas: int
) -> None:
    placement = plan_processes(recipe(strategy=strategy), FOUR_GPUS, 3)
    assert (placement.shard_size, placement.replicas) == (shard_size, replicas)


@pytest.mark.parametrize(("asked", "replicas"), [(2, 4), (4, 2), (8, 1)])
def test_shards_may_be_smaller_or_larger_than_a_node(asked: int, replicas: int) -> None:
    placement = plan_processes(recipe(strategy="hsdp", shard_size=asked), FOUR_GPUS, 2)
    assert (placement.shard_size, placement.replicas) == (asked, replicas)


@pytest.mark.parametrize(
    ("parallel", "told"),
    [
        ({"processes": 3}, "3 processes cannot be shared out evenly over 2 nodes"),
        ({"processes": 16}, "8 processes on 4 GPUs of a node; set it to 8, or take more nodes"),
        ({"strategy": "hsdp", "shard_size": 3}, "3 does not divide 8 processes"),
    ],
)
def test_what_nodes_or_shards_do_not_divide_is_refused(parallel: dict[str, Any], told: str) -> None:
    with pytest.raises(LaunchError, match=told):
        plan_processes(recipe(**parallel), FOUR_GPUS, 2)


def test_a_shard_size_is_refused_where_auto_becomes_a_strategy_without_groups() -> None:
    with pytest.raises(LaunchError, match=r"parallel\.shard_size: has no meaning here: .* fsdp"):
        plan_processes(recipe(shard_size=2), FOUR_GPUS)


@pytest.mark.parametrize(
    ("environ", "gpus"),
    [
        ({}, 2),
        ({"ROCR_VISIBLE_DEVICES": "1"}, 1),
        ({"HIP_VISIBLE_DEVICES": "0"}, 1),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"HIP_VISIBLE_DEVICES": "0,1", "CUDA_VISIBLE_DEVICES": ""}, 2),
        ({"ROCR_VISIBLE_DEVICES": "0", "HIP_VISIBLE_DEVICES": "1"}, 0),
    ],
)
def test_gpus_of_amd_count_as_those_of_nvidia(
    tmp_path: Path, environ: dict[str, str], gpus: int
) -> None:
    devices, topology = tmp_path / "dev", tmp_path / "nodes"
    (devices / "dri").mkdir(parents=True)
    for node, (gpu, minor) in enumerate([(0, 0), (4711, 128), (4712, 129), (4713, 130)]):
        (topology / str(node)).mkdir(parents=True)
        (topology / str(node) / "gpu_id").write_text(f"{gpu}\n")
        (topology / str(node) / "properties").write_text(f"cpu_cores 0\ndrm_render_minor {minor}\n")
    for minor in (128, 129):  # the third GPU is not this container's
        (devices / "dri" / f"renderD{minor}").touch()
    assert this_machine(environ, devices, topology).gpus == gpus


@pytest.mark.parametrize(
    ("environ", "own"),
    [
        ({"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, {"CUDA_VISIBLE_DEVICES": "6"}),
        ({"ROCR_VISIBLE_DEVICES": "0,1,2,3"}, {"ROCR_VISIBLE_DEVICES": "2"}),
        ({"CUDA_VISIBLE_DEVICES": "5"}, {}),  # Slurm has bound it
        ({"CUDA_VISIBLE_DEVICES": ""}, {}),
        ({}, {"CUDA_VISIBLE_DEVICES": "2"}),
    ],
)
def test_a_task_takes_the_gpu_of_its_place(environ: dict[str, str], own: dict[str, str]) -> None:
    assert own_gpu({"SLURM_LOCALID": "2", **environ}) == own
