"""The GPUs of a machine: how many, how full, and whether what is installed can use them."""

import importlib.util
import json
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peft_dist.checks.finding import Finding
from peft_dist.checks.known_faults import driver_fault, installed
from peft_dist.common.gpus import visible_gpus
from peft_dist.common.time_limit import within

if TYPE_CHECKING:
    from peft_dist.checks.surroundings import Surroundings

NVIDIA_SMI = ["nvidia-smi", "--query-gpu=index,name,memory.total,memory.used,driver_version",
              "--format=csv,noheader,nounits"]  # fmt: skip
ROCM_SMI = ["rocm-smi", "--showproductname", "--showmeminfo", "vram", "--json"]
TOOL_S = 20
BUSY_BYTES = 1 << 30
"""Of a GPU's memory that others may use before that is worth a word."""
FULL = 0.5
"""A GPU with a smaller part of its memory free is in use by somebody else."""


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    name: str
    kind: str
    """What its driver calls it."""
    total_bytes: int
    free_bytes: int
    driver: str = ""
    """Version; empty where it is not known, or where torch has used the GPU."""


@dataclass(frozen=True)
class GpuFault:
    """Why nothing can be said of GPUs."""

    text: str
    remedy: str = ""
    is_bad: bool = True


def check_gpus(around: "Surroundings") -> Iterator[Finding]:
    """Look at the driver, its GPUs, and whether torch and bitsandbytes are made for them."""
    if around.devices == 0:  # a run on CPUs
        return
    present = visible_gpus(around.environ)
    build = (installed("torch") or "").partition("+")[2]
    if present:
        yield from _builds(present, build)
    elif around.devices is None:
        yield Finding("ok", "devices", "no GPU is visible here: training would run on the CPU")
        return
    try:
        seen = within(around.limit_s, lambda: around.look_at_gpus(around.environ))
    except TimeoutError:
        seen = GpuFault(f"its devices do not answer within {around.limit_s:.3g} s")
    if isinstance(seen, GpuFault):
        yield Finding("bad" if seen.is_bad else "note", "device driver", seen.text, seen.remedy)
        return
    if around.devices is not None and len(seen) < around.devices:
        remedy = "fix gpus_per_node in the cluster file"
        yield Finding("bad", "devices", f"{len(seen)} devices, {around.devices} expected", remedy)
        if present and not seen:  # the tool of the driver may know why torch sees none
            told = gpus_by_tools(around.environ)
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


def _memory(gpu: Gpu) -> Finding:
    used = gpu.total_bytes - gpu.free_bytes
    driver = f", driver {gpu.driver}" if gpu.driver else ""
    text = f"{gpu.name}: {gpu.kind}, {gpu.total_bytes >> 20} MiB, {used >> 20} in use{driver}"
    if gpu.free_bytes < FULL * gpu.total_bytes:
        remedy = "end what uses it, or ask for nodes of your own (exclusive)"
        return Finding("bad", "device memory", text, remedy)
    if used > BUSY_BYTES:
        return Finding("note", "device memory", text, "end what uses it")
    return Finding("ok", "device memory", text)


def gpus_by_tools(_environ: Mapping[str, str]) -> list[Gpu] | GpuFault:
    """Ask the driver's own tool, which needs no torch and starts no CUDA."""
    if (installed("torch") or "").partition("+")[2].startswith("rocm"):
        return amd_gpus()
    try:
        done = subprocess.run(
            NVIDIA_SMI, capture_output=True, text=True, errors="replace", check=True, timeout=TOOL_S
        )
    except (OSError, subprocess.SubprocessError) as error:
        return GpuFault(f"nvidia-smi fails ({type(error).__name__})", "repair the driver")
    found = []
    for line in done.stdout.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) != 5 or not (parts[2].isdecimal() and parts[3].isdecimal()):
            continue
        index, kind, driver = parts[0], parts[1], parts[4]
        total, used = int(parts[2]) << 20, int(parts[3]) << 20
        found.append(Gpu(f"GPU {index}", kind, total, total - used, driver))
    return found


def amd_gpus() -> list[Gpu] | GpuFault:
    """Ask the tool of AMD's driver."""
    try:
        done = subprocess.run(ROCM_SMI, capture_output=True, text=True, check=True, timeout=TOOL_S)
        cards = {name: facts for name, facts in json.loads(done.stdout).items() if "card" in name}
    except (OSError, subprocess.SubprocessError, ValueError, AttributeError) as error:
        return GpuFault(f"rocm-smi fails ({type(error).__name__})", is_bad=False)
    found = []
    for name, facts in sorted(cards.items()):
        sizes = [int(facts[key]) for key in facts if "VRAM" in key and facts[key].isdecimal()]
        used, total = min(sizes, default=0), max(sizes, default=0)
        kind = facts.get("Card Series") or facts.get("Card series") or "AMD GPU"
        found.append(Gpu(name, kind, total, total - used))
    return found
