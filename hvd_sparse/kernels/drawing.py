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
from hvd_sparse.kernels.lanes import LANES, accumulate16, bit_count, magnitude_bits
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
def _uniform(seed: Any, index: Any) -> Any:
    """In [0, 1), of 53 bits."""
    word = seed + (np.uint64(index) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    word ^= word >> np.uint64(31)
    return np.float64(np.int64(word >> np.uint64(11))) * 2.0**-53


@jit
def _draw(
    residual: Any, gradient: Any, first: int, stop: int, rate: Any, seed: Any, room: int
) -> Any:
    """Overwrites residual[first:stop] with 0, where it is not 0 already."""
    one = residual.dtype.type(1)
    sums = np.empty(_STRETCH, residual.dtype)
    indices, values = np.empty(room, np.int32), np.empty(room, residual.dtype)
    count = nonfinite = 0
    for low in range(first, stop, _STRETCH):
        high = min(low + _STRETCH, stop)
        nonfinite += _sums(residual, gradient, low, high, sums)
        if count + _STRETCH > indices.size:
            more = np.empty(indices.size, np.int32)
            indices = np.concatenate((indices, more))
            values = np.concatenate((values, more.astype(residual.dtype)))
        for i in range(low, high):
            value = sums[i - low]
            chance = rate * abs(value)
            if _uniform(seed, i) < chance:
                indices[count] = i
                values[count] = value / min(chance, one)
                count += 1
            if residual[i] != 0 or math.copysign(1.0, residual[i]) < 0:
                residual[i] = 0
    return indices[:count], values[:count], nonfinite


def draw(residual: Array, gradient: Array, rate: float, seed: int) -> Selected:
    """Each element c of residual + gradient alone, with p = min(1, rate |c|), as c / p.

    Overwrites residual with zeros; memory that never held anything else stays unused.

    Args:
        residual: (n,) float32 or float64, contiguous.
        gradient: (n,) contiguous; the residual's dtype, or 16-bit patterns for float32.
        rate: >= 0 and finite in the residual's dtype.
        seed: 64 bits.
    """
    factor, key = residual.dtype.type(rate), np.uint64(seed)

    def one_part(first: int, stop: int) -> Any:
        return _draw(residual, gradient, first, stop, factor, key, 2 * _STRETCH)

    found = run_parts(one_part, parts(residual.size, LANES))
    indices, values, nonfinite = zip(*found, strict=True)
    return np.concatenate(indices), np.concatenate(values), sum(nonfinite)
