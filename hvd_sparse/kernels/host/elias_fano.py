"""Elias-Fano: ascending indices in few bits, written and read entry by entry.

See `hvd_sparse.kernels.coding` for what the bits are. Whatever they are, nothing is
read behind them: indices that a damaged payload has are fewer, or do not ascend, or are
out of range, which is for the caller to see.
"""

from typing import Any

import numpy as np

from hvd_sparse.kernels.coding import shift, unary_bits
from hvd_sparse.kernels.host.bits import AT_ONCE, bits_at, set_bits
from hvd_sparse.kernels.host.jit import jit
from hvd_sparse.kernels.host.simd import bit_count, lowest_bit


@jit
def write_indices(data: Any, indices: Any, n: int) -> None:
    """Overwrites data with (k,) ascending indices below n."""
    data[:] = 0
    k = indices.size
    low = shift(n, k)
    unary = unary_bits(n, k, low)
    mask = (1 << low) - 1
    for i in range(k):
        index = np.int64(indices[i])
        at = (index >> low) + i
        data[at >> 3] |= np.uint8(1 << (at & 7))
        set_bits(data, unary + i * low, index & mask)


@jit
def _next_one(data: Any, at: int, end: int) -> Any:
    """The first bit in [at, end) that is set, or -1."""
    while at < end:
        word = bits_at(data, at, min(AT_ONCE, end - at))
        if word:
            return at + lowest_bit(word)
        at += AT_ONCE
    return -1


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
    count = 0
    while entry + count < k and count < found.size:
        one = _next_one(data, at, unary)
        if one < 0:
            break
        high = one - entry - count
        index = high << low
        if low:
            index |= np.int64(bits_at(data, unary + (entry + count) * low, low))
        if index >= stop:
            break
        found[count] = index
        count += 1
        at = one + 1
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
