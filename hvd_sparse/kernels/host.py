"""The hot loops for arrays in host memory: numpy, torch CPU tensors, TensorFlow.

How exact TopK costs about as much as the addition it follows:

1. estimate, from a sample of the sums, a magnitude that some more than k reach;
2. accumulate and compact in one pass: the residual takes the gradient, the few elements
   above the estimate (the candidates) are copied out in ascending order;
3. finish exactly: the k-th largest magnitude among the candidates, ties to the lowest
   index. If the candidates outgrow their buffer on the way, it is cut back to the k
   largest so far and the bound rises; if fewer than k turn up, the residual is
   scanned again with a lower bound.

The sample decides the time, never the result, which is the same for every estimate,
every thread count and every processor.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import carray, njit

from hvd_sparse.kernels.lanes import (
    LANES,
    accumulate16,
    bit_count,
    lowest_bit,
    pointer_to,
)
from hvd_sparse.kernels.threads import parts, run_parts

Array = npt.NDArray[Any]
Selected = tuple[Array, Array, int]

_DIGIT_BITS = 11
_SPARE = 4096  # candidates a buffer holds beyond twice what is asked for
_DIRECT = 4096  # up to this size every element is a candidate: sampling costs more
_CHUNK = 1 << 14  # elements of the handed-back gradient finished while in cache
_jit = njit(nogil=True, cache=True, error_model="numpy")


# --------------------------------------------------------------------- exact finish


@_jit
def _kth_magnitude(bits: Any, count: int, k: int) -> Any:
    """Bit pattern of the k-th largest magnitude of bits[:count], by radix descent.

    Magnitudes of finite floats are ordered like their bit patterns without the sign.
    """
    shift = bits.itemsize * 8 - 1
    magnitude = (np.uint64(1) << np.uint64(shift)) - np.uint64(1)
    histogram = np.empty(1 << _DIGIT_BITS, np.int64)
    prefix = np.uint64(0)
    while shift > 0:
        low = max(shift - _DIGIT_BITS, 0)
        digits = (np.uint64(1) << np.uint64(shift - low)) - np.uint64(1)
        histogram[:] = 0
        for i in range(count):
            pattern = np.uint64(bits[i]) & magnitude
            if pattern >> np.uint64(shift) == prefix:
                histogram[np.int64((pattern >> np.uint64(low)) & digits)] += 1
        digit = np.int64(digits)
        while histogram[digit] < k:
            k -= histogram[digit]
            digit -= 1
        prefix = (prefix << np.uint64(shift - low)) | np.uint64(digit)
        shift = low
    return prefix


@_jit
def _keep_largest(indices: Any, values: Any, bits: Any, count: int, k: int) -> Any:
    """Overwrites the three with their k largest, order kept, ties to the lowest index.

    Returns the k-th largest magnitude.
    """
    one = np.uint64(1)
    magnitude = (one << np.uint64(bits.itemsize * 8 - 1)) - one
    kth = _kth_magnitude(bits, count, k)
    above = 0
    for i in range(count):
        above += np.uint64(bits[i]) & magnitude > kth
    ties = k - above
    bound = abs(values[0])
    kept = 0
    for i in range(count):
        pattern = np.uint64(bits[i]) & magnitude
        if pattern == kth:
            bound = abs(values[i])
            ties -= 1
        if pattern > kth or (pattern == kth and ties >= 0):
            indices[kept] = indices[i]
            values[kept] = values[i]
            kept += 1
    return bound


# ---------------------------------------------------------- accumulate and compact


@_jit
def _compact(
    residual: Any,
    gradient: Any,
    stride: int,
    first: int,
    stop: int,
    bound: Any,
    limit: int,
    indices: Any,
    values: Any,
    bits: Any,
) -> Any:
    """Overwrites residual[first:stop] with residual + gradient; collects candidates.

    Returns how many candidates lie in the buffers and how many sums were not finite.
    With stride 0 the gradient is 16 times -0.0, which leaves every residual as it is.
    """
    count = 0
    nonfinite = 0
    capacity = indices.size - LANES
    tail = stop - (stop - first) % LANES
    padded = np.zeros(LANES, residual.dtype)
    padded_gradient = np.zeros(LANES, gradient.dtype)
    for at in range(first, stop, LANES):
        if at < tail:
            mask = accumulate16(residual, at, gradient, at * stride, bound)
        else:
            for i in range(stop - tail):
                padded[i] = residual[at + i]
                padded_gradient[i] = gradient[(at + i) * stride]
            mask = accumulate16(padded, 0, padded_gradient, 0, bound)
            real = (np.uint64(1) << np.uint64(stop - tail)) - np.uint64(1)
            mask &= real | (real << np.uint64(LANES))
            for i in range(stop - tail):
                residual[at + i] = padded[i]
        if mask:
            if count > capacity:
                bound = _keep_largest(indices, values, bits, count, limit)
                bound = np.nextafter(bound, residual.dtype.type(np.inf))
                count = limit
            nonfinite += bit_count(mask >> np.uint64(LANES))
            hits = mask & np.uint64(0xFFFF)
            while hits:
                i = at + lowest_bit(hits)
                if abs(residual[i]) >= bound:
                    indices[count] = i
                    values[count] = residual[i]
                    count += 1
                hits &= hits - np.uint64(1)
    return count, nonfinite


@_jit
def _estimate(residual: Any, gradient: Any, runs: int, rank: int, sample: Any) -> Any:
    """The rank-th largest magnitude of a sample of the sums, in runs of 16."""
    values, bits = sample
    blocks = residual.size // LANES
    infinity = residual.dtype.type(np.inf)
    for run in range(runs):
        # one run somewhere in each of `runs` equal strata: strides alone would beat
        # with the rows of a weight matrix
        low = blocks * run // runs
        high = blocks * (run + 1) // runs
        jitter = (run * 2654435761) & 0xFFFFFFFF
        at = (low + (jitter * (high - low) >> 32)) * LANES
        for i in range(LANES):
            values[run * LANES + i] = residual[at + i]
        accumulate16(values, run * LANES, gradient, at, infinity)
    kth = _kth_magnitude(bits, runs * LANES, rank)
    one = np.uint64(1)
    magnitude = (one << np.uint64(bits.itemsize * 8 - 1)) - one
    for i in range(runs * LANES):
        if np.uint64(bits[i]) & magnitude == kth:
            return abs(values[i])
    return residual.dtype.type(0)


@_jit
def _zero_at(residual: Any, indices: Any) -> None:
    for i in range(indices.size):
        residual[indices[i]] = 0


@_jit
def _take_at(residual: Any, indices: Any, values: Any) -> None:
    for i in range(indices.size):
        values[i] = residual[indices[i]]
        residual[indices[i]] = 0


@_jit
def _add_at(residual: Any, indices: Any, values: Any) -> None:
    for i in range(indices.size):
        residual[indices[i]] += values[i]


def _lane_view(gradient: Array) -> Array:
    """The gradient as the lanes read it: 16-bit floats as their bit patterns."""
    if gradient.dtype.itemsize > 2:
        return gradient
    return gradient.view(np.int16 if gradient.dtype == np.float16 else np.uint16)


def _unsigned(values: Array) -> Array:
    return values.view(np.uint32 if values.dtype == np.float32 else np.uint64)


def _candidates(
    residual: Array, gradient: Array, stride: int, bound: Any, limit: int
) -> Selected:
    """One pass over memory: accumulate, and collect what reaches the bound."""
    size = residual.size

    def one_part(first: int, stop: int) -> Selected:
        room = min(stop - first, 2 * limit + _SPARE) + LANES
        indices = np.empty(room, np.int32)
        values = np.empty(room, residual.dtype)
        count, nonfinite = _compact(
            residual,
            gradient,
            stride,
            first,
            stop,
            bound,
            limit,
            indices,
            values,
            _unsigned(values),
        )
        return indices[:count], values[:count], nonfinite

    found = run_parts(one_part, parts(size, LANES))
    if len(found) == 1:
        return found[0]
    indices, values, nonfinite = zip(*found, strict=True)
    return np.concatenate(indices), np.concatenate(values), sum(nonfinite)


def _cut(indices: Array, values: Array, k: int) -> tuple[Array, Array]:
    if indices.size > k:
        _keep_largest(indices, values, _unsigned(values), indices.size, k)
    return indices[:k], values[:k]


def _bounds(residual: Array, gradient: Array, k: int) -> Any:
    """Falling bounds to try; the last, 0, is reached by every element."""
    n, zero = residual.size, residual.dtype.type(0)
    if n > _DIRECT:
        runs = min(max(n // (64 * LANES), 128), 4096)
        expected = runs * LANES * k / n
        values = np.empty(runs * LANES, residual.dtype)
        sample = (values, _unsigned(values))
        # four standard deviations above the mean of a binomial count
        for rank in (expected + 4 * math.sqrt(expected) + 3, 4 * expected + 64):
            if rank < values.size:
                yield _estimate(residual, gradient, runs, int(rank), sample)
    yield zero


# ------------------------------------------------------------- what the core calls


def zeros_like(gradient: Array) -> Array:
    """A residual for this gradient: (n,) zeros, float32, or float64 for float64."""
    wide = gradient.dtype == np.float64
    return np.zeros(gradient.size, np.float64 if wide else np.float32)


def select_top(residual: Array, gradient: Array, k: int) -> Selected:
    """Overwrites residual with residual + gradient less its k largest entries.

    Args:
        residual: (n,) float32 or float64, contiguous.
        gradient: (n,) contiguous; the residual's dtype, or 16-bit for float32.
        k: in [0, n].

    Returns:
        indices (k,) int32 ascending, values (k,) of the residual's dtype, and the
        number of elements whose sum was not finite: they kept their residual.
    """
    lanes = _lane_view(gradient)
    stride = 1
    nonfinite = 0
    for bound in _bounds(residual, lanes, k):
        indices, values, wrong = _candidates(residual, lanes, stride, bound, k)
        nonfinite += wrong
        if indices.size >= k:
            break
        # the sums are in the residual now: scan it again, adding -0.0
        lanes, stride = np.full(LANES, -0.0, residual.dtype), 0
    indices, values = _cut(indices, values, k)
    _zero_at(residual, indices)
    return indices, values, nonfinite


def select_above(
    residual: Array, gradient: Array, bound: float, limit: int
) -> Selected:
    """As select_top, for entries of magnitude >= bound, at most the limit largest."""
    lanes = _lane_view(gradient)
    least = residual.dtype.type(bound)
    indices, values, nonfinite = _candidates(residual, lanes, 1, least, limit)
    indices, values = _cut(indices, values, limit)
    _zero_at(residual, indices)
    return indices, values, nonfinite


def select_at(residual: Array, gradient: Array, indices: Array) -> Selected:
    """As select_top, for the entries at the given ascending int32 indices."""
    none = residual.dtype.type(np.inf)
    _, _, nonfinite = _candidates(residual, _lane_view(gradient), 1, none, 0)
    values = np.empty(indices.size, residual.dtype)
    _take_at(residual, indices, values)
    return indices, values, nonfinite


def add_at(residual: Array, indices: Array, values: Array) -> None:
    """Overwrites residual[indices] with residual[indices] + values."""
    _add_at(residual, indices, values)


# ------------------------------------------------------------------------ aggregate


@_jit
def _lower_bound(indices: Any, index: int) -> int:
    low, high = 0, indices.size
    while low < high:
        middle = (low + high) // 2
        if indices[middle] < index:
            low = middle + 1
        else:
            high = middle
    return low


@_jit
def _aggregate(
    out: Any, offset: int, first: int, stop: int, table: Any, like: Any, scale: Any
) -> int:
    """Overwrites out with the scaled sum of all payloads' entries in [first, stop).

    Returns how many entries there were: indices that do not ascend are not followed, so
    a damaged payload can not write outside of out.
    """
    taken = 0
    ranks = table.shape[0]
    cursors = np.empty(ranks, np.int64)
    for rank in range(ranks):
        indices = carray(pointer_to(table[rank, 0], like), (table[rank, 2],))
        cursors[rank] = _lower_bound(indices, first)
    for low in range(first, stop, _CHUNK):
        high = min(low + _CHUNK, stop)
        out[low - offset : high - offset] = 0
        touched = False
        for rank in range(ranks):
            count = table[rank, 2]
            indices = carray(pointer_to(table[rank, 0], like), (count,))
            values = carray(pointer_to(table[rank, 1], out), (count,))
            cursor = cursors[rank]
            while cursor < count and low <= indices[cursor] < high:
                out[indices[cursor] - offset] += values[cursor]
                cursor += 1
            touched |= cursor > cursors[rank]
            taken += cursor - cursors[rank]
            cursors[rank] = cursor
        if touched and scale != 1:
            for i in range(low - offset, high - offset):
                out[i] *= scale
    return taken


def _address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


_INDICES = np.empty(0, np.int32)


def aggregate(out: Array, payloads: list[tuple[Array, Array]], scale: float) -> None:
    """Overwrites out with scale * (payload_0 + payload_1 + ...), rank by rank.

    Args:
        out: (n,) contiguous, of the gradient's dtype; every element is written.
        payloads: per rank, ascending int32 indices and values of the residual's dtype.
        scale: 1/P for the average, 1 for the sum; rounded to the values' dtype.

    Raises:
        ValueError: some indices are not ascending in [0, n).
    """
    table = np.array(
        [[_address(i), _address(v), i.size] for i, v in payloads], np.int64
    )
    taken = (_sum_wide if out.dtype.itemsize > 2 else _sum_narrow)(out, table, scale)
    given = int(table[:, 2].sum())
    if taken != given:
        raise ValueError(
            f"indices must ascend in [0, {out.size}), {given - taken} of {given} do not"
        )


def _sum_wide(out: Array, table: Array, scale: float) -> int:
    factor = out.dtype.type(scale)

    def one_part(first: int, stop: int) -> int:
        return int(_aggregate(out, 0, first, stop, table, _INDICES, factor))

    return sum(run_parts(one_part, parts(out.size, _CHUNK)))


def _sum_narrow(out: Array, table: Array, scale: float) -> int:
    """16-bit gradients: sums are float32 and rounded once, a cached piece at a time."""
    piece = 16 * _CHUNK
    sums = np.empty(min(out.size, piece), np.float32)
    taken = 0
    for low in range(0, out.size, piece):
        high = min(low + piece, out.size)
        taken += _aggregate(sums, low, low, high, table, _INDICES, np.float32(scale))
        with np.errstate(over="ignore"):  # beyond float16 is inf, as in any cast
            out[low:high] = sums[: high - low]
    return taken


# ------------------------------------------------------------------- random indices


@_jit
def _mix(word: Any, key: Any) -> Any:
    """A 64-bit finaliser (multiply, xor-shift): every input bit moves every other."""
    word = (word ^ key) * np.uint64(0x9E3779B97F4A7C15)
    word ^= word >> np.uint64(32)
    word *= np.uint64(0xD6E8FEB86659FD93)
    return word ^ (word >> np.uint64(32))


@_jit
def _permuted(n: int, seed: Any, indices: Any) -> None:
    half = np.uint64(1)
    while (1 << (2 * np.int64(half))) < n:
        half += np.uint64(1)
    low = (np.uint64(1) << half) - np.uint64(1)
    for i in range(indices.size):
        place = np.uint64(i)
        while True:
            left, right = place >> half, place & low
            for turn in range(6):
                key = seed + np.uint64(turn) * np.uint64(0xBF58476D1CE4E5B9)
                left, right = right, left ^ (_mix(right, key) & low)
            place = (left << half) | right
            if place < np.uint64(n):
                break
        indices[i] = place


def random_indices(n: int, k: int, seed: int) -> Array:
    """k distinct indices of range(n), ascending int32, from a 64-bit seed alone.

    The first k places of a pseudo-random permutation: a Feistel network of six rounds
    (Luby and Rackoff, 1988) over the next power of four, walked until the place lies
    below n. Integers only, so every machine draws the same; no table of n flags.
    """
    indices = np.empty(k, np.int32)
    _permuted(n, np.uint64(seed), indices)
    indices.sort()
    return indices
