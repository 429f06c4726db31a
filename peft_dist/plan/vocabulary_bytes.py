"""Bytes of embedding and head: held, gathered or exchanged instead, and whole at which moment."""

from dataclasses import dataclass, replace

from peft_dist.plan.adapter import AdapterShape
from peft_dist.plan.setting import FLOAT, Setting
from peft_dist.plan.shapes import ModelShape

ALIGNED_COLUMNS, ID_BYTES = 8, 4
"""As in `sharding.lookup`, which cannot be imported without torch; a test compares them."""
NUMBERS, LEAST_SPARED_BYTES = 3, 4 << 20
"""As in `model.sliced_cross_entropy`, likewise."""


def outer_bytes(shape: ModelShape, setting: Setting, shards: int = 1) -> int:
    """Return the bytes of embedding, head and last norm, of one of so many shards."""
    matrices, elements = shape.vocabulary_matrices, 0
    if shards > 1 and by_columns(shape, setting):
        matrices, elements = matrices - 1, shape.vocabulary * (shape.hidden // shards)
    elements += -(-shape.vocabulary // shards) * matrices * shape.hidden
    return elements * word_bytes(setting) + share_bytes(shape.outer_parameters, shards, setting)


def word_bytes(setting: Setting) -> int:
    """Return the bytes of a value of embedding and head."""
    return min(setting.compute_bytes, setting.stored_bytes)


def by_columns(shape: ModelShape, setting: Setting) -> bool:
    """Whether the embedding is sharded by columns, so that rows of it can be exchanged."""
    return (
        setting.sharded
        and setting.shards > 1
        and not (shape.tied or setting.offload or setting.holds_vocabulary)
        and shape.hidden % (setting.shards * ALIGNED_COLUMNS) == 0
    )


def exchanged_bytes(shape: ModelShape, adapter: AdapterShape, setting: Setting) -> int | None:
    """Return what exchanging rows of the embedding carries in a micro-batch; None: it is gathered.

    It is where that is fewer bytes.
    """
    if not by_columns(shape, setting):
        return None
    width = word_bytes(setting)
    positions = setting.micro_batch * (setting.length + adapter.virtual_tokens)
    found = positions * (setting.shards * ID_BYTES + shape.hidden * width)
    passes = setting.accumulation if setting.reshard == "step" else 1
    return found if passes * found < shape.vocabulary * shape.hidden * width else None


def scored_bytes(shape: ModelShape, setting: Setting) -> int | None:
    """Return what scoring positions in slices of the head carries in a micro-batch.

    None where the head is gathered instead, since that is fewer bytes or it has no slices.
    """
    shards, alone = setting.shards, not (shape.tied or setting.offload or setting.holds_vocabulary)
    if not (setting.sharded and shards > 1 and alone):
        return None
    if (shards - 1) * -(-shape.vocabulary // shards) >= shape.vocabulary:
        return None
    each = 2 * shape.hidden * setting.compute_bytes + ID_BYTES + shards * NUMBERS * FLOAT
    carried = scored_positions(setting) * each
    matrix = shape.vocabulary * shape.hidden * word_bytes(setting)
    return carried if setting.accumulation * carried < matrix - LEAST_SPARED_BYTES else None


def scored_positions(setting: Setting) -> int:
    """Return the labelled positions of all that hold one copy of the base, in a micro-batch."""
    return setting.shards * setting.micro_batch * (setting.length - 1)


def share_bytes(parameters: int, shards: int, setting: Setting) -> int:
    """Return the bytes of one of so many shards of what is in the compute dtype."""
    return -(-parameters // shards) * setting.compute_bytes


@dataclass(frozen=True)
class Words:
    """Bytes of embedding, head and all else outside the blocks that are whole, by moment."""

    at_embedding: int
    """While the embedding is gathered: twice, as it is received and as it is used. Or rows of it,
    three times: as they were found, received and put in order."""
    at_first_block: int
    when_head_is_asked_for: int
    at_head: int
    """While the head is gathered."""
    at_loss: int
    in_backward: int


def words_of(shape: ModelShape, adapter: AdapterShape, setting: Setting) -> Words:
    """Return what is whole of them in a step."""
    words = _gathered_words(shape, adapter, setting)
    if scored_bytes(shape, setting) is None:
        return words
    rest = share_bytes(shape.outer_parameters, 1, setting)
    if setting.reshard == "step" and exchanged_bytes(shape, adapter, setting) is None:
        rest += shape.vocabulary * shape.hidden * word_bytes(setting)  # of the embedding
    hidden = scored_positions(setting) * shape.hidden * setting.compute_bytes
    # Hidden states of all, and their gradients: as they are made, and as they are received.
    return replace(
        words,
        when_head_is_asked_for=rest,
        at_head=rest + 3 * hidden,
        at_loss=rest + 2 * hidden,
        in_backward=rest,
    )


def _gathered_words(shape: ModelShape, adapter: AdapterShape, setting: Setting) -> Words:
    every = outer_bytes(shape, setting)
    rest = share_bytes(shape.outer_parameters, 1, setting)
    matrix = (every - rest) // shape.vocabulary_matrices
    exchanged = exchanged_bytes(shape, adapter, setting)
    if exchanged is not None:
        kept = matrix if setting.reshard == "step" else 0
        return Words(
            rest + 3 * exchanged,
            rest,
            rest + matrix,
            rest + 2 * matrix,
            rest + matrix,
            rest + kept,
        )
    if setting.holds_vocabulary:
        return Words(every, every, every, every, every, every)
    if setting.reshard == "step":  # nothing is freed before the step ends
        more = 0 if shape.tied else matrix
        return Words(rest + 2 * matrix, rest + matrix, every, every + more, every, every)
    if shape.tied:
        return Words(rest + 2 * matrix, every, every, every, every, rest)
    return Words(rest + 2 * matrix, rest, rest + matrix, rest + 2 * matrix, rest + matrix, rest)
