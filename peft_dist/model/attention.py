"""Causal attention over rows laid end to end, without a mask: one row at a time, or in one call.

A block-diagonal mask over a packed micro-batch costs its length squared; the rows cost the sum of
theirs. It is also where a learned prefix enters. Not for encoders.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import dropout as drop
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from peft_dist.model import capped, varlen

ROW_ATTENTION = "peft_dist_rows"
"""The name it has in transformers, which makes no mask for names it does not know."""
VARLEN_ATTENTION = "peft_dist_varlen"
"""The same in one call for all rows, where `varlen.has_kernel` says that there is one."""
OURS = (VARLEN_ATTENTION, ROW_ATTENTION)

FLOAT32_TOKENS = 128
"""Tokens of a row up to which a CPU attends faster in float32 than in 16 bits: forward and backward
of 17 tokens take a quarter of the time, of 128 0.6 to 0.8 of it, and from 256 on they take more."""

_NOT_TOLD = "not told"
_HARMLESS = ("cache_position", "position_ids")
"""Tensors that layers pass to attention and that it has no use for."""
_gap: str | None = None

_recorded: dict[int, torch.Tensor] | None = None


def register() -> None:
    """Make `OURS` known to transformers."""
    AttentionInterface.register(ROW_ATTENTION, _row_attention)
    AttentionInterface.register(VARLEN_ATTENTION, partial(_row_attention, one_call=True))


def kernels_of(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return which of `OURS` a device has for a dtype, the fastest first."""
    return list(OURS if varlen.has_kernel(device, dtype) else OURS[1:])


def use_kernel(model: PreTrainedModel, name: str) -> bool:
    """Let a model compute attention with a kernel, by name; return whether it does.

    Models that do not call attention through transformers' interface keep what they were built
    with, and transformers only warns (`PreTrainedModel.set_attn_implementation`).
    """
    if name != model.config._attn_implementation and model._can_set_attn_implementation():
        model.set_attn_implementation(name)
    return bool(model.config._attn_implementation == name)


def has_own_code(config: PretrainedConfig) -> bool:
    """Whether the kernel of a model is compiled for it, also where its blocks are not."""
    return config._attn_implementation == VARLEN_ATTENTION and capped.cap_of(config) is not None


def find_gap() -> str | None:
    """Return what our attention lacked for a model, since this was asked last; None for nothing.

    Rows or a prefix that layers do not pass on never reach it.
    """
    global _gap
    gap, _gap = _gap, None
    return gap


@contextmanager
def recording() -> Iterator[dict[int, torch.Tensor]]:
    """Collect the keys and values of every layer, [2, key-value heads, T, head size] by index.

    For passes over one row. Keys are as attention sees them: with their positions in them.
    """
    global _recorded
    _recorded = {}
    try:
        yield _recorded
    finally:
        _recorded = None


