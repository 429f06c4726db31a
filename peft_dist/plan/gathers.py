"""What is gathered of a sharded base in a pass, how long that takes, and what of it nothing hides.

Blocks and an own head are asked for before they are used (`sharding.fsdp2`), so that they are on
their way while the blocks before them compute. Blocks are equal, and their gathers come one after
another: where one takes longer than a block's products, to ask earlier would only move the wait.
"""

from dataclasses import dataclass, replace

from peft_dist.plan.adapter import AdapterShape
from peft_dist.plan.candidate import Candidate
from peft_dist.plan.hardware import Hardware
from peft_dist.plan.memory import blocks_ahead, gathered_block_bytes
from peft_dist.plan.ring import Ring
from peft_dist.plan.setting import Setting
from peft_dist.plan.shapes import ModelShape
from peft_dist.plan.vocabulary_bytes import exchanged_bytes, outer_bytes, scored_bytes


@dataclass(frozen=True)
class GatherTimes:
    """Seconds of one micro-batch; under `reshard: step` of all micro-batches of a step."""

    block: float
    """To gather one block."""
    forward: float
    """That a block computes forward, behind which the next one is gathered."""
    backward: float
    """And backward, with its recomputation; 0 where backward gathers nothing."""
    head: float
    """To gather an own head; 0 where there is none."""
    blocks_ahead: int
    """How many blocks before its use a block, and the head, is asked for."""
    waits: float
    """That no computation hides, in all: the first block, embedding, and what takes too long."""

    @property
    def are_hidden(self) -> bool:
        """Whether all are, but for the first block and the embedding."""
        longest = min(self.forward, self.backward or self.forward)
        return self.block <= longest and self.head <= self.blocks_ahead * self.forward


def gather_times(
    shape: ModelShape,
    adapter: AdapterShape,
    setting: Setting,
    candidate: Candidate,
    hardware: Hardware,
    *,
    forward_s: float,
    backward_s: float,
) -> GatherTimes:
    """Return how long the gathers of a pass take.

    Args:
        shape: Of the base.
        adapter: Of the adapter.
        setting: What is kept.
        candidate: How processes are placed.
        hardware: Where.
        forward_s: That a block computes forward.
        backward_s: And backward.
    """
    ring = Ring.of(candidate, setting.shards)
    kept = min(setting.dequantized, shape.layers)
    small_s = ring.seconds(gathered_block_bytes(shape, setting, dequantized=True), hardware)
    whole_s = ring.seconds(gathered_block_bytes(shape, setting, dequantized=False), hardware)
    block_s = small_s if kept == shape.layers else whole_s
    words, head = gathered_words(shape, adapter, setting), own_head_bytes(shape, setting)
    head_s = ring.seconds(head, hardware) if head else 0.0
    ahead = blocks_ahead(shape, setting)

    waits = small_s if kept else block_s
    waits += (shape.layers - max(kept, 1)) * max(0.0, block_s - forward_s)
    again = setting.reshard == "forward"
    if again:
        waits += (shape.layers - kept) * max(0.0, block_s - backward_s)
    waits += max(0.0, head_s - ahead * forward_s * (block_s <= forward_s))
    waits += ring.seconds(words - head, hardware)
    return GatherTimes(block_s, forward_s, backward_s if again else 0.0, head_s, ahead, waits)


def gathered_bytes(shape: ModelShape, adapter: AdapterShape, setting: Setting) -> int:
    """Return the bytes of whole tensors, and of rows, that are gathered for one micro-batch.

    Under `step` for all micro-batches of a step.
    """
    uses, kept = 2 if setting.reshard == "forward" else 1, min(setting.dequantized, shape.layers)
    whole = (shape.layers - kept) * gathered_block_bytes(shape, setting, dequantized=False)
    rest = kept * gathered_block_bytes(shape, setting, dequantized=True)
    return uses * (whole + rest) + gathered_words(shape, adapter, setting)


def gathered_words(shape: ModelShape, adapter: AdapterShape, setting: Setting) -> int:
    """Return what of it is embedding, head and all else outside the blocks."""
    passes = setting.accumulation if setting.reshard == "step" else 1
    every, matrix = outer_bytes(shape, setting), _matrix_bytes(shape, setting)
    for instead in (exchanged_bytes(shape, adapter, setting), scored_bytes(shape, setting)):
        if instead is not None:
            every += passes * instead - matrix
    return every


def own_head_bytes(shape: ModelShape, setting: Setting) -> int:
    """Return what of it is a head that is gathered by itself."""
    if shape.tied or setting.holds_vocabulary or scored_bytes(shape, setting) is not None:
        return 0
    return _matrix_bytes(shape, setting)


def _matrix_bytes(shape: ModelShape, setting: Setting) -> int:
    """Return the bytes of an embedding or head, where these are two."""
    return outer_bytes(shape, setting) - outer_bytes(replace(shape, tied=True), setting)
