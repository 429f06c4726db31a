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
        """Return what is added to the weights now; None where the adapter is off."""
        if self.disable_adapters:
            return None
        (name,) = self.active_adapters
        left, right = of_each_expert(
            self.lora_A[name].get_parameter("weight"),
            self.lora_B[name].get_parameter("weight"),
            self.num_experts,
            turned=not self._did_swap_in_out_features,
        )
        return LowRank(left, right, self.scaling[name])

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the experts, which ask for `low_rank`."""
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        return result


def of_each_expert(
    a: torch.Tensor, b: torch.Tensor, experts: int, *, turned: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors [E, rows, r] and [E, r, columns] of what is added to each expert's weight.

    The layout is that of PEFT's `get_delta_weight`.

    Args:
        a: [E * r, in].
        b: [out, r * E].
        experts: E.
        turned: Whether weights are stored as [in, out], and PEFT knows it.
    """
    a = a.reshape(experts, -1, a.shape[-1])
    b = b.reshape(len(b), -1, experts)
    if turned:
        return a.transpose(1, 2), b.permute(2, 1, 0)
    return b.permute(2, 0, 1), a


def expert_targets(model: PreTrainedModel, wanted: tuple[str, ...], blocks: list[str]) -> list[str]:
    """Return the whole names of the parameters of experts to adapt, in some blocks.

    Raises:
        RecipeError: For one that no expert has.
    """
    chosen = tuple(f"{block}." for block in blocks)
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
