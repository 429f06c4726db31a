"""Decide how many processes run on one or more machines, under which strategy.

Counts devices without torch: a launcher must not wake the GPU driver in its own process. Starts
nothing.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from peft_dist.common.errors import LaunchError
from peft_dist.common.gpus import DEVICES, visible_gpus
from peft_dist.config import Recipe

Strategy: TypeAlias = Literal["ddp", "fsdp", "hsdp", "zero2", "zero3"]


@dataclass(frozen=True)
class Machine:
    """What one node has to offer to this user."""

    gpus: int
    cores: int


@dataclass(frozen=True)
class Placement:
    """Processes on one node, or as many on each of several."""

    strategy: Strategy
    processes: int
    """Processes in all."""
    shard_size: int
    """Processes that hold one copy of the base together; 1 under ddp and zero2."""
    machine: Machine
    """One node."""
    nodes: int = 1

    @property
    def replicas(self) -> int:
        """Copies of the base over all processes."""
        return self.processes // self.shard_size

    @property
    def processes_per_node(self) -> int:
        """Processes on each node."""
        return self.processes // self.nodes

    @property
    def on_gpu(self) -> bool:
        """Whether every process has a GPU of its own."""
        return self.machine.gpus > 0

    @property
    def threads_per_process(self) -> int:
        """CPU threads that one process may use without taking another's core."""
        return max(1, self.machine.cores // self.processes_per_node)


def this_machine(environ: Mapping[str, str] = os.environ, device_folder: Path = DEVICES) -> Machine:
    """Count the NVIDIA GPUs that CUDA would show, and the cores this process may use."""
    return Machine(gpus=visible_gpus(environ, device_folder), cores=_cores())


def plan_processes(
    recipe: Recipe, machine: Machine, nodes: int = 1, *, per_node: int = 0
) -> Placement:
    """Place a recipe's processes on machines that are alike.

    Args:
        recipe: What to train.
        machine: One of them.
        nodes: How many there are.
        per_node: Processes on each where the recipe does not say how many in all; by default one
            per GPU, else one.

    Raises:
        LaunchError: For processes that nodes or shards do not divide, or that have no GPU.
    """
    parallel = recipe.parallel
    processes = parallel.processes or nodes * (per_node or max(machine.gpus, 1))
    if processes % nodes:
        raise LaunchError(
            f"{processes} processes cannot be shared out evenly over {nodes} nodes",
            where="parallel.processes",
            remedy=f"set it to a multiple of {nodes}",
        )
    on_one = processes // nodes
    strategy: Strategy = "fsdp" if parallel.strategy == "auto" else parallel.strategy
    if 0 < machine.gpus < on_one:
        where = "visible GPUs" if nodes == 1 else "GPUs of a node"
        raise LaunchError(
            f"{on_one} processes on {machine.gpus} {where}",
            where="parallel.processes",
            remedy=f"set --nproc {machine.gpus}, or CUDA_VISIBLE_DEVICES= to train on the CPU"
            if nodes == 1
            else f"set it to {machine.gpus * nodes}, or take more nodes",
        )
    if parallel.shard_size is not None and strategy != "hsdp":
        raise LaunchError(
            f"has no meaning here: the strategy is {strategy}",
            where="parallel.shard_size",
            remedy="remove it, or set parallel.strategy: hsdp",
        )
    # Between nodes of an hsdp run only adapter gradients travel.
    shard_size = parallel.shard_size or on_one if strategy == "hsdp" else processes
    if strategy in ("ddp", "zero2"):
        shard_size = 1
    if processes % shard_size:
        raise LaunchError(
            f"{shard_size} does not divide {processes} processes",
            where="parallel.shard_size",
            remedy=f"set it to a divisor of {processes}",
        )
    return Placement(strategy, processes, shard_size, machine, nodes)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # inside a SLURM job or a container: its share only
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
