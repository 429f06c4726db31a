"""Which engine this process should run: what the launcher exported against what the recipe says.

A launcher's word and the recipe's must agree; silence on either side follows the other.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from peft_dist.common.errors import LaunchError
from peft_dist.config.parallel import Parallel, Reshard
from peft_dist.distributed.world import World


@dataclass(frozen=True)
class Launched:
    """The engine to run."""

    strategy: str
    shard_size: int
    """Processes that hold one copy of the base together; 1 under ddp and zero2."""
    offload: bool = False
    """Whether the base waits in host memory."""
    reshard: Reshard = "forward"
    """When gathered blocks are freed."""
    dequantized_blocks: int = 0
    """Whose weights stay dequantized."""


class _LauncherSettings(NamedTuple):
    """What a launcher was configured for."""

    strategy: str
    offload: bool = False


def deepspeed_exports(file: Path) -> dict[str, str]:
    """Return what `accelerate launch` would export for a DeepSpeed JSON file."""
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}


def resolve(parallel: Parallel, world: World, environ: Mapping[str, str]) -> Launched:
    """Agree on strategy, process count, shard size and offload.

    Raises:
        LaunchError: For a contradiction, naming both sides.
    """
    if parallel.processes is not None and parallel.processes != world.size:
        raise LaunchError(
            f"the recipe says {parallel.processes}, the launcher started {world.size}",
            where="parallel.processes",
            remedy="make them equal, or leave processes out",
        )
    launched = _launcher_settings(environ)
    if launched is not None and parallel.strategy not in ("auto", launched.strategy):
        raise LaunchError(
            f"the recipe says {parallel.strategy}, the launcher says {launched.strategy}",
            where="parallel.strategy",
            remedy=f"use launch/strategies/{parallel.strategy}.yaml, or strategy: auto",
        )
    strategy = launched.strategy if launched else parallel.strategy
    if strategy == "auto":
        strategy = "fsdp"
    offload = _offload(parallel, launched, strategy)
    if parallel.shard_size is not None and strategy != "hsdp":
        raise LaunchError(
            f"has no meaning here: the strategy is {strategy}",
            where="parallel.shard_size",
            remedy="remove it, or set parallel.strategy: hsdp",
        )
    reshard: Reshard = "forward" if parallel.reshard == "auto" else parallel.reshard
    if parallel.reshard != "auto" and strategy not in ("fsdp", "hsdp"):
        raise LaunchError(
            f"has no meaning here: the strategy is {strategy}",
            where="parallel.reshard",
            remedy="remove it, or set parallel.strategy: fsdp",
        )
    kept = 0 if parallel.dequantized_blocks == "auto" else parallel.dequantized_blocks
    if kept and strategy == "zero3":
        raise LaunchError(
            "has no meaning here: the strategy is zero3",
            where="parallel.dequantized_blocks",
            remedy="remove it, or set parallel.strategy: fsdp",
        )
    if strategy in ("ddp", "zero2"):
        return Launched(strategy, 1, dequantized_blocks=kept)
    if strategy in ("fsdp", "zero3"):
        return Launched(strategy, world.size, offload, reshard, kept)
    exported = _exported_size(environ, "SHARD") if launched else None
    if exported and parallel.shard_size and exported != parallel.shard_size:
        raise LaunchError(
            f"the recipe says {parallel.shard_size}, the launcher says {exported}",
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
    return Launched(strategy, shard_size, offload, reshard, kept)


def _offload(parallel: Parallel, launched: _LauncherSettings | None, strategy: str) -> bool:
    """Agree on offload; a launcher that offloads nothing is silent, for that is its default."""
    if launched is not None and launched.offload:
        if "offload" in parallel.model_fields_set and parallel.offload == "none":
            raise LaunchError(
                "the recipe says none, the launcher says cpu",
                where="parallel.offload",
                remedy="make them equal, or leave offload out",
            )
        return True
    if parallel.offload == "cpu" and strategy in ("ddp", "zero2"):
        raise LaunchError(
            f"the recipe says cpu, the launcher says {strategy}, which shards no base",
            where="parallel.offload",
            remedy="remove it, or use launch/strategies/fsdp.yaml",
        )
    return parallel.offload == "cpu"


def _launcher_settings(environ: Mapping[str, str]) -> _LauncherSettings | None:
    """Return what Accelerate or DeepSpeed was configured for; None under torchrun or python."""
    if _is_true(environ, "ACCELERATE_USE_DEEPSPEED"):
        return _deepspeed_said(environ)
    if _is_true(environ, "ACCELERATE_USE_FSDP"):
        if environ.get("FSDP_VERSION", "1") != "2":
            raise LaunchError(
                f"accelerate launch says FSDP version {environ.get('FSDP_VERSION', '1')}",
                where="parallel.strategy",
                remedy="set fsdp_version: 2 in the Accelerate file",
            )
        # Our hsdp.yaml exports a mesh, even of a single replica; fsdp.yaml exports none.
        strategy = "fsdp" if _exported_size(environ, "REPLICATE") is None else "hsdp"
        return _LauncherSettings(strategy, _is_true(environ, "FSDP_OFFLOAD_PARAMS"))
    # Accelerate exports this for every kind of launch, other launchers for none.
    return _LauncherSettings("ddp") if "ACCELERATE_MIXED_PRECISION" in environ else None


def _deepspeed_said(environ: Mapping[str, str]) -> _LauncherSettings:
    """Read the ZeRO stage and where parameters wait, exported one by one or as a JSON file."""
    file = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if file:
        where, zero = file, _zero_section(file)
        stage, device = zero.get("stage", 0), zero.get("offload_param", {}).get("device", "none")
    else:
        where = "accelerate launch"
        stage = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0")
        device = environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none")
    if str(stage) not in ("2", "3"):
        raise LaunchError(
            f"ZeRO stage {stage} is not supported",
            where=where,
            remedy="set stage 2 or 3; stages 0 and 1 are launch/strategies/ddp.yaml",
        )
    if device not in ("none", "cpu"):
        raise LaunchError(
            f"offload_param to {device} is not supported", where=where, remedy="set cpu or none"
        )
    # Stage 2 has no parameters to offload; Accelerate's questionnaire asks all the same.
    return _LauncherSettings(f"zero{stage}", device == "cpu" and str(stage) == "3")


def _zero_section(file: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        section = content["zero_optimization"]
        if isinstance(section, dict) and isinstance(section.get("offload_param", {}), dict):
            return section
        problem = "zero_optimization is not an object"
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        problem = "is no DeepSpeed JSON file with a zero_optimization section"
    raise LaunchError(problem, where=file, remedy="see launch/strategies/zero3.json")


def _exported_size(environ: Mapping[str, str], axis: str) -> int | None:
    text = environ.get(f"PARALLELISM_CONFIG_DP_{axis}_SIZE", "")
    return int(text) if text.isdigit() else None


def _is_true(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").lower() in ("1", "true", "yes")
