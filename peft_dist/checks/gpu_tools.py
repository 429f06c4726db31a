"""The GPUs of a machine as the tools of their drivers list them."""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from peft_dist.checks.known_faults import installed

NVIDIA_SMI = ["nvidia-smi", "--query-gpu=index,name,memory.total,memory.used,driver_version",
              "--format=csv,noheader,nounits"]  # fmt: skip
ROCM_SMI = ["rocm-smi", "--showproductname", "--showmeminfo", "vram", "--json"]
TOOL_S = 20


@dataclass(frozen=True)
class GpuState:
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


def gpus_by_tools(_environ: Mapping[str, str]) -> list[GpuState] | GpuFault:
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
        found.append(GpuState(f"GPU {index}", kind, total, total - used, driver))
    return found


def amd_gpus() -> list[GpuState] | GpuFault:
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
        found.append(GpuState(name, kind, total, total - used))
    return found
