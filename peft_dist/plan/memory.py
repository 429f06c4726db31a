"""Bytes of one GPU at the fullest moment of a step, by what they are for.

The formulas follow what the code keeps alive; a test holds them against the simulation, which
runs that code. Counted is a micro-batch of the longest rows.
"""

from dataclasses import dataclass, fields

from peft_dist.plan.adapter import AdapterShape
from peft_dist.plan.setting import FLOAT, Setting
from peft_dist.plan.shapes import Linear, ModelShape
from peft_dist.plan.vocabulary_bytes import (
    Words,
    outer_bytes,
    scored_bytes,
    scored_positions,
    share_bytes,
    word_bytes,
    words_of,
)

LOGIT_BYTES_PER_CHUNK = 256 << 20
"""As in `model.loss`, which cannot be imported without torch; a test compares them."""
REUSE_ELEMENTS = 50_000_000
"""As in `sharding.deepspeed_zero`; a test compares them too."""


@dataclass(frozen=True)
class Bytes:
    """Bytes of tensors on one GPU."""

    base: int
    """This process's part of the base."""
    dequantized: int
    """Weights of 4 bits that stay dequantized."""
    gathered_blocks: int
    """Blocks that are whole for the moment."""
    gathered_vocabulary: int
    """Embedding, head and last norm that are whole for the moment."""
    adapter: int
    gradients: int
    moments: int
    activations: int
    """What forward keeps for backward, and the largest pair of products besides."""
    logits: int

    @property
    def allocated(self) -> int:
        """All of them."""
        return sum(getattr(self, field.name) for field in fields(self))


def base_bytes(shape: ModelShape, setting: Setting) -> int:
    """Return the bytes of the base that the first process holds."""
    shards = setting.shards if setting.sharded else 1
    return outer_bytes(shape, setting, shards) + shape.layers * block_bytes(shape, setting, shards)


def block_bytes(shape: ModelShape, setting: Setting, shards: int = 1) -> int:
    """Return the bytes of one block of the base, of one of so many shards."""
    linears = sum(_linear_bytes(linear, setting, shards) for linear in shape.linears)
    vectors = shape.vector_parameters + shape.block_biases
    return linears + share_bytes(vectors, shards, setting)


def dequantized_bytes(shape: ModelShape, setting: Setting) -> int:
    """Return the bytes that the weights of one block take where they stay dequantized."""
    return sum(one.weights for one in _can_be_kept(shape, setting)) * setting.compute_bytes


def _can_be_kept(shape: ModelShape, setting: Setting) -> list[Linear]:
    """Return the linears of a block in 4 bits; experts, of which few are used, stay as they are."""
    if not setting.quantized:
        return []
    return [one for one in shape.linears if one.copies == 1 and one.in_features % 32 == 0]


def gathered_block_bytes(shape: ModelShape, setting: Setting, *, dequantized: bool) -> int:
    """Return the bytes that are gathered of a block, whose weights may stay dequantized."""
    kept = _can_be_kept(shape, setting) if dequantized else []
    return block_bytes(shape, setting) - sum(_linear_bytes(one, setting, 1) for one in kept)


