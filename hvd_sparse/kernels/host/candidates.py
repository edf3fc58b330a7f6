"""One pass over memory: add the gradient, and move out what reaches a bound."""

from typing import Any

import numpy as np

from hvd_sparse.kernels.contract import NothingAddedError
from hvd_sparse.kernels.host.arrays import Array, Selected, joined
from hvd_sparse.kernels.host.jit import jit
from hvd_sparse.kernels.host.largest import trim
from hvd_sparse.kernels.host.simd import (
    LANES,
    accumulate16,
    bit_count,
    clear16,
    lowest_bit,
)
from hvd_sparse.kernels.host.threads import parts, run_parts
from hvd_sparse.kernels.host.workspace import reserve

SPARE = 4096  # candidates a buffer holds beyond twice what is asked for
_STRETCH = 8192  # elements accumulated before their hits are looked at, in L1


@jit
def _accumulate(
    residual: Any,
    gradient: Any,
    stride: int,
    out: Any,
    clears: bool,
    first: int,
    stop: int,
    bound: Any,
    blocks: Any,
    masks: Any,
) -> int:
    """Overwrites residual[first:stop] with residual + gradient, and may clear out.

    Notes the blocks of 16 in which something reaches the bound or is not finite. No
    branch: hits are rare and come at random, so branches would be mispredicted.

    Returns how many blocks were noted.
    """
    noted = 0
    whole = stop - (stop - first) % LANES
    for at in range(first, whole, LANES):
        mask = accumulate16(residual, at, residual, at, gradient, at * stride, bound)
        if clears:  # the same every time, while out, the gradient, is in a register
            clear16(out, at)
        blocks[noted] = at
        masks[noted] = mask
        noted += mask != 0
    if whole < stop:  # the last elements, in lanes of their own: the same arithmetic
        left = stop - whole
        padded = np.zeros(LANES, residual.dtype)
        added = np.zeros(LANES, gradient.dtype)
        for i in range(left):
            padded[i] = residual[whole + i]
            added[i] = gradient[(whole + i) * stride]
        mask = accumulate16(padded, 0, padded, 0, added, 0, bound)
        for i in range(left):
            residual[whole + i] = padded[i]
        if clears:
            out[whole:stop] = 0
        real = (np.uint64(1) << np.uint64(left)) - np.uint64(1)
        blocks[noted] = whole
        masks[noted] = mask & (real | (real << np.uint64(LANES)))
        noted += masks[noted] != 0
    return noted


@jit
def compact(
    residual: Any,
    gradient: Any,
    stride: int,
    out: Any,
    clears: bool,
    first: int,
    stop: int,
    bound: Any,
    limit: int,
    indices: Any,
    values: Any,
) -> Any:
    """Overwrites residual[first:stop] with residual + gradient less the candidates.

    Candidates reach the bound; they move to the buffers while still in cache. With
    stride 0 the gradient is 16 times -0.0, which leaves every residual as it is.
    Where it clears, out[first:stop], which may be the gradient, becomes 0.

    Returns how many candidates there are and how many sums were not finite.
    """
    count = 0
    nonfinite = 0
    capacity = indices.size - LANES
    blocks = np.empty(_STRETCH // LANES + 1, np.int64)
    masks = np.empty(_STRETCH // LANES + 1, np.uint64)
    for low in range(first, stop, _STRETCH):
        high = min(low + _STRETCH, stop)
        noted = _accumulate(
            residual, gradient, stride, out, clears, low, high, bound, blocks, masks
        )
        for note in range(noted):
            if count > capacity:  # a block may add 16
                # above the least that is kept: what equals it and comes later loses
                bound = trim(residual, indices, values, count, limit)
                bound = np.nextafter(bound, residual.dtype.type(np.inf))
                count = limit
            nonfinite += bit_count(masks[note] >> np.uint64(LANES))
            hits = masks[note] & np.uint64(0xFFFF)
            while hits:
                i = blocks[note] + lowest_bit(hits)
                if abs(residual[i]) >= bound:  # which may have risen since
                    indices[count] = i
                    values[count] = residual[i]
                    residual[i] = 0
                    count += 1
                hits &= hits - np.uint64(1)
    return count, nonfinite


def buffers(residual: Array, size: int, limit: int) -> tuple[Array, Array]:
    """Room for the candidates among so many elements, and for a block beyond them."""
    room = min(size, 2 * limit + SPARE) + LANES
    empty = reserve if room > size else np.empty  # for all, of which few turn up
    return empty(room, np.int32), empty(room, residual.dtype)


def reserved(
    residual: Array, size: int, limit: int, stride: int
) -> tuple[Array, Array]:
    """Buffers for a pass that adds a gradient, or with stride 0 nothing."""
    try:
        return buffers(residual, size, limit)
    except MemoryError as error:
        if stride:
            raise NothingAddedError from error
        raise


def candidates(
    residual: Array, gradient: Array, out: Array, stride: int, bound: Any, limit: int
) -> Selected:
    """One pass over memory: accumulate, clear, and collect what reaches the bound.

    Each thread has a part, and buffers of its own. A part that drops candidates keeps
    the limit largest of its own, so none of the limit largest of all is dropped.
    """
    size = residual.size
    clears, cuts = out.size == size, parts(residual.size, LANES)
    # all of it before any part adds
    room = [reserved(residual, stop - start, limit, stride) for start, stop in cuts]
    rooms = {start: each for (start, _), each in zip(cuts, room, strict=True)}

    def one_part(first: int, stop: int) -> Selected:
        indices, values = rooms[first]
        count, nonfinite = compact(
            residual,
            gradient,
            stride,
            out,
            clears,
            first,
            stop,
            bound,
            limit,
            indices,
            values,
        )
        return indices[:count], values[:count], nonfinite

    return joined(run_parts(one_part, cuts))
