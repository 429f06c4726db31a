"""What GPUs and links can do: data sheets, and what is assumed of them.

Every assumption is a named number here, and `peft-dist plan` prints those that it used.
"""

import re
from dataclasses import dataclass, replace
from typing import Self

from peft_dist.common.errors import PeftDistError, nearest
from peft_dist.config.cluster import Cluster
from peft_dist.metrics.mfu import peak_flops

GIB = 1 << 30


@dataclass(frozen=True)
class GpuKind:
    """One kind of GPU."""

    name: str
    """As its driver calls it."""
    memory_gib: float
    """What the driver has to give away."""
    memory_gb_s: float
    """Bandwidth of its memory."""
    inside_gb_s: float
    """What a GPU is assumed to receive from the others of its node, in a collective."""
    bfloat16: bool = True
    """Whether it computes in bfloat16."""
    measured_flops: float | None = None
    """What `flops` is, for a device that no table has."""

    @property
    def flops(self) -> float:
        """Dense bfloat16 operations per second at most."""
        peak = self.measured_flops or peak_flops(self.name)
        assert peak is not None, self.name
        return peak


GPUS = {
    "h100-80gb": GpuKind("NVIDIA H100 80GB HBM3", 79.1, 3350, 330),
    "h100-pcie-80gb": GpuKind("NVIDIA H100 PCIe", 79.1, 2000, 25),
    "h200-141gb": GpuKind("NVIDIA H200", 139.8, 4800, 330),
    "b200-180gb": GpuKind("NVIDIA B200", 178.3, 7700, 660),
    "a100-80gb": GpuKind("NVIDIA A100-SXM4-80GB", 79.1, 2040, 220),
    "a100-40gb": GpuKind("NVIDIA A100-SXM4-40GB", 39.4, 1555, 220),
    "l40s-48gb": GpuKind("NVIDIA L40S", 44.4, 864, 20),
    "a40-48gb": GpuKind("NVIDIA A40", 44.4, 696, 20),
    "a10-24gb": GpuKind("NVIDIA A10", 22.1, 600, 20),
    "l4-24gb": GpuKind("NVIDIA L4", 22.0, 300, 20),
    "rtx-4090-24gb": GpuKind("NVIDIA GeForce RTX 4090", 23.5, 1008, 20),
    "v100-32gb": GpuKind("Tesla V100-SXM2-32GB", 31.7, 900, 120, bfloat16=False),
}
"""By the name that `--gpu` and a cluster file's `gpu` take. Memory and bandwidth are those of data
sheets and drivers; links are about three quarters of what NVLink has, and what PCIe gives."""


@dataclass(frozen=True)
class Assumed:
    """What no config says; a calculation is as good as these are."""

    gemm_efficiency: float = 0.65
    """Share of the peak that large matrix products reach."""
    attention_efficiency: float = 0.40
    """Share of it that attention reaches."""
    memory_efficiency: float = 0.85
    """Share of the memory's bandwidth that other kernels reach."""
    passes_over_kept: float = 15.0
    """How often all that forward keeps is read or written by kernels other than products."""
    between_gb_s: float = 45.0
    """What a node receives from others, per GPU of it; a cluster file's `links` knows."""
    hop_inside_us: float = 3.4
    """From a GPU of a ring to the next one of its node, by NVLink: what NCCL itself reckons with
    (NVIDIA/nccl, `hwLatencies` of ring and Simple in src/graph/tuning.cc; 5.7 over PCIe)."""
    hop_between_us: float = 14.0
    """To the first one of the next node (the same)."""
    host_gb_s: float = 25.0
    """What a GPU receives from its host's memory, where the base waits there."""
    disk_gb_s: float = 2.0
    """What a node reads from the file system of the model."""
    quantize_gb_s: float = 20.0
    """Bytes of released weights that a GPU quantizes per second."""
    context_gib: float = 0.8
    """CUDA's own memory, and cuBLAS's workspace."""
    nccl_gib: float = 0.7
    """Buffers of NCCL, where there are several processes."""
    host_process_gib: float = 4.0
    """Host memory of a process: Python, torch, CUDA, and tables of rows."""
    margin: float = 0.05
    """Of the allocated bytes, what the allocator holds back besides (0.01 without gathers)."""
    margin_weights: float = 5.0
    """And this many of the largest weight in full: odd sizes leave gaps."""

    def times(self, factor: float) -> Self:
        """Return the same with every efficiency multiplied, as runs have shown."""
        return replace(
            self,
            gemm_efficiency=self.gemm_efficiency * factor,
            attention_efficiency=self.attention_efficiency * factor,
            memory_efficiency=self.memory_efficiency * factor,
        )


@dataclass(frozen=True)
class Hardware:
    """Nodes to plan for."""

    gpu: GpuKind
    gpus_per_node: int
    inside_gb_s: float
    between_gb_s: float
    memory_per_node_gib: float | None
    assumed: Assumed


def find_gpu(name: str, *, where: str) -> GpuKind:
    """Return a kind of GPU by its key.

    Raises:
        PeftDistError: For one that is not listed.
    """
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise PeftDistError(f"no GPU {name!r}", where=where, remedy=nearest(name.lower(), GPUS))
    return gpu


def recognise_gpu(driver_name: str, memory_gib: float) -> GpuKind | None:
    """Return the GPU that a driver's words mean; None for one whose speed is not known."""
    words = _words(driver_name)
    same = [
        gpu
        for gpu in GPUS.values()
        if is_gpu(driver_name, gpu) and abs(gpu.memory_gib - memory_gib) < 0.1 * gpu.memory_gib
    ]
    return max(same, key=lambda gpu: len(_words(gpu.name) & words), default=None)


def is_gpu(driver_name: str, gpu: GpuKind) -> bool:
    """Whether a driver's words have all that a GPU's name consists of."""
    return _words(gpu.name) - _MAKERS_WORDS <= _words(driver_name)


_MAKERS_WORDS = {"NVIDIA", "TESLA", "GEFORCE", "80GB", "40GB", "HBM3"}
"""Of a name, what a driver may leave out."""


def _words(name: str) -> set[str]:
    return set(re.split(r"[\s-]+", name.upper()))


def hardware_of(cluster: Cluster | None, gpu: GpuKind, *, gpus_per_node: int | None) -> Hardware:
    """Return the nodes that a cluster file describes, or some with defaults."""
    links = None if cluster is None else cluster.links
    assumed = Assumed()
    asked = None if cluster is None else cluster.memory_per_node
    return Hardware(
        gpu=gpu,
        gpus_per_node=gpus_per_node or (cluster.gpus_per_node if cluster else 0) or 8,
        inside_gb_s=(links and links.inside_gb_s) or gpu.inside_gb_s,
        between_gb_s=(links and links.between_gb_s) or assumed.between_gb_s,
        memory_per_node_gib=_gib(asked),
        assumed=assumed,
    )


def _gib(memory: str | None) -> float | None:
    """Return what Slurm's `--mem` asks for; None for all of a node, or nothing."""
    if memory is None or memory == "0":
        return None
    factors = {"K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2.0**10}
    number, unit = (memory[:-1], memory[-1]) if memory[-1] in factors else (memory, "M")
    return float(number) * factors[unit]
