"""AdamW over the flat adapter: a non-finite step changes nothing, and the state can be kept."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from peft_dist.config.recipe import Train


class Moments(NamedTuple):
    """An optimizer's state for the whole adapter, on the CPU."""

    mean: torch.Tensor
    """float32 [trained parameters], exponential average of gradients, in the order of the flat
    adapter."""
    square: torch.Tensor
    """float32 [trained parameters], of their squares."""
    updates: int
    """Steps that changed the adapter; what bias correction counts."""


class Group(NamedTuple):
    """Trained parameters that an optimizer treats alike."""

    decays: bool
    """Whether weight decay is for them; matrices decay, vectors do not."""
    rate_factor: float
    """Their learning rate over the recipe's."""


def make_adamw(parameters: Mapping[Group, nn.Parameter], train: Train) -> torch.optim.AdamW:
    """Return AdamW over the adapter; vectors (biases, magnitudes) do not decay.

    Groups are those that hold a parameter: DeepSpeed and torch's state loading trip over an empty
    one.

    Args:
        parameters: `Engine.flat_parameters`.
        train: The recipe's settings.
    """
    groups = [
        {
            "params": [flat],
            "weight_decay": train.weight_decay if group.decays else 0.0,
            "rate_factor": group.rate_factor,
        }
        for group, flat in parameters.items()
    ]
    return torch.optim.AdamW(groups, betas=train.betas, eps=train.epsilon, fused=True)


class AdapterOptimizer:
    """An optimizer whose state is whole on every process."""

    def __init__(self, optimizer: torch.optim.AdamW) -> None:
        """Take a fused AdamW over `Engine.flat_parameters`, before its first step."""
        self._optimizer = optimizer
        self._flat = [flat for group in optimizer.param_groups for flat in group["params"]]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups, whose learning rates may be set."""
        return self._optimizer.param_groups

    def step(self, finite: torch.Tensor) -> None:
        """Update the adapter from its gradients, where `finite` is true; it stays on the device."""
        # The fused kernel leaves weights, moments and count alone where this is 1; torch's own
        # gradient scaler works through the same attribute.
        self._optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self._optimizer.step()

    def moments(self) -> Moments:
        """Return a copy of the state. Collective."""
        states = [self._optimizer.state.get(flat, {}) for flat in self._flat]
        if not all(states):
            zeros = torch.zeros(sum(flat.numel() for flat in self._flat))
            return Moments(zeros, zeros.clone(), 0)
        return Moments(
            torch.cat([state["exp_avg"].cpu() for state in states]),
            torch.cat([state["exp_avg_sq"].cpu() for state in states]),
            int(states[0]["step"]),
        )

    def restore(self, moments: Moments) -> None:
        """Go on from a state, with the adapter as it stands now. Collective."""
        sizes = [flat.numel() for flat in self._flat]
        parts = zip(self._flat, moments.mean.split(sizes), moments.square.split(sizes), strict=True)
        for flat, mean, square in parts:
            self._optimizer.state[flat] = _state(flat, mean, square, moments.updates)


def _state(
    flat: torch.Tensor, mean: torch.Tensor, square: torch.Tensor, updates: int
) -> dict[str, torch.Tensor]:
    """Return AdamW's state of one parameter, as its fused kernel keeps it."""
    return {
        "step": torch.tensor(float(updates), device=flat.device),
        "exp_avg": mean.to(flat.device, copy=True),
        "exp_avg_sq": square.to(flat.device, copy=True),
    }
