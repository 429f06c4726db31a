"""Which of the processes this one is, and the device it computes on.

Reads the environment that torchrun and Accelerate export.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from peft_dist.common.errors import LaunchError
from peft_dist.common.gpus import DEVICES, visible_gpus
from peft_dist.distributed import numa_binding


@dataclass(frozen=True)
class World:
    """Where this process stands among all of them."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes files and talks."""
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """Return the name of the GPU, or `cpu`."""
        on_gpu = self.device.type == "cuda"
        return str(torch.cuda.get_device_name(self.device)) if on_gpu else "cpu"

    def gpu_uuids(self) -> list[str]:
        """Return what tells the GPUs that this process sees from all others; none on a CPU.

        As the driver and CUDA_VISIBLE_DEVICES have it, `GPU-...`, or `MIG-...` for a part of one.
        """
        count = torch.cuda.device_count() if self.device.type == "cuda" else 0
        found = [torch.cuda.get_device_properties(index) for index in range(count)]
        return [f"{'MIG' if ' MIG ' in one.name else 'GPU'}-{one.uuid}" for one in found]


def env_int(name: str, default: int) -> int:
    """Return a number of the environment.

    Raises:
        LaunchError: For a text that is no number.
    """
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise LaunchError(
            f"{text!r} is not a number", where=f"environment {name}", remedy="start with a launcher"
        ) from None


def read_world(device_folder: Path = DEVICES) -> World:
    """Read rank and world size from the environment; one process without a launcher is a world.

    Where the environment asks for it, this process is bound to the CPUs of its place.

    Args:
        device_folder: Where the driver puts a file for each GPU.

    Raises:
        LaunchError: For numbers that contradict each other, more processes than GPUs, or GPUs that
            torch does not see.
    """
    rank, size = env_int("RANK", 0), env_int("WORLD_SIZE", 1)
    local_rank = env_int("LOCAL_RANK", 0)
    local_size = env_int("LOCAL_WORLD_SIZE", size)
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise LaunchError(
            f"RANK={rank} WORLD_SIZE={size} LOCAL_RANK={local_rank} LOCAL_WORLD_SIZE={local_size} "
            "contradict each other",
            where="environment",
            remedy="start with accelerate launch, torchrun or peft-dist train",
        )
    wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if wants_cpu or not torch.cuda.is_available():
        if not wants_cpu and (present := visible_gpus(os.environ, device_folder)):
            cuda, hip = torch.version.cuda, torch.version.hip
            build = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else None
            raise LaunchError(
                f"{present} GPUs are here, and torch {torch.__version__} sees none"
                + ("" if build is None else f"; it is built for {build}"),
                where="torch",
                remedy="install a build for CUDA or ROCm"
                if build is None
                else "update the driver, or set CUDA_VISIBLE_DEVICES= to compute on the CPU",
            )
        numa_binding.bind(local_rank, local_size, torch.device("cpu"))
        return World(rank, size, local_rank, local_size, torch.device("cpu"))
    if local_rank >= torch.cuda.device_count():
        raise _no_gpu_for(local_rank)
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    numa_binding.bind(local_rank, local_size, device)
    return World(rank, size, local_rank, local_size, device)


def _no_gpu_for(local_rank: int) -> LaunchError:
    """Return what to say to a process that is one too many."""
    here = torch.cuda.device_count()
    # Of several instances of MIG, CUDA shows a process the first one, and NCCL connects none.
    sliced = any("MIG" in torch.cuda.get_device_name(index) for index in range(here))
    return LaunchError(
        f"LOCAL_RANK {local_rank} has no GPU of its own ({here} here"
        + (", an instance of MIG, of which a process sees one)" if sliced else ")"),
        where="environment",
        remedy="start one process for each instance, with CUDA_VISIBLE_DEVICES naming it, as a run "
        "of its own"
        if sliced
        else "start one process per GPU",
    )
