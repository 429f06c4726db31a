"""One way to run a recipe: strategy, nodes, rows of a pass, and what is traded for memory."""

from dataclasses import dataclass

from peft_dist.config import Recipe
from peft_dist.config.parallel import Reshard


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
    reshard: Reshard = "forward"
    dequantized: int = 0
    """Blocks whose 4-bit weights stay dequantized."""


def candidate_for(
    recipe: Recipe, strategy: str, *, nodes: int, processes: int, rows: int, recompute: bool
) -> Candidate:
    """Return the way to run a recipe by a strategy on so many nodes and processes.

    Args:
        recipe: Has the shard size of hsdp (default: a node's processes), the offload, when
            gathered blocks are freed, and how many blocks stay dequantized.
        strategy: `ddp`, `fsdp`, `hsdp`, `zero2` or `zero3`.
        nodes: How many.
        processes: On all of them.
        rows: Of a pass of a process.
        recompute: Whether activations are computed again.
    """
    on_node = max(1, processes // nodes)
    shards = {"ddp": 1, "zero2": 1, "hsdp": recipe.parallel.shard_size or on_node}
    return Candidate(
        strategy=strategy,
        nodes=nodes,
        processes=processes,
        shard_size=shards.get(strategy, processes),
        micro_batch=rows,
        recompute=recompute,
        offload=recipe.parallel.offload == "cpu" and strategy not in ("ddp", "zero2"),
        reshard=_reshard(recipe, strategy),
        dequantized=_dequantized(recipe, strategy),
    )


def _reshard(recipe: Recipe, strategy: str) -> Reshard:
    """Return when a recipe has gathered blocks freed; of what it leaves open, the least memory."""
    own = recipe.parallel.reshard
    return "forward" if own == "auto" or strategy not in ("fsdp", "hsdp") else own


def _dequantized(recipe: Recipe, strategy: str) -> int:
    """Return how many blocks a recipe has dequantized for good; of what it leaves open, none."""
    own = recipe.parallel.dequantized_blocks
    return 0 if own == "auto" or strategy == "zero3" else own


def may_keep_dequantized(recipe: Recipe, strategy: str) -> bool:
    """Whether the recipe leaves open how many blocks stay dequantized, and some could."""
    return (
        recipe.parallel.dequantized_blocks == "auto"
        and recipe.quantization == "nf4"
        and getattr(recipe.method, "fused", "off") == "off"
        and not recipe.model.fp8
        and strategy != "zero3"
    )
