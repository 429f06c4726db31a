"""What must be installed before a process of the data plane is started."""

import importlib.util

from peft_dist.common.errors import LaunchError

TRAIN_PACKAGES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "safetensors")


def require_training_packages(strategy: str = "") -> None:
    """Refuse to start what would end for want of a package.

    Raises:
        LaunchError: Naming what is missing.
    """
    if strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise LaunchError(
            f"{strategy} needs deepspeed, which is not installed",
            where="parallel.strategy",
            remedy="pip install 'peft-dist[deepspeed]', or strategy: ddp or fsdp",
        )
    missing = [name for name in TRAIN_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise LaunchError(
            f"{' and '.join(missing)} not installed", remedy="pip install 'peft-dist[train]'"
        )
