"""Which engine this process should run: what the launcher exported against what the recipe says.

A launcher's word and the recipe's must agree; silence on either side follows the other.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from peft_dist.config.recipe import Parallel
from peft_dist.dist import World
from peft_dist.errors import LaunchError


@dataclass(frozen=True)
class Launched:
    """The engine to run."""

    strategy: str
    shard_size: int
    """Processes that hold one copy of the base together; 1 under ddp."""


def resolve(parallel: Parallel, world: World, environ: Mapping[str, str]) -> Launched:
    """Agree on strategy, process count and shard size.

    Raises:
        LaunchError: For a contradiction, naming both sides.
    """
    if parallel.processes is not None and parallel.processes != world.size:
        raise LaunchError(
            f"the recipe says {parallel.processes}, the launcher started {world.size}",
            where="parallel.processes",
            remedy="make them equal, or leave processes out",
        )
    said = _launcher_strategy(environ)
    if said is not None and parallel.strategy not in ("auto", said):
        raise LaunchError(
            f"the recipe says {parallel.strategy}, accelerate launch says {said}",
            where="parallel.strategy",
            remedy=f"use launch/strategies/{parallel.strategy}.yaml, or strategy: auto",
        )
    strategy = said or ("fsdp" if parallel.strategy == "auto" else parallel.strategy)
    if strategy == "ddp":
        return Launched(strategy, 1)
    if strategy == "fsdp":
        return Launched(strategy, world.size)
    exported = _exported_size(environ, "SHARD") if said else None
    if exported and parallel.shard_size and exported != parallel.shard_size:
        raise LaunchError(
            f"the recipe says {parallel.shard_size}, accelerate launch says {exported}",
            where="parallel.shard_size",
            remedy="make them equal, or leave shard_size out",
        )
    shard_size = parallel.shard_size or exported or world.local_size
    if world.size % shard_size:
        raise LaunchError(
            f"{shard_size} does not divide {world.size} processes",
            where="parallel.shard_size",
            remedy=f"set it to a divisor of {world.size}",
        )
    return Launched(strategy, shard_size)


def _launcher_strategy(environ: Mapping[str, str]) -> str | None:
    """Return the strategy Accelerate was configured for; None under torchrun or plain python."""
    if _is_true(environ, "ACCELERATE_USE_DEEPSPEED"):
        raise LaunchError(
            "accelerate launch says deepspeed, which is not one of ddp, fsdp, hsdp",
            where="parallel.strategy",
            remedy="use one of launch/strategies/*.yaml",
        )
    if _is_true(environ, "ACCELERATE_USE_FSDP"):
        if environ.get("FSDP_VERSION", "1") != "2":
            raise LaunchError(
                f"accelerate launch says FSDP version {environ.get('FSDP_VERSION', '1')}",
                where="parallel.strategy",
                remedy="set fsdp_version: 2 in the Accelerate file",
            )
        # Our hsdp.yaml exports a mesh, even of a single replica; fsdp.yaml exports none.
        return "fsdp" if _exported_size(environ, "REPLICATE") is None else "hsdp"
    # Accelerate exports this for every kind of launch, other launchers for none.
    return "ddp" if "ACCELERATE_MIXED_PRECISION" in environ else None


def _exported_size(environ: Mapping[str, str], axis: str) -> int | None:
    text = environ.get(f"PARALLELISM_CONFIG_DP_{axis}_SIZE", "")
    return int(text) if text.isdigit() else None


def _is_true(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").lower() in ("1", "true", "yes")
