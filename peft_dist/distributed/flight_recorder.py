"""What torch's flight recorder knows of a process: the collectives that it has begun and ended."""

from collections.abc import MutableMapping
from pathlib import Path

import torch.distributed as torch_dist
from torch._C import _distributed_c10d as c10d

COLLECTIVES = "2000"
"""The newest that are remembered; torch's own default, which older versions lack."""


def export_recorder(environ: MutableMapping[str, str], folder: Path) -> None:
    """Export the recorder's settings, where the user has none; read when groups are made.

    Args:
        environ: This process's environment.
        folder: Where torch itself leaves a dump when a collective of NCCL times out, for its
            `torchfrtrace`; a prefix before the rank.
    """
    environ.setdefault("TORCH_FR_BUFFER_SIZE", COLLECTIVES)
    environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", COLLECTIVES)
    environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    environ.setdefault("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", f"{folder}/nccl-timeout-rank-")


def dump() -> bytes | None:
    """Return the record as JSON; None where this torch keeps none, or no group was made.

    Waits for no device and no other process.
    """
    if not torch_dist.is_initialized():
        return None
    # NCCL's record and that of other backends are two; a build without NCCL has the latter alone.
    of_nccl = torch_dist.get_backend() == "nccl"
    name = "_dump_nccl_trace_json" if of_nccl else "_dump_fr_trace_json"
    write = getattr(c10d, name, None)
    return None if write is None else bytes(write())
