"""The packages that training needs, looked for before a process is started for it."""

import importlib.util

from peft_dist.common.errors import LaunchError

TRAIN_PACKAGES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "safetensors")


def require_training_packages(strategy: str = "") -> None:
    """Refuse to start where one is missing.

    Raises:
        LaunchError: With the command that installs them.
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
