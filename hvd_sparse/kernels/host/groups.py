"""Many arrays in one call and one thread: for small ones calls cost more than work."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import carray

from hvd_sparse.kernels.coding import FLOAT
from hvd_sparse.kernels.host.aggregation import rooms, sum_entries
from hvd_sparse.kernels.host.arrays import BYTES, INDICES, NOTHING, Array, address
from hvd_sparse.kernels.host.candidates import SPARE
from hvd_sparse.kernels.host.entries import write_entries
from hvd_sparse.kernels.host.jit import jit
from hvd_sparse.kernels.host.selection import select_at_once
from hvd_sparse.kernels.host.simd import LANES, pointer_to
from hvd_sparse.kernels.host.zeros import are_streamed


@jit
def _select_group(
    arrays: Any,
    table: Any,
    like: Any,
    indices_like: Any,
    bytes_like: Any,
    nothing: Any,
    flags: Any,
) -> None:
    most = min(arrays[:, 2].max(), 2 * table[:, 2].max() + SPARE) + LANES
    indices, values = np.empty(most, np.int32), np.empty(most, like.dtype)
    sent = np.empty(table[:, 2].max(), like.dtype)
    for each in range(arrays.shape[0]):
        n, k = arrays[each, 2], table[each, 2]
        residual = carray(pointer_to(arrays[each, 0], like), (n,))
        gradient = carray(pointer_to(arrays[each, 1], like), (n,))
        flags[each] = select_at_once(
            residual, gradient, gradient[:0], nothing, k, indices, values
        )
        write_entries(
            table[each],
            indices[:k],
            values[:k],
            n,
            sent[:k],
            indices_like,
            bytes_like,
        )
        if table[each, 4] != FLOAT:  # what rounding takes is not lost
            for i in range(k):
                residual[indices[i]] += values[i] - sent[i]


def select_group(
    residuals: Sequence[Array], gradients: Sequence[Array], table: Array
) -> list[int]:
    """As select_top, for many arrays in one call and one thread.

    Args:
        residuals: m arrays, (n,), all float32 or all float64.
        gradients: m arrays of the residuals' dtype, contiguous.
        table: (m, 5) int64: addresses where to write indices and values, k, and the
            two kinds; see `entries`.

    Returns:
        Of each, how many sums were not finite.
    """
    like = residuals[0]
    arrays = np.empty((len(residuals), 3), np.int64)
    arrays[:, 0] = list(map(address, residuals))
    arrays[:, 1] = list(map(address, gradients))
    arrays[:, 2] = [residual.size for residual in residuals]
    nonfinite = np.empty(len(arrays), np.int64)
    nothing = NOTHING[like.dtype.itemsize]
    _select_group(arrays, table, like, INDICES, BYTES, nothing, nonfinite)
    found: list[int] = nonfinite.tolist()
    return found


@jit
def _aggregate_group(
    outs: Any,
    table: Any,
    like: Any,
    bytes_like: Any,
    scale: Any,
    streamed: bool,
    indices_room: Any,
    values_room: Any,
) -> int:
    for each in range(outs.shape[0]):
        n = outs[each, 1]
        out = carray(pointer_to(outs[each, 0], values_room), (n,))
        given = table[each, :, 2].sum()
        taken = sum_entries(
            out,
            0,
            0,
            n,
            n,
            table[each],
            like,
            bytes_like,
            scale,
            False,
            streamed,
            indices_room,
            values_room,
        )
        if taken != given:
            return each
    return -1


def aggregate_group(outs: Sequence[Array], table: Array, scale: float) -> int:
    """As aggregate, for many arrays in one call and one thread.

    Args:
        outs: m arrays, contiguous, all float32 or all float64; overwritten.
        table: (m, ranks, 5) int64: addresses of indices and of values, how many, and
            the two kinds; see `entries`.
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
    streamed = are_streamed(size, like.dtype.itemsize, entries)
    room = rooms(int(places[:, 1].max()), like.dtype)
    given = places, table, INDICES, BYTES, factor, streamed, *room
    return int(_aggregate_group(*given))
