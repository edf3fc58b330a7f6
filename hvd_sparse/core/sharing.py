"""Which arrays share memory: a result must not overwrite what is still to be read."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from hvd_sparse.core.contracts import Array

_EFFORT = 100_000  # candidates that numpy tries before it gives up


class Span(NamedTuple):
    """Bytes that an array reaches over: [start, end)."""

    start: int
    end: int


def span(array: Array) -> Span:
    """Of an array on the host or a device, strided in any way."""
    if 0 in array.shape:
        return Span(0, 0)
    if isinstance(array, np.ndarray):
        start, strides = array.__array_interface__["data"][0], array.strides
    else:
        start = array.data_ptr()
        strides = tuple(stride * array.itemsize for stride in array.stride())
    end = start + array.itemsize
    for length, stride in zip(array.shape, strides, strict=True):
        reach = (length - 1) * stride
        start, end = (start, end + reach) if reach > 0 else (start + reach, end)
    return Span(start, end)


def sharing(arrays: Mapping[str, Array]) -> list[tuple[str, str]]:
    """All pairs of names whose arrays have memory in common.

    Costs about as much as sorting the arrays where none do.
    """
    spans = sorted((span(array), name) for name, array in arrays.items())
    pairs, open_ones = [], list[tuple[Span, str]]()
    for here, name in spans:
        open_ones = [other for other in open_ones if other[0].end > here.start]
        pairs += [
            (earlier, name)
            for _, earlier in open_ones
            if _share(arrays[earlier], arrays[name])
        ]
        open_ones.append((here, name))
    return pairs


def _share(first: Array, second: Array) -> bool:
    """Of two arrays whose spans meet; exact on the host, views may interleave."""
    if not (isinstance(first, np.ndarray) and isinstance(second, np.ndarray)):
        return True
    try:
        return np.shares_memory(first, second, max_work=_EFFORT)
    except np.exceptions.TooHardError:
        return True


def repeats(array: Array) -> bool:
    """Whether two elements of it are one in memory, as after a broadcast."""
    if not isinstance(array, np.ndarray):
        return bool(0 in array.stride() and array.numel() > 1)
    if array.flags.c_contiguous or array.size < 2:
        return False
    places = np.zeros((), np.int64)
    for length, stride in zip(array.shape, array.strides, strict=True):
        places = np.add.outer(places, np.arange(length) * stride)
    return np.unique(places).size < array.size
