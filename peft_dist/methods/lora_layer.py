"""The LoRA layer of PEFT on a linear whose weight is in 4 bits."""

import copy
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from peft_dist.model.fused_lora import WeightUpdate


class LoraOn4bit(LoraLinear):
    """LoRA on our layer, which keeps [out, in] however the released base keeps its weight.

    DoRA would transpose the weights of a base that was released with Conv1D.

    Attributes:
        fused: Whether the update is added to the weight while that is dequantized.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, *, config: LoraConfig, **kwargs: Any
    ) -> None:
        """Take PEFT's own arguments."""
        config = copy.copy(config)
        config.fan_in_fan_out = False
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.fused = False

    @property
    def plain_adapter(self) -> str | None:
        """The one adapter that is a product of A and B and nothing else; None if PEFT is asked."""
        active = self.active_adapters
        if len(active) != 1 or self.disable_adapters or self.merged or self.lora_variant:
            return None
        (name,) = active
        b: Any = self.lora_B[name]  # a linear
        return name if b.bias is None else None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Map x [..., in] to [..., out]; PEFT's own way for anything but one plain adapter.

        The scale is applied to [..., r] and the sum is part of the last product, which spares two
        passes over [..., out] each way.
        """
        name = self.plain_adapter
        if name is None:
            return super().forward(x, *args, **kwargs)
        a: Any = self.lora_A[name]
        b: Any = self.lora_B[name]
        if self.fused:
            update = WeightUpdate(a.weight, b.weight, float(self.scaling[name]))
            # Through the layer, so that an engine that gathers each layer's bytes does so.
            return self.base_layer(x, product=update.product)  # type: ignore[no-any-return]
        low = a(self.lora_dropout[name](x)) * self.scaling[name]
        result: torch.Tensor = self.base_layer(x)
        return torch.addmm(result.flatten(0, -2), low.flatten(0, -2), b.weight.t()).view_as(result)
