"""Faults of the moment at which processes meet: limits that a test can wait for, and late ranks."""

import time
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.faults.hooks import Rank


def meeting_limit(_here: "Rank", *, seconds: float) -> None:
    """Let every rank wait so long for the others, instead of `rendezvous.MEETING_TIMEOUT`."""
    from peft_dist.distributed import rendezvous

    assert rendezvous.meet.__kwdefaults__ is not None
    assert rendezvous.meet.__kwdefaults__["within"] == rendezvous.MEETING_TIMEOUT
    rendezvous.meet.__kwdefaults__["within"] = timedelta(seconds=seconds)


def late_rank(here: "Rank", *, rank: int, seconds: float) -> None:
    """Let one rank begin so much later than the others."""
    if here.is_one_of(rank):
        time.sleep(seconds)
