"""What torch is told once about the device that a process computes on."""

import os
from collections.abc import MutableMapping

import torch

DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what torch demands of cuBLAS
    "FLASH_ATTENTION_DETERMINISTIC": "1",  # read by transformers
    "NCCL_ALGO": "Ring",  # others are chosen by size and place, and sum in another order
}
"""Environment variables without which sums may come in another order; set before CUDA is used."""


def export_determinism(environ: MutableMapping[str, str] = os.environ) -> None:
    """Export what libraries read where sums must come in the same order every time."""
    for name, value in DETERMINISTIC.items():
        environ.setdefault(name, value)


def set_up_device(device: torch.device, *, deterministic: bool) -> None:
    """Choose among the kernels that torch has for a GPU; a CPU has one of each.

    Args:
        device: What this process computes on.
        deterministic: Whether the same inputs must give the same bits.
    """
    if device.type != "cuda":
        return
    # cuDNN builds a plan for each shape of a row, which takes longer than the attention itself,
    # and torch prefers it on Hopper and Blackwell: https://github.com/modelscope/FunASR/issues/3704
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        export_determinism()
        # Memory is filled by what is computed; filling it before costs a kernel each time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
