"""The sum of all payloads, rank by rank: the same bits on every rank."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hvd_sparse.kernels.coding import Coded, plain
from hvd_sparse.kernels.host.arrays import BYTES, INDICES, Array
from hvd_sparse.kernels.host.entries import (
    find_entry,
    next_indices,
    next_values,
    row_of,
)
from hvd_sparse.kernels.host.jit import jit
from hvd_sparse.kernels.host.simd import (
    LANES,
    from_bits,
    lowest_bit,
    magnitude_bits,
    prefetch,
)
from hvd_sparse.kernels.host.threads import parts, run_parts
from hvd_sparse.kernels.host.zeros import are_streamed, stream_zeros

_CHUNK = 1 << 14  # elements of the handed-back gradient finished while in cache
_BLOCKS = _CHUNK // LANES  # of a chunk; those that an entry falls into are scaled
_AHEAD = 16  # entries of a payload: their cache lines arrive together


@jit
def _scale_blocks(out: Any, touched: Any, scale: Any) -> None:
    """Scales the blocks of 16 that were touched, and forgets that they were."""
    for word in range(touched.size):
        while touched[word]:
            block = 64 * word + lowest_bit(touched[word])
            touched[word] &= touched[word] - np.uint64(1)
            for i in range(block * LANES, min((block + 1) * LANES, out.size)):
                out[i] *= scale


@jit
def sum_entries(
    out: Any,
    offset: int,
    first: int,
    stop: int,
    n: int,
    table: Any,
    like: Any,
    bytes_like: Any,
    scale: Any,
    cleared: bool,
    streamed: bool,
    indices_room: Any,
    values_room: Any,
) -> int:
    """Overwrites out with the scaled sum of all payloads' entries in [first, stop).

    It is cleared already, or zeros are streamed into it, or else they are written. What
    travels as something else than arrays is decoded into what `rooms` gave, a chunk at
    a time.

    Returns how many entries there were: indices that do not ascend are not followed, so
    a damaged payload can not write outside of out; and those of a chunk with a value
    that is not finite, which no rank sends, do not count.
    """
    taken = 0
    if streamed:
        stream_zeros(out, first - offset, stop - offset)
    ranks = table.shape[0]
    entries, places = np.empty(ranks, np.int64), np.empty(ranks, np.int64)
    for rank in range(ranks):
        entries[rank], places[rank] = find_entry(
            table[rank], n, first, indices_room, like, bytes_like
        )
    touched = np.zeros(_BLOCKS // 64, np.uint64)  # a bit a block of the chunk
    # all ranks' entries of a chunk while it is in cache: each element is added up rank
    # by rank all the same
    for low in range(first, stop, _CHUNK):
        high = min(low + _CHUNK, stop)
        before = taken
        if not (cleared or streamed):
            out[low - offset : high - offset] = 0
        for rank in range(ranks):
            row, entry = table[rank], entries[rank]
            indices, places[rank] = next_indices(
                row, n, entry, places[rank], high, indices_room, like, bytes_like
            )
            count = indices.size
            values = next_values(row, entry, count, values_room, bytes_like)
            last, i, most = low - 1, 0, np.uint64(0)
            while i < count and last < indices[i] < high:
                last = indices[i]
                ahead = indices[min(i + _AHEAD, count - 1)]
                prefetch(out, ahead - offset)  # wherever that is: it can not fault
                out[last - offset] += values[i]
                most = max(most, magnitude_bits(values[i]))
                block = (last - low) // LANES
                touched[block // 64] |= np.uint64(1) << np.uint64(block % 64)
                i += 1
            if math.isfinite(from_bits(most, values)):
                taken += i
            entries[rank] += count
        if taken > before and scale != 1:
            _scale_blocks(out[low - offset : high - offset], touched, scale)
    return taken


def rooms(n: int, dtype: Any) -> tuple[Array, Array]:
    """For the indices and values of a chunk of an array of n elements."""
    most = min(n, _CHUNK)
    return np.empty(most, np.int32), np.empty(most, dtype)


def aggregate(
    out: Array,
    payloads: Sequence[tuple[Array, Array]],
    scale: float,
    cleared: bool = False,
) -> None:
    """As aggregate_coded, of arrays: per rank, int32 indices and values."""
    aggregate_coded(out, [plain(*payload) for payload in payloads], scale, cleared)


def aggregate_coded(
    out: Array, payloads: Sequence[Coded], scale: float, cleared: bool = False
) -> None:
    """Overwrites out with scale * (payload_0 + payload_1 + ...), rank by rank.

    Args:
        out: (n,) contiguous, of the gradient's dtype; every element is written.
        payloads: per rank, ascending indices and values of the residual's dtype.
        scale: 1/P for the average, 1 for the sum; rounded to the values' dtype.
        cleared: out is all 0 already, so that only the entries need be written.

    Raises:
        ValueError: some indices are not ascending in [0, n), or values not finite.
    """
    table = np.array([row_of(payload) for payload in payloads], np.int64)
    given = int(table[:, 2].sum())
    if out.dtype.itemsize > 2:
        streamed = not cleared and are_streamed(out.size, out.dtype.itemsize, given)
        taken = _sum_wide(out, table, scale, cleared, streamed)
    else:
        taken = _sum_narrow(out, table, scale)
    if taken != given:
        raise ValueError(
            f"indices must ascend in [0, {out.size}), and values be finite: "
            f"{given - taken} of {given} do not"
        )


def _sum_wide(
    out: Array, table: Array, scale: float, cleared: bool, streamed: bool
) -> int:
    factor, n = out.dtype.type(scale), out.size

    def one_part(first: int, stop: int) -> int:
        where = out, 0, first, stop, n, table, INDICES, BYTES
        room = rooms(n, out.dtype)
        return int(sum_entries(*where, factor, cleared, streamed, *room))

    return sum(run_parts(one_part, parts(out.size, _CHUNK)))


def _sum_narrow(out: Array, table: Array, scale: float) -> int:
    """16-bit gradients: sums are float32 and rounded once, a cached piece at a time."""
    n, piece = out.size, 16 * _CHUNK
    sums = np.empty(min(n, piece), np.float32)
    room, factor = rooms(n, np.float32), np.float32(scale)
    taken = 0
    for low in range(0, n, piece):
        high = min(low + piece, n)
        where = sums, low, low, high, n, table, INDICES, BYTES
        taken += int(sum_entries(*where, factor, False, False, *room))
        with np.errstate(over="ignore"):  # beyond float16 is inf, as in any cast
            out[low:high] = sums[: high - low]
    return taken
