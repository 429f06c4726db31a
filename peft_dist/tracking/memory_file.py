"""Say what holds the memory of GPUs: other processes at the start, tensors when it is used up."""

import logging
import os
from contextlib import suppress
from pathlib import Path

import torch

from peft_dist.common.sizes import megabytes
from peft_dist.distributed.collectives import gather_objects
from peft_dist.distributed.world import World
from peft_dist.metrics.memory import record_allocations, write_snapshot
from peft_dist.run.history import crash_notes
from peft_dist.run.restart_policy import Kind
from peft_dist.worker.process import WorkerContext

log = logging.getLogger(__name__)

OWN_BYTES = 2 << 30
"""What CUDA and NCCL may hold for this process before it has a tensor."""


def warn_of_other_processes(world: World) -> None:
    """Warn of each GPU whose memory other processes hold a part of. Collective.

    Such a run is out of memory where it need not be, and lowering its settings is no remedy.
    """
    if world.device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(world.device)
    everyone = gather_objects([os.uname().nodename, world.local_rank, free, total])
    for rank, (host, index, free, total) in enumerate(everyone):
        if world.is_main and total - free > OWN_BYTES:
            log.warning(
                "GPU %d of %s (rank %d) has %s of %s free: other processes hold the rest",
                index,
                host,
                rank,
                megabytes(free),
                megabytes(total),
            )


def watch_memory(context: WorkerContext, device: torch.device, *, folder: Path) -> None:
    """Let a process that runs out of memory write what holds it; without a GPU, do nothing.

    Where the attempt before ran out of memory, this one records where each tensor is made, so that
    the file says so if it happens again; that costs time in every step.

    Args:
        context: This process, which has its run.
        device: What it computes on.
        folder: Where the file goes.
    """
    if device.type != "cuda":
        return
    assert context.run_dir is not None
    notes = crash_notes(context.run_dir.attempts, context.attempt_number - 1)
    if any(note["kind"] == Kind.OUT_OF_MEMORY for note in notes):
        record_allocations()
    file = folder / f"memory-a{context.attempt_number}-rank-{context.rank}.json"

    def write() -> Path:
        if not file.exists():
            write_snapshot(device, file)
        return file

    def on_refusal(*_: int) -> None:
        with suppress(OSError):  # a full disk
            write()

    # When torch's allocator refuses, before anything is freed on the error's way up; where a
    # library of CUDA was refused, only at the end.
    torch._C._cuda_attach_out_of_memory_observer(on_refusal)  # type: ignore[attr-defined]
    context.write_memory = write
