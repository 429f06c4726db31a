"""One way to run a recipe: strategy, nodes, rows of a pass, and what is traded for memory."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """One way to run a recipe."""

    strategy: str
    nodes: int
    processes: int
    shard_size: int
    """Processes that hold one copy of the base together; 1 under ddp and zero2."""
    micro_batch: int
    recompute: bool
    offload: bool
