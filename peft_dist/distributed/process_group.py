"""Start and stop the process group."""

import torch.distributed as torch_dist

from peft_dist.distributed.rendezvous import COLLECTIVE_TIMEOUT, meet
from peft_dist.distributed.world import World


def start(world: World, store: torch_dist.Store | None = None) -> None:
    """Start the process group, of one process too, so that every engine has its collectives.

    On return every rank is connected to every other. Gloo alone returns when a rank's own sockets
    are open: one that ended right after would break the connections its peers still make.

    Args:
        world: Rank and size of this process's world.
        store: What `meet` returned. Default: meet now.
    """
    if torch_dist.is_initialized():
        return
    on_gpu = world.device.type == "cuda"
    torch_dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=meet(world) if store is None else store,
        rank=world.rank,
        world_size=world.size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=world.device if on_gpu else None,
    )
    if not on_gpu:
        torch_dist.barrier()


def stop() -> None:
    """End the process group."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()
