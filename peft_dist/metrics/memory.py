"""How much memory this process has needed so far."""

import resource
import sys

import torch


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
