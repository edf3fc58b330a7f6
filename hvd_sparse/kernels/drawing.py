"""Magnitudes counted in logarithmic bins, and independent draws: for host memory.

A bin holds the magnitudes whose bit patterns agree in all but the lowest bits: 64 bins
from each power of two to the next, so that members of a bin differ by less than 1.6 %.
Counts are integers, the same on every machine and with any number of threads.

A draw hashes the element's index (SplitMix64, Steele et al., 2014): it depends on seed
and index alone, so that every kind of kernel and every cut into parts draws the same.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from hvd_sparse.kernels.compiled import jit
from hvd_sparse.kernels.lanes import (
    LANES,
    accumulate16,
    bit_count,
    draw16,
    magnitude_bits,
)
from hvd_sparse.kernels.room import reserve
from hvd_sparse.kernels.threads import parts, run_parts

Array = npt.NDArray[Any]
Selected = tuple[Array, Array, int]

BINS = {4: 1 << 14, 8: 1 << 17}  # by the bytes of a float: sign-less pattern >> SHIFTS
SHIFTS = {4: 17, 8: 46}  # leaves 6 bits of the fraction
_STRETCH = 4096  # sums made before they are looked at, in L1


@jit
def _sum_of_squares(values: Any) -> Any:
    total = np.float64(0)
    for i in range(values.size):
        total += np.float64(values[i]) * np.float64(values[i])
    return total


def norm(values: Array) -> float:
    """The 2-norm, summed in float64."""
    return math.sqrt(_sum_of_squares(values))


@jit
def _sums(residual: Any, gradient: Any, low: int, high: int, sums: Any) -> int:
    """Overwrites sums[: high - low] with residual + gradient where that is finite.

    Returns how many sums were not finite: there the residual stays.
    """
    nonfinite = 0
    infinity = residual.dtype.type(np.inf)
    whole = high - (high - low) % LANES
    for at in range(low, whole, LANES):
        mask = accumulate16(sums, at - low, residual, at, gradient, at, infinity)
        nonfinite += bit_count(mask >> np.uint64(LANES))
    if whole < high:  # the last elements, in lanes of their own
        padded = np.zeros(LANES, residual.dtype)
        added = np.zeros(LANES, gradient.dtype)
        padded[: high - whole] = residual[whole:high]
        added[: high - whole] = gradient[whole:high]
        mask = accumulate16(padded, 0, padded, 0, added, 0, infinity)
        nonfinite += bit_count(mask >> np.uint64(LANES))
        sums[whole - low : high - low] = padded[: high - whole]
    return nonfinite


@jit
def _count(values: Any, count: int, shift: Any, table: Any) -> None:
    # two counters a bin: neighbours often share one, and would wait for each other
    for i in range(count):
        table[i & 1, np.int64(magnitude_bits(values[i]) >> shift)] += 1


@jit
def _count_sums(
    residual: Any, gradient: Any, first: int, stop: int, shift: Any, table: Any
) -> None:
    sums = np.empty(_STRETCH, residual.dtype)
    for low in range(first, stop, _STRETCH):
        high = min(low + _STRETCH, stop)
        _sums(residual, gradient, low, high, sums)
        _count(sums, high - low, shift, table)


def count_magnitudes(values: Array) -> Array:
    """(bins,) int64: how many magnitudes each logarithmic bin holds."""
    table = np.zeros((2, BINS[values.itemsize]), np.int64)
    _count(values, values.size, np.uint64(SHIFTS[values.itemsize]), table)
    return np.asarray(table[0] + table[1])


def count_sums(residual: Array, gradient: Array) -> Array:
    """The same of residual + gradient; reads both, writes neither."""
    size = residual.itemsize

    def one_part(first: int, stop: int) -> Array:
        table = np.zeros((2, BINS[size]), np.int64)
        shift = np.uint64(SHIFTS[size])
        _count_sums(residual, gradient, first, stop, shift, table)
        return np.asarray(table[0] + table[1])

    counts = run_parts(one_part, parts(residual.size, LANES))
    return np.asarray(np.sum(counts, axis=0, dtype=np.int64))


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
    sums = np.zeros(_STRETCH, residual.dtype)
    blocks = np.empty(_STRETCH // LANES, np.int64)
    masks = np.empty(_STRETCH // LANES, np.uint64)
    count = nonfinite = 0
    for low in range(first, stop, _STRETCH):
        high = min(low + _STRETCH, stop)
        nonfinite += _sums(residual, gradient, low, high, sums)
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
        gradient: (n,) contiguous; the residual's dtype, or 16-bit patterns for float32.
        rate: >= 0 and finite in the residual's dtype.
        seed: 64 bits.
    """
    factor, key = residual.dtype.type(rate), np.uint64(seed)
    patterns = residual.view(f"u{residual.itemsize}")

    def one_part(first: int, stop: int) -> Selected:
        room = stop - first + LANES
        indices, values = reserve(room, np.int32), reserve(room, residual.dtype)
        count, nonfinite = _draw(
            residual, patterns, gradient, first, stop, factor, key, indices, values
        )
        return indices[:count], values[:count], nonfinite

    found = run_parts(one_part, parts(residual.size, LANES))
    if len(found) == 1:
        return found[0]
    indices, values, nonfinite = zip(*found, strict=True)
    return np.concatenate(indices), np.concatenate(values), sum(nonfinite)
