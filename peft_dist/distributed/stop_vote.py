"""Ask all processes whether one of them wants to stop, again and again, without waiting."""

from collections import deque

import torch

from peft_dist.distributed.collectives import sum_over

LATE = 2
"""Questions that a GPU's answer is late: the device is done with that one by then."""


class StopVote:
    """Whether any process wants to stop; on a GPU the answer to an earlier question."""

    def __init__(self, device: torch.device) -> None:
        """Begin with nobody wanting to."""
        self._device = device
        self._unread: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()

    def ask(self, wants: bool) -> bool:
        """Say what this process wants; return the same on every process. Collective."""
        votes = sum_over(torch.full((), float(wants), device=self._device))
        if self._device.type != "cuda":
            return bool(votes > 0)
        host = torch.empty((), pin_memory=True)
        host.copy_(votes, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._unread.append((host, event))
        if len(self._unread) <= LATE:
            return False
        host, event = self._unread.popleft()
        event.synchronize()
        return bool(host > 0)
