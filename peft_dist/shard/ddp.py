"""Plain data parallelism: the whole base on every process, adapter gradients averaged."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from peft_dist.dist import Shard, World
from peft_dist.shard.engine import Engine


class DDPEngine(Engine):
    """Replicas that read and quantize a share of the rows each, and exchange them once."""

    sharded = False

    def __init__(self, world: World, *, shard_size: int) -> None:
        """Read with all processes; no groups of its own."""
        super().__init__(world, shard_size=shard_size)
        self.shard = Shard(world.rank, world.size)

    def wrap(self, model: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """Leave the model as it is: nothing is sharded."""

    def ready(self, model: nn.Module) -> None:
        """Put torch's DDP around the loaded model.

        `init_sync` would broadcast the whole base; every replica has read the same bytes already,
        and its adapters depend on the seed alone.
        """
        on_gpu = self.world.device.type == "cuda"
        self._ddp = DistributedDataParallel(
            model,
            device_ids=[self.world.device.index] if on_gpu else None,
            init_sync=False,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model through DDP."""
        return self._ddp(*args, **kwargs)

    def reduces(self, now: bool) -> AbstractContextManager[None]:
        """Reduce in this backward, or keep gradients local."""
        return self._reduces() if now else self._ddp.no_sync()

    @contextmanager
    def _reduces(self) -> Iterator[None]:
        yield
