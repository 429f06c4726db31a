"""LoRA through PEFT: where it goes, and its seeded initial values.

Adapters are injected on `meta`, before the model is sharded: adapters added later would never be
reduced over processes.
"""

import copy
import math
import warnings
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_dist.config.recipe import Lora
from peft_dist.dist import Shard
from peft_dist.errors import RecipeError, nearest
from peft_dist.methods.init import assign, generator_for
from peft_dist.model.architectures import transformer_blocks
from peft_dist.model.nf4 import FrozenLinear4bit, dequantize

_TASKS = {"causal-lm": TaskType.CAUSAL_LM, "sequence-classification": TaskType.SEQ_CLS}
_ADAPTABLE = (nn.Linear, Conv1D, FrozenLinear4bit)


class _LoraOn4bit(LoraLinear):
    """LoRA on our layer, which keeps [out, in] however the released base keeps its weight.

    DoRA would transpose the weights of a base that was released with Conv1D.
    """

    def __init__(self, *args: Any, config: LoraConfig, **kwargs: Any) -> None:
        config = copy.copy(config)
        config.fan_in_fan_out = False
        super().__init__(*args, config=config, **kwargs)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Map x [..., in] to [..., out]; PEFT's own way for anything but one plain adapter.

        The scale is applied to [..., r] and the sum is part of the last product, which spares two
        passes over [..., out] each way.
        """
        active = self.active_adapters
        if len(active) != 1 or self.disable_adapters or self.merged or self.lora_variant:
            return super().forward(x, *args, **kwargs)
        (name,) = active
        result = self.base_layer(x)
        low = self.lora_A[name](self.lora_dropout[name](x)) * self.scaling[name]
        product = self.lora_B[name].weight.t()
        return torch.addmm(result.flatten(0, -2), low.flatten(0, -2), product).view_as(result)


def attach(
    model: PreTrainedModel, settings: Lora, *, task: str, base_name: str, has_conv1d: bool
) -> PeftModel:
    """Inject LoRA layers into a model on `meta`.

    Args:
        model: The base, its linears already swapped.
        settings: The recipe's method section.
        task: The recipe's task.
        base_name: What the saved adapter names as its base.
        has_conv1d: Whether the base as released has Conv1D linears, whose weights are transposed.

    Raises:
        RecipeError: For a target that names no linear, or an option that cannot work here.
    """
    targets = _targets(model, settings)
    if settings.dora and any(isinstance(m, Conv1D) for m in model.modules()):
        raise RecipeError(
            "dora needs the norm of whole columns, which an unquantized Conv1D base does not shard",
            where="method.dora",
            remedy="set quantization: nf4, or dora: false",
        )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        bias=settings.bias,
        task_type=_TASKS[task],
        fan_in_fan_out=has_conv1d,
    )
    config._register_custom_module({FrozenLinear4bit: _LoraOn4bit})
    with warnings.catch_warnings():
        # PEFT warns that fan_in_fan_out does not suit our swapped linears; it suits the saved
        # adapter, which is loaded onto the released base.
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        peft_model = get_peft_model(model, config, low_cpu_mem_usage=True)
    # PEFT has put the folder the model was built from there, which for a hub id is a cache.
    config.base_model_name_or_path = base_name
    for module in peft_model.modules():
        if isinstance(module, LoraLayer):
            # Autocast picks the dtype of each product; casting the input to the adapter's float32
            # first would be a round trip through memory per layer.
            module.cast_input_dtype_enabled = False
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad:
            # An adapter is small and precious: float32 whatever the base computes in.
            parameter.data = parameter.data.float()
            assert parameter.is_meta, f"{name} was made before its base was sharded"
    return peft_model


def _targets(model: PreTrainedModel, settings: Lora) -> list[str]:
    blocks = transformer_blocks(model)
    inside = {
        name.rpartition(".")[2]
        for block in blocks.values()
        for name, module in block.named_modules()
        if isinstance(module, _ADAPTABLE)
    }
    if settings.targets == "all-linear":
        return sorted(inside)
    for target in settings.targets:
        if target not in inside:
            raise RecipeError(
                f"{target!r} is no linear inside the blocks of this model",
                where="method.targets",
                remedy=nearest(target, inside),
            )
    return sorted(settings.targets)


def initialise(model: PeftModel, settings: Lora, *, seed: int, shard: Shard) -> None:
    """Fill every adapter parameter, this shard's rows of it, from the seed and its name.

    A is Kaiming-uniform and B zero, as Hu et al. start them, so the first output is the base's.
    DoRA magnitudes are the row norms of the base, which must be loaded.
    """
    for module_name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for adapter in module.lora_A:
            a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            full = torch.empty(a.shape)
            generator = generator_for(seed, f"{module_name}.lora_A")
            nn.init.kaiming_uniform_(full, a=math.sqrt(5), generator=generator)
            assign(a, full, shard)
            assign(b, torch.zeros(b.shape), shard)
            if adapter in module.lora_magnitude_vector:
                magnitude = module.lora_magnitude_vector[adapter].weight
                assign(magnitude, _row_norms(module.get_base_layer(), shard), shard)


def _row_norms(layer: nn.Module, shard: Shard) -> torch.Tensor:
    """Return the norm of every weight row. Collective where the layer is sharded."""
    if isinstance(layer, FrozenLinear4bit):
        stored: torch.Tensor = layer.packed
        # Dequantizing needs plain tensors; rows of the two parameters are sharded alike.
        weight = dequantize(
            _local(layer.packed),
            _local(layer.absmax),
            block_size=layer.block_size,
            dtype=layer.dtype,
        )
    else:
        stored = layer.get_parameter("weight")
        weight = _local(stored)
    norms = weight.float().norm(dim=1)
    return shard.gather(norms, stored.shape[0]) if isinstance(stored, DTensor) else norms


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
