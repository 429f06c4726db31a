"""Sharding engines by the name a recipe gives them."""

from peft_dist.optim.optimizer import Group
from peft_dist.sharding.ddp import DDPEngine
from peft_dist.sharding.deepspeed_zero import ZeRO2Engine, ZeRO3Engine
from peft_dist.sharding.engine import Engine
from peft_dist.sharding.fsdp2 import FSDP2Engine, HSDPEngine

ENGINES: dict[str, type[Engine]] = {
    "ddp": DDPEngine,
    "fsdp": FSDP2Engine,
    "hsdp": HSDPEngine,
    "zero2": ZeRO2Engine,
    "zero3": ZeRO3Engine,
}

__all__ = ["ENGINES", "Engine", "Group"]
