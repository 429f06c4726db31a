"""Sharding engines by the name a recipe gives them."""

from peft_dist.shard.ddp import DDPEngine
from peft_dist.shard.engine import Engine, Group
from peft_dist.shard.fsdp2 import FSDP2Engine, HSDPEngine
from peft_dist.shard.zero import ZeRO2Engine, ZeRO3Engine

ENGINES: dict[str, type[Engine]] = {
    "ddp": DDPEngine,
    "fsdp": FSDP2Engine,
    "hsdp": HSDPEngine,
    "zero2": ZeRO2Engine,
    "zero3": ZeRO3Engine,
}

__all__ = ["ENGINES", "Engine", "Group"]
