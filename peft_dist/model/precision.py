"""The dtype that a recipe computes in on a device, and what is to be said of it."""

from contextlib import AbstractContextManager

import torch

from peft_dist.config.recipe import Model


def compute_dtype(model: Model, device: torch.device) -> tuple[torch.dtype, str]:
    """Return the dtype, and what a person should know of it; that is empty mostly.

    torch counts bfloat16 as supported on GPUs older than compute capability 8.0 (V100, T4), which
    emulate it: slower than float32, and less exact. They multiply float16 fast, whose losses are
    scaled (`LossScale`).
    """
    on_gpu = device.type == "cuda"
    native = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if model.dtype in ("float32", "float16"):
        return torch.float32 if model.dtype == "float32" else torch.float16, ""
    if model.dtype == "bfloat16":
        slow = on_gpu and not native
        return torch.bfloat16, ": this GPU only emulates it; try model.dtype: float16" * slow
    if native:
        return torch.bfloat16, ""
    if on_gpu:
        return torch.float16, ": this GPU has no bfloat16 of its own; losses are scaled"
    # Without matrix units for it, bfloat16 is slower than float32 on a CPU.
    return torch.float32, ""


def autocast(device: torch.device, compute_dtype: torch.dtype) -> AbstractContextManager[object]:
    """Return the context every pass runs in: adapters are float32, the base may be less."""
    is_half = compute_dtype != torch.float32
    return torch.autocast(device.type, compute_dtype if is_half else torch.bfloat16, is_half)
