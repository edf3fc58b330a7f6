"""Sums of residual and gradient, made in cache and kept nowhere."""

from typing import Any

import numpy as np

from hvd_sparse.kernels.host.jit import jit
from hvd_sparse.kernels.host.simd import LANES, accumulate16, bit_count

STRETCH = 4096  # sums made before they are looked at, in L1


@jit
def add_in_cache(residual: Any, gradient: Any, low: int, high: int, sums: Any) -> int:
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
