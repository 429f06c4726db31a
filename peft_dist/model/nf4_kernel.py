"""The Triton kernel that dequantizes NF4 weights and adds a low-rank update to them on the way.

Needs Triton, which torch brings for CUDA alone: import it where a run asks for the kernel.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from peft_dist.model.nf4 import levels

ROWS, COLUMNS = 64, 128
"""Of the weight that one program makes."""
WARPS, STAGES = 8, 1
"""Loops of two turns need no pipeline, which would take twice the registers."""
RANKS = (16, 32)
"""Of A and B that are multiplied at once: for a rank of 16 or less, and for others."""


@triton.jit  # type: ignore[untyped-decorator]
def weight_kernel(  # type: ignore[no-untyped-def]  # Triton reads its annotations
    packed,
    scales,
    levels,
    a,
    b,
    out,
    n_rows,
    n_columns,
    rank,
    factor,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Make one tile of the weight: levels[codes] * scales + factor * b @ a, summed in float32."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    is_row = row[:, None] < n_rows
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column[None, :] < n_columns
    update = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rank, RANKS):
        r = start + tl.arange(0, RANKS)
        b_part = tl.load(b + row[:, None] * rank + r[None, :], is_row & (r < rank)[None, :], 0.0)
        at_a = a + r[:, None].to(tl.int64) * n_columns + column[None, :]
        a_part = tl.load(at_a, (r < rank)[:, None] & is_column, 0.0)
        update = tl.dot(b_part, a_part, update, input_precision=PRECISION)

    pair = tl.program_id(1) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
    is_pair = is_row & (pair[None, :] < n_columns // 2)
    codes = tl.load(packed + row[:, None] * (n_columns // 2) + pair[None, :], is_pair, other=0)
    of_block = row[:, None] * (n_columns // BLOCK) + (pair // (BLOCK // 2))[None, :]
    scale = tl.load(scales + of_block, is_pair, other=0.0)
    first = tl.load(levels + (codes >> 4)) * scale
    second = tl.load(levels + (codes & 15)) * scale
    weight = tl.interleave(first, second) + factor * update
    at = out + row[:, None] * n_columns + column[None, :]
    tl.store(at, weight.to(out.dtype.element_ty), is_row & is_column)


def compiled_for(rank: int, block_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return the constants of the kernel by name.

    TF32 keeps more digits of A and B than bfloat16, and as many as float16.
    """
    return {
        "BLOCK": block_size,
        "ROWS": ROWS,
        "COLUMNS": COLUMNS,
        "RANKS": RANKS[rank > RANKS[0]],
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
    }


def updated_weight(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    factor: float,
    block_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return dequantize(packed) + factor * b @ a, [out, in], rounded once.

    Args:
        packed: uint8 [out, in / 2], as `nf4.quantize_rows` makes it.
        absmax: uint8 [out, in / block_size * 4].
        a: float32 [r, in].
        b: float32 [out, r].
        factor: What the update is multiplied by.
        block_size: Values per scale.
        dtype: Of the result.
    """
    n_rows, n_columns = packed.shape[0], packed.shape[1] * 2
    out = torch.empty(n_rows, n_columns, dtype=dtype, device=packed.device)
    grid = (triton.cdiv(n_rows, ROWS), triton.cdiv(n_columns, COLUMNS))
    weight_kernel[grid](
        packed,
        absmax.view(torch.float32),
        levels(packed.device),
        a,
        b,
        out,
        n_rows,
        n_columns,
        len(a),
        factor,
        num_warps=WARPS,
        num_stages=STAGES,
        **compiled_for(len(a), block_size, dtype),
    )
    return out
