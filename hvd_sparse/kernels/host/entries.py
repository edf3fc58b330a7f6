"""Entries, in and out of bytes: see `hvd_sparse.kernels.coding`.

A loop meets them as a row of five int64: the addresses of indices and of values, how
many there are, and the two kinds.
"""

from typing import Any

import numpy as np
from numba import carray

from hvd_sparse.kernels.coding import (
    ELIAS_FANO,
    FLOAT,
    RAW,
    Coded,
    shift,
    unary_bits,
    value_bytes,
)
from hvd_sparse.kernels.host.arrays import BYTES, INDICES, Array, address, readable
from hvd_sparse.kernels.host.elias_fano import (
    read_until,
    seek,
    write_indices,
)
from hvd_sparse.kernels.host.jit import jit
from hvd_sparse.kernels.host.rounding import read_values, round_values
from hvd_sparse.kernels.host.simd import pointer_to


@jit
def index_region(row: Any, n: int, bytes_like: Any) -> Any:
    """The bytes of Elias-Fano indices, and their low and unary bits; none if raw."""
    k = row[2]
    if row[3] != ELIAS_FANO or k == 0:
        return carray(pointer_to(row[0], bytes_like), (0,)), 0, 0
    low = shift(n, k)
    unary = unary_bits(n, k, low)
    size = (unary + k * low + 7) // 8
    return carray(pointer_to(row[0], bytes_like), (size,)), low, unary


@jit
def value_region(row: Any, size: int, bytes_like: Any) -> Any:
    """The bytes of values that are rounded."""
    count = value_bytes(row[4], row[2], size)
    return carray(pointer_to(row[1], bytes_like), (count,))


@jit
def write_entries(
    row: Any, indices: Any, values: Any, n: int, sent: Any, like: Any, bytes_like: Any
) -> None:
    """Overwrites what a row points to; and sent, if values are rounded, as is read."""
    if row[3] == ELIAS_FANO:
        if indices.size:
            write_indices(index_region(row, n, bytes_like)[0], indices, n)
    else:  # none where every rank knows them
        carray(pointer_to(row[0], like), (indices.size,))[:] = indices
    if row[4] == FLOAT:
        carray(pointer_to(row[1], values), (values.size,))[:] = values
    else:
        data = value_region(row, values.itemsize, bytes_like)
        round_values(data, row[4], values, sent)


@jit
def find_entry(row: Any, n: int, first: int, found: Any, like: Any, b: Any) -> Any:
    """The first entry whose index is not below `first`, and the bit to look from."""
    if row[3] == ELIAS_FANO:
        data, low, unary = index_region(row, n, b)
        return seek(data, low, unary, row[2], first, found)
    indices = carray(pointer_to(row[0], like), (row[2],))
    low, high = 0, indices.size
    while low < high:
        middle = (low + high) // 2
        if indices[middle] < first:
            low = middle + 1
        else:
            high = middle
    return low, 0


@jit
def next_indices(
    row: Any, n: int, entry: int, at: int, stop: int, found: Any, like: Any, b: Any
) -> Any:
    """Of the entries from this one on those below stop; and the bit to look from.

    Raw ones where they lie, others in `found`; no more than it has room for.
    """
    if row[3] == ELIAS_FANO:
        data, low, unary = index_region(row, n, b)
        count, at = read_until(data, low, unary, row[2], entry, at, stop, found)
        return found[:count], at
    indices = carray(pointer_to(row[0], like), (row[2],))
    last = entry
    most = min(row[2], entry + found.size)
    while last < most and indices[last] < stop:
        last += 1
    return indices[entry:last], 0


@jit
def next_values(row: Any, entry: int, count: int, found: Any, b: Any) -> Any:
    """Those of so many entries from this one on, where they lie or in `found`."""
    if row[4] == FLOAT:
        return carray(pointer_to(row[1], found), (row[2],))[entry : entry + count]
    data = value_region(row, found.itemsize, b)
    read_values(data, row[4], row[2], entry, found[:count])
    return found[:count]


# ------------------------------------------------------------- of one tensor, alone


@jit
def _decode(row: Any, n: int, indices: Any, values: Any, b: Any) -> Any:
    if row[4] != FLOAT:
        read_values(value_region(row, values.itemsize, b), row[4], row[2], 0, values)
    if row[3] == RAW:
        return row[2]
    data, low, unary = index_region(row, n, b)
    return read_until(data, low, unary, row[2], 0, 0, n, indices)[0]


def row_of(coded: Coded) -> tuple[int, int, int, int, int]:
    """Where it lies; it must live on."""
    places = address(coded.indices), address(coded.values)
    return *places, coded.k, coded.index_kind, coded.value_kind


def encode(coded: Coded, indices: Array, values: Array, n: int) -> Array:
    """Overwrites the bytes of entries.

    Args:
        coded: bytes, as many as these kinds take.
        indices: (k,) int32, ascending in [0, n).
        values: (k,) float32 or float64, finite.
        n: elements of the tensor.

    Returns:
        (k,) the values that are read from it; `values` itself, or rounded.
    """
    rounds = coded.value_kind != FLOAT
    sent = np.empty_like(values) if rounds else values
    row = np.array(row_of(coded), np.int64)
    given = readable(indices), readable(values), n, readable(sent)
    write_entries(row, *given, INDICES, BYTES)
    return sent


def decode(coded: Coded, n: int, like: Array) -> tuple[Array, Array]:
    """Indices and values, as arrays; views where they travel as they are.

    Args:
        coded: what a rank sent.
        n: elements of the tensor.
        like: of the values' dtype.

    Returns:
        (k,) int32, fewer where bytes were damaged, and (k,).
    """
    raw, rounds = coded.index_kind == RAW, coded.value_kind != FLOAT
    indices = coded.indices if raw else np.empty(coded.k, np.int32)
    values = np.empty(coded.k, like.dtype) if rounds else coded.values
    if not raw or rounds:
        row = np.array(row_of(coded), np.int64)
        taken = _decode(
            row, n, indices if not raw else INDICES, readable(values), BYTES
        )
        indices = indices[:taken] if not raw else indices
    return indices, values
