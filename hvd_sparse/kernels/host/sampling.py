"""Independent draws: each entry by itself, larger ones more often.

A draw hashes the element's index (SplitMix64, Steele et al., 2014): it depends on seed
and index alone, so that every kind of kernel and every cut into parts draws the same.
"""

from typing import Any

import numpy as np

from hvd_sparse.kernels.host.arrays import Array, Selected, joined, lane_view
from hvd_sparse.kernels.host.jit import jit
from hvd_sparse.kernels.host.simd import LANES, draw16
from hvd_sparse.kernels.host.sums import STRETCH, add_in_cache
from hvd_sparse.kernels.host.threads import parts, run_parts
from hvd_sparse.kernels.host.workspace import reserve


@jit
def _note_drawn(
    sums: Any, count: int, rate: Any, seed: Any, first: int, blocks: Any, masks: Any
) -> int:
    """Notes the blocks of 16 of sums[:count] of which something is drawn.

    The first sum is the tensor's element `first`. Returns how many blocks there are.
    """
    noted = 0
    for at in range(0, count, LANES):
        mask = draw16(sums, at, rate, seed, first + at)
        left = count - at
        if left < LANES:  # what lies beyond is no sum
            mask &= (np.uint64(1) << np.uint64(left)) - np.uint64(1)
        blocks[noted] = at
        masks[noted] = mask
        noted += mask != 0
    return noted


@jit
def _take_drawn(
    sums: Any,
    first: int,
    blocks: Any,
    masks: Any,
    noted: int,
    indices: Any,
    values: Any,
    count: Any,
) -> Any:
    """Appends what was drawn to the buffers, which need one place more.

    No branch: what is drawn comes at random. Returns how many there are now.
    """
    for note in range(noted):
        mask = np.int64(masks[note])
        for lane in range(LANES):
            i = blocks[note] + lane
            indices[count] = first + i
            values[count] = sums[i]
            count += (mask >> lane) & 1
    return count


@jit
def _clear(residual: Any, patterns: Any, first: int, stop: int) -> None:
    """Overwrites it with 0 unless it is: memory never written to stays unused."""
    found = patterns[first] & 0
    for i in range(first, stop):
        found |= patterns[i]
    if found:
        residual[first:stop] = 0


@jit
def _draw(
    residual: Any,
    patterns: Any,
    gradient: Any,
    first: int,
    stop: int,
    rate: Any,
    seed: Any,
    indices: Any,
    values: Any,
) -> Any:
    """Overwrites residual[first:stop] with 0; patterns are its bits.

    What is drawn goes to indices and values, which need one place more than that.

    Returns how many were drawn, and how many sums were not finite.
    """
    one = residual.dtype.type(1)
    sums = np.zeros(STRETCH, residual.dtype)
    blocks = np.empty(STRETCH // LANES, np.int64)
    masks = np.empty(STRETCH // LANES, np.uint64)
    count = nonfinite = 0
    for low in range(first, stop, STRETCH):
        high = min(low + STRETCH, stop)
        nonfinite += add_in_cache(residual, gradient, low, high, sums)
        noted = _note_drawn(sums, high - low, rate, seed, low, blocks, masks)
        before = count
        count = _take_drawn(sums, low, blocks, masks, noted, indices, values, count)
        for i in range(before, count):
            values[i] /= min(rate * abs(values[i]), one)
        _clear(residual, patterns, low, high)
    return count, nonfinite


def draw(residual: Array, gradient: Array, rate: float, seed: int) -> Selected:
    """Each element c of residual + gradient alone, with p = min(1, rate |c|), as c / p.

    Overwrites residual with zeros, but for stretches that are all 0: those that were
    never written to stay unused memory.

    Args:
        residual: (n,) float32 or float64, contiguous.
        gradient: (n,) contiguous; the residual's dtype, or 16-bit for float32.
        rate: >= 0 and finite in the residual's dtype.
        seed: 64 bits.
    """
    factor, key = residual.dtype.type(rate), np.uint64(seed)
    patterns, lanes = residual.view(f"u{residual.itemsize}"), lane_view(gradient)

    def one_part(first: int, stop: int) -> Selected:
        room = stop - first + LANES
        indices, values = reserve(room, np.int32), reserve(room, residual.dtype)
        count, nonfinite = _draw(
            residual, patterns, lanes, first, stop, factor, key, indices, values
        )
        return indices[:count], values[:count], nonfinite

    return joined(run_parts(one_part, parts(residual.size, LANES)))
