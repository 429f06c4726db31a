"""What torch's flight recorder knows of a process: the collectives that it has begun and ended."""

from collections.abc import MutableMapping

import torch.distributed as torch_dist
from torch._C import _distributed_c10d as c10d

COLLECTIVES = "2000"
"""The newest that are remembered; torch's own default, which older versions lack."""


def export_recorder(environ: MutableMapping[str, str]) -> None:
    """Export the recorder's size, where the user has set none; read when groups are made."""
    environ.setdefault("TORCH_FR_BUFFER_SIZE", COLLECTIVES)


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
