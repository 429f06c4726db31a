"""A hash of base bytes that shards can compute alone and add up.

It proves that the same bytes stand at the same places, at any world size; it is no defence
against somebody who wants a collision.
"""

import torch

_CHUNK_WORDS = 1 << 22
_GOLDEN = -7046029254386353131
"""2^64 / golden ratio as a signed 64-bit integer, the usual multiplier of a Fibonacci hash."""


def fingerprint_rows(rows: torch.Tensor, first_row: int) -> int:
    """Return the fingerprint of rows [n, ...] that begin at `first_row` of their tensor.

    Multilinear: sum over words of word x odd pseudo-random multiplier of the word's place, modulo
    2^64. So the fingerprint of a tensor is the sum of those of its parts, and any change of one
    word changes it. Runs on the tensor's own device.
    """
    if rows.numel() == 0:
        return 0
    flat = rows.detach().contiguous().reshape(rows.shape[0], -1).view(torch.uint8)
    row_bytes = flat.shape[1]
    word = next(
        dtype
        for dtype, size in ((torch.int64, 8), (torch.int32, 4), (torch.int16, 2), (torch.uint8, 1))
        if row_bytes % size == 0
    )
    words = flat.reshape(-1).view(word)
    offset = first_row * (row_bytes // words.element_size())
    total = torch.zeros((), dtype=torch.int64, device=rows.device)
    for start in range(0, words.numel(), _CHUNK_WORDS):
        part = words[start : start + _CHUNK_WORDS].to(torch.int64)
        place = torch.arange(
            offset + start, offset + start + part.numel(), device=rows.device, dtype=torch.int64
        )
        multiplier = place * _GOLDEN
        multiplier ^= multiplier >> 29
        multiplier *= _GOLDEN
        multiplier |= 1
        total += (part * multiplier).sum()
    return int(total)


def wrap_int64(value: int) -> int:
    """Reduce an integer to a signed 64-bit one, as sums of fingerprints are."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
