"""What a training step leaves on the device, brought to the host without waiting for it."""

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch

from peft_dist.tracking import Record


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


class FiguresReader:
    """Reads the figures of steps in order; those of a GPU one step late.

    The host then prepares a step while the device computes the one before it.
    """

    def __init__(self, device: torch.device) -> None:
        """Start with nothing to read."""
        self.is_late = device.type == "cuda"
        self._unread: deque[tuple[Record, torch.Tensor, torch.cuda.Event | None]] = deque()

    def put(self, record: Record, figures: torch.Tensor) -> None:
        """Take a step's figures, float32 [5] in the order of `Figures`, beside its record."""
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
            yield record, Figures(*host.tolist())
