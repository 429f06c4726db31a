"""Plain data parallelism: the whole base on every process."""

from collections.abc import Iterable

from torch import nn

from peft_dist.distributed.collectives import Shard
from peft_dist.distributed.world import World
from peft_dist.sharding.engine import Engine


class DDPEngine(Engine):
    """Replicas that read and quantize a share of the rows each, and exchange them once."""

    sharded = False

    def __init__(self, world: World, *, shard_size: int, offload: bool = False) -> None:
        """Read with all processes; no groups of its own."""
        assert not offload, "there is no part of the base that could wait"
        super().__init__(world, shard_size=shard_size)
        self.shard = Shard(world.rank, world.size)

    def wrap(
        self, model: nn.Module, blocks: Iterable[nn.Module], adapter: Iterable[nn.Parameter]
    ) -> None:
        """Leave the model as it is: nothing is sharded."""
