"""FSDP2 and HSDP with raw `fully_shard`: 4-bit bytes are sharded and gathered as they are.

Accelerate's own FSDP2 wrapping leaves 4-bit weights out of sharding and is plain DDP on CPU.
"""

from collections.abc import Iterable

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from peft_dist.dist import Shard, World
from peft_dist.shard.engine import Engine


class FSDP2Engine(Engine):
    """The base sharded over every process."""

    sharded = True

    def __init__(self, world: World, *, shard_size: int) -> None:
        """Make the mesh. Collective."""
        super().__init__(world, shard_size=shard_size)
        self.mesh = self._make_mesh()
        axis = self.mesh["shard"]
        self.shard = Shard(axis.get_local_rank(), axis.size(), axis.get_group())

    def _make_mesh(self) -> DeviceMesh:
        kind = self.world.device.type
        return init_device_mesh(kind, (self.world.size,), mesh_dim_names=("shard",))

    def wrap(
        self, model: nn.Module, blocks: Iterable[nn.Module], adapter: Iterable[nn.Parameter]
    ) -> None:
        """Shard each block as one unit and the rest as another, and leave the adapter whole."""
        trained = set(adapter)
        for block in blocks:
            fully_shard(block, mesh=self.mesh, reshard_after_forward=True, ignored_params=trained)
        fully_shard(model, mesh=self.mesh, ignored_params=trained)


class HSDPEngine(FSDP2Engine):
    """The base sharded inside groups of `shard_size` neighbours; the groups are replicas.

    Between groups only adapter gradients travel.
    """

    def _make_mesh(self) -> DeviceMesh:
        size, shards = self.world.size, self.shard_size
        assert size % shards == 0, (size, shards)
        return init_device_mesh(
            self.world.device.type,
            (size // shards, shards),
            mesh_dim_names=("replicate", "shard"),
        )
