"""The optimizer of an adapter, its state shared by DeepSpeed among all processes.

Knows DeepSpeed's engine by what it is given alone; it is imported nowhere here.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from peft_dist.distributed.collectives import Shard
from peft_dist.optim.optimizer import AdapterOptimizer, Moments


class Flat(nn.Module):
    """A function whose gradients are given: what DeepSpeed differentiates in place of the model."""

    def __init__(self, parameters: Iterable[nn.Parameter], gradients: Iterable[torch.Tensor]):
        super().__init__()
        self.values = nn.ParameterList(parameters)
        self.gradients = tuple(gradients)

    def forward(self) -> torch.Tensor:
        """Return the sum of parameter x gradient."""
        products = [
            torch.dot(value, gradient)
            for value, gradient in zip(self.values, self.gradients, strict=True)
        ]
        return torch.stack(products).sum()


class SharedOptimizer(AdapterOptimizer):
    """An optimizer of which each process keeps the state of, and updates, its share.

    DeepSpeed moves the parameters it is given into buffers of its own, so they are copied back.
    """

    def __init__(
        self, engine: Any, values: nn.ParameterList, targets: list[torch.Tensor], shard: Shard
    ) -> None:
        self._engine, self._values, self._targets, self._shard = engine, values, targets, shard

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups, whose learning rates may be set."""
        groups: list[dict[str, Any]] = self._engine.optimizer.param_groups
        return groups

    def step(self, finite: torch.Tensor) -> None:
        """Update this process's share and gather the others', where `finite` is true. Collective.

        It stays on the device: DeepSpeed runs either way, and AdamW's fused kernel leaves weights,
        moments and count alone where they must not change (see `AdapterOptimizer.step`).
        """
        self._engine.optimizer.optimizer.found_inf = (~finite).float()
        self._engine.backward(self._engine())
        self._engine.step()
        with torch.no_grad():
            for target, value in zip(self._targets, self._values, strict=True):
                target.copy_(value)

    def moments(self) -> Moments:
        """Return a copy of the state, gathered from all processes. Collective."""
        whole: dict[str, list[torch.Tensor]] = {"exp_avg": [], "exp_avg_sq": []}
        updates = 0
        for target, piece, state in self._pieces():
            updates = int(state.get("step", 0))
            for name, parts in whole.items():
                held = state.get(name, torch.zeros_like(piece))
                flat = self._shard.gather(held, piece.numel() * self._shard.count)
                parts.append(flat[: target.numel()].cpu())
        return Moments(torch.cat(whole["exp_avg"]), torch.cat(whole["exp_avg_sq"]), updates)

    def restore(self, moments: Moments) -> None:
        """Go on from a state, with the adapter as it stands now. Collective."""
        sizes = [target.numel() for target in self._targets]
        means, squares = moments.mean.split(sizes), moments.square.split(sizes)
        with torch.no_grad():
            for target, value in zip(self._targets, self._values, strict=True):
                value.copy_(target)
            for (target, piece, state), mean, square in zip(
                self._pieces(), means, squares, strict=True
            ):
                piece.copy_(self._share(target, piece))
                state["step"] = torch.tensor(float(moments.updates), device=piece.device)
                state["exp_avg"] = self._share(mean, piece)
                state["exp_avg_sq"] = self._share(square, piece)

    def _pieces(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]]:
        """Yield each flat parameter, this process's piece of DeepSpeed's copy, and its state.

        The pieces are equal; the last is padded.
        """
        zero = self._engine.optimizer
        pieces = zero.single_partition_of_fp32_groups
        for target, piece in zip(self._targets, pieces, strict=True):
            yield target, piece, zero.optimizer.state[piece]

    def _share(self, whole: torch.Tensor, piece: torch.Tensor) -> torch.Tensor:
        """Return this process's share of a flat tensor, padded with zeros."""
        first = min(self._shard.index * piece.numel(), whole.numel())
        part = whole[first : first + piece.numel()].to(piece.device)
        share = torch.zeros_like(piece)
        share[: part.numel()] = part
        return share
