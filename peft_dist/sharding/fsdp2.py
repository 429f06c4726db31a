"""FSDP2 and HSDP with raw `fully_shard`: 4-bit bytes are sharded and gathered as they are.

Accelerate's own FSDP2 wrapping leaves 4-bit weights out of sharding and is plain DDP on CPU.
"""

import logging
import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather
from torch.distributed.tensor import Shard as Columns

from peft_dist.distributed.collectives import Shard
from peft_dist.distributed.world import World
from peft_dist.model import fill_base
from peft_dist.sharding.compute_timer import ComputeTimer
from peft_dist.sharding.dequantized import UngatheredWeights
from peft_dist.sharding.engine import Engine
from peft_dist.sharding.vocabulary import VocabularyUnit, vocabulary_units

log = logging.getLogger(__name__)


class _TimedAllGather(DefaultAllGather):
    """FSDP2's own all-gather, whose time is not this process's."""

    def __init__(self, compute_timer: ComputeTimer) -> None:
        super().__init__()
        self._own_time = compute_timer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._own_time.gathering():
            return super().__call__(*args, **kwargs)


def _columns(_parameter: nn.Parameter) -> Columns:
    return Columns(1)


class FSDP2Engine(Engine):
    """The base sharded over every process."""

    sharded = True

    def __init__(self, world: World, *, shard_size: int, offload: bool = False) -> None:
        """Make the mesh. Collective."""
        super().__init__(world, shard_size=shard_size, offload=offload)
        self.mesh = self._make_mesh()
        axis = self.mesh["shard"]
        self.shard = Shard(axis.get_local_rank(), axis.size(), axis.get_group())

    def _make_mesh(self) -> DeviceMesh:
        kind = self.world.device.type
        return init_device_mesh(kind, (self.world.size,), mesh_dim_names=("shard",))

    def wrap(
        self, model: nn.Module, blocks: Iterable[nn.Module], adapter: Iterable[nn.Parameter]
    ) -> None:
        """Shard each block as one unit, embedding and head as others, and the rest as one.

        The adapter is left whole.
        """
        trained, blocks = set(adapter), list(blocks)
        # Page-locked host memory is what a GPU can copy from while it computes.
        on_gpu = self.world.device.type == "cuda"
        policy = CPUOffloadPolicy(pin_memory=on_gpu) if self.offload else OffloadPolicy()
        shard = partial(fully_shard, mesh=self.mesh, ignored_params=trained, offload_policy=policy)
        sizes = [_bytes(set(block.parameters()) - trained) for block in blocks]
        kept = [UngatheredWeights(block) for block in blocks[: self.dequantized_blocks]]
        apart = set[nn.Parameter]()
        for one in kept:
            shard(one, ignored_params=trained | one.others())
            apart |= set(one.parameters()) - one.others()
        frees, ignored = self.reshard == "forward", trained | apart
        for block in blocks:
            shard(block, reshard_after_forward=frees, ignored_params=ignored)
        vocabulary = vocabulary_units(
            model,
            keeps=self.reshard == "step",
            shards=1 if self.offload else self.shard.count,
        )
        head = next((own for own in vocabulary if own.is_head), None)
        ahead = blocks_ahead(sizes, 0 if head is None else _bytes(head.parameters()))
        for own in vocabulary:
            shard(own, shard_placement_fn=_columns if own.by_columns else None)
            own.watch(model, self.shard, self.compute_timer)
            self.exchanges_rows |= own.exchanges_rows
        elsewhere = {parameter for own in vocabulary for parameter in own.parameters()}
        shard(model, ignored_params=trained | apart | elsewhere)
        gather = _TimedAllGather(self.compute_timer)
        modules = [*model.modules(), *vocabulary]
        self._units = [one for one in modules if isinstance(one, FSDPModule)]
        for unit in self._units:
            unit.set_custom_all_gather(gather)
            unit.set_reshard_after_backward(self.reshard != "step", recurse=False)
        model.register_forward_hook(self._after_forward)
        _gather_ahead(model, blocks, head, ahead)
        log.info("gathers: asked for %d blocks before their use", ahead)

    def _after_forward(self, *_: Any) -> None:
        """Free everything after a pass that has no backward, in which it would be freed."""
        if not torch.is_grad_enabled():
            self._release()

    def _release(self) -> None:
        """Free what is gathered; each process has its own part alone again."""
        for unit in self._units:
            unit.reshard()

    def zero_gradients(self) -> None:
        """Forget the gradients, and free what was kept for the passes of the step."""
        super().zero_gradients()
        self._release()

    def materialize(self, model: nn.Module) -> None:
        """Give every parameter memory, in the host where the base is offloaded."""
        waits = torch.device("cpu") if self.offload else self.world.device

        def make(parameter: nn.Parameter) -> nn.Parameter:
            device = self.world.device if parameter.requires_grad else waits
            empty = torch.empty_like(parameter, device=device)
            return nn.Parameter(empty, parameter.requires_grad)

        fill_base.materialize(model, self.world.device, make)


def blocks_ahead(block_bytes: list[int], head_bytes: int) -> int:
    """Return how many blocks before it is used a block, and the head, is asked for.

    Gathers come one after another, and one hides behind a block's products where that takes no
    longer than they do. Then so does the head's behind those of so many blocks that have as many
    bytes, if the gathers of these are through before it begins.

    Args:
        block_bytes: Of the base in each block.
        head_bytes: Of the head, where it is gathered by itself; else 0.
    """
    largest = max(block_bytes, default=0)
    wanted = math.ceil(head_bytes / largest) if largest else 1
    return max(1, min(wanted, len(block_bytes) - 1))


def _gather_ahead(
    model: nn.Module, blocks: list[nn.Module], head: VocabularyUnit | None, ahead: int
) -> None:
    """Ask for blocks and head before they are used in forward; in backward FSDP2 does so itself."""
    for index, block in enumerate(blocks):
        assert isinstance(block, FSDPModule)
        block.set_modules_to_forward_prefetch(blocks[index + 1 : index + 1 + ahead])  # type: ignore[arg-type]
    if head is not None:
        head.watch_for(model, blocks[-min(ahead, len(blocks))])


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.nbytes for parameter in parameters)


class HSDPEngine(FSDP2Engine):
    """The base sharded inside groups of `shard_size` neighbours; the groups are replicas.

    Between groups only adapter gradients travel.
    """

    def _make_mesh(self) -> DeviceMesh:
        size, shards = self.world.size, self.shard_size
        assert size % shards == 0, (size, shards)
        # Not a mesh of two axes, whose second communicator would take memory and never be used:
        # no parameter that is sharded has a gradient.
        group, _ = torch_dist.new_subgroups(shards)
        return DeviceMesh.from_group(group, self.world.device.type, mesh_dim_names=("shard",))
