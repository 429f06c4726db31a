"""Causal attention over rows laid end to end, one row at a time, without a mask.

A block-diagonal mask over a packed micro-batch costs its length squared; the rows cost the sum of
theirs. Not for models that cap attention scores, nor for encoders.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

ROW_ATTENTION = "peft_dist_rows"
"""The name it has in transformers, which makes no mask for names it does not know."""


def register() -> None:
    """Make `ROW_ATTENTION` known to transformers."""
    AttentionInterface.register(ROW_ATTENTION, _row_attention)


def _row_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    row_lengths: tuple[int, ...] | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within rows.

    Args:
        module: The attention layer, for nothing.
        query: [B, heads, T, head size].
        key: [B, key-value heads, T, head size].
        value: Like `key`.
        attention_mask: Not used. Rows padded on the right need none: no real token looks ahead.
        row_lengths: Tokens of each packed row, B is 1 then; None for one row per sequence.
        dropout: Probability of dropping an attention weight.
        scaling: Factor of the scores. Default: 1 / sqrt(head size).
        sliding_window: How many tokens, itself included, a token sees. Off: all before it.

    Returns:
        [B, T, heads, head size], and no weights.
    """
    lengths = [query.shape[2]] if row_lengths is None else list(row_lengths)
    outputs = []
    for q, k, v in zip(
        query.split(lengths, dim=2),
        key.split(lengths, dim=2),
        value.split(lengths, dim=2),
        strict=True,
    ):
        length = q.shape[2]
        windowed = sliding_window is not None and length > sliding_window
        outputs.append(
            scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=_band(length, sliding_window, q.device) if windowed else None,
                is_causal=not windowed,
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        )
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return joined.transpose(1, 2).contiguous(), None


def _band(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return [length, length], true where a token may look: at itself and `window` - 1 before."""
    assert window is not None
    place = torch.arange(length, device=device)
    distance = place[:, None] - place[None, :]
    return (distance >= 0) & (distance < window)
