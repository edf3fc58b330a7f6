"""The sum of all payloads, rank by rank: the same bits on every rank."""

from typing import Any

import numpy as np
from numba import carray

from hvd_sparse.kernels.host.arrays import INDICES, Array, address
from hvd_sparse.kernels.host.jit import jit
from hvd_sparse.kernels.host.simd import LANES, lowest_bit, pointer_to, prefetch
from hvd_sparse.kernels.host.threads import parts, run_parts
from hvd_sparse.kernels.host.zeros import are_streamed, stream_zeros

_CHUNK = 1 << 14  # elements of the handed-back gradient finished while in cache
_BLOCKS = _CHUNK // LANES  # of a chunk; those that an entry falls into are scaled
_AHEAD = 16  # entries of a payload: their cache lines arrive together


@jit
def _lower_bound(indices: Any, index: int) -> int:
    low, high = 0, indices.size
    while low < high:
        middle = (low + high) // 2
        if indices[middle] < index:
            low = middle + 1
        else:
            high = middle
    return low


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
    table: Any,
    like: Any,
    scale: Any,
    cleared: bool,
    streamed: bool,
) -> int:
    """Overwrites out with the scaled sum of all payloads' entries in [first, stop).

    It is cleared already, or zeros are streamed into it, or else they are written.

    Returns how many entries there were: indices that do not ascend are not followed, so
    a damaged payload can not write outside of out.
    """
    taken = 0
    if streamed:
        stream_zeros(out, first - offset, stop - offset)
    ranks = table.shape[0]
    cursors = np.empty(ranks, np.int64)
    for rank in range(ranks):
        indices = carray(pointer_to(table[rank, 0], like), (table[rank, 2],))
        cursors[rank] = _lower_bound(indices, first)
    touched = np.zeros(_BLOCKS // 64, np.uint64)  # a bit a block of the chunk
    # all ranks' entries of a chunk while it is in cache: each element is added up rank
    # by rank all the same
    for low in range(first, stop, _CHUNK):
        high = min(low + _CHUNK, stop)
        before = taken
        if not (cleared or streamed):
            out[low - offset : high - offset] = 0
        for rank in range(ranks):
            count = table[rank, 2]
            indices = carray(pointer_to(table[rank, 0], like), (count,))
            values = carray(pointer_to(table[rank, 1], out), (count,))
            cursor = cursors[rank]
            last = low - 1
            while cursor < count and last < indices[cursor] < high:
                last = indices[cursor]
                ahead = indices[min(cursor + _AHEAD, count - 1)]
                prefetch(out, ahead - offset)  # wherever that is: it can not fault
                out[last - offset] += values[cursor]
                block = (last - low) // LANES
                touched[block // 64] |= np.uint64(1) << np.uint64(block % 64)
                cursor += 1
            taken += cursor - cursors[rank]
            cursors[rank] = cursor
        if taken > before and scale != 1:
            _scale_blocks(out[low - offset : high - offset], touched, scale)
    return taken


def aggregate(
    out: Array,
    payloads: list[tuple[Array, Array]],
    scale: float,
    cleared: bool = False,
) -> None:
    """Overwrites out with scale * (payload_0 + payload_1 + ...), rank by rank.

    Args:
        out: (n,) contiguous, of the gradient's dtype; every element is written.
        payloads: per rank, ascending int32 indices and values of the residual's dtype.
        scale: 1/P for the average, 1 for the sum; rounded to the values' dtype.
        cleared: out is all 0 already, so that only the entries need be written.

    Raises:
        ValueError: some indices are not ascending in [0, n).
    """
    table = np.array([[address(i), address(v), i.size] for i, v in payloads], np.int64)
    given = int(table[:, 2].sum())
    if out.dtype.itemsize > 2:
        streamed = not cleared and are_streamed(out.size, out.dtype.itemsize, given)
        taken = _sum_wide(out, table, scale, cleared, streamed)
    else:
        taken = _sum_narrow(out, table, scale)
    if taken != given:
        raise ValueError(
            f"indices must ascend in [0, {out.size}), {given - taken} of {given} do not"
        )


def _sum_wide(
    out: Array, table: Array, scale: float, cleared: bool, streamed: bool
) -> int:
    factor = out.dtype.type(scale)

    def one_part(first: int, stop: int) -> int:
        return int(
            sum_entries(out, 0, first, stop, table, INDICES, factor, cleared, streamed)
        )

    return sum(run_parts(one_part, parts(out.size, _CHUNK)))


def _sum_narrow(out: Array, table: Array, scale: float) -> int:
    """16-bit gradients: sums are float32 and rounded once, a cached piece at a time."""
    piece = 16 * _CHUNK
    sums = np.empty(min(out.size, piece), np.float32)
    taken = 0
    for low in range(0, out.size, piece):
        high = min(low + piece, out.size)
        taken += sum_entries(
            sums, low, low, high, table, INDICES, np.float32(scale), False, False
        )
        with np.errstate(over="ignore"):  # beyond float16 is inf, as in any cast
            out[low:high] = sums[: high - low]
    return taken
