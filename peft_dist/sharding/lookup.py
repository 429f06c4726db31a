"""An embedding held by columns: each process looks the tokens of all up in its own.

An embedding needs the rows of its tokens, not its matrix. By columns, every process has as much to
look up and to send as any other, whatever the tokens are, and all sizes are known on the host.
"""

from typing import Any

import torch
import torch.distributed as torch_dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from peft_dist.data.pack import Everyone
from peft_dist.distributed.collectives import Shard
from peft_dist.model.gathered import Gathers
from peft_dist.sharding.compute_timer import ComputeTimer

ALIGNED_COLUMNS = 8
"""As few as a shard may have, and what their number is a multiple of."""
ID_DTYPE = torch.int32
"""Of the ids that processes tell each other."""


def can_be_columns(embedding: nn.Embedding, shards: int) -> bool:
    """Whether an embedding has equal columns for so many shards, each a whole number of words."""
    return shards > 1 and embedding.embedding_dim % (shards * ALIGNED_COLUMNS) == 0


def exchanged_bytes(positions: int, row_bytes: int, shards: int) -> int:
    """Return what an exchange carries to and from one process: ids, and rows of its tokens.

    Args:
        positions: Most of any process.
        row_bytes: Of a row of the embedding.
        shards: Processes that hold one copy of it.
    """
    return positions * (shards * ID_DTYPE.itemsize + row_bytes)


class ColumnLookup:
    """Gives a frozen embedding the rows of its tokens, or gathers it where that is fewer bytes."""

    def __init__(
        self, embedding: nn.Embedding, whole: Gathers, shard: Shard, timer: ComputeTimer
    ) -> None:
        """Take an embedding that is sharded by columns.

        Args:
            embedding: The module.
            whole: Gathers it.
            shard: Who holds which columns.
            timer: Leaves out what may be waiting for others.
        """
        self._embedding, self._whole, self._shard, self._timer = embedding, whole, shard, timer
        self._everyone: Everyone | None = None

    def watch(self, model: nn.Module, *, keeps: bool) -> None:
        """Do so in each pass of a wrapped model, which is called with a `Batch`, from now on.

        Args:
            model: As an engine wraps it.
            keeps: Whether what is gathered stays for the other micro-batches of the step.
        """
        self._keeps = keeps
        # It is for the gradient of a trained one, and may be no row of those that are looked up.
        self._embedding.padding_idx = None
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end, always_call=True)
        self._embedding.register_forward_pre_hook(self._before)
        self._embedding.register_forward_hook(self._after, always_call=True)

    def _begin(self, _model: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._everyone = arguments[0].everyone

    def _end(self, *_: Any) -> None:
        self._everyone = None

    def _before(
        self, embedding: nn.Module, arguments: tuple[torch.Tensor]
    ) -> tuple[torch.Tensor] | None:
        """Put the rows of the ids in the matrix's place, and their places in that of the ids.

        So a class of its own, which may scale its rows, goes on as ever.
        """
        (ids,), weight = arguments, embedding.weight
        if self._everyone is None or not isinstance(weight, DTensor) or self._gathers(weight):
            self._whole.gather()
            return None
        with self._timer.gathering():
            rows = self._rows(ids.flatten(), weight.to_local(), self._everyone.most)
        embedding.__dict__["weight"] = rows  # comes before a module's parameters
        return (torch.arange(len(rows), device=ids.device).view(ids.shape),)

    def _after(self, embedding: nn.Module, *_: Any) -> None:
        if embedding.__dict__.pop("weight", None) is None:
            self._whole.free()

    def _gathers(self, weight: torch.Tensor) -> bool:
        """Whether the matrix is fewer bytes; the same on every process."""
        assert self._everyone is not None
        stays = self._keeps and torch.is_grad_enabled()
        positions = self._everyone.of_step if stays else self._everyone.most
        row_bytes = weight.shape[1] * weight.element_size()
        return exchanged_bytes(positions, row_bytes, self._shard.count) >= weight.nbytes

    def _rows(self, ids: torch.Tensor, columns: torch.Tensor, most: int) -> torch.Tensor:
        """Return the rows [T, H] of ids [T], of which T is at most `most` anywhere. Collective."""
        count, group = self._shard.count, self._shard.group
        own = functional.pad(ids.to(ID_DTYPE), (0, most - len(ids)))
        asked = own.new_empty(count * most)
        torch_dist.all_gather_into_tensor(asked, own, group=group)
        found = functional.embedding(asked, columns)
        parts = torch.empty_like(found)
        torch_dist.all_to_all_single(parts, found, group=group)
        return parts.view(count, most, -1)[:, : len(ids)].transpose(0, 1).flatten(1)
