"""What every sharding engine does for the trainer.

An engine decides where bytes live and how gradients are reduced. It knows no recipe, no data and
no optimizer.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from peft_dist.dist import Shard, World, gather_objects


class Engine(ABC):
    """One way to place a frozen base and its adapters on many processes.

    Attributes:
        shard: Which rows of every base tensor this process reads.
        sharded: Whether it keeps those rows alone.
    """

    shard: Shard
    sharded: bool

    def __init__(self, world: World, *, shard_size: int) -> None:
        """Make the groups and meshes the engine needs. Collective."""
        self.world = world
        self.shard_size = shard_size

    @abstractmethod
    def wrap(self, model: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """Shard a model on `meta`, adapters attached, before any weight is read."""

    @abstractmethod
    def ready(self, model: nn.Module) -> None:
        """Take the loaded model; called once, before the first pass."""

    @abstractmethod
    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""

    @abstractmethod
    def reduces(self, now: bool) -> AbstractContextManager[None]:
        """Return a context in which backward reduces gradients over processes, or not yet.

        Gradients are averaged over all processes of the world.
        """

    def clip(self, parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
        """Scale gradients to a global norm of at most `max_norm` (0: leave); return the norm."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if max_norm > 0.0:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def adapter_state(self, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        """Gather trained tensors one at a time, whole, on the CPU of rank 0. Collective.

        Every other rank gets an empty dict; the base does not move.
        """
        state: dict[str, torch.Tensor] = {}
        for name, parameter in parameters.items():
            value = parameter.detach()
            full = value.full_tensor() if isinstance(value, DTensor) else value
            if self.world.is_main:
                state[name] = full.cpu().clone()
        return state

    def load_adapter_state(
        self, parameters: dict[str, nn.Parameter], state: dict[str, torch.Tensor]
    ) -> None:
        """Write whole tensors, the same on every process, into the trained parameters."""
        assert parameters.keys() == state.keys(), parameters.keys() ^ state.keys()
        with torch.no_grad():
            for name, parameter in parameters.items():
                if isinstance(parameter, DTensor):
                    start, stop = self.shard.rows(parameter.shape[0])
                    parameter.to_local().copy_(state[name][start:stop])
                else:
                    parameter.copy_(state[name])

    def expected_bytes(self, parameters: dict[str, nn.Parameter]) -> int:
        """Return the bytes of these parameters this process should hold, from shapes alone."""
        total = 0
        for parameter in parameters.values():
            rows = parameter.shape[0]
            start, stop = self.shard.rows(rows) if self.sharded else (0, rows)
            total += parameter.numel() // max(rows, 1) * (stop - start) * parameter.element_size()
        return total

    @staticmethod
    def held_bytes(parameters: dict[str, nn.Parameter]) -> int:
        """Return the bytes of these parameters this process does hold."""
        total = 0
        for parameter in parameters.values():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            total += local.numel() * local.element_size()
        return total

    def held_by_rank(self, parameters: dict[str, nn.Parameter]) -> list[int]:
        """Return the bytes every rank holds, in rank order. Collective."""
        return gather_objects(self.held_bytes(parameters))
