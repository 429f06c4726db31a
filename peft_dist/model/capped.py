"""Attention with capped scores over all rows of a packed micro-batch in one call, by torch's flex.

Row by row, capped scores stand in memory: of each layer [heads, T, T] in float32. Flex attention is
compiled to a kernel that makes them tile by tile. It has a backward on GPUs alone, where
`varlen.has_kernel`; whoever finds no compiler there goes on row by row.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad
from transformers import PretrainedConfig

from peft_dist.common.errors import line_of
from peft_dist.model.varlen import WIDEST, in_half

log = logging.getLogger(__name__)

BLOCK = 128
"""Tokens of a side of what a kernel leaves out, or computes without a mask, as a whole."""
SMALL_TILES = {
    "fwd_BLOCK_M": 64,
    "fwd_BLOCK_N": 32,
    "fwd_num_stages": 1,
    "fwd_num_warps": 8,
}
"""Of forward, for heads of more than 128: their own need the shared memory of an A100 or H100."""
_VARIANTS = 32
"""Most codes: with gradients and without, with learned tokens and without."""


Lists = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
]  # fmt: skip


class RowBlocks(NamedTuple):
    """Who sees whom in a packed micro-batch, for layers of one window.

    Tokens are filled up to Q whole blocks. Learned tokens, which all rows see, are the first keys,
    and are filled up in front of them: K blocks with the tokens' own. All numbers are int32.

    Attributes:
        first: [Q, BLOCK], the first token of its row that each token sees.
        first_learned: [Q, BLOCK], the first learned token, as a key, that each sees. None: there
            are none.
        lists: As `BlockMask` takes them, from `kv_num_blocks` to `full_q_indices`: for each block
            of tokens how many blocks of keys it sees, [1, 1, Q], and which, [1, 1, Q, K]; those
            that all of it sees whole apart; then the same for each block of keys.
        cap: [], scores are squeezed into (-cap, cap) by a tanh. A tensor, since compilers take a
            number of Python's for one that varies.
    """

    first: torch.Tensor
    first_learned: torch.Tensor | None
    lists: Lists
    cap: torch.Tensor


def cap_of(config: PretrainedConfig) -> float | None:
    """Return what a model caps its scores of attention at; None where it does not."""
    cap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return None if cap is None else float(cap)


def windows_of(config: PretrainedConfig) -> set[int | None]:
    """Return how many tokens layers of a model see, itself included; None for all before it."""
    return {None, getattr(config.get_text_config(), "sliding_window", None)}


def row_blocks(
    positions: torch.Tensor, *, window: int | None, learned: int, softcap: float
) -> RowBlocks:
    """Return who sees whom; the host waits for nothing.

    What a token sees of its row begins no sooner than what the token before it sees: so the first
    token of a block sees the most of what lies before the block, and the last the least.

    Args:
        positions: int [T] of each token in its row, from 0.
        window: How many tokens, itself included, a token sees. Off: all before it.
        learned: Tokens P that are learned and stand before each row.
        softcap: What scores are capped at.
    """
    device, front = positions.device, -(-learned // BLOCK)
    # One block would be another code: of sizes 0 and 1 compilers make constants.
    count = max(2, -(-len(positions) // BLOCK))
    # What fills the last block is rows of one token.
    own = pad(positions.int(), (0, count * BLOCK - len(positions))).view(count, BLOCK)
    token = torch.arange(count * BLOCK, device=device, dtype=torch.int32).view(count, BLOCK)
    first = token - (own if window is None else own.clamp(max=window - 1))
    begin = token[:, :1]
    some = (first[:, :1] < begin.T + BLOCK) & (begin >= begin.T)
    whole = (first[:, -1:] <= begin.T) & (begin > begin.T)
    first_learned = None
    if learned:
        left_out = torch.zeros_like(own)
        if window is not None:
            left_out = (own + (learned + 1 - window)).clamp(min=0, max=learned)
        first_learned = left_out + (front * BLOCK - learned)
        begin = torch.arange(front, device=device) * BLOCK
        some = torch.cat([begin + BLOCK > first_learned.amin(1, keepdim=True), some], dim=1)
        whole = torch.cat([begin >= first_learned.amax(1, keepdim=True), whole], dim=1)
    masked, cap = some & ~whole, torch.full((), softcap, device=device)
    by_query, by_key = (*_listed(masked), *_listed(whole)), (*_listed(masked.T), *_listed(whole.T))
    return RowBlocks(first, first_learned, (*by_query, *by_key), cap)


def _listed(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return of each row of a table how many are true, and their places, then the others."""
    places = table.int().argsort(dim=1, descending=True, stable=True)
    count = table.sum(1, dtype=torch.int32)
    return count[None, None], places.to(torch.int32)[None, None].contiguous()


