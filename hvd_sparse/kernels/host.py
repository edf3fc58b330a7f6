"""The hot loops for arrays in host memory: numpy, torch CPU tensors, TensorFlow.

How exact TopK costs about as much as the addition it follows:

1. estimate, from a sample of the sums, a magnitude that some more than k reach;
2. accumulate and compact in one pass: the residual takes the gradient, the few elements
   above the estimate (the candidates) move out in ascending order;
3. finish exactly: the k-th largest magnitude among the candidates, ties to the lowest
   index; the others return. If the candidates outgrow their buffer on the way, it is
   cut back to the k largest so far and the bound rises; if fewer than k turn up, the
   residual is scanned again with a lower bound.

Where the result will take the gradient's place at once, pass 2 may leave zeros there
while it has the gradient in cache: the result is then a few additions, and no pass of
its own. Elsewhere the zeros of a large result are streamed: written, and never read.

The sample decides the time, never the result, which is the same for every estimate,
every thread count and every processor.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import carray

from hvd_sparse.kernels import drawing
from hvd_sparse.kernels.compiled import jit as _jit
from hvd_sparse.kernels.lanes import (
    LANES,
    accumulate16,
    bit_count,
    clear16,
    fence,
    from_bits,
    lowest_bit,
    magnitude_bits,
    pointer_to,
    prefetch,
    stream_zeros16,
)
from hvd_sparse.kernels.reference import check_places
from hvd_sparse.kernels.room import reserve
from hvd_sparse.kernels.threads import parts, run_parts

Array = npt.NDArray[Any]
Selected = tuple[Array, Array, int]

_DIGIT_BITS = 11  # at most: of fewer elements, the digits have fewer bits
_ALL_DIGITS = 63  # more than there ever are
_SPARE = 4096  # candidates a buffer holds beyond twice what is asked for
_DIRECT = 4096  # up to this size every element is a candidate: sampling costs more
_CHUNK = 1 << 14  # elements of the handed-back gradient finished while in cache
_AHEAD = 16  # entries of a payload: their cache lines arrive together
_RUN = 32  # elements sampled side by side: two cache lines arrive together
_STRETCH = 8192  # elements accumulated before their hits are looked at, in L1
_BLOCKS = _CHUNK // LANES  # of a chunk; those that an entry falls into are scaled
_BEYOND_CACHE = 32 << 20  # bytes of a result that no cache keeps until it is used
_FEW = 64  # elements an entry, from which on its cache lines are few
# added, it leaves every residual as it is, -0.0 included
_NOTHING = {4: np.full(LANES, -0.0, np.float32), 8: np.full(LANES, -0.0)}
_NO_OUT = {char: np.empty(0, char) for char in "hHfd"}


# --------------------------------------------------------------------- exact finish


@_jit
def _kth_magnitude(values: Any, count: int, k: int, digits: int) -> Any:
    """The k-th largest magnitude of values[:count], by radix descent.

    Magnitudes of finite floats are ordered like their bit patterns without the sign.
    With fewer digits than the pattern has, the lower bits are 0: a little less.

    Returns its bit pattern, and how many elements of just that magnitude are among the
    k largest.
    """
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


@_jit
def _keep_largest(residual: Any, indices: Any, values: Any, count: int, k: int) -> Any:
    """Overwrites the candidates with their k largest; the others return to residual.

    Order is kept and ties go to the lowest index. Returns the k-th largest magnitude.
    """
    kth, ties = _kth_magnitude(values, count, k, _ALL_DIGITS)
    kept = 0
    for i in range(count):
        index, value = indices[i], values[i]
        pattern = magnitude_bits(value)
        ties -= pattern == kth
        if pattern > kth or (pattern == kth and ties >= 0):
            indices[kept] = index
            values[kept] = value
            kept += 1
        else:
            residual[index] = value
    return from_bits(kth, values)


# ---------------------------------------------------------- accumulate and compact


@_jit
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
    if whole < stop:  # the last elements, in lanes of their own
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


@_jit
def _compact(
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
            if count > capacity:
                bound = _keep_largest(residual, indices, values, count, limit)
                bound = np.nextafter(bound, residual.dtype.type(np.inf))
                count = limit
            nonfinite += bit_count(masks[note] >> np.uint64(LANES))
            hits = masks[note] & np.uint64(0xFFFF)
            while hits:
                i = blocks[note] + lowest_bit(hits)
                if abs(residual[i]) >= bound:
                    indices[count] = i
                    values[count] = residual[i]
                    residual[i] = 0
                    count += 1
                hits &= hits - np.uint64(1)
    return count, nonfinite


@_jit
def _estimate(residual: Any, gradient: Any, stride: int, k: int, wide: int) -> Any:
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
            accumulate16(
                values, place, residual, source, gradient, source * stride, infinity
            )
    kth, _ = _kth_magnitude(values, values.size, rank, 2)
    return from_bits(kth, values)


@_jit
def _select_top(
    residual: Any,
    gradient: Any,
    out: Any,
    nothing: Any,
    k: int,
    indices: Any,
    values: Any,
) -> Any:
    """Overwrites residual with residual + gradient less its k largest entries.

    The whole selection in one call: for small tensors calls cost more than work.

    Returns how many sums were not finite; the entries are the first k of the buffers.
    """
    n = residual.size
    clears = out.size == n  # an empty one stays as it is
    bound = _estimate(residual, gradient, 1, k, 1)
    count, nonfinite = _compact(
        residual, gradient, 1, out, clears, 0, n, bound, k, indices, values
    )
    wide = 4
    while count < k:  # the sums are in the residual now: scan it again, adding nothing
        _add_at(residual, indices[:count], values[:count])
        bound = _estimate(residual, nothing, 0, k, wide)
        count, _ = _compact(
            residual, nothing, 0, out, False, 0, n, bound, k, indices, values
        )
        wide = n  # then every element is a candidate
    if count > k:
        _keep_largest(residual, indices, values, count, k)
    return nonfinite


@_jit
def _take_at(residual: Any, indices: Any, values: Any) -> None:
    for i in range(indices.size):
        values[i] = residual[indices[i]]
        residual[indices[i]] = 0


@_jit
def _add_at(residual: Any, indices: Any, values: Any) -> None:
    for i in range(indices.size):
        residual[indices[i]] += values[i]


_INDICES = np.empty(0, np.int32)


def address(array: Array) -> int:
    """Of its first element."""
    return int(array.__array_interface__["data"][0])


class _Unlocked:
    """A read-only array, seen as if it could be written: numpy keeps it alive."""

    def __init__(self, array: Array) -> None:
        self.array = array
        seen = array.__array_interface__
        self.__array_interface__ = {**seen, "data": (seen["data"][0], False)}


def _read(array: Array) -> Array:
    """What a kernel only reads: nothing is compiled anew for read-only arrays."""
    return array if array.flags.writeable else np.asarray(_Unlocked(array))


def _patterns(array: Array) -> Array:
    """16-bit floats as their bit patterns, anything wider as it is."""
    if array.dtype.itemsize > 2:
        return array
    return array.view(np.int16 if array.dtype == np.float16 else np.uint16)


def _lane_view(gradient: Array) -> Array:
    """The gradient as the lanes read it."""
    return _read(_patterns(gradient))


def _cleared_view(out: Array | None, lanes: Array) -> Array:
    """What is to be cleared as its bit patterns; an empty array for nothing."""
    return _NO_OUT[lanes.dtype.char] if out is None else _patterns(out)


def _buffers(residual: Array, size: int, limit: int) -> tuple[Array, Array]:
    """Room for the candidates among so many elements."""
    room = min(size, 2 * limit + _SPARE) + LANES
    empty = reserve if room > size else np.empty  # for all, of which few turn up
    return empty(room, np.int32), empty(room, residual.dtype)


def _candidates(
    residual: Array, gradient: Array, out: Array, stride: int, bound: Any, limit: int
) -> Selected:
    """One pass over memory: accumulate, clear, and collect what reaches the bound."""
    size = residual.size
    clears = out.size == size

    def one_part(first: int, stop: int) -> Selected:
        indices, values = _buffers(residual, stop - first, limit)
        count, nonfinite = _compact(
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

    found = run_parts(one_part, parts(size, LANES))
    if len(found) == 1:
        return found[0]
    indices, values, nonfinite = zip(*found, strict=True)
    return np.concatenate(indices), np.concatenate(values), sum(nonfinite)


def _cut(residual: Array, indices: Array, values: Array, k: int) -> tuple[Array, Array]:
    """The k largest candidates; the others return to the residual."""
    if indices.size > k:
        count = indices.size
        _keep_largest(residual, indices, values, count, k)
    return indices[:k], values[:k]


# ------------------------------------------------------------- what the core calls


def zeros_like(gradient: Array) -> Array:
    """A residual for this gradient: (n,) zeros, float32, or float64 for float64."""
    wide = gradient.dtype == np.float64
    return np.zeros(gradient.size, np.float64 if wide else np.float32)


def select_top(
    residual: Array, gradient: Array, k: int, out: Array | None = None
) -> Selected:
    """Overwrites residual with residual + gradient less its k largest entries.

    Args:
        residual: (n,) float32 or float64, contiguous.
        gradient: (n,) contiguous; the residual's dtype, or 16-bit for float32.
        k: in [0, n].
        out: (n,) of the gradient's dtype, becomes 0 on the way; may be the gradient.

    Returns:
        indices (k,) int32 ascending, values (k,) of the residual's dtype, and the
        number of elements whose sum was not finite: they kept their residual.
    """
    lanes = _lane_view(gradient)
    cleared = _cleared_view(out, lanes)
    nothing = _NOTHING[residual.dtype.itemsize]
    if is_one_part(residual.size):
        indices, values = _buffers(residual, residual.size, k)
        nonfinite = _select_top(residual, lanes, cleared, nothing, k, indices, values)
        return indices[:k], values[:k], nonfinite
    bound = _estimate(residual, lanes, 1, k, 1)
    indices, values, nonfinite = _candidates(residual, lanes, cleared, 1, bound, k)
    kept = _cleared_view(None, lanes)
    for wide in (4, residual.size):
        if indices.size >= k:
            break
        _add_at(residual, indices, values)
        bound = _estimate(residual, nothing, 0, k, wide)
        indices, values, _ = _candidates(residual, nothing, kept, 0, bound, k)
    return *_cut(residual, indices, values, k), nonfinite


def is_one_part(size: int) -> bool:
    """Whether an array of this size is the work of one thread."""
    return len(parts(size, LANES)) == 1


def accumulate(residual: Array, gradient: Array) -> None:
    """Overwrites residual with residual + gradient where that is finite."""
    none = residual.dtype.type(np.inf)
    lanes = _lane_view(gradient)
    _candidates(residual, lanes, _cleared_view(None, lanes), 1, none, 0)


@_jit
def _select_group(
    arrays: Any, table: Any, like: Any, indices_like: Any, nothing: Any, flags: Any
) -> None:
    most = min(arrays[:, 2].max(), 2 * table[:, 2].max() + _SPARE) + LANES
    indices, values = np.empty(most, np.int32), np.empty(most, like.dtype)
    for each in range(arrays.shape[0]):
        n, k = arrays[each, 2], table[each, 2]
        residual = carray(pointer_to(arrays[each, 0], like), (n,))
        gradient = carray(pointer_to(arrays[each, 1], like), (n,))
        flags[each] = _select_top(
            residual, gradient, gradient[:0], nothing, k, indices, values
        )
        carray(pointer_to(table[each, 0], indices_like), (k,))[:] = indices[:k]
        carray(pointer_to(table[each, 1], like), (k,))[:] = values[:k]


def select_group(
    residuals: Sequence[Array], gradients: Sequence[Array], table: Array
) -> list[int]:
    """As select_top, for many arrays in one call and one thread.

    Args:
        residuals: m arrays, (n,), all float32 or all float64.
        gradients: m arrays of the residuals' dtype, contiguous.
        table: (m, 3) int64: addresses where to write indices and values, and k.

    Returns:
        Of each, how many sums were not finite.
    """
    like = residuals[0]
    arrays = np.empty((len(residuals), 3), np.int64)
    arrays[:, 0] = list(map(address, residuals))
    arrays[:, 1] = list(map(address, gradients))
    arrays[:, 2] = [residual.size for residual in residuals]
    nonfinite = np.empty(len(arrays), np.int64)
    nothing = _NOTHING[like.dtype.itemsize]
    _select_group(arrays, table, like, _INDICES, nothing, nonfinite)
    found: list[int] = nonfinite.tolist()
    return found


def select_above(
    residual: Array,
    gradient: Array,
    bound: float,
    limit: int,
    out: Array | None = None,
) -> Selected:
    """As select_top, for entries of magnitude >= bound, at most the limit largest."""
    lanes = _lane_view(gradient)
    cleared = _cleared_view(out, lanes)
    with np.errstate(over="ignore"):  # beyond the residual's range nothing reaches it
        least = residual.dtype.type(bound)
    indices, values, nonfinite = _candidates(residual, lanes, cleared, 1, least, limit)
    return *_cut(residual, indices, values, limit), nonfinite


def select_at(
    residual: Array, gradient: Array, indices: Array, out: Array | None = None
) -> Selected:
    """As select_top, for the entries at the given ascending int32 indices."""
    lanes = _lane_view(gradient)
    cleared = _cleared_view(out, lanes)
    none = residual.dtype.type(np.inf)
    _, _, nonfinite = _candidates(residual, lanes, cleared, 1, none, 0)
    values = np.empty(indices.size, residual.dtype)
    _take_at(residual, indices, values)
    return indices, values, nonfinite


def add_at(residual: Array, indices: Array, values: Array) -> None:
    """Overwrites residual[indices] with residual[indices] + values.

    Raises:
        IndexError: an index is not in [0, n); nothing was written.
    """
    check_places(indices, residual.size)  # the loop would write anywhere
    _add_at(residual, _read(indices), _read(values))


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
def _stream_zeros(out: Any, first: int, stop: int) -> None:
    """Overwrites out[first:stop] with 0 without reading it; for what is large."""
    at, place = first, out.ctypes.data
    while at < stop and (place + at * out.itemsize) % 64:
        out[at] = 0
        at += 1
    whole = stop - (stop - at) % LANES
    for block in range(at, whole, LANES):
        stream_zeros16(out, block)
    out[whole:stop] = 0
    fence()


@_jit
def _aggregate(
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
        _stream_zeros(out, first - offset, stop - offset)
    ranks = table.shape[0]
    cursors = np.empty(ranks, np.int64)
    for rank in range(ranks):
        indices = carray(pointer_to(table[rank, 0], like), (table[rank, 2],))
        cursors[rank] = _lower_bound(indices, first)
    touched = np.zeros(_BLOCKS // 64, np.uint64)
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
                prefetch(out, ahead - offset)  # wherever that is
                out[last - offset] += values[cursor]
                block = (last - low) // LANES
                touched[block // 64] |= np.uint64(1) << np.uint64(block % 64)
                cursor += 1
            taken += cursor - cursors[rank]
            cursors[rank] = cursor
        if taken > before and scale != 1:
            _scale_blocks(out[low - offset : high - offset], touched, scale)
    return taken


def _streams(size: int, itemsize: int, entries: int) -> bool:
    """Whether zeros are better streamed: few of them will be in a cache when needed."""
    return size * itemsize > _BEYOND_CACHE and entries * _FEW <= size


@_jit
def _scale_blocks(out: Any, touched: Any, scale: Any) -> None:
    """Scales the blocks of 16 that were touched, and forgets that they were."""
    for word in range(touched.size):
        while touched[word]:
            block = 64 * word + lowest_bit(touched[word])
            touched[word] &= touched[word] - np.uint64(1)
            for i in range(block * LANES, min((block + 1) * LANES, out.size)):
                out[i] *= scale


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
        streamed = not cleared and _streams(out.size, out.dtype.itemsize, given)
        taken = _sum_wide(out, table, scale, cleared, streamed)
    else:
        taken = _sum_narrow(out, table, scale)
    if taken != given:
        raise ValueError(
            f"indices must ascend in [0, {out.size}), {given - taken} of {given} do not"
        )


@_jit
def _aggregate_group(
    outs: Any, table: Any, like: Any, out_like: Any, scale: Any, streamed: bool
) -> int:
    for each in range(outs.shape[0]):
        n = outs[each, 1]
        out = carray(pointer_to(outs[each, 0], out_like), (n,))
        given = table[each, :, 2].sum()
        taken = _aggregate(out, 0, 0, n, table[each], like, scale, False, streamed)
        if taken != given:
            return each
    return -1


def aggregate_group(outs: Sequence[Array], table: Array, scale: float) -> int:
    """As aggregate, for many arrays in one call and one thread.

    Args:
        outs: m arrays, contiguous, all float32 or all float64; overwritten.
        table: (m, ranks, 3) int64: addresses of indices and of values, and how many.
        scale: as for aggregate.

    Returns:
        The place in outs of an array whose indices do not ascend in [0, n), or -1.
    """
    places = np.empty((len(outs), 2), np.int64)
    places[:, 0] = list(map(address, outs))
    places[:, 1] = [out.size for out in outs]
    like = outs[0].reshape(-1)
    factor = like.dtype.type(scale)
    size, entries = int(places[:, 1].sum()), int(table[:, :, 2].sum())
    streamed = _streams(size, like.dtype.itemsize, entries)
    return int(_aggregate_group(places, table, _INDICES, like, factor, streamed))


def _sum_wide(
    out: Array, table: Array, scale: float, cleared: bool, streamed: bool
) -> int:
    factor = out.dtype.type(scale)

    def one_part(first: int, stop: int) -> int:
        return int(
            _aggregate(out, 0, first, stop, table, _INDICES, factor, cleared, streamed)
        )

    return sum(run_parts(one_part, parts(out.size, _CHUNK)))


def _sum_narrow(out: Array, table: Array, scale: float) -> int:
    """16-bit gradients: sums are float32 and rounded once, a cached piece at a time."""
    piece = 16 * _CHUNK
    sums = np.empty(min(out.size, piece), np.float32)
    taken = 0
    for low in range(0, out.size, piece):
        high = min(low + piece, out.size)
        taken += _aggregate(
            sums, low, low, high, table, _INDICES, np.float32(scale), False, False
        )
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


# ------------------------------------------------------------ where data decide on k


def keep_largest(
    residual: Array, indices: Array, values: Array, k: int
) -> tuple[Array, Array]:
    """The k largest of what was selected; the others return to the residual.

    Overwrites indices and values.
    """
    return _cut(residual, indices, values, k)


def largest_first(values: Array) -> Array:
    """(k,) float64 magnitudes on the host, falling."""
    return np.sort(np.abs(values)).astype(np.float64)[::-1]


def select_some(
    residual: Array, gradient: Array, k: int, out: Array | None = None
) -> Selected:
    """As select_top, for all that reach some bound: k, or up to 2 k and a few."""
    lanes = _lane_view(gradient)
    bound = _estimate(residual, lanes, 1, k, 1)
    if bound == 0:  # all reach it
        return select_top(residual, gradient, k, out)
    found = _all_above(residual, lanes, _cleared_view(out, lanes), 1, bound, k)
    if found[0].size < k:
        _add_at(residual, *found[:2])
        return *select_again(residual, k), found[2]
    return found


def select_again(residual: Array, k: int) -> tuple[Array, Array]:
    """As select_some, with nothing to add."""
    nothing = _NOTHING[residual.dtype.itemsize]
    kept, zero = _cleared_view(None, nothing), residual.dtype.type(0)
    for wide in (1, 4):
        bound = _estimate(residual, nothing, 0, k, wide)
        if bound == 0:
            break
        indices, values, _ = _all_above(residual, nothing, kept, 0, bound, k)
        if indices.size >= k:
            return indices, values
        _add_at(residual, indices, values)
    indices, values, _ = _candidates(residual, nothing, kept, 0, zero, k)
    return _cut(residual, indices, values, k)


def _all_above(
    residual: Array, gradient: Array, out: Array, stride: int, bound: Any, k: int
) -> Selected:
    """All that reach the bound, whatever the number of threads; k of far too many.

    The buffers have room for everything, but only what is used of them is memory.
    """
    found = _candidates(residual, gradient, out, stride, bound, residual.size)
    if found[0].size > 2 * k + _SPARE:
        return *_cut(residual, *found[:2], k), found[2]
    return found


def count_sums(residual: Array, gradient: Array) -> Array:
    """(bins,) int64: magnitudes of residual + gradient in logarithmic bins."""
    return drawing.count_sums(residual, _lane_view(gradient))


def draw(residual: Array, gradient: Array, rate: float, seed: int) -> Selected:
    """Overwrites residual with 0: each entry c is drawn with p, and sent as c / p."""
    return drawing.draw(residual, _lane_view(gradient), rate, seed)


count_magnitudes = drawing.count_magnitudes
norm = drawing.norm
