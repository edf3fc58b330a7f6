"""A magnitude that some more than k elements reach, from a sample of them.

A poor estimate costs time and nothing else: too low, more candidates are moved; too
high, too few turn up, and the residual is scanned once more.
"""

import math
from typing import Any

import numpy as np

from hvd_sparse.kernels.host.jit import jit
from hvd_sparse.kernels.host.largest import kth_magnitude
from hvd_sparse.kernels.host.simd import LANES, accumulate16, from_bits

_DIRECT = 4096  # up to this size every element is a candidate: sampling costs more
_RUN = 32  # elements sampled side by side: two cache lines arrive together


@jit
def estimate_bound(residual: Any, gradient: Any, stride: int, k: int, wide: int) -> Any:
    """A magnitude that some more than k of the sums reach, from a sample in short runs.

    0, which all reach, where sampling costs more than it saves. The wider, the lower.
    """
    n = residual.size
    runs = min(max(n // (128 * _RUN), 32), 2048)
    expected = runs * _RUN * k / n
    # 3.5 standard deviations above the mean of a binomial count, and some: too high an
    # estimate in one step of thousands
    rank = int((expected + 3.5 * math.sqrt(expected) + 4) * wide)
    if n <= _DIRECT or rank >= runs * _RUN:
        return residual.dtype.type(0)
    values = np.empty(runs * _RUN, residual.dtype)
    places = n // _RUN
    infinity = residual.dtype.type(np.inf)
    for run in range(runs):
        # one run somewhere in each of `runs` equal strata: strides alone would beat
        # with the rows of a weight matrix
        low = places * run // runs
        high = places * (run + 1) // runs
        jitter = (run * 2654435761) & 0xFFFFFFFF
        at = (low + (jitter * (high - low) >> 32)) * _RUN
        for i in range(0, _RUN, LANES):
            place, source = run * _RUN + i, at + i
            # the sums go to the sample, the residual stays; nothing reaches infinity
            accumulate16(
                values, place, residual, source, gradient, source * stride, infinity
            )
    # two digits are enough: what they leave out makes the estimate a little lower
    kth, _ = kth_magnitude(values, values.size, rank, 2)
    return from_bits(kth, values)
