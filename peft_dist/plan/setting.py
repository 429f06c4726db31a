"""How a run is placed and what it keeps: what its memory is calculated from."""

from dataclasses import dataclass

from peft_dist.config.parallel import Reshard

FLOAT = 4
"""Bytes of what is trained, and of copies that norms and losses compute on."""


@dataclass(frozen=True)
class Setting:
    """How a run is placed and what it keeps, as far as memory goes."""

    sharded: bool
    """Whether the base is; then gathered blocks come and go."""
    shards: int
    """Processes that hold one copy of the base."""
    micro_batch: int
    """Rows."""
    length: int
    """Tokens of a row."""
    recompute: bool
    offload: bool = False
    quantized: bool = True
    compute_bytes: int = 2
    """Of a value as it is computed: 2 for bfloat16, 4 for float32."""
    stored_bytes: int = 2
    """Of a value of embedding and head, as stored in the model's files."""
    mask_bytes: int = 1
    """Of a value's place in the mask of a dropout; a CPU keeps a factor in its stead."""
    moments_shared_by: int = 1
    """Processes among which AdamW's moments are divided (DeepSpeed)."""
    reshard: Reshard = "forward"
    """When gathered blocks are freed."""
    holds_vocabulary: bool = False
    """Whether embedding and head stay gathered through a pass (DeepSpeed), not only while used."""
    accumulation: int = 1
    """Micro-batches of a step."""
    dequantized: int = 0
    """Blocks whose weights of 4 bits stay dequantized."""
    one_call: bool = False
    """Whether attention of all rows is one call, which makes scores tile by tile."""
    reuse_elements: int = 0
    """A gathered block stays until its next use where so many elements or fewer come between."""
