"""How much memory this process has needed so far."""

import json
import resource
import sys
from pathlib import Path

import torch

ALLOCATIONS = 100_000
"""The newest that are remembered."""


def peak_rss_bytes() -> int:
    """Return the most host memory this process has held at once."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def peak_device_bytes(device: torch.device) -> int:
    """Return the most memory tensors have held on a GPU at once; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak on the device that computes: its own memory, or the host's on a CPU."""
    return peak_device_bytes(device) or peak_rss_bytes()


def record_allocations() -> None:
    """Let torch remember where in Python each tensor on a GPU was made; costs the host time."""
    torch.cuda.memory._record_memory_history(stacks="python", max_entries=ALLOCATIONS)


def write_snapshot(device: torch.device, path: Path) -> None:
    """Write every segment and block of a GPU's memory as JSON.

    With what `record_allocations` has recorded. See torch's `torch.cuda.memory._snapshot`.

    Raises:
        OSError: For a disk that is full.
    """
    snapshot = torch.cuda.memory._snapshot(device)
    snapshot["stats"] = torch.cuda.memory_stats(device)
    with path.open("w", encoding="utf-8") as file:
        json.dump(snapshot, file, default=str)
