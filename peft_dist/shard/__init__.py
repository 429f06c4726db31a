"""Sharding engines by the name a recipe gives them."""

from peft_dist.shard.ddp import DDPEngine
from peft_dist.shard.engine import Engine
from peft_dist.shard.fsdp2 import FSDP2Engine, HSDPEngine

ENGINES: dict[str, type[Engine]] = {"ddp": DDPEngine, "fsdp": FSDP2Engine, "hsdp": HSDPEngine}

__all__ = ["ENGINES", "Engine"]
