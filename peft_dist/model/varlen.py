"""Attention over all rows of a packed micro-batch in one call, by torch's flash kernels for GPUs.

Row by row, a micro-batch of 64 rows is 64 calls of each layer and direction. The kernels are exact,
but take no cap of the scores and no dropout here, and 16-bit numbers alone.
"""

import inspect

import torch

LEAST_CAPABILITY = (8, 0)
"""Of the first cards that torch's flash kernels are built for (A100)."""
MOST_HEAD_SIZE = 256
MOST_HEAD_SIZE_ELSEWHERE = 192
"""Gradients of wider heads need the shared memory of an A100 or H100."""
WIDEST = ((8, 0), (9, 0))
DTYPES = (torch.bfloat16, torch.float16)


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch and this device have such a kernel for a dtype."""
    if device.type != "cuda" or dtype not in DTYPES:
        return False
    if torch.version.hip is not None:  # another library, whose capabilities are other numbers
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    knows = inspect.signature(varlen_attn).parameters  # since torch 2.13
    if not {"enable_gqa", "window_size"} <= knows.keys():
        return False
    return torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def can_attend(query: torch.Tensor, *, dropout: float, softcap: float | None) -> bool:
    """Whether the kernel computes this: queries [1, heads, T, head size] on a GPU that has it."""
    size = query.shape[-1]
    widest = torch.cuda.get_device_capability(query.device) in WIDEST
    return (
        softcap is None
        and dropout == 0.0
        and size % 8 == 0
        and size <= (MOST_HEAD_SIZE if widest else MOST_HEAD_SIZE_ELSEWHERE)
    )


def attend_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    row_bounds: torch.Tensor,
    longest: int,
    past: torch.Tensor | None,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """Attend within rows, causally; return [1, T, heads, head size].

    Args:
        query: [1, heads, T, head size].
        key: [1, key-value heads, T, head size].
        value: Like `key`.
        row_bounds: int32 [rows + 1] where each row begins, and the end.
        longest: Tokens of the longest row.
        past: Keys and values that stand before each row's own, [2, key-value heads, P, head size].
        scaling: Factor of the scores. Default: 1 / sqrt(head size).
        sliding_window: How many tokens, itself included, a token sees. Off: all before it.
    """
    q, k, v = (in_half(part)[0].transpose(0, 1) for part in (query, key, value))
    if past is None:
        return _call(q, k, v, row_bounds, longest, scaling, sliding_window)[None]
    learned, rows = past.shape[2], len(row_bounds) - 1
    position = torch.arange(len(q), device=q.device)
    row = torch.bucketize(position, row_bounds[1:], right=True)
    place = position + (row + 1) * learned
    index = torch.arange(rows + 1, device=q.device, dtype=torch.int32) * learned
    bounds = row_bounds + index
    first = (bounds[:-1, None] + torch.arange(learned, device=q.device)).flatten().long()

    def joined(own: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
        # Queries of the learned tokens are zero, and nobody reads what they see: with them a
        # prefix is a row's first tokens, and nothing has to say who sees whom.
        whole = own.new_zeros(len(own) + rows * learned, *own.shape[1:])
        whole = whole.index_copy(0, place, own)
        if before is None:
            return whole
        return whole.index_copy(0, first, before.transpose(0, 1).to(own.dtype).repeat(rows, 1, 1))

    q, k, v = joined(q, None), joined(k, past[0]), joined(v, past[1])
    return _call(q, k, v, bounds, longest + learned, scaling, sliding_window)[place][None]


def _call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """Call the kernel with [T, heads, head size] each."""
    from torch.nn.attention.varlen import varlen_attn

    before = -1 if sliding_window is None else sliding_window - 1
    out = varlen_attn(
        query,
        key,
        value,
        bounds,
        bounds,
        longest,
        longest,
        scale=scaling,
        window_size=(before, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, torch.Tensor)
    return out


def in_half(part: torch.Tensor) -> torch.Tensor:
    """Return a tensor as autocast would hand it to torch's own attention."""
    if part.dtype in DTYPES or not torch.is_autocast_enabled("cuda"):
        return part
    return part.to(torch.get_autocast_dtype("cuda"))
