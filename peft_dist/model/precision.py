"""The dtype that a recipe computes in on a device, and what is to be said of it."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from peft_dist.config.recipe import Model


def compute_dtype(
    model: Model, device: torch.device, began_in: str = ""
) -> tuple[torch.dtype, str]:
    """Return the dtype, and what a person should know of it; that is empty mostly.

    torch counts bfloat16 as supported on GPUs older than compute capability 8.0 (V100, T4), which
    emulate it: slower than float32, and less exact. They multiply float16 fast, whose losses are
    scaled (`LossScale`). So it does on every CPU, of which those with AVX512_BF16 or AMX multiply
    it four times as fast as float32, and others more slowly.

    Args:
        model: The recipe's settings.
        device: Of this process.
        began_in: Name of the dtype in which the run that goes on was begun, if it was: `auto` means
            that one, wherever it goes on.
    """
    on_gpu = device.type == "cuda"
    if model.dtype == "bfloat16":
        slow = on_gpu and not _has_bfloat16(device)
        return torch.bfloat16, ": this GPU only emulates it; try model.dtype: float16" * slow
    if model.dtype != "auto":
        return getattr(torch, model.dtype), ""
    if began_in:
        return getattr(torch, began_in), ", in which the run began"
    if _has_bfloat16(device):
        return torch.bfloat16, "" if on_gpu else ", which this processor multiplies itself"
    if on_gpu:
        return torch.float16, ": this GPU has no bfloat16 of its own; losses are scaled"
    return torch.float32, ": this processor has no bfloat16 of its own"


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype's name as a recipe has it."""
    return str(dtype).removeprefix("torch.")


def _has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 itself."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # none in torch 2.11
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def autocast(device: torch.device, compute_dtype: torch.dtype) -> AbstractContextManager[object]:
    """Return the context every pass runs in: adapters are float32, the base may be less."""
    is_half = compute_dtype != torch.float32
    return torch.autocast(device.type, compute_dtype if is_half else torch.bfloat16, is_half)
