"""Adapter families by the name a recipe gives them."""

from types import ModuleType

from peft_dist.methods import lora

METHODS: dict[str, ModuleType] = {"lora": lora}
"""Each module has `attach`, which injects adapters, and `initialise`, which fills them."""
