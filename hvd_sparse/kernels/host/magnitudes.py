"""What is measured of magnitudes: how many each logarithmic bin holds, and their norm.

Counts are integers, the same on every machine and with any number of threads.
"""

import math
from typing import Any

import numpy as np

from hvd_sparse.kernels.bins import BINS, SHIFTS
from hvd_sparse.kernels.host.arrays import Array, lane_view
from hvd_sparse.kernels.host.jit import jit
from hvd_sparse.kernels.host.simd import LANES, magnitude_bits
from hvd_sparse.kernels.host.sums import STRETCH, add_in_cache
from hvd_sparse.kernels.host.threads import parts, run_parts


@jit
def _sum_of_squares(values: Any) -> Any:
    total = np.float64(0)
    for i in range(values.size):
        total += np.float64(values[i]) * np.float64(values[i])
    return total


def norm(values: Array) -> float:
    """The 2-norm, summed in float64."""
    return math.sqrt(_sum_of_squares(values))


def largest_first(values: Array) -> Array:
    """(k,) float64 magnitudes on the host, falling."""
    return np.sort(np.abs(values)).astype(np.float64)[::-1]


@jit
def _count(values: Any, count: int, shift: Any, table: Any) -> None:
    # two counters a bin: neighbours often share one, and would wait for each other
    for i in range(count):
        table[i & 1, np.int64(magnitude_bits(values[i]) >> shift)] += 1


@jit
def _count_sums(
    residual: Any, gradient: Any, first: int, stop: int, shift: Any, table: Any
) -> None:
    sums = np.empty(STRETCH, residual.dtype)
    for low in range(first, stop, STRETCH):
        high = min(low + STRETCH, stop)
        add_in_cache(residual, gradient, low, high, sums)
        _count(sums, high - low, shift, table)


def count_magnitudes(values: Array) -> Array:
    """(bins,) int64: how many magnitudes each logarithmic bin holds."""
    table = np.zeros((2, BINS[values.itemsize]), np.int64)
    _count(values, values.size, np.uint64(SHIFTS[values.itemsize]), table)
    return np.asarray(table[0] + table[1])


def count_sums(residual: Array, gradient: Array) -> Array:
    """The same of residual + gradient; reads both, writes neither."""
    size, lanes = residual.itemsize, lane_view(gradient)

    def one_part(first: int, stop: int) -> Array:
        table = np.zeros((2, BINS[size]), np.int64)
        shift = np.uint64(SHIFTS[size])
        _count_sums(residual, lanes, first, stop, shift, table)
        return np.asarray(table[0] + table[1])

    counts = run_parts(one_part, parts(residual.size, LANES))
    return np.asarray(np.sum(counts, axis=0, dtype=np.int64))
