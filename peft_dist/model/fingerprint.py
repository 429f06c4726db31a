"""A hash of base bytes that shards can compute alone and add up.

It proves that the same bytes stand at the same places, at any world size; it is no defence
against somebody who wants a collision.
"""

import torch
from torch.nn import functional

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
    row_size = rows.numel() // rows.shape[0]
    return fingerprint_piece(rows.detach().reshape(-1), first_row * row_size, row_size=row_size)


def fingerprint_piece(
    piece: torch.Tensor, first: int, *, row_size: int, width: int | None = None
) -> int:
    """Return the fingerprint of elements [n] that begin at element `first` of their tensor.

    A piece may begin and end inside a word: a word is the sum of its bytes, each at its place, so
    the two parts of a cut word, filled up with zeros, add up to it.

    Args:
        piece: The elements.
        first: Place of the first one in the flattened tensor.
        row_size: Elements per row of the tensor.
        width: Elements of each row that are in the piece, where it is some columns; they are whole
            words. Default: all, and a piece is elements side by side.
    """
    if piece.numel() == 0:
        return 0
    row_bytes = row_size * piece.element_size()
    word = next(
        dtype
        for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8)
        if row_bytes % dtype.itemsize == 0
    )
    flat = piece.detach().contiguous().view(torch.uint8)
    offset, before = divmod(first * piece.element_size(), word.itemsize)
    after = -(before + flat.numel()) % word.itemsize
    if before or after:
        flat = functional.pad(flat, (before, after))
    words = flat.view(word)
    row_words = row_bytes // word.itemsize
    own_words = row_words if width is None else width * piece.element_size() // word.itemsize
    total = torch.zeros((), dtype=torch.int64, device=piece.device)
    for start in range(0, words.numel(), _CHUNK_WORDS):
        part = words[start : start + _CHUNK_WORDS].to(torch.int64)
        position = torch.arange(start, start + part.numel(), device=piece.device, dtype=torch.int64)
        if own_words != row_words:
            position += position // own_words * (row_words - own_words)
        position += offset
        multiplier = position * _GOLDEN
        multiplier ^= multiplier >> 29
        multiplier *= _GOLDEN
        multiplier |= 1
        total += (part * multiplier).sum()
    return int(total)


def wrap_int64(value: int) -> int:
    """Reduce an integer to a signed 64-bit one, as sums of fingerprints are."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
