"""The k largest of some entries, exactly: ties go to the lowest index."""

from typing import Any

import numpy as np

from hvd_sparse.kernels.host.arrays import Array
from hvd_sparse.kernels.host.jit import jit
from hvd_sparse.kernels.host.simd import from_bits, magnitude_bits

_ALL_DIGITS = 63  # more than there ever are
_DIGIT_BITS = 11  # at most: of fewer elements, the digits have fewer bits


@jit
def kth_magnitude(values: Any, count: int, k: int, digits: int) -> Any:
    """The k-th largest magnitude of values[:count], by radix descent.

    Magnitudes of finite floats are ordered like their bit patterns without the sign.
    With fewer digits than the pattern has, the lower bits are 0: a little less.

    Returns its bit pattern, and how many elements of just that magnitude are among the
    k largest.
    """
    # A digit a pass, the highest first: count what agrees in all digits before, by this
    # digit, and walk down from the largest until k are passed.
    shift = values.itemsize * 8 - 1
    bits = 4  # of a digit: as many counters as elements, or clearing them takes longer
    while bits < _DIGIT_BITS and (1 << bits) < count:
        bits += 1
    # two counters a digit: neighbours often share one, and would wait for each other
    histogram = np.empty((1 << bits, 2), np.int32)
    prefix = np.uint64(0)
    while shift > 0 and digits > 0:
        digits -= 1
        low = max(shift - bits, 0)
        most = (np.uint64(1) << np.uint64(shift - low)) - np.uint64(1)
        histogram[:] = 0
        for i in range(count):
            pattern = magnitude_bits(values[i])
            if pattern >> np.uint64(shift) == prefix:
                histogram[np.int64((pattern >> np.uint64(low)) & most), i & 1] += 1
        digit = np.int64(most)
        while histogram[digit, 0] + histogram[digit, 1] < k:
            k -= histogram[digit, 0] + histogram[digit, 1]
            digit -= 1
        prefix = (prefix << np.uint64(shift - low)) | np.uint64(digit)
        shift = low
    return prefix << np.uint64(shift), k


@jit
def trim(residual: Any, indices: Any, values: Any, count: int, k: int) -> Any:
    """Overwrites the candidates with their k largest; the others return to residual.

    Order is kept and ties go to the lowest index. Returns the k-th largest magnitude.
    """
    kth, ties = kth_magnitude(values, count, k, _ALL_DIGITS)
    kept = 0  # never above i: what was read already is overwritten
    for i in range(count):
        index, value = indices[i], values[i]
        pattern = magnitude_bits(value)
        # the first of those that tie are kept, and candidates ascend by index
        ties -= pattern == kth
        if pattern > kth or (pattern == kth and ties >= 0):
            indices[kept] = index
            values[kept] = value
            kept += 1
        else:
            residual[index] = value
    return from_bits(kth, values)


def keep_largest(
    residual: Array, indices: Array, values: Array, k: int
) -> tuple[Array, Array]:
    """The k largest of what was selected; the others return to the residual.

    Overwrites indices and values.
    """
    if indices.size > k:
        trim(residual, indices, values, indices.size, k)
    return indices[:k], values[:k]
