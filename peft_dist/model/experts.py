"""Frozen experts, in 4 bits or not: one or two tensors hold all of a layer, and those hit are used.

transformers keeps the experts of a layer as 3-D parameters and lets their forward be chosen by
name (`integrations/moe.py`). Ours is one of those names. The bytes are those of `nf4.py`, one
dimension up, and are sharded on the experts. A LoRA of each expert is added where its product is
made, so that no weight of an expert is ever changed.
"""

from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from peft_dist.model import grouped
from peft_dist.model.grouped import Groups
from peft_dist.model.nf4 import dequantize
from peft_dist.model.special_cases import DENSE_EXPERTS

OWN_EXPERTS = "peft_dist_experts"
"""The name it has in transformers."""
PACKED, ABSMAX = "_packed", "_absmax"
"""Behind a parameter's name: its codes, uint8 [E, rows, columns / 2], and its scales as bytes."""


class LowRank(NamedTuple):
    """What a LoRA adds to each expert's weight, as it is stored: scaling * left @ right."""

    left: torch.Tensor
    """[E, rows, r]."""
    right: torch.Tensor
    """[E, r, columns]."""
    scaling: float


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


Tokens = list[int] | Groups
"""How many tokens each expert has, which the host knows, or which are whose, on the device."""


def _project(
    module: Any, attribute: str, x: torch.Tensor, experts: torch.Tensor, tokens: Tokens
) -> torch.Tensor:
    """Multiply tokens with their experts' weights, and add biases and a LoRA where there are any.

    Args:
        module: The experts of a layer.
        attribute: The name of their weights.
        x: [S, in], sorted by expert.
        experts: int64 [S], those of the tokens.
        tokens: The same by expert.

    Returns:
        [S, out].
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    lora = module.__dict__.get(f"{attribute}_lora")  # see `methods/expert_lora.py`
    added: LowRank | None = None if lora is None else lora.low_rank()
    if isinstance(tokens, list):
        y = _one_by_one(module, attribute, x, tokens, added)
    else:
        y = _by_group(module, attribute, x, tokens, added)
    if getattr(module, "has_bias", False):
        y = y + getattr(module, f"{attribute}_bias")[experts].to(y.dtype)
    return y


def _one_by_one(
    module: Any, attribute: str, x: torch.Tensor, tokens: list[int], added: LowRank | None
) -> torch.Tensor:
    """Multiply the tokens of one expert after those of another; of the others nothing is made."""
    turned = getattr(module, "is_transposed", True)
    frozen = attribute not in module._parameters
    # All experts at once: a gradient of one alone would be as large as that of all.
    left, right = ((), ()) if added is None else (added.left.unbind(0), added.right.unbind(0))
    outputs = []
    for expert, part in enumerate(x.split(tokens)):
        if not len(part):
            continue
        if frozen:
            y = _FrozenExpertMatmul.apply(  # type: ignore[no-untyped-call]  # it is torch's
                part,
                getattr(module, attribute + PACKED),
                getattr(module, attribute + ABSMAX),
                expert,
                getattr(module, f"{attribute}_block_size"),
                turned,
            )
        else:
            weight = getattr(module, attribute)[expert]
            y = part @ (weight if turned else weight.t())
        if added is not None:
            first, second = left[expert], right[expert]
            first, second = (first, second) if turned else (second.t(), first.t())
            y = y + (part @ first * added.scaling) @ second
        outputs.append(y)
    return torch.cat(outputs)


def _by_group(
    module: Any, attribute: str, x: torch.Tensor, tokens: Groups, added: LowRank | None
) -> torch.Tensor:
    """Multiply all tokens in one call."""
    turned = getattr(module, "is_transposed", True)
    if attribute in module._parameters:
        y = grouped.times(x, getattr(module, attribute).to(x.dtype), tokens, turned=turned)
    else:
        y = grouped.times_frozen(
            x,
            getattr(module, attribute + PACKED),
            getattr(module, attribute + ABSMAX),
            tokens,
            block_size=getattr(module, f"{attribute}_block_size"),
            turned=turned,
        )
    if added is None:
        return y
    more = grouped.times_low_rank(x, added.left, added.right, tokens, turned=turned)
    return y + more * added.scaling


def _tokens_of(
    module: Any, names: tuple[str, ...], x: torch.Tensor, experts: torch.Tensor
) -> Tokens:
    """Return which of some sorted tokens each expert has, in the way that products want it."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    own = module._parameters
    sides = [s for n in names for s in own[n if n in own else n + PACKED].shape[1:]]
    if grouped.has_kernel(x.device, dtype) and not any(side % grouped.ALIGNED for side in sides):
        return grouped.groups_of(experts, module.num_experts)
    return tokens_of_experts(experts, module.num_experts)


def tokens_of_experts(chosen: torch.Tensor, count: int) -> list[int]:
    """Return how many of `chosen`, int64 numbers of `count` experts, are each expert's."""
    counts: list[int] = torch.bincount(chosen, minlength=count).tolist()
    return counts


def experts_forward(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Send each token through its experts; see `grouped_mm_experts_forward` of transformers.

    Args:
        self: The module that holds the experts of a layer.
        hidden_states: [T, H].
        top_k_index: int64 [T, k], the experts of each token.
        top_k_weights: [T, k], what each counts.

    Returns:
        [T, H], the weighted sum of a token's experts, in an order that does not depend on a device.
    """
    top_k = top_k_index.shape[-1]
    experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
    first = "gate_up_proj" if self.has_gate else "up_proj"
    tokens = _tokens_of(self, (first, "down_proj"), hidden_states, experts)
    y = _project(self, first, hidden_states[order // top_k], experts, tokens)
    y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
    y = _project(self, "down_proj", y, experts, tokens)
    if self.has_post_expert_norm:
        y = self.post_expert_norm(y)
    weighted = y[torch.argsort(order)] * top_k_weights.reshape(-1, 1)
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
    each = len(hidden_states) // self.num_experts
    experts = torch.arange(self.num_experts, device=hidden_states.device).repeat_interleave(each)
    tokens = [each] * self.num_experts
    gate, up = _project(self, "gate_up_proj", hidden_states, experts, tokens).chunk(2, dim=-1)
    y = _project(self, "down_proj", up * self.act_fn(gate), experts, tokens)
    return y.to(hidden_states.dtype)
