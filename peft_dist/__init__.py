"""Fine-tune adapters on a frozen, 4-bit, sharded base model.

Importing this package imports nothing else: the control plane must start without torch.
"""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "resources":  # which the scripts of a job that an earlier version made ask for
        from peft_dist.slurm.node import refuse

        refuse()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
