"""On a CPU short rows attend in float32 whatever autocast says, and long ones in 16 bits."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from peft_dist.model.attention import FLOAT32_TOKENS, _row_attention


def attended(
    lengths: tuple[int, ...], *, under_autocast: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return what rows give, [1, T, heads, head size], and queries, keys and values, bfloat16."""
    source = torch.Generator().manual_seed(0)
    made = [
        torch.randn(1, heads, sum(lengths), 16, generator=source).bfloat16() for heads in (4, 2, 2)
    ]
    with torch.autocast("cpu", torch.bfloat16, enabled=under_autocast):
        out, _ = _row_attention(SimpleNamespace(layer_idx=0), *made, None, row_lengths=lengths)
    return out, made


@pytest.mark.parametrize("lengths", [(17, 12), (FLOAT32_TOKENS, 3)])
def test_short_rows_are_float32s_own(lengths: tuple[int, ...]) -> None:
    out, made = attended(lengths, under_autocast=True)
    rows = zip(*(part.float().split(lengths, dim=2) for part in made), strict=True)
    exact = [scaled_dot_product_attention(*row, is_causal=True, enable_gqa=True) for row in rows]
    assert torch.equal(out, torch.cat(exact, dim=2).transpose(1, 2))


def test_one_long_row_leaves_all_of_them_in_16_bits() -> None:
    lengths = (FLOAT32_TOKENS + 1, 3)
    out, _ = attended(lengths, under_autocast=True)
    plain, _ = attended(lengths, under_autocast=False)
    assert out.dtype == torch.bfloat16 and torch.equal(out, plain)
