"""Elias-Fano: ascending indices in few bits, written and read entry by entry.

See `hvd_sparse.kernels.coding` for what the bits are. Whatever they are, nothing is
read behind them: indices that a damaged payload has are fewer, or do not ascend, or are
out of range, which is for the caller to see.
"""

from typing import Any

import numpy as np

from hvd_sparse.kernels.coding import shift, unary_bits
from hvd_sparse.kernels.host.bits import AT_ONCE, bits_at, put_word, word_at
from hvd_sparse.kernels.host.jit import jit
from hvd_sparse.kernels.host.simd import bit_count, lowest_bit


@jit
def write_indices(data: Any, indices: Any, n: int) -> None:
    """Overwrites data with (k,) ascending indices below n."""
    data[:] = 0
    low = shift(n, indices.size)
    _write_high_parts(data, indices, low)
    _write_low_bits(data, unary_bits(n, indices.size, low), indices, low)


@jit
def _write_high_parts(data: Any, indices: Any, low: int) -> None:
    """Into zeros: ones that fall into the same eight bytes are stored at once."""
    byte, word = 0, np.uint64(0)
    for i in range(indices.size):
        one = (int(indices[i]) >> low) + i
        if one >= 8 * byte + 64:
            put_word(data, byte, word)
            byte, word = one >> 3, np.uint64(0)
        word |= np.uint64(1) << np.uint64(one - 8 * byte)
    put_word(data, byte, word)


@jit
def _write_low_bits(data: Any, at: int, indices: Any, low: int) -> None:
    """From this bit on, into zeros; what is in its byte before it stays."""
    if low == 0:
        return
    mask = np.uint64((1 << low) - 1)
    byte, held = at >> 3, at & 7
    word = np.uint64(data[byte]) if held else np.uint64(0)
    for i in range(indices.size):
        word |= (np.uint64(indices[i]) & mask) << np.uint64(held)
        held += low
        if held >= 32:
            put_word(data, byte, word)
            word >>= np.uint64(32)
            byte, held = byte + 4, held - 32
    put_word(data, byte, word)


@jit
def read_until(
    data: Any, low: int, unary: int, k: int, entry: int, at: int, stop: int, found: Any
) -> Any:
    """Overwrites found with the next indices, up to one that is not below stop.

    Args:
        data: the bytes.
        low: bits of each low part.
        unary: bits of all high parts.
        k: entries.
        entry: the next one.
        at: the bit from which to look for it.
        stop: where to end, if found is not full before.
        found: (most,) int32.

    Returns:
        How many there were, and the bit from which to look for the next.
    """
    count, most = 0, min(k - entry, found.size)
    low_at, mask = unary + entry * low, (np.uint64(1) << np.uint64(low)) - np.uint64(1)
    inside = 8 * (data.size - 8)  # up to here a whole word can be read at once
    while count < most and at < unary:
        word = bits_at(data, at, min(AT_ONCE, unary - at))
        while word and count < most:  # a one is an entry, a zero the next bucket
            one = at + lowest_bit(word)
            if low_at < inside:
                part = (word_at(data, low_at >> 3) >> np.uint64(low_at & 7)) & mask
            else:
                part = bits_at(data, low_at, low)
            index = (one - entry - count) << low | np.int64(part)
            if index >= stop:
                return count, one
            found[np.uint64(count)] = index
            word &= word - np.uint64(1)
            count, low_at = count + 1, low_at + low
        if word:
            return count, at + lowest_bit(word)
        at += AT_ONCE
    return count, at


@jit
def seek(data: Any, low: int, unary: int, k: int, first: int, found: Any) -> Any:
    """The first entry whose index is at least `first`, and the bit to look from.

    Arguments are those of `read_until`; found is overwritten.
    """
    at, buckets, wanted = 0, 0, first >> low
    while buckets < wanted and at < unary:
        size = min(AT_ONCE, unary - at)
        zeros = size - bit_count(bits_at(data, at, size))
        if buckets + zeros >= wanted:  # what follows the last of them belongs there
            size, zeros = 1, 1 - np.int64(bits_at(data, at, 1))
        buckets += zeros
        at += size
    entry = at - buckets
    count = 1
    while count:  # of its bucket some may be below
        count, at = read_until(data, low, unary, k, entry, at, first, found)
        entry += count
    return entry, at
