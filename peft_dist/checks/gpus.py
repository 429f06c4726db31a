"""The GPUs of a machine: how many, how full, and whether what is installed can use them."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from peft_dist.checks.context import CheckContext
from peft_dist.checks.finding import Finding
from peft_dist.checks.gpu_tools import GpuFault, GpuState, gpus_by_tools
from peft_dist.checks.known_faults import driver_fault, installed
from peft_dist.common.gpus import visible_gpus
from peft_dist.common.time_limit import within

BUSY_BYTES = 1 << 30
"""Of a GPU's memory that others may use before that is worth a word."""
FULL = 0.5
"""A GPU with a smaller part of its memory free is in use by somebody else."""


def check_gpus(context: CheckContext) -> Iterator[Finding]:
    """Look at the driver, its GPUs, and whether torch and bitsandbytes are made for them."""
    if context.devices == 0:  # a run on CPUs
        return
    present = visible_gpus(context.environ)
    build = (installed("torch") or "").partition("+")[2]
    if present:
        yield from _builds(present, build)
    elif context.devices is None:
        yield Finding("ok", "devices", "no GPU is visible here: training would run on the CPU")
        return
    try:
        seen = within(context.limit_s, lambda: context.look_at_gpus(context.environ))
    except TimeoutError:
        seen = GpuFault(f"its devices do not answer within {context.limit_s:.3g} s")
    if isinstance(seen, GpuFault):
        yield Finding("bad" if seen.is_bad else "note", "device driver", seen.text, seen.remedy)
        return
    if context.devices is not None and len(seen) < context.devices:
        remedy = "fix gpus_per_node in the cluster file"
        yield Finding("bad", "devices", f"{len(seen)} devices, {context.devices} expected", remedy)
        if present and not seen:  # the tool of the driver may know why torch sees none
            told = gpus_by_tools(context.environ)
            seen = [] if isinstance(told, GpuFault) else told
    for gpu in seen:
        yield _memory(gpu)
    for driver in sorted({gpu.driver for gpu in seen}):
        fault = driver_fault(build, driver)
        if fault is not None:
            yield fault
    nccl = installed("nvidia-nccl-cu13") or installed("nvidia-nccl-cu12")
    if nccl is not None:
        text = f"NCCL {nccl}, torch built for {build or 'an unknown CUDA'}"
        yield Finding("ok", "NCCL", text)


def _builds(present: int, build: str) -> Iterator[Finding]:
    """See whether torch and bitsandbytes were built for the GPUs that are there."""
    if build == "cpu":
        yield Finding(
            "bad",
            "torch build",
            f"{present} GPUs, but torch is built for the CPU ({installed('torch')})",
            "install a CUDA or ROCm build from download.pytorch.org",
        )
    spec = importlib.util.find_spec("bitsandbytes")
    if build.startswith("rocm") or spec is None or spec.origin is None:
        return
    if not any(Path(spec.origin).parent.glob("libbitsandbytes_cuda*.so")):
        text = "bitsandbytes has no CUDA library"
        yield Finding("bad", "bitsandbytes build", text, "reinstall it with pip")


def _memory(gpu: GpuState) -> Finding:
    used = gpu.total_bytes - gpu.free_bytes
    driver = f", driver {gpu.driver}" if gpu.driver else ""
    text = f"{gpu.name}: {gpu.kind}, {gpu.total_bytes >> 20} MiB, {used >> 20} in use{driver}"
    if gpu.free_bytes < FULL * gpu.total_bytes:
        remedy = "end what uses it, or ask for nodes of your own (exclusive)"
        return Finding("bad", "device memory", text, remedy)
    if used > BUSY_BYTES:
        return Finding("note", "device memory", text, "end what uses it")
    return Finding("ok", "device memory", text)
