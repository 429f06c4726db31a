"""What every sharding engine does for the trainer.

The base is bytes: an engine decides where they live. The adapter is small and precious: every
process holds all of it, in one flat buffer, with one exchange per optimizer step. An engine knows
no recipe, no data and no optimizer.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from peft_dist.config.parallel import Reshard
from peft_dist.distributed.collectives import Shard, gather_objects, sum_over
from peft_dist.distributed.world import World
from peft_dist.model import fill_base
from peft_dist.model.fingerprint import fingerprint_piece, fingerprint_rows, wrap_int64
from peft_dist.optim.optimizer import AdapterOptimizer, Group
from peft_dist.sharding.compute_timer import ComputeTimer

SHARED_EXTRAS = 4
"""Values carried by the gradient all-reduce, one for all processes: the loss and three flags."""
RANK_EXTRAS = 2
"""Values carried by it for each process: its own time, and its memory."""

_DISTURBANCE = 0.02
"""Most by which a value of an adapter is changed for a while."""


class Engine(ABC):
    """One way to place a frozen base on many processes, and what they share of the adapter.

    Attributes:
        shard: Which rows of every base tensor this process reads.
        sharded: Whether it keeps those rows alone.
        extras: Number of flags and metrics carried by the gradient all-reduce.
        compute_timer: Times this process's own part of a step.
        reshard: When gathered blocks are freed, by an engine that gathers; set before `wrap`.
        exchanges_rows: Whether passes use what a `Batch` says of everyone; known after `wrap`.
    """

    shard: Shard
    sharded: bool
    reshard: Reshard = "forward"
    exchanges_rows = False

    def __init__(self, world: World, *, shard_size: int, offload: bool = False) -> None:
        """Make the groups and meshes the engine needs. Collective.

        Args:
            world: Rank and size of this process's world.
            shard_size: Processes that hold one copy of the base together.
            offload: Keep this process's part of the base in host memory while it is not needed.
        """
        self.world = world
        self.shard_size = shard_size
        self.offload = offload
        self.extras = SHARED_EXTRAS + RANK_EXTRAS * world.size
        self.compute_timer = ComputeTimer(world.device)

    @abstractmethod
    def wrap(
        self, model: nn.Module, blocks: Iterable[nn.Module], adapter: Iterable[nn.Parameter]
    ) -> None:
        """Shard the base of a model on `meta`, adapters attached, before any weight is read."""

    def materialize(self, model: nn.Module) -> None:
        """Give every parameter memory: this process's part of the base, the adapter whole."""
        fill_base.materialize(model, self.world.device)

    def flatten_adapter(
        self,
        parameters: dict[str, nn.Parameter],
        group_of: Callable[[str], Group],
        *,
        figures: int = 0,
    ) -> None:
        """Move the trained parameters, and their gradients, into flat buffers.

        One buffer is one all-reduce, one norm and one optimizer kernel, where hundreds of small
        tensors would be hundreds. Parameters of one group lie side by side.

        Args:
            parameters: Every trained parameter by name, float32, the same on every process.
            group_of: The group of a parameter, by its name.
            figures: How many figures of a step the all-reduce carries besides its own.
        """
        self.extras += figures
        self._group_of = group_of
        self._group_sizes: dict[Group, int] = {}
        for name, parameter in parameters.items():
            group = group_of(name)
            self._group_sizes[group] = self._group_sizes.get(group, 0) + parameter.numel()
        rank_of_group = {group: index for index, group in enumerate(self._group_sizes)}
        ordered = sorted(parameters.items(), key=lambda item: rank_of_group[group_of(item[0])])
        self._shapes = {name: parameter.shape for name, parameter in ordered}
        sizes = [parameter.numel() for _, parameter in ordered]
        self._values = torch.empty(sum(sizes), device=self.world.device)
        self._reduced = torch.zeros(sum(sizes) + self.extras, device=self.world.device)
        values, gradients = self._values.split(sizes), self.gradients.split(sizes)
        for (_, parameter), value, gradient in zip(ordered, values, gradients, strict=True):
            assert parameter.dtype == torch.float32, parameter.dtype
            value.copy_(parameter.detach().reshape(-1))
            parameter.data = value.view(parameter.shape)
            parameter.grad = gradient.view(parameter.shape)

    def flat_parameters(self) -> dict[Group, nn.Parameter]:
        """Return what an optimizer updates: each group as one vector, with its gradient."""
        sizes = list(self._group_sizes.values())
        flat = {}
        for group, values, gradient in zip(
            self._group_sizes, self._values.split(sizes), self.gradients.split(sizes), strict=True
        ):
            flat[group] = nn.Parameter(values)
            flat[group].grad = gradient
        return flat

    def group_shapes(self) -> dict[Group, list[torch.Size]]:
        """Return the shapes of what lies in each of `flat_parameters`, in order."""
        shapes: dict[Group, list[torch.Size]] = {}
        for name, shape in self._shapes.items():
            shapes.setdefault(self._group_of(name), []).append(shape)
        return shapes

    def share_optimizer(self, optimizer: torch.optim.AdamW) -> AdapterOptimizer:
        """Return what updates `flat_parameters` from their gradients, perhaps shared by processes.

        Gradients are the same on every process when it steps, and so are the parameters after it.
        Call it when the parameters have the values that training starts from.
        """
        return AdapterOptimizer(optimizer)

    def backward(self, loss: torch.Tensor) -> None:
        """Go back from a loss that is part of no step; nothing is left gathered."""
        loss.backward()

    def gradient_of(self, loss: torch.Tensor) -> torch.Tensor:
        """Return this process's flat gradient of a loss that is part of no step; none is left."""
        self.backward(loss)
        found = self.gradients.clone()
        self.zero_gradients()
        return found

    @contextmanager
    def disturbed_adapter(self) -> Iterator[None]:
        """Let every value of the adapter be another for a while: at zero some have no gradient."""
        kept = self._values.clone()
        random = torch.Generator(self._values.device).manual_seed(0)
        noise = torch.rand(kept.shape, generator=random, device=kept.device)
        self._values.add_(noise, alpha=_DISTURBANCE)
        del noise
        try:
            yield
        finally:
            self._values.copy_(kept)

    def reduce(self, extras: torch.Tensor) -> torch.Tensor:
        """Sum gradients and `extras`, float32 [extras]; return the summed extras. Collective."""
        self._reduced[-self.extras :] = extras
        sum_over(self._reduced)
        return self._reduced[-self.extras :].clone()

    def clip(self, max_norm: float) -> torch.Tensor:
        """Scale gradients to a global norm of at most `max_norm` (0: leave); return the norm."""
        norm: torch.Tensor = torch.linalg.vector_norm(self.gradients)
        if max_norm > 0.0:
            self.gradients.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @property
    def gradients(self) -> torch.Tensor:
        """The flat gradient, [trained parameters]."""
        return self._reduced[: -self.extras]

    def zero_gradients(self) -> None:
        """Forget the gradients of the last step, which ends here; the buffer stays."""
        self._reduced.zero_()

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """Return a copy of every trained tensor on the CPU, by name; the base does not move."""
        return self.by_name(self._values.cpu().clone())

    def load_adapter_state(self, state: dict[str, torch.Tensor]) -> None:
        """Write trained tensors, the same on every process."""
        self._values.copy_(self.flat(state))

    def by_name(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return views of a tensor that is laid out as the flat adapter, by name."""
        parts = flat.split([shape.numel() for shape in self._shapes.values()])
        return {
            name: part.view(shape)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    def flat(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return tensors by name as one vector, laid out as the flat adapter."""
        assert self._shapes.keys() == tensors.keys(), self._shapes.keys() ^ tensors.keys()
        return torch.cat([tensors[name].reshape(-1).float() for name in self._shapes])

    def adapters_agree(self) -> bool:
        """Whether every process holds the same adapter, to the bit. Collective."""
        return len(set(gather_objects(fingerprint_rows(self._values, 0)))) == 1

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """Return the shape of a parameter of the base, however much of it is here."""
        return parameter.shape

    def is_shard(self, parameter: nn.Parameter) -> bool:
        """Whether this process holds a part of the parameter alone."""
        return isinstance(parameter, DTensor)

    def local_elements(self, parameter: nn.Parameter) -> tuple[torch.Tensor, int]:
        """Return this process's elements of a parameter of the base and the place of the first.

        They lie side by side in it, but where it is sharded by columns.
        """
        if not isinstance(parameter, DTensor):
            return parameter.detach().reshape(-1), 0
        local = parameter.to_local().detach()
        if fill_base.is_columns(parameter):
            return local.reshape(-1), self.shard.index * local.shape[1]
        start, _ = self.shard.rows(parameter.shape[0])
        row_size = parameter.numel() // max(parameter.shape[0], 1)
        return local.reshape(-1), start * row_size

    def full_tensor(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return a parameter of the base whole, on the device. Collective."""
        if not isinstance(parameter, DTensor):
            return parameter.detach()
        local = parameter.to_local().detach().to(self.world.device)
        if fill_base.is_columns(parameter):
            return self.shard.gather(local.t().contiguous(), parameter.shape[1]).t().contiguous()
        return self.shard.gather(local, parameter.shape[0])

    def copy_into(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        """Write a whole tensor into a parameter, or this process's part of it."""
        with torch.no_grad():
            if isinstance(parameter, DTensor):
                axis = int(fill_base.is_columns(parameter))
                start, stop = self.shard.rows(value.shape[axis])
                parameter.to_local().copy_(value.narrow(axis, start, stop - start))
            else:
                parameter.copy_(value)

    def fingerprint(self, parameters: dict[str, nn.Parameter]) -> dict[str, int]:
        """Fingerprint the base as it stands in memory, over all its parts. Collective.

        A replicated parameter is hashed whole by every process: a replica that drifted differs.
        """
        sums: list[int] = []
        for parameter in parameters.values():
            elements, first = self.local_elements(parameter)
            shape = self.shape(parameter)
            row_size = shape.numel() // max(shape[0], 1)
            width = row_size // self.shard.count if fill_base.is_columns(parameter) else None
            found = fingerprint_piece(elements, first, row_size=row_size, width=width)
            sums.append(wrap_int64(found))
        total = torch.tensor(sums, dtype=torch.int64)
        if self.sharded and sums:
            total = sum_over(total.to(self.world.device), self.shard.group).cpu()
        return dict(zip(parameters, total.tolist(), strict=True))

    def total_bytes(self, parameters: dict[str, nn.Parameter]) -> int:
        """Return the bytes of one copy of the base, over all processes that hold it."""
        return sum(self.shape(p).numel() * p.element_size() for p in parameters.values())

    def expected_bytes(self, parameters: dict[str, nn.Parameter]) -> int:
        """Return the bytes of the base this process should hold, from shapes alone."""
        total = 0
        for parameter in parameters.values():
            if fill_base.is_columns(parameter):
                total += parameter.numel() // self.shard.count * parameter.element_size()
                continue
            rows = parameter.shape[0]
            start, stop = self.shard.rows(rows) if self.sharded else (0, rows)
            total += parameter.numel() // max(rows, 1) * (stop - start) * parameter.element_size()
        return total

    def resident_bytes(self, parameters: dict[str, nn.Parameter]) -> int:
        """Return the bytes of the base this process does hold."""
        return sum(
            self.local_elements(p)[0].numel() * p.element_size() for p in parameters.values()
        )
