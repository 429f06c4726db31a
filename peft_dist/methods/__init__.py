"""Adapter families by the name a recipe gives them."""

from typing import Any

from peft_dist.methods.any_peft import AnyPeftMethod
from peft_dist.methods.bitfit import BitFitMethod
from peft_dist.methods.bottleneck import BottleneckMethod
from peft_dist.methods.lora import LoraMethod
from peft_dist.methods.method import BaseAccess, Method
from peft_dist.methods.prefix import PrefixMethod
from peft_dist.methods.prompt import PromptMethod

METHODS: dict[str, type[Method[Any]]] = {
    "lora": LoraMethod,
    "peft": AnyPeftMethod,
    "bottleneck": BottleneckMethod,
    "bitfit": BitFitMethod,
    "prefix": PrefixMethod,
    "prompt": PromptMethod,
}

__all__ = ["METHODS", "Method", "BaseAccess"]
