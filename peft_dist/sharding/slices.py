"""A head held by rows of the vocabulary: each process scores the positions of all against its own.

Where a micro-batch has few labelled positions, their hidden states are fewer bytes than the matrix.
"""

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from peft_dist.data.pack import Everyone
from peft_dist.distributed.collectives import Shard
from peft_dist.model.cross_entropy import After
from peft_dist.model.sliced_cross_entropy import (
    LEAST_SPARED_BYTES,
    Slices,
    scored_bytes,
    sliced_cross_entropy,
)
from peft_dist.model.token_rows import OutputMatrix
from peft_dist.sharding.compute_timer import ComputeTimer


class SlicedHead:
    """Scores positions against a frozen head, of which each process holds a slice."""

    def __init__(self, head: nn.Linear, shard: Shard, timer: ComputeTimer) -> None:
        """Take a head that is sharded by rows.

        Args:
            head: The module.
            shard: Who holds which rows.
            timer: Leaves out what may be waiting for others.
        """
        self._head = head
        self._slices = Slices(head.weight.shape[0], shard, timer.gathering)

    def most_targets(self, hidden_bytes: int, *, learns: bool) -> int:
        """Return for how many labelled positions of a process slices pay, at most.

        Args:
            hidden_bytes: Of the hidden states of a position, as they would travel.
            learns: Whether gradients travel back.
        """
        each = scored_bytes(1, hidden_bytes, self._slices.shard.count, learns=learns)
        return max(0, self._head.weight.nbytes - 1 - LEAST_SPARED_BYTES) // each

    def pays(self, everyone: Everyone, hidden_bytes: int) -> bool:
        """Whether scoring in slices carries fewer bytes than the matrix has; the same everywhere.

        In training, all micro-batches of a step against one matrix, whether it would stay gathered
        or not: so a run goes on to the bit where it keeps blocks longer than before.

        Args:
            everyone: What all processes compute now.
            hidden_bytes: Of the hidden states of a position, as they would travel.
        """
        if not isinstance(self._head.weight, DTensor):
            return False  # it is here, for an earlier micro-batch of the step
        learns = torch.is_grad_enabled()
        targets = everyone.targets_of_step if learns else everyone.most_targets
        return 0 < targets <= self.most_targets(hidden_bytes, learns=learns)

    def cross_entropy(
        self, hidden: torch.Tensor, targets: torch.Tensor, after: After | None, most: int
    ) -> torch.Tensor:
        """Return the losses, float32 [N], of targets [N] given hidden [N, H]. Collective."""
        bias = self._head.bias
        own = OutputMatrix(_local(self._head.weight), None if bias is None else _local(bias))
        return sliced_cross_entropy(hidden, own, targets, after, most=most, slices=self._slices)


def _local(parameter: torch.Tensor) -> torch.Tensor:
    assert isinstance(parameter, DTensor)
    return parameter.to_local().detach()
