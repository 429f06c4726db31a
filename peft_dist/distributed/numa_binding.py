"""Bind this process to CPUs near its GPU: `numa_binding` of a cluster file, under torchrun.

torch has the same as `torchrun --numa-binding`, but `accelerate launch` has no way to pass it on,
and torch wants `numactl` on every node for it.
"""

import logging
import os
from pathlib import Path
from typing import Any

import torch

from peft_dist.common.env import NUMA_BINDING

log = logging.getLogger(__name__)

SYS = Path("/sys")
"""What the kernel says of CPUs and devices."""


def bind(local_rank: int, local_size: int, device: torch.device) -> None:
    """Bind this process as the environment asks; threads and memory that it takes later follow.

    A process that cannot be bound runs on, unbound, and says so: it is only slower.

    Args:
        local_rank: Its place among those of the node.
        local_size: How many they are.
        device: What it computes on; rank n of a node has GPU n.
    """
    mode = os.environ.get(NUMA_BINDING)
    if mode is None:
        return
    try:
        allowed = cpus_by_numa_node(os.sched_getaffinity(0))
        if device.type == "cuda":
            homes = [_numa_node_of_gpu(index) for index in range(local_size)]
        else:
            nodes = sorted(allowed)
            homes = [nodes[rank * len(nodes) // local_size] for rank in range(local_size)]
        cpus = allowed.get(homes[local_rank], set())
        if mode == "exclusive":
            cpus = share(cpus, homes, local_rank)
    except (OSError, ValueError) as error:
        log.warning("numa_binding: not bound, as the CPUs cannot be told apart: %s", error)
        return
    if not cpus:
        log.warning(
            "numa_binding: not bound: this job has too few CPUs on NUMA node %d, which is near; "
            "ask for whole nodes, or more cpus_per_gpu",
            homes[local_rank],
        )
        return
    os.sched_setaffinity(0, cpus)
    log.info("bound to CPUs %s of NUMA node %d", ranges(cpus), homes[local_rank])


def cpus_by_numa_node(allowed: set[int], sys: Path = SYS) -> dict[int, set[int]]:
    """Return those of some CPUs that each NUMA node has; nodes that have none are left out.

    Raises:
        OSError: Where the kernel does not say.
    """
    found = {
        int(folder.name.removeprefix("node")): allowed & _numbers(folder / "cpulist")
        for folder in (sys / "devices/system/node").glob("node[0-9]*")
    }
    # A kernel without NUMA has one node, and says nothing of it.
    return {node: cpus for node, cpus in found.items() if cpus} or {0: allowed}


def share(cpus: set[int], homes: list[int], local_rank: int, sys: Path = SYS) -> set[int]:
    """Return the CPUs that are one process's own among all of the same NUMA node: whole cores.

    As in torch, the first processes get one more where the cores cannot be shared out evenly.

    Args:
        cpus: Those of the NUMA node.
        homes: The NUMA node of every process.
        local_rank: Which of them.
        sys: Where the kernel tells which CPUs are one core.

    Raises:
        OSError: Where the kernel does not say.
    """
    cores: dict[int, set[int]] = {}
    for cpu in sorted(cpus):
        siblings = sys / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        cores.setdefault(min(_numbers(siblings)), set()).add(cpu)
    neighbours = [rank for rank, home in enumerate(homes) if home == homes[local_rank]]
    place, count = neighbours.index(local_rank), len(neighbours)
    each, more = divmod(len(cores), count)
    begin = place * each + min(place, more)
    own = (
        [cores[core] for core in sorted(cores)][begin : begin + each + (place < more)]
        if each
        else []
    )
    return set().union(*own)


def ranges(numbers: set[int]) -> str:
    """Return numbers as the kernel writes them: 0-3,8."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def _numbers(file: Path) -> set[int]:
    """Return the numbers in a file of the kernel's: 0-3,8."""
    found: set[int] = set()
    for part in file.read_text(encoding="ascii").strip().split(","):
        first, _, last = part.partition("-")
        if first:
            found.update(range(int(first), int(last or first) + 1))
    return found


def _numa_node_of_gpu(index: int) -> int:
    gpu: Any = torch.cuda.get_device_properties(index)  # its stub leaves the address out
    address = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    text = (SYS / "bus/pci/devices" / address / "numa_node").read_text(encoding="ascii")
    return max(int(text), 0)  # -1: a machine with one NUMA node