def attend_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    blocks: RowBlocks,
    past: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor | None:
    """Attend within rows, causally; return [1, T, heads, head size], or None without a compiler.

    Args:
        query: [1, heads, T, head size].
        key: [1, key-value heads, T, head size].
        value: Like `key`.
        blocks: Who sees whom.
        past: Keys and values that stand before each row's own, [2, key-value heads, P, head size].
        scaling: Factor of the scores. Default: 1 / sqrt(head size).
    """
    query, key, value = (in_half(part) for part in (query, key, value))
    if past is not None:
        past = past.to(key.dtype)
    own = _attend if torch.compiler.is_compiling() or not query.is_cuda else _compiled()
    return own(query, key, value, blocks, past, scaling)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    blocks: RowBlocks,
    past: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    total, learned, front = query.shape[2], 0 if past is None else past.shape[2], 0
    # To whole blocks, so that no code is for fewer tokens than some, or for odd numbers of them.
    more = blocks.first.numel() - total
    query, key, value = (pad(part, (0, 0, 0, more)) for part in (query, key, value))
    if past is not None:
        front = -(-learned // BLOCK) * BLOCK
        before = pad(past, (0, 0, front - learned, 0))
        key, value = torch.cat([before[:1], key], 2), torch.cat([before[1:], value], 2)
    first, softcap = blocks.first.flatten(), blocks.cap
    first_learned = None if blocks.first_learned is None else blocks.first_learned.flatten()

    def cap(score: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return torch.tanh(score / softcap) * softcap

    def sees(_b: Any, _h: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        own = (k >= first[q] + front) & (k <= q + front)
        if first_learned is None:
            return own
        return own | ((k >= first_learned[q]) & (k < front))

    mask = BlockMask(
        (query.shape[2], key.shape[2]), *blocks.lists, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=sees
    )
    out = flex_attention(
        query,
        key,
        value,
        score_mod=cap,
        block_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=_options(query),
    )
    assert isinstance(out, torch.Tensor)
    return out[:, :, :total].transpose(1, 2).contiguous()


def _options(query: torch.Tensor) -> Any:
    """Return what to make the kernel with; by itself it decodes where there are few tokens.

    Backward has tiles of ours, the largest of those tried by which no A100, L4 or H100 spills a
    register: by torch's own they spill 168 to 9,120 bytes a thread. For heads of up to 64 so does
    forward, with four warps.
    """
    options: dict[str, Any] = {"BACKEND": "TRITON"}
    if not query.is_cuda:
        return options
    size = query.shape[-1]
    long, stages = (32 if size > 128 else 64), (2 if 64 < size <= 128 else 1)
    options |= {"bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": long, "bwd_BLOCK_M2": long, "bwd_BLOCK_N2": 32}
    options |= {"bwd_num_stages": stages, "bwd_num_warps": 8}
    if size <= 64:
        options |= {"fwd_num_warps": 8}
    if size > 128 and torch.cuda.get_device_capability(query.device) not in WIDEST:
        options |= SMALL_TILES
    return options


@functools.cache
def _compiled() -> Callable[..., torch.Tensor | None]:
    """Return `_attend` compiled, once for rows of all lengths; it gives None where it cannot be.

    Another process may have a compiler, so that an error here must not end a pass.
    """
    from torch._dynamo import config, exc, mark_static

    config.recompile_limit = max(config.recompile_limit, _VARIANTS)
    errors = (exc.TorchDynamoException, exc.FailOnRecompileLimitHit)
    run = torch.compile(_attend, fullgraph=True, dynamic=True)
    failed = False

    def attend(*inputs: Any) -> torch.Tensor | None:
        nonlocal failed
        if failed:
            return None
        *parts, _blocks, past, _scaling = inputs
        for part in parts:  # what does not vary; T may happen to be as much
            mark_static(part, 1)
            mark_static(part, 3)
        if past is not None:
            mark_static(past)
        try:
            return run(*inputs)
        except errors as error:
            failed = True
            cause = getattr(error, "inner_exception", error)
            log.warning("capped attention is computed row by row, slower: %s", line_of(cause))
            return None

    return attend
