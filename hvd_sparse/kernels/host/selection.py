"""Which entries leave the residual: the k largest, some of the largest, or given ones.

All overwrite the residual with residual + gradient less what is selected.
"""

from typing import Any

import numpy as np

from hvd_sparse.kernels.host.arrays import (
    NOTHING,
    Array,
    Selected,
    cleared_view,
    lane_view,
    readable,
)
from hvd_sparse.kernels.host.candidates import SPARE, candidates, compact, reserved
from hvd_sparse.kernels.host.estimate import estimate_bound
from hvd_sparse.kernels.host.jit import jit
from hvd_sparse.kernels.host.largest import keep_largest, trim
from hvd_sparse.kernels.host.simd import LANES
from hvd_sparse.kernels.host.threads import parts
from hvd_sparse.kernels.reference import check_places


@jit
def _take_at(residual: Any, indices: Any, values: Any) -> None:
    for i in range(indices.size):
        values[i] = residual[indices[i]]
        residual[indices[i]] = 0


@jit
def _add_at(residual: Any, indices: Any, values: Any) -> None:
    for i in range(indices.size):
        residual[indices[i]] += values[i]


@jit
def select_at_once(
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
    bound = estimate_bound(residual, gradient, 1, k, 1)
    count, nonfinite = compact(
        residual, gradient, 1, out, clears, 0, n, bound, k, indices, values
    )
    wide = 4  # too high an estimate is mended by one that is surely low
    while count < k:  # the sums are in the residual now: scan it again, adding nothing
        _add_at(residual, indices[:count], values[:count])
        bound = estimate_bound(residual, nothing, 0, k, wide)
        count, _ = compact(
            residual, nothing, 0, out, False, 0, n, bound, k, indices, values
        )
        wide = n  # then every element is a candidate
    if count > k:
        trim(residual, indices, values, count, k)
    return nonfinite


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
    lanes = lane_view(gradient)
    cleared = cleared_view(out, lanes)
    nothing = NOTHING[residual.dtype.itemsize]
    if is_one_part(residual.size):
        indices, values = reserved(residual, residual.size, k, 1)
        nonfinite = select_at_once(
            residual, lanes, cleared, nothing, k, indices, values
        )
        return indices[:k], values[:k], nonfinite
    bound = estimate_bound(residual, lanes, 1, k, 1)
    indices, values, nonfinite = candidates(residual, lanes, cleared, 1, bound, k)
    kept = cleared_view(None, lanes)
    for wide in (4, residual.size):
        if indices.size >= k:
            break
        _add_at(residual, indices, values)
        bound = estimate_bound(residual, nothing, 0, k, wide)
        indices, values, _ = candidates(residual, nothing, kept, 0, bound, k)
    return *keep_largest(residual, indices, values, k), nonfinite


def is_one_part(size: int) -> bool:
    """Whether an array of this size is the work of one thread."""
    return len(parts(size, LANES)) == 1


def accumulate(residual: Array, gradient: Array) -> None:
    """Overwrites residual with residual + gradient where that is finite."""
    none = residual.dtype.type(np.inf)
    lanes = lane_view(gradient)
    candidates(residual, lanes, cleared_view(None, lanes), 1, none, 0)


def select_above(
    residual: Array,
    gradient: Array,
    bound: float,
    limit: int,
    out: Array | None = None,
) -> Selected:
    """As select_top, for entries of magnitude >= bound, at most the limit largest."""
    lanes = lane_view(gradient)
    cleared = cleared_view(out, lanes)
    with np.errstate(over="ignore"):  # beyond the residual's range nothing reaches it
        least = residual.dtype.type(bound)
    indices, values, nonfinite = candidates(residual, lanes, cleared, 1, least, limit)
    return *keep_largest(residual, indices, values, limit), nonfinite


def select_at(
    residual: Array, gradient: Array, indices: Array, out: Array | None = None
) -> Selected:
    """As select_top, for the entries at the given ascending int32 indices."""
    lanes = lane_view(gradient)
    cleared = cleared_view(out, lanes)
    none = residual.dtype.type(np.inf)
    _, _, nonfinite = candidates(residual, lanes, cleared, 1, none, 0)
    values = np.empty(indices.size, residual.dtype)
    _take_at(residual, indices, values)
    return indices, values, nonfinite


def add_at(residual: Array, indices: Array, values: Array) -> None:
    """Overwrites residual[indices] with residual[indices] + values.

    Raises:
        IndexError: an index is not in [0, n); nothing was written.
    """
    check_places(indices, residual.size)  # the loop would write anywhere
    _add_at(residual, readable(indices), readable(values))


def select_some(
    residual: Array, gradient: Array, k: int, out: Array | None = None
) -> Selected:
    """As select_top, for all that reach some bound: k, or up to 2 k and a few."""
    lanes = lane_view(gradient)
    bound = estimate_bound(residual, lanes, 1, k, 1)
    if bound == 0:  # all reach it
        return select_top(residual, gradient, k, out)
    found = _all_above(residual, lanes, cleared_view(out, lanes), 1, bound, k)
    if found[0].size < k:
        _add_at(residual, *found[:2])
        return *select_again(residual, k), found[2]
    return found


def select_again(residual: Array, k: int) -> tuple[Array, Array]:
    """As select_some, with nothing to add."""
    nothing = NOTHING[residual.dtype.itemsize]
    kept, zero = cleared_view(None, nothing), residual.dtype.type(0)
    for wide in (1, 4):
        bound = estimate_bound(residual, nothing, 0, k, wide)
        if bound == 0:
            break
        indices, values, _ = _all_above(residual, nothing, kept, 0, bound, k)
        if indices.size >= k:
            return indices, values
        _add_at(residual, indices, values)
    indices, values, _ = candidates(residual, nothing, kept, 0, zero, k)
    return keep_largest(residual, indices, values, k)


def _all_above(
    residual: Array, gradient: Array, out: Array, stride: int, bound: Any, k: int
) -> Selected:
    """All that reach the bound, whatever the number of threads; k of far too many.

    The buffers have room for everything, but only what is used of them is memory.
    """
    found = candidates(residual, gradient, out, stride, bound, residual.size)
    if found[0].size > 2 * k + SPARE:
        return *keep_largest(residual, *found[:2], k), found[2]
    return found
