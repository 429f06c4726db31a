"""Frozen experts, in 4 bits or not: one or two tensors hold all of a layer, and those hit are used.

transformers keeps the experts of a layer as 3-D parameters and lets their forward be chosen by
name (`integrations/moe.py`). Ours is one of those names. The bytes are those of `nf4.py`, one
dimension up, and are sharded on the experts. A LoRA of each expert is added where its product is
made, so that no weight of an expert is ever changed.
"""

from collections.abc import Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from peft_dist.model.nf4 import dequantize
from peft_dist.model.special_cases import DENSE_EXPERTS

OWN_EXPERTS = "peft_dist_experts"
"""The name it has in transformers."""
PACKED, ABSMAX = "_packed", "_absmax"
"""Behind a parameter's name: its codes, uint8 [E, rows, columns / 2], and its scales as bytes."""


class LowRank(NamedTuple):
    """What a LoRA adds to each expert's weight, as it is stored: scaling * left @ right."""

    left: Sequence[torch.Tensor]
    """Of each expert [rows, r]."""
    right: Sequence[torch.Tensor]
    """Of each expert [r, columns]."""
    scaling: float

    def times(self, x: torch.Tensor, expert: int, *, turned: bool) -> torch.Tensor:
        """Multiply x [n, in] with what is added to one expert's weight, or its transpose."""
        left, right = self.left[expert], self.right[expert]
        if turned:
            return (x @ left * self.scaling) @ right
        return (x @ right.t() * self.scaling) @ left.t()


def expert_parameters(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the 3-D parameters of experts whose forward can be ours, with their modules."""
    return {
        f"{module_name}.{name}": module
        for module_name, module in model.named_modules()
        if (hasattr(module, "is_transposed") and hasattr(module, "_is_expert_parallel"))
        or type(module).__name__ in DENSE_EXPERTS
        for name, parameter in module.named_parameters(recurse=False)
        if name.removesuffix(PACKED) in ("gate_up_proj", "up_proj", "down_proj")
        and parameter.dim() == 3
    }


def use_own_experts(model: PreTrainedModel) -> None:
    """Let a model compute its experts with the forward of this module."""
    ALL_EXPERTS_FUNCTIONS.register(OWN_EXPERTS, experts_forward)
    model.set_experts_implementation(OWN_EXPERTS)
    for module in model.modules():
        if type(module).__name__ in DENSE_EXPERTS:
            module.forward = MethodType(dense_experts_forward, module)


def swap_experts(model: PreTrainedModel, name: str, module: nn.Module, block_size: int) -> None:
    """Put 4-bit tensors in the place of a 3-D parameter, on `meta`."""
    attribute = name.rpartition(".")[2]
    count, rows, columns = module.get_parameter(attribute).shape
    del module._parameters[attribute]
    for end, width in ((PACKED, columns // 2), (ABSMAX, columns // block_size * 4)):
        empty = torch.empty(count, rows, width, dtype=torch.uint8, device="meta")
        module.register_parameter(attribute + end, nn.Parameter(empty, requires_grad=False))
    module.__dict__[f"{attribute}_block_size"] = block_size
    use_own_experts(model)


class _FrozenExpertMatmul(torch.autograd.Function):
    """x @ the weight of one expert, or its transpose, with a gradient for x alone.

    As in `nf4._FrozenMatmul` the parameters themselves are saved: an engine frees and gathers them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        packed: torch.Tensor,
        absmax: torch.Tensor,
        expert: int,
        block_size: int,
        turned: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(packed, absmax)
        ctx.facts = expert, block_size, turned
        weight = expert_weight(packed, absmax, expert, block_size=block_size, dtype=x.dtype)
        return x @ (weight if turned else weight.t())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        expert, block_size, turned = ctx.facts
        packed, absmax = ctx.saved_tensors
        weight = expert_weight(packed, absmax, expert, block_size=block_size, dtype=grad.dtype)
        return grad @ (weight.t() if turned else weight), None, None, None, None, None


def expert_weight(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    expert: int,
    *,
    block_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the float weight [rows, columns] of one expert."""
    return dequantize(packed[expert], absmax[expert], block_size=block_size, dtype=dtype)


def _project(
    module: Any, attribute: str, x: torch.Tensor, expert: int, added: LowRank | None
) -> torch.Tensor:
    """Multiply x [n, in] with one expert's weight, and add its bias where it has one."""
    turned = getattr(module, "is_transposed", True)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if attribute in module._parameters:
        weight = getattr(module, attribute)[expert]
        y: torch.Tensor = x @ (weight if turned else weight.t())
    else:
        y = _FrozenExpertMatmul.apply(  # type: ignore[no-untyped-call]  # it is torch's
            x,
            getattr(module, attribute + PACKED),
            getattr(module, attribute + ABSMAX),
            expert,
            getattr(module, f"{attribute}_block_size"),
            turned,
        )
    if getattr(module, "has_bias", False):
        y = y + getattr(module, f"{attribute}_bias")[expert].to(y.dtype)
    if added is not None:
        y = y + added.times(x, expert, turned=turned)
    return y


def _added(module: Any, attribute: str) -> LowRank | None:
    """Return what a LoRA adds to a parameter now; see `methods/expert_lora.py`."""
    lora = module.__dict__.get(f"{attribute}_lora")
    found: LowRank | None = None if lora is None else lora.low_rank()
    return found


def tokens_of_experts(chosen: torch.Tensor, count: int) -> list[int]:
    """Return how many of `chosen`, int64 numbers of `count` experts, are each expert's."""
    return torch.bincount(chosen, minlength=count).tolist()


def experts_forward(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Send each token through its experts; see `batched_mm_experts_forward` of transformers.

    Args:
        self: The module that holds the experts of a layer.
        hidden_states: [T, H].
        top_k_index: int64 [T, k], the experts of each token.
        top_k_weights: [T, k], what each counts.

    Returns:
        [T, H], the weighted sum of a token's experts, in an order that does not depend on a device.
    """
    top_k = top_k_index.shape[-1]
    experts = top_k_index.reshape(-1)
    order = torch.sort(experts, stable=True).indices
    counts = tokens_of_experts(experts, self.num_experts)
    first = "gate_up_proj" if self.has_gate else "up_proj"
    added = {name: _added(self, name) for name in (first, "down_proj")}
    outputs = []
    for expert, places in enumerate(order.split(counts)):
        if not len(places):
            continue
        y = _project(self, first, hidden_states[places // top_k], expert, added[first])
        y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
        y = _project(self, "down_proj", y, expert, added["down_proj"])
        outputs.append(self.post_expert_norm(y) if self.has_post_expert_norm else y)
    joined = torch.cat(outputs)[torch.argsort(order)]
    weighted = joined * top_k_weights.reshape(-1, 1)
    summed = weighted.view(len(hidden_states), top_k, -1).sum(dim=1)
    return summed.to(hidden_states.dtype)


def dense_experts_forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Send as many rows through each expert; see `Llama4TextExperts` of transformers.

    Args:
        self: The module that holds the experts of a layer.
        hidden_states: [E * T, H], expert by expert.

    Returns:
        [E * T, H].
    """
    added = {name: _added(self, name) for name in ("gate_up_proj", "down_proj")}
    outputs = []
    for expert, x in enumerate(hidden_states.chunk(self.num_experts)):
        products = _project(self, "gate_up_proj", x, expert, added["gate_up_proj"])
        gate, up = products.chunk(2, dim=-1)
        y = up * self.act_fn(gate)
        outputs.append(_project(self, "down_proj", y, expert, added["down_proj"]))
    return torch.cat(outputs).to(hidden_states.dtype)
