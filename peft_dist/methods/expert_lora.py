"""LoRA on what PEFT calls target parameters: the 3-D parameters of experts.

PEFT adds the update to the whole weight in every forward, which a weight in 4 bits, or one that is
sharded, cannot take. Its wrapper is kept for the names and shapes of what is trained; the update is
added to the products of each expert (`model/experts.py`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from torch import nn
from transformers import PreTrainedModel

from peft_dist.common.errors import RecipeError, nearest
from peft_dist.model.architectures import transformer_blocks
from peft_dist.model.experts import PACKED, LowRank, expert_parameters, use_own_experts


class ParamWrapper(PeftParamWrapper):
    """A LoRA of each expert of a parameter.

    PEFT knows wrappers of parameters by the name of their class (`_inject_parameters` of its
    tuners_utils.py), so this one has it too.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        """Take the experts, or a wrapper of theirs for another parameter."""
        super().__init__(base_layer, adapter_name, **kwargs)
        # Not as a part of it: the wrapper stands around it.
        self.get_base_layer().__dict__[f"{self.parameter_name}_lora"] = self

    def low_rank(self) -> LowRank | None:
        """Return what is added to the weights now; None where the adapter is off.

        The layout is that of PEFT's `get_delta_weight`: A is [E * r, in], B is [out, r * E].
        """
        if self.disable_adapters:
            return None
        (name,) = self.active_adapters
        rows = self.lora_A[name].get_parameter("weight")
        columns = self.lora_B[name].get_parameter("weight")
        a = rows.reshape(self.num_experts, -1, rows.shape[-1])
        b = columns.reshape(len(columns), -1, self.num_experts)
        # All experts at once: a gradient of one alone would be as large as that of all.
        if self._did_swap_in_out_features:
            left, right = b.permute(2, 0, 1), a
        else:
            left, right = a.transpose(1, 2), b.permute(2, 1, 0)
        return LowRank(left.unbind(0), right.unbind(0), self.scaling[name])

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the experts, which ask for `low_rank`."""
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        return result


def expert_targets(
    model: PreTrainedModel, wanted: tuple[str, ...], layers: tuple[int, ...]
) -> list[str]:
    """Return the whole names of the parameters of experts to adapt, in some blocks or all.

    Raises:
        RecipeError: For one that no expert has.
    """
    blocks = list(transformer_blocks(model))
    chosen = tuple(f"{blocks[number]}." for number in layers or range(len(blocks)))
    names = [name.removesuffix(PACKED) for name in expert_parameters(model)]
    for target in wanted:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            raise RecipeError(
                f"{target!r} is no parameter of experts of this model",
                where="method.target_parameters",
                remedy=nearest(target, {name.rpartition(".")[2] for name in names}),
            )
    return [
        name
        for name in names
        if name.startswith(chosen) and any(f".{name}".endswith(f".{target}") for target in wanted)
    ]


def wrappers_for(model: PreTrainedModel) -> dict[type[nn.Module], type[nn.Module]]:
    """Return what PEFT is to wrap modules of experts with, by their classes."""
    return {type(module): ParamWrapper for module in expert_parameters(model).values()}


@contextmanager
def stand_ins(model: PreTrainedModel, names: list[str]) -> Iterator[None]:
    """Give parameters that are kept in 4 bits the shape that PEFT looks for, on `meta`."""
    added: list[tuple[nn.Module, str]] = []
    for name in names:
        parent, _, attribute = name.rpartition(".")
        module = model.get_submodule(parent)
        if attribute in module._parameters:
            continue
        packed = module._parameters.get(attribute + PACKED)
        if packed is None:  # a linear in 4 bits
            shape = tuple(getattr(module, attribute).shape)
        else:
            shape = (*packed.shape[:2], packed.shape[2] * 2)
        empty = torch.empty(shape, device="meta")
        module._parameters[attribute] = nn.Parameter(empty, requires_grad=False)
        added.append((module, attribute))
    try:
        yield
    finally:
        for module, attribute in added:
            del module._parameters[attribute]


def prepare(model: PreTrainedModel, names: list[str]) -> None:
    """Let the model compute its experts as the wrapper needs, where some of them are adapted."""
    if any(name.rpartition(".")[2] != "weight" for name in names):
        use_own_experts(model)
