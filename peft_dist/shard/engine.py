"""What every sharding engine does for the trainer.

The base is bytes: an engine decides where they live. The adapter is small and precious: every
process holds all of it, in one flat buffer, with one exchange per optimizer step. An engine knows
no recipe, no data and no optimizer.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from peft_dist.dist import Shard, World, gather_objects, sum_over
from peft_dist.model.fingerprint import fingerprint_rows


class Engine(ABC):
    """One way to place a frozen base on many processes, and what they share of the adapter.

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
    def wrap(
        self, model: nn.Module, blocks: Iterable[nn.Module], adapter: Iterable[nn.Parameter]
    ) -> None:
        """Shard the base of a model on `meta`, adapters attached, before any weight is read."""

    def hold_adapter(self, parameters: dict[str, nn.Parameter]) -> None:
        """Move the trained parameters, and their gradients, into flat buffers.

        One buffer is one all-reduce, one norm and one optimizer kernel, where hundreds of small
        tensors would be hundreds. Matrices stand before vectors, for `flat_parameters`.

        Args:
            parameters: Every trained parameter by name, float32, the same on every process.
        """
        ordered = sorted(parameters.items(), key=lambda item: item[1].dim() <= 1)
        self._shapes = {name: parameter.shape for name, parameter in ordered}
        sizes = [parameter.numel() for _, parameter in ordered]
        self._matrix_count = sum(p.numel() for _, p in ordered if p.dim() > 1)
        self._values = torch.empty(sum(sizes), device=self.world.device)
        # The last place is for the loss, which travels with the gradients.
        self._reduced = torch.zeros(sum(sizes) + 1, device=self.world.device)
        values, gradients = self._values.split(sizes), self.gradients.split(sizes)
        for (_, parameter), value, gradient in zip(ordered, values, gradients, strict=True):
            assert parameter.dtype == torch.float32, parameter.dtype
            value.copy_(parameter.detach().reshape(-1))
            parameter.data = value.view(parameter.shape)
            parameter.grad = gradient.view(parameter.shape)

    def flat_parameters(self) -> tuple[nn.Parameter, nn.Parameter]:
        """Return what an optimizer updates: all matrices as one vector, and all vectors."""
        cut = self._matrix_count
        parts = []
        for part in (slice(None, cut), slice(cut, None)):
            flat = nn.Parameter(self._values[part])
            flat.grad = self.gradients[part]
            parts.append(flat)
        return parts[0], parts[1]

    def reduce(self, loss: torch.Tensor) -> torch.Tensor:
        """Sum gradients and loss over all processes; return the summed loss. Collective."""
        self._reduced[-1] = loss
        sum_over(self._reduced)
        return self._reduced[-1].clone()

    def clip(self, max_norm: float) -> torch.Tensor:
        """Scale gradients to a global norm of at most `max_norm` (0: leave); return the norm."""
        norm = torch.linalg.vector_norm(self.gradients)
        if max_norm > 0.0:
            self.gradients.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @property
    def gradients(self) -> torch.Tensor:
        """The flat gradient, [trained parameters]."""
        return self._reduced[:-1]

    def zero_gradients(self) -> None:
        """Forget the gradients of the last step; the buffer stays."""
        self._reduced.zero_()

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """Return a copy of every trained tensor on the CPU, by name; the base does not move."""
        parts = self._values.cpu().clone().split([s.numel() for s in self._shapes.values()])
        return {
            name: part.view(shape)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    def load_adapter_state(self, state: dict[str, torch.Tensor]) -> None:
        """Write trained tensors, the same on every process."""
        assert self._shapes.keys() == state.keys(), self._shapes.keys() ^ state.keys()
        self._values.copy_(torch.cat([state[name].reshape(-1).float() for name in self._shapes]))

    def adapters_agree(self) -> bool:
        """Say whether every process holds the same adapter, to the bit. Collective."""
        return len(set(gather_objects(fingerprint_rows(self._values, 0)))) == 1

    def expected_bytes(self, base: dict[str, nn.Parameter]) -> int:
        """Return the bytes of the base this process should hold, from shapes alone."""
        total = 0
        for parameter in base.values():
            rows = parameter.shape[0]
            start, stop = self.shard.rows(rows) if self.sharded else (0, rows)
            total += parameter.numel() // max(rows, 1) * (stop - start) * parameter.element_size()
        return total

    @staticmethod
    def held_bytes(base: dict[str, nn.Parameter]) -> int:
        """Return the bytes of the base this process does hold."""
        total = 0
        for parameter in base.values():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            total += local.numel() * local.element_size()
        return total