def _row_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    row_lengths: tuple[int, ...] | torch.Tensor | str | None = _NOT_TOLD,
    row_bounds: torch.Tensor | None = None,
    longest_row: int | torch.Tensor = 0,
    row_blocks: Mapping[int | None, capped.RowBlocks] | capped.RowBlocks | None = None,
    one_call: bool = False,
    prefix: tuple[torch.Tensor, ...] | torch.Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within rows.

    Args:
        module: The attention layer, for its index.
        query: [B, heads, T, head size].
        key: [B, key-value heads, T, head size].
        value: Like `key`.
        attention_mask: Not used. Rows padded on the right need none: no real token looks ahead.
            transformers makes none for this kernel, so that one of four dimensions is the model's
            own and may hold a bias: see `find_gap`.
        row_lengths: Tokens of each packed row, B is 1 then; None for one row per sequence. Compiled
            blocks get a tensor, int64 [rows] on the host: code for it is made once for all lengths.
        row_bounds: int32 [rows + 1] where each packed row begins, and the end, on the device.
        longest_row: Tokens of the longest of packed rows; compiled blocks get a tensor of so many.
        row_blocks: Who sees whom in packed rows, by a layer's window, or of this layer; for models
            that cap their scores.
        one_call: Compute all packed rows at once where the kernel for it can.
        prefix: Of every layer, or of this one, keys and values that stand before each row's own:
            [2, key-value heads, P, head size].
        dropout: Probability of dropping an attention weight.
        scaling: Factor of the scores. Default: 1 / sqrt(head size).
        sliding_window: How many tokens, itself included, a token sees. Off: all before it.
        more: What else a layer passes. A tensor that is not known to be harmless would change what
            attention computes, such as learned sinks or a bias by distance: see `find_gap`.
        softcap: Scores are squeezed into (-softcap, softcap) by a tanh. Off: left as they are.

    Returns:
        [B, T, heads, head size], and no weights.
    """
    global _gap
    if isinstance(row_lengths, str):
        _gap, row_lengths = "its layers do not pass on where rows begin", None
    unknown = [name for name, value in more.items() if isinstance(value, torch.Tensor)]
    if unknown := [name for name in unknown if name not in _HARMLESS]:
        _gap = f"this attention knows no {unknown[0]}"
    if attention_mask is not None and attention_mask.dim() == 4:
        _gap = "this attention knows no mask of the model's own"
    if _recorded is not None:
        _recorded[module.layer_idx] = torch.stack([key[0], value[0]])
    learned = prefix[module.layer_idx] if isinstance(prefix, tuple) else prefix
    past = None if learned is None else learned.to(key.dtype)
    if isinstance(row_blocks, Mapping):
        row_blocks = row_blocks.get(sliding_window)
    if one_call and softcap is not None and dropout == 0.0 and row_blocks is not None:
        at_once = capped.attend_rows(
            query, key, value, blocks=row_blocks, past=past, scaling=scaling
        )
        if at_once is not None:
            return at_once, None
        _gap = "its capped scores could not be compiled"
    if (
        one_call
        and row_lengths is not None
        and row_bounds is not None
        and varlen.can_attend(query, dropout=dropout, softcap=softcap)
    ):
        out = varlen.attend_rows(
            query,
            key,
            value,
            row_bounds=row_bounds,
            longest=longest_row if isinstance(longest_row, int) else longest_row.shape[0],
            past=past,
            scaling=scaling,
            sliding_window=sliding_window,
        )
        return out, None
    lengths = [query.shape[2]] if row_lengths is None else list(map(int, row_lengths))
    settings = _RowSettings(dropout, scaling, sliding_window, softcap)
    if _is_faster_in_float32(query, lengths):
        with torch.autocast("cpu", enabled=False):
            past = None if past is None else past.float()
            query, key, value = query.float(), key.float(), value.float()
            return _attend_by_row(query, key, value, past, lengths, settings), None
    return _attend_by_row(query, key, value, past, lengths, settings), None


def _is_faster_in_float32(query: torch.Tensor, lengths: list[int]) -> bool:
    """Whether rows are so short; compiled code, for rows of all lengths, does not ask."""
    if query.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return torch.is_autocast_enabled("cpu") and max(lengths) <= FLOAT32_TOKENS


@dataclass(frozen=True)
class _RowSettings:
    """What attention within rows does besides; see `_row_attention`."""

    dropout: float
    scaling: float | None
    sliding_window: int | None
    softcap: float | None


def _attend_by_row(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past: torch.Tensor | None,
    lengths: list[int],
    settings: _RowSettings,
) -> torch.Tensor:
    """Attend within one row after another; shapes as in `_row_attention`."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and query.is_cuda:
        # Of a GPU's kernels only flash knows groups; where it is not picked, with a mask or in
        # float32, torch would take the one that keeps all scores.
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        past = None if past is None else past.repeat_interleave(groups, dim=1)
    window, outputs = settings.sliding_window, []
    for q, k, v in zip(
        query.split(lengths, dim=2),
        key.split(lengths, dim=2),
        value.split(lengths, dim=2),
        strict=True,
    ):
        if past is not None:
            k = torch.cat([past[0].expand(len(k), -1, -1, -1), k], dim=2)
            v = torch.cat([past[1].expand(len(v), -1, -1, -1), v], dim=2)
            # With queries of its own, which nobody reads, a prefix is a row's first tokens: no
            # mask is needed to say who sees whom.
            q = pad(q, (0, 0, past.shape[2], 0))
        length = q.shape[2]
        windowed = window is not None and length > window
        if settings.softcap is None:
            out = scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=_band(length, window, q.device) if windowed else None,
                is_causal=not windowed,
                dropout_p=settings.dropout,
                scale=settings.scaling,
                **_groups(q, k),
            )
        else:
            out = capped_attention(
                *(q, k, v, window if windowed else length),
                *(settings.dropout, settings.scaling, settings.softcap),
            )
        outputs.append(out if past is None else out[:, :, past.shape[2] :])
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return joined.transpose(1, 2).contiguous()


def _groups(query: torch.Tensor, key: torch.Tensor) -> dict[str, bool]:
    """Return the setting for groups of heads; decided here, for where sizes are symbols."""
    return {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}


def capped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int | None,
    dropout: float,
    scaling: float | None,
    softcap: float,
) -> torch.Tensor:
    """Attend with capped scores within a window, which torch's own kernels do not do."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.tanh(query @ key.transpose(2, 3) * (scale / softcap)) * softcap
    mask = _band(query.shape[2], window, query.device)
    scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return drop(weights, dropout) @ value


def _band(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return [length, length], true where a token may look: at itself and `window` - 1 before."""
    assert window is not None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)
