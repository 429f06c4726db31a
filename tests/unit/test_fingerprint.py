"""The hash of base bytes: parts add up to the whole, and no change escapes it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_dist.model.fingerprint import fingerprint_piece, fingerprint_rows, wrap_int64

SHAPES = [(7, 16), (7, 3), (5, 1), (6,), (4, 2, 3)]
DTYPES = [torch.uint8, torch.float32, torch.bfloat16]


def rows(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 100
    return values.abs().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_parts_of_any_two_shards_add_up(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    whole = rows(shape, dtype)
    expected = fingerprint_rows(whole, 0)
    for cut in range(shape[0] + 1):
        parts = fingerprint_rows(whole[:cut], 0) + fingerprint_rows(whole[cut:], cut)
        assert wrap_int64(parts) == expected


@settings(deadline=None)  # a busy machine is not a fault
@given(st.integers(0, 7 * 16 * 4 - 1), st.integers(0, 7))
def test_every_flipped_bit_shows(byte: int, bit: int) -> None:
    whole = rows((7, 16), torch.float32)
    changed = whole.clone()
    changed.view(torch.uint8).view(-1)[byte] ^= 1 << bit
    assert fingerprint_rows(changed, 0) != fingerprint_rows(whole, 0)


def test_order_and_place_count() -> None:
    whole = rows((8, 4), torch.uint8)
    assert fingerprint_rows(whole.flip(0), 0) != fingerprint_rows(whole, 0)
    assert fingerprint_rows(whole, 1) != fingerprint_rows(whole, 0)


def test_a_tensor_of_several_chunks_is_the_sum_of_its_rows() -> None:
    whole = torch.arange(5 << 20, dtype=torch.int64).view(5, -1)
    parts = sum(fingerprint_rows(whole[row : row + 1], row) for row in range(5))
    assert wrap_int64(parts) == fingerprint_rows(whole, 0)


@settings(deadline=None)  # a busy machine is not a fault
@given(st.integers(-(2**80), 2**80))
def test_wrapping_is_what_a_64_bit_sum_does(value: int) -> None:
    wrapped = wrap_int64(value)
    assert -(2**63) <= wrapped < 2**63
    assert (wrapped - value) % 2**64 == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_pieces_that_cut_rows_and_words_add_up_to_the_whole(
    dtype: torch.dtype, columns: int, count: int
) -> None:
    torch.manual_seed(0)
    whole = (torch.randn(7, columns) * 100).to(dtype)
    size = -(-whole.numel() // count)
    parts = [
        fingerprint_piece(piece, index * size, row_size=columns)
        for index, piece in enumerate(whole.flatten().split(size))
    ]
    assert wrap_int64(sum(parts)) == fingerprint_rows(whole, 0)
