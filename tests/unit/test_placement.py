"""Processes on several nodes that are alike: how many, and who shards with whom."""

from typing import Any

import pytest

from peft_dist.common.errors import LaunchError
from peft_dist.config import Recipe
from peft_dist.launch.placement import Machine, plan_processes

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
