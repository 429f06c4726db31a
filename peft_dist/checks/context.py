"""What the checks of a machine are given to look at."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from peft_dist.checks.gpu_tools import GpuFault, GpuState, gpus_by_tools


@dataclass(frozen=True)
class CheckContext:
    """One machine, and what is asked of it."""

    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    run_dir: Path | None = None
    """The folder of the run that is to start; None where there is none yet."""
    min_free_bytes: float = 0.0
    """What must be free where it is."""
    devices: int | None = None
    """GPUs that the machine must have; 0 where none is used, None where that is not known."""
    nodes: int | None = None
    """Machines of the run; None where that is not known."""
    look_at_gpus: Callable[[Mapping[str, str]], list[GpuState] | GpuFault] = gpus_by_tools
    """Without torch, or with it."""
    limit_s: float = 20.0
    """How long one check may take."""
