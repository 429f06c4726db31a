"""What a training step leaves on the device, brought to the host without waiting for it.

Some of it are figures of each process, which travel with the gradients.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from peft_dist.distributed.world import World
from peft_dist.ledger.writer import Record
from peft_dist.sharding.engine import RANK_RIDERS, SHARED_RIDERS


class Figures(NamedTuple):
    """What is read from the device after a step; the same on every process."""

    loss: float
    norm: float
    stop: float
    """Processes that were asked to stop."""
    save: float
    """Above 0: rank 0 wants a checkpoint."""
    give_up: float
    """Above 0: rank 0 could not write too many of them."""
    rank_step_s: tuple[float, ...]
    """Each process's own part of the step; 0: not known yet."""
    rank_memory_bytes: tuple[float, ...]
    """The most memory each process has held: its GPU's, or the host's where it has none."""

    def facts(self) -> Record:
        """Return what a record says of them; times that are not known yet are left out."""
        found: Record = {"loss": self.loss, "grad_norm": self.norm}
        if all(self.rank_step_s):
            found["rank_step_s"] = [round(value, 6) for value in self.rank_step_s]
        return found | {"rank_memory_bytes": [int(value) for value in self.rank_memory_bytes]}


def make_riders(
    world: World,
    loss: torch.Tensor,
    *,
    told: Sequence[bool],
    step_s: float | None,
    memory_bytes: int,
) -> torch.Tensor:
    """Return what this process adds to the sum over all, float32 [riders].

    Each process has slots of its own for its own figures, and 0 in those of the others: the sum is
    the list of all. float32 holds bytes and seconds alike to seven digits.

    Args:
        world: This process's place.
        loss: Its share of the loss.
        told: What it wants the others to know, three of them.
        step_s: The time of its own part of a step, if it is known.
        memory_bytes: The most memory it has held.
    """
    riders = torch.zeros(SHARED_RIDERS + RANK_RIDERS * world.size, device=world.device)
    riders[0] = loss
    # Fills on the device; a copy of the whole to it would wait for it.
    for index, wanted in enumerate(told, start=1):
        if wanted:
            riders[index] = 1.0
    if step_s is not None:
        riders[SHARED_RIDERS + world.rank] = step_s
    riders[SHARED_RIDERS + world.size + world.rank] = float(memory_bytes)
    return riders


class FiguresReader:
    """Reads the figures of steps in order; those of a GPU one step late.

    The host then prepares a step while the device computes the one before it.
    """

    def __init__(self, device: torch.device) -> None:
        """Start with nothing to read."""
        self.is_late = device.type == "cuda"
        self._unread: deque[tuple[Record, torch.Tensor, torch.cuda.Event | None]] = deque()

    def put(self, record: Record, figures: torch.Tensor) -> None:
        """Take a step's figures beside its record: loss, norm, and the riders after their first."""
        if not self.is_late:
            self._unread.append((record, figures, None))
            return
        host = torch.empty(figures.shape, pin_memory=True)
        host.copy_(figures, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._unread.append((record, host, event))

    def take(self, *, keep: int) -> Iterator[tuple[Record, Figures]]:
        """Yield records and figures of all but the last `keep` steps."""
        while len(self._unread) > keep:
            record, host, event = self._unread.popleft()
            if event is not None:
                event.synchronize()
            loss, norm, stop, save, give_up, *own = host.tolist()
            size = len(own) // RANK_RIDERS
            by_rank = tuple(own[:size]), tuple(own[size:])
            yield record, Figures(loss, norm, stop, save, give_up, *by_rank)
