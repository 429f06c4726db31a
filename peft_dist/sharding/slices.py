"""A head held by rows of the vocabulary: each process scores the positions of all against its own.

Where a micro-batch has few labelled positions, their hidden states are fewer bytes than the matrix.
"""

from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from peft_dist.data.pack import Everyone
from peft_dist.distributed.collectives import Shard
from peft_dist.model.cross_entropy import After
from peft_dist.model.sliced_cross_entropy import scored_bytes, sliced_cross_entropy
from peft_dist.model.token_rows import OutputMatrix
from peft_dist.sharding.compute_timer import ComputeTimer


class SlicedHead:
    """Scores positions against a frozen head, of which each process holds a slice."""

    def __init__(self, head: nn.Linear, shard: Shard, timer: ComputeTimer, *, keeps: bool) -> None:
        """Take a head that is sharded by rows.

        Args:
            head: The module.
            shard: Who holds which rows.
            timer: Leaves out what may be waiting for others.
            keeps: Whether a gathered head stays for the other micro-batches of the step.
        """
        self._head, self._shard, self._timer, self._keeps = head, shard, timer, keeps

    def pays(self, everyone: Everyone, hidden: torch.Tensor) -> bool:
        """Whether scoring in slices carries fewer bytes than the matrix has; the same everywhere.

        Args:
            everyone: What all processes compute now.
            hidden: [N, H], as it would travel.
        """
        weight = self._head.weight
        if not isinstance(weight, DTensor):
            return False  # it is here, for an earlier micro-batch of the step
        learns = torch.is_grad_enabled()
        targets = everyone.targets_of_step if self._keeps and learns else everyone.most_targets
        width = hidden.shape[1] * hidden.element_size()
        carried = scored_bytes(targets, width, self._shard.count, learns=learns)
        return 0 < carried < weight.nbytes

    def cross_entropy(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        after: After | None,
        most: int,
    ) -> torch.Tensor:
        """Return the losses, float32 [N], of targets [N] given hidden [N, H]. Collective."""
        weight, bias = self._head.weight, self._head.bias
        assert isinstance(weight, DTensor)
        own = OutputMatrix(_local(weight), None if bias is None else _local(bias))
        with self._waiting():
            return sliced_cross_entropy(
                hidden,
                own,
                targets,
                after,
                most=most,
                vocabulary=weight.shape[0],
                shard=self._shard,
            )

    def _waiting(self) -> AbstractContextManager[None]:
        return self._timer.gathering()


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local().detach() if isinstance(parameter, DTensor) else parameter.detach()