def blocks_ahead(shape: ModelShape, setting: Setting) -> int:
    """Return how many blocks before it is used a block, and an own head, is asked for.

    As `sharding.fsdp2.blocks_ahead`, which a test compares.
    """
    if setting.holds_vocabulary:
        return 0
    head = 0 if shape.tied else shape.vocabulary * shape.hidden * word_bytes(setting)
    return max(1, min(-(-head // block_bytes(shape, setting)), shape.layers - 1))


def _linear_bytes(linear: Linear, setting: Setting, shards: int) -> int:
    pieces = linear.copies if linear.copies > 1 else linear.out_features
    row = linear.weights // pieces
    return -(-pieces // shards) * _stored(row, linear.in_features, setting)


def _stored(weights: int, in_features: int, setting: Setting) -> int:
    """Return the bytes of weights whose rows have so many columns: codes and scales, or values."""
    block = 64 if in_features % 64 == 0 else 32
    if not setting.quantized or in_features % block:
        return weights * setting.compute_bytes
    return weights // 2 + weights // block * FLOAT


def kept_by_block(shape: ModelShape, adapter: AdapterShape, setting: Setting) -> int:
    """Return the bytes that forward through one block keeps for backward."""
    e, tokens = setting.compute_bytes, setting.micro_batch * setting.length
    targets = adapter.targets
    query, key, inner, hidden = (
        shape.query_width, shape.key_width, shape.intermediate, shape.hidden
    )  # fmt: skip
    active = max(shape.experts_per_token, 1)
    values = 2 * query + 2 * key  # rotated queries, keys and values, and attention's output
    if shape.joined_qkv:
        values += query + key  # a part of the joined product keeps all of it alive
    values += active * inner * (3 if shape.gated else 1)
    if shape.experts:  # what every expert gives, which its weight of the router is multiplied with
        values += active * hidden
    values += adapter.kept_per_token + adapter.rank * len(targets)
    if adapter.weighs:  # DoRA scales what the base and LoRA make
        values += 2 * sum(one.out_features for one in targets)
    floats = shape.heads + 2 * shape.norms + (shape.norms * hidden if shape.float32_norms else 0)
    if not shape.float32_norms:
        values += shape.norms * hidden
    if shape.head_norms:
        floats += query + key
    if shape.attention_scores or (shape.attention_softcap and not setting.one_call):
        # Scores stand in memory: capped, as softmax, and as weights.
        floats += shape.heads * setting.length
        values += 2 * shape.heads * setting.length
    masks = 0
    if adapter.drops:  # each target keeps what it was given after dropout, and the mask
        values += sum(one.in_features for one in targets)
        masks = sum(one.in_features for one in targets) * setting.mask_bytes
    else:
        values += sum({_reads(one): one.in_features for one in targets}.values())
    casts = (adapter.parameters // shape.layers) * e if e < FLOAT else 0
    return tokens * (values * e + floats * FLOAT + masks) + casts


def _reads(linear: Linear) -> str:
    """Return which tensor a linear reads; those that read the same one keep it once."""
    name = linear.name
    if name in ("q_proj", "k_proj", "v_proj"):
        return "attention"
    if name in ("gate_proj", "up_proj"):
        return "feed-forward"
    return f"{name} {linear.in_features}"


def _stays(shape: ModelShape, setting: Setting) -> int:
    """Return the bytes of blocks that stay gathered from forward to backward: the last, or all."""
    size = block_bytes(shape, setting)
    if setting.reshard != "forward":
        kept = min(setting.dequantized, shape.layers)
        return (shape.layers - kept) * size + kept * gathered_block_bytes(
            shape, setting, dequantized=True
        )
    elements = size if setting.quantized else size // setting.compute_bytes
    # Between the two uses of a block come all later blocks, twice.
    return size * min(shape.layers - 1, setting.reuse_elements // (2 * elements))


def peak_bytes(shape: ModelShape, adapter: AdapterShape, setting: Setting) -> Bytes:
    """Return the bytes of the fullest moment of a step.

    There are eight that can be it: the gathers of embedding, first block and head, the experts of
    the first block, the block before which the head is asked for, the loss, the start of backward
    in the last norm, and backward through the feed-forward of a block.
    """
    e = setting.compute_bytes
    rows, length = setting.micro_batch, setting.length + adapter.virtual_tokens
    tokens, predicted = rows * length, rows * (setting.length - 1)
    wide = tokens * shape.hidden
    one_block = kept_by_block(shape, adapter, setting)
    inputs = 8 * tokens * 3 + 2 * tokens * (shape.query_width // shape.heads) * e
    if setting.recompute:
        casts = adapter.input_parameters * e if e < FLOAT else 0
        kept = shape.layers * wide * e + inputs
        at_loss, at_norm, at_block = kept + casts, kept, kept + one_block
    else:
        # The first norm of a frozen embedding's output keeps nothing; the last one keeps its own.
        at_loss = at_norm = at_block = shape.layers * one_block + inputs
    last = wide * (e + (FLOAT if setting.recompute else 0)) + 2 * predicted * shape.hidden * e

    slice_rows, positions, scored = shape.vocabulary, predicted, scored_bytes(shape, setting)
    if scored is not None:
        slice_rows, positions = -(-shape.vocabulary // setting.shards), scored_positions(setting)
    chunk = min(max(1, LOGIT_BYTES_PER_CHUNK // (FLOAT * slice_rows)), positions)
    per_logit = 6 * FLOAT if shape.head_softcap else 2 * FLOAT + e
    if scored is None and chunk < positions:  # the gradients of the chunk before
        per_logit += e
    logits = per_logit * chunk * slice_rows

    largest = shape.largest_linear
    product = tokens * shape.intermediate * max(shape.experts_per_token, 1) * e
    kept_blocks = min(setting.dequantized, shape.layers)
    makes_weights = setting.quantized and kept_blocks < shape.layers
    weight = largest.out_features * largest.in_features * e if makes_weights else 0
    backward = wide * e + product + max(product, weight)
    norm = 5 * wide * FLOAT

    # What experts are given, what they give and that weighed, while gathers ahead are there; where
    # nothing is computed again, the loss comes with more.
    given = tokens * shape.hidden * shape.experts_per_token * e
    experts = 3 * (given + wide * e) if shape.experts and setting.recompute else 0

    gathers = setting.sharded and setting.shards > 1
    # The buffer that a gather is received in lives until the next one.
    all_kept = kept_blocks == shape.layers
    buffer = gathered_block_bytes(shape, setting, dequantized=all_kept) if gathers else 0
    ahead = blocks_ahead(shape, setting)
    unfilled = (shape.layers - ahead) * (one_block if not setting.recompute else wide * e)
    stays = _stays(shape, setting) if gathers else 0
    words = words_of(shape, adapter, setting) if gathers else Words(*[0] * 6)
    again = buffer if setting.reshard == "forward" else 0  # of what backward gathers
    moments = [
        (inputs, 0, 0, words.at_embedding),
        (inputs + wide * e, 0, (2 + ahead) * buffer, words.at_first_block),
        (inputs + experts, 0, (2 + ahead) * buffer, words.at_first_block),
        (inputs + unfilled, 0, (1 + ahead) * buffer + stays, words.when_head_is_asked_for),
        (at_loss + last - predicted * shape.hidden * e, 0, buffer + stays, words.at_head),
        (at_loss + last, logits, buffer + stays, words.at_loss),
        (at_norm + norm, 0, again + stays, words.in_backward),
        (at_block + backward, 0, 2 * again + stays, words.in_backward),
    ]
    activations, logits, gathered, vocabulary = max(moments, key=sum)
    return Bytes(
        base=0 if setting.offload else base_bytes(shape, setting),
        dequantized=kept_blocks * dequantized_bytes(shape, setting),
        gathered_blocks=gathered,
        gathered_vocabulary=vocabulary,
        adapter=adapter.parameters * FLOAT,
        gradients=adapter.parameters * FLOAT,
        moments=2 * adapter.parameters * FLOAT // setting.moments_shared_by,
        activations=activations,
        logits=logits,
    )
