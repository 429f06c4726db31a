"""Ask all processes whether one of them wants to stop, again and again, without waiting."""

import time
from typing import NamedTuple

import torch
import torch.distributed as torch_dist

from peft_dist.distributed.collectives import sum_over

LATE = 2
"""Questions that a GPU's answer is late: the device is done with that one by then."""
EVERY_S = 1.0
"""A GPU is asked about so often, however quick the questions come."""
MOST = 1000
"""Questions that are answered without a vote at most."""


class _Vote(NamedTuple):
    question: int
    """At which it was taken."""
    since: int
    """Questions since the vote before it."""
    sums: torch.Tensor
    """In the host's memory: who wants to stop, and the seconds since the vote before it."""
    event: torch.cuda.Event


class StopVote:
    """Whether any process wants to stop; on a GPU the answer to an earlier question."""

    def __init__(self, device: torch.device) -> None:
        """Begin with nobody wanting to."""
        self._device = device
        self._wants = False
        self._question = self._last = self._next = 0
        self._at = time.monotonic()
        self._unread: _Vote | None = None

    def ask(self, wants: bool) -> bool:
        """Say what this process wants; return the same on every process. Collective."""
        if self._device.type != "cuda":
            return bool(sum_over(torch.full((), float(wants))) > 0)
        self._wants |= wants
        question, answer = self._question, False
        self._question += 1
        if self._unread is not None and question >= self._unread.question + LATE:
            answer = self._read(self._unread)
        if self._unread is None and question >= self._next:
            self._vote(question)
        return answer

    def _vote(self, question: int) -> None:
        now = time.monotonic()
        sums = torch.zeros(2, device=self._device)
        sums[:1].fill_(float(self._wants))
        sums[1:].fill_(now - self._at)
        host = torch.empty(2, pin_memory=True)
        host.copy_(sum_over(sums), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._unread = _Vote(question, question - self._last, host, event)
        self._last, self._at = question, now

    def _read(self, vote: _Vote) -> bool:
        vote.event.synchronize()
        self._unread = None
        wanting, seconds = vote.sums.tolist()
        # All processes have the same numbers, and so vote at the same question.
        mean_s = seconds / torch_dist.get_world_size()
        self._next = vote.question + questions_until_next(vote.since, mean_s)
        return bool(wanting > 0)


def questions_until_next(questions: int, seconds: float) -> int:
    """Return after how many questions to vote again, from how long some have taken."""
    if questions == 0:  # the first vote: nothing is known yet
        return LATE + 1
    return max(1, min(MOST, round(EVERY_S * questions / max(seconds, EVERY_S / MOST))))
